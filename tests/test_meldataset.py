"""The mel, files in, and the dataset, each against an independent computation."""

import itertools
import math
import random
import unicodedata
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import meldataset
from audio import load_mel, load_wav
from env import Config, UserError
from losses import MelLoss
from meldataset import (
    LogMelSpectrogram,
    MelDataset,
    ResumableBatchSampler,
    mel_of_stretch,
    read_clips,
)
from tools.toy import run_main, speech_like, toy_config, write_config

RATE, HOP, SEGMENT = 22050, 256, 2048  # of the toy config
FRAMES = SEGMENT // HOP
SILENCE = math.log(1e-5)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Arrays this small only wait for a second thread, where other work keeps the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- LogMelSpectrogram

RECIPES = {
    "v2": {},
    "loss": {"fmax": None},
    "short-window": {"win_size": 800},
    "odd-window": {"win_size": 601},
    "44k": {
        "sampling_rate": 44100,
        "num_mels": 128,
        "n_fft": 2048,
        "win_size": 2048,
        "hop_size": 512,
        "fmin": 40,
        "upsample_rates": [8, 8, 4, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4],
    },
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def half_silent(seconds: float = 0.5) -> np.ndarray:
    """Speech-like sound, then nothing at all."""
    return np.concatenate([speech_like(seconds), np.zeros(4000, np.float32)])


def numpy_log_mel(wav: np.ndarray, h: Config) -> np.ndarray:
    """HiFi-GAN's log-mel [num_mels, N // hop_size] of wav [N], in numpy and float64."""
    padding = (h.n_fft - h.hop_size) // 2
    count = len(wav) // h.hop_size
    wav = np.pad(wav.astype(np.float64), (0, max(0, padding + 1 - len(wav))))
    wav = np.pad(wav, padding, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(h.win_size) / h.win_size)
    left = (h.n_fft - h.win_size) // 2
    window = np.pad(window, (left, h.n_fft - h.win_size - left))
    frames = np.stack([wav[t * h.hop_size :][: h.n_fft] * window for t in range(count)])
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)
    recipe = {"n_mels": h.num_mels, "fmin": h.fmin, "fmax": h.fmax, "dtype": np.float64}
    filterbank = librosa.filters.mel(sr=h.sampling_rate, n_fft=h.n_fft, **recipe)
    return np.log(np.maximum(filterbank @ magnitude.T, 1e-5))


def torch_log_mel(wav: torch.Tensor, h: Config) -> torch.Tensor:
    """HiFi-GAN's operations, one by one, of wav [B, N]."""
    basis = torch.from_numpy(
        librosa.filters.mel(
            sr=h.sampling_rate, n_fft=h.n_fft, n_mels=h.num_mels, fmin=h.fmin, fmax=h.fmax
        )
    )
    padding = int((h.n_fft - h.hop_size) / 2)
    padded = F.pad(wav.unsqueeze(1), (padding, padding), mode="reflect").squeeze(1)
    spectrum = torch.stft(
        padded,
        h.n_fft,
        hop_length=h.hop_size,
        win_length=h.win_size,
        window=torch.hann_window(h.win_size),
        center=False,
        onesided=True,
        return_complex=True,
    )
    magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)
    return torch.log(torch.clamp(torch.matmul(basis, magnitude), min=1e-5))


@recipes
def test_mel_equals_the_same_operations_in_torch(tmp_path, recipe):
    h = toy_config(tmp_path, **recipe)
    wavs = torch.from_numpy(np.stack([half_silent(), half_silent()[::-1] * 0.1]))
    mels = LogMelSpectrogram(h, h.fmax)(wavs)
    torch.testing.assert_close(mels, torch_log_mel(wavs, h), rtol=0, atol=1e-5)


@recipes
def test_mel_equals_numpy_and_librosa(tmp_path, recipe):
    h = toy_config(tmp_path, **recipe)
    wav = half_silent()
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav)[None])[0].numpy()
    difference = np.abs(mel - numpy_log_mel(wav, h))
    assert difference.mean() <= 1e-5
    assert difference.max() <= 5e-3


