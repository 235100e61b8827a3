"""Several processes against one: the same updates, checkpoints that both can resume, no hangs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.multiprocessing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import env
import train
from checkpoint import (
    build_state,
    checkpoint_path,
    load_checkpoint,
    paired_steps,
    share_over_processes,
)
from tools.toy import ROOT, corpus_arguments, run_main, write_config

STEPS = 4


def one_step(rank: int, world_size: int, port: int, folder: Path) -> None:
    """Writes the losses and gradients of one update in float64, of all processes together."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cpu")
    env.init_processes(device)
    h = env.load_config(folder / "toy.json")
    torch.set_default_dtype(torch.float64)
    state = build_state(h, device)
    state.mel_loss.double()
    share_over_processes(state)
    torch.manual_seed(0)
    mel = torch.randn(4, h.num_mels, h.segment_size // h.hop_size)
    wav = 0.1 * torch.randn(4, 1, h.segment_size)
    losses = train.training_step(state, mel[rank::world_size], wav[rank::world_size])
    means = env.mean_over_processes(torch.stack(list(losses.values())))
    if rank == 0:
        gradients = [
            p.grad for m in (state.generator, state.discriminators) for p in m.parameters()
        ]
        torch.save([means, *gradients], folder / f"of_{world_size}")
    env.leave_processes()


def test_two_processes_make_the_same_gradients(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    write_config(tmp_path / "toy.json", batch_size=4)
    for world_size in (1, 2):
        arguments = (world_size, port, tmp_path)
        torch.multiprocessing.spawn(one_step, args=arguments, nprocs=world_size)
    for one, two in zip(torch.load(tmp_path / "of_1"), torch.load(tmp_path / "of_2"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


class TwoProcesses:
    """train.py under torchrun, and in this process, on the toy corpus."""

    def __init__(self, corpus, tmp_path):
        config = write_config(tmp_path / "config.json", num_workers=1)
        self.arguments = [*corpus_arguments(corpus), "--config", str(config)]
        self.arguments += ["--summary_interval", "1", "--stdout_interval", "1"]

    def start(self, folder: Path, *arguments) -> subprocess.Popen:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        flags = [*self.arguments, "--checkpoint_path", folder, *map(str, arguments)]
        return subprocess.Popen(
            [sys.executable, *torchrun, "train.py", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_itself(self, *arguments) -> subprocess.Popen:
        """As on a machine with two GPUs; they are made up, so that both processes take the CPU."""
        flags = [*self.arguments, "--device", "auto", *map(str, arguments)]
        code = (
            "import sys, torch, train, utils; torch.cuda.device_count = lambda: 2; "
            f"sys.argv = ['train.py', *{flags!r}]; utils.command_line(train.main)"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def two(self, folder: Path, steps: int) -> str:
        process = self.start(folder, "--training_steps", steps)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        return output

    def one(self, folder: Path, steps: int) -> None:
        flags = ("--checkpoint_path", folder, "--training_steps", steps)
        assert run_main(train, *self.arguments, *flags) == 0


@pytest.fixture
def runs(corpus, tmp_path):
    return TwoProcesses(corpus, tmp_path)


def weights(folder: Path, steps: int) -> np.ndarray:
    g, do = (load_checkpoint(checkpoint_path(folder, p, steps)) for p in ("g", "do"))
    tensors = [*g["generator"].values(), *do["mpd"].values(), *do["msd"].values()]
    return torch.cat([tensor.flatten() for tensor in tensors]).numpy()


def logged_losses(folder: Path) -> np.ndarray:
    """Of each step, as TensorBoard has them."""
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    tags = [f"training/{name}" for name in ("disc_loss_total", "gen_loss_total", "mel_spec_error")]
    return np.array([[event.value for event in events.Scalars(tag)] for tag in tags])


def test_two_processes_train_alike_and_share_checkpoints(runs, tmp_path):
    """Adam turns gradients that are rounding noise into whole steps: a few weights may differ."""
    one, two = tmp_path / "one", tmp_path / "two"
    runs.one(one, STEPS)
    runs.two(two, STEPS)
    assert logged_losses(one).shape == (3, STEPS)
    np.testing.assert_allclose(logged_losses(two), logged_losses(one), rtol=1e-5)
    difference = np.abs(weights(two, STEPS) - weights(one, STEPS))
    assert np.mean(difference < 1e-5) >= 0.999
    learning_rate = 2e-4
    assert difference.max() <= 2 * learning_rate * STEPS
    assert f"after {STEPS} steps" in runs.two(one, STEPS + 1)
    runs.one(two, STEPS + 1)
    difference = np.abs(weights(two, STEPS + 1) - weights(one, STEPS + 1))
    assert np.mean(difference < 1e-5) >= 0.999


def test_a_signal_to_torchrun_saves_and_stops(runs, tmp_path):
    folder = tmp_path / "cp"
    process = runs.start(folder, "--training_steps", 100_000)
    next(line for line in process.stdout if line.startswith("Steps : 2,"))
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert "stopped by SIGTERM" in output
    (steps,) = {int(path.name[-8:]) for path in folder.glob("*_0*")}
    assert f"after step {steps}, saved" in output


@pytest.mark.parametrize("number", [signal.SIGINT, None])
def test_a_machine_with_two_gpus_starts_two_processes(runs, tmp_path, number):
    """Its torchrun keeps our exit status."""
    folder = tmp_path / "cp"
    steps = ("--training_steps", 2) if number is None else ()
    process = runs.start_itself("--checkpoint_path", folder, *steps)
    lines = iter(process.stdout.readline, "")
    seen = [next(line for line in lines if line.startswith("Steps : 2,"))]
    if number is not None:
        process.send_signal(number)
    seen += process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == (0 if number is None else 128 + number)
    assert "Traceback" not in "\n".join(seen)
    assert paired_steps(folder)


def test_a_killed_process_ends_the_others_and_leaves_good_checkpoints(runs, tmp_path):
    folder = tmp_path / "cp"
    process = runs.start(folder, "--training_steps", 100_000, "--checkpoint_interval", 1)
    deadline = time.monotonic() + 120
    while not checkpoint_path(folder, "g", 3).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert len(paired_steps(folder)) >= 3
    for path in [*folder.glob("g_*"), *folder.glob("do_*")]:
        load_checkpoint(path)


def test_a_batch_that_does_not_divide_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(env.UserError, match="batch_size = 2: expected a multiple of 3"):
        runs.one(tmp_path / "cp", 1)
    assert not (tmp_path / "cp").exists()


def errors_of(process: subprocess.Popen) -> list[str]:
    """The lines in which a run that fails says why, and never by a traceback."""
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("error:")]


def test_an_unusable_clip_of_one_process_ends_all_in_one_line(runs, corpus, tmp_path):
    wavs = shutil.copytree(corpus / "wavs", tmp_path / "wavs")
    soundfile.write(wavs / "clip0.wav", np.full(20_000, np.nan), 22050, subtype="FLOAT")
    folder = tmp_path / "cp"
    process = runs.start_itself("--input_wavs_dir", wavs, "--checkpoint_path", folder)
    (line,) = errors_of(process)
    assert "clip0.wav" in line


def test_what_is_wrong_before_training_is_told_once(runs, tmp_path):
    process = runs.start_itself("--input_wavs_dir", tmp_path, "--checkpoint_path", tmp_path / "cp")
    (line,) = errors_of(process)
    assert "no audio file for the id 'clip0'" in line
