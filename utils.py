"""The command line, atomic writes and lists of files, for all scripts."""

import argparse
import atexit
import errno
import fcntl
import functools
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from distributed import computes_in_bfloat16, rank
from env import UsageError, UserError, one_line

# ------------------------------------------------------------------------------- the command line


def command_line(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with the status that it returns.

    A UserError becomes one line on standard error, and so does running out of memory. Standard
    output and error may be closed or None, as in a service or a notebook.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream has no such method
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be valid UTF-8
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        if str(error):  # empty if another rank prints it
            _write(f"error: {error}", "stderr")
        sys.exit(error.exit_status)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _write("error: out of memory; use a smaller model, batch or file", "stderr")
        sys.exit(UserError.exit_status)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out. On CPUs, PyTorch raises a plain RuntimeError for that."""
    words = ("allocate memory", "out of memory", "enough memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def end_with_parent() -> None:
    """Ends this worker process when its parent ends, even if the parent is killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_cleanly_on_sigterm() -> Callable | int:
    """Makes SIGTERM unwind the stack, so that temporary files are removed.

    Returns the previous handler.
    """
    return signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def say(text: str) -> None:
    """Prints a line on the first rank, above a progress bar."""
    if rank() == 0:
        _write(text, "stdout")


def say_if_slow(precision: str, device: torch.device) -> None:
    """Warns on the first rank if bf16 is slower than fp32 on this device."""
    if precision == "bf16" and not computes_in_bfloat16(device) and rank() == 0:
        text = "--precision bf16 is slow: this processor has no bfloat16; use fp32"
        _write(text, "stderr")


def _write(text: str, name: str) -> None:
    """Prints to sys.stdout or sys.stderr, above a progress bar. Ignores a closed or full stream."""
    stream = getattr(sys, name)
    if stream is None:
        return
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except (OSError, ValueError):  # a closed pipe or a full disk must not end a run
        devnull = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(devnull, stream.fileno())
        except (OSError, ValueError):  # the stream itself is closed
            setattr(sys, name, os.fdopen(devnull, "w"))


def boolean(text: str) -> bool:
    """Parses the command-line word `True` or `False`, in any case."""
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return words[text.lower()]


def positive(text: str) -> int:
    """Parses a command-line integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, not {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Parses a command-line integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of 0 or more, not {text!r}")
    return int(text)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and appends informative defaults to help texts."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_switch = action.nargs == 0
        is_informative = not (action.required or is_switch or action.default in (None, []))
        is_named = "(default:" in action.help or action.default is argparse.SUPPRESS
        if not is_informative or is_named:
            return action.help
        default = action.default if isinstance(action.default, list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, default))})"


class _Parser(argparse.ArgumentParser):
    """Names the arguments that belong to no flag."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As in argparse. Raises UsageError for a second value, such as a second file of g_*."""
        known, others = super().parse_known_args(args, namespace)
        if others and not others[0].startswith("-"):
            raise UsageError(
                f"{' '.join(others)}: belongs to no flag, for most flags take one value; does a "
                "pattern such as g_* match several files? Name one file"
            )
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return known


def command_parser(description: str, example: str) -> argparse.ArgumentParser:
    """Returns a parser whose --help lists defaults and ends with the command line `example`."""
    return _Parser(
        description=description, epilog=f"example:\n  {example}", formatter_class=_HelpFormatter
    )


# ------------------------------------------------------------------------------------ file output


class WriteError(UserError):
    """A file cannot be written, and the next one would fail too: the disk is full, for example."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block ends.

    `path` holds its old contents or all of the new ones, also after an exception, a kill or a power
    cut. Missing folders are made.

    Raises:
        WriteError: the file cannot be written.
        UserError: its name is too long.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:50]}."  # names are limited to 255 bytes
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    except OSError as error:
        kind = UserError if error.errno == errno.ENAMETOOLONG else WriteError
        raise kind(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_temporary_files(folder: str | Path) -> None:
    """Removes the temporary files of checkpoints and config.json that a killed run left."""
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\.((g|do)_\d{8,}|config\.json)\.\w+\.tmp", path.name):
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------- numba's cache


@functools.cache
def use_own_numba_cache() -> None:
    """Gives numba a cache folder that no other process and no other version writes to.

    numba's cache is not safe for concurrent writers: a process that reads what two others wrote at
    once can crash with a segmentation fault, each time from then on. So each process locks one
    folder of ~/.cache/misrnet/<versions>/0, 1, ... for its lifetime. A folder with a truncated file
    is emptied. Without a writable home, the folder is temporary. A NUMBA_CACHE_DIR set by the
    user is kept.

    Call it before librosa or numba is used.

    Raises:
        UserError: neither the home nor a temporary folder is writable.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    root, chosen = caches / "misrnet", os.environ.get("NUMBA_CACHE_DIR")
    if chosen and root not in Path(chosen).parents:  # the parent process may have set its own
        return
    packages = [f"{name}-{importlib.metadata.version(name)}" for name in ("numba", "librosa")]
    versions = "_".join([f"python-{platform.python_version()}", *packages])
    try:
        has_home = caches.is_absolute()  # a user without one gets "~/.cache"
        folder = _lock_free_folder(root / versions) if has_home else _temporary_folder()
    except OSError:
        folder = _temporary_folder()
    os.environ["NUMBA_CACHE_DIR"] = str(folder)


_locks: list[BinaryIO] = []  # closed, and so released, when the process ends


def _lock_free_folder(parent: Path) -> Path:
    """Locks and returns the first of the folders 0, 1, ... in `parent` that is free."""
    for number in itertools.count():
        folder = parent / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "wb")  # noqa: SIM115  (held until the process ends)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _locks.append(lock)
        if not all(path.read_bytes().endswith(b".") for path in folder.rglob("*.nb[ci]")):
            for each in folder.glob("*/"):  # a pickle ends with its STOP code, "."
                shutil.rmtree(each)
        return folder


