"""Measures models: size, arithmetic, speed and memory of inference, cost of a training step.

    python tools/benchmark.py --config config_v1.json config_v2.json
    python tools/benchmark.py --infer --memory --train --config config_v2.json --output results.json

What is compared runs in turns within one process, on random data: our generators beside HiFi-GAN's
of the same width as plain eager convolutions, our training step beside the textbook's (both from
tools/hifigan_reference.py). Figures are medians; quote the ratios. For Linux, whose files in /proc it reads.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from checkpoint import build_state
from distributed import computes_in_bfloat16, select_device, speed_up_cpu
from env import Config, load_config
from inference import stream, synthesize, to_inference
from meldataset import LogMelSpectrogram
from models import Discriminators, Generator
from tools import hifigan_reference as textbook
from train import training_step
from utils import (
    atomic_write,
    command_line,
    command_parser,
    is_out_of_memory,
    natural,
    positive,
)

ROOT = Path(__file__).parents[1]
MEASURED_FRAMES = 128  # a whole number of hops, from which a second is computed


class Spread(NamedTuple):
    """A median and its range."""

    low: float
    median: float
    high: float


Row = dict[str, str | int | float | Spread]  # of a table, by column


@dataclass
class Timing:
    """The seconds of each run of one contestant."""

    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def spread(self) -> Spread:
        """Of the seconds."""
        return spread_of(self.seconds)

    def speeds(self, audio_seconds: float) -> Spread:
        """Of the speeds, times real time, where each run makes so much audio."""
        return spread_of([audio_seconds / seconds for seconds in self.seconds])


def spread_of(values: list[float]) -> Spread:
    """The median of `values` and their range."""
    return Spread(min(values), statistics.median(values), max(values))


def parameters(module: nn.Module) -> int:
    """Parameters as one sees them in a paper: without weight norm's gains."""
    return sum(p.numel() for name, p in module.named_parameters() if "original0" not in name)


@torch.no_grad()
def macs_per_second(module: nn.Module, h: Config, *inputs: torch.Tensor) -> float:
    """Multiply-accumulates for a second of audio; `inputs` span MEASURED_FRAMES frames."""
    with FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    seconds = MEASURED_FRAMES * h.hop_size / h.sampling_rate
    return counter.get_total_flops() / 2 / seconds


def size_row(config: str) -> Row:
    """A row of the table of sizes."""
    h = load_config(config)
    generator, mult = Generator(h), h.discriminator_channel_mult
    generator_macs = macs_per_second(generator, h, torch.zeros(1, h.num_mels, MEASURED_FRAMES))
    with torch.device("meta"):  # counts need no values
        discriminators = Discriminators(h)
        # Counted on the textbook's, which are not folded; they take a real and a generated one.
        both = (textbook.MultiPeriod(mult), textbook.MultiScale(mult))
        by_the_book = both if h.uses_discriminators else ()
        wav = torch.zeros(1, 1, MEASURED_FRAMES * h.hop_size)
        discriminator_macs = sum(macs_per_second(each, h, wav, wav) / 2 for each in by_the_book)
    return {
        "config": config,
        "G parameters": parameters(generator),
        "G GMAC/s": generator_macs / 1e9,
        "D parameters": parameters(discriminators),
        "D GMAC/s": discriminator_macs / 1e9,
    }


def take_turns(contestants: dict[str, Timing], device: torch.device, repeats: int) -> None:
    """Times every contestant `repeats` times, in turns, after a round to warm up."""
    for turn in tqdm(range(repeats + 1), disable=None):
        for timing in contestants.values():
            start = time.perf_counter()
            timing.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:
                timing.seconds.append(time.perf_counter() - start)


# HiFi-GAN's config for each width of generator: what ours is compared with.
BASELINES = {
    512: "configs/hifigan_v1.json",
    256: "configs/hifigan_v3.json",
    128: "configs/hifigan_v2.json",
}
MATMUL_SIZE = 2048


def precisions(device: torch.device) -> tuple[str, ...]:
    """Those that a user would choose there."""
    return ("fp32", "bf16") if computes_in_bfloat16(device) else ("fp32",)


