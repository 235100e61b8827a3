"""Measures models: size, arithmetic, and the cost of a training step.

    python benchmark.py --config config_v1.json config_v2.json
    python benchmark.py --train --config config_v2.json --batch_size 4 16

A training step is measured beside the textbook's (tests/hifigan.py: HiFi-GAN's order of work, plain
convolutions), in turns within one process, on random data. Figures are medians; quote the ratios.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from env import Config, load_config, select_device
from meldataset import LogMelSpectrogram
from models import Discriminators, Generator
from state import build_state
from tests import hifigan
from train import training_step
from utils import command_line, positive

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
    baseline = next(iter(contestants.values())).seconds
    rows = []
    for name, timing in contestants.items():
        ratio = statistics.median(a / b for a, b in zip(baseline, timing.seconds, strict=True))
        rows.append(f"| {config} | {batch_size} | {name} | {timing} | {ratio:.2f} |")
    return rows


def describe_machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{device}: {name}, PyTorch {torch.__version__}"


def main() -> None:
    """Prints tables in markdown."""
    parser = argparse.ArgumentParser(
        description="Measures models: parameters, multiply-accumulates for a second of audio, and "
        "with --train the seconds of a training step beside the textbook's.",
        epilog="Example: python benchmark.py --train --config config_v2.json --batch_size 4 16",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", default=["config_v1.json", "config_v2.json"])
    parser.add_argument("--train", action="store_true", help="time training steps")
    parser.add_argument(
        "--batch_size", nargs="+", type=positive, default=[4, 16], help="segments a step"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed turns of each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    a = parser.parse_args()
    device = select_device(a.device)
    torch.backends.cudnn.benchmark = True  # as in train.py
    print("| config | G parameters | G GMAC/s | D parameters | D GMAC/s |\n|---|---|---|---|---|")
    for config in a.config:
        print(size_row(config))
    if a.train:
        print(f"\n{describe_machine(device)}\n")
        print("| config | batch | step | seconds (range) | times as fast |\n|---|---|---|---|---|")
        for config, batch_size in itertools.product(a.config, a.batch_size):
            print(*training_rows(config, batch_size, device, a.repeats), sep="\n", flush=True)


if __name__ == "__main__":
    command_line(main)
