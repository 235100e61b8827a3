"""The device, the processes and the stop signals of a run, for one process and for many."""

import contextlib
import ctypes
import functools
import logging
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from env import UsageError, UserError

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
CPU_INFO = Path("/proc/cpuinfo")
PROCESS_TIMEOUT = timedelta(minutes=10)  # that a process waits for the others
SHUTDOWN_TIMEOUT = 600  # seconds that torchrun gives the processes to save
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MIN_OPEN_FILES = 64  # for each process; each data worker adds to it
OPEN_FILES_PER_WORKER = 16
# SIGUSR1, SIGUSR2 and SIGXCPU are what schedulers such as SLURM send before a job's time is over.
STOP_SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
# A scheduler signals all processes, and torchrun passes its own signal on, so that one request
# arrives twice.
SAME_REQUEST = 3.0  # seconds


# ------------------------------------------------------------------------------------- the device


def select_device(name: str) -> torch.device:
    """Returns the device called `auto`, `cpu`, `cuda` or `cuda:<index>`.

    `auto` is CUDA where it is available, else the CPU. `cuda` is the GPU of this process's rank.

    Raises:
        UsageError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:<index>")
    if device.type == "cpu":
        return device
    if device.index is not None and world_size() > 1:
        raise UsageError(f"--device {name}: expected cuda, because each process has its own GPU")
    index = device.index if device.index is not None else _number("LOCAL_RANK", default=0)
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"--device {name}: this machine has {count} CUDA devices; try --device cpu"
        )
    return torch.device("cuda", index)


@functools.cache
def computes_in_bfloat16(device: torch.device) -> bool:
    """Returns False if the device does not support bfloat16. Such a CPU is ten times slower in it.

    Only Linux lists the features of a CPU. Other systems are assumed to support bfloat16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not CPU_INFO.exists() or "bf16" in CPU_INFO.read_text()


def speed_up_cpu() -> None:
    """Makes long inputs up to twice as fast on CPUs, by settings of the whole process.

    For commands and services only, not for libraries: denormals are flushed to zero, also in later
    threads, and glibc keeps freed memory for the process.
    """
    torch.set_flush_denormal(True)  # silence produces denormals, which are slow
    if platform.libc_ver()[0] == "glibc":
        # By default, large blocks are returned when freed and are mapped anew, page by page.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------------------------- the processes


def rank() -> int:
    """Returns the number of this process among all machines' processes. Process 0 writes files."""
    return _number("RANK", default=0)


def world_size() -> int:
    """Returns the number of processes of this run, on all machines."""
    return _number("WORLD_SIZE", default=1)


def _number(name: str, default: int) -> int:
    """Returns a variable of torchrun. Raises UsageError if it is not a number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: expected a number, as torchrun sets it; or unset {name}")
    return int(text)


def check_environment(num_workers: int) -> None:
    """Checks torchrun's variables and the limit of open files, for `num_workers` data workers.

    Raises:
        UsageError: only some of torchrun's variables are set, or they are not usable numbers.
        UserError: the limit of open files is too low.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if given and missing:
        raise UsageError(
            f"{given[0]}={os.environ[given[0]]} is set, but not {', '.join(missing)}: expected "
            f"all variables of torchrun or none; to train without torchrun, unset {given[0]}"
        )
    if rank() >= world_size():  # it would wait for the others in vain
        raise UsageError(f"RANK={rank()}: expected less than WORLD_SIZE={world_size()}")
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MIN_OPEN_FILES + OPEN_FILES_PER_WORKER * num_workers
    if limit < needed:
        raise UserError(
            f"the limit of open files is {limit}: expected at least {needed} with num_workers = "
            f"{num_workers}; raise it by `ulimit -n {max(1024, needed)}`"
        )


