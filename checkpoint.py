"""The state of training, and its files: `g_*` holds the generator, `do_*` everything else.

g_00005000     {"generator"}
do_00005000    {"mpd", "msd", "optim_g", "optim_d", "steps", "epoch"} as in HiFi-GAN, and
               "epoch_step", "meta", and the additions of distill.py
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
from losses import LOSSES, GeneratorWithSource, MelLoss, SourceLoss
from meldataset import LogMelSpectrogram, hifigan_recipe
from models import Discriminators, Generator
from muon import MUON_LR_SCALE, Muon
from utils import WriteError, atomic_write, remove_temporary_files, say
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

# The config keys that a resumed run may change. The others belong to the model and the mel: older
# g_* files are read with them, and most of them do not change the shape of any tensor.
CHANGEABLE_KEYS = {loss.weight for loss in LOSSES if loss.weight} | {
    *("segment_size", "batch_size", "learning_rate", "adam_b1", "adam_b2", "lr_decay", "seed"),
    *("num_workers", "mel_blur", "discriminator_train_start_steps", "griffin_lim_steps"),
    *("fmax_for_loss", "n_ffts_for_loss", "num_mels_for_loss"),
}

# --------------------------------------------------------------------------------------- the state


@dataclass
class State:
    """The state of a training run. Checkpoints contain what cannot be rebuilt from `h`."""

    h: Config
    device: torch.device
    precision: str  # "fp32" or "bf16", of the convolutions
    generator: Generator  # mel [B, num_mels, T] -> wav [B, 1, T * hop_size]
    discriminators: Discriminators  # wav [B, 1, N] -> (scores, features)
    optim_g: torch.optim.Optimizer
    optim_d: torch.optim.Optimizer
    mel_loss: MelLoss  # (wav_hat [B, N], wav [B, N]) -> []
    source_loss: SourceLoss | None  # (log_f0, aperiodicity, wav) -> ([], []), at the frame rate
    mel_for_loss: LogMelSpectrogram  # [B, N] -> [B, num_mels, T], for validation
    # The modules that training calls. With several processes, they average their gradients.
    # At the frame rate the generator's also returns the source: see GeneratorWithSource.
    ddp_generator: nn.Module
    ddp_discriminators: nn.Module
    first_bad_step: torch.Tensor  # [], the first step whose losses were not finite, or NEVER
    steps: int = 0  # completed updates
    epoch: int = 0
    epoch_step: int = 0  # completed updates of this epoch
    saved_steps: int = 0  # `steps` of the newest checkpoint
    meta: dict[str, str] = field(default_factory=dict)  # the origin of this run: see run_meta
    # Additions of an update to do_*, by name; each has a state_dict.
    more: dict[str, nn.Module | torch.optim.Optimizer] = field(default_factory=dict)

    def autocast(self) -> torch.autocast:
        """Returns the context in which convolutions run in the chosen precision."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def compile(self) -> None:
        """Compiles the models with torch.compile; call it before `average_gradients`."""
        self.ddp_generator.compile()
        self.ddp_discriminators.compile()

    def average_gradients(self) -> None:
        """Lets the processes of a run average their gradients; does nothing for one process."""
        self.ddp_generator = as_ddp(self.ddp_generator, self.device)
        self.ddp_discriminators = as_ddp(self.ddp_discriminators, self.device)

    def count_update(self, losses: dict[str, torch.Tensor], steps_per_epoch: int) -> None:
        """Counts a completed update and notes, on the device, whether its losses are finite."""
        self.steps += 1
        self.epoch_step += 1
        self.end_epoch(steps_per_epoch)
        is_finite = torch.stack(list(losses.values())).isfinite().all()
        bad_step = self.first_bad_step.clamp(max=self.steps)
        self.first_bad_step = torch.where(is_finite, self.first_bad_step, bad_step)

    def end_epoch(self, steps_per_epoch: int) -> None:
        """Starts the next epoch if this one is complete."""
        if self.epoch_step >= steps_per_epoch:
            self.epoch, self.epoch_step = self.epoch + 1, 0


