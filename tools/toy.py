"""A toy config and a small corpus of synthetic speech, for the tests and tools/stress/."""

import json
import sys
from pathlib import Path

import numpy as np
import soundfile

from checkpoint import write_checkpoint
from env import Config, load_config

ROOT = Path(__file__).parent.parent
# A training step of this size takes a few hundredths of a second.
TOY = {
    "upsample_initial_channel": 16,
    "discriminator_channel_mult": 0.01,
    "segment_size": 2048,
    "batch_size": 2,
    "num_workers": 0,
}
# Null is a value of these.
NULLABLE = ("fmax", "fmax_for_loss", "discriminator_train_start_steps", "mel_norm")


def toy_values(config: str = "config_v2.json", **changes) -> dict:
    """Returns the JSON values of a shipped config at toy size."""
    return json.loads((ROOT / config).read_text()) | TOY | changes


def toy_config(tmp_path: Path, config: str = "config_v2.json", **changes) -> Config:
    """Writes a shipped config at toy size to a file in `tmp_path`, and loads it."""
    return load_config(write_config(tmp_path / "toy.json", config, **changes))


def write_config(path: Path, config: str = "config_v2.json", **changes) -> Path:
    """Writes a shipped config at toy size. A change to None removes a key that is not nullable."""
    values = toy_values(config, **changes)
    kept = {k: v for k, v in values.items() if v is not None or k in NULLABLE}
    path.write_text(json.dumps(kept))
    return path


def speech_like(seconds: float, sampling_rate: int = 22050, seed: int = 0) -> np.ndarray:
    """Returns a gliding harmonic tone with pauses and a little noise, [N] in [-1, 1]."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * sampling_rate)) / sampling_rate
    pitch = 120 + 40 * random.random() + 20 * np.sin(2 * np.pi * 1.5 * time + random.random())
    phase = 2 * np.pi * np.cumsum(pitch) / sampling_rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    loudness = np.clip(np.sin(2 * np.pi * 2 * time + seed), 0, 1)
    noise = 0.01 * random.standard_normal(len(time))
    return (0.2 * voice * loudness + noise).clip(-1, 1).astype(np.float32)


def make_corpus(folder: Path, clips: int = 7) -> Path:
    """Writes wavs/, training.txt and validation.txt, with the last two clips, to `folder`."""
    (folder / "wavs").mkdir()
    names = [f"clip{i}" for i in range(clips)]
    for i, name in enumerate(names):
        wav = speech_like(0.4 + 0.05 * (i % 7), seed=i)
        soundfile.write(folder / "wavs" / f"{name}.wav", wav, 22050, subtype="PCM_16")
    (folder / "training.txt").write_text("".join(f"{name}|words\n" for name in names[:-2]))
    (folder / "validation.txt").write_text("".join(f"{name}\n" for name in names[-2:]))
    return folder


def corpus_arguments(corpus: Path) -> list[str]:
    """Returns the flags with which train.py uses `corpus`, on the CPU."""
    return [
        *("--input_wavs_dir", str(corpus / "wavs")),
        *("--input_training_file", str(corpus / "training.txt")),
        *("--input_validation_file", str(corpus / "validation.txt")),
        *("--device", "cpu"),
    ]


def run_main(module, *arguments) -> int:
    """Runs a script's main in this process with command-line arguments, and returns its status."""
    saved = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    try:
        return module.main() or 0
    finally:
        sys.argv = saved


def save_checkpoint(path: Path, contents: dict) -> None:
    """Writes a checkpoint file of tensors and plain types."""
    write_checkpoint(path, contents, path)