def _temporary_folder() -> Path:
    """Returns a new temporary folder, which is removed when the process ends."""
    try:
        folder = tempfile.mkdtemp(prefix="misrnet_")
    except OSError as error:
        raise UserError(
            f"no folder for numba's cache ({error.strerror}); set NUMBA_CACHE_DIR to a writable one"
        ) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# ------------------------------------------------------------------------------------- file input


def find_files(folder: str | Path) -> list[Path]:
    """Returns all files in `folder` and its subfolders, sorted.

    Links to folders are followed, except in a loop. A broken link counts as a file, so that an
    error names it later. Folders that cannot be read are named and left out.
    """
    files = []

    def search(folder: str, parents: frozenset[tuple[int, int]]) -> None:
        try:
            status = os.stat(folder)
            entries = [entry.path for entry in os.scandir(folder)]
        except OSError as error:
            say(one_line(f"{folder}: left out, cannot be read ({error.strerror})"))
            return
        here = (status.st_dev, status.st_ino)
        for path in entries if here not in parents else ():
            if os.path.isdir(path):
                search(path, parents | {here})
            elif os.path.isfile(path) or not os.path.exists(path):
                files.append(Path(path))

    search(os.fspath(folder), frozenset())
    return sorted(files)


def find_file(folder: str | Path, name: str, extensions: tuple[str, ...]) -> str | None:
    """Returns the name of the file `name` in `folder`, or None if there is none.

    `name` may lack its extension, which is one of `extensions` in lower or upper case; the first
    that exists is taken. Accents may be composed (NFC) or decomposed (NFD, as on Macs).
    """
    endings = (*extensions, *map(str.upper, extensions))
    if name.lower().endswith(extensions):
        endings = ("", *endings)
    spellings = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    names = (f"{spelling}{ending}" for spelling in spellings for ending in endings)
    return next((each for each in names if os.path.isfile(os.path.join(folder, each))), None)