@pytest.mark.parametrize("length", [256, 300, 384, 385, 511, 512, 2048, 2303, 5000])
def test_mel_has_a_frame_for_each_hop_and_pads_what_is_too_short_to_reflect(tmp_path, length):
    h = toy_config(tmp_path)
    wav = speech_like(1)[-length:]
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav.copy())[None])
    assert mel.shape == (1, 80, length // HOP)
    np.testing.assert_allclose(mel[0], numpy_log_mel(wav, h), rtol=0, atol=5e-3)


def test_mel_of_silence_is_its_floor_and_has_a_finite_gradient(tmp_path):
    h = toy_config(tmp_path)
    wav = torch.zeros(1, SEGMENT, requires_grad=True)
    mel = LogMelSpectrogram(h, h.fmax)(wav)
    mel.sum().backward()
    torch.testing.assert_close(mel, torch.full((1, 80, FRAMES), SILENCE))
    assert wav.grad.isfinite().all()


# --- MelLoss


def test_the_mel_loss_is_the_mean_distance_of_the_configs_mels(tmp_path):
    h = toy_config(tmp_path)
    wavs = torch.randn(2, 2, 2048)
    expected = (LogMelSpectrogram(h, None)(wavs[0]) - LogMelSpectrogram(h, None)(wavs[1])).abs()
    torch.testing.assert_close(MelLoss(h)(*wavs), expected.mean())


def test_a_mel_loss_of_several_resolutions_is_the_mean_of_theirs(tmp_path):
    """Against librosa's mels, in numpy, with the windows as far from the ends."""
    sizes = {"n_ffts_for_loss": [256, 2048], "num_mels_for_loss": [20, 100]}
    h = toy_config(tmp_path, **sizes)
    wavs = np.random.default_rng(0).standard_normal((2, 8192)).astype(np.float32)
    errors = []
    for n_fft, num_mels in ((256, 20), (2048, 100)):
        padded = np.pad(wavs, ((0, 0), (3 * n_fft // 8, 3 * n_fft // 8)), mode="reflect")
        log_mels = [
            np.log(
                librosa.feature.melspectrogram(
                    y=wav, sr=22050, n_fft=n_fft, hop_length=n_fft // 4, n_mels=num_mels, fmin=0,
                    fmax=11025, center=False, power=1,
                )
            )
            for wav in padded
        ]  # fmt: skip
        errors.append(np.abs(log_mels[0] - log_mels[1]).mean())
    loss = MelLoss(h)(*torch.from_numpy(wavs)[:, None])
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_mel_loss_teaches_the_generated_side_only(tmp_path):
    wav_hat, wav = (torch.randn(1, 2048, requires_grad=True) for _ in range(2))
    MelLoss(toy_config(tmp_path))(wav_hat, wav).backward()
    assert wav_hat.grad.abs().sum() > 0
    assert wav.grad is None


# --- mel_of_stretch


@recipes
@pytest.mark.parametrize("hops", [1, 1.3, 2.7, 3.9, 6.6, 12, 12.4])
def test_stretches_of_a_mel_are_those_of_the_whole(tmp_path, recipe, hops):
    """All of them: single frames, starts, middles and ends; n_fft is four hops."""
    h = toy_config(tmp_path, **recipe)
    log_mel = LogMelSpectrogram(h, h.fmax)
    wav = torch.from_numpy(speech_like(1)[-int(hops * h.hop_size) :].copy())
    whole = log_mel(wav[None])[0]
    for first, stop in itertools.combinations(range(whole.shape[1] + 2), 2):
        if first < whole.shape[1]:
            part = mel_of_stretch(log_mel, wav, first, stop)
            torch.testing.assert_close(
                part, whole[:, first:stop], rtol=0, atol=1e-5, msg=f"{first}:{stop}"
            )


# --- read_clips


def touch(folder: Path, *names: str) -> Path:
    """Makes empty files, and their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write_list(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "clips"),
    [
        ("b|Words, words.|words words\na|x\n", ["b.wav", "a.wav"]),
        ("b\na", ["b.wav", "a.wav"]),
        ("\n  \na|x\r\n\r\nb\r\n\n", ["a.wav", "b.wav"]),
        ("speaker/a|x\nspeaker/deep/c\na", ["speaker/a.flac", "speaker/deep/c.mp3", "a.wav"]),
        ("with.dots|x\nß", ["with.dots.ogg", "ß.wav"]),
        ("a.wav|x\nspeaker/a.flac", ["a.wav", "speaker/a.flac"]),
        ("", []),
    ],
    ids=["hifigan", "ids", "blank-lines", "folders", "names", "full-names", "empty"],
)
def test_clips_are_found_in_the_lists_order(tmp_path, text, clips):
    names = ["a.wav", "b.wav", "ß.wav", "with.dots.ogg", "speaker/a.flac", "speaker/deep/c.mp3"]
    wavs = touch(tmp_path / "wavs", *names)
    assert read_clips(write_list(tmp_path / "list.txt", text), wavs).tolist() == [
        c.encode() for c in clips
    ]


def test_a_clip_is_found_however_its_name_is_written(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    wavs = touch(tmp_path / "wavs", f"{apart}/{apart}.Wav")
    clips = read_clips(write_list(tmp_path / "list.txt", f"{composed}/{composed}|x"), wavs)
    assert clips.tolist() == [f"{apart}/{apart}.Wav".encode()]


def test_many_names_take_little_memory(tmp_path):
    wavs = touch(tmp_path / "wavs", "LJ001-0001.wav")
    clips = read_clips(write_list(tmp_path / "list.txt", "LJ001-0001|x\n" * 10_000), wavs)
    assert clips.nbytes == 10_000 * len("LJ001-0001.wav")


def test_an_id_without_audio_is_named_with_its_list(tmp_path):
    wavs = touch(tmp_path / "wavs", "a.wav", "lost.txt", "elsewhere/lost.wav")
    file_list = write_list(tmp_path / "list.txt", "a|x\nlost|y\n")
    with pytest.raises(UserError) as error:
        read_clips(file_list, wavs)
    message = str(error.value)
    assert message.startswith(f"{file_list}: ")
    assert all(part in message for part in ("'lost'", str(wavs), ".flac"))


@pytest.mark.parametrize("contents", [None, b"caf\xe9|x\n"], ids=["missing", "latin-1"])
def test_unreadable_lists_are_named(tmp_path, contents):
    file_list = tmp_path / "list.txt"
    if contents is not None:
        file_list.write_bytes(contents)
    with pytest.raises(UserError, match=r"list\.txt: cannot be read"):
        read_clips(file_list, tmp_path)


# --- MelDataset


def make_dataset(folder: Path, wavs: dict, mels: dict | None = None, **changes) -> MelDataset:
    """A dataset of these arrays: float wavs [N] and, for fine-tuning, mels, by id."""
    for name, wav in wavs.items():
        path = folder / "wavs" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wav, RATE, subtype="FLOAT")
    for name, mel in (mels or {}).items():
        path = folder / "mels" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, mel, allow_pickle=True)
    file_list = write_list(folder / "list.txt", "\n".join(wavs))
    mels_dir = None if mels is None else folder / "mels"
    return MelDataset(toy_config(folder, **changes), file_list, folder / "wavs", mels_dir)


def noise(length: int) -> np.ndarray:
    """Uniform within half of full scale, float32 [length]."""
    return np.random.default_rng(0).uniform(-0.5, 0.5, length).astype(np.float32)


def ramp(length: int) -> np.ndarray:
    """A wav whose sample n is n / 2^15, exactly."""
    return (np.arange(length) / 2**15).astype(np.float32)


def counted(frames: int) -> np.ndarray:
    """A mel whose frame t is t in every band."""
    return np.tile(np.arange(frames, dtype=np.float32), (80, 1))


def find_start(wav: torch.Tensor, source: np.ndarray) -> int:
    """Where in `source` [N] the segment `wav` [1, n] was cut out."""
    windows = np.lib.stride_tricks.sliding_window_view(source, wav.shape[1])
    (start,) = np.flatnonzero(np.abs(windows - wav.numpy()).max(axis=1) < 1e-6)
    return int(start)


def corpus_dataset(corpus: Path, tmp_path: Path, **changes) -> MelDataset:
    h = toy_config(tmp_path, **changes)
    return MelDataset(h, corpus / "training.txt", corpus / "wavs")


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_items_are_segments_and_their_mels(corpus, tmp_path):
    dataset = corpus_dataset(corpus, tmp_path)
    assert len(dataset) == 5
    for index in range(5):
        mel, wav = dataset[0, index]
        assert (mel.shape, wav.shape) == ((80, FRAMES), (1, SEGMENT))
        assert (mel.dtype, wav.dtype) == (torch.float32, torch.float32)
        np.testing.assert_allclose(mel, numpy_log_mel(wav[0].numpy(), dataset.h), atol=5e-3)


def test_items_follow_from_seed_epoch_and_index_alone(corpus, tmp_path):
    keys = [(epoch, index) for epoch in range(3) for index in range(5)]
    dataset, again = (corpus_dataset(corpus, tmp_path) for _ in range(2))
    items = {key: dataset[key] for key in keys}
    assert all(same(items[key], again[key]) for key in reversed(keys))
    assert not any(same(a, b) for a, b in itertools.combinations(items.values(), 2))
    reseeded = corpus_dataset(corpus, tmp_path, seed=4321)
    assert not any(same(items[key], reseeded[key]) for key in keys)


def test_global_random_states_are_left_alone(corpus, tmp_path):
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    dataset = corpus_dataset(corpus, tmp_path)
    dataset[0, 0], dataset[1, 3], dataset.whole(2)
    next(iter(ResumableBatchSampler(5, dataset.h)))
    assert states() == before


def test_the_whole_clip_is_normalised_then_cut_at_every_legal_start(tmp_path):
    source = noise(SEGMENT + 3) * 0.2
    source[0] = -0.8  # the peak, in the first segment alone
    dataset = make_dataset(tmp_path, {"a": source})
    wavs = [dataset[epoch, 0][1] for epoch in range(60)]
    starts = {find_start(wav, source * (0.95 / 0.8)) for wav in wavs}
    assert starts == {0, 1, 2, 3}


@pytest.fixture
def samples_read(monkeypatch) -> list[int]:
    """How many samples soundfile reads, call by call."""
    read, sizes = soundfile.read, []

    def count(*arguments, **options):
        wav, rate = read(*arguments, **options)
        sizes.append(len(wav))
        return wav, rate

    monkeypatch.setattr(soundfile, "read", count)
    return sizes


@pytest.mark.parametrize("fine_tuning", [False, True])
def test_long_clips_are_read_whole_once_and_then_in_part(tmp_path, samples_read, fine_tuning):
    mels = {"a": counted(900)} if fine_tuning else None
    source = noise(900 * HOP) * 0.3
    dataset = make_dataset(tmp_path, {"a": source}, mels)
    again = make_dataset(tmp_path, {"a": source}, mels)
    for epoch in range(4):
        again.known[:] = 0  # as an other process, which does not know the clip
        assert same(dataset[epoch, 0], again[epoch, 0])
    assert samples_read == [900 * HOP, 900 * HOP] + [SEGMENT, 900 * HOP] * 3


def test_a_clip_that_grew_is_read_whole_again(tmp_path, samples_read):
    dataset = make_dataset(tmp_path, {"a": noise(SEGMENT + 1) * 0.1})
    dataset[0, 0]
    soundfile.write(tmp_path / "wavs/a.wav", noise(2 * SEGMENT), RATE, subtype="FLOAT")
    _, wav = dataset[1, 0]
    assert samples_read == [SEGMENT + 1, 2 * SEGMENT]
    find_start(wav, noise(2 * SEGMENT) * (0.95 / np.abs(noise(2 * SEGMENT)).max()))


def test_a_clip_that_is_no_longer_there_is_named(tmp_path):
    dataset = make_dataset(tmp_path, {"a": noise(SEGMENT)})
    dataset[0, 0]
    (tmp_path / "wavs/a.wav").unlink()
    with pytest.raises(UserError, match=r"a\.wav: cannot be read"):
        dataset[1, 0]


def test_equal_clips_are_cut_at_different_places(tmp_path):
    source = noise(4 * SEGMENT)
    dataset = make_dataset(tmp_path, {"a": source, "b": source})
    assert not any(same(dataset[epoch, 0], dataset[epoch, 1]) for epoch in range(3))


def test_fine_tuning_keeps_the_level_and_cuts_at_every_legal_start(tmp_path):
    source = noise(SEGMENT + HOP) * 0.2
    dataset = make_dataset(tmp_path, {"a": source}, {"a": counted(FRAMES + 1)})
    items = [dataset[epoch, 0] for epoch in range(30)]
    starts = {(find_start(wav, source), int(mel[0, 0])) for mel, wav in items}
    assert starts == {(0, 0), (HOP, 1)}


def test_clips_of_exactly_one_segment_are_taken_whole(tmp_path):
    source = noise(SEGMENT)
    _, wav = make_dataset(tmp_path, {"a": source})[3, 0]
    assert find_start(wav, source * (0.95 / np.abs(source).max())) == 0


def test_short_clips_are_padded_with_silence(tmp_path):
    source = ramp(5 * HOP + 100)
    dataset = make_dataset(tmp_path, {"a": source})
    mel, wav = dataset[0, 0]
    padded = np.pad(source * (0.95 / source[-1]), (0, SEGMENT - len(source)))
    np.testing.assert_allclose(wav[0], padded, rtol=0, atol=1e-6)
    np.testing.assert_allclose(mel, numpy_log_mel(wav[0].numpy(), dataset.h), rtol=0, atol=5e-3)


@pytest.mark.parametrize("mel_frames", [4, 5, 6])
def test_short_clips_in_fine_tuning_are_padded_with_the_mel_of_silence(tmp_path, mel_frames):
    dataset = make_dataset(tmp_path, {"a": ramp(5 * HOP + 100)}, {"a": counted(mel_frames)})
    mel, wav = dataset[0, 0]
    frames = min(5, mel_frames)
    np.testing.assert_array_equal(mel[:, :frames], counted(frames))
    np.testing.assert_array_equal(mel[:, frames:], np.full((80, FRAMES - frames), SILENCE, "f4"))
    np.testing.assert_array_equal(wav[0, : frames * HOP], ramp(frames * HOP))
    assert wav[0, frames * HOP :].eq(0).all()


@pytest.mark.parametrize("value", [0.0, 1e-40], ids=["zeros", "denormal"])
def test_silence_stays_finite(tmp_path, value):
    dataset = make_dataset(tmp_path, {"a": np.resize([value, -value, 0], 3000)})
    mel, wav = dataset[0, 0]
    assert wav.isfinite().all()
    assert mel.isfinite().all()
    if value == 0:
        assert wav.eq(0).all()
        torch.testing.assert_close(mel, torch.full((80, FRAMES), SILENCE))


@pytest.mark.parametrize("fine_tuning", [False, True])
def test_one_filterbank_in_all_and_one_mel_an_item(tmp_path, monkeypatch, fine_tuning):
    filterbanks, mels = [], []
    build, forward = meldataset.mel_filterbank, LogMelSpectrogram.forward
    monkeypatch.setattr(meldataset, "mel_filterbank", lambda *a: filterbanks.append(1) or build(*a))
    monkeypatch.setattr(
        LogMelSpectrogram, "forward", lambda self, wav: mels.append(1) or forward(self, wav)
    )
    mels_of = {"a": counted(10)} if fine_tuning else None
    dataset = make_dataset(tmp_path, {"a": ramp(10 * HOP)}, mels_of)
    for epoch in range(4):
        dataset[epoch, 0]
    assert len(filterbanks) == 1
    assert len(mels) == (0 if fine_tuning else 4)


@pytest.mark.parametrize("mel_frames", [12, 11, 10, 9, FRAMES])
def test_fine_tuning_mels_and_wavs_are_of_the_same_frames(tmp_path, mel_frames):
    dataset = make_dataset(tmp_path, {"a": ramp(10 * HOP + 100)}, {"a": counted(mel_frames)})
    starts = set()
    for epoch in range(40):
        mel, wav = dataset[epoch, 0]
        start = int(mel[0, 0])
        np.testing.assert_array_equal(mel, counted(16)[:, start : start + FRAMES])
        np.testing.assert_array_equal(wav[0], ramp(16 * HOP)[start * HOP :][:SEGMENT])
        starts.add(start)
    assert starts == set(range(min(10, mel_frames) - FRAMES + 1))


@pytest.mark.parametrize("mel_frames", [10 - 3, 10 + 3])
def test_fine_tuning_mels_three_frames_off_are_refused(tmp_path, mel_frames):
    dataset = make_dataset(tmp_path, {"a": ramp(10 * HOP + 100)}, {"a": counted(mel_frames)})
    with pytest.raises(UserError) as error:
        dataset[0, 0]
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'mels' / 'a.npy'}: {mel_frames} frames")
    assert all(part in message for part in ("a.wav", "10 of 256 samples"))


@pytest.mark.parametrize(
    ("mel", "said"),
    [
        (counted(10).T, "transposed"),
        (counted(10)[:79], "shape [79, 10]; expected [80, T]"),
        (np.full((80, 10), None), "cannot be loaded|not a readable"),
        (None, "no such file"),
    ],
    ids=["transposed", "bands", "objects", "missing"],
)
def test_unusable_fine_tuning_mels_are_refused_by_name(tmp_path, mel, said):
    mels = {} if mel is None else {"a": mel}
    dataset = make_dataset(tmp_path, {"a": ramp(10 * HOP)}, mels)
    with pytest.raises(UserError) as error:
        dataset[0, 0]
    assert str(error.value).startswith(f"{tmp_path / 'mels' / 'a.npy'}: ")
    assert any(words in str(error.value) for words in said.split("|"))


def test_fine_tuning_mels_are_found_by_the_whole_id(tmp_path):
    mels = {"x/a": counted(10), "y/a.b": counted(10) + 100}
    dataset = make_dataset(tmp_path, dict.fromkeys(mels, ramp(10 * HOP)), mels)
    assert [int(dataset.whole(i)[0][0, 0]) for i in range(2)] == [0, 100]


def test_a_mel_is_found_however_its_accents_are_written(tmp_path):
    """A Mac takes names apart (NFD); lists and acoustic models have them composed (NFC)."""
    composed, apart = (unicodedata.normalize(form, "é/ü") for form in ("NFC", "NFD"))
    dataset = make_dataset(tmp_path, {apart: ramp(10 * HOP)}, {composed: counted(10)})
    assert int(dataset.whole(0)[0][0, 3]) == 3
    file_list = write_list(tmp_path / "list.txt", composed)
    dataset = MelDataset(dataset.h, file_list, tmp_path / "wavs", tmp_path / "mels")
    assert int(dataset.whole(0)[0][0, 3]) == 3


def absolute(wavs_dir: Path) -> Path:
    return wavs_dir


def through_another(wavs_dir: Path) -> str:
    return f"{wavs_dir}/../{wavs_dir.name}"


@pytest.mark.parametrize("folder_of", [absolute, through_another, lambda _: Path("b/..")])
def test_the_mel_of_an_absolute_id_lies_under_the_mels(tmp_path, folder_of):
    """Not beside the wav, where a foreign .npy may lie."""
    wavs = {"a": ramp(10 * HOP), "b/a": ramp(10 * HOP)}
    dataset = make_dataset(tmp_path, wavs, {"a": counted(10), "b/a": counted(10) + 100})
    for name in wavs:
        np.save(tmp_path / "wavs" / f"{name}.npy", counted(10) - 900)
    lines = [f"{folder_of(tmp_path / 'wavs')}/{name}" for name in wavs]
    file_list = write_list(tmp_path / "list.txt", "\n".join(lines))
    dataset = MelDataset(dataset.h, file_list, tmp_path / "wavs", tmp_path / "mels")
    assert [int(dataset.whole(i)[0][0, 0]) for i in range(2)] == [0, 100]
    assert [int(dataset[0, i][0][0, 0]) // 100 for i in range(2)] == [0, 1]


@pytest.mark.parametrize("clip_id", ["{}/other/a", "../other/a", "b/../../other/a"])
def test_ids_outside_of_the_wavs_are_refused_in_fine_tuning(tmp_path, clip_id):
    dataset = make_dataset(tmp_path, {"a": ramp(10 * HOP), "b/a": ramp(10 * HOP)}, {})
    soundfile.write(touch(tmp_path, "other/a.wav") / "other/a.wav", noise(4000), RATE)
    np.save(tmp_path / "other/a.npy", counted(15))
    file_list = write_list(tmp_path / "list.txt", clip_id.format(tmp_path))
    dataset = MelDataset(dataset.h, file_list, tmp_path / "wavs")
    assert dataset.whole(0)[1].shape[1] == 15 * HOP  # where there are no mels, all is well
    with pytest.raises(UserError, match=r"list\.txt: .*other/a\.wav lies outside of .*wavs; ex"):
        MelDataset(dataset.h, file_list, tmp_path / "wavs", tmp_path / "mels")


def test_ids_that_begin_with_dots_are_inside(tmp_path):
    dataset = make_dataset(tmp_path, {"..a": ramp(10 * HOP)}, {"..a": counted(10)})
    assert dataset.whole(0)[0].shape == (80, 10)


@pytest.mark.parametrize("length", [100, HOP - 1])
@pytest.mark.parametrize("mels", [None, {"a": counted(1)}], ids=["training", "fine-tuning"])
def test_clips_of_less_than_a_hop_are_refused_by_name(tmp_path, length, mels):
    dataset = make_dataset(tmp_path, {"a": ramp(length)}, mels)
    with pytest.raises(UserError, match=rf"a\.wav: {length} samples .* at least {HOP}"):
        dataset[0, 0]


@pytest.mark.parametrize(("mel_frames", "frames"), [(None, 10), (12, 10), (9, 9)])
def test_whole_clips_are_whole_frames(tmp_path, mel_frames, frames):
    mels = None if mel_frames is None else {"a": counted(mel_frames)}
    dataset = make_dataset(tmp_path, {"a": ramp(10 * HOP + 100)}, mels)
    mel, wav = dataset.whole(0)
    assert (mel.shape, wav.shape) == ((80, frames), (1, frames * HOP))
    gain = 0.95 / ramp(10 * HOP + 100)[-1] if mels is None else 1
    np.testing.assert_allclose(wav[0], ramp(frames * HOP) * gain, rtol=1e-6)


# --- ResumableBatchSampler


def batches(h: Config, count: int, num_clips: int = 11, **where) -> list[list[tuple[int, int]]]:
    """The first `count` batches of `num_clips` clips."""
    return list(itertools.islice(ResumableBatchSampler(num_clips, h, **where), count))


@pytest.fixture
def h(tmp_path) -> Config:
    """A toy config with batches of 4: 11 clips give 2 a epoch."""
    return toy_config(tmp_path, batch_size=4)


def test_the_order_depends_on_seed_and_epoch_only(tmp_path, h):
    torch.manual_seed(1)
    np.random.seed(1)
    first = batches(h, 6)
    assert batches(h, 6) == first
    orders = [[index for _, index in first[2 * e] + first[2 * e + 1]] for e in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert batches(toy_config(tmp_path, batch_size=4, seed=1), 6) != first


@pytest.mark.parametrize("num_clips", [4, 11, 12])
def test_every_clip_comes_at_most_once_an_epoch_in_full_batches(h, num_clips):
    steps = num_clips // 4
    dropped = set()
    for epoch in range(20):
        taken = batches(h, steps, num_clips, epoch=epoch)
        keys = [key for batch in taken for key in batch]
        assert all(len(batch) == 4 for batch in taken)
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys}) == 4 * steps
        dropped |= set(range(num_clips)) - {index for _, index in keys}
    assert dropped == (set(range(11)) if num_clips == 11 else set())  # no clip for good


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_all_processes_are_the_batch_of_one(h, world_size):
    shares = [batches(h, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, *parts in zip(batches(h, 6), *shares, strict=True):
        assert {len(part) for part in parts} == {4 // world_size}
        assert sorted(itertools.chain(*parts)) == sorted(batch)


@pytest.mark.parametrize(("epoch", "epoch_step"), [(0, 0), (0, 1), (0, 2), (1, 0), (2, 1)])
def test_the_sequence_continues_where_it_was_left(h, epoch, epoch_step):
    done = 2 * epoch + epoch_step
    assert batches(h, 5, epoch=epoch, epoch_step=epoch_step) == batches(h, done + 5)[done:]


# --- python meldataset.py


@pytest.fixture
def recordings(tmp_path) -> Path:
    """A folder with a.wav, deep/b.flac of another rate, and a text that is no audio."""
    folder = tmp_path / "recordings"
    (folder / "deep").mkdir(parents=True)
    soundfile.write(folder / "a.wav", speech_like(0.3), RATE)
    soundfile.write(folder / "deep" / "b.flac", speech_like(0.3, 24000), 24000)
    (folder / "deep" / "notes.txt").write_text("no audio")
    return folder


@pytest.mark.parametrize("with_a_bad_file", [False, True])
def test_the_command_writes_mels_in_depth_and_skips_bad_files(
    tmp_path, recordings, capsys, with_a_bad_file
):
    if with_a_bad_file:
        (recordings / "bad.wav").write_text("no audio either")
    config, output_dir = write_config(tmp_path / "config.json"), tmp_path / "mels"
    arguments = ["--input_wavs_dir", recordings, "--output_dir", output_dir]
    status = run_main(meldataset, "--config", config, *arguments)
    assert status == (1 if with_a_bad_file else 0)
    assert (str(recordings / "bad.wav") in capsys.readouterr().err) == with_a_bad_file
    written = sorted(path for path in output_dir.rglob("*") if path.is_file())
    assert written == [output_dir / "a.npy", output_dir / "deep" / "b.npy"]
    h = toy_config(tmp_path)
    for path, source in zip(written, ("a.wav", "deep/b.flac"), strict=True):
        wav = load_wav(recordings / source, RATE)
        expected = LogMelSpectrogram(h, h.fmax)(wav[None])[0]
        assert expected.shape == (80, len(wav) // HOP)
        assert torch.equal(load_mel(path, 80), expected)


def test_its_mels_are_those_that_fine_tuning_expects(tmp_path, recordings):
    config, output_dir = write_config(tmp_path / "config.json"), tmp_path / "mels"
    arguments = ["--input_wavs_dir", recordings, "--output_dir", output_dir]
    run_main(meldataset, "--config", config, *arguments)
    file_list = write_list(tmp_path / "list.txt", "a|x\ndeep/b|y\n")
    dataset = MelDataset(toy_config(tmp_path), file_list, recordings, output_dir)
    for index in range(2):
        mel, wav = dataset.whole(index)
        assert mel.shape[1] * HOP == wav.shape[1]
        difference = (dataset.log_mel(wav)[0] - mel).abs()
        assert difference[:, :-2].max() < 1e-5  # the last frames saw what whole() cut off
