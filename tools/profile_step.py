"""Where the time of a training step goes: torch.profiler's table.

python tools/profile_step.py --config config_v1.json --batch_size 16 --precision bf16
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from checkpoint import build_state
from distributed import select_device
from env import load_config
from train import training_step
from utils import command_line, command_parser, positive

STEPS = 3  # that are profiled, after as many to warm up


def main() -> None:
    """Prints the table, the most expensive operators first."""
    parser = command_parser(
        "Prints where the time of a training step goes.",
        example="python tools/profile_step.py --config config_v1.json --batch_size 16",
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="JSON config")
    parser.add_argument("--batch_size", type=positive, default=16, metavar="N", help="segments")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    a = parser.parse_args()
    device = select_device(a.device)
    h = replace(load_config(a.config), batch_size=a.batch_size)
    state = build_state(h, device, a.precision)
    mel = torch.randn(h.batch_size, h.num_mels, h.segment_size // h.hop_size, device=device) - 5
    wav = 0.1 * torch.randn(h.batch_size, 1, h.segment_size, device=device)
    for _ in range(STEPS):
        training_step(state, mel, wav)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            training_step(state, mel, wav)
    order = f"self_{device.type}_time_total" if device.type == "cpu" else "self_device_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    command_line(main)
