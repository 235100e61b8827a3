"""Measures a model: parameters, arithmetic, speed and memory of inference, time of a training step.

    python tools/benchmark.py --config config_v1.json config_v2.json
    python tools/benchmark.py --infer --stream --memory --train --config config_v2.json

--infer compares generators with HiFi-GAN's generator of the same width, --train compares the
training step with HiFi-GAN's; both references are plain eager PyTorch (tools/hifigan_reference.py).
All contestants run in turns in one process, on random data. The figures are medians over turns,
with their range. Ratios depend less on the machine than times do. Linux only: it reads /proc.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
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
from inference import Streamer, stream, synthesize, to_inference
from meldataset import LogMelSpectrogram
from models import Discriminators, Generator
from tools import hifigan_reference
from tools.tables import MedianRange, Row, machine, median_range, print_table
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
MEASURED_FRAMES = 128  # from which the arithmetic of a second is extrapolated
MATMUL_SIZE = 2048
# HiFi-GAN's config for each width of generator.
BASELINES = {
    512: "configs/hifigan_v1.json",
    256: "configs/hifigan_v3.json",
    128: "configs/hifigan_v2.json",
}
REFERENCE_STEP = "HiFi-GAN, fp32"
GPU_SECONDS = 15  # for the turns of a row; five rows of one config then take less than two minutes
CUDNN_SEARCH = 3  # algorithms that cuDNN tries for each convolution; its default takes minutes


class Limits(NamedTuple):
    """The number of turns, and the seconds after which no further turn starts."""

    repeats: int
    seconds: float = math.inf


@dataclass
class Timing:
    """A function and the seconds that each of its runs took."""

    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def speeds(self, audio_seconds: float) -> MedianRange:
        """Returns the real-time factors of runs that make `audio_seconds` of audio each."""
        return median_range([audio_seconds / seconds for seconds in self.seconds])


def parameters(module: nn.Module) -> int:
    """Counts parameters as papers do: without the gains of weight norm."""
    return sum(p.numel() for name, p in module.named_parameters() if "original0" not in name)


@torch.no_grad()
def macs_per_second(module: nn.Module, h: Config, *inputs: torch.Tensor) -> float:
    """Returns multiply-accumulates per second of audio; `inputs` span MEASURED_FRAMES frames."""
    with FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    seconds = MEASURED_FRAMES * h.hop_size / h.sampling_rate
    return counter.get_total_flops() / 2 / seconds


def size_row(config: str) -> Row:
    """Returns a row of the table of sizes: generator (G) and discriminators (D)."""
    h = load_config(config)
    generator = Generator(h)
    with torch.device("meta"):  # counts need no values
        discriminators = Discriminators(h)
    return {
        "config": config,
        "G parameters": parameters(generator),
        "G GMAC/s": generator_macs(h) / 1e9,
        "D parameters": parameters(discriminators),
        "D GMAC/s": discriminator_macs(h) / 1e9,
    }


def generator_macs(h: Config) -> float:
    """Returns the generator's multiply-accumulates per second of audio."""
    return macs_per_second(Generator(h), h, torch.zeros(1, h.num_mels, MEASURED_FRAMES))


def discriminator_macs(h: Config) -> float:
    """Returns the multiply-accumulates of MPD and MSD per second of audio, 0 without them.

    The reference takes two waveforms, real and generated, so its count is halved.
    """
    if not h.uses_discriminators:
        return 0
    with torch.device("meta"):
        wav = torch.zeros(1, 1, MEASURED_FRAMES * h.hop_size)
        mult = h.discriminator_channel_mult
        pair = hifigan_reference.MultiPeriod(mult), hifigan_reference.MultiScale(mult)
        return sum(macs_per_second(each, h, wav, wav) / 2 for each in pair)


def take_turns(contestants: dict[str, Timing], device: torch.device, limits: Limits) -> None:
    """Times all contestants in turns, after one turn to warm up.

    Takes `limits.repeats` turns, or fewer if these take longer than `limits.seconds`, at least one.
    """
    begin = time.perf_counter()
    for turn in tqdm(range(limits.repeats + 1), disable=None):
        if turn > 1 and time.perf_counter() - begin > limits.seconds:
            break
        for timing in contestants.values():
            start = time.perf_counter()
            timing.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:
                timing.seconds.append(time.perf_counter() - start)


def median_ratio(slow: Timing | None, fast: Timing) -> float | str:
    """Returns the median over turns of the ratio of both times, or "" without `slow`."""
    if slow is None:
        return ""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


# ------------------------------------------------------------------------------------- inference


def precisions(device: torch.device) -> tuple[str, ...]:
    """Returns the precisions that are fast on `device`."""
    return ("fp32", "bf16") if computes_in_bfloat16(device) else ("fp32",)


def new_generator(h: Config, device: torch.device, precision: str) -> Generator:
    """Returns a generator with random weights, in the form that `load_generator` returns."""
    torch.manual_seed(h.seed)
    return to_inference(Generator(h), device, precision)


