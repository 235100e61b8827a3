"""Vocodes audio files: wav -> log-mel -> wav, to hear what a vocoder can do at best.

    python inference.py --input_wavs_dir test_files --checkpoint_file cp_misrnet/g_02500000

From Python:

    from inference import load_generator, synthesize
    generator, h = load_generator("cp_misrnet/g_02500000", device="cpu")
    wav = synthesize(generator, mel)    # [num_mels, T] -> [T * hop_size] at h.sampling_rate
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from env import Config, UserError, load_config, select_device
from meldataset import AUDIO_EXTENSIONS, LogMelSpectrogram, load_wav
from models import Generator
from utils import (
    command_line,
    load_checkpoint,
    load_weights,
    plan_outputs,
    process_files,
    write_wav,
)


def load_generator(
    checkpoint_file: str | Path, device: str | torch.device = "cpu"
) -> tuple[Generator, Config]:
    """The generator of a `g_*` file, ready to speak, and the config beside it.

    Files of HiFi-GAN will do.

    Raises:
        UserError: an unreadable file, no config.json beside it, or one that does not fit.
    """
    checkpoint_file = Path(checkpoint_file)
    if not checkpoint_file.is_file():
        raise UserError(f"{checkpoint_file}: no such checkpoint file")
    h = load_config(checkpoint_file.with_name("config.json"))
    contents = load_checkpoint(checkpoint_file)
    if "generator" not in contents:
        hint = "; take the g_* file beside it" if "optim_g" in contents else ""
        raise UserError(f"{checkpoint_file}: holds no generator{hint}")
    generator = Generator(h)
    load_weights(generator, contents["generator"], checkpoint_file)
    generator.remove_weight_norm()
    return generator.eval().to(device), h


@torch.inference_mode()
def synthesize(generator: Generator, mel: torch.Tensor) -> torch.Tensor:
    """Log-mel [num_mels, T] -> waveform [T * hop_size] in [-1, 1], on the generator's device."""
    device = generator.conv_post.bias.device
    return generator(mel.to(device).unsqueeze(0))[0, 0]


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of both inference scripts."""
    parser.add_argument(
        "--checkpoint_file", required=True, help="g_* file, with its config.json beside it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")


def synthesize_files(
    a: argparse.Namespace,
    inputs: str,
    extensions: tuple[str, ...],
    ending: str,
    make_read_mel: Callable[[Config], Callable[[Path], torch.Tensor]],
) -> int:
    """Writes `<output_dir>/<name><ending>` for each input file; returns the exit status.

    `make_read_mel(h)` gives the function that reads a file's mel [num_mels, T].
    """
    generator, h = load_generator(a.checkpoint_file, select_device(a.device))
    read_mel = make_read_mel(h)

    def vocode(source: Path, output: Path) -> None:
        write_wav(output, synthesize(generator, read_mel(source)), h.sampling_rate)

    return process_files(plan_outputs(inputs, extensions, a.output_dir, ending), vocode)


def mel_of_wav(h: Config) -> Callable[[Path], torch.Tensor]:
    """Reads an audio file's mel, at the level it has."""
    log_mel = LogMelSpectrogram(h, h.fmax)

    def read_mel(path: Path) -> torch.Tensor:
        wav = load_wav(path, h.sampling_rate, min_samples=h.hop_size)
        return log_mel(wav.unsqueeze(0))[0]

    return read_mel


def main() -> int:
    """Vocodes a folder of audio files."""
    parser = argparse.ArgumentParser(
        description="Audio files to mels and back: <name>_generated.wav for each.",
        epilog="Example: python inference.py --input_wavs_dir test_files "
        "--checkpoint_file cp_misrnet/g_02500000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input_wavs_dir", default="test_files", help="folder, searched in depth, or one file"
    )
    parser.add_argument("--output_dir", default="generated_files", help="folder, made if needed")
    add_common_arguments(parser)
    a = parser.parse_args()
    return synthesize_files(a, a.input_wavs_dir, AUDIO_EXTENSIONS, "_generated.wav", mel_of_wav)


if __name__ == "__main__":
    command_line(main)
