"""Reads and writes audio and mel files."""

import io
import os
import re
import wave
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile
import soxr
import torch

from env import UserError, one_line
from utils import atomic_write, say

if TYPE_CHECKING:
    from meldataset import LogMelSpectrogram

# Formats that libsndfile reads, by extension. The first file that exists is taken for an id.
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64")
# Hz. A lower rate means a damaged header, and resampling from it could fill the memory.
MIN_SAMPLING_RATE = 1000
PCM16_MAX = 32767
MAX_CLAMPED = 0.01  # share of a file's samples; a larger share is reported
# Encodings whose samples do not depend on each other, so that a part can be read alone.
PLAIN_SUBTYPES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
MAX_PEAK = 4.0  # of full scale; a float file above it contains 16-bit integers, for example
MIN_PEAK = 1e-3  # of full scale, -60 dB; a file below it counts as silent
MAX_MISSING = 0.05  # share of the length in the header
MP3_HEAD = 2**17  # bytes that are searched for the header, which follows tags and cover art
OPEN_LENGTH = 2**31 - 1  # bytes; programs that stream write such a length or a larger one

# Measured on HiFi-GAN's mels of 1,730 clips. The minimum of a clean mel is below -7.6. With white
# or pink noise at a signal-to-noise ratio of 10 or 0 dB, the minimum is below -3.7. The median
# absolute step from frame to frame is then at least 0.19, and at least 0.183 of the standard
# deviation. 98% of log10 mels violate these limits.
MAX_FLOOR = -6.5  # of the minimum of clean speech
NOISY_FLOOR = -3.0
NOISY_STEP, NOISY_RELATIVE_STEP = 0.18, 0.18
LOUD, MAX_LOG_MEL = 2.0, 4.0
BELOW_SILENCE = 0.5  # how much lower than silence a value may be


class SilenceError(UserError):
    """An audio file is silent, or almost."""


class Wav(NamedTuple):
    """A waveform whose samples are read on demand."""

    samples: int
    part: Callable[[int, int], torch.Tensor]  # (first, stop) -> [stop - first]


# ------------------------------------------------------------------------------------------ audio


def load_wav(
    path: str | Path, sampling_rate: int, min_samples: int = 1, min_peak: float = MIN_PEAK
) -> torch.Tensor:
    """Reads an audio file as float32 [N] in [-1, 1] at `sampling_rate` Hz, mixed to mono.

    Prints a line if the file is truncated.

    Raises:
        SilenceError: a peak below `min_peak` after mixing.
        UserError: unreadable or empty file, NaN or infinity, samples far beyond full scale, or
            fewer than `min_samples`; the message names the file.
    """
    channels, file_rate, is_truncated = _read(path)
    if file_rate < MIN_SAMPLING_RATE:
        raise UserError(f"{path}: sampled at {file_rate} Hz; expected at least {MIN_SAMPLING_RATE}")
    if is_truncated:
        seconds = len(channels) / file_rate
        say(one_line(f"{path}: truncated; the {seconds:.1f} s that are there are used"))
    mix = channels.mean(axis=1)
    wav = _resample(mix, file_rate, sampling_rate) if len(mix) else mix
    if len(wav) < min_samples:
        raise UserError(
            f"{path}: {len(wav)} samples at {sampling_rate} Hz; expected at least {min_samples}"
        )
    _check_peak(path, channels, mix, min_peak)
    return torch.from_numpy(wav).clamp_(-1, 1)


def open_wav(path: str | Path, sampling_rate: int, min_samples: int = 1) -> Wav:
    """Opens an audio file for reading parts of what `load_wav` returns.

    A file that must be resampled, or has a lossy format, is read whole.

    Raises:
        UserError: as `load_wav`. If the file is read in parts, NaN and samples beyond full scale
            are found in those parts only, and silence is allowed.
    """
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            samples, is_plain = file.frames, file.subtype.startswith(PLAIN_SUBTYPES)
            is_plain &= file.samplerate == sampling_rate and file.seekable()
    except (OSError, RuntimeError, TypeError):
        is_plain = False  # load_wav raises the error
    if is_plain and samples >= min_samples:

        def read_part(first: int, stop: int) -> torch.Tensor:
            return torch.from_numpy(_read(path, first, stop)[0].mean(axis=1))

        return Wav(samples, read_part)
    wav = load_wav(path, sampling_rate, min_samples)
    return Wav(len(wav), lambda first, stop: wav[first:stop])


