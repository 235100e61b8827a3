"""Audio and mel files, each read and written against an independent computation."""

import itertools
import math
import os
import pickle
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio import (
    AUDIO_EXTENSIONS,
    SilenceError,
    audio_seconds,
    load_mel,
    load_wav,
    mel_warning,
    open_wav,
    say_mel_warnings,
    write_wav,
    writing_wav,
)
from env import UserError
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram
from tools.toy import speech_like, toy_config

RATE = 22050

# -------------------------------------------------------------------------------------- load_wav


def tone(rate: int, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    """440 Hz at half of full scale, [N, channels]."""
    wav = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.repeat(wav[:, None], channels, axis=1)


def noise(length: int, channels: int | None = None) -> np.ndarray:
    """Uniform within half of full scale, float32 [length] or [length, channels]."""
    shape = length if channels is None else (length, channels)
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


def write_pcm(path: Path, samples: np.ndarray, width: int) -> None:
    """Writes integers [N, channels] as a wav of `width` bytes a sample, by the standard library."""
    samples = samples + (128 if width == 1 else 0)  # 8-bit wav is unsigned
    little_endian = samples.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], width, RATE, 0, "NONE", ""))
        file.writeframes(little_endian.tobytes())


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_are_divided_by_their_full_scale(tmp_path, width, channels):
    full = 2 ** (8 * width - 1)
    samples = np.random.default_rng(width).integers(-full, full, (500, channels))
    samples[:2] = [[-full], [full - 1]]
    write_pcm(tmp_path / "a.wav", samples, width)
    wav = load_wav(tmp_path / "a.wav", RATE)
    assert wav.dtype == torch.float32
    expected = (samples / full).mean(axis=1)
    np.testing.assert_allclose(wav, expected, rtol=0, atol=2**-24 if channels == 1 else 2e-7)


SOUNDS = {  # file, encoding, channels, error
    "8-bit": ("a.wav", "PCM_U8", 1, 0.02),
    "16-bit": ("a.wav", "PCM_16", 1, 1e-4),
    "24-bit": ("a.wav", "PCM_24", 1, 1e-6),
    "32-bit": ("a.wav", "PCM_32", 1, 1e-6),
    "float32": ("a.wav", "FLOAT", 1, 1e-6),
    "float64": ("a.wav", "DOUBLE", 1, 1e-6),
    "stereo": ("a.wav", "PCM_16", 2, 1e-4),
    "5.1": ("a.wav", "PCM_24", 6, 1e-6),
    "flac": ("a.flac", "PCM_24", 2, 1e-6),
    "aif": ("a.aif", "PCM_16", 1, 1e-4),
    "aiff": ("a.aiff", "PCM_16", 1, 1e-4),
    "au": ("a.au", "PCM_16", 1, 1e-4),
    "w64": ("a.w64", "PCM_16", 1, 1e-4),
    "ogg": ("a.ogg", "VORBIS", 1, 0.03),
    "opus": ("a.opus", "OPUS", 1, 0.1),
    "mp3": ("a.mp3", "MPEG_LAYER_III", 1, 0.1),
}
FORMATS = {"opus": "OGG", "aif": "AIFF"}  # where soundfile needs it
LACKING = {"opus": {RATE, 44100}}  # sampling rates that a format does not have


def write_sound(path: Path, kind: str, wav: np.ndarray, rate: int) -> Path:
    name, subtype, _, _ = SOUNDS[kind]
    soundfile.write(path / name, wav, rate, subtype=subtype, format=FORMATS.get(kind))
    return path / name


