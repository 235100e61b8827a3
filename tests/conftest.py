"""What the tests share."""

import os
from pathlib import Path

# Threads only get in each other's way at toy size. Set before torch loads; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import export_onnx
from env import load_config
from models import Generator
from tools.toy import ROOT, make_corpus, run_main, save_checkpoint, write_config

ALL_CONFIGS = sorted([*ROOT.glob("config_*.json"), *ROOT.glob("configs/*.json")])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with wavs/ of 7 clips, training.txt with 5 of them and validation.txt with 2."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A folder with a toy g_00500000, its config.json, and the misrnet.onnx made of it."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    generator = Generator(load_config(write_config(folder / "config.json")))
    save_checkpoint(folder / "g_00500000", {"generator": generator.state_dict()})
    flags = ("--checkpoint_file", folder / "g_00500000", "--output", folder / "misrnet.onnx")
    assert run_main(export_onnx, *flags) == 0
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
