"""The loop that train.py and distill.py share.

    batch -> update -> report -> save -> validate

until the last step, a signal or an error, in every process of the run at the same step.
"""

import argparse
import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from checkpoint import NEVER, State, check_losses, save
from distributed import (
    agree_on_error,
    leave_processes,
    max_over_processes,
    rank,
    sum_over_processes,
    world_size,
)
from env import UserError
from meldataset import EndlessBatches, MelDataset
from monitor import Monitor
from utils import is_out_of_memory, say

SHOWN_CLIPS = 5  # of the validation clips go to TensorBoard, as in HiFi-GAN
LONGEST_TEMPORARY_FOLDER = 60  # characters: a socket's path has 108, of which workers need 40

Losses = dict[str, torch.Tensor]  # scalars by name, on the device
Update = Callable[[State, torch.Tensor, torch.Tensor], Losses]  # of (state, mel, wav)

# --------------------------------------------------------------------------------------- the loop


class Stopped(Exception):
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
        """Raises Stopped inside at a signal, for what may wait for long and may be cut short."""
        self.is_heard_at_once = True
        try:
            if self.status:
                raise Stopped(self.status)
            yield
        finally:
            self.is_heard_at_once = False


def make_batches(clips: MelDataset, state: State) -> Iterator[list[torch.Tensor]]:
    """Endless (mel, wav) for this process, from where `state` stands."""
    keys = EndlessBatches(
        len(clips),
        state.h,
        epoch=state.epoch,
        epoch_step=state.epoch_step,
        rank=rank(),
        world_size=world_size(),
    )
    if len(tempfile.gettempdir()) > LONGEST_TEMPORARY_FOLDER:  # the workers' sockets lie there
        tempfile.tempdir = "/tmp"
    loader = torch.utils.data.DataLoader(
        clips,
        batch_sampler=keys,
        num_workers=state.h.num_workers,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=state.device.type == "cuda",
    )
    batches = iter(loader)
    # PyTorch would raise an error for a worker that dies at any moment, amid an update too. Without
    # that, it is raised where the worker's batch is awaited.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and torchrun signal a whole group of processes; the parent still needs its data."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends it


def next_batch(
    batches: Iterator[list[torch.Tensor]], request: StopRequest, monitor: Monitor
) -> list[torch.Tensor]:
    """(mel, wav), or, in every process at once, what ends the run.

    Raises:
        Stopped: a signal, in any process.
        UserError: an unusable clip, a worker that was killed, or logs that cannot be written.
    """
    batch, error = None, monitor.error
    try:
        with request.heard_at_once():
            batch = next(batches)
    except Stopped:
        pass
    except UserError as unusable:  # of a worker, after the worker's traceback
        error = UserError(str(unusable.args[0]).rsplit("env.UserError: ", 1)[-1])
    except (RuntimeError, OSError) as killed:
        if not any(
            word in str(killed) for word in ("DataLoader worker", "shared memory", "torch_")
        ):
            raise
        error = UserError(
            "a data worker was killed or had no room: too little memory, or /dev/shm too small; "
            "with num_workers = 0 in the config there are no workers"
        )
    agree_on_error(error)
    if status := max_over_processes(request.status):
        raise Stopped(status)
    return batch


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
    request, batches = StopRequest(), make_batches(clips, state)
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
                    monitor.validation(state, validate(state, validation, monitor))
        except (UserError, Stopped) as ending:
            reason = ending
        if state.steps > state.saved_steps:
            save(state, folder, keep=a.keep_checkpoints)
        if reason is None:
            monitor.finish()
    if isinstance(reason, Stopped):
        name = signal.Signals(reason.status - 128).name
        say(f"stopped by {name} after step {state.steps}, saved in {folder}")
        return reason.status
    if reason:
        leave_processes()  # all are here, whichever has the error
        raise reason
    return 0


def report(a: argparse.Namespace, state: State, losses: Losses, monitor: Monitor) -> None:
    """Shows the losses of the last update, where it is time to."""
    if state.steps % a.stdout_interval == 0:
        check_losses(state, Path(a.checkpoint_path))
        monitor.progress(state, losses)
    if state.steps % a.summary_interval == 0:
        monitor.summary(state, losses)


def count_update(state: State, losses: dict[str, torch.Tensor], steps_per_epoch: int) -> None:
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
def validate(state: State, clips: MelDataset, monitor: Monitor) -> float:
    """The mean mel error of whole clips, which the processes share out.

    Raises:
        UserError: in every process, where a clip is unusable.
    """
    state.generator.eval()
    error_sum, error = torch.zeros((), device=state.device), None
    # cuDNN would try its algorithms anew for the length of each clip.
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with parametrize.cached():
            for index in own_share(clips):
                wav, wav_hat = vocode_whole(state, clips, index)
                mel, mel_hat = state.mel_for_loss(wav)[0], state.mel_for_loss(wav_hat)[0]
                error_sum += F.l1_loss(mel_hat, mel)
                if index < SHOWN_CLIPS:
                    monitor.clip(state.steps, index, real=(wav, mel), generated=(wav_hat, mel_hat))
    except UserError as unusable:
        error = unusable
    agree_on_error(error)
    torch.backends.cudnn.benchmark = benchmark
    state.generator.train()
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
        clip, seconds = clips.wavs_dir / clips.clips[index], wav.shape[1] / state.h.sampling_rate
        raise UserError(
            f"{clip}: {seconds:.0f} s, out of memory in validation; cut it or take it off the list"
        ) from None
