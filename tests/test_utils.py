"""Atomic writes, lists of files, and the command line."""

import argparse
import io
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

import utils
from audio import write_npy, write_wav
from env import UsageError, UserError
from tools.toy import ROOT
from utils import (
    FileProgress,
    WriteError,
    atomic_write,
    boolean,
    command_line,
    command_parser,
    composed,
    find_file,
    find_files,
    natural,
    plan_outputs,
    positive,
)


def write_files(folder: Path, *names: str) -> None:
    """Writes files, and the folders around them, that contain their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@contextmanager
def full_disk(size: int = 1000):
    """Limits files to `size` bytes: writing fails half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --------------------------------------------------------------------------------- atomic writes


def test_a_file_appears_with_its_folders_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folders" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_old_contents_survive_an_exception(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    saved = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("new")
        assert os.umask(umask) == umask  # unchanged
    finally:
        os.umask(saved)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("name", ["a_file/out.wav", "a_file/deeper/out.wav", "a_folder"])
def test_an_unwritable_path_is_named(tmp_path, name):
    write_files(tmp_path, "a_file", "a_folder/inside")
    path = tmp_path / name
    with pytest.raises(WriteError) as error, atomic_write(path) as temporary:
        temporary.write_text("new")
    assert str(error.value).startswith(f"{path}: cannot be written")
    assert sorted(os.listdir(tmp_path)) == ["a_file", "a_folder"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_wav(path, torch.zeros(10_000), sampling_rate=22050),
        lambda path: write_npy(path, np.zeros(10_000)),
    ],
    ids=["write_wav", "write_npy"],
)
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(WriteError) as error, full_disk():
        write(path)
    assert str(error.value).startswith(f"{path}: cannot be written")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# ---------------------------------------------------------------------------------- plan_outputs


def planned(tmp_path: Path, output_dir: str = "out") -> dict[str, str]:
    """Returns the plan for the folder `in` as {input: output}, relative to `tmp_path`."""
    jobs = plan_outputs(tmp_path / "in", (".wav", ".flac"), tmp_path / output_dir, "_new.wav")
    return {str(i.relative_to(tmp_path)): str(o.relative_to(tmp_path)) for i, o in jobs}


def test_the_structure_of_a_folder_is_kept_and_other_files_are_counted(tmp_path, capsys):
    write_files(tmp_path / "in", "a.wav", "b.c.flac", "sub/a.wav", "sub/deeper/D.WAV")
    write_files(tmp_path / "in", "notes.txt", "sub/README", "wav")
    assert planned(tmp_path) == {
        "in/a.wav": "out/a_new.wav",
        "in/b.c.flac": "out/b.c_new.wav",
        "in/sub/a.wav": "out/sub/a_new.wav",
        "in/sub/deeper/D.WAV": "out/sub/deeper/D_new.wav",
    }
    assert "3 files left out" in capsys.readouterr().out


def test_one_file_is_enough(tmp_path):
    write_files(tmp_path, "sub/a.wav", "sub/b.wav")
    jobs = plan_outputs(tmp_path / "sub/a.wav", (".wav",), tmp_path / "out", "_new.wav")
    assert jobs == [(tmp_path / "sub/a.wav", tmp_path / "out/a_new.wav")]


def test_two_inputs_with_one_output_are_an_error(tmp_path):
    write_files(tmp_path / "in", "0.wav", "sub/a.flac", "sub/a.wav")
    with pytest.raises(UserError) as error:
        planned(tmp_path)
    for name in ("in/sub/a.flac", "in/sub/a.wav", "out/sub/a_new.wav"):
        assert str(tmp_path / name) in str(error.value)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    "output_dir, earlier_output",
    [
        ("in/out", "in/out/a_new.wav"),  # inside the inputs: its files are not inputs
        ("in", "in/a_new.wav"),
        (".", "a_new.wav"),  # around the inputs: they are inputs
    ],
)
def test_outputs_are_not_read_again(tmp_path, output_dir, earlier_output):
    write_files(tmp_path, "in/a.wav", earlier_output)
    assert planned(tmp_path, output_dir) == {"in/a.wav": earlier_output}


@pytest.mark.parametrize("files", [(), ("in/notes.txt",), ("in/out/a_new.wav",)])
def test_a_folder_without_inputs_is_an_error(tmp_path, files):
    (tmp_path / "in").mkdir()
    write_files(tmp_path, *files)
    with pytest.raises(UserError, match=r"in: no files with an extension of \.wav, \.flac"):
        planned(tmp_path, output_dir="in/out")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path / 'in'}: no such file or folder$"):
        planned(tmp_path)


# ---------------------------------------------------------------------- find_files and find_file


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    write_files(tmp_path, "in/a.wav", "in/real/b.wav", "elsewhere/c.wav", "elsewhere/deep/d.wav")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/twin").symlink_to("real")  # a second name of a folder is not a circle
    (tmp_path / "in/loop").symlink_to(".")
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/self").symlink_to("self")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path / "in")]
    names = ["a.wav", "link/c.wav", "link/deep/d.wav", "link/self", "real/b.wav", "twin/b.wav"]
    assert found == [f"in/{name}" for name in names]


