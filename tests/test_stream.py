"""However a mel is cut, its pieces sound as the whole, and come as soon as they are final."""

import re
import warnings

import numpy as np
import pytest
import torch

from inference import Streamer, load_generator, stream, synthesize
from models import Generator
from tests.conftest import new_checkpoint, random_mel

GENERATORS = {
    "MISR mean": ("config_v2.json", {}),
    "MISR conv": ("config_v2.json", {"misr_merge": "conv"}),
    "MRF": ("configs/hifigan_v2.json", {}),
    "iSTFT": ("configs/istft_v2.json", {}),
}
FRAMES = 45  # more than a receptive field, before and after
RANDOM = np.random.default_rng(0).integers(0, 12, size=8)
CUTS = {
    "one at a time": [1] * FRAMES,
    "all at once": [FRAMES],
    "some of them empty": [0, 20, 0, 0, 25, 0],
    "random": [*RANDOM, FRAMES - sum(RANDOM)],
}


@pytest.fixture(scope="module", params=GENERATORS.values(), ids=GENERATORS)
def generator(request, tmp_path_factory) -> Generator:
    """A generator that listens to all of its receptive field, ready to speak."""
    config, changes = request.param
    return load_generator(new_checkpoint(tmp_path_factory.mktemp("cp"), config, **changes))[0]


@pytest.fixture(scope="module")
def misr(tmp_path_factory) -> Generator:
    """The first of them, for what does not depend on the model."""
    return load_generator(new_checkpoint(tmp_path_factory.mktemp("cp")))[0]


def whole(generator: Generator, mel: torch.Tensor) -> torch.Tensor:
    """The waveform [N] of one forward pass."""
    with torch.no_grad():
        return generator(mel[None])[0, 0]


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.03  # no silence
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_any_cuts_give_the_whole_as_soon_as_it_is_final(generator, cuts):
    mel, streamer = random_mel(FRAMES), Streamer(generator)
    (before, after), hop_size = generator.receptive_field, generator.hop_size
    pieces, fed = [], 0
    for size in cuts:
        pieces.append(streamer.feed(mel[:, fed : fed + size]))
        fed += size
        assert sum(map(len, pieces)) == max(0, fed - after) * hop_size
        assert streamer.mel.shape[1] <= before + after
        kept = streamer.mel.untyped_storage().nbytes() / (80 * 4)  # float32
        assert kept <= before + after + size
    pieces.append(streamer.flush())
    assert_same(torch.cat(pieces), whole(generator, mel))


@pytest.mark.parametrize("missing", [(2, 0), (0, 2)], ids=["before", "after"])
def test_two_frames_less_of_context_would_be_heard(generator, missing, monkeypatch):
    mel = random_mel(FRAMES)
    context = tuple(n - m for n, m in zip(generator.receptive_field, missing, strict=True))
    monkeypatch.setattr(Generator, "receptive_field", context)
    pieces = synthesize(generator, mel, chunk_frames=7)
    assert (pieces - whole(generator, mel)).abs().max() > 1e-3


def test_a_streamer_begins_anew_after_flush(misr):
    streamer = Streamer(misr)
    assert len(streamer.flush()) == 0
    for frames in (30, 40):
        mel = random_mel(frames)
        pieces = [streamer.feed(mel[:, :17]), streamer.flush(mel[:, 17:])]
        assert_same(torch.cat(pieces), whole(misr, mel))


KINDS = {
    "float64 tensor": lambda mel: mel.double(),
    "integer tensor": lambda mel: mel.int(),
    "tensor with a gradient": lambda mel: mel.clone().requires_grad_(),
    "float64 array": lambda mel: mel.double().numpy(),
    "integer array": lambda mel: mel.numpy().astype(np.int16),
    "read-only array": lambda mel: np.broadcast_to(mel.numpy(), mel.shape),
    "reversed array": lambda mel: mel.flip(1).numpy()[:, ::-1],
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_frames_may_be_of_any_real_numbers(misr, make):
    mel = random_mel(FRAMES).round()
    given = make(mel)
    streamer = Streamer(misr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces = [streamer.feed(given[:, :20]), streamer.feed(given[:, 20:])]
    assert not streamer.mel.requires_grad  # or the graph of all that was fed would be kept
    assert_same(torch.cat([*pieces, streamer.flush()]), whole(misr, mel))
    assert_same(synthesize(misr, given), whole(misr, mel))


REFUSED = {
    "None": (None, TypeError),
    "text": ("mel", TypeError),
    "objects": (np.full((80, 9), None), TypeError),
    "complex": (torch.zeros(80, 9, dtype=torch.complex64), TypeError),
    "bool": (torch.zeros(80, 9, dtype=torch.bool), TypeError),
    "a batch": (torch.zeros(1, 80, 9), ValueError),
    "transposed": (torch.zeros(9, 80), ValueError),
    "one frame without its axis": (torch.zeros(80), ValueError),
    "one NaN": (
        torch.zeros(80, 9).index_put((torch.tensor(11), torch.tensor(8)), torch.tensor(torch.nan)),
        ValueError,
    ),
    "infinite": (np.full((80, 9), np.inf), ValueError),
    "infinite in float32": (np.full((80, 9), 1e39), ValueError),
}


@pytest.mark.parametrize("mel, kind", REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_in_one_line_and_changes_nothing(misr, mel, kind):
    good, streamer = random_mel(FRAMES), Streamer(misr)
    pieces = [streamer.feed(good[:, :20])]
    speakers = [
        streamer.feed,
        lambda mel: synthesize(misr, mel),
        lambda mel: stream(misr, mel, 4),  # at the call, not at the first piece
        *([] if mel is None else [streamer.flush]),
    ]
    for speak in speakers:
        with pytest.raises(kind, match="mel") as error:
            speak(mel)
        assert "\n" not in str(error.value)
    pieces.append(streamer.flush(good[:, 20:]))
    assert_same(torch.cat(pieces), whole(misr, good))


# ------------------------------------------------------------------------------------------ stream


@pytest.mark.parametrize("chunk_frames", [15, 16, 1000, 0])
def test_a_stream_of_chunks_is_the_whole(generator, chunk_frames):
    mel = random_mel(FRAMES)
    pieces = list(stream(generator, mel, chunk_frames))
    assert all(map(len, pieces))
    assert_same(torch.cat(pieces), whole(generator, mel))
    assert torch.equal(synthesize(generator, mel, chunk_frames), torch.cat(pieces))


def test_a_piece_comes_before_the_next_is_made_and_from_its_own_context(misr, monkeypatch):
    heard, forward = [], Generator.forward
    monkeypatch.setattr(
        Generator,
        "forward",
        lambda s, x, origin: heard.append(len(x[0, 0])) or forward(s, x, origin),
    )
    pieces, context = stream(misr, random_mel(60), chunk_frames=16), 13 + 13
    for frames, given in ((3, 16), (16, 16 + 16), (16, context + 16), (25, context + 12)):
        assert not heard
        assert len(next(pieces)) == frames * misr.hop_size
        assert heard == [given]
        heard.clear()
        assert not torch.is_inference_mode_enabled()  # that is stream's own affair
    assert next(pieces, None) is None


def test_a_mel_of_no_frames_and_negative_chunks_are_refused(misr):
    with pytest.raises(ValueError, match=re.escape("mel of shape [80, 0]: expected one frame")):
        synthesize(misr, torch.zeros(80, 0))
    with pytest.raises(ValueError, match="chunk_frames = -1: expected 0 or more"):
        synthesize(misr, random_mel(5), chunk_frames=-1)
