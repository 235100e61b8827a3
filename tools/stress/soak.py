"""Trains a toy model on random data for long: does memory grow, and does a loss go astray?

    OMP_NUM_THREADS=1 python tools/stress/soak.py --steps 10000

By hand, not by pytest. Prints the resident memory at intervals and the slope of a line through its
second half, where caches are full. Exits with 1 where a loss was not finite or the slope is above
LARGEST_SLOPE. For Linux, whose files in /proc it reads.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
from checkpoint import NEVER, State, build_state
from distributed import select_device
from env import Config, load_config
from meldataset import LogMelSpectrogram
from tools.toy import write_config
from train import set_learning_rate, training_step
from utils import command_line, positive

LARGEST_SLOPE = 100  # bytes a step; any tensor that is left behind takes more
STEPS_PER_EPOCH = 100


def resident_bytes() -> int:
    """The memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def random_batch(h: Config, log_mel: LogMelSpectrogram) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of all levels from silence to full scale: (mel, wav), as `training_step` takes them."""
    levels = 10 ** (-5 * torch.rand(h.batch_size, 1))
    wav = levels * (2 * torch.rand(h.batch_size, h.segment_size) - 1)
    return log_mel(wav), wav.unsqueeze(1)


def soak(state: State, steps: int, interval: int) -> list[tuple[int, int]]:
    """Trains for `steps` updates; returns, and prints, (step, resident bytes) at intervals."""
    seen, log_mel = [], LogMelSpectrogram(state.h, state.h.fmax)
    while state.steps < steps:
        set_learning_rate(state)
        losses = training_step(state, *random_batch(state.h, log_mel))
        state.count_update(losses, STEPS_PER_EPOCH)
        if state.steps % interval == 0:
            seen.append((state.steps, resident_bytes()))
            named = ", ".join(f"{name} {float(loss):.3f}" for name, loss in losses.items())
            print(f"step {state.steps}: {seen[-1][1] / 2**20:.1f} MiB, {named}", flush=True)
    return seen


def main() -> int:
    """Soaks, and judges."""
    parser = argparse.ArgumentParser(
        description="Trains a toy model on random data for long: does memory grow?",
        epilog="Example: python tools/stress/soak.py --steps 10000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=10_000, help="updates")
    parser.add_argument("--interval", type=positive, default=250, help="updates between two lines")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        h = load_config(write_config(Path(folder) / "config.json"))
    state = build_state(h, select_device("cpu"), a.precision)
    seen = soak(state, a.steps, a.interval)
    second_half = np.array(seen[len(seen) // 2 :], dtype=float)
    slope = np.polyfit(*second_half.T, deg=1)[0]
    is_finite = int(state.first_bad_step) == NEVER
    print(f"slope over the second half: {slope:.1f} bytes a step; all losses finite: {is_finite}")
    return 0 if is_finite and slope <= LARGEST_SLOPE else 1


if __name__ == "__main__":
    command_line(main)
