"""Measures generated speech against the recordings that it was made from.

    python evaluate.py --reference_dir LJSpeech-1.1/wavs --generated_dir generated_files \\
        --output results.json --plot pictures

Several folders are compared, clip by clip, and heard side by side on a page for any browser:

    python evaluate.py --reference_dir wavs --generated_dir misrnet hifigan --page listen

`--help` says what each metric is. Their libraries are those of requirements-dev.txt and
requirements-nodeps.txt; a metric whose library is missing is left out.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from env import Config, UserError, load_config
from evaluation.metrics import METRICS, SIDES, Pair, measure
from evaluation.page import check_page, write_page
from evaluation.pairs import (
    DELAY_CLIPS,
    DELAY_HOPS,
    FilePair,
    constant_delay,
    find_delay,
    load_pair,
    name_systems,
    pair_files,
    shift,
)
from evaluation.plots import plot_pair
from evaluation.report import (
    CONFIDENCE,
    RECORDINGS,
    RESAMPLES,
    FileResult,
    System,
    build_report,
    describe_delay,
    describe_files,
    difference_table,
    file_table,
    mean_table,
    name_troubles,
    name_unpaired,
)
from utils import (
    atomic_write,
    check_inside,
    command_line,
    command_parser,
    end_cleanly_on_sigterm,
    end_with_parent,
    positive,
)


def measure_files(
    files: FilePair,
    h: Config,
    plot_dirs: dict[str, Path | None] | None = None,
    delays: dict[str, int] | None = None,
) -> FileResult:
    """Compares two files, and pictures them to `<plot_dir>/<name>.png`.

    A recording beside itself is measured by what needs no reference. By system: `plot_dirs`, and
    `delays`, the samples by which it lags, which are cut off here.
    """
    paths = {side: str(getattr(files, side)) for side in SIDES}
    result = FileResult(name=files.name, system=files.system, paths=paths)
    try:
        wavs = load_pair(files, h)
    except UserError as error:
        return replace(result, error=str(error))
    wavs = shift(wavs, (delays or {}).get(files.system, 0))
    pair, plot_dir = Pair(**wavs, h=h), (plot_dirs or {}).get(files.system)
    is_recording = files.reference == files.generated
    if plot_dir is not None:
        check_inside(plot_dir, plot_dir / files.name)
        with atomic_write(plot_dir / f"{files.name}.png") as temporary:
            plot_pair(pair).savefig(temporary, format="png")
    chosen = [metric for metric in METRICS if not (is_recording and metric.needs_reference)]
    samples = len(pair.wavs[0])
    return replace(
        result,
        **vars(measure(pair, chosen)),
        sampling_rates={
            side: soundfile.info(os.fsencode(path)).samplerate for side, path in paths.items()
        },
        samples=samples,
        cut_samples={side: len(wav) - samples for side, wav in wavs.items()},
    )


@contextmanager
def processes(count: int) -> Iterator[Callable]:
    """Yields a `map` that runs in `count` processes, or in this one, with the same results."""
    if count <= 1:
        torch.set_num_threads(1)
        yield map
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's threads: the workers inherit it
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _prepare_worker)

    def run(function: Callable, items: Iterable) -> Iterator:
        """The first item alone: numba compiles for it.

        Its cache, written by several processes at once, can make all crash that read it.
        """
        items = iter(items)
        for first in itertools.islice(items, 1):
            yield pool.submit(function, first).result()
        yield from pool.map(function, items)

    try:
        yield run
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, for memory perhaps; try fewer --workers, 1 to see which file"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    end_with_parent()


# ------------------------------------------------------------------------------- the command line


def metrics_help() -> str:
    """METRICS in words."""
    lines = ["metrics:"]
    for metric in METRICS:
        lines.append(
            f"  {metric.name} (unit: {metric.unit}; {metric.better} is better; "
            f"library: {metric.library})"
        )
        lines.append(textwrap.indent(textwrap.fill(metric.description, 92), "      "))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(
        "Compares generated speech with recordings, file by file, and prints the mean of each\n"
        f"metric with its {CONFIDENCE:.0%} interval (percentile bootstrap over files, {RESAMPLES} "
        "resamples), and of\nseveral systems their differences over the same files."
        f"\n\n{metrics_help()}",
        example="python evaluate.py --reference_dir test_files --generated_dir generated_files "
        "--output results.json",
    )
    parser.add_argument(
        "--reference_dir",
        type=Path,
        metavar="DIR",
        required=True,
        help="recordings; searched in depth",
    )
    parser.add_argument(
        "--generated_dir",
        type=Path,
        nargs="+",
        metavar="DIR",
        required=True,
        help="their generated partners: <name>, <name>_generated or <name>_generated_e2e, of any "
        "audio format, in the same subfolder; a column each for several folders",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=Path(__file__).with_name("config_v1.json"),
        help="JSON config whose sampling_rate and mel are used (default: config_v1.json)",
    )
    parser.add_argument("--output", metavar="JSON", help="file for everything that was found")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="folder for a picture of each pair"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="DIR",
        help="folder for a page to listen to, index.html, which any browser opens, offline",
    )
    parser.add_argument("--per_file", action="store_true", help="print the values of each file too")
    parser.add_argument(
        "--no_align",
        action="store_true",
        help=f"do not make up for a constant delay of up to {DELAY_HOPS} hops",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        default=os.cpu_count() or 1,
        help="processes; the results are the same",
    )
    return parser.parse_args()


def find_pairs(a: argparse.Namespace) -> tuple[dict[str, System], dict[str, list[FilePair]]]:
    """The systems, and their pairs, by name; says what has no partner."""
    folders = name_systems(a.generated_dir)
    systems, pairs = {RECORDINGS: System(str(a.reference_dir), {})}, {}
    for name, folder in folders.items():
        given = a.reference_dir, folder, [*folders.values()], name
        pairs[name], *unpaired = pair_files(*given)
        systems[name] = System(str(folder), dict(zip(SIDES, unpaired, strict=True)))
        name_unpaired(str(a.reference_dir), unpaired[0], str(folder))
        name_unpaired(str(folder), unpaired[1], str(a.reference_dir))
    return systems, pairs


def find_delays(
    pairs: dict[str, list[FilePair]], h: Config, spread: Callable, no_align: bool
) -> dict[str, int]:
    """The constant delay of each system, in samples; says what it is."""
    if no_align:
        return dict.fromkeys(pairs, 0)
    probes = {name: each[:: -(-len(each) // DELAY_CLIPS)] for name, each in pairs.items()}
    files = [probe for each in probes.values() for probe in each]
    found = dict(zip(files, spread(partial(find_delay, h=h), files), strict=True))
    delays = {}
    for name, each in probes.items():
        delays[name] = constant_delay([found[probe] for probe in each], h.hop_size)
        if delays[name]:
            print(describe_delay(name, delays[name], h), file=sys.stderr)
    return delays


def measure_all(
    pairs: dict[str, list[FilePair]],
    h: Config,
    spread: Callable,
    plot_dir: Path | None,
    delays: dict[str, int],
) -> list[FileResult]:
    """The results of the recordings that have a partner, and of every system's pairs."""
    recordings = {pair.name: pair.reference for each in pairs.values() for pair in each}
    files = [FilePair(name, path, path, RECORDINGS) for name, path in recordings.items()]
    if all(metric.needs_reference for metric in METRICS):
        files = []
    files += [pair for each in pairs.values() for pair in each]
    folders = {name: plot_dir / name if plot_dir and len(pairs) > 1 else plot_dir for name in pairs}
    work = partial(measure_files, h=h, plot_dirs=folders, delays=delays)
    results = []
    for result in tqdm(spread(work, files), total=len(files), unit="file", disable=None):
        # What cannot be read is said, and counts, where its partner is.
        if not (result.error and result.system == RECORDINGS):
            name_troubles(result, h)
            results.append(result)
    return results


