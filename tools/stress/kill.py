"""Kills a trainer many times and compares its checkpoints with those of an uninterrupted run.

    python tools/stress/kill.py --kills 30 --seed 0

A signal ends each trainer at a random moment, or before, during or after a chosen call of a save.
After each kill, every checkpoint must load. In the end, every pair of g_ and do_ that ever existed
must equal the uninterrupted run's, bit for bit.
"""

import argparse
import contextlib
import hashlib
import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tb_logging import get_logger

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
import train
from checkpoint import checkpoint_path, checkpoint_steps, paired_steps
from tools.toy import corpus_arguments, make_corpus, run_main, write_config
from utils import command_line
from weights import load_checkpoint

MOST_STEPS = 100_000
CALLS = ((torch, "save"), (os, "fsync"), (os, "replace"))  # of a save, for do_ and then for g_
NAMES = [f"{module.__name__}.{name}" for module, name in CALLS]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# The fork server imports these once; without it, every trainer would.
PRELOADED = ("tests.conftest", "train", "librosa.filters", "torch._dynamo")
PRELOADED += ("torch.utils.tensorboard",)


class Kill(NamedTuple):
    """A way to end a trainer."""

    number: int = signal.SIGKILL
    delay: float = 0.0  # seconds after its start
    training: bool = False  # count `delay` from the first update
    slow: bool = False  # each call in a save waits 0.1 s before and after
    call: str = ""  # end at this call instead of after `delay`
    count: int = 0  # the number of the call
    moment: str = ""  # "before" or "after" the call, or "in" it, with half of the file written

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.call:
            return f"{name} {self.moment} {self.call} no. {self.count}"
        began = "of training" if self.training else "from its start"
        return f"{name} after {self.delay:.2f} s {began}{', slow saves' if self.slow else ''}"

    def prepare(self) -> None:
        """Patches this process so that it ends at its call, or saves slowly."""
        for (module, name), full_name in zip(CALLS, NAMES, strict=True):
            if self.slow:
                setattr(module, name, slowly(getattr(module, name)))
            elif self.call == full_name:
                setattr(module, name, self.ending(getattr(module, name)))

    def ending(self, function: Callable) -> Callable:
        """Returns `function` with an end of the process at its `count`-th call."""
        calls = 0

        def wrapped(*arguments, **flags):
            nonlocal calls
            calls += 1
            if calls < self.count:
                return function(*arguments, **flags)
            if self.moment != "before":
                function(*arguments, **flags)
            if self.moment == "in":
                file = arguments[1]
                file.truncate(file.tell() // 2)
            os.kill(os.getpid(), self.number)
            raise AssertionError("the process survived its signal")

        return wrapped


def slowly(function: Callable) -> Callable:
    """Returns `function` with a pause before and after."""

    def wrapped(*arguments, **flags):
        time.sleep(0.1)
        result = function(*arguments, **flags)
        time.sleep(0.1)
        return result

    return wrapped


def random_kill(choose: random.Random) -> Kill:
    """Returns a kill: half at any time, a quarter in slow saves, a quarter at a call of a save."""
    way = choose.randrange(4)
    if way < 3:
        slow = way == 2
        return Kill(choose.choice(SIGNALS), choose.uniform(0, 2.5) + slow, slow=slow)
    call = choose.choice(NAMES)
    moments = ("before", "after", "in") if call == "torch.save" else ("before", "after")
    return Kill(call=call, count=choose.randrange(1, 8), moment=choose.choice(moments))


def server() -> BaseContext:
    """Returns a context that forks processes from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    return context


def start(arguments: list, log: Path, prepare: Callable[[], None] | None = None) -> BaseProcess:
    """Starts train.py with `arguments` in its own process group; its output goes to `log`.

    `prepare`, which must be picklable, is called in the process first.
    """
    log.write_text("")
    process = server().Process(target=child, args=([*map(str, arguments)], log, prepare))
    process.start()
    return process


def wait_for(text: str, log: Path, process: BaseProcess) -> None:
    """Waits until `log` contains `text`; asserts that the process runs until then."""
    while text not in log.read_text():
        assert process.is_alive(), log.read_text()
        time.sleep(0.02)


def child(arguments: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    """Runs in the process that `start` starts."""
    os.setsid()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of data workers, as without the fork server
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.argv = ["train.py", *arguments]
    command_line(train.main)


class Trainer:
    """A checkpoint folder and the trainers that use it one after the other."""

    def __init__(self, corpus: Path, folder: Path):
        self.folder, self.log = folder / "cp", folder / "log"
        self.config = folder / "config.json"
        self.arguments = [*corpus_arguments(corpus), "--checkpoint_path", str(self.folder)]
        for flag in ("checkpoint_interval", "summary_interval", "stdout_interval"):
            self.arguments += [f"--{flag}", "1"]
        self.arguments += ["--config", str(self.config)]
        self.seen: dict[int, str] = {}  # the digest of each pair so far, by its steps

    def kill(self, kill: Kill, num_workers: int) -> str:
        """Starts a trainer, kills it and checks its folder; returns a line about it."""
        write_config(self.config, num_workers=num_workers)
        before = paired_steps(self.folder)
        arguments = [*self.arguments, "--training_steps", str(MOST_STEPS)]
        process = start(arguments, self.log, kill.prepare)
        if not kill.call:
            if kill.training:
                wait_for("Steps : ", self.log, process)
            time.sleep(kill.delay)
            os.kill(process.pid, kill.number)
        process.join(60)
        assert process.exitcode is not None, f"still running after {kill}\n{self.log.read_text()}"
        log = self.log.read_text()
        assert "error: " not in log and "Traceback" not in log.replace("Interrupt\n", ""), log
        if "Steps : " in log:
            if before:
                assert f"resumed from {checkpoint_path(self.folder, 'g', before[-1])} " in log, log
            if not kill.call and kill.number != signal.SIGKILL:
                assert process.exitcode == 128 + kill.number, log
                assert ", saved in " in log, log
        self.check()
        pairs = paired_steps(self.folder)
        return f"exit {process.exitcode}, resumable from {pairs[-1] if pairs else 'the start'}"

    def check(self) -> None:
        """Loads every checkpoint and compares each pair with what it was before."""
        contents = {
            (prefix, steps): load_checkpoint(checkpoint_path(self.folder, prefix, steps))
            for prefix in ("g", "do")
            for steps in checkpoint_steps(self.folder, prefix)
        }
        for steps in paired_steps(self.folder):
            del contents["do", steps]["meta"]  # it describes the command
            digest = digest_of([contents["g", steps], contents["do", steps]])
            assert self.seen.setdefault(steps, digest) == digest, f"step {steps} has changed"

    def finish(self, steps: int) -> None:
        """Trains to `steps` in this process without a kill, and checks the folder."""
        write_config(self.config)
        with open(self.log, "w") as log, contextlib.redirect_stdout(log):
            flags = ("--training_steps", steps, "--keep_checkpoints", MOST_STEPS)
            assert run_main(train, *self.arguments, *flags) == 0
        self.check()

    def logged_steps(self) -> list[int]:
        """Returns the steps in the TensorBoard log."""
        get_logger().setLevel("ERROR")  # it prints a line for each resume
        events = EventAccumulator(str(self.folder / "logs"), size_guidance={"scalars": 0})
        events.Reload()
        return [event.step for event in events.Scalars("training/gen_loss_total")]


def digest_of(contents: list[dict]) -> str:
    """Returns a digest of loaded checkpoints."""
    data = io.BytesIO()
    torch.save(contents, data)
    return hashlib.sha256(data.getvalue()).hexdigest()


def kill_over_and_over(folder: Path, kills: list[Kill], say: Callable = print) -> None:
    """Asserts that a trainer with `kills` ends with an uninterrupted trainer's checkpoints."""
    corpus = make_corpus(folder)
    (folder / "killed").mkdir()
    (folder / "straight").mkdir()
    killed, straight = Trainer(corpus, folder / "killed"), Trainer(corpus, folder / "straight")
    for number, kill in enumerate(kills, start=1):
        say(f"{number:3}  {kill}: {killed.kill(kill, num_workers=number % 2)}")
    last = max(killed.seen, default=0) + 2
    killed.finish(last)
    assert not list(killed.folder.glob(".*.tmp")), "temporary files remain"
    straight.finish(last)
    assert last in killed.seen
    for steps, digest in killed.seen.items():
        assert straight.seen[steps] == digest, f"step {steps} differs from the uninterrupted run"
    assert killed.logged_steps() == straight.logged_steps() == list(range(1, last + 1))
    say(f"{len(killed.seen)} pairs of {last} steps equal the uninterrupted run's bit for bit")


def main() -> None:
    """Runs `--kills` random kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)  # as in the trainers, so that sums have the same order
    choose = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        kill_over_and_over(Path(folder), [random_kill(choose) for _ in range(a.kills)])


if __name__ == "__main__":
    main()
