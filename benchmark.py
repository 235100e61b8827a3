"""Measures models: size, arithmetic, speed and memory of inference, cost of a training step.

    python benchmark.py --config config_v1.json config_v2.json
    python benchmark.py --infer --seconds 1 4 20
    python benchmark.py --memory --minutes 1 10 60 --config config_v2.json
    python benchmark.py --train --config config_v2.json --batch_size 4 16

What is compared runs in turns within one process, on random data: our generators beside HiFi-GAN's
of the same width as plain eager convolutions, our training step beside the textbook's (both from
tests/hifigan.py). Figures are medians; quote the ratios.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from env import Config, load_config, select_device
from inference import prepare, stream, synthesize
from meldataset import LogMelSpectrogram
from models import Discriminators, Generator
from state import build_state
from tests import hifigan
from train import training_step
from utils import command_line, natural, positive

MEASURED_FRAMES = 128  # a whole number of hops, from which a second is computed


@dataclass
class Timing:
    """The seconds of each run of one contestant."""

    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        low, high = min(self.seconds), max(self.seconds)
        return f"{statistics.median(self.seconds):.3f} ({low:.3f} to {high:.3f})"


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


def size_row(config: str) -> str:
    """A row of the table of sizes."""
    h = load_config(config)
    generator, discriminators = Generator(h), Discriminators(h)
    generator_macs = macs_per_second(generator, h, torch.zeros(1, h.num_mels, MEASURED_FRAMES))
    wav = torch.zeros(1, 1, MEASURED_FRAMES * h.hop_size)
    # Counted on the textbook's, which are not folded; they take a real and a generated waveform.
    mult = h.discriminator_channel_mult
    textbook = (hifigan.MultiPeriod(mult), hifigan.MultiScale(mult))
    discriminator_macs = sum(macs_per_second(each, h, wav, wav) / 2 for each in textbook)
    return (
        f"| {config} | {parameters(generator):,} | {generator_macs / 1e9:.2f} | "
        f"{parameters(discriminators):,} | {discriminator_macs / 1e9:.1f} |"
    )


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


def inference_contestants(h: Config, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Generators at work on a random mel, and the machine's own matrix multiplication."""
    frames = math.ceil(seconds * h.sampling_rate / h.hop_size)
    generators = {f"ours, {p}": ready_generator(h, device, p) for p in ("fp32", "bf16")}
    if h.uses_misr:
        generators["loop"] = ready_generator(h, device, "fp32")
        for misr in generators["loop"].fusions:
            misr.forward = partial(hifigan.misr_loop, misr)
    contestants = {
        name: Timing(partial(synthesize, generator, torch.randn(h.num_mels, frames) - 5))
        for name, generator in generators.items()
    }
    plain_h = load_config(
        Path(__file__).parent / BASELINES.get(h.upsample_initial_channel, BASELINES[128])
    )
    plain = hifigan.TextbookGenerator(plain_h).to(device).eval()
    hifigan.remove_weight_norms(plain)
    frames = math.ceil(seconds * plain_h.sampling_rate / plain_h.hop_size)
    mel = torch.randn(1, plain_h.num_mels, frames, device=device) - 5
    contestants["plain"] = Timing(torch.inference_mode()(lambda: plain(mel)))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
        contestants[f"matmul, {name}"] = Timing(lambda a=a: a @ a)
    return contestants


def ready_generator(h: Config, device: torch.device, precision: str) -> Generator:
    """A generator with random weights, as `load_generator` would give it."""
    torch.manual_seed(h.seed)
    return prepare(Generator(h), device, precision)


def inference_row(config: str, seconds: float, device: torch.device, repeats: int) -> str:
    """A row of the table of speeds."""
    h = load_config(config)
    contestants = inference_contestants(h, device, seconds)
    take_turns(contestants, device, repeats)
    macs = macs_per_second(Generator(h), h, torch.zeros(1, h.num_mels, MEASURED_FRAMES)) * seconds
    cells = [config, f"{seconds:g}"]
    for precision in ("fp32", "bf16"):
        ours, matmul = contestants[f"ours, {precision}"], contestants[f"matmul, {precision}"]
        median = statistics.median(ours.seconds)
        peak = MATMUL_SIZE**3 / statistics.median(matmul.seconds)  # multiply-accumulates a second
        low, high = seconds / max(ours.seconds), seconds / min(ours.seconds)
        cells += [
            f"{seconds / median:.1f} ({low:.1f} to {high:.1f})",
            f"{median_ratio(contestants['plain'], ours):.2f}",
            f"{macs / median / peak:.0%}",
        ]
    is_looped = "loop" in contestants
    ratio = median_ratio(contestants["loop"], contestants["ours, fp32"]) if is_looped else None
    return "| " + " | ".join([*cells, f"{ratio:.2f}" if is_looped else ""]) + " |"


def median_ratio(slow: Timing, fast: Timing) -> float:
    """How many times as fast `fast` is: the median over turns."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def memory_row(config: str, minutes: float, chunk_frames: int, device: torch.device) -> str:
    """A row of the table of memory; measured in a process of its own, for peaks do not fall."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        row = pool.submit(stream_once, config, minutes, chunk_frames, device)
        try:
            megabytes, first, speed = row.result()
            cells = f"{megabytes:,.0f} | {first:.2f} | {speed:.1f}"
        except (torch.OutOfMemoryError, RuntimeError, BrokenProcessPool):
            cells = "out of memory | |"
    return f"| {config} | {minutes:g} | {chunk_frames or 'whole'} | {cells} |"


