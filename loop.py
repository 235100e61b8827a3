"""The loop that train.py and distill.py share.

    batch -> update -> report -> save -> validate

until the last step, a signal or an error, in every process of the run at the same step.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from checkpoint import NEVER, State, check_losses, save
from distributed import (
    agree_on_error,
    max_over_processes,
    raise_on_all_ranks,
    rank,
    sum_over_processes,
    world_size,
)
from env import UserError
from meldataset import MelDataset, ResumableBatchSampler
from monitor import Monitor
from utils import is_out_of_memory, say

SHOWN_CLIPS = 5  # of the validation clips go to TensorBoard, as in HiFi-GAN
LONGEST_TEMPORARY_FOLDER = 60  # bytes: a socket's path has 107, of which workers need 45

LOOK_UP = 0.5  # seconds that the wait for workers lasts before it looks for signals
# In the words of PyTorch's errors: a worker that was killed, and one without shared memory.
WORKER_TROUBLE = ("DataLoader worker (pid", "shared memory", "</torch_")
WORKERS_NEED = (
    "too little memory, or /dev/shm too small or not writable; with num_workers = 0 in the config "
    "there are no workers"
)

Losses = dict[str, torch.Tensor]  # scalars by name, on the device
Update = Callable[[State, torch.Tensor, torch.Tensor], Losses]  # of (state, mel, wav)

# --------------------------------------------------------------------------------------- the loop


class Stopped(BaseException):
    """A signal asks the run to save and to end with `status`."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class StopRequest:
    """Notes SIGINT, SIGTERM or SIGHUP, for the run to stop at a step's end; a second one kills.

    What is ignored at the start, as SIGHUP under nohup, stays ignored. `status` is what the run
    shall exit with, 0 before a signal.
    """

    def __init__(self):
        self.status = 0
        self.is_heard_at_once = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        self.status = 128 + number
        signal.signal(number, signal.SIG_DFL)
        if self.is_heard_at_once:
            raise Stopped(self.status)

    @contextlib.contextmanager
    def heard_at_once(self) -> Iterator[None]:
        """Raises Stopped inside at a signal, for what may take long and may be cut anywhere."""
        self.is_heard_at_once = True
        try:
            if self.status:
                raise Stopped(self.status)
            yield
        finally:
            self.is_heard_at_once = False

    def agree(self) -> None:
        """Raises Stopped in every process where any has heard a signal."""
        if status := max_over_processes(self.status):
            raise Stopped(status)


class Batches:
    """Endless (mel, wav) for this process, from where `state` stands.

    Raises:
        UserError: workers cannot be started.
    """

    def __init__(self, clips: MelDataset, state: State):
        keys = ResumableBatchSampler(
            len(clips),
            state.h,
            epoch=state.epoch,
            epoch_step=state.epoch_step,
            rank=rank(),
            world_size=world_size(),
        )
        self.has_workers = state.h.num_workers > 0
        # Of more workers than cores: they sleep most of the time.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = torch.utils.data.DataLoader(
            clips,
            batch_sampler=keys,
            num_workers=state.h.num_workers,
            timeout=LOOK_UP if self.has_workers else 0,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=state.device.type == "cuda",
        )
        if self.has_workers:
            make_room_for_workers()
        self.iterator = iter(loader)
        # PyTorch would raise an error for a worker that dies at any moment, amid an update too.
        # Without that, it is raised where the worker's batch is awaited.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def wait(self, request: StopRequest) -> list[torch.Tensor] | None:
        """The next; None at a signal, and where workers have none after LOOK_UP seconds."""
        try:
            if self.has_workers:  # a message between processes must not be cut
                return next(self.iterator)
            with request.heard_at_once():
                return next(self.iterator)
        except Stopped:
            return None
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            return None


def make_room_for_workers() -> None:
    """Sees that workers find what they need: locks, and a folder for sockets.

    Raises:
        UserError: there is none.
    """
    try:
        multiprocessing.Lock()
    except OSError as error:  # without /dev/shm
        reason = error.strerror or error
        raise UserError(f"data workers cannot be started ({reason}): {WORKERS_NEED}") from None
    tempfile.tempdir = find_temporary_folder()


