"""The mel, the lists of clips, the dataset and its sampler, against independent computations."""

import dataclasses
import itertools
import math
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
import scipy.ndimage
import soundfile
import torch

import meldataset
from audio import load_mel, load_wav
from env import Config, UsageError, UserError
from losses import MelLoss
from meldataset import (
    LogMelSpectrogram,
    MelDataset,
    ResumableBatchSampler,
    blurred,
    check_pairs,
    mel_of_stretch,
    read_clips,
)
from tools.toy import ROOT, run_main, speech_like, toy_config, write_config

RATE, HOP, SEGMENT = 22050, 256, 2048  # of the toy config
FRAMES = SEGMENT // HOP
SILENCE = math.log(1e-5)


# -------------------------------------------------------------------------------- LogMelSpectrogram

RECIPES = {
    "v2": {},
    "odd-window": {"win_size": 601, "fmax": None},
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


@recipes
def test_mel_equals_numpy_and_librosa(tmp_path, recipe):
    h = toy_config(tmp_path, **recipe)
    wav = half_silent()
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav)[None])[0].numpy()
    difference = np.abs(mel - numpy_log_mel(wav, h))
    assert difference.mean() <= 1e-5
    assert difference.max() <= 5e-3


@pytest.mark.parametrize("length", [256, 384, 385, 511, 2303])
def test_mel_has_a_frame_per_hop_and_pads_short_waveforms(tmp_path, length):
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


EMPTY_BANDS = [  # changes to the config, the number of empty bands if known
    ({"sampling_rate": 44100, "n_fft": 512, "win_size": 512, "num_mels": 128, "fmax": None}, 11),
    ({"num_mels": 300}, None),
    ({"n_fft": 258, "win_size": 256}, None),
    ({"fmin": 60, "fmax": 500}, None),
]


@pytest.mark.parametrize(("changes", "count"), EMPTY_BANDS)
@pytest.mark.filterwarnings("ignore:Empty filters")
def test_mel_bands_without_a_bin_are_refused(tmp_path, changes, count):
    """librosa counts them, too, but only warns. The largest number without such bands is fine."""
    h = toy_config(tmp_path, **changes)

    def empty_bands(num_mels: int) -> int:
        sizes = {"sr": h.sampling_rate, "n_fft": h.n_fft, "n_mels": num_mels}
        bank = librosa.filters.mel(**sizes, fmin=h.fmin, fmax=h.fmax)
        return int((bank.max(axis=1) == 0).sum())

    found = empty_bands(h.num_mels)
    with pytest.raises(UsageError, match=f"^num_mels = {h.num_mels}: {found} bands from ") as error:
        LogMelSpectrogram(h, h.fmax)
    assert str(error.value).endswith(f"expected fewer bands, or n_fft above {h.n_fft}")
    assert count in (None, found)
    most = next(n for n in range(h.num_mels, 0, -1) if empty_bands(n) == 0)
    assert LogMelSpectrogram(dataclasses.replace(h, num_mels=most), h.fmax).filterbank.any(1).all()
    with pytest.raises(UsageError, match=f"^num_mels = {most + 1}: "):
        LogMelSpectrogram(dataclasses.replace(h, num_mels=most + 1), h.fmax)


def test_empty_bands_of_the_mel_loss_are_refused(tmp_path):
    sizes = {"n_ffts_for_loss": [256], "num_mels_for_loss": [64], "fmax_for_loss": 3000}
    with pytest.raises(UsageError, match=r"^num_mels = 64: .* n_fft above 256$"):
        MelLoss(toy_config(tmp_path, **sizes))


# ------------------------------------------------------------------------------------------ MelLoss


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


# ----------------------------------------------------------------------------------- mel_of_stretch


@recipes
@pytest.mark.parametrize("hops", [1, 2.7, 6.6, 9.4])
def test_stretches_of_a_mel_are_those_of_the_whole(tmp_path, recipe, hops):
    """Tests all stretches: single frames, starts, middles and ends; n_fft is four hops."""
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


# --------------------------------------------------------------------------------------- read_clips


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
        ("with.dots|x\nß\n..c", ["with.dots.ogg", "ß.wav", "..c.wav"]),
        ("a.wav|x\nspeaker/a.flac", ["a.wav", "speaker/a.flac"]),
        ("", []),
    ],
    ids=["hifigan", "ids", "blank-lines", "folders", "names", "full-names", "empty"],
)
def test_clips_are_found_in_the_lists_order(tmp_path, text, clips):
    names = ["a.wav", "b.wav", "ß.wav", "with.dots.ogg", "speaker/a.flac", "speaker/deep/c.mp3"]
    names.append("..c.wav")
    wavs = touch(tmp_path / "wavs", *names)
    assert read_clips(write_list(tmp_path / "list.txt", text), wavs).tolist() == [
        c.encode() for c in clips
    ]


