"""What training owns, and what lies on disk of it: `g_*`, the generator, and `do_*`, all the rest.

g_00005000     {"generator"}
do_00005000    {"mpd", "msd", "optim_g", "optim_d", "steps", "epoch"} as in HiFi-GAN, and
               "epoch_step", "meta", and what a distillation adds
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from distributed import as_ddp, max_over_processes, raise_on_all_ranks, rank
from env import Config, UserError, load_config
from losses import MelLoss, SourceLoss
from meldataset import LogMelSpectrogram
from models import Discriminators, Generator
from muon import RATE, Muon
from utils import WriteError, atomic_write, say
from weights import (
    generator_weights,
    is_y_chans,
    load_checkpoint,
    load_matching,
    load_weights,
    mrf_as_misr,
    to_hifigan_names,
    to_native_names,
)

ROOT = Path(__file__).parent
NEVER = 2**62
TRAINING_KEYS = ("mpd", "msd", "optim_g", "optim_d", "steps", "epoch")  # of do_* files

# What of its config a run may go on without. The rest is the model's and the mel's: g_* files are
# read with it, and much of it could change without a tensor's shape telling.
CHANGEABLE_KEYS = {
    *("segment_size", "batch_size", "learning_rate", "adam_b1", "adam_b2", "lr_decay", "seed"),
    *(
        "num_workers",
        "lambda_mel",
        "lambda_feature",
        "discriminator_train_start_steps",
        "griffin_lim_steps",
    ),
    *("fmax_for_loss", "n_ffts_for_loss", "num_mels_for_loss"),
}

# --------------------------------------------------------------------------------------- the state


@dataclass
class State:
    """Everything that training owns. A checkpoint holds it all but what follows from the config."""

    h: Config
    device: torch.device
    precision: str  # "fp32" or "bf16", of the convolutions
    generator: Generator  # mel [B, num_mels, T] -> wav [B, 1, T * hop_size]
    discriminators: Discriminators  # wav [B, 1, N] -> (scores, features)
    optim_g: torch.optim.Optimizer
    optim_d: torch.optim.Optimizer
    mel_loss: MelLoss  # (wav_hat [B, N], wav [B, N]) -> []
    voice_loss: SourceLoss | None  # (voice, wav [B, N]) -> [], where the generator hears a voice
    mel_for_loss: LogMelSpectrogram  # [B, N] -> [B, num_mels, T], for validation whatever the loss
    # The same modules, which in one process of several average their gradients over all.
    ddp_generator: nn.Module
    ddp_discriminators: nn.Module
    first_bad_step: torch.Tensor  # [], the first whose losses were not finite, or NEVER
    steps: int = 0  # completed updates
    epoch: int = 0
    epoch_step: int = 0  # completed updates of this epoch
    saved_steps: int = 0  # `steps` of the newest checkpoint
    meta: dict[str, str] = field(default_factory=dict)  # how this run came about: see run_meta
    # What else an update owns and do_* shall hold, by name: each has a state_dict.
    more: dict[str, nn.Module | torch.optim.Optimizer] = field(default_factory=dict)

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
    betas = h.adam_b1, h.adam_b2
    optim_g, optim_d = (  # groups, for PyTorch refuses an empty list of parameters alone
        torch.optim.AdamW([{"params": params}], h.learning_rate, betas=betas, fused=True)
        for params in (generator.parameters(), discriminators.parameters())
    )
    if h.optimizer == "muon":
        generator.remove_weight_norm()
        optim_g = Muon(generator.parameters(), RATE * h.learning_rate, betas=betas)
    return State(
        h=h,
        device=device,
        precision=precision,
        generator=generator,
        discriminators=discriminators,
        optim_g=optim_g,
        optim_d=optim_d,
        mel_loss=MelLoss(h).to(device),
        voice_loss=SourceLoss(h).to(device) if h.is_frame_rate else None,
        mel_for_loss=LogMelSpectrogram(h, h.fmax_for_loss).to(device),
        ddp_generator=generator,
        ddp_discriminators=discriminators,
        first_bad_step=torch.tensor(NEVER, device=device),
    )


def agree_on_steps(state: State) -> None:
    """Raises UserError, in every process, where they stand at different steps."""
    with raise_on_all_ranks():
        if max_over_processes(state.steps) != -max_over_processes(-state.steps):
            raise UserError(
                "the machines resumed from different steps; give all one --checkpoint_path"
            )


def average_gradients(state: State) -> None:
    """Lets the processes of a run average their gradients; nothing to do in a run of one."""
    state.ddp_generator, state.ddp_discriminators = (
        as_ddp(module, state.device) for module in (state.generator, state.discriminators)
    )


def run_meta(config: bytes) -> dict[str, str]:
    """What a `do_*` file tells of its run: the code, torch's version, the command, the config."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        commit = "unknown"
    return {
        "version": version[1],
        "commit": commit,
        "torch": str(torch.__version__),  # a plain string, which loads safely
        "command": " ".join(sys.argv),
        "config": config.decode("utf-8-sig"),
    }


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs between two runs' meta: "lr_decay 0.999 -> 0.9997", the commands apart."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    old, new = (
        {key: meta.get(key) for key in ("version", "commit", "torch")}
        | defaults
        | json.loads(meta.get("config", "{}"))
        for meta in (before, now)
    )
    pairs = ((key, old.get(key, "absent"), new.get(key, "absent")) for key in {**old, **new})
    return [f"{key} {a} -> {b}" for key, a, b in pairs if a != b]


