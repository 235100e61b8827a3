"""Kills a trainer over and over, and compares what comes of it with an uninterrupted run.

    python tools/stress/kill.py --kills 30 --seed 0

Each trainer is ended by a signal at a random moment, or at a chosen call of a save: before, in or
after it. After each kill, every checkpoint under its final name is whole; after all, every pair of
g_ and do_ that ever stood equals the uninterrupted run's, bit for bit.
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
CALLS = ((torch, "save"), (os, "fsync"), (os, "replace"))  # of one save: do_ and g_, in turns
NAMES = [f"{module.__name__}.{name}" for module, name in CALLS]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What the server of processes imports; the rest would load anew in each.
PRELOADED = ("tests.conftest", "train", "librosa.filters", "torch._dynamo")
PRELOADED += ("torch.utils.tensorboard",)


class Kill(NamedTuple):
    """One way to end a trainer."""

    number: int = signal.SIGKILL
    delay: float = 0.0  # seconds from its start, or,
    training: bool = False  # with this, from its first update
    slow: bool = False  # each call of a save takes a tenth of a second before and after
    call: str = ""  # instead of after `delay`: at this call,
    count: int = 0  # the count-th,
    moment: str = ""  # "before" or "after" it, or, half of the file written, "in" it

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.call:
            return f"{name} {self.moment} {self.call} no. {self.count}"
        began = "of training" if self.training else "of its life"
        return f"{name} after {self.delay:.2f} s {began}{', in slow motion' if self.slow else ''}"

    def prepare(self) -> None:
        """Patches this process so that it dies as said, or saves slowly."""
        for (module, name), full_name in zip(CALLS, NAMES, strict=True):
            if self.slow:
                setattr(module, name, slowly(getattr(module, name)))
            elif self.call == full_name:
                setattr(module, name, self.deadly(getattr(module, name)))

    def deadly(self, function: Callable) -> Callable:
        """`function`, whose `count`-th call is the end."""
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
            raise AssertionError("dead")

        return wrapped


def slowly(function: Callable) -> Callable:
    """`function` with a pause before and after."""

    def wrapped(*arguments, **flags):
        time.sleep(0.1)
        result = function(*arguments, **flags)
        time.sleep(0.1)
        return result

    return wrapped


def random_kill(choose: random.Random) -> Kill:
    """Half of them anywhere, a quarter in slow saves, a quarter at one call of a save."""
    way = choose.randrange(4)
    if way < 3:
        slow = way == 2
        return Kill(choose.choice(SIGNALS), choose.uniform(0, 2.5) + slow, slow=slow)
    call = choose.choice(NAMES)
    moments = ("before", "after", "in") if call == "torch.save" else ("before", "after")
    return Kill(call=call, count=choose.randrange(1, 8), moment=choose.choice(moments))


def server() -> BaseContext:
    """What starts processes by a fork of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    return context


def start(arguments: list, log: Path, prepare: Callable[[], None] | None = None) -> BaseProcess:
    """train.py with its command line, in a process, and a group of processes, of its own.

    What it prints goes to `log`. `prepare`, a function that can be pickled, is called there before.
    """
    log.write_text("")
    process = server().Process(target=child, args=([*map(str, arguments)], log, prepare))
    process.start()
    return process


def wait_for(text: str, log: Path, process: BaseProcess) -> None:
    """Returns once `log` holds `text`; asserts that the process lives until then."""
    while text not in log.read_text():
        assert process.is_alive(), log.read_text()
        time.sleep(0.02)


