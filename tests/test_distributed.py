"""Several processes against one: the same updates, checkpoints that both can resume, no hangs.

A machine with two GPUs is simulated: both processes that train.py launches use the CPU.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distributed
import env
import train
from checkpoint import build_state, checkpoint_path, locked, paired_steps, save
from distill import Distillation
from models import Generator
from tests.test_utils import full_disk
from tools.stress.kill import server
from tools.toy import ROOT, corpus_arguments, run_main, write_config
from weights import load_checkpoint

STEPS = 4
CONFIGS = ("toy", "alone")


# ----------------------------------------------------------------------- updates and errors of two


def one_step(folder: Path, config: str) -> None:
    """Writes the losses and gradients of one update in float64, of all processes together."""
    rank, world_size = distributed.rank(), distributed.world_size()
    h = env.load_config(folder / f"{config}.json")
    state = build_state(h, torch.device("cpu"))
    for module in (state.generator, state.discriminators, state.mel_loss):
        module.double()
    state.average_gradients()
    torch.manual_seed(0)
    mel = torch.randn(4, h.num_mels, h.segment_size // h.hop_size, dtype=torch.float64)
    wav = 0.1 * torch.randn(4, 1, h.segment_size, dtype=torch.float64)
    losses = train.training_step(state, mel[rank::world_size], wav[rank::world_size])
    means = distributed.mean_over_processes(torch.stack(list(losses.values())))
    if rank == 0:
        gradients = [
            p.grad for m in (state.generator, state.discriminators) for p in m.parameters()
        ]
        torch.save([means, *gradients], folder / f"{config}_of_{world_size}")


def one_distillation(folder: Path) -> None:
    """Writes the student of this process after an update on its own share of mels."""
    h = env.load_config(folder / "alone.json")
    state, rank = build_state(h, torch.device("cpu")), distributed.rank()
    torch.manual_seed(0)
    learner = Distillation(state, Generator(h).requires_grad_(False), None, is_warm=True)
    learner.start(state, compiled=False)
    losses = learner.update(state, torch.randn(2, h.num_mels, 8)[rank::2], None)
    students = [p.detach() for p in learner.student.parameters()]
    torch.save([losses["gen_loss_total"], *students], folder / f"student_of_{rank}")


def message_of(act) -> str:
    try:
        act()
    except env.UserError as error:
        return str(error)
    return "none"


def errors_of_a_process(folder: Path) -> None:
    """Writes the messages that this process gets of errors: of rank 0's disk, of all, of rank 1."""
    rank = distributed.rank()
    state = build_state(env.load_config(folder / "toy.json"), torch.device("cpu"))

    def all_err():
        with distributed.raise_on_all_ranks():
            raise env.UserError(f"of process {rank}")

    def the_second_errs():
        with distributed.raise_on_all_ranks():
            if rank == 1:
                raise env.UserError("of process 1")

    with full_disk(1000 if rank == 0 else 10**9):
        messages = [message_of(lambda: save(state, folder / "cp", keep=1))]
    messages += [message_of(all_err), message_of(the_second_errs)]
    (folder / f"messages_of_{rank}").write_text("\n".join(messages))


