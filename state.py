"""What training owns, and how it lies on disk: `g_*`, the generator, and `do_*`, all the rest."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from env import Config, UserError, max_over_processes, rank, world_size
from meldataset import LogMelSpectrogram
from models import Discriminators, Generator, modern_keys
from utils import (
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_matching,
    load_optimizer,
    load_weights,
    paired_steps,
    save_checkpoint,
    say,
)

NEVER = 2**62
GENERATOR_KEYS = ("generator",)  # of g_* files
TRAINING_KEYS = ("mpd", "msd", "optim_g", "optim_d", "steps", "epoch")  # of do_* files


@dataclass
class State:
    """Everything that training owns. A checkpoint holds it all but what follows from the config."""

    h: Config
    device: torch.device
    precision: str  # "fp32" or "bf16"
    generator: Generator
    discriminators: Discriminators
    optim_g: torch.optim.Optimizer
    optim_d: torch.optim.Optimizer
    mel_for_loss: LogMelSpectrogram
    # The same modules as one process of several runs them: averaging gradients over all.
    shared_generator: nn.Module
    shared_discriminators: nn.Module
    first_bad_step: torch.Tensor  # the first whose losses were not finite, or NEVER
    steps: int = 0  # completed updates
    epoch: int = 0
    epoch_step: int = 0  # completed updates of this epoch

    def autocast(self) -> torch.autocast:
        """The context in which convolutions run in the precision asked for."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def end_epoch(self, steps_per_epoch: int) -> None:
        """Goes on to the next epoch where this one has had its steps."""
        if self.epoch_step >= steps_per_epoch:
            self.epoch, self.epoch_step = self.epoch + 1, 0


def build_state(h: Config, device: torch.device, precision: str = "fp32") -> State:
    """A fresh state: the same weights on every device and in every process."""
    torch.manual_seed(h.seed)
    generator, discriminators = Generator(h).to(device), Discriminators(h).to(device)

    def adamw(module: nn.Module) -> torch.optim.AdamW:
        betas = (h.adam_b1, h.adam_b2)
        return torch.optim.AdamW(module.parameters(), h.learning_rate, betas=betas, fused=True)

    return State(
        h=h,
        device=device,
        precision=precision,
        generator=generator,
        discriminators=discriminators,
        optim_g=adamw(generator),
        optim_d=adamw(discriminators),
        mel_for_loss=LogMelSpectrogram(h, h.fmax_for_loss).to(device),
        shared_generator=generator,
        shared_discriminators=discriminators,
        first_bad_step=torch.tensor(NEVER, device=device),
    )


def share_over_processes(state: State) -> None:
    """Lets the processes of a run average their gradients; nothing to do in a run of one.

    Raises:
        UserError: the processes stand at different steps.
    """
    if world_size() == 1:
        return
    if max_over_processes(state.steps) != -max_over_processes(-state.steps):
        raise UserError("the machines resumed from different steps; give all one --checkpoint_path")
    ids = [state.device] if state.device.type == "cuda" else None
    state.shared_generator, state.shared_discriminators = (
        DistributedDataParallel(module, device_ids=ids)
        for module in (state.generator, state.discriminators)
    )


def save(state: State, folder: Path, keep: int) -> None:
    """Writes `do_` and then `g_`, each whole or not at all, and removes all but `keep` `do_` files.

    So a `g_` never stands without a `do_` that was written before it.

    Raises:
        UserError: a loss or a weight is not finite, and nothing was written; or a full disk.
    """
    check_losses(state, folder)
    modules = (state.generator, state.discriminators)
    if not all(p.isfinite().all() for module in modules for p in module.parameters()):
        raise UserError(f"a weight is not finite at step {state.steps}; {_last_good(folder)}")
    if rank() > 0:
        return
    contents = {
        "mpd": state.discriminators.mpd.state_dict(),
        "msd": state.discriminators.msd.state_dict(),
        "optim_g": state.optim_g.state_dict(),
        "optim_d": state.optim_d.state_dict(),
        "steps": state.steps,
        "epoch": state.epoch,
        "epoch_step": state.epoch_step,
    }
    save_checkpoint(checkpoint_path(folder, "do", state.steps), contents)
    generator = {"generator": state.generator.state_dict()}
    save_checkpoint(checkpoint_path(folder, "g", state.steps), generator)
    older = [steps for steps in checkpoint_steps(folder, "do") if steps <= state.steps]
    for steps in older[:-keep]:
        checkpoint_path(folder, "do", steps).unlink(missing_ok=True)