@pytest.mark.parametrize(
    ("kind", "rate"),
    [(kind, rate) for kind in SOUNDS for rate in (8000, RATE, 48000)]
    + [("16-bit", 16000), ("16-bit", 44100), ("16-bit", 96000)],
)
def test_any_sound_is_read_as_mono_at_the_requested_rate(tmp_path, capsys, kind, rate):
    if rate in LACKING.get(kind, ()):
        return
    _, _, channels, tolerance = SOUNDS[kind]
    source = tone(rate, channels=channels)
    wav = load_wav(write_sound(tmp_path, kind, source, rate), RATE)
    assert (wav.dtype, wav.shape) == (torch.float32, (math.ceil(len(source) * RATE / rate),))
    middle = slice(1000, -1000)  # the resampling filter rings at the ends
    expected = tone(RATE, seconds=1)[: len(wav), 0]
    np.testing.assert_allclose(wav[middle], expected[middle], rtol=0, atol=tolerance)
    assert capsys.readouterr().out == ""


def test_each_extension_is_of_a_format_that_is_read():
    assert {Path(name).suffix for name, *_ in SOUNDS.values()} == set(AUDIO_EXTENSIONS)


@pytest.mark.parametrize("peak", [1.0001, 4])
def test_samples_beyond_full_scale_are_clamped(tmp_path, peak):
    samples_of(peak, 0.5, -peak)(tmp_path / "a.wav")
    assert load_wav(tmp_path / "a.wav", RATE)[:3].tolist() == [1, 0.5, -1]


def test_overshoot_of_resampling_is_clamped(tmp_path):
    samples_of(*[1.0] * 50, *[-1.0] * 50, rate=48000)(tmp_path / "a.wav")
    assert load_wav(tmp_path / "a.wav", RATE).abs().max() == 1


@pytest.mark.parametrize("scale", [2**7, 2**15, 1e38])
@pytest.mark.parametrize(("name", "rate", "channels"), [("a.wav", RATE, 1), ("a.au", 48000, 2)])
def test_floats_at_the_scale_of_integers_are_refused(tmp_path, name, rate, channels, scale):
    wav = np.repeat(noise(1000, 1), channels, axis=1)
    wav[:, -1] *= scale
    soundfile.write(tmp_path / name, wav, rate, subtype="FLOAT")
    with pytest.raises(UserError) as error:
        load_wav(tmp_path / name, RATE)
    peak = f"{np.abs(wav).max():.6g}"
    assert str(error.value).startswith(f"{tmp_path / name}: a peak of {peak}; expected about 1")


def samples_of(*values: float, rate: int = RATE, channels: int = 1):
    """Returns a writer of a float wav that repeats these values."""
    wav = np.repeat(np.resize(values, 1000)[:, None], channels, axis=1)
    return lambda path: soundfile.write(path, wav, rate, subtype="FLOAT")


def cut(write, size: int | float):
    """Returns a writer of the first `size` bytes, or that share, of what `write` writes."""

    def write_part(path: Path) -> None:
        write(path)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(size * len(raw)) if isinstance(size, float) else size])

    return write_part


BAD_WAVS = {
    "empty": (lambda path: soundfile.write(path, np.zeros(0), RATE), "0 samples"),
    "no-bytes": (lambda path: path.write_bytes(b""), "cannot be read as audio"),
    "text": (lambda path: path.write_text("no sound\n" * 50), "cannot be read as audio"),
    "header": (cut(samples_of(0.1), 30), "cannot be read as audio"),
    "missing": (lambda path: None, "cannot be read as audio"),
    "folder": (lambda path: path.mkdir(), "cannot be read as audio"),
    "nan": (samples_of(0.1, math.nan), "NaN"),
    "infinite": (samples_of(0.1, -math.inf), "NaN or infinite"),
    "nan-48k-stereo": (samples_of(0.1, math.nan, rate=48000, channels=2), "NaN"),
    "slow": (samples_of(0.1, rate=999), "sampled at 999 Hz; expected at least 1000"),
}


