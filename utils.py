"""What every script shares: files in and out, checkpoints, pictures and the command line."""

import argparse
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from env import UserError, rank

PCM16_MAX = 32767
PICTURED_LOG_MELS = (-11.5, 2.0)  # one scale, so that pictures compare: silence to loud speech


def command_line(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its status; a UserError becomes one line."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        # An error from a data worker arrives with the worker's traceback before it.
        message = str(error).rsplit("UserError: ", 1)[-1]
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(error.exit_status)


def say(text: str) -> None:
    """Prints on the first process, above a progress bar."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def boolean(text: str) -> bool:
    """The command-line word `True` or `False`, in any case."""
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return words[text.lower()]


def positive(text: str) -> int:
    """A command-line integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, not {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A command-line integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of 0 or more, not {text!r}")
    return int(text)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` once it is written whole.

    Whatever goes wrong, `path` holds its old contents or all of the new ones, also after a power
    cut. Folders are made as needed.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: str | Path) -> None:
    """Removes what a killed process has left of `replacing` checkpoints in `folder`."""
    for pattern in (".g_*.tmp", ".do_*.tmp"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Job(NamedTuple):
    """A file to read and the file to make of it."""

    source: Path
    output: Path


def plan_outputs(
    inputs: str | Path, extensions: tuple[str, ...], output_dir: str | Path, ending: str
) -> list[Job]:
    """Pairs each file of `inputs` with the file to make of it: `<output_dir>/<name><ending>`.

    `inputs` is one file, or a folder, which is searched in depth and whose structure is kept.
    Files with other extensions are counted and passed over, and so is what an earlier run has
    written to an `output_dir` inside `inputs`.

    Raises:
        UserError: nothing to do, or two inputs that would make the same output.
    """
    inputs, output_dir = Path(inputs), Path(output_dir)
    if inputs.is_file():
        return [Job(inputs, output_dir / f"{inputs.stem}{ending}")]
    if not inputs.is_dir():
        raise UserError(f"{inputs}: no such file or folder")
    files = sorted(path for path in inputs.rglob("*") if path.is_file())
    target = output_dir.resolve()
    if target == inputs.resolve() or inputs.resolve() in target.parents:
        files = [
            f for f in files if not (f.name.endswith(ending) and target in f.resolve().parents)
        ]
    chosen = [path for path in files if path.suffix.lower() in extensions]
    if len(chosen) < len(files):
        others = len(files) - len(chosen)
        print(f"{inputs}: {others} files passed over, none of {', '.join(extensions)}")
    if not chosen:
        raise UserError(f"{inputs}: no files with an extension of {', '.join(extensions)}")
    makers = {}
    for path in chosen:
        output = output_dir / path.relative_to(inputs).with_name(f"{path.stem}{ending}")
        if output in makers:
            raise UserError(f"{makers[output]} and {path} would both be written to {output}")
        makers[output] = path
    return [Job(path, output) for output, path in makers.items()]


def process_files(
    batches: list[list[Job]], process: Callable[[list[Job]], Iterator[UserError]]
) -> int:
    """Calls `process(batch)`, which yields the errors of the files it must skip, for each batch.

    Returns the exit status: 0, or 1 where any was skipped.
    """
    files = sum(len(batch) for batch in batches)
    failures = 0
    with tqdm(total=files, unit="file", disable=None) as bar:
        for batch in batches:
            for error in process(batch):
                failures += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            bar.update(len(batch))
    print(f"{files - failures} files written" + (f", {failures} skipped" if failures else ""))
    return 1 if failures else 0


def write_wav(path: str | Path, pieces: Iterable[torch.Tensor], sampling_rate: int) -> None:
    """Writes a waveform, as its pieces [N] come, as PCM 16, clamped: +1.0 is 32767, never wraps.

    Raises:
        UserError: NaN or infinity in it, or the file cannot be written.
    """
    with replacing(path) as temporary:
        try:
            with soundfile.SoundFile(
                temporary, "w", sampling_rate, channels=1, subtype="PCM_16", format="WAV"
            ) as file:
                for piece in pieces:
                    file.write(_pcm16(piece, path))
        except soundfile.SoundFileError as error:  # how it reports a full disk
            raise UserError(f"{path}: cannot be written ({error})") from None


def _pcm16(wav: torch.Tensor, path: str | Path) -> np.ndarray:
    if not wav.isfinite().all():
        raise UserError(f"{path}: not written, the waveform is not finite; is the checkpoint good?")
    pcm = (wav.detach().cpu().float().clamp(-1, 1) * PCM16_MAX).round()
    return pcm.to(torch.int16).numpy()


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes one array as a .npy file."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def plot_spectrogram(mel: np.ndarray, hop_seconds: float) -> Figure:
    """A picture of a log-mel [num_mels, T] whose frames are `hop_seconds` apart."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.add_subplot()
    seconds = mel.shape[1] * hop_seconds
    image = axes.imshow(
        mel,
        aspect="auto",
        origin="lower",
        interpolation="none",
        vmin=PICTURED_LOG_MELS[0],
        vmax=PICTURED_LOG_MELS[1],
        extent=(0, seconds, 0, mel.shape[0]),
    )
    axes.set(xlabel="time (s)", ylabel="mel band")
    figure.colorbar(image, ax=axes, label="log magnitude")
    return figure


def save_checkpoint(path: str | Path, contents: dict) -> None:
    """Writes tensors and plain types, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(contents, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise UserError(f"{path}: cannot be written ({error})") from None


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint into CPU memory; pickled code in it is never run.

    Raises:
        UserError: missing, damaged or unsafe file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in a dozen ways
        reason = str(error).split(". ")[0] or type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: not a checkpoint of this family, which hold a dictionary")
    return contents


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Gives `module` all of `weights`, which came from `path`.

    Raises:
        UserError: they are not this module's; the message names the first difference.
    """
    try:
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
        (ours,), (theirs,) = optimizer.state_dict()["param_groups"], saved["param_groups"]
        moments = saved["state"]
        for param, key in zip(optimizer.param_groups[0]["params"], theirs["params"], strict=True):
            if key in moments and moments[key]["exp_avg"].shape != param.shape:
                raise ValueError("other shapes")
        groups = [ours | {"params": theirs["params"]}]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer does not fit the config ({error})") from None


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