def random_mel(h: Config, seconds: float) -> torch.Tensor:
    """Returns a random log-mel [num_mels, T] of at least `seconds`."""
    return torch.randn(h.num_mels, math.ceil(seconds * h.sampling_rate / h.hop_size)) - 5


def inference_contestants(h: Config, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Returns generators on a random mel, and the machine's matrix multiplication."""
    generators = {f"ours, {p}": new_generator(h, device, p) for p in precisions(device)}
    if h.uses_misr:
        generators["loop"] = new_generator(h, device, "fp32")
        for misr in generators["loop"].resblocks:
            misr.forward = partial(hifigan_reference.misr_loop, misr)
    contestants = {
        name: Timing(partial(synthesize, generator, random_mel(h, seconds)))
        for name, generator in generators.items()
    }
    if h.upsample_initial_channel in BASELINES:
        contestants["HiFi-GAN"] = plain_hifigan(h.upsample_initial_channel, device, seconds)
    for name in precisions(device):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
        contestants[f"matmul, {name}"] = Timing(lambda a=a: a @ a)
    return contestants


def plain_hifigan(channels: int, device: torch.device, seconds: float) -> Timing:
    """Returns HiFi-GAN's generator of that width, eager, in fp32."""
    h = load_config(ROOT / BASELINES[channels])
    generator = hifigan_reference.TextbookGenerator(h).to(device).eval()
    hifigan_reference.remove_weight_norms(generator)
    mel = random_mel(h, seconds)[None].to(device)
    return Timing(torch.inference_mode()(lambda: generator(mel)))


def inference_row(config: str, seconds: int, device: torch.device, limits: Limits) -> Row:
    """Returns a row of the table of speeds."""
    h = load_config(config)
    contestants = inference_contestants(h, device, seconds)
    take_turns(contestants, device, limits)
    row = {"config": config, "audio (s)": seconds}
    for precision in precisions(device):
        ours = contestants[f"ours, {precision}"]
        matmul = statistics.median(contestants[f"matmul, {precision}"].seconds)
        macs_per_matmul = MATMUL_SIZE**3 / matmul
        achieved = generator_macs(h) * seconds / statistics.median(ours.seconds)
        row |= {
            f"{precision}: times real time": ours.speeds(seconds),
            f"{precision}: times HiFi-GAN fp32": median_ratio(contestants.get("HiFi-GAN"), ours),
            f"{precision}: MAC/s per MAC/s of matmul": achieved / macs_per_matmul,
        }
    row["fp32: times the MISR loop"] = median_ratio(
        contestants.get("loop"), contestants["ours, fp32"]
    )
    return row


# ------------------------------------------------------------------------------ streams and memory


def stream_row(config: str, seconds: int, frames: int, device: torch.device) -> Row:
    """Returns a row of the table of streams: a mel of `seconds`, fed `frames` frames at a time.

    The speed is the median over pieces.
    """
    h = load_config(config)
    mel = random_mel(h, seconds)
    streamer, pieces = Streamer(new_generator(h, device, "fp32")), mel.split(frames, dim=1)
    times = []
    for piece in pieces:
        begin = time.perf_counter()
        streamer.feed(piece).cpu()
        times.append(time.perf_counter() - begin)
    warm = times[math.ceil(streamer.latency / frames) + 1 : -1] or times
    return {
        "config": config,
        "threads": torch.get_num_threads(),
        "audio (s)": seconds,
        "frames at a time": frames,
        "latency (ms)": 1000 * streamer.latency * h.hop_size / h.sampling_rate,
        "times real time": frames * h.hop_size / h.sampling_rate / statistics.median(warm),
    }


def memory_row(config: str, minutes: float, chunk_frames: int, device: torch.device) -> Row:
    """Returns a row of the table of memory, measured in a new process because peaks only rise."""
    row = {"config": config, "audio (min)": minutes, "chunk_frames": chunk_frames or "whole"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        figures = pool.submit(synthesize_once, config, minutes, chunk_frames, device)
        try:
            megabytes, first, speed = figures.result()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, BrokenProcessPool) and not is_out_of_memory(error):
                raise  # the pool breaks if the system kills the process for its memory
            megabytes, first, speed = "out of memory", "", ""
    return row | {"peak (MB)": megabytes, "first samples (s)": first, "times real time": speed}


def synthesize_once(
    config: str, minutes: float, chunk_frames: int, device: torch.device
) -> tuple[int, float, float]:
    """Returns the peak memory in MB, the seconds until the first samples, and the speed."""
    if device.type == "cpu":
        speed_up_cpu()  # as the scripts do
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))  # fails where it would swap
    h = load_config(config)
    generator, mel = new_generator(h, device, "fp32"), random_mel(h, 60 * minutes)
    start = time.perf_counter()
    pieces = (piece.cpu() for piece in stream(generator, mel, chunk_frames))
    samples = len(next(pieces))
    first = time.perf_counter() - start
    samples += sum(len(piece) for piece in pieces)
    speed = samples / h.sampling_rate / (time.perf_counter() - start)
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6), first, speed
    # getrusage would count the parent's memory.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["VmHWM"].split()[0]) * 1024 / 1e6), first, speed