@pytest.mark.parametrize(("write", "said"), BAD_WAVS.values(), ids=BAD_WAVS)
def test_unusable_audio_is_refused_by_name(tmp_path, write, said):
    path = tmp_path / "bad.wav"
    write(path)
    for read in (load_wav, lambda *a: open_wav(*a).part(0, 1000)):
        with pytest.raises(UserError) as error:
            read(path, RATE)
        assert str(error.value).startswith(f"{path}: ")
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def write_cancelling(path: Path) -> None:
    """Stereo x and -x plus one bit of noise."""
    wav = (noise(3000) * 32767).astype(np.int16)
    bit = np.random.default_rng(1).integers(0, 2, 3000).astype(np.int16)
    soundfile.write(path, np.stack([wav, -wav + bit], axis=1), RATE)


SILENT_WAVS = {
    "zeros": (samples_of(0.0), "almost silent, a peak of 0; expected at least 0.001"),
    "cancelling": (write_cancelling, "its 2 channels cancel: a peak of 0.5, but of 7.6e-06"),
    "int16 in PCM_32": (
        lambda path: soundfile.write(path, (noise(999) * 32767).astype(np.int32), RATE, "PCM_32"),
        "almost silent, a peak of 7.6e-06",
    ),
    "divided twice": (samples_of(0.5 / 32768, -0.5 / 32768), "almost silent, a peak of 1.5e-05"),
    "resampled": (
        samples_of(*[0.0009] * 50, *[-0.0009] * 50, rate=48000),
        "almost silent, a peak of 0.0009",
    ),
    "offset": (
        samples_of(0.4, 0.40004),
        "almost silent, a peak of 2e-05 around a constant 0.4; expected at least 0.001",
    ),
}


@pytest.mark.parametrize(("write", "said"), SILENT_WAVS.values(), ids=SILENT_WAVS)
def test_almost_silent_audio_is_refused_with_its_peak(tmp_path, write, said):
    path = tmp_path / "a.wav"
    write(path)
    with pytest.raises(SilenceError) as error:
        load_wav(path, RATE)
    assert str(error.value).startswith(f"{path}: {said}")
    assert len(load_wav(path, RATE, min_peak=0)) > 400


def test_quiet_audio_is_read(tmp_path):
    samples_of(0.0011, -0.0011)(tmp_path / "a.wav")
    assert load_wav(tmp_path / "a.wav", RATE).max() == pytest.approx(0.0011)


@pytest.mark.parametrize("kind", ["16-bit", "aiff", "au", "w64", "mp3", "ogg", "opus"])
def test_a_truncated_file_is_reported_and_its_beginning_is_used(tmp_path, capsys, kind):
    rate = 48000
    path = write_sound(tmp_path, kind, tone(rate, seconds=4) + noise(4 * rate, 1) / 10, rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    wav = load_wav(path, rate)
    assert 0.8 * rate < len(wav) < 3 * rate
    seconds = len(wav) / rate
    line = f"{path}: truncated; the {seconds:.1f} s that are there are used\n"
    assert capsys.readouterr().out == line


def test_an_mp3_without_a_length_in_its_header_is_not_reported(tmp_path, capsys):
    """The length that libsndfile estimates is wrong by far if the bit rate varies."""
    path, wav = tmp_path / "a.mp3", np.concatenate([np.zeros(3 * RATE), noise(3 * RATE)])
    soundfile.write(path, wav, RATE, bitrate_mode="VARIABLE", compression_level=0.3)
    raw = path.read_bytes()
    path.write_bytes(raw[raw.index(raw[:2], 10) :])  # without its first frame, LAME's header
    assert soundfile.info(path).frames > 1.5 * len(load_wav(path, RATE))
    assert capsys.readouterr().out == ""


def test_a_truncated_flac_is_refused(tmp_path):
    path = write_sound(tmp_path, "flac", noise(3 * RATE), RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"a\.flac: cannot be read as audio \(.*lost sync"):
        load_wav(path, RATE)


@pytest.mark.parametrize("offset", [4, 40])
def test_a_wav_of_open_length_is_read_whole(tmp_path, capsys, offset):
    """Programs that stream write such wavs."""
    path = tmp_path / "a.wav"
    write_pcm(path, np.resize([1000, -1000], (2205, 1)), 2)
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 4] = b"\xff" * 4
    path.write_bytes(raw)
    assert len(load_wav(path, RATE)) == 2205
    assert capsys.readouterr().out == ""