def main() -> int:
    """Prints tables in markdown; returns 1 where a file had to be skipped."""
    a = parse_arguments()
    end_cleanly_on_sigterm()
    sys.stdout.reconfigure(errors="replace")  # a terminal without arrows shall not end the run
    h = load_config(a.config)
    systems, pairs = find_pairs(a)
    if a.page:
        check_page(a.page, [a.reference_dir, *a.generated_dir])
    with processes(min(a.workers, sum(map(len, pairs.values())))) as spread:
        delays = find_delays(pairs, h, spread, a.no_align)
        results = measure_all(pairs, h, spread, a.plot, delays)
    for name, delay in delays.items():
        systems[name].delay_samples = delay
    report = build_report(results, h, systems, METRICS)
    for name in pairs:
        print(describe_files(report, name), file=sys.stderr)
    tables = [file_table(report) if a.per_file else "", mean_table(report)]
    print("\n\n".join(table for table in (*tables, difference_table(report)) if table))
    if a.output:
        with atomic_write(a.output) as temporary:
            temporary.write_text(json.dumps(report, indent=2, allow_nan=False), encoding="utf-8")
    if a.page:
        write_page(a.page, report, h)
        print(f"open {a.page / 'index.html'}", file=sys.stderr)
    return 1 if report["skipped"] else 0


if __name__ == "__main__":
    command_line(main)
