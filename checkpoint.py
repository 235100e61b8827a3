"""What training owns, and how it lies on disk: `g_*`, the generator, and `do_*`, all the rest."""

import contextlib
import dataclasses
import fcntl
import os
import re
import socket
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed import max_over_processes, rank, world_size
from env import Config, UserError, load_config
from meldataset import LogMelSpectrogram, MelLoss
from models import Discriminators, Generator, modern_keys
from utils import (
    WriteError,
    replacing,
    say,
)

NEVER = 2**62
GENERATOR_KEYS = ("generator",)  # of g_* files
TRAINING_KEYS = ("mpd", "msd", "optim_g", "optim_d", "steps", "epoch")  # of do_* files
# What of its config a run may go on without. The rest is the model's and the mel's: g_* files are
# read with it, and much of it could change without a tensor's shape telling.
CHANGEABLE_KEYS = {
    *("segment_size", "batch_size", "learning_rate", "adam_b1", "adam_b2", "lr_decay", "seed"),
    *("num_workers", "lambda_mel", "lambda_feature"),
    *("fmax_for_loss", "n_ffts_for_loss", "num_mels_for_loss"),
}
MODULE_NAMES = ("generator", "mpd", "msd")  # whose weights a checkpoint holds
COUNT_NAMES = ("steps", "epoch", "epoch_step")


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
    mel_loss: MelLoss
    mel_for_loss: LogMelSpectrogram  # HiFi-GAN's, for validation whatever the loss
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
        mel_loss=MelLoss(h).to(device),
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


def save(state: State, folder: Path, keep: int) -> None:
    """Writes `do_` and `g_`, and removes `do_` files that are older than the newest `keep` pairs.

    Both are written before either gets its name, `do_` first: so a `g_` never stands without the
    `do_` of the same save.

    Raises:
        UserError: a loss or a weight is not finite, and nothing was written; or a full disk.
    """
    check_losses(state, folder)
    modules = (state.generator, state.discriminators)
    if not all(p.isfinite().all() for module in modules for p in module.parameters()):
        raise UserError(
            f"a weight is not finite at step {state.steps}; {_last_good(folder, state.steps)}"
        )
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
    generator = {"generator": state.generator.state_dict()}
    g_path, do_path = (checkpoint_path(folder, prefix, state.steps) for prefix in ("g", "do"))
    with writing_checkpoint(g_path, generator), writing_checkpoint(do_path, contents):
        # Of a run that has gone back since; after a kill it would pair with this `do_`.
        g_path.unlink(missing_ok=True)
    kept = [steps for steps in paired_steps(folder) if steps <= state.steps][-keep:]
    for steps in checkpoint_steps(folder, "do"):
        if steps < kept[0]:
            checkpoint_path(folder, "do", steps).unlink(missing_ok=True)


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