def test_names_that_are_not_utf_8_are_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    samples_of(0.5, -0.5)(tmp_path / "a.wav")
    (tmp_path / "a.wav").rename(path)
    assert audio_seconds(path) == pytest.approx(1000 / RATE)
    assert len(load_wav(path, RATE)) == 1000


@pytest.mark.parametrize("times", [1, 2])
def test_min_samples_counts_after_resampling(tmp_path, times):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(256 * times), RATE * times)
    assert len(load_wav(path, RATE, min_samples=256)) == 256
    soundfile.write(path, np.zeros(255 * times), RATE * times)
    with pytest.raises(UserError, match=r"a\.wav: 255 samples at 22050 Hz; expected at least 256"):
        load_wav(path, RATE, min_samples=256)


# -------------------------------------------------------------------------------------- open_wav


@pytest.mark.parametrize(
    ("kind", "rate"), [*((kind, RATE) for kind in SOUNDS if kind != "opus"), ("opus", 48000)]
)
def test_parts_of_a_file_are_those_of_the_whole_bit_for_bit(tmp_path, kind, rate):
    source = np.cumsum(noise(9000, SOUNDS[kind][2]) / 50, axis=0).clip(-1.2, 1.2)
    path = write_sound(tmp_path, kind, source, rate)
    whole, opened = load_wav(path, RATE), open_wav(path, RATE)
    assert opened.samples == len(whole)
    ends = (0, 1, 255, 4000, len(whole) - 1, len(whole))
    for first, stop in itertools.combinations(ends, 2):
        assert torch.equal(opened.part(first, stop), whole[first:stop])


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_only_the_requested_part_of_a_file_is_read(tmp_path, name, monkeypatch):
    soundfile.write(tmp_path / name, noise(10 * RATE), RATE)
    read, counts = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n, **k: counts.append(n) or read(self, n, **k)
    )
    open_wav(tmp_path / name, RATE).part(5 * RATE, 5 * RATE + 100)
    assert counts == [100]


# -------------------------------------------------------------------------------------- load_mel

MEL = np.linspace(-11, 2, 80 * 7, dtype=np.float32).reshape(80, 7)
GOOD_MELS = {
    "plain": MEL,
    "batch-of-one": MEL[None],
    "float16": MEL.astype(np.float16),
    "float64": MEL.astype(np.float64),
    "big-endian": MEL.astype(">f4"),
    "fortran": np.asfortranarray(MEL),
    "one-frame": MEL[:, :1],
}
BAD_MELS = {
    "transposed": (MEL.T, "shape [7, 80]; expected [80, T] or [1, 80, T]; it looks transposed"),
    "bands": (MEL[:79], "shape [79, 7]; expected [80, T]"),
    "batch-of-two": (np.stack([MEL, MEL]), "shape [2, 80, 7]; expected [80, T]"),
    "one-dimensional": (MEL[:, 0], "shape [80]; expected [80, T]"),
    "no-frames": (MEL[:, :0], "shape [80, 0]; expected [80, T]"),
    "nan": (np.where(MEL > 1, np.nan, MEL), "NaN"),
    "infinite": (np.where(MEL > 1, -np.inf, MEL), "NaN or infinite"),
    "too-large": (MEL * np.float64(1e300), "NaN or infinite"),
    "complex": (MEL.astype(np.complex64), "real numbers"),
    "booleans": (MEL > 0, "real numbers"),
    "strings": (MEL.astype("U5"), "real numbers"),
}


def npy_bytes(path: Path) -> bytes:
    """Writes a valid .npy file and returns its bytes."""
    np.save(path, MEL)
    return path.read_bytes()


