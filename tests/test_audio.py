"""Audio and mel files in and out, each against an independent computation."""

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
    audio_seconds,
    load_mel,
    load_wav,
    mel_warning,
    open_wav,
    write_wav,
    writing_wav,
)
from env import UserError
from meldataset import SILENT_LOG_MEL

RATE = 22050


# --- load_wav


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


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integer_wavs_are_divided_by_their_own_full_scale(tmp_path, width, channels):
    full = 2 ** (8 * width - 1)
    samples = np.random.default_rng(width).integers(-full, full, (500, channels))
    samples[:2] = [[-full], [full - 1]]
    write_pcm(tmp_path / "a.wav", samples, width)
    wav = load_wav(tmp_path / "a.wav", RATE)
    assert wav.dtype == torch.float32
    expected = (samples / full).mean(axis=1)
    np.testing.assert_allclose(wav, expected, rtol=0, atol=2**-24 if channels == 1 else 2e-7)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "FLOAT", 0),
        ("a.wav", "DOUBLE", 0),
        ("a.flac", "PCM_16", 2**-15),
        ("a.flac", "PCM_24", 2**-23),
        ("a.aiff", "PCM_24", 2**-23),
    ],
)
def test_lossless_files_keep_their_values(tmp_path, name, subtype, tolerance):
    soundfile.write(tmp_path / name, noise(3000), RATE, subtype=subtype)
    wav = load_wav(tmp_path / name, RATE)
    np.testing.assert_allclose(wav, noise(3000), rtol=0, atol=tolerance)


@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("rate", [RATE, 48000])
def test_channels_are_mixed_to_their_mean(tmp_path, channels, rate):
    source = noise(3000, channels)
    soundfile.write(tmp_path / "many.wav", source, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "mean.wav", source.mean(axis=1), rate, subtype="FLOAT")
    mixed, mean = (load_wav(tmp_path / name, RATE) for name in ("many.wav", "mean.wav"))
    torch.testing.assert_close(mixed, mean, rtol=0, atol=1e-6)


