"""The command line, files that are whole or absent, jobs: nothing is lost, errors name the file."""

import argparse
import io
import os
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

import numpy as np
import pytest
import torch

import utils
from audio import write_npy, write_wav
from env import UserError
from tools.toy import ROOT
from utils import (
    FileProgress,
    WriteError,
    atomic_write,
    boolean,
    command_line,
    find_file,
    find_files,
    plan_outputs,
    positive,
)


def write_files(folder: Path, *names: str) -> None:
    """Makes files, and the folders they lie in, that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@contextmanager
def full_disk(size: int = 1000):
    """Lets no file grow past `size` bytes: writing fails half way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- Whole files or none


def test_replacing_writes_the_file_and_its_folders(tmp_path):
    path = tmp_path / "new" / "folders" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_old_contents_survive_an_exception_half_way(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    saved = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("new")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(saved)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("place", ["a_file/out.wav", "a_file/deeper/out.wav", "a_folder"])
def test_an_unwritable_place_is_named(tmp_path, place):
    write_files(tmp_path, "a_file", "a_folder/inside")
    path = tmp_path / place
    with pytest.raises(UserError) as error, atomic_write(path) as temporary:
        temporary.write_text("new")
    assert str(error.value).startswith(f"{path}: cannot be written")
    assert sorted(os.listdir(tmp_path)) == ["a_file", "a_folder"]


WRITERS = {
    "write_wav": lambda path: write_wav(path, torch.zeros(10_000), sampling_rate=22050),
    "write_npy": lambda path: write_npy(path, np.zeros(10_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, writer):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError) as error, full_disk():
        WRITERS[writer](path)
    assert str(error.value).startswith(f"{path}: cannot be written")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# --- Which files to make


def planned(tmp_path: Path, output_dir: str = "out") -> dict[str, str]:
    """The plan for the folder `in` as {input: output}, relative to `tmp_path`."""
    jobs = plan_outputs(tmp_path / "in", (".wav", ".flac"), tmp_path / output_dir, "_new.wav")
    return {str(i.relative_to(tmp_path)): str(o.relative_to(tmp_path)) for i, o in jobs}


def test_the_structure_of_a_folder_is_kept(tmp_path):
    write_files(tmp_path / "in", "a.wav", "b.c.flac", "sub/a.wav", "sub/deeper/D.WAV")
    assert planned(tmp_path) == {
        "in/a.wav": "out/a_new.wav",
        "in/b.c.flac": "out/b.c_new.wav",
        "in/sub/a.wav": "out/sub/a_new.wav",
        "in/sub/deeper/D.WAV": "out/sub/deeper/D_new.wav",
    }


def test_one_file_is_enough(tmp_path):
    write_files(tmp_path, "sub/a.wav", "sub/b.wav")
    jobs = plan_outputs(tmp_path / "sub/a.wav", (".wav",), tmp_path / "out", "_new.wav")
    assert jobs == [(tmp_path / "sub/a.wav", tmp_path / "out/a_new.wav")]


def test_other_files_are_counted_and_passed_over(tmp_path, capsys):
    write_files(tmp_path / "in", "a.wav", "notes.txt", "sub/README", "wav")
    assert list(planned(tmp_path)) == ["in/a.wav"]
    assert "3 files passed over" in capsys.readouterr().out


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
        ("in/out", "in/out/a_new.wav"),  # inside the inputs: what it holds is no input
        ("out", "out/a_new.wav"),
        (".", "a_new.wav"),  # around the inputs: they are inputs all the same
    ],
)
def test_outputs_are_not_read_again(tmp_path, output_dir, earlier_output):
    write_files(tmp_path, "in/a.wav", earlier_output)
    assert planned(tmp_path, output_dir) == {"in/a.wav": earlier_output}


def test_a_folder_may_be_its_own_output(tmp_path):
    write_files(tmp_path, "in/a.wav")
    assert planned(tmp_path, output_dir="in") == {"in/a.wav": "in/a_new.wav"}


@pytest.mark.parametrize("files", [(), ("in/notes.txt",), ("in/out/a_new.wav",)])
def test_nothing_to_do_is_an_error(tmp_path, files):
    (tmp_path / "in").mkdir()
    write_files(tmp_path, *files)
    with pytest.raises(UserError, match=r"in: no files with an extension of \.wav, \.flac"):
        planned(tmp_path, output_dir="in/out")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        planned(tmp_path)
    assert str(error.value) == f"{tmp_path / 'in'}: no such file or folder"