DAMAGES = {
    "empty": lambda raw: b"",
    "text": lambda raw: b"no mel\n" * 50,
    "cut-in-header": lambda raw: raw[:60],
    "cut-in-data": lambda raw: raw[:-1],
    "open-bracket": lambda raw: raw.replace(b")", b"9"),
    "leading-zero": lambda raw: raw.replace(b"(80", b"(08"),
    "number-for-key": lambda raw: raw.replace(b"'shape'", b"1234567"),
    "negative-size": lambda raw: raw.replace(b"(80", b"(-8"),
    "zip": lambda raw: b"PK\x03\x04" + raw,
}


def load_mel_error(path: Path) -> str:
    """Returns load_mel's error for the file `path`, and checks that it names the file."""
    with pytest.raises(UserError) as error:
        load_mel(path, 80)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize("array", GOOD_MELS.values(), ids=GOOD_MELS)
def test_mels_load_as_float32(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    mel = load_mel(tmp_path / "a.npy", 80)
    assert mel.dtype == torch.float32
    assert mel.is_contiguous()
    np.testing.assert_array_equal(mel, array.reshape(80, -1).astype(np.float32))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(("array", "said"), BAD_MELS.values(), ids=BAD_MELS)
def test_arrays_of_other_shapes_and_types_are_refused_by_name(tmp_path, array, said):
    np.save(tmp_path / "a.npy", array)
    assert said in load_mel_error(tmp_path / "a.npy")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_mels_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "a.npy"
    path.write_bytes(damage(npy_bytes(path)))
    load_mel_error(path)


def test_npz_missing_files_and_folders_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", mel=MEL)
    assert "not a readable .npy array" in load_mel_error(tmp_path / "a.npz")
    load_mel_error(tmp_path / "nowhere.npy")
    load_mel_error(tmp_path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["object array", "bare pickle"])
def test_pickled_mels_are_refused_and_never_unpickled(tmp_path, form):
    path, sprung = tmp_path / "a.npy", tmp_path / "sprung"
    if form == "object array":
        np.save(path, np.array([[Trap(sprung)]], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    load_mel_error(path)
    assert not sprung.exists()
    np.load(path, allow_pickle=True)
    assert sprung.exists()  # the trap does work


# ----------------------------------------------------------------------------------- mel_warning


def mel_of(wav: np.ndarray, h) -> np.ndarray:
    return LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav.astype(np.float32))[None])[0].numpy()


@pytest.fixture
def h(tmp_path):
    return toy_config(tmp_path)


def affine(low: float, high: float):
    """Returns a scaling of log-mels from [-11.5, 2] to [low, high]."""
    return lambda mel: low + (mel + 11.5) * (high - low) / 13.5


OTHER_RECIPES = {
    "log10": lambda mel: mel / math.log(10),
    "magnitude": np.exp,
    "dB": lambda mel: mel * 20 / math.log(10),
    "log of a power, floor 1e-10": lambda mel: 2 * mel,
    "0 to 1": affine(0, 1),
    "-4 to 4": affine(-4, 4),
    "mean and variance": lambda mel: (mel - mel.mean()) / mel.std(),
}


@pytest.mark.parametrize("scale", OTHER_RECIPES.values(), ids=OTHER_RECIPES)
def test_mels_with_other_settings_have_a_warning(h, scale):
    mel = mel_of(0.1 * speech_like(2), h)
    assert mel_warning(torch.from_numpy(mel), LogMelSpectrogram(h, h.fmax)) is None
    scaled = scale(mel).astype(np.float32)
    reason = mel_warning(torch.from_numpy(scaled), LogMelSpectrogram(h, h.fmax))
    assert reason.startswith(f"values from {scaled.min():.3g} to {scaled.max():.3g}; expected")


@pytest.mark.parametrize("exponent", [0, 0.5], ids=["white", "pink"])
@pytest.mark.parametrize("snr", [10, 0])
def test_mels_of_noisy_speech_have_no_warning_unless_in_log10(h, snr, exponent):
    wav = speech_like(2)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(len(wav)))
    noise = np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** exponent, len(wav))
    noise *= wav.std() / noise.std() * 10 ** (-snr / 20)
    mel = mel_of(wav + noise, h)
    assert mel_warning(torch.from_numpy(mel), LogMelSpectrogram(h, h.fmax)) is None
    in_log10 = torch.from_numpy(mel / math.log(10))
    assert "values from" in mel_warning(in_log10, LogMelSpectrogram(h, h.fmax))


