"""Audio and mel files, in and out."""

import io
import os
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import librosa
import numpy as np
import soundfile
import torch

from env import UserError, one_line
from utils import atomic_write, say

# What libsndfile reads, by extension; the first that exists is taken for an id.
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64")
LOWEST_RATE = 1000  # Hz; below, a file is damaged, and to resample it could fill the memory
PCM16_MAX = 32767
MUCH_CLAMPED = 0.01  # of a file's samples
# How samples are stored that hang on none of those around them, so that a part can be read alone.
PLAIN_SUBTYPES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
MAX_PEAK = 4.0  # of full scale; a float file above holds 16-bit integers, say
# Of 250 clips of 150 voices, by HiFi-GAN's recipe, the lowest values lay between -11.5, which is
# silence, and -8.1, the highest between -0.9 and 2.1.
LOWEST_LOG_MEL, HIGHEST_LOG_MEL = (-12.0, -6.5), 4.0


class Wav(NamedTuple):
    """A waveform, read where it is needed."""

    samples: int
    part: Callable[[int, int], torch.Tensor]  # (first, stop) -> [stop - first]


def load_wav(path: str | Path, sampling_rate: int, min_samples: int = 1) -> torch.Tensor:
    """Any file that soundfile reads, as one float32 channel [N] in [-1, 1] at `sampling_rate` Hz.

    Raises:
        UserError: unreadable or empty file, NaN or infinity, samples far beyond full scale, or
            fewer than `min_samples`; the message names the file.
    """
    wav, file_rate = _read(path)
    if file_rate < LOWEST_RATE:
        raise UserError(f"{path}: sampled at {file_rate} Hz; expected at least {LOWEST_RATE}")
    if len(wav) > 0 and file_rate != sampling_rate:
        wav = librosa.resample(wav, orig_sr=file_rate, target_sr=sampling_rate, res_type="soxr_hq")
    if len(wav) < min_samples:
        raise UserError(
            f"{path}: {len(wav)} samples at {sampling_rate} Hz; expected at least {min_samples}"
        )
    return torch.from_numpy(wav).clamp_(-1, 1)


def open_wav(path: str | Path, sampling_rate: int, min_samples: int = 1) -> Wav:
    """What `load_wav` gives, in parts: the same samples, of which only those asked for are read.

    A file that has to be resampled, or is compressed with a loss, is read whole.

    Raises:
        UserError: as `load_wav`; of a file that is read in parts, for those parts only.
    """
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            samples, is_plain = file.frames, file.subtype.startswith(PLAIN_SUBTYPES)
            is_plain &= file.samplerate == sampling_rate and file.seekable()
    except (OSError, RuntimeError, TypeError):
        is_plain = False  # load_wav has the words
    if is_plain and samples >= min_samples:
        return Wav(samples, lambda first, stop: torch.from_numpy(_read(path, first, stop)[0]))
    wav = load_wav(path, sampling_rate, min_samples)
    return Wav(len(wav), lambda first, stop: wav[first:stop])


def _read(path: str | Path, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, int]:
    """Samples `first` to `stop` of a file as float32 [N] in [-1, 1], and its rate in Hz."""
    try:
        # As bytes, for soundfile takes no text with what is no UTF-8.
        wav, file_rate = soundfile.read(
            os.fsencode(path), start=first, stop=stop, dtype="float32", always_2d=True
        )
    except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    if not np.isfinite(wav).all():
        raise UserError(f"{path}: holds samples that are NaN or infinite")
    peak = np.abs(wav).max(initial=0)
    if peak > MAX_PEAK:
        raise UserError(
            f"{path}: a peak of {peak:.6g}; expected about 1: divide its samples by their full "
            "scale (16-bit ones by 32768)"
        )
    return np.clip(wav, -1, 1, out=wav).mean(axis=1), file_rate


def audio_seconds(path: str | Path) -> float:
    """How long an audio file says it is; raises UserError, which names it, where it is none."""
    try:
        return soundfile.info(os.fsencode(path)).duration
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None