def build_state(h: Config, device: torch.device, precision: str = "fp32") -> State:
    """Returns a fresh state, with the same weights on every device and in every process."""
    torch.manual_seed(h.seed)
    generator, discriminators = Generator(h).to(device), Discriminators(h).to(device)
    betas = h.adam_b1, h.adam_b2
    optim_g, optim_d = (  # groups, because PyTorch refuses an empty list of parameters
        torch.optim.AdamW([{"params": params}], h.learning_rate, betas=betas, fused=True)
        for params in (generator.parameters(), discriminators.parameters())
    )
    if h.optimizer == "muon":
        generator.remove_weight_norm()
        optim_g = Muon(generator.parameters(), MUON_LR_SCALE * h.learning_rate, betas=betas)
    return State(
        h=h,
        device=device,
        precision=precision,
        generator=generator,
        discriminators=discriminators,
        optim_g=optim_g,
        optim_d=optim_d,
        mel_loss=MelLoss(h).to(device),
        source_loss=SourceLoss(h).to(device) if h.is_frame_rate else None,
        mel_for_loss=LogMelSpectrogram(hifigan_recipe(h), h.fmax_for_loss).to(device),
        ddp_generator=GeneratorWithSource(generator) if h.is_frame_rate else generator,
        ddp_discriminators=discriminators,
        first_bad_step=torch.tensor(NEVER, device=device),
    )


def run_meta(config: bytes) -> dict[str, str]:
    """Returns the origin of a run: versions of the code and of torch, command, config."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return {
        "version": version[1],
        "commit": commit(),
        "torch": str(torch.__version__),  # a plain string, which loads safely
        "command": " ".join(sys.argv),
        "config": config.decode("utf-8-sig"),
    }


def commit() -> str:
    """Returns the commit of this code, as git describes it, or "unknown"."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        return "unknown"


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns the differences of two runs' meta except commands: "lr_decay 0.999 -> 0.9997"."""
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
    """Keeps other runs out of `folder` with a lock that rank 0 holds until the block ends.

    If the file system has no locks, prints a line and continues.

    Raises:
        UserError: another run uses the folder, or the folder cannot be written; in every process.
    """
    with contextlib.ExitStack() as stack:
        with raise_on_all_ranks():
            if rank() == 0:
                _lock(stack.enter_context(_open_lock(Path(folder))), Path(folder))
        yield


def _open_lock(folder: Path) -> BinaryIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, mode=0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return open(handle, "r+b", buffering=0)


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        # Unlike with flock, data workers, which may outlive a killed run, do not inherit the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        host, _, process = file.read().decode().partition(" ")
        raise UserError(
            f"{folder}: in use by another run, process {process or '?'} on {host or '?'}; stop "
            "that run, or pass another --checkpoint_path"
        ) from None
    except OSError as error:
        say(f"{folder}: cannot be locked ({error.strerror}); make sure that no other run uses it")
    with contextlib.suppress(OSError):  # on a full disk, the lock works without its text
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}".encode())


# ------------------------------------------------------------------------------------------ saving