def resume(state: State, folder: Path) -> bool:
    """Continues from the newest pair of `g_` and `do_` in `folder` that can be read, if any.

    HiFi-GAN's own files will do. Damaged files are named and left alone.

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


def _check_config(h: Config, path: Path) -> None:
    """Raises UserError where a run that has the config at `path` cannot go on with `h`."""
    if not path.exists():  # files of HiFi-GAN may come alone
        return
    before, now = (dataclasses.asdict(each) for each in (load_config(path), h))
    for key, value in before.items():
        if key not in CHANGEABLE_KEYS and now[key] != value:
            raise UserError(
                f"{path}: {key} = {value}, but now {now[key]}: expected the same model and mel; to "
                "begin with its weights, pass --warm_start and another --checkpoint_path"
            )


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


@contextmanager
def writing_checkpoint(path: str | Path, contents: dict) -> Iterator[None]:
    """Writes tensors and plain types to a file that gets its name when the block ends well."""
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:  # its errors say more than torch's own
                torch.save(contents, file)
        except RuntimeError:
            raise WriteError(f"{path}: cannot be written (is the disk full?)") from None
        yield


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint into CPU memory; pickled code in it is never run.

    Raises:
        UserError: missing, damaged or unsafe file.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder; name a file in it, such as g_00005000")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if zipfile.is_zipfile(path):
            _check_uncompressed(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other versions, which load or do not
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in a dozen ways
        reason = str(error).split(". ")[0] or type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: not a checkpoint of this family, which hold a dictionary")
    for name in MODULE_NAMES:
        _check_weights(contents.get(name, {}), f"{path}: its {name}")
    for name in COUNT_NAMES:
        count = contents.get(name, 0)
        if type(count) is not int or not 0 <= count < 2**62:
            raise UserError(f"{path}: {name} = {count}: expected an integer of 0 or more")
    return contents


def _check_uncompressed(path: str | Path) -> None:
    """Raises ValueError for an archive that would grow: torch writes none, and a trap might."""
    with zipfile.ZipFile(path) as archive:
        if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
            raise ValueError("a compressed archive")


def _is_plain(value: object) -> bool:
    """True for a tensor of floating-point numbers that are really there."""
    is_dense = torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
    return is_dense and value.is_floating_point()


def _check_weights(weights: dict, owner: str) -> None:
    """Raises UserError where `weights` are no real numbers under names."""
    if not isinstance(weights, dict):
        raise UserError(f"{owner} holds no weights but one {type(weights).__name__}")
    for key, value in weights.items():
        if not isinstance(key, str) or not _is_plain(value):
            kind = value.type() if torch.is_tensor(value) else type(value).__name__
            raise UserError(f"{owner} holds {kind} as {key}; expected floating-point tensors")


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Gives `module` all of `weights`, which came from `path`.

    Raises:
        UserError: they are not this module's; the message names the first difference.
    """
    try:
        if any(p.is_meta for p in module.parameters()):  # a dry run: it has no memory to copy to
            module.load_state_dict(dict(weights), assign=True)  # torch notes this in its argument
        else:
            module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = (str(error).splitlines()[1:] or [str(error)])[0].strip()
        raise UserError(f"{path}: does not fit the config: {detail}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: str | Path) -> None:
    """Gives `optimizer` the moments of `saved`, which came from `path`.

    Learning rate, betas and the like stay as they are: they are the config's.

    Raises:
        UserError: the moments are not of these parameters.
    """
    try:
        (ours,) = optimizer.state_dict()["param_groups"]
        (theirs,) = _expect(list, _expect(dict, saved)["param_groups"])
        keys = _expect(list, _expect(dict, theirs)["params"])
        moments = _expect(dict, saved["state"])
        for param, key in zip(optimizer.param_groups[0]["params"], keys, strict=True):
            if key in moments:
                _check_moments(_expect(dict, moments[key]), param)
        groups = [ours | {"params": keys}]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer does not fit the config ({error})") from None


def _expect(kind: type, value: object):
    """`value`, which must be of `kind`; a tensor would pass for either in its own way."""
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def _check_moments(moments: dict, param: torch.Tensor) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError where they are not `param`'s."""
    for name in ("exp_avg", "exp_avg_sq"):
        if moments[name].shape != param.shape:
            raise ValueError("other shapes")
        if not _is_plain(moments[name]):
            raise ValueError(f"{name} holds no floating-point numbers")
    step = moments["step"]  # an integer in HiFi-GAN's files
    if torch.is_tensor(step):
        step = step.detach() if _is_plain(step) and step.numel() == 1 else "no number"
    if not float(step) >= 0:
        raise ValueError(f"step = {step}")


def load_matching(module: torch.nn.Module, weights: dict) -> tuple[list[str], list[str]]:
    """Gives `module` the layers of `weights` all of whose tensors match in name and shape.

    Returns:
        The names of the layers taken, and of all others of either side.
    """
    own = module.state_dict()
    layers = {
        key: re.sub(r"\.(bias|weight|parametrizations\..*)$", "", key) for key in own | weights
    }
    left = {
        layer
        for key, layer in layers.items()
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    }
    module.load_state_dict(own | {k: v for k, v in weights.items() if layers[k] not in left})
    return sorted(set(layers.values()) - left), sorted(left)


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
