"""The loop of a run: signals, data workers and the places they need; nothing is lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loop
import meldataset
import train
from checkpoint import build_state, paired_steps
from env import UserError
from loop import Stopped, StopRequest, find_temporary_folder, next_batch, validate
from tools.stress import kill
from tools.stress.kill import wait_for
from tools.toy import ROOT, corpus_arguments, run_main, toy_config, write_config

WAITS = 1000  # seconds, for a clip of a disk that hangs
PATIENCE = 60  # seconds on a busy machine, for what takes a few
AT_ONCE = 15  # seconds there, for what takes one


@pytest.fixture
def arguments(corpus, tmp_path) -> list:
    """Of a trainer without end, 2 steps an epoch, whose config has the `changes`."""

    def arguments(**changes) -> list:
        config = write_config(tmp_path / "config.json", **changes)
        flags = ("--config", config, "--checkpoint_path", tmp_path / "cp", "--stdout_interval", 1)
        return [*corpus_arguments(corpus), *flags]

    return arguments


@pytest.fixture(autouse=True)
def _own_handlers():
    """Of signals: in the process of the tests they are its own again afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def hang_in_the_second_epoch() -> None:
    """Lets each clip of the second epoch take WAITS seconds."""
    load = meldataset.MelDataset.__getitem__

    def hanging(self, key):
        if key[0] == 1:
            time.sleep(WAITS)
        return load(self, key)

    meldataset.MelDataset.__getitem__ = hanging


def hang_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hang_in_the_second_epoch()


@pytest.fixture
def start():
    """kill.start, of processes that do not outlive the test, should it fail."""
    started = []

    def start(*arguments):
        started.append(kill.start(*arguments))
        return started[-1]

    yield start
    for process in started:
        if process.is_alive():
            for pid in (*workers_of(process), process.pid):
                os.kill(pid, signal.SIGKILL)


def workers_of(process) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


# ----------------------------------------------------------------------------------- stop signals


@pytest.mark.parametrize(
    ("num_workers", "prepare", "ignored", "number"),
    [
        (0, hang_under_nohup, signal.SIGHUP, signal.SIGTERM),
        (1, hang_in_the_second_epoch, None, signal.SIGHUP),
        (1, hang_in_the_second_epoch, None, signal.SIGINT),
    ],
)
def test_one_signal_is_heard_while_waiting_for_data(
    start, arguments, tmp_path, num_workers, prepare, ignored, number
):
    """Also where the whole group of processes gets it, and SIGINT the data workers by name."""
    log = tmp_path / "log"
    process = start(arguments(num_workers=num_workers), log, prepare)
    wait_for("Steps : 2,", log, process)
    if ignored is not None:
        os.kill(process.pid, ignored)
        time.sleep(0.5)
        assert process.is_alive()
    workers = workers_of(process)
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    os.killpg(process.pid, number)
    process.join(AT_ONCE)
    assert process.exitcode == 128 + number, log.read_text()
    assert paired_steps(tmp_path / "cp") == [2]
    output = log.read_text()
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 2, saved in {tmp_path / 'cp'}\n" in output
    assert "Traceback" not in output
    assert len(workers) == num_workers
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, Path(f"/proc/{workers[0]}/status").read_text()
        time.sleep(0.1)


def test_a_signal_in_an_update_is_heard_at_its_end(arguments, tmp_path, monkeypatch):
    update = train.training_step

    def interrupted(state, mel, wav):
        if state.steps == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(state, mel, wav)

    monkeypatch.setattr(train, "training_step", interrupted)
    assert run_main(train, *arguments()) == 143
    assert paired_steps(tmp_path / "cp") == [2]


def test_a_signal_in_validation_is_heard_after_its_clip(corpus, tmp_path):
    h = toy_config(tmp_path)
    state, request = build_state(h, torch.device("cpu")), StopRequest()
    clips = meldataset.MelDataset(h, corpus / "validation.txt", corpus / "wavs")

    class Watcher(list):
        def clip(self, _steps, index, **_):
            self.append(index)
            os.kill(os.getpid(), signal.SIGINT)

    watcher = Watcher()
    with pytest.raises(Stopped) as stopped:
        validate(state, clips, watcher, request)
    assert (watcher, stopped.value.status) == ([0], 130)
    assert state.generator.training