SOUNDS = {  # file, how it is stored, channels, what that costs
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
FORMATS = {"opus": "OGG", "aif": "AIFF"}  # where soundfile does not see them from the name
RATES = {8000, 16000, RATE, 44100, 48000, 96000}
LACKING = {"opus": {RATE, 44100, 96000}, "mp3": {96000}}  # the rates that a format does not have


@pytest.mark.parametrize(
    ("kind", "rate"),
    [(kind, rate) for kind in SOUNDS for rate in sorted(RATES - LACKING.get(kind, set()))],
)
def test_any_sound_is_read_as_mono_at_the_rate_asked_for(tmp_path, kind, rate):
    name, subtype, channels, tolerance = SOUNDS[kind]
    source = tone(rate, channels=channels)
    soundfile.write(tmp_path / name, source, rate, subtype=subtype, format=FORMATS.get(kind))
    wav = load_wav(tmp_path / name, RATE)
    assert (wav.dtype, wav.shape) == (torch.float32, (math.ceil(len(source) * RATE / rate),))
    middle = slice(1000, -1000)  # the filters ring where the tone starts and stops
    expected = tone(RATE, seconds=1)[: len(wav), 0]
    np.testing.assert_allclose(wav[middle], expected[middle], rtol=0, atol=tolerance)


def test_each_extension_is_of_a_sound_that_is_read():
    assert {Path(name).suffix for name, *_ in SOUNDS.values()} == set(AUDIO_EXTENSIONS)


@pytest.mark.parametrize("peak", [1.0001, 1.3, 2, 4])
def test_what_is_over_full_scale_is_clamped(tmp_path, peak):
    samples = np.array([peak, 0.5, -peak], np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    assert load_wav(tmp_path / "a.wav", RATE).tolist() == [1, 0.5, -1]


@pytest.mark.parametrize("scale", [2**7, 2**15, 2**23, 2**31, 1e38])
@pytest.mark.parametrize(
    ("name", "rate", "channels"), [("a.wav", RATE, 1), ("a.au", 48000, 1), ("a.w64", RATE, 2)]
)
def test_floats_at_the_scale_of_integers_are_refused_by_their_peak(
    tmp_path, name, rate, channels, scale
):
    wav = np.repeat(noise(1000, 1), channels, axis=1)
    wav[:, -1] *= scale
    peak = f"{np.abs(wav).max():.6g}"
    soundfile.write(tmp_path / name, wav, rate, subtype="FLOAT")
    with pytest.raises(UserError) as error:
        load_wav(tmp_path / name, RATE)
    assert str(error.value).startswith(f"{tmp_path / name}: a peak of {peak}; expected about 1")


def samples_of(*values: float, rate: int = RATE, channels: int = 1):
    """A writer of a float wav of these values, again and again."""
    wav = np.repeat(np.resize(values, 1000)[:, None], channels, axis=1)
    return lambda path: soundfile.write(path, wav, rate, subtype="FLOAT")


def truncated_header(path: Path) -> None:
    samples_of(0.1)(path)
    path.write_bytes(path.read_bytes()[:30])


BAD_WAVS = {
    "empty": (lambda path: soundfile.write(path, np.zeros(0), RATE), "0 samples"),
    "empty-44k": (lambda path: soundfile.write(path, np.zeros(0), 44100), "0 samples"),
    "no-bytes": (lambda path: path.write_bytes(b""), "cannot be read as audio"),
    "text": (lambda path: path.write_text("no sound\n" * 50), "cannot be read as audio"),
    "truncated": (truncated_header, "cannot be read as audio"),
    "missing": (lambda path: None, "cannot be read as audio"),
    "folder": (lambda path: path.mkdir(), "cannot be read as audio"),
    "nan": (samples_of(0.1, math.nan), "NaN"),
    "infinite": (samples_of(0.1, -math.inf), "NaN or infinite"),
    "nan-48k-stereo": (samples_of(0.1, math.nan, rate=48000, channels=2), "NaN"),
}


@pytest.mark.parametrize(("write", "said"), BAD_WAVS.values(), ids=BAD_WAVS)
def test_unusable_audio_is_refused_by_name(tmp_path, write, said):
    path = tmp_path / "bad.wav"
    write(path)
    with pytest.raises(UserError) as error:
        load_wav(path, RATE)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_resampling_lifts_over_full_scale_is_clamped(tmp_path):
    samples_of(*[1.0] * 50, *[-1.0] * 50, rate=48000)(tmp_path / "a.wav")  # its corners overshoot
    assert load_wav(tmp_path / "a.wav", RATE).abs().max() == 1


def test_too_low_a_rate_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 999)
    with pytest.raises(UserError, match=r"a\.wav: sampled at 999 Hz; expected at least 1000"):
        load_wav(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize("offset", [4, 40])
def test_a_wav_whose_size_was_left_open_is_read_whole(tmp_path, offset):
    """As by programs that stream."""
    path = tmp_path / "a.wav"
    write_pcm(path, np.zeros((2205, 1), int), 2)
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 4] = b"\xff" * 4
    path.write_bytes(raw)
    assert len(load_wav(path, RATE)) == 2205


def test_a_name_that_is_no_utf_8_has_a_length(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE // 20), RATE)
    (tmp_path / "a.wav").rename(path)
    assert audio_seconds(path) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("times", [1, 2])
def test_min_samples_counts_after_resampling(tmp_path, times):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(256 * times), RATE * times)
    assert len(load_wav(path, RATE, min_samples=256)) == 256
    soundfile.write(path, noise(255 * times), RATE * times)
    with pytest.raises(UserError) as error:
        load_wav(path, RATE, min_samples=256)
    assert str(error.value).startswith(f"{path}: 255 samples at 22050 Hz")
    assert "at least 256" in str(error.value)


def test_a_file_that_claims_more_than_the_memory_is_named(tmp_path, monkeypatch):
    """As a FLAC whose header says that 2^36 samples follow."""

    def too_much(*_, **__):
        raise MemoryError("Unable to allocate 256. GiB")

    monkeypatch.setattr(soundfile, "read", too_much)
    with pytest.raises(UserError, match=r"a\.flac: cannot be read as audio .*256. GiB"):
        load_wav(tmp_path / "a.flac", 22050)


# --- open_wav


@pytest.mark.parametrize("rate", [RATE, 48000])
@pytest.mark.parametrize("kind", SOUNDS)
def test_parts_of_a_file_are_those_of_the_whole_bit_for_bit(tmp_path, kind, rate):
    if rate in LACKING.get(kind, ()):
        return
    name, subtype, channels, _ = SOUNDS[kind]
    source = np.cumsum(noise(20_000, channels) / 50, axis=0).clip(-1.2, 1.2)
    soundfile.write(tmp_path / name, source, rate, subtype=subtype, format=FORMATS.get(kind))
    whole, opened = load_wav(tmp_path / name, RATE), open_wav(tmp_path / name, RATE)
    assert opened.samples == len(whole)
    ends = (0, 1, 255, 4000, 4001, len(whole) - 1, len(whole))
    for first, stop in itertools.combinations(ends, 2):
        assert torch.equal(opened.part(first, stop), whole[first:stop])


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_part_of_a_long_file_is_read_alone(tmp_path, name, monkeypatch):
    soundfile.write(tmp_path / name, noise(10 * RATE), RATE)
    read, sizes = soundfile.read, []
    monkeypatch.setattr(
        soundfile, "read", lambda *a, **k: sizes.append(len(read(*a, **k)[0])) or read(*a, **k)
    )
    opened = open_wav(tmp_path / name, RATE)
    opened.part(5 * RATE, 5 * RATE + 100)
    assert sizes == [100]


@pytest.mark.parametrize(("write", "said"), BAD_WAVS.values(), ids=BAD_WAVS)
def test_unusable_audio_is_refused_by_name_in_parts_too(tmp_path, write, said):
    write(tmp_path / "bad.wav")
    with pytest.raises(UserError, match=said) as error:
        opened = open_wav(tmp_path / "bad.wav", RATE)
        opened.part(0, opened.samples)
    assert str(error.value).startswith(f"{tmp_path / 'bad.wav'}: ")


# --- load_mel

MEL = np.linspace(-11, 2, 80 * 7, dtype=np.float32).reshape(80, 7)
GOOD_MELS = {
    "plain": MEL,
    "batch-of-one": MEL[None],
    "float16": MEL.astype(np.float16),
    "float64": MEL.astype(np.float64),
    "big-endian": MEL.astype(">f4"),
    "fortran": np.asfortranarray(MEL),
    "fortran-batch": np.asfortranarray(MEL[None]),
    "one-frame": MEL[:, :1],
}
BAD_MELS = {
    "transposed": (MEL.T, "shape [7, 80]; expected [80, T] or [1, 80, T]; it looks transposed"),
    "bands": (MEL[:79], "shape [79, 7]; expected [80, T]"),
    "batch-of-two": (np.stack([MEL, MEL]), "shape [2, 80, 7]; expected [80, T]"),
    "one-dimensional": (MEL[:, 0], "shape [80]; expected [80, T]"),
    "0-d": (MEL[0, 0], "shape []; expected [80, T]"),
    "no-frames": (MEL[:, :0], "shape [80, 0]; expected [80, T]"),
    "nan": (np.where(MEL > 1, np.nan, MEL), "NaN"),
    "infinite": (np.where(MEL > 1, -np.inf, MEL), "NaN or infinite"),
    "too-large": (MEL * np.float64(1e300), "NaN or infinite"),
    "complex": (MEL.astype(np.complex64), "real numbers"),
    "booleans": (MEL > 0, "real numbers"),
    "strings": (MEL.astype("U5"), "real numbers"),
}


def npy_bytes(path: Path) -> bytes:
    """The bytes of a sound .npy file."""
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
    """What load_mel says of the file `path`, after its name."""
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
def test_other_arrays_are_refused_by_name(tmp_path, array, said):
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


@pytest.mark.parametrize(
    ("mel", "said"),
    [
        (MEL / np.log(10), "values from -4.78 to 0.869"),
        (np.exp(MEL), "values from 1.67e-05 to 7.39"),
        ((MEL + 11.5) / 14, "values from 0.0357 to 0.964"),
        (MEL / np.log(10) * 20, "values from -95.5 to 17.4"),
        ((MEL - MEL.mean()) / MEL.std(), "is it by the config's recipe?"),
        (np.pad(MEL, ((0, 0), (0, 3))), "ends in 3 frames of zeros"),
        (np.pad(MEL, ((0, 0), (3, 0))), None),
        (MEL, None),
        (np.full((80, 9), SILENT_LOG_MEL), None),
    ],
)
def test_mels_of_another_recipe_are_doubted(mel, said):
    reason = mel_warning(torch.from_numpy(mel))
    assert reason is None if said is None else said in reason


class Trap:
    """An object that creates a file when it is unpickled."""

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


# --- Waveforms out


@pytest.mark.parametrize(
    "value, pcm",
    [
        (0.0, 0),
        (1.0, 32767),
        (-1.0, -32767),
        (0.4 / 32767, 0),
        (0.6 / 32767, 1),
        (-0.6 / 32767, -1),
        (1.0001, 32767),
        (-1.0001, -32767),
        (2.5, 32767),
        (-2.5, -32767),
        (1e6, 32767),
        (-1e6, -32767),
    ],
)
def test_a_sample_is_clamped_and_rounded(tmp_path, value, pcm):
    write_wav(tmp_path / "a.wav", torch.tensor([value]), sampling_rate=22050)
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert samples.tolist() == [pcm]


def test_a_wav_is_mono_pcm_16_within_half_a_step(tmp_path):
    wav = torch.rand(4000) * 2 - 1
    write_wav(tmp_path / "a.wav", wav, sampling_rate=24000)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)
    assert (info.samplerate, info.frames) == (24000, 4000)
    pcm, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.abs(pcm - 32767 * wav.double().numpy()).max() <= 0.501


def test_pieces_make_one_file_which_is_there_when_all_are(tmp_path):
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
def test_it_is_said_when_much_of_a_waveform_is_clamped(tmp_path, capsys, beyond, said):
    """Of 1,000 samples in three pieces; a mel by another recipe gave 78%. 1.0 itself is fine."""
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
