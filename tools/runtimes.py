"""Compares runtimes on this CPU: eager PyTorch, torch.compile, ONNX Runtime and OpenVINO.

    python tools/runtimes.py --config config_v2.json configs/istft_v2.json --threads 1 2

Each runtime has its own process. The processes run in turns, one at a time. The figures are
real-time factors: medians over turns, with their range. Weights and mels are random. Runtimes that
are not installed are skipped: pip install onnx onnxruntime openvino.
"""

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from distributed import speed_up_cpu
from env import Config, load_config
from export_onnx import to_onnx
from inference import to_inference
from models import Generator
from tools.tables import Row, machine, median_range, print_table
from utils import command_line, command_parser, positive

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BASELINE = "eager fp32"  # in the column of ratios
PAUSE = 0.5  # seconds before each turn, until the threads of the previous one are idle


class Case(NamedTuple):
    """The input of every runtime."""

    config: str
    onnx_file: str
    frames: int
    threads: int


Run = Callable[[], object]  # synthesises once


def new_generator(h: Config, precision: str = "fp32") -> Generator:
    """Returns a generator for inference with the same random weights in every process."""
    torch.manual_seed(0)
    return to_inference(Generator(h), torch.device("cpu"), precision)


def random_mel(case: Case) -> torch.Tensor:
    """Returns a random log-mel [1, num_mels, T] between silence and loud speech."""
    num_mels = load_config(case.config).num_mels
    return (
        torch.rand(1, num_mels, case.frames, generator=torch.Generator().manual_seed(0)) * 12 - 11
    )


def eager(case: Case, precision: str, is_compiled: bool = False) -> Run:
    """Returns a run of PyTorch, as in inference.py, or compiled."""
    speed_up_cpu()
    torch.set_num_threads(case.threads)
    generator, mel = new_generator(load_config(case.config), precision), random_mel(case)
    return partial(torch.compile(generator) if is_compiled else generator, mel)


def onnx_runtime(case: Case) -> Run:
    """Returns a run of ONNX Runtime on the exported file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = onnxruntime.InferenceSession(
        case.onnx_file, options, providers=["CPUExecutionProvider"]
    )
    return partial(session.run, ["wav"], {"mel": random_mel(case).numpy()})


def open_vino(case: Case, precision: str) -> Run:
    """Returns a run of OpenVINO on the exported file; the precision is "f32" or "bf16"."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": case.threads, "INFERENCE_PRECISION_HINT": precision}
    model = openvino.Core().compile_model(case.onnx_file, "CPU", settings)
    return partial(model, {"mel": random_mel(case).numpy()})


RUNTIMES = {
    BASELINE: partial(eager, precision="fp32"),
    "eager bf16": partial(eager, precision="bf16"),
    "torch.compile fp32": partial(eager, precision="fp32", is_compiled=True),
    "ONNX Runtime fp32": onnx_runtime,
    "OpenVINO fp32": partial(open_vino, precision="f32"),
    "OpenVINO bf16": partial(open_vino, precision="bf16"),
}


def work(runtime: str, case: Case, clock: str, parent: Connection) -> None:
    """Runs a runtime in a process: sends None or an error, then the seconds of each turn."""
    read_clock = CLOCKS[clock]
    try:
        run = RUNTIMES[runtime](case)
        with torch.inference_mode():
            run()
            run()  # torch.compile may compile twice for a first length
            parent.send(None)
            while parent.recv():
                start = read_clock()
                run()
                parent.send(read_clock() - start)
    except Exception as error:  # not installed, no compiler
        parent.send(f"{type(error).__name__}: {error}")


def seconds_of_turns(case: Case, repeats: int, clock: str) -> dict[str, list[float]]:
    """Returns the seconds of each turn by runtime; prints which runtimes cannot run."""
    spawn, workers = multiprocessing.get_context("spawn"), {}
    for runtime in RUNTIMES:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(runtime, case, clock, theirs), daemon=True)
        process.start()
        reason = ours.recv()
        if reason is None:
            workers[runtime] = (process, ours)
        else:
            tqdm.write(f"{runtime}: skipped, {reason.splitlines()[0]}", file=sys.stderr)
    seconds = {runtime: [] for runtime in workers}
    for _ in tqdm(range(repeats), disable=None, leave=False):
        for runtime, (_, connection) in workers.items():
            time.sleep(PAUSE)
            connection.send(True)
            seconds[runtime].append(connection.recv())
    for process, connection in workers.values():
        connection.send(False)
        process.join()
    return seconds


def rows(config: str, audio_seconds: int, threads: int, a: argparse.Namespace) -> Iterator[Row]:
    """Yields a row of the table for each runtime."""
    h = load_config(config)
    frames = audio_seconds * h.sampling_rate // h.hop_size
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        file.write_bytes(to_onnx(new_generator(h), h).SerializeToString())
        timings = seconds_of_turns(Case(config, str(file), frames, threads), a.repeats, a.clock)
    for runtime, seconds in timings.items():
        ratios = [base / own for base, own in zip(timings[BASELINE], seconds, strict=True)]
        yield {
            "config": config,
            "threads": threads,
            "audio (s)": audio_seconds,
            "runtime": runtime,
            "times real time": median_range(
                [frames * h.hop_size / h.sampling_rate / s for s in seconds]
            ),
            f"times {BASELINE}": median_range(ratios),
        }


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's flags."""
    parser = command_parser(
        "Compares the speed of a generator in several runtimes on this CPU.",
        example="python tools/runtimes.py --config config_v2.json --threads 1 2",
    )
    parser.add_argument(
        "--config",
        metavar="JSON",
        nargs="+",
        default=["config_v2.json", "configs/istft_v2.json"],
        help="JSON configs; weights are random",
    )
    parser.add_argument(
        "--seconds", metavar="S", nargs="+", type=positive, default=[1, 10], help="of audio a turn"
    )
    parser.add_argument(
        "--threads", metavar="N", nargs="+", type=positive, default=[1], help="of each runtime"
    )
    parser.add_argument(
        "--repeats", metavar="N", type=positive, default=11, help="turns of each runtime"
    )
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="wall time, or the process's CPU time, for one thread on a busy machine",
    )
    return parser.parse_args()


def main() -> None:
    """Prints the table."""
    a = parse_arguments()
    print(", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items()))
    cases = itertools.product(a.config, a.seconds, a.threads)
    print_table(itertools.chain.from_iterable(rows(*case, a) for case in cases))


if __name__ == "__main__":
    command_line(main)