# --- What lies in a folder


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    write_files(tmp_path, "in/a.wav", "in/real/b.wav", "elsewhere/c.wav", "elsewhere/deep/d.wav")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/twin").symlink_to("real")  # a second name of one folder is no loop
    (tmp_path / "in/loop").symlink_to(".")
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/self").symlink_to("self")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path / "in")]
    names = ["a.wav", "link/c.wav", "link/deep/d.wav", "link/self", "real/b.wav", "twin/b.wav"]
    assert found == [f"in/{name}" for name in names]


def test_a_folder_may_itself_be_a_link(tmp_path):
    write_files(tmp_path, "real/sub/a.wav")
    (tmp_path / "in").symlink_to("real")
    assert list(planned(tmp_path)) == ["in/sub/a.wav"]


def test_what_is_no_file_is_left_out_but_a_link_to_nothing_is_not(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")  # to read it would wait for ever
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    assert [path.name for path in find_files(tmp_path)] == ["gone.wav"]


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_searched(
    tmp_path, monkeypatch, capsys
):
    write_files(tmp_path, "a/1.wav", "b/2.wav")
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [path.name for path in find_files(tmp_path)] == ["2.wav"]
    said = f"{tmp_path / 'a'}: passed over, cannot be read (Permission denied)\n"
    assert capsys.readouterr().out == said


NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "there, asked",
    [
        ("a.wav", "a"),
        ("a.WAV", "a"),
        ("a.Wav", "a"),
        ("a.wAV", "a"),
        ("a.Wav", "a.wav"),
        ("a.wav", "a.wav"),
        ("a.wav.flac", "a.wav"),
        ("a.flac", "a"),
        ("a.b.Wav", "a.b"),
        (f"{NFD}.wav", NFC),
        (f"{NFC}.wav", NFD),
        (f"{NFD}.Flac", NFC),
        (f"{NFD}.wav", f"{NFC}.wav"),
        (f"{NFD}/x/{NFC}.wav", f"{NFC}/x/{NFD}"),
        (f"{NFD}/a.wav", f"./{NFC}/../{NFC}/a"),
    ],
)
def test_a_file_is_found_however_accents_and_extensions_are_written(tmp_path, there, asked):
    write_files(tmp_path / "in", there)
    found = find_file(tmp_path / "in", asked, (".wav", ".flac"))
    assert (tmp_path / "in" / found).read_text() == there
    outside = find_file(tmp_path / "out", f"{tmp_path}/in/{asked}", (".wav", ".flac"))
    assert Path(outside).read_text() == there


@pytest.mark.parametrize("asked", ["b", "A", "a/a", f"{NFC}", "", "a.txt", "sub", "sub.wav", "/a"])
def test_another_file_is_not_found(tmp_path, asked):
    write_files(tmp_path, "a.Wav", "a.txt", "sub.wav/b.flac", "e.wav", "sub/a.wav")
    assert find_file(tmp_path, asked, (".wav", ".flac")) is None


def test_the_first_extension_is_taken_and_the_very_name_before_its_likes(tmp_path):
    write_files(tmp_path, "a.flac", "a.WAV", "a.Wav", f"{NFC}.wav", f"{NFD}.wav")
    assert find_file(tmp_path, "a", (".wav", ".flac")) == "a.flac"  # as it always was
    assert [find_file(tmp_path, name, (".wav",)) for name in (NFC, NFD)] == [
        f"{NFC}.wav",
        f"{NFD}.wav",
    ]


# --- Counting


@pytest.mark.parametrize("bad, status", [((), 0), (("b",), 1), (("a", "b", "c"), 1)])
def test_a_bad_file_is_named_and_the_others_are_done(bad, status, capsys):
    done = []
    with FileProgress(3, "out") as tally:
        for name in "abc":
            with tally.skipping():
                if name in bad:
                    raise UserError(f"in/{name}: broken")
                done.append(name)
                tally.written()
    assert tally.status == status
    assert done == [name for name in "abc" if name not in bad]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"skipped: in/{name}: broken" for name in bad]
    skipped = f", {len(bad)} skipped" if bad else ""
    assert printed.out == f"{3 - len(bad)} files written to out{skipped}\n"


