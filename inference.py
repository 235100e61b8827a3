"""Copies audio files through a vocoder, wav -> log-mel -> wav, to test it on exact mels.

    python inference.py --input_wavs_dir test_files --checkpoint_file cp_misrnet/g_00500000

From Python:

    from inference import Streamer, load_generator, synthesize
    generator, h = load_generator("cp_misrnet/g_00500000", device="cpu")
    wav = synthesize(generator, mel)    # [num_mels, T] -> [T * hop_size] at h.sampling_rate
    streamer = Streamer(generator)      # for a mel that arrives in pieces: see streaming.py
    samples = streamer.feed(mel[:, :8])
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from audio import AUDIO_EXTENSIONS, load_wav, write_wav, writing_wav
from distributed import select_device, speed_up_cpu
from env import Config, UserError, load_config
from meldataset import LogMelSpectrogram, mel_of_stretch
from models import Generator
from streaming import Streamer, as_mel
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

__all__ = ["Streamer", "load_generator", "stream", "synthesize", "to_inference"]


class Mel(NamedTuple):
    """A log-mel that is computed or read in parts."""

    frames: int
    part: Callable[[int, int], torch.Tensor]  # (first, stop) -> [num_mels, stop - first]


def load_generator(
    checkpoint_file: str | Path, device: str | torch.device = "cpu", precision: str = "fp32"
) -> tuple[Generator, Config]:
    """Returns the generator of a `g_*` file, ready for inference, and the config beside it.

    Loads the files of HiFi-GAN, iSTFTNet and y-chan's port as well. `device` is named as by
    --device; "bf16" computes all but the last layer in bfloat16. The calling process is not
    changed; a process that does nothing else may call `speed_up_cpu` first.

    Raises:
        UserError: an unreadable file, no config.json beside it, or a config that does not fit.
    """
    device = select_device(str(device))
    weights = generator_weights(load_checkpoint(checkpoint_file), checkpoint_file)
    config = Path(checkpoint_file).with_name("config.json")
    if not config.exists():
        raise UserError(
            f"{checkpoint_file}: no config.json beside it; copy that of its training run there"
        )
    is_from_y_chan = is_y_chans(weights)
    h = load_config(config, None if is_from_y_chan else say, ignore_unknown=True)
    if is_from_y_chan and h.misr_merge != "conv":
        say(f'{checkpoint_file}: from y-chan\'s port, so misr_merge is "conv"')
        h = replace(h, misr_merge="conv")
    with _one_thread():  # a process that has computed in several threads cannot fork
        generator = Generator(h)
        generator.remove_weight_norm()
        load_weights(generator, weights, checkpoint_file)
        return to_inference(generator, device, precision), h


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_inference(generator: Generator, device: torch.device, precision: str) -> Generator:
    """Returns `generator` without weight norm, in "fp32" or "bf16", on `device`."""
    generator.remove_weight_norm()
    if precision == "bf16":
        parts = [generator.conv_pre, generator.ups, generator.resblocks]
        if refiner := getattr(generator.head, "refiner", None):
            parts.append(refiner)
        for part in parts:
            part.bfloat16()
    return generator.eval().requires_grad_(False).to(device)


def synthesize(generator: Generator, mel: torch.Tensor, chunk_frames: int = 0) -> torch.Tensor:
    """Returns the waveform [T * hop_size] of a log-mel [num_mels, T] or [1, num_mels, T].

    With `mel_center`, the waveform starts at the centre of the first frame, so that it is half a
    hop shorter, here and in all functions of this file. The samples are in [-1, 1] with a tanh
    head; other heads may exceed it slightly. With `chunk_frames`, so many frames are computed at a
    time: the same samples in less memory.

    Raises:
        TypeError, ValueError: as `stream`.
    """
    return torch.cat(list(stream(generator, mel, chunk_frames)))


def stream(generator: Generator, mel: torch.Tensor, chunk_frames: int) -> Iterator[torch.Tensor]:
    """Yields the waveform of a log-mel [num_mels, T] in pieces of `chunk_frames` frames each.

    The pieces equal the waveform of the whole mel, to rounding, because each is computed with the
    frames of the receptive field around it. With `chunk_frames` 0, the whole mel is one piece. For
    a mel that arrives in pieces, use `Streamer`.

    Raises:
        TypeError: not a tensor or array of real numbers.
        ValueError: a mel of another shape or not finite, or a negative number of frames.
    """
    mel = as_mel(mel, generator.conv_pre.in_channels)
    if mel.shape[1] == 0:
        raise ValueError(f"mel of shape {list(mel.shape)}: expected one frame or more")
    if chunk_frames < 0:
        raise ValueError(f"chunk_frames = {chunk_frames}: expected 0 or more")
    parts = Mel(mel.shape[1], lambda first, stop: mel[:, first:stop])
    return _chunks(generator, parts, chunk_frames)


def _chunks(generator: Generator, mel: Mel, chunk_frames: int) -> Iterator[torch.Tensor]:
    before, after = generator.receptive_field
    step, begin, state = chunk_frames or mel.frames, 0, None
    for first in range(0, mel.frames, step):
        stop = min(first + step, mel.frames)
        piece = mel.part(begin, min(mel.frames, stop + after))
        next_begin = max(0, stop - before)
        wav, next_state = _vocode(generator, piece, state, stop - begin, next_begin - begin)
        start = (first - begin) * generator.hop_size if first else generator.lead
        yield wav[start : (stop - begin) * generator.hop_size]
        begin, state = next_begin, next_state


@torch.inference_mode()
def _vocode(generator: Generator, mel: torch.Tensor, state, stop: int, first: int) -> tuple:
    """Returns the waveform [N] of a mel [num_mels, T], and the state of the piece from `first`."""
    mel = mel.to(generator.conv_post.bias.device).unsqueeze(0)
    x = generator.features(mel)
    wav = generator.head(x, mel, state)[0, 0]
    is_last = stop == mel.shape[2]
    return wav, None if is_last else generator.head.next_state(x, state, frame=stop, first=first)


@torch.inference_mode()
def synthesize_batch(generator: Generator, mels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the waveforms [T * hop_size] of log-mels [num_mels, T] of several lengths.

    They equal those of `synthesize` except at the end of each, within the receptive field, where
    shorter mels are padded with silence.
    """
    longest = max(mel.shape[1] for mel in mels)
    silence, hop_size = generator.silent_log_mel, generator.hop_size
    padded = [F.pad(mel, (0, longest - mel.shape[1]), value=silence) for mel in mels]
    wavs = generator(torch.stack(padded).to(generator.conv_post.bias.device)).squeeze(1)
    pairs = zip(wavs, mels, strict=True)
    return [wav[generator.lead : mel.shape[1] * hop_size] for wav, mel in pairs]


def add_arguments(
    parser: argparse.ArgumentParser, flag: str, holds: str, default: str, output_dir: str
) -> None:
    """Adds the flags of both inference scripts; `flag` names the input and `holds` describes it."""
    files = parser.add_argument_group("files")
    files.add_argument(
        flag,
        metavar="PATH",
        default=default,
        help=f"{holds}: a folder, searched recursively, or one file",
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
        help="precision of all layers but the last; bf16 is faster on processors that support it",
    )
    machine.add_argument(
        "--batch_size",
        type=positive,
        default=1,
        metavar="N",
        help="files of similar size in a batch, if none is longer than a chunk",
    )
    machine.add_argument(
        "--chunk_frames",
        type=natural,
        default=1024,
        metavar="N",
        help="mel frames that are processed at a time; fewer take less memory and give the same "
        "samples; 0: the whole file",
    )


def vocode_files(
    generator: Generator,
    h: Config,
    jobs: list[Job],
    read_mel: Callable[[Path], Mel],
    a: argparse.Namespace,
) -> int:
    """Writes the waveform of each job's mel; returns the exit status. `a` has the flags above."""
    if a.batch_size > 1:
        jobs = sorted(jobs, key=lambda job: job.source.stat().st_size)
    batches = [jobs[i : i + a.batch_size] for i in range(0, len(jobs), a.batch_size)]
    try:
        with FileProgress(len(jobs), a.output_dir) as progress:
            for batch in batches:
                vocode_batch(generator, h, batch, read_mel, a.chunk_frames, progress)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory; try a smaller --chunk_frames or --batch_size") from None
    return progress.status


def vocode_batch(
    generator: Generator,
    h: Config,
    jobs: list[Job],
    read_mel: Callable[[Path], Mel],
    chunk_frames: int,
    progress: FileProgress,
) -> None:
    """Reads, synthesizes and writes as one batch, or one by one where a mel exceeds a chunk."""
    mels = {}
    for job in jobs:
        with progress.skipping():
            mels[job] = read_mel(job.source)
    longest = max((mel.frames for mel in mels.values()), default=0)
    if len(mels) > 1 and longest <= (chunk_frames or longest):
        wholes = [mel.part(0, mel.frames) for mel in mels.values()]
        for job, wav in zip(mels, synthesize_batch(generator, wholes), strict=True):
            with progress.skipping():
                write_wav(job.output, wav, h.sampling_rate)
                progress.written()
        return
    for job, mel in mels.items():
        pieces = _chunks(generator, mel, chunk_frames)
        chunks = math.ceil(mel.frames / (chunk_frames or mel.frames))
        bar = tqdm(pieces, total=chunks, unit="chunk", leave=False, disable=chunks == 1 or None)
        with progress.skipping():
            with writing_wav(job.output, h.sampling_rate) as write:
                for piece in bar:
                    write(piece)
            progress.written()


def read_wav_mel(path: Path, h: Config, log_mel: LogMelSpectrogram) -> Mel:
    """Returns the mel of an audio file at its own level; raises UserError as `load_wav` does."""
    wav = load_wav(path, h.sampling_rate, min_samples=h.hop_size)
    return Mel(log_mel.frames(len(wav)), partial(mel_of_stretch, log_mel, wav))


def start(a: argparse.Namespace) -> tuple[Generator, Config]:
    """Sets the process up for inference and returns the generator that the flags name."""
    device = select_device(a.device)
    if device.type == "cpu":
        speed_up_cpu()  # first, because threads inherit this setting
    say_if_slow(a.precision, device)
    return load_generator(a.checkpoint_file, a.device, a.precision)


def main() -> int:
    """Vocodes a folder of audio files."""
    parser = command_parser(
        "Vocodes the mel of each audio file to <output_dir>/<name>_generated.wav, 16-bit.",
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
