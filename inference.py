"""Vocodes audio files: wav -> log-mel -> wav, to hear what a vocoder can do at best.

    python inference.py --input_wavs_dir test_files --checkpoint_file cp_misrnet/g_00500000

From Python:

    from inference import Streamer, load_generator, stream, synthesize
    generator, h = load_generator("cp_misrnet/g_00500000", device="cpu")
    wav = synthesize(generator, mel)    # [num_mels, T] -> [T * hop_size] at h.sampling_rate
    for piece in stream(generator, mel, chunk_frames=32):    # the same samples, as they come
        ...
    samples = Streamer(generator).feed(frames)    # of a mel that is still being made
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from audio import AUDIO_EXTENSIONS, load_wav, write_wav, writing_wav
from distributed import select_device, speed_up_cpu
from env import Config, UserError, load_config
from harmonic import HarmonicNoiseHead, ISTFTHead, PhaseState
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram, mel_of_stretch
from models import Generator
from utils import (
    FileProgress,
    Job,
    command_line,
    command_parser,
    is_out_of_memory,
    natural,
    plan_outputs,
    positive,
    say,
    say_if_slow,
)
from weights import generator_weights, is_y_chans, load_checkpoint, load_weights

LOUD_LOG_MELS = (1.0, -4.0)  # of the lowest and highest band of loud speech


class Mel(NamedTuple):
    """A log-mel, computed or read where it is needed."""

    frames: int
    part: Callable[[int, int], torch.Tensor]  # (first, stop) -> [num_mels, stop - first]


def load_generator(
    checkpoint_file: str | Path, device: str | torch.device = "cpu", precision: str = "fp32"
) -> tuple[Generator, Config]:
    """The generator of a `g_*` file, ready to speak, and the config beside it.

    Files of the whole family will do. Devices are named as by --device. With precision "bf16" all
    but the last layer compute in bfloat16. Does not change the process that calls it: one that does
    nothing else may call `speed_up_cpu` before.

    Raises:
        UserError: an unreadable file, no config.json beside it, or one that does not fit.
    """
    device = select_device(str(device))
    weights = generator_weights(load_checkpoint(checkpoint_file), checkpoint_file)
    config = Path(checkpoint_file).with_name("config.json")
    if not config.exists():
        raise UserError(
            f"{checkpoint_file}: no config.json beside it; copy that of its training run there"
        )
    is_theirs = is_y_chans(weights)
    h = load_config(config, None if is_theirs else say)
    if is_theirs and h.misr_merge != "conv":
        say(f'{checkpoint_file}: of y-chan\'s port, so misr_merge is "conv"')
        h = replace(h, misr_merge="conv")
    with _one_thread():  # a process that has run work in parallel cannot fork
        generator = Generator(h)
        generator.remove_weight_norm()
        load_weights(generator, weights, checkpoint_file)
        if isinstance(generator.head, ISTFTHead) and is_clamped(generator):
            bound = math.exp(generator.head.max_log_magnitude)
            say(
                f"{checkpoint_file}: magnitudes above {bound:g}, more than any waveform in "
                "[-1, 1] has, are clamped; see docs/differences.md"
            )
        return to_inference(generator, device, precision), h


@torch.no_grad()
def is_clamped(generator: Generator) -> bool:
    """True where the inverse STFT of a mel, from silence to loud speech, meets its bound."""
    num_mels = generator.conv_pre.in_channels
    tilt = torch.linspace(*LOUD_LOG_MELS, num_mels)[:, None] - LOUD_LOG_MELS[0]
    mel = torch.linspace(SILENT_LOG_MEL, LOUD_LOG_MELS[0], 32) + tilt
    largest = []

    def listen(istft: ISTFTHead, given: tuple[torch.Tensor]) -> None:
        largest.append(float(given[0].chunk(2, dim=1)[0].max()) - istft.max_log_magnitude)

    with generator.head.register_forward_pre_hook(listen):
        generator(mel.clamp(min=SILENT_LOG_MEL).unsqueeze(0))
    return largest[0] > 0


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_inference(generator: Generator, device: torch.device, precision: str) -> Generator:
    """`generator` ready to speak: without weight norm, "fp32" or "bf16", on `device`."""
    generator.remove_weight_norm()
    if precision == "bf16":
        parts = [generator.conv_pre, generator.ups, generator.resblocks]
        if isinstance(generator.head, HarmonicNoiseHead):
            parts.append(generator.head.refiner)
        for part in parts:
            part.bfloat16()
    return generator.eval().requires_grad_(False).to(device)


class Streamer:
    """Speaks while it is fed: log-mel frames in, at any number at a time, final samples out.

        streamer = Streamer(generator)
        for mel in acoustic_model:          # [num_mels, n]
            play(streamer.feed(mel))        # [samples], as many as are final
        play(streamer.flush())              # the rest; the next feed begins anew

    All samples together are those of the whole, to rounding, however the mel was cut. A sample is
    final when the frames that its receptive field reaches ahead are there; as many frames, and
    those it reaches back, are all that is kept.
    """

    def __init__(self, generator: Generator):
        self.generator = generator
        self.before, self.after = generator.receptive_field
        self._begin()

    def _begin(self) -> None:
        self.mel = torch.zeros(self.generator.conv_pre.in_channels, 0)
        self.spoken = 0  # frames of self.mel whose sound has been given
        self.origin = PhaseState()  # of self.mel, in all that was fed

    def feed(self, mel: torch.Tensor) -> torch.Tensor:
        """Takes frames [num_mels, n]; gives the samples [N] that have become final, 0 perhaps.

        Raises:
            TypeError: no tensor or array.
            ValueError: a mel of another shape or not finite.
        """
        self._hear(mel)
        return self._speak(self.mel.shape[1] - self.after)

    def flush(self, mel: torch.Tensor | None = None) -> torch.Tensor:
        """Gives the samples [N] of the frames that are left: the mel has ended.

        The last frames may be given here: with them at once, nothing is computed twice.

        Raises:
            TypeError, ValueError: as `feed`.
        """
        if mel is not None:
            self._hear(mel)
        wav = self._speak(self.mel.shape[1])
        self._begin()
        return wav

    def _hear(self, mel: torch.Tensor) -> None:
        self.mel = torch.cat([self.mel, as_mel(mel, self.generator).to(self.mel)], dim=1)

    @torch.inference_mode()
    def _speak(self, stop: int) -> torch.Tensor:
        """The samples of the frames from `spoken` to `stop`; forgets what is needed no more."""
        device, hop_size = self.generator.conv_post.bias.device, self.generator.hop_size
        if stop <= self.spoken:
            return torch.zeros(0, device=device)
        wav, voice = self.generator(self.mel.to(device).unsqueeze(0), self.origin)
        wav = wav[0, 0, self.spoken * hop_size : stop * hop_size]
        forgotten = max(0, stop - self.before)
        if voice is not None and stop < self.mel.shape[1]:
            frame, cycles = self.origin.frame + forgotten, voice.cycles[0, stop]
            self.origin = PhaseState(frame, anchor=stop - forgotten, cycles=cycles)
        self.mel, self.spoken = self.mel[:, forgotten:], stop - forgotten
        return wav


def as_mel(mel: torch.Tensor, generator: Generator) -> torch.Tensor:
    """A tensor or NumPy array of real numbers [num_mels, T] as a float32 tensor.

    Raises:
        TypeError: no tensor or array of real numbers.
        ValueError: another shape, or NaN or infinity.
    """
    num_mels = generator.conv_pre.in_channels
    if isinstance(mel, np.ndarray):
        mel = mel.copy()  # torch takes no reversed array, and warns of one that is read-only
    try:
        mel = torch.as_tensor(mel).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"a mel of type {type(mel).__name__}: expected a tensor") from None
    if mel.is_complex() or mel.dtype == torch.bool:
        raise TypeError(f"a mel of {mel.dtype}: expected real numbers")
    if mel.dim() != 2 or mel.shape[0] != num_mels:
        raise ValueError(f"mel of shape {list(mel.shape)}: expected [{num_mels}, T]")
    mel = mel.float()  # in which 1e39 is infinite
    if not mel.isfinite().all():
        raise ValueError("mel holds NaN or infinity")
    return mel


def synthesize(generator: Generator, mel: torch.Tensor, chunk_frames: int = 0) -> torch.Tensor:
    """Log-mel [num_mels, T] -> waveform [T * hop_size], on the generator's device.

    In [-1, 1], which an iSTFT head may exceed; files are clamped. With `chunk_frames`, so many
    frames at a time: the same samples in less memory.

    Raises:
        TypeError, ValueError: as `stream`.
    """
    return torch.cat(list(stream(generator, mel, chunk_frames)))


def stream(generator: Generator, mel: torch.Tensor, chunk_frames: int) -> Iterator[torch.Tensor]:
    """Yields the waveform of a log-mel [num_mels, T] in pieces, from `chunk_frames` frames each.

    The pieces together are what the whole would give, to rounding. 0 frames: all at once.

    Raises:
        TypeError: no tensor or array of real numbers.
        ValueError: a mel of another shape or not finite, or a negative number of frames.
    """
    mel = as_mel(mel, generator)
    if mel.shape[1] == 0:
        raise ValueError(f"mel of shape {list(mel.shape)}: expected one frame or more")
    if chunk_frames < 0:
        raise ValueError(f"chunk_frames = {chunk_frames}: expected 0 or more")
    return _stream(
        generator, Mel(mel.shape[1], lambda first, stop: mel[:, first:stop]), chunk_frames
    )


def _stream(generator: Generator, mel: Mel, chunk_frames: int) -> Iterator[torch.Tensor]:
    streamer, step = Streamer(generator), chunk_frames or mel.frames
    for first in range(0, mel.frames, step):
        is_last = first + step >= mel.frames
        piece = (streamer.flush if is_last else streamer.feed)(mel.part(first, first + step))
        if len(piece):
            yield piece


@torch.inference_mode()
def synthesize_batch(generator: Generator, mels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-mels [num_mels, T] of several lengths -> their waveforms [T * hop_size].

    As one by one, but for the last samples of each, a receptive field: they hear silence follow.
    """
    longest = max(mel.shape[1] for mel in mels)
    padded = [F.pad(mel, (0, longest - mel.shape[1]), value=SILENT_LOG_MEL) for mel in mels]
    wavs = generator(torch.stack(padded).to(generator.conv_post.bias.device)).squeeze(1)
    return [wav[: mel.shape[1] * generator.hop_size] for wav, mel in zip(wavs, mels, strict=True)]