def find_temporary_folder() -> str:
    """TMPDIR, or, where its path leaves no room for a worker's socket, a short folder.

    Raises:
        UserError: none can be written.
    """
    usual = tempfile.gettempdir()
    for folder in (usual, "/tmp", "/var/tmp", "/dev/shm"):
        is_short = len(os.fsencode(folder)) <= LONGEST_TEMPORARY_FOLDER
        if is_short and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(
        f"{usual}: too long a path for the sockets of data workers; set TMPDIR to a folder of at "
        f"most {LONGEST_TEMPORARY_FOLDER} bytes, or num_workers = 0 in the config"
    )


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and torchrun signal a whole group of processes; the parent still needs its data."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends it


def next_batch(batches: Batches, request: StopRequest, monitor: Monitor) -> list[torch.Tensor]:
    """(mel, wav), or, in every process at once, what ends the run.

    Raises:
        Stopped: a signal, in any process.
        UserError: an unusable clip, a worker that was killed, or logs that cannot be written.
    """
    batch, error = None, monitor.error
    while batch is None and error is None and not request.status:
        try:
            batch = batches.wait(request)
        except UserError as unusable:  # of a worker, after the worker's traceback
            error = UserError(str(unusable.args[0]).rsplit("env.UserError: ", 1)[-1])
        except (RuntimeError, OSError, EOFError, MemoryError) as trouble:
            if not is_want_of_room(trouble):
                raise
            error = UserError(f"a data worker was killed or had no room: {WORKERS_NEED}")
    agree_on_error(error)
    request.agree()
    return batch


def is_want_of_room(trouble: BaseException) -> bool:
    """True where memory, shared or not, ran out, and where a worker was killed, as for want of it.

    One that dies while its batch is fetched breaks the connection.
    """
    is_broken = isinstance(trouble, ConnectionError | EOFError)
    is_named = any(words in str(trouble) for words in WORKER_TROUBLE)
    return is_broken or is_named or is_out_of_memory(trouble)


def find_last_step(a: argparse.Namespace, state: State, steps_per_epoch: int) -> int:
    """Where --training_epochs or --training_steps ends the run, whichever comes first."""
    left_in_epochs = (a.training_epochs - state.epoch) * steps_per_epoch - state.epoch_step
    return min(state.steps + left_in_epochs, a.training_steps or NEVER)


def run(
    a: argparse.Namespace, state: State, clips: MelDataset, validation: MelDataset, update: Update
) -> int:
    """Trains until the last step, a signal, an unusable clip or unwritable logs, and saves.

    Returns the exit status.
    """
    folder, steps_per_epoch = Path(a.checkpoint_path), len(clips) // state.h.batch_size
    state.end_epoch(steps_per_epoch)  # the corpus may have shrunk since
    last_step, reason = find_last_step(a, state, steps_per_epoch), None
    if state.steps >= last_step:
        done = f"{state.steps} steps and {state.epoch} epochs are done"
        say(f"nothing to do: {done}; raise --training_steps or --training_epochs")
        return 0
    request = StopRequest()
    with raise_on_all_ranks():
        batches = Batches(clips, state)
    with contextlib.closing(Monitor(state, folder, last_step, a.eval_metrics)) as monitor:
        try:
            while state.steps < last_step:
                mel, wav = (x.to(state.device) for x in next_batch(batches, request, monitor))
                losses = update(state, mel, wav)
                count_update(state, losses, steps_per_epoch)
                report(a, state, losses, monitor)
                if state.steps % a.checkpoint_interval == 0:
                    monitor.flush()
                    save(state, folder, keep=a.keep_checkpoints)
                if state.steps % a.validation_interval == 0 and len(validation):
                    error = validate(state, validation, monitor, request)
                    monitor.validation(state, error)
        except (UserError, Stopped) as ending:
            reason = ending
        reason = save_rest(a, state, reason)
        if reason is None:
            monitor.finish()
    return end(state, folder, reason)


