"""Turns log-mels, an acoustic model's for instance, into speech: .npy -> wav.

    python inference_e2e.py --input_mels_dir test_mel_files --checkpoint_file cp_misrnet/g_00500000

In a pipe, it speaks while it is fed:

    tts | python inference_e2e.py --input_mels_dir - --checkpoint_file cp_misrnet/g_00500000 | aplay

Standard input holds frames one after the other, each of num_mels float32 (little-endian); standard
output is a wav, PCM 16, whose header leaves its length open. Messages go to standard error.
"""

import argparse
import contextlib
import os
import signal
import struct
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from audio import PCM16_MAX, load_mel, mel_warning
from env import UsageError, UserError, one_line
from inference import Mel, Streamer, add_arguments, start, vocode_files
from utils import command_line, command_parser, plan_outputs, say

MOST_FRAMES = 1024  # at once, of a pipe, where --chunk_frames is 0
OPEN_LENGTH = 2**32 - 1  # of a wav whose end is not known, as ffmpeg writes it


def read_mel(path: Path, num_mels: int) -> Mel:
    """The mel of a .npy file; raises UserError as `load_mel` does."""
    mel = load_mel(path, num_mels)
    return Mel(mel.shape[1], lambda first, stop: mel[:, first:stop])


def say_mel_warning(paths: Iterable[Path], num_mels: int) -> None:
    """Says why the first mel that can be read is hardly by the recipe, where it looks so."""
    for path in paths:
        with contextlib.suppress(UserError):  # which is said in its turn
            if reason := mel_warning(load_mel(path, num_mels)):
                say(one_line(f"{path}: {reason}"))
            return


def wav_header(sampling_rate: int) -> bytes:
    """The start of a wav of one channel in PCM 16, of open length."""
    of_format = (b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    riff = struct.pack("<4sI4s", b"RIFF", OPEN_LENGTH, b"WAVE")
    return riff + struct.pack("<4sIHHIIHH", *of_format) + struct.pack("<4sI", b"data", OPEN_LENGTH)


def pcm16(wav: torch.Tensor) -> bytes:
    """A waveform [N] as PCM 16, clamped. Raises UserError where it is not finite."""
    if not wav.isfinite().all():
        raise UserError("the waveform is not finite; is the checkpoint good?")
    return (wav.cpu().float().clamp(-1, 1) * PCM16_MAX).round().numpy().astype("<i2").tobytes()


def speak(streamer: Streamer, source: BinaryIO, sink: BinaryIO, most_frames: int) -> None:
    """Writes the samples of `source`'s frames to `sink` as soon as they are final.

    It takes all the frames that have come while it spoke, `most_frames` at most: the slower the
    processor, the more at a time.

    Raises:
        UserError: no frame, NaN or infinity, or an end amid a frame, before which all is spoken.
        BrokenPipeError: nobody listens any more.
    """
    num_mels = streamer.generator.conv_pre.in_channels
    heard, rest, is_good = 0, b"", True
    while is_good and (data := source.read1(most_frames * num_mels * 4)):
        data = rest + data
        frames = len(data) // (num_mels * 4)
        rest = data[frames * num_mels * 4 :]
        mel = np.frombuffer(data, "<f4", frames * num_mels).reshape(frames, num_mels).T
        finite = np.isfinite(mel).all(axis=0)
        is_good = bool(finite.all())
        good = frames if is_good else int(finite.argmin())
        heard += good
        sink.write(pcm16(streamer.feed(mel[:, :good])))
        sink.flush()
    sink.write(pcm16(streamer.flush()))
    sink.flush()
    if not is_good:
        raise UserError(f"standard input: NaN or infinity after frame {heard}")
    if rest or not heard:
        expected = f"each of {num_mels} float32, {num_mels * 4} bytes"
        raise UserError(
            f"standard input: {heard} frames and {len(rest)} bytes; expected {expected}"
        )


def run_pipe(a: argparse.Namespace) -> int:
    """Speaks from standard input to standard output; returns the exit status."""
    if sys.stdin is None or sys.stdin.isatty() or sys.stdout.isatty():
        raise UsageError("--input_mels_dir -: expected a pipe or file as input, and as output")
    sink = sys.stdout.buffer
    with contextlib.redirect_stdout(sys.stderr):  # the sound has standard output for itself
        generator, h = start(a)
        try:
            sink.write(wav_header(h.sampling_rate))
            speak(Streamer(generator), sys.stdin.buffer, sink, a.chunk_frames or MOST_FRAMES)
        except BrokenPipeError:  # as of every tool in a pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sink.fileno())
            return 128 + signal.SIGPIPE
    return 0


def main() -> int:
    """Vocodes a folder of .npy mels."""
    parser = command_parser(
        "Log-mels to <output_dir>/<name>_generated_e2e.wav for each, PCM 16. With\n"
        "--input_mels_dir -, frames of raw float32 on standard input, spoken as they come, to a\n"
        "wav on standard output: tts | python inference_e2e.py --input_mels_dir - ... | aplay",
        example="python inference_e2e.py --input_mels_dir test_mel_files "
        "--checkpoint_file cp_misrnet/g_00500000",
    )
    add_arguments(
        parser,
        flag="--input_mels_dir",
        holds=".npy files, [num_mels, T] or [1, num_mels, T], natural logarithm, by the config's "
        "recipe",
        default="test_mel_files",
        output_dir="generated_files_from_mel",
    )
    a = parser.parse_args()
    if a.input_mels_dir == "-":
        return run_pipe(a)
    generator, h = start(a)
    jobs = plan_outputs(a.input_mels_dir, (".npy",), a.output_dir, "_generated_e2e.wav")
    say_mel_warning((job.source for job in jobs), h.num_mels)
    return vocode_files(generator, h, jobs, partial(read_mel, num_mels=h.num_mels), a)


if __name__ == "__main__":
    command_line(main)
