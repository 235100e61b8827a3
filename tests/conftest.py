"""Fixtures and helpers of all tests."""

import math
import os
import signal
from pathlib import Path

# More threads are slower at toy size. Set before torch is imported; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# A numba cache that several processes write at once can crash all that read it.
os.environ["NUMBA_CACHE_DIR"] = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    *(".pytest_cache", "numba", os.environ.get("PYTEST_XDIST_WORKER", "alone")),
)

import pytest
import torch

import export_onnx
from env import load_config
from models import Generator, ResBlock1, ResBlock2
from tools.toy import ROOT, make_corpus, run_main, save_checkpoint, write_config
from weights import to_hifigan_names

# nohup, or a shell's background, may have made pytest ignore these signals. Programs that the tests
# start must receive them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

ALL_CONFIGS = sorted([*ROOT.glob("config_*.json"), *ROOT.glob("configs/*.json")])


def random_mel(frames: int) -> torch.Tensor:
    """Returns a mel [80, frames] with loud and silent bands."""
    return torch.rand(80, frames) * 12 - 11


@torch.no_grad()
def far_sighted(generator: Generator) -> Generator:
    """Gives `generator` weights with which its whole receptive field matters.

    With fresh ones, distant frames hardly matter. Here the residual branches are larger than their
    inputs, and the ends of kernels larger than their middles. The output is loud, but tanh does not
    saturate.
    """
    blocks = [m for m in generator.modules() if isinstance(m, ResBlock1 | ResBlock2)]
    for conv in (m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Conv1d)):
        taps = torch.ones(conv.kernel_size)
        taps[[0, -1]] = 6
        std = 2 * taps / (taps.norm() * math.sqrt(conv.in_channels))
        conv.weight = std * torch.randn_like(conv.weight)
    outputs = []
    hook = generator.conv_post.register_forward_hook(lambda _, __, y: outputs.append(y))
    generator(random_mel(50)[None])
    hook.remove()
    generator.conv_post.weight = generator.conv_post.weight * (0.2 / outputs[0].std())
    generator.conv_post.bias.zero_()
    return generator


def new_generator(folder: Path, config: str = "config_v2.json", **changes) -> Generator:
    """Writes a toy config.json into `folder`; returns a far-sighted generator for it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    h = load_config(write_config(folder / "config.json", config, **changes))
    return far_sighted(Generator(h))


def new_checkpoint(folder: Path, config: str = "config_v2.json", **changes) -> Path:
    """Writes a toy config.json and weights for it into `folder`; returns the g_ file."""
    weights = to_hifigan_names(new_generator(folder, config, **changes))
    save_checkpoint(folder / "g_00000001", {"generator": weights})
    return folder / "g_00000001"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with wavs/ of 7 clips, training.txt with 5 of them and validation.txt with 2."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A folder with a toy g_00500000, its config.json, and the misrnet.onnx made of it."""
    folder = tmp_path_factory.mktemp("exported")
    weights = new_generator(folder).state_dict()
    save_checkpoint(folder / "g_00500000", {"generator": weights})
    flags = ("--checkpoint_file", folder / "g_00500000", "--output", folder / "misrnet.onnx")
    assert run_main(export_onnx, *flags) == 0
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