def test_padding_with_zeros_has_a_warning_at_the_end_only(h):
    mel, log_mel = mel_of(speech_like(1), h), LogMelSpectrogram(h, h.fmax)
    at_end, at_start = (np.pad(mel, ((0, 0), pad)) for pad in ((0, 3), (3, 0)))
    assert "ends in 3 frames of zeros" in mel_warning(torch.from_numpy(at_end), log_mel)
    assert mel_warning(torch.from_numpy(at_start), log_mel) is None
    assert mel_warning(torch.full((80, 9), SILENT_LOG_MEL), log_mel) is None


def test_the_first_wrong_mel_of_many_is_named_with_their_number(h, capsys):
    good, log_mel = torch.from_numpy(mel_of(speech_like(1), h)), LogMelSpectrogram(h, h.fmax)
    mels = {"a.npy": good, "b\n.npy": good / 2.3, "c.npy": good, "d.npy": good * 0}
    say_mel_warnings(((Path(name), mel) for name, mel in mels.items()), log_mel)
    line = capsys.readouterr().out
    assert line.startswith("b .npy: values from -2.84 to ") and line.count("\n") == 1
    assert line.endswith("settings? (2 of 4 mels look wrong)\n")
    say_mel_warnings([(Path("a.npy"), good)], log_mel)
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------- write_wav


def test_a_wav_is_mono_pcm_16_clamped_and_rounded(tmp_path):
    values = [0.0, 1.0, -1.0, 0.4 / 32767, 0.6 / 32767, -0.6 / 32767, 1.0001, -2.5, 1e6]
    write_wav(tmp_path / "a.wav", torch.tensor(values), sampling_rate=24000)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)
    assert (info.samplerate, info.frames) == (24000, len(values))
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert samples.tolist() == [0, 32767, -32767, 0, 1, -1, 32767, -32767, 32767]


def test_pieces_make_one_file_that_appears_at_the_end(tmp_path):
    wav = torch.rand(1000) * 2 - 1
    write_wav(tmp_path / "whole.wav", wav, RATE)
    with writing_wav(tmp_path / "pieces.wav", RATE) as write:
        for piece in (wav[:1], wav[1:700], wav[700:700], wav[700:]):
            write(piece)
            assert not (tmp_path / "pieces.wav").exists()
    assert (tmp_path / "pieces.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_waveform_that_is_not_finite_is_not_written(tmp_path, value):
    with (
        pytest.raises(UserError, match=r"a\.wav: not written, the waveform is not finite"),
        writing_wav(tmp_path / "a.wav", RATE) as write,
    ):
        write(torch.zeros(10))
        write(torch.tensor([0, value]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("beyond", "said"), [(0, None), (10, None), (11, "1%"), (390, "39%"), (1000, "100%")]
)
def test_much_clamping_is_reported(tmp_path, capsys, beyond, said):
    """The file has 1,000 samples in three pieces. A sample of exactly 1.0 is not counted."""
    wav = torch.ones(1000)
    wav[:beyond] = torch.linspace(-5, -1.001, beyond)
    path = tmp_path / "a\nb.wav"
    with writing_wav(path, RATE) as write:
        for piece in wav.split(400):
            write(piece)
    line = capsys.readouterr().out
    assert path.exists()
    if said is None:
        assert line == ""
    else:
        assert line.startswith(f"{tmp_path}/a b.wav: {said} of its samples were beyond full scale")
        assert line.count("\n") == 1