def inference_contestants(h: Config, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Generators at work on a random mel, and the machine's own matrix multiplication."""
    frames = math.ceil(seconds * h.sampling_rate / h.hop_size)
    generators = {f"ours, {p}": ready_generator(h, device, p) for p in precisions(device)}
    if h.uses_misr:
        generators["loop"] = ready_generator(h, device, "fp32")
        for misr in generators["loop"].resblocks:
            misr.forward = partial(textbook.misr_loop, misr)
    contestants = {
        name: Timing(partial(synthesize, generator, torch.randn(h.num_mels, frames) - 5))
        for name, generator in generators.items()
    }
    if h.upsample_initial_channel in BASELINES:
        plain_h = load_config(ROOT / BASELINES[h.upsample_initial_channel])
        plain = textbook.TextbookGenerator(plain_h).to(device).eval()
        textbook.remove_weight_norms(plain)
        frames = math.ceil(seconds * plain_h.sampling_rate / plain_h.hop_size)
        mel = torch.randn(1, plain_h.num_mels, frames, device=device) - 5
        contestants["plain"] = Timing(torch.inference_mode()(lambda: plain(mel)))
    for name in precisions(device):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
        contestants[f"matmul, {name}"] = Timing(lambda a=a: a @ a)
    return contestants


def ready_generator(h: Config, device: torch.device, precision: str) -> Generator:
    """A generator with random weights, as `load_generator` would give it."""
    torch.manual_seed(h.seed)
    return to_inference(Generator(h), device, precision)


def inference_row(config: str, seconds: int, device: torch.device, repeats: int) -> Row:
    """A row of the table of speeds."""
    h = load_config(config)
    contestants = inference_contestants(h, device, seconds)
    take_turns(contestants, device, repeats)
    macs = macs_per_second(Generator(h), h, torch.zeros(1, h.num_mels, MEASURED_FRAMES)) * seconds
    row = {"config": config, "s of audio": seconds}
    for precision in precisions(device):
        ours = contestants[f"ours, {precision}"]
        peak = MATMUL_SIZE**3 / contestants[f"matmul, {precision}"].spread().median
        row |= {
            f"{precision}: times real time": ours.speeds(seconds),
            f"{precision}: of plain fp32 HiFi-GAN": median_ratio(contestants.get("plain"), ours),
            f"{precision}: of matmul": macs / ours.spread().median / peak,
        }
    row["of the loop"] = median_ratio(contestants.get("loop"), contestants["ours, fp32"])
    return row


def median_ratio(slow: Timing | None, fast: Timing) -> float | str:
    """How many times as fast `fast` is: the median over turns; nothing where there is no `slow`."""
    if slow is None:
        return ""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def memory_row(config: str, minutes: float, chunk_frames: int, device: torch.device) -> Row:
    """A row of the table of memory; measured in a process of its own, for peaks do not fall."""
    row = {"config": config, "min of audio": minutes, "chunk_frames": chunk_frames or "whole"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        figures = pool.submit(stream_once, config, minutes, chunk_frames, device)
        try:
            megabytes, first, speed = figures.result()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, BrokenProcessPool) and not is_out_of_memory(error):
                raise  # a process that the system kills for its memory breaks the pool
            return row | {"peak MB": "out of memory", "first sound, s": "", "times real time": ""}
    return row | {"peak MB": round(megabytes), "first sound, s": first, "times real time": speed}


def stream_once(
    config: str, minutes: float, chunk_frames: int, device: torch.device
) -> tuple[float, float, float]:
    """(peak memory in MB, seconds until the first samples, times real time) of one long mel."""
    if device.type == "cpu":
        speed_up_cpu()  # as the scripts are; and fail, where the machine would begin to swap
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    h = load_config(config)
    generator = ready_generator(h, device, "fp32")
    frames = math.ceil(minutes * 60 * h.sampling_rate / h.hop_size)
    mel = torch.randn(h.num_mels, frames) - 5
    start = time.perf_counter()
    pieces = (piece.cpu() for piece in stream(generator, mel, chunk_frames))
    samples = len(next(pieces))
    first = time.perf_counter() - start
    samples += sum(len(piece) for piece in pieces)
    speed = samples / h.sampling_rate / (time.perf_counter() - start)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6, first, speed
    # Linux's own count: getrusage's would begin with the parent's.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6, first, speed


def training_contestants(
    h: Config, device: torch.device, compiled: bool = False
) -> dict[str, Timing]:
    """The textbook's step and ours, on the same random batch."""
    torch.manual_seed(h.seed)
    mel = torch.randn(h.batch_size, h.num_mels, h.segment_size // h.hop_size, device=device) - 5
    wav = 0.1 * torch.randn(h.batch_size, 1, h.segment_size, device=device)
    states = {precision: build_state(h, device, precision) for precision in precisions(device)}
    if compiled:
        precision = precisions(device)[-1]
        state = states[f"{precision}, compiled"] = build_state(h, device, precision)
        state.generator.compile()
        state.discriminators.compile()
    ours = {f"ours, {p}": Timing(lambda s=s: training_step(s, mel, wav)) for p, s in states.items()}
    return {"textbook, fp32": Timing(textbook_update(h, device, mel, wav)), **ours}


def textbook_update(
    h: Config, device: torch.device, mel: torch.Tensor, wav: torch.Tensor
) -> Callable:
    """HiFi-GAN's step with the generator of `h`."""
    generator = Generator(h).to(device)
    mult = h.discriminator_channel_mult
    mpd, msd = textbook.MultiPeriod(mult).to(device), textbook.MultiScale(mult).to(device)
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss).to(device)
    discriminators = itertools.chain(msd.parameters(), mpd.parameters())
    optim_g, optim_d = (
        torch.optim.AdamW(p, h.learning_rate, betas=(h.adam_b1, h.adam_b2))
        for p in (generator.parameters(), discriminators)
    )
    return lambda: textbook.textbook_step(
        generator, mpd, msd, optim_g, optim_d, log_mel, mel=mel, wav=wav
    )


def training_rows(
    config: str, batch_size: int, device: torch.device, repeats: int, compiled: bool
) -> Iterator[Row]:
    """Rows of the table of training steps."""
    h = replace(load_config(config), batch_size=batch_size)
    contestants = training_contestants(h, device, compiled)
    take_turns(contestants, device, repeats)
    for name, timing in contestants.items():
        yield {
            "config": config,
            "batch": batch_size,
            "step": name,
            "seconds": timing.spread(),
            "times as fast": median_ratio(contestants["textbook, fp32"], timing),
        }


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on, and of which commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpus = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{cpus[0] if cpus else platform.machine()}, {torch.get_num_threads()} threads"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    return {"device": f"{device.type}: {name}", **versions, "commit": commit}


def tables(a: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Iterator[Row]]]:
    """The tables that the flags ask for: names and rows, measured as they are drawn."""
    yield "sizes", map(size_row, a.config)
    if a.infer:
        cases = itertools.product(a.config, a.seconds)
        yield "inference", (inference_row(*case, device, a.repeats) for case in cases)
    if a.memory:
        cases = itertools.product(a.config, a.minutes, a.chunk_frames)
        yield "memory", (memory_row(*case, device) for case in cases)
    if a.train:
        cases = itertools.product(a.config, a.batch_size)
        rows = (training_rows(*case, device, a.repeats, a.compile) for case in cases)
        yield "training", itertools.chain.from_iterable(rows)