def load_mel(path: str | Path, num_mels: int) -> torch.Tensor:
    """A log-mel .npy file, [num_mels, T] or [1, num_mels, T], as float32 [num_mels, T].

    Raises:
        UserError: unreadable, pickled, empty or non-finite file, or another shape; the message
            names the file.
    """
    try:
        # Mapped, so that a header that claims too much fails before any memory is taken.
        with np.errstate(over="ignore"):  # as its claims may
            mel = np.lib.format.open_memmap(os.fspath(path), mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the mel of a clip") from None
    except Exception as error:  # a damaged header fails in a dozen ways
        raise UserError(f"{path}: not a readable .npy array ({error})") from None
    if mel.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected an array of real numbers")
    shape = mel.shape
    if len(shape) == 3 and shape[0] == 1:
        mel = mel[0]
    if mel.ndim != 2 or mel.shape[0] != num_mels or mel.shape[1] == 0:
        turned = mel.ndim == 2 and mel.shape[1] == num_mels
        hint = "; it looks transposed: swap its last two axes" if turned else ""
        expected = f"[{num_mels}, T] or [1, {num_mels}, T]"
        raise UserError(f"{path}: shape {list(shape)}; expected {expected}{hint}")
    with np.errstate(over="ignore"):  # becomes infinite
        mel = torch.from_numpy(mel.astype(np.float32, order="C"))
    if not mel.isfinite().all():
        raise UserError(f"{path}: holds values that are NaN or infinite")
    return mel


def mel_warning(mel: torch.Tensor) -> str | None:
    """Why a mel [num_mels, T] is hardly a log-mel by HiFi-GAN's recipe, or None.

    Other recipes have another logarithm, floor or scale; what comes of a batch is padded by 0.
    """
    low, high = float(mel.min()), float(mel.max())
    if not LOWEST_LOG_MEL[0] < low < LOWEST_LOG_MEL[1] or high > HIGHEST_LOG_MEL:
        return (
            f"values from {low:.3g} to {high:.3g}; expected natural logarithms of amplitudes, from "
            "about -11.5 to 2: is it by the config's recipe?"
        )
    if zeros := int((mel == 0).all(0).flip(0).long().cumprod(0).sum()):
        return f"ends in {zeros} frames of zeros, which are loud: silence is -11.5"
    return None


@contextmanager
def writing_wav(path: str | Path, sampling_rate: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yields a function that appends a piece [N] of a waveform to a PCM 16 file at `path`.

    Clamped: +1.0 is 32767, and nothing wraps. The file is there when the block ends well; says so
    where much of it was clamped.

    Raises:
        UserError: NaN or infinity in a piece.
        WriteError: the file cannot be written.
    """
    samples = clamped = 0

    def write(piece: torch.Tensor) -> None:
        nonlocal samples, clamped
        if not piece.isfinite().all():
            raise UserError(
                f"{path}: not written, the waveform is not finite; is the checkpoint good?"
            )
        piece = piece.detach().cpu().float()
        samples, clamped = samples + len(piece), clamped + int((piece.abs() > 1).sum())
        pcm = (piece.clamp(-1, 1) * PCM16_MAX).round().to(torch.int16)
        file.writeframesraw(pcm.numpy().tobytes())

    # Not with soundfile, to which a full disk is a "System error".
    with atomic_write(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setparams((1, 2, sampling_rate, 0, "NONE", ""))
        yield write
    if clamped > MUCH_CLAMPED * samples:
        say(
            one_line(
                f"{path}: {clamped / samples:.0%} of its samples were beyond full scale and are "
                "clamped; is the mel louder than speech, or not by the config's recipe?"
            )
        )


def write_wav(path: str | Path, wav: torch.Tensor, sampling_rate: int) -> None:
    """Writes a waveform [N], as `writing_wav` does."""
    with writing_wav(path, sampling_rate) as write:
        write(wav)


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes one array as a .npy file."""
    buffer = io.BytesIO()  # into a file, numpy overlooks a disk that fills at the very end
    np.save(buffer, array)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