def test_an_id_without_audio_is_named_with_its_list(tmp_path):
    wavs = touch(tmp_path / "wavs", "a.wav", "lost.txt", "elsewhere/lost.wav")
    file_list = write_list(tmp_path / "list.txt", "a|x\nlost|y\n")
    with pytest.raises(UserError) as error:
        read_clips(file_list, wavs)
    message = str(error.value)
    assert message.startswith(f"{file_list}: ")
    assert all(part in message for part in ("'lost'", str(wavs), ".flac"))


LISTS = {
    "tabs": (b"a\twords", r"line 1: no audio file for the id 'a\\twords' .* id\|text in UTF-8$"),
    "commas": (
        b"a|x\nb,words, words",
        r"line 2: no audio .* 'b,words, words' .* id\|text in UTF-8$",
    ),
    "spaces": (b"a some words", r"line 1: .* id\|text in UTF-8$"),
    "quoted": (b'"a"|x', r"line 1: .* id\|text in UTF-8$"),
    "JSON": (b'{"audio_filepath": "a.wav"}', r"line 1: .* id\|text in UTF-8$"),
    "UTF-16": ("a|x".encode("utf-16"), r"cannot be read .* expected lines of id\|text in UTF-8$"),
    "UTF-16, no mark": ("a|x\nb|y".encode("utf-16-le"), r"line 1: .* id\|text in UTF-8$"),
    "latin-1": (b"caf\xe9|x\n", r"cannot be read .* expected lines of id\|text in UTF-8$"),
    "missing": (None, r"cannot be read \(No such file or directory\)$"),
}


@pytest.mark.parametrize(("contents", "said"), LISTS.values(), ids=LISTS)
def test_lists_of_another_format_are_refused_with_the_right_one(tmp_path, contents, said):
    file_list = tmp_path / "list.txt"
    if contents is not None:
        file_list.write_bytes(contents)
    with pytest.raises(UserError, match=rf"list\.txt: {said}"):
        read_clips(file_list, touch(tmp_path / "wavs", "a.wav", "b.wav"))


# --------------------------------------------------------------------------------------- MelDataset


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
    """Returns where in `source` [N] the segment `wav` [1, n] was cut. It must be one place."""
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


def test_a_share_of_the_training_mels_is_blurred_and_no_waveform(corpus, tmp_path):
    sharp, half, all_ = (corpus_dataset(corpus, tmp_path, mel_blur=x) for x in (0, 0.5, 1))
    keys = [(epoch, index) for epoch in range(20) for index in range(5)]
    changed = []
    for key in keys:
        (mel, wav), (mel_of_half, wav_of_half), (mel_of_all, wav_of_all) = (
            dataset[key] for dataset in (sharp, half, all_)
        )
        assert torch.equal(wav, wav_of_half) and torch.equal(wav, wav_of_all)
        assert not torch.equal(mel, mel_of_all)
        changed.append(not torch.equal(mel, mel_of_half))
    assert 35 <= sum(changed) <= 65  # of 100
    assert same(sharp.whole(0), all_.whole(0))


def test_fine_tuning_mels_are_not_blurred_again(corpus, tmp_path):
    dataset = corpus_dataset(corpus, tmp_path, mel_blur=1)
    for index in range(len(dataset)):
        name = f"{dataset.path(index).stem}.npy"
        shape = dataset.whole(index)[0].shape
        np.save(tmp_path / name, np.random.default_rng(index).normal(-5, 1, shape))
    h = dataset.h
    tuning = MelDataset(h, corpus / "training.txt", corpus / "wavs", tmp_path)
    mel, _ = tuning[0, 4]
    windows = torch.from_numpy(np.load(tmp_path / "clip4.npy")).float().unfold(1, FRAMES, 1)
    assert (windows == mel[:, None]).all(-1).all(0).any()