def _read(
    path: str | Path, first: int = 0, stop: int | None = None
) -> tuple[np.ndarray, int, bool]:
    """Reads samples `first` to `stop` of a file.

    Returns float32 [N, channels] in [-1, 1], the sampling rate in Hz, and whether the file is
    truncated.
    """
    try:
        # Encoded, because soundfile refuses text that is not valid UTF-8.
        with soundfile.SoundFile(os.fsencode(path)) as file:
            if first:
                file.seek(first)
            count = -1 if stop is None else stop - first
            channels = file.read(count, dtype="float32", always_2d=True)
            is_truncated = stop is None and _is_truncated(file, len(channels))
    except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    if not np.isfinite(channels).all():
        raise UserError(f"{path}: holds samples that are NaN or infinite")
    peak = np.abs(channels).max(initial=0)
    if peak > MAX_PEAK:
        raise UserError(
            f"{path}: a peak of {peak:.6g}; expected about 1: divide its samples by their full "
            "scale (16-bit ones by 32768)"
        )
    return np.clip(channels, -1, 1, out=channels), file.samplerate, is_truncated


def _is_truncated(file: soundfile.SoundFile, samples: int) -> bool:
    """Returns whether the end of a file is missing, by libsndfile's log.

    `samples` is the number of samples that could be read.
    """
    log = file.extra_info
    sizes = re.findall(r": (\d+) \(should be (\d+)\)", log)  # in bytes: the header's, the file's
    lengths = [(int(claimed), int(found)) for claimed, found in sizes]
    if file.format != "MP3" or _has_length(file.name):
        lengths.append((file.frames, samples))
    is_short = any(
        found < (1 - MAX_MISSING) * claimed for claimed, found in lengths if claimed < OPEN_LENGTH
    )
    return is_short or "lacks an end-of-stream bit" in log


def _has_length(mp3: bytes) -> bool:
    """Returns whether an MP3 file has LAME's header. Without it, its length is a rough estimate."""
    with open(mp3, "rb") as file:
        head = file.read(MP3_HEAD)
    return b"Xing" in head or b"Info" in head


def _check_peak(path: str | Path, channels: np.ndarray, wav: np.ndarray, min_peak: float) -> None:
    """Raises SilenceError if the mix `wav` [N] of `channels` [N, C] is almost silent.

    Peaks are measured around the mean: a constant offset is no sound.
    """
    peak, peak_before = np.ptp(wav) / 2, np.ptp(channels, axis=0).max() / 2
    if peak >= min_peak:
        return
    if peak_before >= min_peak:
        raise SilenceError(
            f"{path}: its {channels.shape[1]} channels cancel: a peak of {peak_before:.2g}, but of "
            f"{peak:.2g} after mixing to mono; expected at least {min_peak:g}: keep one channel"
        )
    offset = wav.mean()
    around = f" around a constant {offset:.2g}" if abs(offset) >= min_peak else ""
    raise SilenceError(
        f"{path}: almost silent, a peak of {peak:.2g}{around}; expected at least {min_peak:g} of "
        "full scale: were its samples divided by their full scale twice, or stored with too many "
        "bits?"
    )