# --------------------------------------------------------------------------------------- training


def training_contestants(
    h: Config, device: torch.device, compiled: bool = False
) -> dict[str, Timing]:
    """Returns HiFi-GAN's training step and ours in each precision, on one random batch."""
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
    return {REFERENCE_STEP: Timing(reference_step(h, device, mel, wav)), **ours}


def reference_step(
    h: Config, device: torch.device, mel: torch.Tensor, wav: torch.Tensor
) -> Callable[[], object]:
    """Returns HiFi-GAN's training step for the generator of `h`, in fp32."""
    generator, mult = Generator(h).to(device), h.discriminator_channel_mult
    mpd = hifigan_reference.MultiPeriod(mult).to(device)
    msd = hifigan_reference.MultiScale(mult).to(device)
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss).to(device)
    discriminators = itertools.chain(msd.parameters(), mpd.parameters())
    optim_g, optim_d = (
        torch.optim.AdamW(p, h.learning_rate, betas=(h.adam_b1, h.adam_b2))
        for p in (generator.parameters(), discriminators)
    )
    return lambda: hifigan_reference.textbook_step(
        generator, mpd, msd, optim_g, optim_d, log_mel, mel=mel, wav=wav
    )


def training_rows(
    config: str, batch_size: int, device: torch.device, limits: Limits, compiled: bool
) -> Iterator[Row]:
    """Yields the rows of the table of training steps for one config and batch size."""
    h = replace(load_config(config), batch_size=batch_size)
    contestants = training_contestants(h, device, compiled)
    torch.backends.cudnn.benchmark = True  # as train.py
    torch.backends.cudnn.benchmark_limit = CUDNN_SEARCH
    take_turns(contestants, device, limits)
    for name, timing in contestants.items():
        yield {
            "config": config,
            "batch (segments)": batch_size,
            "step": name,
            "time (s)": median_range(timing.seconds),
            "times HiFi-GAN's step": median_ratio(contestants[REFERENCE_STEP], timing),
        }


# ----------------------------------------------------------------------------------------- tables


def tables(a: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yields the names and rows of the tables that the flags ask for; rows are measured lazily."""
    limits = Limits(
        a.repeats, a.max_seconds or (GPU_SECONDS if device.type == "cuda" else math.inf)
    )
    yield "sizes", map(size_row, a.config)
    if a.infer:
        cases = itertools.product(a.config, a.seconds)
        yield "inference", (inference_row(*case, device, limits) for case in cases)
    if a.stream:
        cases = itertools.product(a.config, a.seconds[-1:], a.stream_frames)
        yield "stream", (stream_row(*case, device) for case in cases)
    if a.memory:
        cases = itertools.product(a.config, a.minutes, a.chunk_frames)
        yield "memory", (memory_row(*case, device) for case in cases)
    if a.train:
        cases = itertools.product(a.config, a.batch_size)
        rows = (training_rows(*case, device, limits, a.compile) for case in cases)
        yield "training", itertools.chain.from_iterable(rows)


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's flags."""
    parser = command_parser(
        "Measures models: parameters and multiply-accumulates per second of audio, and, by the "
        "flags\nbelow, speed, latency, memory and training steps.",
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
    for flag, text in (
        ("--infer", "speed of inference, beside HiFi-GAN's generator of the same width"),
        ("--stream", "latency and speed of a stream that is fed some frames at a time"),
        ("--memory", "peak memory and time to the first samples for long mels"),
        ("--train", "time of a training step, beside HiFi-GAN's"),
        ("--compile", "with --train, also the step with torch.compile"),
    ):
        what.add_argument(flag, action="store_true", help=text)
    size = parser.add_argument_group("how much of it; several values make several rows")
    for flag, kind, default, text in (
        ("--seconds", positive, [1, 4, 20], "of audio, for --infer; --stream takes the last one"),
        ("--stream_frames", positive, [64, 32, 8, 4, 1], "mel frames at a time, for --stream"),
        ("--minutes", positive, [1, 10, 60], "of audio, for --memory"),
        ("--chunk_frames", natural, [0, 1024, 32], "mel frames at a time, for --memory; 0: all"),
        ("--batch_size", positive, [4, 16], "segments in a training step"),
    ):
        size.add_argument(flag, type=kind, default=default, nargs="+", metavar="N", help=text)
    size.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="turns, for --infer and --train"
    )
    size.add_argument(
        "--max_seconds",
        type=positive,
        metavar="N",
        help="seconds after which a row of the table gets no further turn "
        f"(default: {GPU_SECONDS} on GPUs, no limit on CPUs)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument("--output", metavar="JSON", help="file for all figures")
    return parser.parse_args()


def main() -> None:
    """Prints the tables."""
    a = parse_arguments()
    device = select_device(a.device)
    if device.type == "cpu":
        speed_up_cpu()
    results = {"machine": machine(device)}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for name, rows in tables(a, device):
        print()
        results[name] = print_table(rows)
    if a.output:
        with atomic_write(a.output) as temporary:
            temporary.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    command_line(main)