def composed(name: str) -> str:
    """Returns `name` with composed accents (NFC), for comparing names of files."""
    return unicodedata.normalize("NFC", name)


# ------------------------------------------------------------------------------------------- jobs


class Job(NamedTuple):
    """A file to read and the file to write."""

    source: Path
    output: Path


def plan_outputs(
    inputs: str | Path, extensions: tuple[str, ...], output_dir: str | Path, ending: str
) -> list[Job]:
    """Pairs each file of `inputs` with an output, `<output_dir>/<subfolders>/<name><ending>`.

    `inputs` is one file, or a folder, which is searched with its subfolders. Files with other
    extensions are counted and left out, and so are outputs of an earlier run.

    Raises:
        UserError: there are no files, two have the same output, or a link leads out of
            `output_dir`.
    """
    inputs, output_dir = Path(inputs), Path(output_dir)
    if os.path.isfile(inputs):  # Path.is_file raises an error for a name that is too long
        return [Job(inputs, output_dir / f"{inputs.stem}{ending}")]
    if not os.path.isdir(inputs):
        raise UserError(f"{inputs}: no such file or folder")
    sources = {}
    for source in _input_files(inputs, extensions, output_dir, ending):
        output = output_dir / source.relative_to(inputs).with_name(f"{source.stem}{ending}")
        if output in sources:
            raise UserError(f"{sources[output]} and {source} would both be written to {output}")
        check_inside(output_dir, output)
        sources[output] = source
    return [Job(source, output) for output, source in sources.items()]


def _input_files(
    inputs: Path, extensions: tuple[str, ...], output_dir: Path, ending: str
) -> list[Path]:
    """Returns the files of the folder `inputs` to read. Raises UserError if there are none."""
    files = find_files(inputs)
    target = output_dir.resolve()
    if target == inputs.resolve() or inputs.resolve() in target.parents:
        files = [
            f for f in files if not (f.name.endswith(ending) and target in f.resolve().parents)
        ]
    chosen = [path for path in files if path.suffix.lower() in extensions]
    if len(chosen) < len(files):
        others = f"{len(files) - len(chosen)} files left out, none of {', '.join(extensions)}"
        say(one_line(f"{inputs}: {others}"))
    if not chosen:
        raise UserError(f"{inputs}: no files with an extension of {', '.join(extensions)}")
    return chosen


def check_inside(folder: Path, path: Path) -> None:
    """Raises UserError if a link in `folder` makes `path` lie outside of it."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path.parent}: a link that leads out of {folder}; choose another folder")


class FileProgress:
    """The progress of a command that processes files and skips those that raise a UserError.

        with FileProgress(len(jobs), output_dir) as progress:
            for job in jobs:
                with progress.skipping():    # a UserError inside is printed; the loop continues
                    ...
                    progress.written()
        return progress.status    # 0, or 1 if a file was skipped

    A WriteError ends the command, because the next file would fail too. SIGTERM unwinds the stack,
    so that temporary files are removed.
    """

    def __init__(self, files: int, folder: str | Path):
        self.files, self.folder, self.skipped = files, folder, 0

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if self.skipped else 0

    def __enter__(self) -> "FileProgress":
        self.on_sigterm = end_cleanly_on_sigterm()
        self.bar = tqdm(total=self.files, unit="file", disable=None)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.bar.close()
        signal.signal(signal.SIGTERM, self.on_sigterm)
        if kind is None:
            skipped = f", {self.skipped} skipped" if self.skipped else ""
            say(one_line(f"{self.files - self.skipped} files written to {self.folder}{skipped}"))

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Prints a UserError raised while one file is processed, and counts the file as skipped."""
        try:
            yield
        except WriteError:
            raise
        except UserError as error:
            self.skipped += 1
            self.bar.update()
            _write(f"skipped: {error}", "stderr")

    def written(self) -> None:
        """Counts a file as written."""
        self.bar.update()