def check_losses(state: State, folder: Path) -> None:
    """Raises UserError, in every process, where any has seen a loss that was not finite."""
    first = -max_over_processes(-int(state.first_bad_step))
    if first < NEVER:
        raise UserError(f"a loss was not finite at step {first}; {_last_good(folder)}")


def _last_good(folder: Path) -> str:
    pairs = paired_steps(folder)
    if not pairs:
        return f"{folder} holds no checkpoint yet"
    return f"the last good checkpoint is {checkpoint_path(folder, 'g', pairs[-1])}"


def resume(state: State, folder: Path) -> bool:
    """Continues from the newest pair of `g_` and `do_` in `folder` that can be read, if any.

    HiFi-GAN's own files will do. Damaged files are named and left alone.

    Raises:
        UserError: a pair that does not fit the config, or files from which nothing can be resumed.
    """
    pairs = paired_steps(folder)
    for steps in reversed(pairs):
        paths = [checkpoint_path(folder, prefix, steps) for prefix in ("g", "do")]
        try:
            g, do = (load_checkpoint(path) for path in paths)
        except UserError as error:
            say(f"skipped: {error}")
            continue
        _restore(state, g, do, paths)
        say(f"resumed from {paths[0]} and {paths[1].name}, after {state.steps} steps")
        return True
    if pairs:
        raise UserError(f"{folder}: no checkpoint in it can be read; move them away to start anew")
    if checkpoint_steps(folder, "g"):
        raise UserError(
            f"{folder}: holds g_* but no do_* of the same step, so nothing to resume; to start "
            "from their weights, pass --warm_start and another --checkpoint_path"
        )
    for steps in checkpoint_steps(folder, "do"):
        say(f"skipped: {checkpoint_path(folder, 'do', steps)} has no g_ beside it")
    return False


def _restore(state: State, g: dict, do: dict, paths: list[Path]) -> None:
    for path, contents, keys in zip(paths, (g, do), (GENERATOR_KEYS, TRAINING_KEYS), strict=True):
        missing = [key for key in keys if key not in contents]
        if missing:
            raise UserError(f"{path}: holds no {', '.join(missing)}")
    load_weights(state.generator, g["generator"], paths[0])
    load_weights(state.discriminators.mpd, do["mpd"], paths[1])
    load_weights(state.discriminators.msd, do["msd"], paths[1])
    load_optimizer(state.optim_g, do["optim_g"], paths[1])
    load_optimizer(state.optim_d, do["optim_d"], paths[1])
    state.steps, state.epoch = do["steps"], do["epoch"]
    state.epoch_step = do.get("epoch_step", 0)  # not in HiFi-GAN's files


def warm_start(state: State, paths: list[Path]) -> None:
    """Takes what fits out of `g_*` and `do_*` files, ours or HiFi-GAN's; says what it did not take.

    A layer is taken where all of its tensors match in name and shape. Optimizers start anew.

    Raises:
        UserError: a file that cannot be read or holds no weights.
    """
    modules = {
        "generator": state.generator,
        "mpd": state.discriminators.mpd,
        "msd": state.discriminators.msd,
    }
    for path in paths:
        contents = load_checkpoint(path)
        found = [name for name in modules if isinstance(contents.get(name), dict)]
        if not found:
            raise UserError(f"{path}: holds no weights of {', '.join(modules)}")
        for name in found:
            taken, left = load_matching(modules[name], modern_keys(contents[name]))
            left_out = f"; not taken: {', '.join(left)}" if left else ""
            say(f"{path}: {name}: {len(taken)} of {len(taken) + len(left)} layers taken{left_out}")
