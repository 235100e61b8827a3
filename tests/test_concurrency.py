"""Two processes in one folder: trainers exclude each other, inferences do not interfere."""

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
from checkpoint import locked, paired_steps
from env import load_config
from models import Generator
from tests.runs import Run
from tools.stress import kill
from tools.toy import ROOT, run_main, save_checkpoint, speech_like, write_config
from utils import atomic_write


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns all files of a folder and its subfolders."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def run(corpus, tmp_path) -> Run:
    return Run(corpus, tmp_path, num_workers=1)


def test_a_second_trainer_is_refused_while_the_first_lives(run, tmp_path):
    log, folder = tmp_path / "log", run.folder
    arguments = [*run.arguments, "--checkpoint_path", folder, "--stdout_interval", 1]
    first = kill.start(arguments, log)
    kill.wait_for("Steps : 2,", log, first)
    worker = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[-1])
    os.kill(first.pid, signal.SIGSTOP)
    (folder / ".g_00000009.abcdefgh.tmp").touch()  # as if the first were writing it
    write_config(run.config)
    before = files_of(folder)
    second = kill.start([*arguments, "--training_steps", 2], log)
    second.join(60)
    assert log.read_text().splitlines() == [
        f"error: {folder}: in use by another run, process {first.pid} on {socket.gethostname()}; "
        "stop that run, or pass another --checkpoint_path"
    ]
    assert second.exitcode == 1
    assert files_of(folder) == before
    first.kill()
    first.join()
    with locked(folder):
        assert Path(f"/proc/{worker}").exists()  # it lives for some seconds without the lock
    assert run(2) == 0
    assert paired_steps(folder) == [1, 2]
    assert not list(folder.glob(".*.tmp"))


def test_two_writers_of_one_file_have_a_temporary_file_each(tmp_path):
    with atomic_write(tmp_path / "file") as first:
        first.write_text("first")
        with atomic_write(tmp_path / "file") as second:
            second.write_text("second")
        assert (tmp_path / "file").read_text() == "second"
    assert (tmp_path / "file").read_text() == "first"


def test_two_inferences_write_the_same_files_into_one_folder(tmp_path):
    torch.manual_seed(0)
    generator = Generator(load_config(write_config(tmp_path / "config.json")))
    save_checkpoint(tmp_path / "g_00000001", {"generator": generator.state_dict()})
    (tmp_path / "in").mkdir()
    for seed in range(6):
        wav = speech_like(0.3, seed=seed)
        soundfile.write(tmp_path / f"in/{seed}.wav", wav, 22050, subtype="PCM_16")
    flags = ("--input_wavs_dir", tmp_path / "in", "--checkpoint_file", tmp_path / "g_00000001")
    flags = [*map(str, flags), "--device", "cpu", "--output_dir"]
    command = [sys.executable, "inference.py", *flags, str(tmp_path / "both")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, cwd=ROOT, **streams) for _ in range(2)]
    assert run_main(inference, *flags, tmp_path / "alone") == 0
    for each in runs:
        output, errors = each.communicate(timeout=120)
        assert (each.returncode, errors) == (0, "")
        assert output == f"6 files written to {tmp_path / 'both'}\n"
    assert files_of(tmp_path / "both") == files_of(tmp_path / "alone")
    assert len(files_of(tmp_path / "both")) == 6
