"""Batches for training: starts data workers, waits for them, and names their failures."""

import multiprocessing.util
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator

import torch

from distributed import STOP_SIGNALS, Stopped, StopRequest, agree_on_error, rank, world_size
from env import UserError
from meldataset import MelDataset, ResumableBatchSampler
from utils import is_out_of_memory

MAX_TMPDIR_BYTES = 60  # data workers add 45 bytes; the path of a socket has at most 107
WORKERS_NEED = (
    "out of memory, or /dev/shm is too small or not writable; with num_workers = 0 in the config "
    "there are no workers"
)


def training_batches(
    clips: MelDataset, *, epoch: int, epoch_step: int, pin_memory: bool
) -> Iterator[list[torch.Tensor]]:
    """Returns an endless iterator over this process's batches (mel, wav).

    The first batch is that of step `epoch_step` of `epoch`. `pin_memory` is for GPUs.

    Raises:
        UserError: data workers cannot be started.
    """
    num_workers = clips.h.num_workers
    sampler = ResumableBatchSampler(
        len(clips),
        clips.h,
        epoch=epoch,
        epoch_step=epoch_step,
        rank=rank(),
        world_size=world_size(),
    )
    # More workers than cores are fine, because they mostly wait.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = torch.utils.data.DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=pin_memory,
    )
    try:
        if num_workers > 0:  # they send batches through sockets in a temporary folder
            if len(os.fsencode(tempfile.gettempdir())) > MAX_TMPDIR_BYTES:
                tempfile.tempdir = "/tmp"
            # If one of them fails, it fails here. In a worker, PyTorch would print a traceback.
            multiprocessing.util.get_temp_dir()
            multiprocessing.Lock()
        batches = iter(loader)
    except OSError as error:
        reason = f"data workers cannot be started ({error.strerror or error})"
        raise UserError(f"{reason}: {WORKERS_NEED}") from None
    # PyTorch's handler would raise an error for a dead worker at any time, even in an update. By
    # default it is raised while waiting for the worker's batch.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def _leave_signals_to_parent(_worker: int) -> None:
    """Lets a data worker ignore stop signals of the process group; its parent needs the data."""
    os.setpgrp()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent ends its workers with it


def next_batch(
    batches: Iterator[list[torch.Tensor]], stop: StopRequest, error: UserError | None
) -> list[torch.Tensor]:
    """Returns the next (mel, wav). An error or a signal in one process is raised in all.

    Raises:
        Stopped: a process received a signal.
        UserError: a clip is unusable, a data worker was killed, or a process has an `error`.
    """
    batch = None
    try:
        if error is None:
            with stop.interruptible():
                batch = next(batches)
    except Stopped:
        pass
    except UserError as unusable:  # in a worker; PyTorch puts its traceback before the message
        error = UserError(str(unusable.args[0]).rsplit("env.UserError: ", 1)[-1])
    except (RuntimeError, OSError, EOFError, MemoryError) as trouble:
        if not is_lost_worker(trouble):
            raise
        error = UserError(f"a data worker was killed or could not allocate: {WORKERS_NEED}")
    agree_on_error(None if stop.status else error)  # the signal may have killed the worker, too
    stop.agree()
    return batch


def is_lost_worker(error: BaseException) -> bool:
    """Returns True if a data worker was killed or had no memory, shared or not."""
    # PyTorch raises plain RuntimeErrors. A worker that dies during a transfer breaks a connection.
    texts = ("DataLoader worker (pid", "shared memory", "</torch_")
    is_broken = isinstance(error, ConnectionError | EOFError)
    return is_broken or is_out_of_memory(error) or any(text in str(error) for text in texts)