def add_arguments(
    parser: argparse.ArgumentParser, flag: str, holds: str, default: str, output_dir: str
) -> None:
    """The flags of both inference scripts; `flag` names the input, which `holds` says what."""
    files = parser.add_argument_group("files")
    files.add_argument(
        flag,
        metavar="PATH",
        default=default,
        help=f"{holds}: a folder, searched in depth, or one file",
    )
    files.add_argument(
        "--output_dir", metavar="DIR", default=output_dir, help="for the wavs; made if needed"
    )
    files.add_argument(
        "--checkpoint_file",
        metavar="FILE",
        required=True,
        help="the generator, g_*, with its config.json beside it",
    )
    machine = parser.add_argument_group("speed and memory")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    machine.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16"),
        help="of all layers but the last; bf16 is faster where the processor computes in it",
    )
    machine.add_argument(
        "--batch_size",
        type=positive,
        default=1,
        metavar="N",
        help="files at once, of like sizes, where none is longer than a chunk",
    )
    machine.add_argument(
        "--chunk_frames",
        type=natural,
        default=1024,
        metavar="N",
        help="mel frames (of hop_size samples) at once: less takes less memory and gives the same "
        "samples; 0 takes each file whole",
    )


def vocode_files(
    generator: Generator,
    h: Config,
    jobs: list[Job],
    read_mel: Callable[[Path], Mel],
    a: argparse.Namespace,
) -> int:
    """Writes the waveform of each job's mel; returns the exit status. `a` holds the flags above."""
    if a.batch_size > 1:
        jobs = sorted(jobs, key=lambda job: job.source.stat().st_size)
    batches = [jobs[i : i + a.batch_size] for i in range(0, len(jobs), a.batch_size)]
    try:
        with FileProgress(len(jobs), a.output_dir) as tally:
            for batch in batches:
                vocode_batch(generator, h, batch, read_mel, a.chunk_frames, tally)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory; try a smaller --chunk_frames or --batch_size") from None
    return tally.status