def stream_once(
    config: str, minutes: float, chunk_frames: int, device: torch.device
) -> tuple[float, float, float]:
    """(peak memory in MB, seconds until the first samples, times real time) of one long mel."""
    if device.type == "cpu":  # fail, where the machine would begin to swap
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


def training_contestants(h: Config, device: torch.device) -> dict[str, Timing]:
    """The textbook's step and ours, on the same random batch."""
    torch.manual_seed(h.seed)
    mel = torch.randn(h.batch_size, h.num_mels, h.segment_size // h.hop_size, device=device) - 5
    wav = 0.1 * torch.randn(h.batch_size, 1, h.segment_size, device=device)
    states = {precision: build_state(h, device, precision) for precision in ("fp32", "bf16")}
    ours = {f"ours, {p}": Timing(lambda s=s: training_step(s, mel, wav)) for p, s in states.items()}
    return {"textbook, fp32": Timing(textbook(h, device, mel, wav)), **ours}


def textbook(h: Config, device: torch.device, mel: torch.Tensor, wav: torch.Tensor) -> Callable:
    """HiFi-GAN's step with the generator of `h`."""
    generator = Generator(h).to(device)
    mult = h.discriminator_channel_mult
    mpd, msd = hifigan.MultiPeriod(mult).to(device), hifigan.MultiScale(mult).to(device)
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss).to(device)
    discriminators = itertools.chain(msd.parameters(), mpd.parameters())
    optim_g, optim_d = (
        torch.optim.AdamW(p, h.learning_rate, betas=(h.adam_b1, h.adam_b2))
        for p in (generator.parameters(), discriminators)
    )
    return lambda: hifigan.textbook_step(
        generator, mpd, msd, optim_g, optim_d, log_mel, mel=mel, wav=wav
    )


def training_rows(config: str, batch_size: int, device: torch.device, repeats: int) -> list[str]:
    """Rows of the table of training steps."""
    h = replace(load_config(config), batch_size=batch_size)
    contestants = training_contestants(h, device)
    take_turns(contestants, device, repeats)
    baseline = contestants["textbook, fp32"]
    rows = []
    for name, timing in contestants.items():
        ratio = median_ratio(baseline, timing)
        rows.append(f"| {config} | {batch_size} | {name} | {timing} | {ratio:.2f} |")
    return rows


def describe_machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{device}: {name}, PyTorch {torch.__version__}"


SIZE_HEADER = (
    "| config | G parameters | G GMAC/s | D parameters | D GMAC/s |\n|---|---|---|---|---|"
)
INFERENCE_HEADER = (
    "| config | s of audio | fp32: times real time (range) | of plain HiFi-GAN | of matmul "
    "| bf16: times real time (range) | of plain HiFi-GAN fp32 | of matmul | of the loop |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
MEMORY_HEADER = (
    "| config | min of audio | chunk_frames | peak MB | first sound after s | times real time |\n"
    "|---|---|---|---|---|---|"
)
TRAINING_HEADER = (
    "| config | batch | step | seconds (range) | times as fast |\n|---|---|---|---|---|"
)


def rows(a: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables that the flags ask for, line by line."""
    yield SIZE_HEADER
    yield from map(size_row, a.config)
    if a.infer:
        yield f"\n{INFERENCE_HEADER}"
        for config, seconds in itertools.product(a.config, a.seconds):
            yield inference_row(config, seconds, device, a.repeats)
    if a.memory:
        yield f"\n{MEMORY_HEADER}"
        for config, minutes, chunk in itertools.product(a.config, a.minutes, a.chunk_frames):
            yield memory_row(config, minutes, chunk, device)
    if a.train:
        yield f"\n{TRAINING_HEADER}"
        for config, batch_size in itertools.product(a.config, a.batch_size):
            yield from training_rows(config, batch_size, device, a.repeats)


def main() -> None:
    """Prints tables in markdown."""
    parser = argparse.ArgumentParser(
        description="Measures models: parameters and multiply-accumulates for a second of audio; "
        "with --infer, --memory and --train also these.",
        epilog="Example: python benchmark.py --infer --config config_v2.json --seconds 1 20",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", default=["config_v1.json", "config_v2.json"])
    parser.add_argument("--infer", action="store_true", help="time inference")
    parser.add_argument("--memory", action="store_true", help="measure memory of long mels")
    parser.add_argument("--train", action="store_true", help="time training steps")
    parser.add_argument(
        "--seconds", nargs="+", type=positive, default=[1, 4, 20], help="of audio, for --infer"
    )
    parser.add_argument(
        "--minutes", nargs="+", type=positive, default=[1, 10, 60], help="of audio, for --memory"
    )
    parser.add_argument(
        "--chunk_frames", nargs="+", type=natural, default=[0, 1024, 32], help="for --memory"
    )
    parser.add_argument(
        "--batch_size", nargs="+", type=positive, default=[4, 16], help="segments, for --train"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed turns of each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    a = parser.parse_args()
    device = select_device(a.device)
    torch.backends.cudnn.benchmark = a.train  # as in train.py; inference has lengths of all kinds
    print(f"{describe_machine(device)}\n")
    for row in rows(a, device):
        print(row, flush=True)


if __name__ == "__main__":
    command_line(main)
