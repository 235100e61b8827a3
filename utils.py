"""What every script shares: the command line, files that are whole or absent, jobs."""

import argparse
import atexit
import errno
import functools
import multiprocessing
import os
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
from typing import NamedTuple

import torch
from tqdm import tqdm

from distributed import computes_in_bfloat16, rank
from env import UserError, one_line


def provide_caches() -> None:
    """Gives libraries a temporary folder for their caches where their own cannot be written.

    As in a container that is read-only or has no home: there numba, which librosa uses, would not
    load, and matplotlib would complain. To be called before either is loaded.
    """
    missing = {"NUMBA_CACHE_DIR", "MPLCONFIGDIR"} - os.environ.keys()
    homes = ("XDG_CACHE_HOME", "~/.cache"), ("XDG_CONFIG_HOME", "~/.config")
    if not missing or all(_can_make(os.environ.get(k) or os.path.expanduser(d)) for k, d in homes):
        return
    try:
        folder = tempfile.mkdtemp(prefix="misrnet_")
    except OSError:  # nowhere but in memory, as under `docker run --read-only`
        folder = tempfile.mkdtemp(prefix="misrnet_", dir="/dev/shm")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(dict.fromkeys(missing, folder))


def _can_make(folder: str) -> bool:
    """Whether a folder is there and writable, or could be made."""
    while not os.path.lexists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)  # "" in the end for "~", where there is no home
    return os.path.isdir(folder) and os.access(folder, os.W_OK)


provide_caches()  # here, for whoever imports anything of this repository


