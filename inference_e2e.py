"""Turns log-mels, an acoustic model's for instance, into speech: .npy -> wav.

    python inference_e2e.py --input_mels_dir test_mel_files --checkpoint_file cp_misrnet/g_00500000

In a pipe, it synthesizes while frames arrive:

    tts | python inference_e2e.py --input_mels_dir - --checkpoint_file cp_misrnet/g_00500000 | aplay

Standard input holds frames one after the other, each num_mels float32 values (little-endian).
Standard output is a 16-bit wav whose header gives no length. Messages go to standard error.
"""

import argparse
import contextlib
import os
import signal
import struct
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from audio import load_mel, mel_warning, say_mel_warnings, to_pcm16
from env import UsageError, UserError
from inference import Mel, Streamer, add_arguments, start, vocode_files
from meldataset import LogMelSpectrogram
from utils import command_line, command_parser, plan_outputs, say

MAX_PIPE_FRAMES = 1024  # at once, if --chunk_frames is 0
OPEN_LENGTH = 2**32 - 1  # stands for an unknown length in a header, as in ffmpeg's wavs
NPY_MAGIC = b"\x93NUMPY"
CHECKED_FRAMES = 32  # at the start of a pipe; fewer frames of a good mel can look wrong
# The mean difference of neighbouring frames, relative to that of neighbouring bands, is about 1 in
# a mel and several times larger in a transposed one.
MAX_FRAME_TO_BAND_RATIO = 2.5
MAX_VALUE = 1000.0  # of a mel in any scale, dB for example; beyond it, the bytes are not float32


def read_mel(path: Path, num_mels: int) -> Mel:
    """Returns the mel of a .npy file; raises UserError as `load_mel` does."""
    mel = load_mel(path, num_mels)
    return Mel(mel.shape[1], lambda first, stop: mel[:, first:stop])