def test_broken_links_are_files_and_pipes_are_not(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")  # reading it would wait forever
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    assert [path.name for path in find_files(tmp_path)] == ["gone.wav"]


def test_an_unreadable_folder_is_named_and_the_others_are_searched(tmp_path, monkeypatch, capsys):
    write_files(tmp_path, "a/1.wav", "b/2.wav")
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [path.name for path in find_files(tmp_path)] == ["2.wav"]
    said = f"{tmp_path / 'a'}: left out, cannot be read (Permission denied)\n"
    assert capsys.readouterr().out == said


NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "there, asked",
    [
        ("a.wav", "a"),
        ("a.WAV", "a"),
        ("a.wav", "a.wav"),
        ("a.wav.flac", "a.wav"),
        ("a.b.flac", "a.b"),
        (f"{NFD}.wav", NFC),
        (f"{NFC}.wav", NFD),
        (f"{NFD}/{NFD}.flac", f"{NFC}/{NFC}"),
        (f"{NFD}.wav", f"{NFC}.wav"),
    ],
)
def test_a_file_is_found_with_any_accents_and_without_its_extension(tmp_path, there, asked):
    write_files(tmp_path / "in", there)
    assert find_file(tmp_path / "in", asked, (".wav", ".flac")) == there
    outside = find_file(tmp_path / "out", f"{tmp_path}/in/{asked}", (".wav", ".flac"))
    assert Path(outside).read_text() == there
    assert composed(there) == composed(unicodedata.normalize("NFD", there))


@pytest.mark.parametrize("asked", ["b", "A", "a/a", NFC, "", "a.txt", "sub", "sub.wav", "/a"])
def test_another_file_is_not_found(tmp_path, asked):
    write_files(tmp_path, "a.wav", "a.txt", "sub.wav/b.flac", "e.wav", "sub/a.wav")
    assert find_file(tmp_path, asked, (".wav", ".flac")) is None


def test_the_exact_name_and_the_first_extension_are_preferred(tmp_path):
    write_files(tmp_path, "a.flac", "a.wav", "a.wav.flac", f"{NFC}.wav", f"{NFD}.wav")
    assert find_file(tmp_path, "a", (".wav", ".flac")) == "a.wav"
    assert find_file(tmp_path, "a.wav", (".wav", ".flac")) == "a.wav"
    for name in (NFC, NFD):
        assert find_file(tmp_path, name, (".wav",)) == f"{name}.wav"


# ---------------------------------------------------------------------------------- FileProgress


@pytest.mark.parametrize("bad, status", [((), 0), (("b",), 1), (("a", "b", "c"), 1)])
def test_a_bad_file_is_named_and_the_others_are_written(bad, status, capsys):
    written = []
    with FileProgress(3, "out") as progress:
        for name in "abc":
            with progress.skipping():
                if name in bad:
                    raise UserError(f"in/{name}: broken")
                written.append(name)
                progress.written()
    assert progress.status == status
    assert written == [name for name in "abc" if name not in bad]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"skipped: in/{name}: broken" for name in bad]
    skipped = f", {len(bad)} skipped" if bad else ""
    assert printed.out == f"{3 - len(bad)} files written to out{skipped}\n"


@pytest.mark.parametrize("error", [WriteError("out/b: full"), ValueError("a bug")])
def test_write_errors_and_bugs_end_the_command(error, capsys):
    with (
        pytest.raises(type(error), match=str(error)),
        FileProgress(3, "out") as progress,
        progress.skipping(),
    ):
        raise error
    assert "written" not in capsys.readouterr().out


def test_sigterm_unwinds_the_stack_and_its_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, FileProgress(1, "out"):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    "parse, word, value",
    [
        (boolean, "True", True),
        (boolean, "false", False),
        (positive, "0012", 12),
        (natural, "0", 0),
    ],
)
def test_words_of_the_command_line_are_parsed(parse, word, value):
    assert parse(word) == value


@pytest.mark.parametrize(
    "parse, word",
    [
        *((boolean, word) for word in ("", "yes", "0", "True ")),
        *((positive, word) for word in ("", "0", "-1", "1.5", "1e3", "1_0", "²")),
        *((natural, word) for word in ("-1", "one")),
    ],
)
def test_other_words_are_refused(parse, word):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(word)
    assert repr(word) in str(error.value)


def status_of(main) -> int:
    with pytest.raises(SystemExit) as end:
        command_line(main)
    return end.value.code