def child(arguments: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    """What `start` runs."""
    os.setsid()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in any trainer
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.argv = ["train.py", *arguments]
    command_line(train.main)


class Trainer:
    """A checkpoint folder and the trainers that work there, one after the other."""

    def __init__(self, corpus: Path, folder: Path):
        self.folder, self.log = folder / "cp", folder / "log"
        self.config = folder / "config.json"
        self.arguments = [*corpus_arguments(corpus), "--checkpoint_path", str(self.folder)]
        for flag in ("checkpoint_interval", "summary_interval", "stdout_interval"):
            self.arguments += [f"--{flag}", "1"]
        self.arguments += ["--config", str(self.config)]
        self.seen: dict[int, str] = {}  # the digest of each pair that ever stood, by its steps

    def kill(self, kill: Kill, num_workers: int) -> str:
        """Starts a trainer, kills it, and checks what it leaves; returns what happened."""
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
        assert process.exitcode is not None, f"still alive after {kill}\n{self.log.read_text()}"
        log = self.log.read_text()
        assert "error: " not in log and "Traceback" not in log.replace("Interrupt\n", ""), log
        if "Steps : " in log:
            if before:
                assert f"resumed from {checkpoint_path(self.folder, 'g', before[-1])} " in log, log
            if not kill.call and kill.number != signal.SIGKILL:
                assert process.exitcode == 128 + kill.number, log
                assert ", saved in " in log, log
        self.look()
        pairs = paired_steps(self.folder)
        return f"exit {process.exitcode}, resumable from {pairs[-1] if pairs else 'the start'}"

    def look(self) -> None:
        """Reads every checkpoint, and remembers each pair's digest."""
        contents = {
            (prefix, steps): load_checkpoint(checkpoint_path(self.folder, prefix, steps))
            for prefix in ("g", "do")
            for steps in checkpoint_steps(self.folder, prefix)
        }
        for steps in paired_steps(self.folder):
            del contents["do", steps]["meta"]  # which tells of the command, not of the result
            digest = digest_of([contents["g", steps], contents["do", steps]])
            assert self.seen.setdefault(steps, digest) == digest, f"step {steps} has changed"

    def finish(self, steps: int) -> None:
        """Trains to `steps` undisturbed, in this process, and looks."""
        write_config(self.config)
        with open(self.log, "w") as log, contextlib.redirect_stdout(log):
            flags = ("--training_steps", steps, "--keep_checkpoints", MOST_STEPS)
            assert run_main(train, *self.arguments, *flags) == 0
        self.look()

    def logged_steps(self) -> list[int]:
        """The steps that TensorBoard shows."""
        get_logger().setLevel("ERROR")  # it reports each resume
        events = EventAccumulator(str(self.folder / "logs"), size_guidance={"scalars": 0})
        events.Reload()
        return [event.step for event in events.Scalars("training/gen_loss_total")]


def digest_of(contents: list[dict]) -> str:
    """Of checkpoints as they were loaded: equal where they are, bit for bit."""
    data = io.BytesIO()
    torch.save(contents, data)
    return hashlib.sha256(data.getvalue()).hexdigest()


def kill_over_and_over(folder: Path, kills: list[Kill], say: Callable = print) -> None:
    """Asserts that a trainer that dies by all `kills` gets where an undisturbed one gets."""
    corpus = make_corpus(folder)
    (folder / "killed").mkdir()
    (folder / "straight").mkdir()
    killed, straight = Trainer(corpus, folder / "killed"), Trainer(corpus, folder / "straight")
    for number, kill in enumerate(kills, start=1):
        say(f"{number:3}  {kill}: {killed.kill(kill, num_workers=number % 2)}")
    last = max(killed.seen, default=0) + 2
    killed.finish(last)
    assert not list(killed.folder.glob(".*.tmp")), "temporary files are left"
    straight.finish(last)
    assert last in killed.seen
    for steps, digest in killed.seen.items():
        assert straight.seen[steps] == digest, f"not the uninterrupted run's: step {steps}"
    assert killed.logged_steps() == straight.logged_steps() == list(range(1, last + 1))
    say(f"{len(killed.seen)} pairs of {last} steps seen, each the uninterrupted run's bit for bit")


def main() -> None:
    """Kills as often as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)  # as in the trainers, for sums in the same order
    choose = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        kill_over_and_over(Path(folder), [random_kill(choose) for _ in range(a.kills)])


if __name__ == "__main__":
    main()
