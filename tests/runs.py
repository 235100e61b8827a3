"""Runs of train.py on the toy corpus, and comparisons of their checkpoints."""

from pathlib import Path

import torch

import train
from checkpoint import checkpoint_path
from tools.toy import corpus_arguments, run_main, write_config
from weights import load_checkpoint


class Run:
    """train.py's command line on the toy corpus, with 2 steps an epoch; saves every step."""

    def __init__(self, corpus: Path, tmp_path: Path, **changes):
        self.config = write_config(tmp_path / "config.json", **changes)
        self.folder = tmp_path / "cp"
        self.arguments = [*corpus_arguments(corpus), "--config", self.config]

    def __call__(self, steps: int, *flags, folder: Path | None = None) -> int:
        return run_main(
            train,
            *(*self.arguments, "--checkpoint_path", folder or self.folder),
            *("--training_steps", steps, *(flags or ("--checkpoint_interval", 1))),
        )

    def names(self) -> list[str]:
        """The checkpoints of the folder."""
        return sorted(path.name for path in self.folder.glob("*_0*"))


def contents(folder: Path, steps: int) -> dict:
    """The contents of a pair of checkpoints."""
    return {p: load_checkpoint(checkpoint_path(folder, p, steps)) for p in ("g", "do")}


def equal_but_meta(a: dict, b: dict) -> bool:
    """True if the contents of two pairs are equal, bit for bit, except for the commands."""
    return equal(*({"g": each["g"], "do": each["do"] | {"meta": None}} for each in (a, b)))


def equal(a, b) -> bool:
    """True if nested containers of tensors and plain types are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