def command_line(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its status.

    A UserError, and want of memory, become one line. Standard output and error may be closed, a
    service's or a notebook's.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        if str(error):  # another process of the run says it
            _write(f"error: {error}", "stderr")
        sys.exit(error.exit_status)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _write("error: out of memory; a smaller model, batch or file needs less", "stderr")
        sys.exit(UserError.exit_status)


def is_out_of_memory(error: BaseException) -> bool:
    """True where no memory was left; on CPUs that is no torch.OutOfMemoryError."""
    words = ("allocate memory", "out of memory", "enough memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def end_with_parent() -> None:
    """Lets this process end when the one that spawned it does, even by being killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_cleanly_on_sigterm() -> Callable | int:
    """Lets SIGTERM, too, unwind the stack, so that temporary files are removed.

    Returns what SIGTERM did before.
    """
    return signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def say(text: str) -> None:
    """Prints on the first process, above a progress bar."""
    if rank() > 0:
        return
    _write(text, "stdout")


def say_if_slow(precision: str, device: torch.device) -> None:
    """Says on standard error, on the first process, where "bf16" is slower than "fp32" would be."""
    if precision == "bf16" and not computes_in_bfloat16(device) and rank() == 0:
        _write("--precision bf16: slow, for this processor has no bfloat16; use fp32", "stderr")


def _write(text: str, name: str) -> None:
    """Prints to sys.stdout or sys.stderr, above a progress bar, as long as anybody reads it."""
    stream = getattr(sys, name)
    if stream is None:  # a service's
        return
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except (OSError, ValueError):  # a closed pipe, a full disk: no reason to end a run
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError):  # closed
            setattr(sys, name, os.fdopen(nowhere, "w"))


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
def temporary_beside(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary file beside `path`, to be `put` there; it is gone afterwards.

    Folders are made as needed.

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
    except OSError as error:
        kind = UserError if error.errno == errno.ENAMETOOLONG else WriteError
        raise kind(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def put(temporary: Path, path: str | Path) -> None:
    """Renames a `temporary_beside` that is written; `path` is whole, also after a power cut."""
    with open(temporary, "rb+") as written:
        os.fsync(written.fileno())
    temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
    os.replace(temporary, path)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and `put`s it there once it is written whole.

    Whatever goes wrong, `path` holds its old contents or all of the new ones.

    Raises:
        WriteError, UserError: as `temporary_beside`.
    """
    with temporary_beside(path) as temporary:
        yield temporary
        put(temporary, path)


def remove_temporary_files(folder: str | Path) -> None:
    """Removes what a killed run has left of `atomic_write` its own files in `folder`; no other's."""
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\.((g|do)_\d{8,}|config\.json)\.\w+\.tmp", path.name):
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def find_files(folder: str | Path) -> list[Path]:
    """All files in `folder`, in depth and sorted. Links are followed, but never round in circles.

    A link that leads nowhere counts as a file, for its reader to name. Folders that cannot be read
    are named and passed over.
    """
    files = []

    def search(folder: str, around: frozenset[tuple[int, int]]) -> None:
        try:
            facts = os.stat(folder)
            entries = [entry.path for entry in os.scandir(folder)]
        except OSError as error:
            say(one_line(f"{folder}: passed over, cannot be read ({error.strerror})"))
            return
        here = (facts.st_dev, facts.st_ino)
        for path in entries if here not in around else ():
            if os.path.isdir(path):
                search(path, around | {here})
            elif os.path.isfile(path) or not os.path.exists(path):
                files.append(Path(path))

    search(os.fspath(folder), frozenset())
    return sorted(files)


def find_file(folder: str | Path, name: str, extensions: tuple[str, ...]) -> str | None:
    """The file `name` in `folder`, given with or without one of `extensions`: its name as it is.

    Extensions may be in any case, and accents be composed (é) or, as on Macs, not (e and an
    accent). The first of the extensions is taken; None where there is none.
    """
    endings = (*extensions, *map(str.upper, extensions))
    if name.lower().endswith(extensions):
        endings += ("",)
    for ending in endings:
        if os.path.isfile(os.path.join(folder, name + ending)):
            return name + ending
    *parents, last = name.split("/")
    found = "/" if name.startswith("/") else ""
    for part in parents:
        names = _names(os.path.join(folder, found))
        found = os.path.join(found, names.get(_composed(part), part))
    names = _names(os.path.join(folder, found))
    files = (os.path.join(found, names.get(_composed(last + ending), "")) for ending in endings)
    return next((file for file in files if os.path.isfile(os.path.join(folder, file))), None)


@functools.lru_cache(maxsize=1000)
def _names(folder: str) -> dict[str, str]:
    """The names in a folder, by their composed form; none where it cannot be read."""
    try:
        return {_composed(name): name for name in sorted(os.listdir(folder))}
    except (OSError, ValueError):
        return {}


def _composed(name: str) -> str:
    """One form for all that differ in the composition of accents or in the extension's case."""
    stem, extension = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem) + extension.lower()


class Job(NamedTuple):
    """A file to read and the file to make of it."""

    source: Path
    output: Path


def plan_outputs(
    inputs: str | Path, extensions: tuple[str, ...], output_dir: str | Path, ending: str
) -> list[Job]:
    """Pairs each file of `inputs` with the file to make of it: `<output_dir>/<name><ending>`.

    `inputs` is one file, or a folder, which is searched in depth, links too, and whose structure is
    kept.
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
    files = find_files(inputs)
    target = output_dir.resolve()
    if target == inputs.resolve() or inputs.resolve() in target.parents:
        files = [
            f for f in files if not (f.name.endswith(ending) and target in f.resolve().parents)
        ]
    chosen = [path for path in files if path.suffix.lower() in extensions]
    if len(chosen) < len(files):
        others = len(files) - len(chosen)
        passed = f"{inputs}: {others} files passed over, none of {', '.join(extensions)}"
        say(one_line(passed))
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
        raise UserError(f"{path.parent}: a link that leads out of {folder}; choose another folder")


class FileProgress:
    """Counts the files of a command that goes on where one of them must be skipped.

        with FileProgress(len(jobs), output_dir) as tally:
            for job in jobs:
                with tally.skipping():      # a UserError inside is said, and the next file follows
                    ...
                    tally.written()
        return tally.status             # 0, or 1 where any was skipped

    A WriteError ends the command: the next file would fare no better. SIGTERM, too, unwinds the
    stack, so that temporary files are removed.
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
        """For the work on one file."""
        try:
            yield
        except WriteError:
            raise
        except UserError as error:
            self.skipped += 1
            self.bar.update()
            _write(f"skipped: {error}", "stderr")

    def written(self) -> None:
        """Counts a file that is done."""
        self.bar.update()
