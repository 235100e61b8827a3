"""Entry points for torch.hub: the shipped weights, their mel, and streaming synthesis.

generator = torch.hub.load("path/to/misrnet", "misrnet", source="local")
log_mel = torch.hub.load("path/to/misrnet", "log_mel", source="local")
speech = generator(log_mel(wav))    # [B, N] -> [B, 1, N // hop_size * hop_size], at 22050 Hz
streamer = torch.hub.load("path/to/misrnet", "streamer", source="local")
samples = streamer.feed(mel)        # [num_mels, n] -> those that are final
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meldataset import LogMelSpectrogram
    from models import Generator
    from streaming import Streamer

dependencies = ["torch", "numpy", "scipy", "soundfile", "soxr", "tqdm"]

ROOT = Path(__file__).resolve().parent
PRETRAINED = ROOT / "pretrained"
BEST = "frame_v2_universal"


def _import_apart(*names: str) -> list[ModuleType]:
    """Imports modules of this folder, leaving the host program's modules of the same names alone.

    Every repository of HiFi-GAN's family has a `utils`, an `env` and a `models`.
    """
    ours = {path.stem for path in ROOT.glob("*.py")}
    theirs = {name: sys.modules.pop(name) for name in ours & sys.modules.keys()}
    sys.path.insert(0, str(ROOT))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(ROOT))
        for name in ours & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(theirs)


_checkpoint, _env, _inference, _meldataset = _import_apart(
    "checkpoint", "env", "inference", "meldataset"
)


def misrnet(name: str = BEST, device: str = "cpu", precision: str = "fp32") -> "Generator":
    """Returns the generator of `pretrained/<name>`: log-mel [B, num_mels, T] -> wav [B, 1, N]."""
    folder = _folder(name)
    newest = _checkpoint.checkpoint_steps(folder, "g")[-1]
    path = _checkpoint.checkpoint_path(folder, "g", newest)
    return _inference.load_generator(path, device, precision)[0]


def log_mel(name: str = BEST, device: str = "cpu") -> "LogMelSpectrogram":
    """Returns the log-mel that `misrnet(name)` takes: wav [B, N] in [-1, 1] -> [B, num_mels, T]."""
    h = _env.load_config(_folder(name) / "config.json")
    return _meldataset.LogMelSpectrogram(h, h.fmax).to(device)


def streamer(name: str = BEST, device: str = "cpu", precision: str = "fp32") -> "Streamer":
    """Returns a Streamer of `misrnet(name)`: feed(mel [num_mels, n]) -> final samples [N]."""
    return _inference.Streamer(misrnet(name, device, precision))


def _folder(name: str) -> Path:
    """Returns `pretrained/<name>`; raises ValueError if there are no such weights."""
    folder = PRETRAINED / name
    if not (folder / "config.json").exists():
        names = ", ".join(sorted(path.parent.name for path in PRETRAINED.glob("*/config.json")))
        raise ValueError(f"{name}: no such weights; there are {names}")
    return folder
