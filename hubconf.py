"""For torch.hub: the shipped weights, and the mel that they speak.

generator = torch.hub.load("path/to/misrnet", "misrnet", source="local")
log_mel = torch.hub.load("path/to/misrnet", "log_mel", source="local")
speech = generator(log_mel(wav))    # [B, N] -> [B, 1, N // hop_size * hop_size], at 22050 Hz
"""

from pathlib import Path

from checkpoint import checkpoint_path, checkpoint_steps
from env import load_config
from inference import load_generator
from meldataset import LogMelSpectrogram
from models import Generator

dependencies = ["torch", "numpy", "librosa", "soundfile", "scipy", "tqdm"]

PRETRAINED = Path(__file__).parent / "pretrained"
BEST = "frame_v2_universal"


def misrnet(name: str = BEST, device: str = "cpu", precision: str = "fp32") -> Generator:
    """The generator of `pretrained/<name>`, ready to speak: [B, num_mels, T] -> [B, 1, N]."""
    folder = _folder(name)
    newest = checkpoint_path(folder, "g", checkpoint_steps(folder, "g")[-1])
    return load_generator(newest, device, precision)[0]


def log_mel(name: str = BEST, device: str = "cpu") -> LogMelSpectrogram:
    """The log-mel that `misrnet(name)` speaks: wav [B, N] in [-1, 1] -> [B, num_mels, T]."""
    h = load_config(_folder(name) / "config.json")
    return LogMelSpectrogram(h, h.fmax).to(device)


def _folder(name: str) -> Path:
    folder = PRETRAINED / name
    if not (folder / "config.json").exists():
        names = ", ".join(sorted(path.parent.name for path in PRETRAINED.glob("*/config.json")))
        raise ValueError(f"{name}: no such weights; there are {names}")
    return folder