def readable_mels(paths: Iterable[Path], num_mels: int) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yields the files that can be read, with their mels; the others are reported later."""
    for path in paths:
        with contextlib.suppress(UserError):
            yield path, load_mel(path, num_mels)


def wav_header(sampling_rate: int) -> bytes:
    """Returns the header of a mono 16-bit wav of unknown length."""
    of_format = (b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    riff = struct.pack("<4sI4s", b"RIFF", OPEN_LENGTH, b"WAVE")
    return riff + struct.pack("<4sIHHIIHH", *of_format) + struct.pack("<4sI", b"data", OPEN_LENGTH)


def finite_pcm16(wav: torch.Tensor) -> bytes:
    """Returns a waveform [N] as 16-bit PCM; raises UserError if it is not finite."""
    if not wav.isfinite().all():
        raise UserError("the waveform is not finite; is the checkpoint good?")
    return to_pcm16(wav)


def pipe_warning(mel: torch.Tensor, log_mel: LogMelSpectrogram) -> str | None:
    """Returns why the first frames of a pipe [num_mels, T] do not look like log-mels, or None."""
    if mel.shape[1] > 1:
        frame_step, band_step = (mel.diff(dim=dim).abs().mean() for dim in (1, 0))
        if frame_step > MAX_FRAME_TO_BAND_RATIO * band_step:
            return (
                "neighbouring frames differ more than neighbouring bands; expected frame after "
                "frame: send mel.T, not mel [num_mels, T]"
            )
    return mel_warning(mel, log_mel)


def read_frames(source: BinaryIO, num_mels: int, max_frames: int) -> Iterator[np.ndarray]:
    """Yields the frames [num_mels, n] that have arrived, at most `max_frames` at a time.

    Raises:
        UserError: a .npy file, no frame, a value that no mel has, or an end within a frame; frames
            before it have been yielded.
    """
    size, rest, count = num_mels * 4, b"", 0
    while data := source.read1(max_frames * size):
        data = rest + data
        if count == 0 and data.startswith(NPY_MAGIC):
            raise UserError(
                "standard input: a .npy file; expected raw float32 frames: give the file's path "
                "as --input_mels_dir, or send mel.T.tobytes()"
            )
        frames = len(data) // size
        rest = data[frames * size :]
        mel = np.frombuffer(data, "<f4", frames * num_mels).reshape(frames, num_mels).T
        is_good = (np.abs(mel) <= MAX_VALUE).all(axis=0)  # False for NaN
        good = frames if is_good.all() else int(is_good.argmin())
        count += good
        yield mel[:, :good]
        if good < frames:
            worst = np.abs(mel[:, good]).max()
            raise UserError(
                f"standard input: a value of {worst:.2g} after frame {count}; expected log-mels in "
                "float32, little-endian"
            )
    if rest or not count:
        raise UserError(
            f"standard input: {count} frames and {len(rest)} bytes; expected frames of {num_mels} "
            f"float32 values, {size} bytes each"
        )


def checked(frames: Iterable[np.ndarray], log_mel: LogMelSpectrogram) -> Iterator[np.ndarray]:
    """Passes frames [num_mels, n] on; prints a warning if the first CHECKED_FRAMES look wrong."""
    first, is_checked = [], False
    for mel in frames:
        if not is_checked:
            first.append(mel)
            if sum(piece.shape[1] for piece in first) >= CHECKED_FRAMES:
                is_checked = True
                mel_so_far = torch.from_numpy(np.concatenate(first, axis=1))
                if reason := pipe_warning(mel_so_far, log_mel):
                    say(f"standard input: {reason}")
        yield mel


def vocode_pipe(streamer: Streamer, frames: Iterable[np.ndarray], sink: BinaryIO) -> None:
    """Writes the samples of `frames` [num_mels, n] to `sink` as soon as they are final.

    Each piece contains all frames that arrived while the last one was computed, so that a slow
    processor computes more frames at a time.

    Raises:
        UserError: as `read_frames`; the samples of the frames before the error are written.
        BrokenPipeError: the reader of `sink` has closed it.
    """
    error = None
    try:
        for mel in frames:
            sink.write(finite_pcm16(streamer.feed(mel)))
            sink.flush()
    except UserError as unusable:
        error = unusable
    sink.write(finite_pcm16(streamer.flush()))
    sink.flush()
    if error is not None:
        raise error


def run_pipe(a: argparse.Namespace) -> int:
    """Vocodes standard input to standard output; returns the exit status."""
    if sys.stdin is None or sys.stdin.isatty() or sys.stdout.isatty():
        raise UsageError("--input_mels_dir -: expected a pipe or file as input, and as output")
    sink = sys.stdout.buffer
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the wav alone
        generator, h = start(a)
        streamer = Streamer(generator)
        milliseconds = 1000 * streamer.latency * h.hop_size / h.sampling_rate
        say(f"latency: {streamer.latency} frames, {milliseconds:.0f} ms")
        try:
            sink.write(wav_header(h.sampling_rate))
            max_frames = a.chunk_frames or MAX_PIPE_FRAMES
            frames = read_frames(sys.stdin.buffer, h.num_mels, max_frames)
            vocode_pipe(streamer, checked(frames, LogMelSpectrogram(h, h.fmax)), sink)
        except BrokenPipeError:  # ends like other tools in a pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sink.fileno())
            return 128 + signal.SIGPIPE
    return 0


def main() -> int:
    """Vocodes a folder of .npy mels."""
    parser = command_parser(
        "Turns each log-mel into <output_dir>/<name>_generated_e2e.wav, 16-bit. With\n"
        "--input_mels_dir -, turns raw float32 frames from standard input into a wav on standard\n"
        "output while they arrive: tts | python inference_e2e.py --input_mels_dir - ... | aplay",
        example="python inference_e2e.py --input_mels_dir test_mel_files "
        "--checkpoint_file cp_misrnet/g_00500000",
    )
    add_arguments(
        parser,
        flag="--input_mels_dir",
        holds=".npy files with the config's mel settings, [num_mels, T] or [1, num_mels, T]",
        default="test_mel_files",
        output_dir="generated_files_from_mel",
    )
    a = parser.parse_args()
    if a.input_mels_dir == "-":
        return run_pipe(a)
    generator, h = start(a)
    jobs = plan_outputs(a.input_mels_dir, (".npy",), a.output_dir, "_generated_e2e.wav")
    mels = readable_mels((job.source for job in jobs), h.num_mels)
    say_mel_warnings(mels, LogMelSpectrogram(h, h.fmax))
    return vocode_files(generator, h, jobs, partial(read_mel, num_mels=h.num_mels), a)


if __name__ == "__main__":
    command_line(main)