@pytest.mark.parametrize("error", [WriteError("out/b: full"), ValueError("a bug")])
def test_what_the_next_file_would_meet_too_ends_the_command(error, capsys):
    with (
        pytest.raises(type(error), match=str(error)),
        FileProgress(3, "out") as tally,
        tally.skipping(),
    ):
        raise error
    assert "written" not in capsys.readouterr().out


def test_sigterm_unwinds_the_stack_while_files_are_made_and_then_is_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, FileProgress(1, "out"):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


# --- The command line


@pytest.mark.parametrize(
    "parse, word, value",
    [
        (boolean, "True", True),
        (boolean, "false", False),
        (boolean, "FALSE", False),
        (positive, "1", 1),
        (positive, "0012", 12),
    ],
)
def test_words_of_the_command_line(parse, word, value):
    assert parse(word) is value


@pytest.mark.parametrize(
    "parse, word",
    [
        *((boolean, word) for word in ("", "yes", "0", "1", "None", "True ")),
        *((positive, word) for word in ("", "0", "-1", "+1", "1.5", "1e3", "two", "1_0", "²")),
    ],
)
def test_other_words_are_refused(parse, word):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(word)
    assert repr(word) in str(error.value)


@pytest.mark.parametrize("status", [0, 1, None])
def test_a_script_exits_with_its_status(status):
    with pytest.raises(SystemExit) as end:
        command_line(lambda: status)
    assert end.value.code == status


def test_an_error_of_the_user_is_one_line(capsys):
    def main():
        raise UserError("clip.wav: broken\n  at\tframe: 7")

    with pytest.raises(SystemExit) as end:
        command_line(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: clip.wav: broken at frame: 7\n"


def test_any_other_error_keeps_its_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command_line(main)


class NotebookStream(io.StringIO):
    """As ipykernel's: neither `reconfigure` nor, for a part of them, a file descriptor."""


@pytest.mark.parametrize("stream", [NotebookStream(), None], ids=["notebook", "service"])
def test_a_command_needs_no_terminal_and_no_streams(monkeypatch, stream):
    """`%run inference.py` in Jupyter; a service that was started without streams."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)

    def main():
        with FileProgress(1, "out") as tally, tally.skipping():
            raise UserError("a: broken")
        return tally.status

    with pytest.raises(SystemExit) as end:
        command_line(main)
    assert end.value.code == 1
    if stream is not None:
        assert stream.getvalue() == "skipped: a: broken\n0 files written to out, 1 skipped\n"


def test_a_library_call_may_have_something_to_say_in_a_service(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    utils.say("something")


COMMAND = """
from env import UserError
from utils import FileProgress, command_line, say
def main():
    with FileProgress(2, "out") as tally:
        for name in "ab":
            with tally.skipping():
                say(name)
                raise UserError(name)
    return tally.status
command_line(main)
"""


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&1 | true", ">/dev/full 2>/dev/full"])
def test_closed_streams_and_readers_that_leave_do_not_end_a_command(streams):
    """A pipe's reader has left, a disk is full: status 1 is that of the skipped files."""
    shell = f"{sys.executable} -c '{COMMAND}' {streams}; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr


NO_HOME = """
import os, sys, utils
import librosa.filters, matplotlib.figure, matplotlib.font_manager
librosa.filters.mel(sr=22050, n_fft=512, n_mels=10)
print({os.environ.get(name) for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR")}.pop())
"""


def test_caches_have_a_place_where_there_is_no_home(tmp_path):
    """Numba would refuse to load, were librosa's own folder not writable either."""
    write_files(tmp_path, "file")
    homes = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), f"{tmp_path}/file/home")
    environment = homes | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NO_HOME]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{tmp_path}/misrnet_")
    assert os.listdir(tmp_path) == ["file"]  # and it is gone


@pytest.mark.parametrize("home", ["~", "/dev/null/x"])  # "~": a user without a home
def test_caches_are_moved_from_where_none_can_be_made(tmp_path, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"MPLCONFIGDIR": "kept"})
    os.environ.pop("NUMBA_CACHE_DIR", None)
    utils.provide_caches()
    assert (os.environ["NUMBA_CACHE_DIR"], os.environ["MPLCONFIGDIR"]) == (str(tmp_path), "kept")


def test_caches_stay_where_they_are_where_there_is_a_home(tmp_path, monkeypatch):
    for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "yet/to/be/made"))
    utils.provide_caches()
    assert "NUMBA_CACHE_DIR" not in os.environ


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
    """False for a process that is gone, or dead and not yet asked how it ended."""
    try:
        return stat_file.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