def show(rows: Iterator[Row]) -> list[Row]:
    """Prints rows in markdown as they come, and returns them."""
    shown = []
    for row in rows:
        if not shown:
            print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
        print(f"| {' | '.join(map(cell, row.values()))} |", flush=True)
        shown.append(row)
    return shown


def cell(value: str | int | float | Spread) -> str:
    """A value as a reader wants it: three digits, ranges in brackets."""
    if isinstance(value, Spread):
        low, median, high = map(cell, value)
        return f"{median} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
    return f"{value:,}" if isinstance(value, int) else value


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(
        "Measures models: parameters and multiply-accumulates for a second of audio, and more.",
        example="python tools/benchmark.py --infer --config config_v2.json --seconds 1 20",
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        default=["config_v1.json", "config_v2.json"],
        help="JSON configs; weights are random",
    )
    what.add_argument(
        "--infer",
        action="store_true",
        help="also the speed of inference, beside HiFi-GAN's generator of the same width",
    )
    what.add_argument(
        "--memory", action="store_true", help="also the memory and the first sound of long mels"
    )
    what.add_argument(
        "--train",
        action="store_true",
        help="also the time of a training step, beside HiFi-GAN's textbook step",
    )
    what.add_argument("--compile", action="store_true", help="with --train, also torch.compile")
    size = parser.add_argument_group("how much of it; several values make several rows")
    several = {"nargs": "+", "metavar": "N"}
    size.add_argument(
        "--seconds", type=positive, default=[1, 4, 20], help="of audio, for --infer", **several
    )
    size.add_argument(
        "--minutes", type=positive, default=[1, 10, 60], help="of audio, for --memory", **several
    )
    size.add_argument(
        "--chunk_frames",
        type=natural,
        default=[0, 1024, 32],
        help="mel frames at once, for --memory; 0: whole",
        **several,
    )
    size.add_argument(
        "--batch_size", type=positive, default=[4, 16], help="segments in a step", **several
    )
    size.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="turns; medians are shown"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument("--output", metavar="JSON", help="file for all figures")
    return parser.parse_args()


def main() -> None:
    """Prints tables in markdown."""
    a = parse_arguments()
    device = select_device(a.device)
    if device.type == "cpu":
        speed_up_cpu()
    torch.backends.cudnn.benchmark = a.train  # as in train.py; inference has lengths of all kinds
    results = {"machine": machine(device)}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for name, rows in tables(a, device):
        print()
        results[name] = show(rows)
    if a.output:
        with atomic_write(a.output) as temporary:
            temporary.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    command_line(main)