def errors_of_the_start(folder: Path, corpus: Path, ports: list[int]) -> None:
    """Writes the messages that this process gets of data and of a lock before training."""
    flags = [*corpus_arguments(corpus), "--config", folder / "toy.json"]
    messages = []
    for port, last in zip(ports, (("--input_wavs_dir", folder), ()), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        arguments = (*flags, "--checkpoint_path", folder / "held", *last)
        messages.append(message_of(lambda arguments=arguments: run_main(train, *arguments)))
    (folder / f"start_of_{distributed.rank()}").write_text("\n".join(messages))


def in_process(rank: int, ports: list[int], folder: Path, corpus: Path) -> None:
    """Runs in each of two processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    with distributed.joined_processes(torch.device("cpu")):
        for config in CONFIGS:
            one_step(folder, config)
        one_distillation(folder)
        errors_of_a_process(folder)
    errors_of_the_start(folder, corpus, ports[1:])


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, corpus) -> Path:
    """A folder with the results of two processes and of one."""
    folder = tmp_path_factory.mktemp("two")
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    write_config(folder / "toy.json", batch_size=4)
    write_config(folder / "alone.json", batch_size=4, discriminator_train_start_steps=None)
    arguments = ports, folder, corpus
    processes = [server().Process(target=in_process, args=(r, *arguments)) for r in range(2)]
    with locked(folder / "held"):
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode == 0
    for config in CONFIGS:
        one_step(folder, config)
    return folder


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_make_the_same_gradients(of_two, config):
    """The runs have discriminators or none."""
    one, two = (torch.load(of_two / f"{config}_of_{count}") for count in (1, 2))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_processes_distil_one_student(of_two):
    (loss, *one), (other_loss, *two) = (torch.load(of_two / f"student_of_{i}") for i in (0, 1))
    assert abs(loss - other_loss) > 1e-3 * loss
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_an_error_of_any_process_ends_all_and_is_printed_once(of_two):
    """The lowest rank with an error has the message: a full disk of rank 0, an error of both."""
    full, *of_first = (of_two / "messages_of_0").read_text().split("\n")
    assert "do_00000000: cannot be written" in full
    assert of_first == ["of process 0", ""]
    assert (of_two / "messages_of_1").read_text().split("\n") == ["", "", "of process 1"]
    assert not list((of_two / "cp").iterdir())


def test_an_error_before_training_is_printed_once(of_two):
    data, lock = (of_two / "start_of_0").read_text().split("\n")
    assert "no audio file for the id" in data
    assert "in use by another run" in lock
    assert (of_two / "start_of_1").read_text().split("\n") == ["", ""]


# ------------------------------------------------------------------------------------- whole runs


class TwoProcesses:
    """train.py as two processes, and in this process, on the toy corpus."""

    def __init__(self, corpus, tmp_path):
        self.config = write_config(tmp_path / "config.json", num_workers=1)
        self.arguments = [*corpus_arguments(corpus), "--config", str(self.config)]
        self.arguments += ["--summary_interval", "1", "--stdout_interval", "1"]

    def two(self, *arguments, preexec_fn=None) -> subprocess.Popen:
        """Acts like a machine with two GPUs."""
        code = (
            "import sys, torch, train, utils; torch.cuda.device_count = lambda: 2; "
            "sys.argv = ['train.py', *sys.argv[1:]]; utils.command_line(train.main)"
        )
        flags = (*self.arguments, "--device", "auto", *arguments)
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, flags)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=preexec_fn,
        )

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
    """Returns the losses of each step from TensorBoard."""
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    tags = [f"training/{name}" for name in ("disc_loss_total", "gen_loss_total", "mel_spec_error")]
    return np.array([[event.value for event in events.Scalars(tag)] for tag in tags])


def test_two_processes_train_alike_and_share_checkpoints(runs, tmp_path):
    """Adam turns gradients that are rounding noise into whole steps: a few weights may differ."""
    one, two = tmp_path / "one", tmp_path / "two"
    runs.one(one, 1)
    shutil.copytree(one, two)
    runs.one(one, STEPS)
    process = runs.two("--checkpoint_path", two, "--training_steps", STEPS)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert "after 1 steps" in output
    assert logged_losses(one).shape == (3, STEPS)
    np.testing.assert_allclose(logged_losses(two), logged_losses(one), rtol=1e-5)
    difference = np.abs(weights(two, STEPS) - weights(one, STEPS))
    assert np.mean(difference < 1e-5) >= 0.999
    learning_rate = 2e-4
    assert difference.max() <= 2 * learning_rate * STEPS
    for folder in (one, two):
        runs.one(folder, STEPS + 1)
    difference = np.abs(weights(two, STEPS + 1) - weights(one, STEPS + 1))
    assert np.mean(difference < 1e-5) >= 0.999


def read_to(process: subprocess.Popen, steps: int) -> list[str]:
    """Returns the lines that a run prints up to the line of a step."""
    lines = []
    for line in iter(process.stdout.readline, ""):
        lines.append(line)
        if line.startswith(f"Steps : {steps},"):
            return lines
    raise AssertionError("".join(lines))


def test_a_hangup_saves_and_stops(runs, tmp_path):
    """A closed terminal sends SIGHUP to torchrun, which passes it on."""
    folder = tmp_path / "cp"
    process = runs.two("--checkpoint_path", folder)
    read_to(process, 2)
    process.send_signal(signal.SIGHUP)
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 129
    (steps,) = paired_steps(folder)
    assert lines[-1] == f"stopped by SIGHUP after step {steps}, saved in {folder}"
    assert all(line.startswith("Steps : ") for line in lines[:-1])


def children_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def ignore_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_process_killed_under_nohup_ends_all_without_loss(runs, tmp_path):
    """SIGHUP, ignored at the start, does not end it, although torchrun would handle it."""
    folder = tmp_path / "cp"
    flags = ("--checkpoint_path", folder, "--checkpoint_interval", 1)
    process = runs.two(*flags, preexec_fn=ignore_hangups)
    read_to(process, 1)
    children = children_of(process)
    assert len(children) == 2
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGHUP)
    read_to(process, 10)
    os.kill(children[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "error: process 1 was ended by SIGKILL (out of memory?)" in output
    assert "error: another process of the run has ended" in output  # says the other
    assert "Traceback" not in output
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(paired_steps(folder)) >= 3
    for path in [*folder.glob("g_*"), *folder.glob("do_*")]:
        load_checkpoint(path)


def test_a_batch_that_does_not_divide_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(env.UserError, match="batch_size = 2: expected a multiple of 3"):
        runs.one(tmp_path / "cp", 1)
    assert not (tmp_path / "cp").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("port must have value"), "MASTER_ADDR=host, MASTER_PORT=99999: port must"),
        (torch.distributed.DistNetworkError("timed out"), "another process of the run .* reached"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(monkeypatch, error, said):
    variables = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "host", "MASTER_PORT": 99999}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    init = Mock(side_effect=error)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with (
        pytest.raises(env.UserError, match=said),
        distributed.joined_processes(torch.device("cpu")),
    ):
        raise AssertionError


def test_an_unusable_clip_ends_all_in_one_line(runs, corpus, tmp_path):
    """torchrun prints nothing beside it, and the note on a config is printed once."""
    write_config(runs.config, misr_merge=None)
    wavs = shutil.copytree(corpus / "wavs", tmp_path / "wavs")
    broken = wavs / "clip0.wav"
    soundfile.write(broken, np.full(20_000, np.nan), 22050, subtype="FLOAT")
    folder = tmp_path / "cp"
    process = runs.two("--input_wavs_dir", wavs, "--checkpoint_path", folder)
    lines = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 1
    (note,) = [line for line in lines if "misr_merge" in line]
    assert note.endswith('no misr_merge, so "mean" is used; y-chan\'s port uses "conv"')
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error == f"error: {broken}: holds samples that are NaN or infinite"
    assert not [line for line in lines if "elastic" in line or "Traceback" in line]
