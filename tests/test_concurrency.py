"""Two at once in one folder: trainers are kept apart, inferences do not notice each other."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

import inference
import train
from checkpoint import locked, paired_steps
from env import load_config
from models import Generator
from tools.stress import kill
from tools.toy import ROOT, corpus_arguments, run_main, save_checkpoint, speech_like, write_config
from utils import atomic_write


def start(*command) -> subprocess.Popen:
    """Python in the repository, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a folder, in depth."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(folder: Path, process: int) -> str:
    return (
        f"error: {folder}: in use by another run, process {process} on {socket.gethostname()}; "
        "stop that one, or give this one a --checkpoint_path of its own"
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cp"


@pytest.fixture
def arguments(corpus, tmp_path, folder) -> list[str]:
    """Of a trainer that has a data worker."""
    config = write_config(tmp_path / "config.json", num_workers=1)
    flags = ("--config", str(config), "--checkpoint_path", str(folder), "--stdout_interval", "1")
    return [*corpus_arguments(corpus), *flags]


def test_a_second_trainer_is_refused_as_long_as_the_first_lives(arguments, folder, tmp_path):
    log = tmp_path / "log"
    first = kill.start(arguments, log)
    kill.wait_for("Steps : 2,", log, first)
    worker = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[-1])
    os.kill(first.pid, signal.SIGSTOP)
    (folder / ".g_00000009.abcdefgh.tmp").touch()  # as if the first were writing it
    write_config(tmp_path / "config.json", num_workers=0)
    before = contents(folder)
    second = kill.start([*arguments, "--training_steps", 2], log)
    second.join(60)
    assert log.read_text().splitlines() == [refusal(folder, first.pid)]
    assert second.exitcode == 1
    assert contents(folder) == before
    first.kill()
    first.join()
    with locked(folder):
        assert Path(f"/proc/{worker}").exists()  # for some seconds, but it holds no lock
    assert run_main(train, *arguments, "--training_steps", 2) == 0
    assert paired_steps(folder) == [2]
    assert not list(folder.glob(".*.tmp"))


def test_only_the_first_process_of_a_run_locks(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(folder):
        assert not folder.exists()


def test_without_locks_a_run_goes_on_and_says_so(arguments, folder, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert run_main(train, *arguments, "--training_steps", 1) == 0
    assert f"{folder}: cannot be locked (No locks available)" in capsys.readouterr().out


def test_two_writers_of_one_file_have_a_temporary_one_each(tmp_path):
    with atomic_write(tmp_path / "file") as first:
        first.write_text("first")
        with atomic_write(tmp_path / "file") as second:
            second.write_text("second")
        assert (tmp_path / "file").read_text() == "second"
    assert (tmp_path / "file").read_text() == "first"


def test_two_inferences_into_one_folder(tmp_path):
    """Both write every file; whoever comes last, the same whole files are there."""
    torch.manual_seed(0)
    generator = Generator(load_config(write_config(tmp_path / "config.json")))
    save_checkpoint(tmp_path / "g_00000001", {"generator": generator.state_dict()})
    (tmp_path / "in").mkdir()
    for seed in range(12):
        wav = speech_like(0.3, seed=seed)
        soundfile.write(tmp_path / f"in/{seed}.wav", wav, 22050, subtype="PCM_16")
    flags = ("--input_wavs_dir", tmp_path / "in", "--checkpoint_file", tmp_path / "g_00000001")
    command = ("inference.py", *flags, "--device", "cpu", "--output_dir")
    runs = [start(*command, tmp_path / "both") for _ in range(2)]
    assert run_main(inference, *command[1:], tmp_path / "alone") == 0
    for each in runs:
        output, errors = each.communicate(timeout=120)
        assert (each.returncode, errors) == (0, "")
        assert output == f"12 files written to {tmp_path / 'both'}\n"
    both, alone = (contents(tmp_path / name) for name in ("both", "alone"))
    assert [path.name for path in both] == [path.name for path in alone]
    assert list(both.values()) == list(alone.values())
    assert len(both) == 12