def test_a_stop_does_not_wait_for_workers(tmp_path, capsys):
    """PyTorch would wait, at the end of the process, for 5 seconds for each."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=time.sleep, args=(WAITS,), daemon=True)
    worker.start()
    assert loop.end(SimpleNamespace(steps=7), tmp_path, Stopped(143)) == 143
    worker.join(AT_ONCE)
    assert worker.exitcode == -signal.SIGTERM
    assert capsys.readouterr().out == f"stopped by SIGTERM after step 7, saved in {tmp_path}\n"


def test_a_second_signal_kills():
    request = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.status == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---------------------------------------------------------------------------------- data workers


def the_error(output: str) -> str:
    """The one line by which a run ends, and no traceback beside it."""
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def test_a_killed_worker_is_one_line_and_loses_nothing(start, arguments, tmp_path):
    """As the system kills where memory runs out."""
    log = tmp_path / "log"
    process = start(arguments(num_workers=2), log, hang_in_the_second_epoch)
    wait_for("Steps : 2,", log, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    process.join(PATIENCE)
    assert process.exitcode == 1
    line = the_error(log.read_text())
    assert all(word in line for word in ("killed", "memory", "/dev/shm", "num_workers"))
    assert paired_steps(tmp_path / "cp") == [2]


def in_a_namespace(code: str, *arguments) -> subprocess.CompletedProcess:
    """Python code of a process that may mount, with these arguments."""
    command = ["unshare", "-rm", sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5 * PATIENCE)


def may_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="may not mount file systems")
def test_too_little_shared_memory_is_one_line(arguments):
    """Less than the workers' batches; then /dev/shm cannot be written at all."""
    code = (
        "import subprocess, sys, train; from utils import command_line\n"
        "def run(options):\n"
        "    command = ['mount', '-t', 'tmpfs', '-o', options, 'shm', '/dev/shm']\n"
        "    subprocess.run(command, check=True)\n"
        "    try: command_line(train.main)\n"
        "    except SystemExit as end: print('status', end.code, flush=True)\n"
        "run('size=64k'); run('ro')"
    )
    done = in_a_namespace(code, *arguments(num_workers=1))
    assert done.stdout.count("status 1\n") == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.replace("\0", "").splitlines()  # with which torch ends its own line
    full, unwritable = [line for line in lines if line.startswith("error: ")]
    for line in (full, unwritable):
        assert all(word in line for word in ("memory", "/dev/shm", "num_workers"))
    assert "Read-only file system" in unwritable


def test_a_long_tmpdir_and_nobody_to_talk_to(arguments, tmp_path):
    """TMPDIR of a cluster's job; standard output to a file on a full disk. The run goes on."""
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    flags = [*arguments(num_workers=1), "--training_steps", 3, "--checkpoint_interval", 2]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "train.py", *map(str, flags)],
            env=os.environ | {"TMPDIR": str(folder)},
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=3 * PATIENCE,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert paired_steps(tmp_path / "cp") == [2, 3]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("/tmp", "/tmp"), ("/" + "x" * 59, "/" + "x" * 59), ("/" + "x" * 60, "/tmp")],
)
def test_sockets_get_a_folder_with_a_short_path(monkeypatch, folder, expected):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert find_temporary_folder() == expected


def test_where_there_is_no_short_folder_it_is_said(monkeypatch):
    long = "/" + "ä" * 40  # 81 bytes
    monkeypatch.setattr(tempfile, "gettempdir", lambda: long)
    monkeypatch.setattr(os, "access", lambda folder, _: folder == long)
    with pytest.raises(UserError, match=f"{long}: too long a path .* num_workers = 0"):
        find_temporary_folder()


class NoMonitor:
    error = None


class Failing:
    """Batches, the next of which is an error."""

    def __init__(self, error: Exception):
        self.error = error

    def wait(self, _):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"),
        FileNotFoundError(2, "No such file or directory", "torch_geometric"),
        KeyError("bug"),
    ],
)
def test_a_bug_is_not_taken_for_want_of_memory(error):
    with pytest.raises(type(error)):
        next_batch(Failing(error), StopRequest(), NoMonitor)


def test_of_a_worker_s_error_the_words_alone_are_shown():
    worker_says = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "meldataset.py", line 1, in load\nenv.UserError: a.wav: is empty\n'
    )
    with pytest.raises(UserError, match=r"^a\.wav: is empty$"):
        next_batch(Failing(UserError(worker_says)), StopRequest(), NoMonitor)