def save(state: State, folder: Path, keep: int) -> None:
    """Writes `do_*` and `g_*`, and removes `do_*` files older than the newest `keep` pairs.

    Raises:
        UserError: a loss or a weight is not finite, and nothing was written; or the disk is full.
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
    if state.meta and not (folder / "config.json").exists():  # the folder was deleted meanwhile
        write_config(state, folder)
    do_path, g_path = (checkpoint_path(folder, prefix, state.steps) for prefix in ("do", "g"))
    with atomic_write(g_path) as g_file, atomic_write(do_path) as do_file:  # do_* is renamed first
        write_checkpoint(do_file, contents, do_path)
        write_checkpoint(g_file, {"generator": to_hifigan_names(state.generator)}, g_path)
        g_path.unlink(missing_ok=True)  # an older file of this step would not match the new do_*


def write_config(state: State, folder: Path) -> None:
    """Writes the config of the run to `config.json` beside its checkpoints."""
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_bytes(state.meta["config"].encode())


def _prune(folder: Path, newest: int, keep: int) -> None:
    """Removes `do_*` files that are older than the `keep` pairs up to `newest`."""
    kept = [steps for steps in paired_steps(folder) if steps <= newest][-keep:]
    for steps in checkpoint_steps(folder, "do"):
        if steps < kept[0]:
            checkpoint_path(folder, "do", steps).unlink(missing_ok=True)


def write_checkpoint(file: Path, contents: dict, path: Path) -> None:
    """Writes tensors and plain types to `file`, which will be renamed to `path`.

    Raises:
        WriteError: `path` cannot be written, because the disk is full for example.
    """
    try:
        with open(file, "wb") as opened:  # its errors say more than those of torch
            torch.save(contents, opened)
    except (RuntimeError, OSError) as error:
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise WriteError(f"{path}: cannot be written ({reason})") from None


def check_losses(state: State, folder: Path) -> None:
    """Raises UserError in every process if any process has seen a loss that was not finite."""
    first = -max_over_processes(-int(state.first_bad_step))
    if first < NEVER:
        raise UserError(f"a loss was not finite at step {first}; {_last_good(folder, first)}")


def _last_good(folder: Path, bad_step: int) -> str:
    """Names the newest pair before `bad_step`; a later pair was damaged and skipped."""
    pairs = [steps for steps in paired_steps(folder) if steps < bad_step]
    if not pairs:
        return f"{folder} contains no checkpoint yet"
    return f"the last good checkpoint is {checkpoint_path(folder, 'g', pairs[-1])}"


# ---------------------------------------------------------------------------------------- resuming


def resume_or_start(
    state: State, folder: Path, *, warm_start_files: list[Path], is_fine_tuning: bool
) -> None:
    """Resumes the run in `folder`, or starts one from `warm_start_files` or random weights.

    Writes config.json beside the checkpoints.

    Raises:
        UserError: the files cannot be used; in every process.
    """
    with raise_on_all_ranks():
        if resume(state, folder):
            if warm_start_files:
                say(f"--warm_start not used: {folder} contains a run, which was resumed")
        elif warm_start_files:
            warm_start(state, warm_start_files)
        elif is_fine_tuning:
            say(
                f"{folder}: no checkpoint, so fine-tuning starts from random weights; to start "
                "from a trained generator, pass --warm_start g_* do_*"
            )
        if rank() == 0:
            remove_temporary_files(folder)
            write_config(state, folder)
    with raise_on_all_ranks():
        if max_over_processes(state.steps) != -max_over_processes(-state.steps):
            raise UserError(
                "the machines resumed from different steps: expected one --checkpoint_path that "
                "all machines share"
            )


def resume(state: State, folder: Path) -> bool:
    """Continues from the newest pair of `g_*` and `do_*` in `folder` that can be read, if any.

    Pairs of HiFi-GAN and of y-chan's port are accepted. Damaged files are named and left alone.

    Raises:
        UserError: a pair or config.json does not fit the config, or the files cannot be resumed.
    """
    if names := look_alikes(folder):
        say(f"{folder}: not used, {', '.join(names)}: expected names such as g_00005000")
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
        raise UserError(
            f"{folder}: no checkpoint in it can be read; move them away to start a new run"
        )
    if checkpoint_steps(folder, "g"):
        raise UserError(
            f"{folder}: contains g_* but no do_* of the same step, so there is nothing to resume; "
            "to start from their weights, pass --warm_start and another --checkpoint_path"
        )
    for steps in checkpoint_steps(folder, "do"):
        say(f"skipped: {checkpoint_path(folder, 'do', steps)} has no g_* beside it")
    return False


def _restore(state: State, g: dict, do: dict, paths: list[Path]) -> None:
    """Loads the contents of a pair into `state`."""
    g_path, do_path = paths
    expected = (*TRAINING_KEYS, *state.more)
    for path, contents, keys in ((g_path, g, ["generator"]), (do_path, do, expected)):
        missing = [key for key in keys if key not in contents]
        if missing:
            is_from_train = state.more.keys() >= set(missing)
            hint = "; resume a run of train.py with train.py" if is_from_train else ""
            raise UserError(f"{path}: contains no {', '.join(missing)}{hint}")
    for key in ("steps", "epoch", "epoch_step"):
        if not isinstance(count := do.get(key, 0), int) or count < 0:
            raise UserError(f"{do_path}: {key} = {count!r}; expected a count")
    is_foreign = is_y_chans(g["generator"])
    if is_foreign and state.h.misr_merge != "conv":
        raise UserError(f'{g_path}: from y-chan\'s port, which needs "misr_merge": "conv"')
    load_weights(state.generator, g["generator"], g_path)
    if is_foreign:
        say(f"{do_path}: from y-chan's port; the generator's optimizer starts from scratch")
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
    else:  # HiFi-GAN saves before it increments `steps`
        state.steps += 1
    state.saved_steps = state.steps


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: str | Path) -> None:
    """Loads the moments of `saved`, read from `path`, into `optimizer`.

    Learning rate, betas and other settings stay as they are, because the config decides them.

    Raises:
        UserError: the moments do not fit the parameters.
    """
    try:
        (ours,), (theirs,) = optimizer.state_dict()["param_groups"], saved["param_groups"]
        pairs = zip(optimizer.param_groups[0]["params"], theirs["params"], strict=True)
        for param, key in pairs:  # PyTorch does not check shapes and would read out of bounds
            moments = saved["state"].get(key)
            if moments is not None:
                has_momentum = isinstance(optimizer, Muon) and param.dim() > 1
                names = ("momentum",) if has_momentum else ("exp_avg", "exp_avg_sq")
                shapes = {moments[name].shape for name in names}
                if shapes != {param.shape} or not moments.get("step", 0) >= 0:
                    raise ValueError("other shapes")
        groups = [ours | {"params": theirs["params"]}]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer does not fit the config ({error})") from None


def _check_config(h: Config, path: Path) -> None:
    """Raises UserError if a run with the config at `path` cannot be resumed with `h`."""
    if not path.exists():  # HiFi-GAN's files may come without it
        return
    theirs = load_config(path)
    before, now = dataclasses.asdict(theirs), dataclasses.asdict(h)
    changed = [key for key in before if key not in CHANGEABLE_KEYS and before[key] != now[key]]
    if theirs.uses_misr != h.uses_misr:
        found = (
            "a run of a MISR, but now an MRF"
            if theirs.uses_misr
            else "a run of an MRF, but now a MISR"
        )
    elif theirs.is_frame_rate != h.is_frame_rate:
        kinds = ("with" if each.is_frame_rate else "without" for each in (theirs, h))
        found = "a run {} griffin_lim_steps, but now {}".format(*kinds)
    elif changed:
        found = f"{changed[0]} = {before[changed[0]]}, but now {now[changed[0]]}"
    else:
        return
    raise UserError(
        f"{path}: {found}: expected the same model, mel and optimizer; to start from its weights, "
        "pass --warm_start and another --checkpoint_path"
    )


def warm_start(state: State, paths: list[Path]) -> None:
    """Loads what fits from `g_*` and `do_*` files of HiFi-GAN's family, and prints what does not.

    A layer is taken if all of its tensors match in name and shape. The shared blocks of MISR are
    taken from the blocks of an MRF with the same kernel size. Optimizers start from scratch.

    Raises:
        UserError: a file cannot be read, contains no weights, or has no layer that fits.
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
                say(f"{path}: {name}: nothing taken, because the {where} has no discriminators")
                continue
            if name == "generator" and state.h.uses_misr:
                weights, note = mrf_as_misr(weights, state.h)
            taken, left = load_matching(module, to_native_names(weights, module))
            if not taken:
                raise UserError(
                    f"{path}: no layer of its {name} fits --config; use the config.json beside "
                    "that file, or start without --warm_start"
                )
            left_out = f"; not taken: {', '.join(left)}" if left else ""
            counted = f"{len(taken)} of {len(taken) + len(left)} layers taken"
            say(f"{path}: {name}: {counted}{note}{left_out}")


