"""Trains variants of a generator for some hundred updates and compares their mel errors.

    python tools/ablate.py --variants misr mrf --updates 2000

Only the generator is trained, on HiFi-GAN's mel loss; with --adversarial, discriminators of an
eighth of the width are trained, too. Runs use bfloat16, one core and the update of train.py. The
learning rate rises to 0.0005 in 20 updates and falls to 0 at the last, so that seeds can be
compared. Prints one row per variant: the parameters, the validation mel error of each seed, their
mean, and the CPU seconds per update. docs/ablations.md contains the results.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from checkpoint import State, build_state
from distributed import computes_in_bfloat16
from env import Config, UserError, load_config
from meldataset import MelDataset, ResumableBatchSampler
from models import INPUT_NOISE
from tools.toy import ROOT
from train import training_step, vocode_clip
from utils import command_line, command_parser, positive

LISTS = ROOT / "tools"  # of three minutes and half a minute of LJSpeech
WARM_UP = 20  # updates
COMMON = {
    "learning_rate": 0.0005,
    "lr_decay": 1.0,
    "num_workers": 0,
    "discriminator_channel_mult": 0.125,
}


class Variant(NamedTuple):
    """A config, and settings that are not config keys."""

    config: str = "config_v2.json"
    changes: dict = {}  # noqa: RUF012 - it is never changed
    noise: float = INPUT_NOISE
    is_near_identity: bool = True  # False: PyTorch's default initialisation
    shared_rate: float = 1.0  # times the learning rate, in MISR's shared blocks


VARIANTS = {
    "misr": Variant(),
    "mrf": Variant("configs/hifigan_v2.json"),
    "mrf_104": Variant("configs/hifigan_v2.json", {"upsample_initial_channel": 104}),
    "conv": Variant(changes={"misr_merge": "conv"}),
    "kernel_7": Variant(changes={"resblock_kernel_size": 7}),
    "n_2": Variant(changes={"resblock_num": 2}),
    "n_4": Variant(changes={"resblock_num": 4}),
    "half_noise": Variant(noise=INPUT_NOISE / 2),
    "twice_noise": Variant(noise=INPUT_NOISE * 2),
    "default_init": Variant(is_near_identity=False),
    "twice_rate": Variant(shared_rate=2.0),
    "adamw_1e-3": Variant(changes={"learning_rate": 0.001}),
    "muon": Variant(changes={"optimizer": "muon", "learning_rate": 0.0002}),
    "muon_half": Variant(changes={"optimizer": "muon", "learning_rate": 0.0001}),
}


def make_config(variant: Variant, seed: int, batch_size: int, adversarial: bool) -> Config:
    """Returns the config of one run."""
    values = json.loads((ROOT / variant.config).read_text()) | COMMON | variant.changes
    values |= {"seed": seed, "batch_size": batch_size}
    values["discriminator_train_start_steps"] = 0 if adversarial else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(values))
        return load_config(path)


def make_state(variant: Variant, h: Config) -> State:
    """Returns a fresh state whose optimizer has a learning rate for the shared blocks."""
    cpu = torch.device("cpu")
    state = build_state(h, cpu, "bf16" if computes_in_bfloat16(cpu) else "fp32")
    for block in state.generator.resblocks if h.uses_misr else ():
        if not variant.is_near_identity:
            initialise_by_default(block)
        elif variant.noise != INPUT_NOISE:
            block.initialise(variant.noise)
    if variant.shared_rate != 1:
        shared = [p for block in state.generator.resblocks for p in block.resblock.parameters()]
        ids = {id(p) for p in shared}
        rest = [p for p in state.generator.parameters() if id(p) not in ids]
        groups = [{"params": rest}, {"params": shared, "lr": h.learning_rate * variant.shared_rate}]
        betas = (h.adam_b1, h.adam_b2)
        state.optim_g = torch.optim.AdamW(groups, h.learning_rate, betas=betas, fused=True)
    return state


@torch.no_grad()
def initialise_by_default(block: nn.Module) -> None:
    """Initialises the convolutions of `block` as PyTorch does by default."""
    for conv in block.modules():
        if isinstance(conv, nn.Conv1d):
            fresh = nn.Conv1d(conv.in_channels, conv.out_channels, conv.kernel_size)
            conv.weight = fresh.weight.detach()
            conv.bias.copy_(fresh.bias)


def train_updates(state: State, clips: MelDataset, updates: int) -> float:
    """Trains for `updates` updates; returns the CPU seconds per update."""
    groups = state.optim_g.param_groups + state.optim_d.param_groups
    rates = [group["lr"] for group in groups]
    batches, begin = iter(ResumableBatchSampler(len(clips), state.h)), time.process_time()
    for update in range(updates):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1, (update + 1) / WARM_UP) * (1 - update / updates)
        mel, wav = (
            torch.stack(x) for x in zip(*map(clips.__getitem__, next(batches)), strict=True)
        )
        training_step(state, mel, wav)
    return (time.process_time() - begin) / updates


@torch.no_grad()
def mel_error(state: State, clips: MelDataset) -> float:
    """Returns the mean mel error of whole clips, as in train.py's validation."""
    errors = []
    for index in range(len(clips)):
        wav, wav_hat = vocode_clip(state, clips, index)
        errors.append(float(F.l1_loss(state.mel_for_loss(wav_hat), state.mel_for_loss(wav))))
    return math.fsum(errors) / len(errors)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser(
        "Trains variants of a generator for some hundred updates and compares their mel errors.",
        example="python tools/ablate.py --input_wavs_dir LJSpeech-1.1/wavs --variants misr mrf",
    )
    parser.add_argument(
        "--input_wavs_dir",
        metavar="DIR",
        default="LJSpeech-1.1/wavs",
        help="audio in any format and rate",
    )
    parser.add_argument(
        "--input_training_file",
        metavar="FILE",
        default=LISTS / "ablate_training.txt",
        help="one clip per line: id|...",
    )
    parser.add_argument(
        "--input_validation_file",
        metavar="FILE",
        default=LISTS / "ablate_validation.txt",
        help="one clip per line: id|...",
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows of the table"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=positive,
        default=[1, 2, 3],
        help="one run of each variant per seed",
    )
    parser.add_argument("--updates", type=positive, default=400, help="updates per run")
    parser.add_argument("--batch_size", type=positive, default=4, help="segments per update")
    parser.add_argument("--adversarial", action="store_true", help="train against discriminators")
    return parser.parse_args()


