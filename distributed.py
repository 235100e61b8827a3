"""The device and the processes of a run: one process and many go the same way."""

import contextlib
import ctypes
import functools
import os
import platform
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
# A process that hears nothing from the others for so long gives up.
PROCESS_TIMEOUT = timedelta(minutes=10)


def select_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:<index>`.

    `auto` is CUDA where there is any, else the CPU; `cuda` is the GPU of this process's local rank.

    Raises:
        UsageError: no such device here.
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
        raise UsageError(f"--device {name}: expected cuda, for several processes have a GPU each")
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"--device {name}: this machine has {count} CUDA devices; try --device cpu"
        )
    return torch.device("cuda", index)


@functools.cache
def computes_in_bfloat16(device: torch.device) -> bool:
    """False where bfloat16 is slower than float32: on a processor that has none, ten times.

    Of processors only Linux tells; others are taken to have it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not CPU_INFO.exists() or "bf16" in CPU_INFO.read_text()


def speed_up_cpu() -> None:
    """Sets this process up for speed on CPUs, for good: twice as fast on long inputs.

    For commands and services that do nothing else: denormals are flushed to zero, in threads that
    start later too, and glibc keeps all memory that any code of the process frees.
    """
    torch.set_flush_denormal(True)  # numbers near zero, as silence makes, are slow otherwise
    if platform.libc_ver()[0] == "glibc":
        # By default large blocks go back to the system when freed, and come anew, page by page.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def rank() -> int:
    """The number of this process among all, of all machines; 0 is the one that writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes of this run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_processes(device: torch.device) -> None:
    """Joins the processes that torchrun started: nccl for GPU tensors, gloo for CPU tensors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1:
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PROCESS_TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=PROCESS_TIMEOUT)


def leave_processes() -> None:
    """Takes leave of the other processes; does nothing in a run of one."""
    if dist.is_initialized():
        dist.barrier()  # none may close its end while another still speaks
        dist.destroy_process_group()


def is_lost_connection(error: RuntimeError) -> bool:
    """True where another process of the run was not there to speak to."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def as_ddp(module: nn.Module, device: torch.device) -> nn.Module:
    """`module`, averaging its gradients, if it has any, where there are several processes."""
    if world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids)


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all processes, given to each; `value` itself in a run of one."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of `value` over all processes, given to each; `value` itself in a run of one."""
    return sum_over_processes(value) / world_size()


def max_over_processes(value: int) -> int:
    """The largest `value` of all processes, given to each: how they agree on what comes next."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def agree_on_error(error: UserError | None) -> None:
    """Raises UserError in every process where any has an `error`.

    The first of those that have one raises it, the others one without words: it is said once.
    """
    has_words = error is not None and str(error)
    speaker = -max_over_processes(-rank() if has_words else -world_size())
    if speaker < world_size():
        raise error if speaker == rank() else UserError()


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raises UserError in every process where it is raised inside in any, as `agree_on_error`."""
    error = None
    try:
        yield
    except UserError as own:
        error = own
    agree_on_error(error)