@pytest.mark.parametrize("axis", [0, 1], ids=["frequency", "time"])
def test_blur_is_a_gaussian_along_each_axis(monkeypatch, axis):
    widths = [(0.9, 0.9), (1e-3, 1e-3)]
    monkeypatch.setattr(meldataset, "FRAME_BLUR", widths[1 - axis])
    monkeypatch.setattr(meldataset, "BAND_BLUR", widths[axis])
    mel = torch.zeros(80, 40)
    mel[75, 20] = 1.0
    seen = blurred(mel, np.random.default_rng(0))[75]
    sigmas = (0.9 * math.sqrt(75.5 / 80), 0) if axis == 0 else (0, 0.9)
    expected = scipy.ndimage.gaussian_filter(mel.numpy(), sigmas, mode="nearest", truncate=8)[75]
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    level = torch.full((80, 40), -3.0)
    torch.testing.assert_close(blurred(level, np.random.default_rng(0)), level)


def test_global_random_states_are_left_alone(corpus, tmp_path):
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    dataset = corpus_dataset(corpus, tmp_path, mel_blur=0.5)
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
    """The numbers of samples that soundfile reads, call by call."""
    read, counts = soundfile.SoundFile.read, []

    def count(*arguments, **options):
        wav = read(*arguments, **options)
        counts.append(len(wav))
        return wav

    monkeypatch.setattr(soundfile.SoundFile, "read", count)
    return counts


@pytest.mark.parametrize("fine_tuning", [False, True])
def test_long_clips_are_read_whole_once_and_then_in_part(tmp_path, samples_read, fine_tuning):
    mels = {"a": counted(900)} if fine_tuning else None
    source = noise(900 * HOP) * 0.3
    dataset = make_dataset(tmp_path, {"a": source}, mels)
    again = make_dataset(tmp_path, {"a": source}, mels)
    for epoch in range(4):
        again.known[:] = 0  # like another process
        assert same(dataset[epoch, 0], again[epoch, 0])
    assert samples_read == [900 * HOP, 900 * HOP] + [SEGMENT, 900 * HOP] * 3


def test_a_clip_that_grew_is_read_whole_again(tmp_path, samples_read):
    dataset = make_dataset(tmp_path, {"a": noise(SEGMENT + 1) * 0.1})
    dataset[0, 0]
    soundfile.write(tmp_path / "wavs/a.wav", noise(2 * SEGMENT), RATE, subtype="FLOAT")
    _, wav = dataset[1, 0]
    assert samples_read == [SEGMENT + 1, 2 * SEGMENT]
    find_start(wav, noise(2 * SEGMENT) * (0.95 / np.abs(noise(2 * SEGMENT)).max()))


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


@pytest.mark.parametrize("fine_tuning", [False, True])
def test_silent_clips_are_left_out_with_a_line_and_the_next_takes_their_place(
    tmp_path, capsys, fine_tuning
):
    wavs = {"a": ramp(10 * HOP), "b": noise(10 * HOP) * 1e-4, "c": np.zeros(10 * HOP)}
    mels = {name: counted(10) for name in wavs} if fine_tuning else None
    dataset = make_dataset(tmp_path, wavs, mels)
    items = [dataset[epoch, index] for epoch in range(2) for index in range(3)]
    wav = ramp(10 * HOP) * (1 if fine_tuning else 0.95 / ramp(10 * HOP)[-1])
    for mel, segment in items:
        assert mel.isfinite().all()
        find_start(segment, wav)
    lines = capsys.readouterr().out.splitlines()
    begin = f"left out: {tmp_path}/wavs"
    assert lines[0].startswith(f"{begin}/b.wav: almost silent, a peak of 5e-05; expected at least")
    assert lines[1].startswith(f"{begin}/c.wav: almost silent, a peak of 0;") and len(lines) == 2
    with pytest.raises(UserError, match=r"b\.wav: almost silent"):  # as of validation clips
        dataset.whole(1)


def test_a_list_of_silent_clips_only_is_an_error(tmp_path):
    dataset = make_dataset(tmp_path, {"a": np.zeros(4000)})
    with pytest.raises(UserError, match="wavs: all clips of the list are silent"):
        dataset[0, 0]


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


BAD_MELS = {
    "transposed": (counted(10).T, "shape [10, 80]; expected [80, T] or [1, 80, T]; it looks tr"),
    "missing": (None, "no such file"),
    "short": (counted(7), "7 frames, but "),
    "long": (counted(13), "13 frames, but "),
}


@pytest.mark.parametrize(("mel", "said"), BAD_MELS.values(), ids=BAD_MELS)
def test_unusable_fine_tuning_mels_are_refused_by_name(tmp_path, mel, said):
    mels = {} if mel is None else {"a": mel}
    dataset = make_dataset(tmp_path, {"a": ramp(10 * HOP + 100)}, mels)
    with pytest.raises(UserError) as error:
        dataset[0, 0]
    assert str(error.value).startswith(f"{tmp_path / 'mels' / 'a.npy'}: {said}")
    if "frames" in said:
        assert "a.wav has 10 (hop_size 256)" in str(error.value)