def run_variant(variant: Variant, seed: int, a: argparse.Namespace) -> tuple[State, float, float]:
    """Trains once; returns the state, the mel error and the CPU seconds per update."""
    h = make_config(variant, seed, batch_size=a.batch_size, adversarial=a.adversarial)
    clips, validation = (
        MelDataset(h, file_list, a.input_wavs_dir)
        for file_list in (a.input_training_file, a.input_validation_file)
    )
    if len(clips) < a.batch_size or not len(validation):
        raise UserError(f"expected {a.batch_size} training clips and 1 validation clip")
    state = make_state(variant, h)
    seconds = train_updates(state, clips, a.updates)
    return state, mel_error(state, validation), seconds


def main() -> None:
    """Prints one row per variant."""
    a = parse_arguments()
    torch.set_num_threads(1)  # CPU seconds are of all threads together
    print("| variant | parameters | mel error, each seed | mean | CPU seconds per update |")
    print("|---|---|---|---|---|", flush=True)
    for name in a.variants:
        states, errors, seconds = zip(
            *(run_variant(VARIANTS[name], seed, a) for seed in a.seeds), strict=True
        )
        states[0].generator.remove_weight_norm()
        count = sum(p.numel() for p in states[0].generator.parameters())
        each = ", ".join(f"{error:.3f}" for error in errors)
        mean, cost = (math.fsum(values) / len(values) for values in (errors, seconds))
        print(f"| {name} | {count:,} | {each} | {mean:.3f} | {cost:.3f} |", flush=True)


if __name__ == "__main__":
    command_line(main)