def _resample(wav: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resamples wav [N] to [ceil(N * to_rate / from_rate)]."""
    if from_rate == to_rate:
        return wav
    samples = -(-len(wav) * to_rate // from_rate)
    resampled = soxr.resample(wav, from_rate, to_rate, quality="HQ")[:samples]
    return np.pad(resampled, (0, samples - len(resampled)))


def audio_seconds(path: str | Path) -> float:
    """Returns the duration in an audio file's header. Raises UserError if it cannot be read."""
    try:
        return soundfile.info(os.fsencode(path)).duration
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None


@contextmanager
def writing_wav(path: str | Path, sampling_rate: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yields a function that appends a piece [N] of a waveform to a PCM 16 file at `path`.

    Samples are converted by `to_pcm16`. The file appears when the block ends without an
    error. Prints a line if more than 1% of the samples were clamped.

    Raises:
        UserError: a piece contains NaN or infinity.
        WriteError: the file cannot be written.
    """
    samples = clamped = 0

    def write(piece: torch.Tensor) -> None:
        nonlocal samples, clamped
        if not piece.isfinite().all():
            raise UserError(
                f"{path}: not written, the waveform is not finite; is the checkpoint good?"
            )
        samples, clamped = samples + len(piece), clamped + int((piece.abs() > 1).sum())
        file.writeframesraw(to_pcm16(piece))

    # The wave module reports a full disk; soundfile only a "System error".
    with atomic_write(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setparams((1, 2, sampling_rate, 0, "NONE", ""))
        yield write
    if clamped > MAX_CLAMPED * samples:
        say(
            one_line(
                f"{path}: {clamped / samples:.0%} of its samples were beyond full scale and are "
                "clamped; is the mel louder than speech, or computed with other settings?"
            )
        )


def to_pcm16(wav: torch.Tensor) -> bytes:
    """Returns a waveform [N] as 16-bit little-endian PCM, clamped to [-1, 1]; 1 becomes 32767."""
    pcm = (wav.detach().cpu().float().clamp(-1, 1) * PCM16_MAX).round()
    return pcm.numpy().astype("<i2").tobytes()


def write_wav(path: str | Path, wav: torch.Tensor, sampling_rate: int) -> None:
    """Writes a waveform [N] as `writing_wav` does."""
    with writing_wav(path, sampling_rate) as write:
        write(wav)


# ------------------------------------------------------------------------------------------- mels


def load_mel(path: str | Path, num_mels: int) -> torch.Tensor:
    """Reads a log-mel [num_mels, T] or [1, num_mels, T] from a .npy file as float32 [num_mels, T].

    Raises:
        UserError: unreadable, pickled, empty or non-finite file, or another shape; the message
            names the file.
    """
    try:
        # A memory map, so that a header with a huge shape fails before memory is allocated.
        with np.errstate(over="ignore"):  # such a shape may overflow
            mel = np.lib.format.open_memmap(os.fspath(path), mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the mel of a clip") from None
    except Exception as error:  # a damaged header raises a dozen types
        raise UserError(f"{path}: not a readable .npy array ({error})") from None
    if mel.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected an array of real numbers")
    shape = mel.shape
    if len(shape) == 3 and shape[0] == 1:
        mel = mel[0]
    if mel.ndim != 2 or mel.shape[0] != num_mels or mel.shape[1] == 0:
        is_transposed = mel.ndim == 2 and mel.shape[1] == num_mels
        hint = "; it looks transposed: swap its last two axes" if is_transposed else ""
        expected = f"[{num_mels}, T] or [1, {num_mels}, T]"
        raise UserError(f"{path}: shape {list(shape)}; expected {expected}{hint}")
    with np.errstate(over="ignore"):  # a float64 may become infinite
        mel = torch.from_numpy(mel.astype(np.float32, order="C"))
    if not mel.isfinite().all():
        raise UserError(f"{path}: holds values that are NaN or infinite")
    return mel


def mel_warning(mel: torch.Tensor, log_mel: "LogMelSpectrogram") -> str | None:
    """Returns why a mel [num_mels, T] does not look like speech with its settings, or None.

    Mels with other settings have another logarithm, floor or scale. Mels cut from a batch may end
    in padding.
    """
    h, silence = log_mel.h, log_mel.h.silent_log_mel
    scaled = log_mel.to_hifigan(mel)
    is_speech = scaled.min() < MAX_FLOOR or _is_noisy_speech(scaled)
    is_below = (float(mel.min()) - silence) * h.log_amplitude_scale < -BELOW_SILENCE
    if is_below or not is_speech or scaled.max() > MAX_LOG_MEL:
        logarithms = "natural" if h.mel_log_base is None else f"base-{h.mel_log_base:g}"
        of_what = "amplitudes" if h.mel_power == 1 else "powers"
        return (
            f"values from {mel.min():.3g} to {mel.max():.3g}; expected {logarithms} logarithms of "
            f"{of_what}, from about {silence:.1f} to {log_mel.from_hifigan(LOUD):.2g}: was it "
            "computed with the config's settings?"
        )
    if zeros := int((mel == 0).all(0).flip(0).long().cumprod(0).sum()):
        return f"ends in {zeros} frames of zeros, which are loud: silence is {silence:.1f}"
    return None


def _is_noisy_speech(mel: torch.Tensor) -> bool:
    """Returns whether a mel with a high floor changes from frame to frame as noise does."""
    if mel.min() > NOISY_FLOOR or mel.shape[1] < 2:
        return False
    step = float(mel.diff(dim=1).abs().median())
    return step > max(NOISY_STEP, NOISY_RELATIVE_STEP * float(mel.std()))


def say_mel_warnings(
    mels: Iterable[tuple[Path, torch.Tensor]], log_mel: "LogMelSpectrogram"
) -> None:
    """Prints one line if `mel_warning` applies to any of `mels`, pairs of a path and a mel.

    The line names the first such file, the reason, and how many of the mels are such.
    """
    reasons = [(path, mel_warning(mel, log_mel)) for path, mel in mels]
    warnings = [f"{path}: {reason}" for path, reason in reasons if reason]
    if warnings:
        say(one_line(f"{warnings[0]} ({len(warnings)} of {len(reasons)} mels look wrong)"))


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes one array as a .npy file."""
    buffer = io.BytesIO()  # np.save to a file misses a disk that fills at the very end
    np.save(buffer, array)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