# ---------------------------------------------------------------------------------------- the lock


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other runs out of `folder`, by a lock of the first process that ends when it does.

    Where the file system has no locks, says so and goes on.

    Raises:
        UserError: another run is at work there, or the folder cannot be written.
    """
    if rank() > 0:
        yield
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, mode=0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with open(handle, "r+b", buffering=0) as file:
        _lock(file, folder)
        yield


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        # Unlike flock's, a lock of this kind is not handed on to data workers, who outlive a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        host, _, process = file.read().decode().partition(" ")
        raise UserError(
            f"{folder}: in use by another run, process {process or '?'} on {host or '?'}; stop "
            "that one, or give this one a --checkpoint_path of its own"
        ) from None
    except OSError as error:
        say(f"{folder}: cannot be locked ({error.strerror}); see that no other run writes there")
    with contextlib.suppress(OSError):  # a full disk; it locks all the same
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}".encode())


# ------------------------------------------------------------------------------------------ saving


def save(state: State, folder: Path, keep: int) -> None:
    """Writes `do_` and `g_`, and removes `do_` files that are older than the newest `keep` pairs.

    Raises:
        UserError: a loss or a weight is not finite, and nothing was written; or a full disk.
    """
    check_losses(state, folder)
    modules = (state.generator, state.discriminators)
    if not all(p.isfinite().all() for module in modules for p in module.parameters()):
        last_good = _last_good(folder, state.steps)
        raise UserError(f"a weight is not finite at step {state.steps}; {last_good}")
    state.saved_steps = state.steps
    with raise_on_all_ranks():
        if rank() == 0:
            _write_pair(state, folder)
            _prune(folder, state.steps, keep)


def _write_pair(state: State, folder: Path) -> None:
    contents = {
        "mpd": to_hifigan_names(state.discriminators.mpd),
        "msd": to_hifigan_names(state.discriminators.msd),
        "optim_g": state.optim_g.state_dict(),
        "optim_d": state.optim_d.state_dict(),
        "steps": state.steps,
        "epoch": state.epoch,
        "epoch_step": state.epoch_step,
        "meta": state.meta,
        **{name: each.state_dict() for name, each in state.more.items()},
    }
    do_path, g_path = (checkpoint_path(folder, prefix, state.steps) for prefix in ("do", "g"))
    with atomic_write(g_path) as g_file, atomic_write(do_path) as do_file:  # renames do_* first
        write_checkpoint(do_file, contents, do_path)
        write_checkpoint(g_file, {"generator": to_hifigan_names(state.generator)}, g_path)
        g_path.unlink(missing_ok=True)  # of a run that has gone back since: it is not this do_'s


def _prune(folder: Path, newest: int, keep: int) -> None:
    """Removes `do_` files that are older than the `keep` pairs up to `newest`."""
    kept = [steps for steps in paired_steps(folder) if steps <= newest][-keep:]
    for steps in checkpoint_steps(folder, "do"):
        if steps < kept[0]:
            checkpoint_path(folder, "do", steps).unlink(missing_ok=True)


def write_checkpoint(file: Path, contents: dict, path: Path) -> None:
    """Writes tensors and plain types to `file`, which shall become `path`.

    Raises:
        WriteError: no room, say.
    """
    try:
        with open(file, "wb") as opened:  # its errors say more than torch's own
            torch.save(contents, opened)
    except (RuntimeError, OSError) as error:
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise WriteError(f"{path}: cannot be written ({reason})") from None


def check_losses(state: State, folder: Path) -> None:
    """Raises UserError, in every process, where any has seen a loss that was not finite."""
    first = -max_over_processes(-int(state.first_bad_step))
    if first < NEVER:
        raise UserError(f"a loss was not finite at step {first}; {_last_good(folder, first)}")


def _last_good(folder: Path, bad_step: int) -> str:
    """Words for the newest pair before `bad_step`; later ones were damaged and skipped."""
    pairs = [steps for steps in paired_steps(folder) if steps < bad_step]
    if not pairs:
        return f"{folder} holds no checkpoint yet"
    return f"the last good checkpoint is {checkpoint_path(folder, 'g', pairs[-1])}"


# ---------------------------------------------------------------------------------------- resuming


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: str | Path) -> None:
    """Gives `optimizer` the moments of `saved`, which came from `path`.

    Learning rate, betas and the like stay as they are: they are the config's.

    Raises:
        UserError: the moments are not of these parameters.
    """
    try:
        (ours,), (theirs,) = optimizer.state_dict()["param_groups"], saved["param_groups"]
        pairs = zip(optimizer.param_groups[0]["params"], theirs["params"], strict=True)
        for param, key in pairs:  # PyTorch takes moments of any shape, and reads beyond their ends
            moments = saved["state"].get(key)
            if moments is not None:
                is_muons = isinstance(optimizer, Muon) and param.dim() > 1
                names = ("momentum",) if is_muons else ("exp_avg", "exp_avg_sq")
                shapes = {moments[name].shape for name in names}
                if shapes != {param.shape} or not moments.get("step", 0) >= 0:
                    raise ValueError("other shapes")
        groups = [ours | {"params": theirs["params"]}]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer does not fit the config ({error})") from None


def resume(state: State, folder: Path) -> bool:
    """Continues from the newest pair of `g_` and `do_` in `folder` that can be read, if any.

    HiFi-GAN's own files will do, and y-chan's. Damaged files are named and left alone.

    Raises:
        UserError: a pair that does not fit the config, a config of another model or mel, or files
            from which nothing can be resumed.
    """
    pairs = paired_steps(folder)
    for steps in reversed(pairs):
        paths = [checkpoint_path(folder, prefix, steps) for prefix in ("g", "do")]
        try:
            g, do = (load_checkpoint(path) for path in paths)
        except UserError as error:
            say(f"skipped: {error}")
            continue
        _check_config(state.h, folder / "config.json")
        _restore(state, g, do, paths)
        say(f"resumed from {paths[0]} and {paths[1].name}, after {state.steps} steps")
        if changed := "meta" in do and changes(do["meta"], state.meta):
            say(f"changed since then: {'; '.join(changed)}")
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
    g_path, do_path = paths
    wanted = (*TRAINING_KEYS, *state.more)
    for path, contents, keys in ((g_path, g, ["generator"]), (do_path, do, wanted)):
        missing = [key for key in keys if key not in contents]
        if missing:
            is_trains = state.more.keys() >= set(missing)
            hint = "; a run of train.py goes on by train.py" if is_trains else ""
            raise UserError(f"{path}: holds no {', '.join(missing)}{hint}")
    for key in ("steps", "epoch", "epoch_step"):
        if not isinstance(count := do.get(key, 0), int) or count < 0:
            raise UserError(f"{do_path}: {key} = {count!r}; expected a count")
    is_theirs = is_y_chans(g["generator"])
    if is_theirs and state.h.misr_merge != "conv":
        raise UserError(f'{g_path}: of y-chan\'s port, which needs "misr_merge": "conv"')
    load_weights(state.generator, g["generator"], g_path)
    if is_theirs:
        say(f"{do_path}: of y-chan's port; the generator's optimizer starts anew")
    else:
        load_optimizer(state.optim_g, do["optim_g"], do_path)
    if state.h.uses_discriminators and do["mpd"] == do["msd"] == {}:
        say(f"{do_path}: of a run without discriminators; they start untrained")
    elif state.h.uses_discriminators:
        load_weights(state.discriminators.mpd, do["mpd"], do_path)
        load_weights(state.discriminators.msd, do["msd"], do_path)
        load_optimizer(state.optim_d, do["optim_d"], do_path)
    for name, each in state.more.items():
        load = load_weights if isinstance(each, nn.Module) else load_optimizer
        load(each, do[name], do_path)
    state.steps, state.epoch = do["steps"], do["epoch"]
    if "epoch_step" in do:
        state.epoch_step = do["epoch_step"]
    else:  # HiFi-GAN's, which saves before it counts
        state.steps += 1
    state.saved_steps = state.steps


def _check_config(h: Config, path: Path) -> None:
    """Raises UserError where a run that has the config at `path` cannot go on with `h`."""
    if not path.exists():  # files of HiFi-GAN may come alone
        return
    theirs = load_config(path)
    before, now = dataclasses.asdict(theirs), dataclasses.asdict(h)
    changed = [key for key in before if key not in CHANGEABLE_KEYS and before[key] != now[key]]
    if theirs.uses_misr != h.uses_misr:
        found = "a MISR's run, but now an MRF's" if theirs.uses_misr else "an MRF's, now a MISR's"
    elif theirs.is_frame_rate != h.is_frame_rate:
        kinds = ("with" if each.is_frame_rate else "without" for each in (theirs, h))
        found = "a run {} griffin_lim_steps, but now {}".format(*kinds)
    elif changed:
        found = f"{changed[0]} = {before[changed[0]]}, but now {now[changed[0]]}"
    else:
        return
    raise UserError(
        f"{path}: {found}: expected the same model, mel and optimizer; to begin with its weights, "
        "pass --warm_start and another --checkpoint_path"
    )


def warm_start(state: State, paths: list[Path]) -> None:
    """Takes what fits out of `g_*` and `do_*` files of the family; says what it did not take.

    A layer is taken where all of its tensors match in name and shape. The shared blocks of MISR are
    taken from the blocks of an MRF that have their kernel size. Optimizers start anew.

    Raises:
        UserError: a file that cannot be read, holds no weights, or none that fits.
    """
    modules = dict(state.discriminators.named_children()) | {"generator": state.generator}
    for path in paths:
        contents = load_checkpoint(path)
        found = {name: contents[name] for name in ("mpd", "msd") if name in contents}
        if not found:
            found = {"generator": generator_weights(contents, path)}
        for name, weights in found.items():
            module, note = modules[name], ""
            if name != "generator" and not (weights and state.h.uses_discriminators):
                where = "config" if weights else "file"
                say(f"{path}: {name}: nothing taken, for the {where} has no discriminators")
                continue
            if name == "generator" and state.h.uses_misr:
                weights, note = mrf_as_misr(weights, state.h)
            taken, left = load_matching(module, to_native_names(weights, module))
            if not taken:
                raise UserError(f"{path}: no layer of its {name} fits the config")
            left_out = f"; not taken: {', '.join(left)}" if left else ""
            counted = f"{len(taken)} of {len(taken) + len(left)} layers taken"
            say(f"{path}: {name}: {counted}{note}{left_out}")


# ------------------------------------------------------------------------------------------- names


def checkpoint_path(folder: str | Path, prefix: str, steps: int) -> Path:
    """`<folder>/<prefix>_<steps>`: g_00005000 is the generator after 5000 updates."""
    return Path(folder) / f"{prefix}_{steps:08d}"


def checkpoint_steps(folder: str | Path, prefix: str) -> list[int]:
    """The steps of the checkpoints `<prefix>_*` in `folder`, ascending."""
    folder = Path(folder)
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    matches = (re.fullmatch(rf"{prefix}_(\d{{8,}})", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def paired_steps(folder: str | Path) -> list[int]:
    """The steps at which `folder` holds both `g_` and `do_`, ascending."""
    return sorted(set(checkpoint_steps(folder, "g")) & set(checkpoint_steps(folder, "do")))