def save_rest(
    a: argparse.Namespace, state: State, reason: UserError | Stopped | None
) -> UserError | Stopped | None:
    """Saves what is not saved yet; returns `reason`, for which the run ends, or why it cannot."""
    if state.steps > state.saved_steps:
        try:
            save(state, Path(a.checkpoint_path), keep=a.keep_checkpoints)
        except UserError as unwritable:
            return unwritable
    return reason


def end(state: State, folder: Path, reason: UserError | Stopped | None) -> int:
    """Says or raises `reason`, in every process at once; returns the exit status."""
    if reason is None:
        say(f"{state.steps} steps are done, saved in {folder}")
        return 0
    for worker in multiprocessing.active_children():  # which may sleep, or wait for a slow disk
        worker.terminate()
    if isinstance(reason, Stopped):
        name = signal.Signals(reason.status - 128).name
        say(f"stopped by {name} after step {state.steps}, saved in {folder}")
        return reason.status
    agree_on_error(reason)


def report(a: argparse.Namespace, state: State, losses: Losses, monitor: Monitor) -> None:
    """Shows the losses of the last update, where it is time to."""
    if state.steps % a.stdout_interval == 0:
        check_losses(state, Path(a.checkpoint_path))
        monitor.progress(state, losses)
    if state.steps % a.summary_interval == 0:
        monitor.summary(state, losses)


def count_update(state: State, losses: Losses, steps_per_epoch: int) -> None:
    """Counts a completed update and notes, on the device, whether its losses were finite."""
    state.steps += 1
    state.epoch_step += 1
    state.end_epoch(steps_per_epoch)
    finite = torch.stack(list(losses.values())).isfinite().all()
    bad_step = state.first_bad_step.clamp(max=state.steps)
    state.first_bad_step = torch.where(finite, state.first_bad_step, bad_step)


# ------------------------------------------------------------------------------------- validation


def own_share(clips: MelDataset) -> list[int]:
    """The validation clips of this process; those to be shown are of the first, which writes."""
    owners = (0 if i < SHOWN_CLIPS else i % world_size() for i in range(len(clips)))
    return [i for i, owner in enumerate(owners) if owner == rank()]


@torch.no_grad()
def validate(state: State, clips: MelDataset, monitor: Monitor, request: StopRequest) -> float:
    """The mean mel error of whole clips, which the processes share out.

    Raises:
        Stopped: a signal, in any process.
        UserError: in every process, where a clip is unusable.
    """
    state.generator.eval()
    error_sum = torch.zeros((), device=state.device)
    # cuDNN would try its algorithms anew for the length of each clip.
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    with raise_on_all_ranks(), parametrize.cached():
        for index in own_share(clips):
            if request.status:
                break
            wav, wav_hat = vocode_whole(state, clips, index)
            mel, mel_hat = state.mel_for_loss(wav)[0], state.mel_for_loss(wav_hat)[0]
            error_sum += F.l1_loss(mel_hat, mel)
            if index < SHOWN_CLIPS:
                monitor.clip(state.steps, index, real=(wav, mel), generated=(wav_hat, mel_hat))
    torch.backends.cudnn.benchmark = benchmark
    state.generator.train()
    request.agree()
    return float(sum_over_processes(error_sum)) / len(clips)


def vocode_whole(state: State, clips: MelDataset, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole clip and what the generator makes of its mel, both [1, N].

    Raises:
        UserError: a clip that is unusable, or too long for the memory.
    """
    mel, wav = (x.to(state.device) for x in clips.whole(index))
    try:
        with state.autocast():
            return wav, state.generator(mel.unsqueeze(0))[0]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        clip, seconds = clips.path(index), wav.shape[1] / state.h.sampling_rate
        raise UserError(
            f"{clip}: {seconds:.0f} s, out of memory in validation; cut it or take it off the list"
        ) from None