def test_a_mel_is_found_with_composed_and_decomposed_accents(tmp_path):
    """Macs decompose names of files (NFD); lists and acoustic models have them composed (NFC)."""
    composed, apart = (unicodedata.normalize(form, "é/ü") for form in ("NFC", "NFD"))
    dataset = make_dataset(tmp_path, {apart: ramp(10 * HOP)}, {composed: counted(10)})
    assert int(dataset.whole(0)[0][0, 3]) == 3
    file_list = write_list(tmp_path / "list.txt", composed)
    dataset = MelDataset(dataset.h, file_list, tmp_path / "wavs", tmp_path / "mels")
    assert int(dataset.whole(0)[0][0, 3]) == 3


@pytest.mark.parametrize("folder_of", ["{}", "{}/../wavs", "b/.."])
def test_the_mel_of_any_id_is_found_in_mels_dir(tmp_path, folder_of):
    """It is not looked for beside the wav, where another .npy may be."""
    wavs = {"a": ramp(10 * HOP), "b/a": ramp(10 * HOP)}
    dataset = make_dataset(tmp_path, wavs, {"a": counted(10), "b/a": counted(10) + 100})
    for name in wavs:
        np.save(tmp_path / "wavs" / f"{name}.npy", counted(10) - 900)
    lines = [f"{folder_of.format(tmp_path / 'wavs')}/{name}" for name in wavs]
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


# ---------------------------------------------------------------------------------- check_pairs


@pytest.fixture
def pairs(tmp_path) -> Callable:
    """Returns a function that checks 10 seconds of speech with mels made of theirs by `change`."""
    files = sorted(ROOT.glob("pretrained/samples/index_files/*-0.flac"))[:5]
    speech = [load_wav(path, RATE).numpy() for path in files]
    wavs = {f"{i}": speech[i // 2][i % 2 * RATE :][:RATE] for i in range(10)}
    log_mel = LogMelSpectrogram(toy_config(tmp_path), 8000)
    mels = [log_mel(torch.from_numpy(wav)[None])[0].numpy() for wav in wavs.values()]

    def check(change: Callable) -> MelDataset:
        changed = {f"{i}": change(i, mels) for i in range(10)}
        dataset = make_dataset(tmp_path, wavs, changed)
        check_pairs(dataset)
        return dataset

    return check


def acoustic(mel: np.ndarray) -> np.ndarray:
    """Blurs a mel over 5 frames and shifts it by one, like an acoustic model's."""
    return scipy.ndimage.uniform_filter1d(np.roll(mel, 1, axis=1), 5, axis=1)


MISMATCHES = {
    "half in log10": (lambda i, mels: mels[i] / (math.log(10) if i > 4 else 1), 4, r"5\.npy"),
    "another clip's": (lambda i, mels: mels[(i + 1) % 10], 8, r"0\.npy"),
    "own": (lambda i, mels: mels[i], 0, ""),
    "an acoustic model's": (lambda i, mels: acoustic(mels[i]), 0, ""),
}


@pytest.mark.parametrize(("change", "count", "first"), MISMATCHES.values(), ids=MISMATCHES)
def test_fine_tuning_mels_that_do_not_match_their_clips_are_reported(
    pairs, capsys, change, count, first
):
    dataset = pairs(change)
    line = capsys.readouterr().out
    if not count:
        assert line == ""
        return
    pattern = (
        rf"{dataset.mels_dir}/({first}): differs from the mel of .*\.wav by (\S+) on average; "
    )
    found = re.match(pattern, line)
    mel, wav = dataset.whole(int(found[1][0]))
    difference = np.abs(numpy_log_mel(wav[0].numpy(), dataset.h) - mel.numpy()).mean()
    assert float(found[2]) == pytest.approx(difference, abs=0.01)
    assert line.endswith(f"{count} of 8 mels compared differ\n") and line.count("\n") == 1


def test_fine_tuning_mels_that_end_in_zeros_are_reported(pairs, capsys):
    pairs(lambda i, mels: mels[i] * (np.arange(mels[i].shape[1]) < 80))
    assert "ends in 6 frames of zeros" in capsys.readouterr().out


# ---------------------------------------------------------------------------- ResumableBatchSampler


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


# ----------------------------------------------------------------------------- python meldataset.py


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
