"""Streamer: the samples of the whole mel, however it is cut, at a constant cost."""

import numpy as np
import pytest
import torch

from env import load_config
from harmonic import PhaseState
from harmonic_stream import GRIFFIN_LIM_LOOKAHEAD, HarmonicStream
from inference import load_generator, to_inference
from meldataset import LogMelSpectrogram
from models import Generator
from streaming import Streamer
from tests.conftest import new_generator, random_mel
from tools.toy import ROOT, speech_like, write_config

FRAME_RATE = "configs/frame_v2.json"
FAMILY = {
    "MISR": ("config_v2.json", {}),
    "MISR, conv merge": ("config_v2.json", {"misr_merge": "conv"}),
    "MRF": ("configs/hifigan_v2.json", {}),
    "MRF, ResBlock2": ("configs/hifigan_v3.json", {"upsample_initial_channel": 32}),
    "iSTFT": ("configs/istft_v2.json", {}),
    "kernels as wide as their strides": (
        "configs/hifigan_v2.json",
        {"upsample_rates": [16, 16], "upsample_kernel_sizes": [16, 16]},
    ),
}


def stream(streamer: Streamer, mel: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Feeds a mel in pieces of the given sizes, over and over, and flushes."""
    pieces, first = [], 0
    while first < mel.shape[1]:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(streamer.feed(mel[:, first : first + size]))
        first += size
    return torch.cat([*pieces, streamer.flush()])


def frame_rate_generator(tmp_path, **changes) -> Generator:
    """A toy frame-rate generator in float64, in which rounding errors stay small."""
    h = load_config(write_config(tmp_path / "config.json", FRAME_RATE, **changes))
    generator = Generator(h).double()
    generator.remove_weight_norm()
    return generator.eval().requires_grad_(False)


@pytest.fixture(params=FAMILY.values(), ids=FAMILY)
def generator(request, tmp_path) -> Generator:
    config, changes = request.param
    generator = new_generator(tmp_path, config, **changes).double()
    generator.remove_weight_norm()
    return generator.eval().requires_grad_(False)


CUTS = ([1], [3], [8], [57], [2, 0, 5, 1, 13])


@pytest.mark.parametrize("frames", [1, 2, 9, 60])
def test_the_pieces_of_a_stream_equal_the_whole(generator, frames):
    mel = random_mel(frames)
    expected = generator(mel[None].double())[0, 0]
    for sizes in CUTS:
        wav = stream(Streamer(generator), mel, sizes)
        assert wav.shape == expected.shape
        assert (wav - expected).abs().max() < 1e-10


def test_samples_are_returned_after_the_latency(generator):
    streamer, returned = Streamer(generator), 0
    for count in range(1, 2 * streamer.latency):
        returned += len(streamer.feed(random_mel(1)))
        assert returned >= max(0, count - streamer.latency) * generator.hop_size


@pytest.mark.parametrize("changes", [{}, {"lookahead_frames": 3}, {"resblock": "2"}], ids=str)
@pytest.mark.parametrize("frames", [1, 5, 40])
def test_the_samples_of_a_frame_rate_stream_do_not_depend_on_the_cuts(tmp_path, changes, frames):
    generator, mel = frame_rate_generator(tmp_path, **changes), random_mel(frames)
    expected = Streamer(generator).flush(mel)
    assert expected.shape == (frames * generator.hop_size,)
    assert expected.std() > 1e-3
    for sizes in CUTS:
        wav = stream(Streamer(generator), mel, sizes)
        assert (wav - expected).abs().max() < 1e-6 * expected.abs().max()


def test_with_a_steady_voice_a_frame_rate_stream_has_the_spectra_of_the_whole(tmp_path):
    head = frame_rate_generator(tmp_path).head
    x = torch.randn(1, head.in_channels, 1).double().expand(-1, -1, 12)
    mel = random_mel(12)[None].double()
    expected = head.unrefined(x, mel, head.excitation(x, PhaseState()))
    refined = head.refiner(expected[2])
    stream, arrays, refinements = HarmonicStream(head, GRIFFIN_LIM_LOOKAHEAD), [], []
    for first, last in ((0, 1), (1, 6), (6, 12)):
        piece = [each[0, :, first:last].T.numpy() for each in (x, mel)]
        arrays.append(stream.unrefined(*piece))
        refinements.append(stream.refine(arrays[-1][2], is_last=last == 12))
    spectrum, log_magnitude, patches = (
        np.concatenate(parts) for parts in zip(*arrays, strict=True)
    )
    assert np.abs(spectrum - expected[0][0].numpy()).max() < 1e-6
    assert np.abs(log_magnitude - expected[1][0].numpy()).max() < 1e-6
    assert np.abs(patches - expected[2][0].permute(1, 2, 0).numpy()).max() < 1e-6
    refinement = np.concatenate(refinements)
    assert np.abs(refinement - refined[0, :, : refinement.shape[1]].numpy()).max() < 1e-6


def test_a_frame_rate_stream_in_half_precision_is_near_to_full_precision(tmp_path):
    mel, h = random_mel(12), load_config(write_config(tmp_path / "config.json", FRAME_RATE))
    generator = to_inference(Generator(h), torch.device("cpu"), "fp32")
    expected = Streamer(generator).flush(mel)
    wav = Streamer(to_inference(generator, torch.device("cpu"), "bf16")).flush(mel)
    assert wav.dtype == torch.float32
    log_mel = LogMelSpectrogram(h, h.fmax)
    assert (log_mel(wav[None]) - log_mel(expected[None])).abs().mean() < 0.1


def test_a_frame_rate_stream_has_the_bounded_look_ahead_it_states(tmp_path):
    generator = frame_rate_generator(tmp_path, lookahead_frames=3)
    streamer, mel = Streamer(generator), random_mel(40)
    assert streamer.latency == 3 + GRIFFIN_LIM_LOOKAHEAD + 2  # network, Griffin-Lim, window
    wav = streamer.feed(mel)
    assert (40 - streamer.latency) * generator.hop_size <= len(wav)
    other = mel.clone()
    other[:, 39] += 1  # the last frame changes nothing that has been returned before it came
    before = Streamer(generator).feed(mel[:, :39])
    assert torch.equal(before, Streamer(generator).feed(other[:, :39]))
    assert (before - wav[: len(before)]).abs().max() < 1e-6 * wav.abs().max()


def test_a_stream_of_the_shipped_weights_is_as_near_to_the_mel_as_the_whole():
    generator, h = load_generator(next(ROOT.glob("pretrained/frame_v3_universal/g_*")))
    log_mel = LogMelSpectrogram(h, h.fmax)
    mel = log_mel(torch.from_numpy(speech_like(1.0))[None])[0]
    wholes, streams = generator(mel[None])[0], Streamer(generator).flush(mel)[None]
    errors = [float((log_mel(wav)[0] - mel).abs().mean()) for wav in (wholes, streams)]
    assert errors[1] < 1.2 * errors[0]


def test_several_streams_share_a_generator_and_a_flush_starts_a_new_mel(generator):
    mels = [random_mel(30), random_mel(30)]
    expected = [generator(mel[None].double())[0, 0] for mel in mels]
    streamers, pieces = [Streamer(generator) for _ in mels], ([], [])
    for first in range(0, 30, 7):
        for streamer, mel, kept in zip(streamers, mels, pieces, strict=True):
            kept.append(streamer.feed(mel[:, first : first + 7]))
    for streamer, kept, wav in zip(streamers, pieces, expected, strict=True):
        assert (torch.cat([*kept, streamer.flush()]) - wav).abs().max() < 1e-10
    again = stream(streamers[0], mels[1], [4])
    assert (again - expected[1]).abs().max() < 1e-10
    streamers[0].feed(mels[0])
    streamers[0].reset()
    assert (streamers[0].flush(mels[1]) - expected[1]).abs().max() < 1e-10


def kept_elements(thing, seen: set[int]) -> int:
    """Counts the elements of all tensors and arrays that a streamer's objects hold."""
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return 0
    seen.add(id(thing))
    if torch.is_tensor(thing):
        return thing.numel()
    if isinstance(thing, np.ndarray):
        return thing.size
    inner = thing.values() if isinstance(thing, dict) else thing
    if not isinstance(thing, dict | list | tuple):
        inner = vars(thing).values() if hasattr(thing, "__dict__") else ()
    return sum(kept_elements(each, seen) for each in inner)


@pytest.mark.parametrize("config", ["config_v2.json", FRAME_RATE])
def test_a_stream_keeps_no_more_the_longer_it_gets(tmp_path, config):
    generator = Generator(load_config(write_config(tmp_path / "config.json", config))).eval()
    generator.remove_weight_norm()
    streamer, sizes = Streamer(generator), []
    for _ in range(6):
        streamer.feed(random_mel(50))
        sizes.append(kept_elements(streamer, set()))
    assert sizes[2] == sizes[-1]


def test_an_empty_stream_is_empty(generator):
    streamer = Streamer(generator)
    assert len(streamer.flush()) == 0
    assert len(streamer.feed(torch.zeros(80, 0))) == 0
    assert len(streamer.flush()) == 0


def test_frames_of_a_batch_of_one_and_of_numpy_are_taken(generator):
    mel = random_mel(20)
    expected = generator(mel[None].double())[0, 0]
    assert (Streamer(generator).flush(mel[None]) - expected).abs().max() < 1e-10
    assert (Streamer(generator).flush(mel.numpy()[:, ::-1][:, ::-1]) - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("mel", "error", "message"),
    [
        (torch.zeros(79, 4), ValueError, r"\[79, 4\]: expected \[80, T\]"),
        (torch.zeros(2, 80, 4), ValueError, r"\[2, 80, 4\]"),
        (torch.full((80, 4), torch.nan), ValueError, "NaN"),
        (np.full((80, 4), 1e39), ValueError, "infinity"),
        (torch.zeros(80, 4, dtype=torch.bool), TypeError, "real numbers"),
        ("speech", TypeError, "expected a tensor"),
    ],
)
def test_what_is_no_mel_is_refused_and_changes_nothing(generator, mel, error, message):
    streamer, good = Streamer(generator), random_mel(20)
    with pytest.raises(error, match=message):
        streamer.feed(mel)
    assert (streamer.flush(good) - generator(good[None].double())[0, 0]).abs().max() < 1e-10