def test_a_script_exits_with_its_status_and_its_errors_are_one_line(capsys):
    def fail():
        raise UserError("clip.wav: broken\n  at\tframe: 7")

    assert [status_of(lambda each=each: each) for each in (0, 1, None)] == [0, 1, None]
    assert status_of(fail) == 1
    assert capsys.readouterr().err == "error: clip.wav: broken at frame: 7\n"
    assert status_of(lambda: print("caf\udce9")) is None
    assert capsys.readouterr().out == "caf\\udce9\n"


def test_any_other_error_keeps_its_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command_line(main)


class NotebookStream(io.StringIO):
    """A stream like ipykernel's, without `reconfigure` and without a file descriptor."""


@pytest.mark.parametrize("stream", [NotebookStream(), None], ids=["notebook", "service"])
def test_a_command_needs_neither_a_terminal_nor_streams(monkeypatch, stream):
    """`%run inference.py` in Jupyter and services without streams are such cases."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    utils.say("something")  # as a library may

    def main():
        with FileProgress(1, "out") as progress, progress.skipping():
            raise UserError("a: broken")
        return progress.status

    assert status_of(main) == 1
    if stream is not None:
        said = "something\nskipped: a: broken\n0 files written to out, 1 skipped\n"
        assert stream.getvalue() == said


COMMAND = """
from env import UserError
from utils import FileProgress, command_line, say
def main():
    with FileProgress(2, "out") as progress:
        for name in "ab":
            with progress.skipping():
                say(name)
                raise UserError(name)
    return progress.status
command_line(main)
"""


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&1 | true", ">/dev/full 2>/dev/full"])
def test_closed_streams_do_not_end_a_command(streams):
    """The reader has closed the pipe, or a disk is full. Status 1 is due to skipped files."""
    shell = f"{sys.executable} -c '{COMMAND}' {streams}; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr


SPAWN = """
from concurrent.futures import ProcessPoolExecutor
import multiprocessing, os, time
from utils import end_with_parent
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    command = [sys.executable, tmp_path / "spawn.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        stat_file = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert is_alive(stat_file)
        parent.kill()
    deadline = time.monotonic() + 30
    while is_alive(stat_file):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(stat_file: Path) -> bool:
    """Returns False for a process that is gone, or a zombie."""
    try:
        return stat_file.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --------------------------------------------------------------------------------- numba's cache


@pytest.fixture
def numba_folder(monkeypatch, tmp_path):
    """Returns a function that gives the cache folder of one more process, with these variables."""
    monkeypatch.setattr(utils, "_locks", [])

    def folder(**environment) -> Path:
        environment = {"HOME": str(tmp_path / "home")} | environment
        with monkeypatch.context() as patch:
            for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            utils.use_own_numba_cache.__wrapped__()
            return Path(os.environ["NUMBA_CACHE_DIR"])

    return folder


def end_processes() -> None:
    """Releases the locks, which also happens when the processes end."""
    while utils._locks:
        utils._locks.pop().close()


def test_no_two_processes_share_a_numba_cache_and_the_next_ones_find_it(numba_folder, tmp_path):
    first = numba_folder()
    assert first.parents[1] == tmp_path / "home/.cache/misrnet"
    assert f"numba-{numba.__version__}" in first.parent.name
    second = numba_folder(NUMBA_CACHE_DIR=str(first))  # inherited from the parent process
    assert second == first.with_name("1")
    end_processes()
    assert numba_folder() == first


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-9], lambda raw: bytes(len(raw)), lambda _: b""]
)
def test_a_numba_cache_with_a_truncated_file_is_emptied(numba_folder, damage):
    folder = numba_folder()
    end_processes()
    for name in ("core/whole.1.nbc", "core/damaged.nbi"):
        (folder / "core").mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(list(range(100))))
    assert (numba_folder() / "core").exists()
    end_processes()
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert numba_folder() == folder
    assert os.listdir(folder) == [".lock"]


def test_a_numba_cache_is_temporary_without_a_home_and_the_users_own_is_kept(
    numba_folder, tmp_path, monkeypatch
):
    write_files(tmp_path, "file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for home in (f"{tmp_path}/file/home", "/dev/null", "~"):  # "~": a user without a home
        assert numba_folder(HOME=home).parent == tmp_path
    assert numba_folder(NUMBA_CACHE_DIR="/mine") == Path("/mine")
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/file")
    with pytest.raises(UserError, match=r"no folder for numba's cache .*; set NUMBA_CACHE_DIR"):
        numba_folder(HOME="/dev/null")


@pytest.mark.parametrize("others", [["cp/g_2"], ["cp/g_2", "--device", "cpu"]])
def test_a_second_value_is_refused_with_the_cure(others):
    """The shell expands `--checkpoint_file cp/g_*`, if two files match."""
    parser = command_parser("", example="")
    parser.add_argument("--checkpoint_file")
    parser.add_argument("--device")
    with pytest.raises(UsageError, match=r"^cp/g_2: .* match several files\? Name one file$"):
        parser.parse_args(["--checkpoint_file", "cp/g_1", *others])
