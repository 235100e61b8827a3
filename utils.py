"""What every script shares: files in and out, checkpoints, pictures and the command line."""

import argparse
import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import warnings
import wave
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from env import UserError, one_line, rank

MODULE_NAMES = ("generator", "mpd", "msd")  # whose weights a checkpoint holds
COUNT_NAMES = ("steps", "epoch", "epoch_step")
PCM16_MAX = 32767
PICTURED_LOG_MELS = (-11.5, 2.0)  # one scale, so that pictures compare: silence to loud speech


def command_line(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its status.

    A UserError, and want of memory, become one line.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files may be no text
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory; a smaller model, batch or file needs less", file=sys.stderr)
        sys.exit(UserError.exit_status)


def is_out_of_memory(error: BaseException) -> bool:
    """True where no memory was left; on CPUs that is no torch.OutOfMemoryError."""
    words = ("allocate memory", "out of memory", "enough memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def end_with_parent() -> None:
    """Lets this process end when the one that spawned it does, were it killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_cleanly_on_sigterm() -> None:
    """Lets SIGTERM, too, unwind the stack, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def say(text: str) -> None:
    """Prints on the first process, above a progress bar."""
    if rank() > 0:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:  # a closed pipe or, to a file, a full disk: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


class WriteError(UserError):
    """A file cannot be written: the disk is full, say, and the next file would fare no better."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and names the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_switch = action.nargs == 0
        says_something = not (action.required or is_switch or action.default in (None, []))
        is_named = "(default:" in action.help or action.default is argparse.SUPPRESS
        if not says_something or is_named:
            return action.help
        default = action.default if isinstance(action.default, list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, default))})"


def command_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose --help names defaults and ends with `example`, ready to be copied."""
    return argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=_HelpFormatter
    )


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` once it is written whole.

    Whatever goes wrong, `path` holds its old contents or all of the new ones, also after a power
    cut. Folders are made as needed.

    Raises:
        WriteError: the file cannot be written.
        UserError: its name is too long.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:50]}."  # a name of 255 bytes leaves no room for more
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    except OSError as error:
        kind = UserError if error.errno == errno.ENAMETOOLONG else WriteError
        raise kind(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: str | Path) -> None:
    """Removes what a killed run has left of `replacing` its own files in `folder`; no other's."""
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\.((g|do)_\d{8,}|config\.json)\.\w+\.tmp", path.name):
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
        UserError: nothing to do, two inputs that would make the same output, or one that would be
            written elsewhere, through a link.
    """
    inputs, output_dir = Path(inputs), Path(output_dir)
    if os.path.isfile(inputs):  # Path.is_file raises where a name is too long
        return [Job(inputs, output_dir / f"{inputs.stem}{ending}")]
    if not os.path.isdir(inputs):
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
        passed = f"{inputs}: {others} files passed over, none of {', '.join(extensions)}"
        print(one_line(passed))
    if not chosen:
        raise UserError(f"{inputs}: no files with an extension of {', '.join(extensions)}")
    makers = {}
    for path in chosen:
        output = output_dir / path.relative_to(inputs).with_name(f"{path.stem}{ending}")
        if output in makers:
            raise UserError(f"{makers[output]} and {path} would both be written to {output}")
        check_inside(output_dir, output)
        makers[output] = path
    return [Job(path, output) for output, path in makers.items()]


def check_inside(folder: Path, path: Path) -> None:
    """Raises UserError where a link in `folder` would let `path` be written outside of it."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path.parent}: a link that leads out of {folder}; remove it")


def process_files(
    batches: list[list[Job]], process: Callable[[list[Job]], Iterator[UserError]]
) -> int:
    """Calls `process(batch)`, which yields the errors of the files it must skip, for each batch.

    Returns the exit status: 0, or 1 where any was skipped.

    Raises:
        WriteError: one of the errors.
    """
    end_cleanly_on_sigterm()
    files = sum(len(batch) for batch in batches)
    failures = 0
    with tqdm(total=files, unit="file", disable=None) as bar:
        for batch in batches:
            for error in process(batch):
                if isinstance(error, WriteError):
                    raise error
                failures += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            bar.update(len(batch))
    print(f"{files - failures} files written" + (f", {failures} skipped" if failures else ""))
    return 1 if failures else 0


def write_wav(path: str | Path, pieces: Iterable[torch.Tensor], sampling_rate: int) -> None:
    """Writes a waveform, as its pieces [N] come, as PCM 16, clamped: +1.0 is 32767, never wraps.

    Raises:
        UserError: NaN or infinity in it.
        WriteError: the file cannot be written.
    """
    # Not with soundfile, to which a full disk is a "System error".
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setparams((1, 2, sampling_rate, 0, "NONE", ""))
        for piece in pieces:
            file.writeframesraw(_pcm16(piece, path).tobytes())


def _pcm16(wav: torch.Tensor, path: str | Path) -> np.ndarray:
    if not wav.isfinite().all():
        raise UserError(f"{path}: not written, the waveform is not finite; is the checkpoint good?")
    pcm = (wav.detach().cpu().float().clamp(-1, 1) * PCM16_MAX).round()
    return pcm.to(torch.int16).numpy()


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes one array as a .npy file."""
    buffer = io.BytesIO()  # into a file, numpy overlooks a disk that fills at the very end
    np.save(buffer, array)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


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