def count_processes(device: str) -> int:
    """Returns the number of processes to train with: torchrun's, or one for each GPU."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return gpus if gpus > 1 and "RANK" not in os.environ else world_size()


def launch(processes: int) -> int:
    """Runs this command under torchrun as `processes` processes; returns the exit status.

    Raises:
        UserError: a process was killed.
    """
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT))
    logging.disable(logging.CRITICAL)  # the training processes print all messages

    def pass_on(number: int, _frame) -> None:
        raise SignalException(f"received signal {number}", sigval=signal.Signals(number))

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
        else:  # SIGHUP under nohup. torchrun would install a handler; a blocked signal has none.
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        torchrun.main(["--standalone", f"--nproc_per_node={processes}", *sys.argv])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        # The process that failed first. torchrun then ends the others by SIGTERM.
        until = error.get_first_failure()[1].timestamp + 1  # second
        failures = [each for each in error.failures.items() if each[1].timestamp <= until]
        number, failure = min(
            failures, key=lambda each: (each[1].exitcode == -signal.SIGTERM, each[1].exitcode >= 0)
        )
        if failure.exitcode >= 0:
            return failure.exitcode
        raise UserError(
            f"process {number} was ended by {signal.Signals(-failure.exitcode).name} (out of "
            "memory?); run the command again to continue from the last checkpoint"
        ) from None
    return 0


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, and leaves them at the end of the block.

    Raises:
        UserError: another process has ended or cannot be reached.
    """
    try:
        init_processes(device)
        yield
    except UserError:
        leave_processes()  # every process raises one at the same point: see agree_on_error
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise UserError(
            "another process of the run has ended or cannot be reached; run the command again to "
            "continue from the last checkpoint"
        ) from None
    leave_processes()


def init_processes(device: torch.device) -> None:
    """Joins the processes that torchrun started: nccl for GPU tensors, gloo for CPU tensors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PROCESS_TIMEOUT)
    except ValueError as error:  # of the variables of torchrun
        address, port = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UsageError(f"MASTER_ADDR={address}, MASTER_PORT={port}: {error}") from None


def leave_processes() -> None:
    """Waits for the other processes and disconnects; does nothing in a run of one process."""
    if dist.is_initialized():
        dist.barrier()  # a process that disconnects early would break the others' last message
        dist.destroy_process_group()


def is_lost_connection(error: RuntimeError) -> bool:
    """Returns True for the error of a connection to a process that has ended."""
    # Gloo raises a plain RuntimeError, which names its source file.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def as_ddp(module: nn.Module, device: torch.device) -> nn.Module:
    """Returns `module` wrapped so that its gradients are averaged over the processes.

    Returns `module` itself in a run of one process, or without trainable parameters.
    """
    if world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids)


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Returns the sum of `value` over all processes, in each process."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Returns the mean of `value` over all processes, in each process."""
    return sum_over_processes(value) / world_size()


def max_over_processes(value: int) -> int:
    """Returns the largest `value` of all processes, in each process."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def agree_on_error(error: UserError | None) -> None:
    """Raises UserError in every process if any process has an `error`.

    The lowest rank that has a message raises its error. Other ranks raise an empty error, so that
    the message is printed once.
    """
    has_message = error is not None and str(error)
    first = -max_over_processes(-rank() if has_message else -world_size())
    if first < world_size():
        raise error if first == rank() else UserError()


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raises UserError in every process if the block raises one in any: see `agree_on_error`."""
    error = None
    try:
        yield
    except UserError as own:
        error = own
    agree_on_error(error)


# --------------------------------------------------------------------------------------- stopping


class Stopped(BaseException):
    """A signal asks the run to save and to end with `status`."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class StopRequest:
    """Notes a stop signal, so that the run can stop at the end of a step.

    A second signal, after SAME_REQUEST seconds, ends the process at once. A signal that is ignored
    at the start, such as SIGHUP under nohup, stays ignored. `status` is the exit status of the run:
    128 + signal, or 0 without a signal.
    """

    def __init__(self):
        self.status, self.received, self.is_interruptible = 0, 0.0, False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        if not self.status:
            self.status, self.received = 128 + number, time.monotonic()
        elif time.monotonic() - self.received > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.is_interruptible:
            raise Stopped(self.status)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises Stopped in the block at a signal, for work that may be cut off anywhere."""
        self.is_interruptible = True
        try:
            if self.status:
                raise Stopped(self.status)
            yield
        finally:
            self.is_interruptible = False

    def agree(self) -> None:
        """Raises Stopped in every process if any process has received a signal."""
        if status := max_over_processes(self.status):
            raise Stopped(status)
