"""Networks that predict listeners' mean opinion score (MOS) of one waveform at 16 kHz.

    from evaluation.opinion import OPINION_RATE, distill_mos, plcmos
    distill_mos(wav), plcmos(wav)    # wav: np.ndarray [N] at OPINION_RATE

Both are optional packages, which contain the weights. They are imported at the first call.
"""

import functools
import io
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import numpy as np
import torch

OPINION_RATE = 16000  # Hz
DISTILL_SAMPLES, DISTILL_HOP = 122880, 16000  # DistillMOS: its window, and the largest hop
PLCMOS_PEAK = 0.9  # PLCMOS depends on the level, so every waveform is brought to this peak
SEED = 0


def distill_mos(wav: np.ndarray) -> float:
    """Returns DistillMOS of wav [N], 1 to 5, which does not depend on its level.

    The package computes all windows of a file at once. Here they are computed one by one, so that a
    long file fits into memory.

    Source: Stahl, Gamper 2025, "Distillation and Pruning for Scalable Self-Supervised
    Representation-Based Speech Quality Assessment".
    """
    model = _distill_mos_model()
    rest = max(0, len(wav) - DISTILL_SAMPLES)
    starts = np.linspace(0, rest, 1 + math.ceil(rest / DISTILL_HOP)).astype(int)
    windows = (wav[start : start + DISTILL_SAMPLES] for start in starts)
    with torch.no_grad():
        return float(np.mean([model(torch.from_numpy(w)[None]).item() for w in windows]))


@functools.cache
def _distill_mos_model() -> torch.nn.Module:
    with _empty_module("torchaudio"):
        from distillmos import ConvTransformerSQAModel
    # The constructor prints the path of its weights and draws random ones first.
    with redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=()):
        return ConvTransformerSQAModel().eval()


@contextmanager
def _empty_module(name: str) -> Iterator[None]:
    """Provides an empty module `name` while a package is imported that needs it only in scripts.

    An installed torchaudio may be built for another torch. It would then fail to load.
    """
    is_loaded = name in sys.modules
    sys.modules.setdefault(name, types.ModuleType(name))
    try:
        yield
    finally:
        if not is_loaded:
            del sys.modules[name]


def plcmos(wav: np.ndarray) -> float:
    """Returns PLCMOS of wav [N], 1 to 5: the mean over 15 random raters, the same at each call.

    Source: Diener, Purin, Sootla, Saabas, Aichner, Cutler 2023, "PLCMOS: A data-driven
    non-intrusive metric for the evaluation of packet loss concealment algorithms".
    """
    model = _plcmos_model()
    with seeded_numpy():
        return model(np.float32(wav * (PLCMOS_PEAK / np.abs(wav).max())))["plcmos"]


@functools.cache
def _plcmos_model():
    import onnxruntime
    from speechmos.plcmos import PLCMOS

    model, options = PLCMOS(), onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # evaluate.py runs a process on each core
    model.session = onnxruntime.InferenceSession(model.model_path, options)
    return model


@contextmanager
def seeded_numpy() -> Iterator[None]:
    """Fixes NumPy's global random numbers inside the block and restores their state after it."""
    state = np.random.get_state()
    np.random.seed(SEED)
    try:
        yield
    finally:
        np.random.set_state(state)