def vocode_batch(
    generator: Generator,
    h: Config,
    jobs: list[Job],
    read_mel: Callable[[Path], Mel],
    chunk_frames: int,
    tally: FileProgress,
) -> None:
    """Reads, synthesizes and writes: as one batch, or one by one where any exceeds a chunk."""
    mels = {}
    for job in jobs:
        with tally.skipping():
            mels[job] = read_mel(job.source)
    longest = max((mel.frames for mel in mels.values()), default=0)
    if len(mels) > 1 and longest <= (chunk_frames or longest):
        wholes = [mel.part(0, mel.frames) for mel in mels.values()]
        for job, wav in zip(mels, synthesize_batch(generator, wholes), strict=True):
            with tally.skipping():
                write_wav(job.output, wav, h.sampling_rate)
                tally.written()
        return
    for job, mel in mels.items():
        pieces = _stream(generator, mel, chunk_frames)
        chunks = math.ceil(mel.frames / (chunk_frames or mel.frames))
        bar = tqdm(pieces, total=chunks, unit="chunk", leave=False, disable=chunks == 1 or None)
        with tally.skipping():
            with writing_wav(job.output, h.sampling_rate) as write:
                for piece in bar:
                    write(piece)
            tally.written()


def read_wav_mel(path: Path, h: Config, log_mel: LogMelSpectrogram) -> Mel:
    """The mel of an audio file, at the level that it has; raises UserError as `load_wav` does."""
    wav = load_wav(path, h.sampling_rate, min_samples=h.hop_size)
    return Mel(len(wav) // h.hop_size, partial(mel_of_stretch, log_mel, wav))


def start(a: argparse.Namespace) -> tuple[Generator, Config]:
    """The generator that the flags name, in a process that is set up to do nothing else."""
    device = select_device(a.device)
    if device.type == "cpu":
        speed_up_cpu()  # first: threads take over how denormals are treated
    say_if_slow(a.precision, device)
    return load_generator(a.checkpoint_file, a.device, a.precision)


def main() -> int:
    """Vocodes a folder of audio files."""
    parser = command_parser(
        "Audio files to mels and back: <output_dir>/<name>_generated.wav for each, PCM 16.",
        example="python inference.py --input_wavs_dir test_files "
        "--checkpoint_file cp_misrnet/g_00500000",
    )
    add_arguments(
        parser,
        flag="--input_wavs_dir",
        holds="audio in any format and at any rate",
        default="test_files",
        output_dir="generated_files",
    )
    a = parser.parse_args()
    generator, h = start(a)
    jobs = plan_outputs(a.input_wavs_dir, AUDIO_EXTENSIONS, a.output_dir, "_generated.wav")
    read_mel = partial(read_wav_mel, h=h, log_mel=LogMelSpectrogram(h, h.fmax))
    return vocode_files(generator, h, jobs, read_mel, a)


if __name__ == "__main__":
    command_line(main)
