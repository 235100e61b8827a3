"""Tables of measurements in Markdown, for tools/benchmark.py and tools/runtimes.py."""

import math
import platform
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import commit


class MedianRange(NamedTuple):
    """A median and its range."""

    low: float
    median: float
    high: float


def median_range(values: list[float]) -> MedianRange:
    """Returns the median of `values` and their range."""
    return MedianRange(min(values), statistics.median(values), max(values))


Row = dict[str, str | int | float | MedianRange]  # of a table, by column


def machine(device: torch.device) -> dict[str, str]:
    """Returns what the figures depend on: device, versions and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpus = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{cpus[0] if cpus else platform.machine()}, {torch.get_num_threads()} threads"
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    return {"device": f"{device.type}: {name}", **versions, "commit": commit()}


def print_table(rows: Iterable[Row]) -> list[Row]:
    """Prints rows as a Markdown table as they come, and returns them."""
    printed = []
    for row in rows:
        if not printed:
            print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
        print(f"| {' | '.join(map(cell, row.values()))} |", flush=True)
        printed.append(row)
    return printed


def cell(value: str | int | float | MedianRange) -> str:
    """Returns a value with three significant digits; the range of a median is in brackets."""
    if isinstance(value, MedianRange):
        low, median, high = map(cell, value)
        return f"{median} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
    return f"{value:,}" if isinstance(value, int) else value