# ------------------------------------------------------------------------------------------- names


def checkpoint_path(folder: str | Path, prefix: str, steps: int) -> Path:
    """Returns `<folder>/<prefix>_<steps>`: g_00005000 is the generator after 5000 updates."""
    return Path(folder) / f"{prefix}_{steps:08d}"


def checkpoint_steps(folder: str | Path, prefix: str) -> list[int]:
    """Returns the steps of the checkpoints `<prefix>_*` in `folder`, in ascending order."""
    matches = (re.fullmatch(rf"{prefix}_(\d{{8,}})", name) for name in _names(folder))
    return sorted(int(match[1]) for match in matches if match)


def paired_steps(folder: str | Path) -> list[int]:
    """Returns the steps of which `folder` contains both `g_*` and `do_*`, in ascending order."""
    return sorted(set(checkpoint_steps(folder, "g")) & set(checkpoint_steps(folder, "do")))


def look_alikes(folder: str | Path) -> list[str]:
    """Returns names of renamed checkpoints such as `g_00000004.pth` and `g_00000004 (1)`."""
    alike = r"(g|do)_\d+(?!\d)(?!.*\.(onnx|wav|npy|json)$).*"
    proper = r"(g|do)_\d{8,}"
    names = [name for name in _names(folder) if re.fullmatch(alike, name)]
    return sorted(name for name in names if not re.fullmatch(proper, name))


def _names(folder: str | Path) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []
