"""Vocodes audio files: wav -> log-mel -> wav, to hear what a vocoder can do at best.

    python inference.py --input_wavs_dir test_files --checkpoint_file cp_misrnet/g_00500000

From Python:

    from inference import load_generator, stream, synthesize
    generator, h = load_generator("cp_misrnet/g_00500000", device="cpu")
    wav = synthesize(generator, mel)    # [num_mels, T] -> [T * hop_size] at h.sampling_rate
    for piece in stream(generator, mel, chunk_frames=32):    # the same samples, as they come
        ...
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from audio import AUDIO_EXTENSIONS, write_wav
from checkpoint import load_checkpoint, load_weights
from distributed import select_device
from env import Config, UserError, load_config
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram, WavMel, wav_mel
from models import Generator
from utils import (
    Job,
    command_line,
    command_parser,
    is_out_of_memory,
    natural,
    plan_outputs,
    positive,
    process_files,
)

Mel = torch.Tensor | WavMel  # [num_mels, T]: has a shape, and mel[:, first:stop]


def load_generator(
    checkpoint_file: str | Path, device: str | torch.device = "cpu", precision: str = "fp32"
) -> tuple[Generator, Config]:
    """The generator of a `g_*` file, ready to speak, and the config beside it.

    Files of HiFi-GAN will do. Devices are named as by --device. With precision "bf16" all but the
    last layer compute in bfloat16. On a CPU, tunes the process as `select_device` does.

    Raises:
        UserError: an unreadable file, no config.json beside it, or one that does not fit.
    """
    device = select_device(str(device))  # first: threads take over how denormals are treated
    contents = load_checkpoint(checkpoint_file)
    config = Path(checkpoint_file).with_name("config.json")
    if not config.exists():
        raise UserError(
            f"{checkpoint_file}: no config.json beside it; copy that of its training run there"
        )
    h = load_config(config)
    if "generator" not in contents:
        hint = "; take the g_* file beside it" if "optim_g" in contents else ""
        raise UserError(f"{checkpoint_file}: holds no generator{hint}")
    with torch.device("meta"):  # so that a misfit is found before it takes any memory
        load_weights(Generator(h), contents["generator"], checkpoint_file)
    generator = Generator(h)
    load_weights(generator, contents["generator"], checkpoint_file)
    return prepare(generator, device, precision), h


def prepare(generator: Generator, device: torch.device, precision: str) -> Generator:
    """`generator` ready to speak: without weight norm, "fp32" or "bf16", on `device`."""
    generator.remove_weight_norm()
    if precision == "bf16":
        for part in (generator.conv_pre, generator.ups, generator.resblocks):
            part.bfloat16()
    return generator.eval().to(device)


def synthesize(generator: Generator, mel: Mel, chunk_frames: int = 0) -> torch.Tensor:
    """Log-mel [num_mels, T] -> waveform [T * hop_size], on the generator's device.

    In [-1, 1], which an iSTFT head may exceed; files are clamped. With `chunk_frames`, so many
    frames at a time: the same samples in less memory.

    Raises:
        ValueError: a mel of another shape or not finite.
    """
    return torch.cat(list(stream(generator, mel, chunk_frames)))


@torch.inference_mode()
def stream(generator: Generator, mel: Mel, chunk_frames: int) -> Iterator[torch.Tensor]:
    """Yields the waveform of a log-mel [num_mels, T] in pieces of at most `chunk_frames` frames.

    Each chunk goes through the generator with its receptive field's frames around it, whose sound
    is cut off: so the pieces together are what the whole would give, to rounding. 0 frames: all.

    Raises:
        ValueError: a mel of another shape or not finite, or a negative number of frames.
    """
    num_mels, device = generator.conv_pre.in_channels, generator.conv_post.bias.device
    if len(mel.shape) != 2 or mel.shape[0] != num_mels or mel.shape[1] == 0:
        raise ValueError(f"mel of shape {list(mel.shape)}: expected [{num_mels}, T]")
    if chunk_frames < 0:
        raise ValueError(f"chunk_frames = {chunk_frames}: expected 0 or more")
    T = mel.shape[1]
    before, after = generator.receptive_field
    for start in range(0, T, chunk_frames or T):
        stop = min(start + (chunk_frames or T), T)
        first = max(0, start - before)
        chunk = mel[:, first : stop + after]
        if not chunk.isfinite().all():
            raise ValueError(f"mel holds NaN or infinity in frames {first} to {stop + after}")
        wav = generator(chunk.to(device).unsqueeze(0))[0, 0]
        yield wav[(start - first) * generator.hop_size : (stop - first) * generator.hop_size]


@torch.inference_mode()
def synthesize_batch(generator: Generator, mels: list[Mel]) -> list[torch.Tensor]:
    """Log-mels [num_mels, T] of several lengths -> their waveforms [T * hop_size].

    As one by one, but for the last samples of each, a receptive field: they hear silence follow.
    """
    longest = max(mel.shape[1] for mel in mels)
    padded = [F.pad(mel[:, :], (0, longest - mel.shape[1]), value=SILENT_LOG_MEL) for mel in mels]
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

    def vocode(batch: list[Job]) -> Iterator[UserError]:
        mels = {}
        for job in batch:
            try:
                mels[job] = read_mel(job.source)
            except UserError as error:
                yield error
        wavs = _synthesize_in_pieces(generator, list(mels.values()), a.chunk_frames)
        for job, pieces in zip(mels, wavs, strict=True):
            try:
                write_wav(job.output, pieces, h.sampling_rate)
            except UserError as error:
                yield error

    if a.batch_size > 1:
        jobs = sorted(jobs, key=lambda job: job.source.stat().st_size)
    batches = [jobs[i : i + a.batch_size] for i in range(0, len(jobs), a.batch_size)]
    try:
        return process_files(batches, vocode)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory; try a smaller --chunk_frames or --batch_size") from None


def _synthesize_in_pieces(
    generator: Generator, mels: list[Mel], chunk_frames: int
) -> Iterator[Iterable[torch.Tensor]]:
    """Yields each mel's waveform, in pieces: as one batch, or one by one where any is longer."""
    longest = max((mel.shape[1] for mel in mels), default=0)
    if len(mels) > 1 and longest <= (chunk_frames or longest):
        yield from ([wav] for wav in synthesize_batch(generator, mels))
        return
    for mel in mels:
        chunks = math.ceil(mel.shape[1] / (chunk_frames or longest))
        pieces = stream(generator, mel, chunk_frames)
        yield tqdm(pieces, total=chunks, unit="chunk", leave=False, disable=chunks == 1 or None)


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
    generator, h = load_generator(a.checkpoint_file, a.device, a.precision)
    jobs = plan_outputs(a.input_wavs_dir, AUDIO_EXTENSIONS, a.output_dir, "_generated.wav")
    log_mel = LogMelSpectrogram(h, h.fmax)
    return vocode_files(generator, h, jobs, lambda path: wav_mel(path, log_mel, h), a)


if __name__ == "__main__":
    command_line(main)
