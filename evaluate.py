"""Measures generated speech and compares systems, with tables, JSON and a listening page.

    python evaluate.py --reference_dir LJSpeech-1.1/wavs --generated_dir generated_files \\
        --output results.json --page listen

Several folders are compared clip by clip. Without --reference_dir, only the metrics that need no
recording are computed. --help defines each metric. Most of them need an optional library:

    pip install -r requirements-demo.txt pesq onnxruntime
    pip install --no-deps -r requirements-nodeps.txt
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import soundfile
from tqdm import tqdm

from env import Config, UsageError, UserError, load_config
from evaluation.metrics import METRICS, SIDES, Metric, Pair, measure
from evaluation.page import check_page, write_page
from evaluation.pairs import (
    DELAY_CLIPS,
    DELAY_HOPS,
    FilePair,
    constant_delay,
    find_delay,
    list_files,
    load_pair,
    name_systems,
    pair_files,
    shift,
    without_reference,
)
from evaluation.parallel import ParallelMap
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
    groups_of,
    mean_table,
    say_troubles,
    say_unpaired,
)
from utils import atomic_write, command_line, command_parser, end_cleanly_on_sigterm, positive


def metrics_help() -> str:
    """Returns METRICS as text."""
    lines = ["metrics:"]
    for metric in METRICS:
        lines.append(
            f"  {metric.name} (unit: {metric.unit}; {metric.better} is better; "
            f"library: {metric.library})"
        )
        lines.append(textwrap.indent(textwrap.fill(metric.description, 92), "      "))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser(
        "Computes metrics of generated speech, most of them against recordings. Prints the mean\n"
        f"of each metric with its {CONFIDENCE:.0%} interval (percentile bootstrap over files, "
        f"{RESAMPLES} resamples) and the\ndifferences of several systems over the same files."
        f"\n\n{metrics_help()}",
        example="python evaluate.py --reference_dir test_files --generated_dir generated_files "
        "--output results.json",
    )
    parser.add_argument(
        "--generated_dir",
        nargs="+",
        metavar="[NAME=]DIR",
        required=True,
        help="folders of generated speech, one for each system; files are named <name>, "
        "<name>_generated or <name>_generated_e2e, in any audio format, in the subfolder of their "
        "recording",
    )
    parser.add_argument(
        "--reference_dir",
        type=Path,
        metavar="DIR",
        help="the recordings, searched with subfolders; without it, metrics that need a recording "
        "are left out",
    )
    parser.add_argument(
        "--unpaired",
        action="store_true",
        help="also measure generated files without a recording, such as speech of an acoustic "
        "model, as a second group with tables of its own",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=Path(__file__).with_name("config_v1.json"),
        help="JSON config that gives sampling_rate and mel (default: config_v1.json)",
    )
    parser.add_argument("--output", metavar="JSON", help="file for all results")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="DIR",
        help="folder for the listening page, index.html, which any browser opens offline",
    )
    parser.add_argument(
        "--about",
        nargs="+",
        metavar="NAME=TEXT",
        default=[],
        help="one line about each system, for the page",
    )
    parser.add_argument("--per_file", action="store_true", help="print the values of each file")
    parser.add_argument(
        "--no_align",
        action="store_true",
        help=f"do not compensate a constant delay of up to {DELAY_HOPS} hops",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        default=os.cpu_count() or 1,
        help="processes; the results do not depend on them",
    )
    return parser.parse_args()


def find_clips(a: argparse.Namespace) -> tuple[dict[str, System], dict[str, list[FilePair]]]:
    """Returns the systems and their files, by name; prints which files have no partner."""
    folders = name_systems(a.generated_dir)
    if a.reference_dir is None:
        files = {name: list_files(folder, folders.values()) for name, folder in folders.items()}
        clips = {name: without_reference(found, name) for name, found in files.items()}
        return {name: System(str(folder)) for name, folder in folders.items()}, clips
    systems, clips = {RECORDINGS: System(str(a.reference_dir))}, {}
    hint = "" if a.unpaired else "; --unpaired measures them without a recording"
    for name, folder in folders.items():
        clips[name], recordings, generated = pair_files(
            a.reference_dir, folder, folders.values(), name
        )
        unpaired = sorted(map(str, recordings)), sorted(map(str, generated.values()))
        systems[name] = System(str(folder), dict(zip(SIDES, unpaired, strict=True)))
        say_unpaired(str(a.reference_dir), unpaired[0], str(folder))
        say_unpaired(str(folder), unpaired[1], str(a.reference_dir), hint)
        clips[name] += without_reference(generated, name) if a.unpaired else []
    return systems, clips


def add_descriptions(systems: dict[str, System], about: list[str]) -> None:
    """Stores the lines of --about in their systems.

    Raises:
        UsageError: a line has no name or the name of no system.
    """
    for line in about:
        name, _, text = line.partition("=")
        if name not in systems or not text:
            expected = ", ".join(systems)
            raise UsageError(f"--about {line}: expected NAME=TEXT, NAME one of {expected}")
        systems[name].about = text


def find_delays(
    clips: dict[str, list[FilePair]], h: Config, parallel_map: Callable
) -> dict[str, int]:
    """Returns the constant delay of each system in samples, and prints those that are not 0."""
    pairs = {name: [f for f in files if f.reference] for name, files in clips.items()}
    probes = {name: files[:: -(-len(files) // DELAY_CLIPS) or 1] for name, files in pairs.items()}
    files = [probe for each in probes.values() for probe in each]
    found = parallel_map(partial(find_delay, h=h), files, lambda _: None)
    found = dict(zip(files, found, strict=True))
    delays = {}
    for name, each in probes.items():
        delays[name] = constant_delay([found[probe] for probe in each], h.hop_size)
        if delays[name]:
            print(describe_delay(name, delays[name], h), file=sys.stderr)
    return delays


def measure_files(
    files: FilePair, h: Config, metrics: list[Metric], delays: dict[str, int]
) -> FileResult:
    """Measures two files, or one file by the metrics that need no reference.

    `delays` contains the number of samples by which each system lags; they are cut off.
    """
    result = FileResult(name=files.name, system=files.system, paths=files.paths)
    try:
        wavs = load_pair(files, h)
    except UserError as error:
        return replace(result, error=str(error))
    wavs = shift(wavs, delays.get(files.system, 0) if files.reference else 0)
    pair = Pair(**wavs, h=h)
    samples = len(pair.wavs[0])
    return replace(
        result,
        **vars(measure(pair, [m for m in metrics if files.reference or not m.needs_reference])),
        sampling_rates={
            side: soundfile.info(os.fsencode(path)).samplerate for side, path in files.paths.items()
        },
        samples=samples,
        cut_samples={side: len(wavs[side]) - samples for side in files.paths},
    )


def crashed(files: FilePair) -> FileResult:
    """Returns the result of files whose process died."""
    error = f"{files.generated}: its process died: a library crashed, or memory ran out"
    return FileResult(name=files.name, system=files.system, paths=files.paths, error=error)


def measure_all(
    clips: dict[str, list[FilePair]], h: Config, parallel_map: Callable, delays: dict[str, int]
) -> list[FileResult]:
    """Returns the results of all files, and of the recordings that have a partner."""
    files = [each for found in clips.values() for each in found]
    recordings = {each.name: each.reference for each in files if each.reference}
    if not all(metric.needs_reference for metric in METRICS):
        files += [FilePair(name, None, path, RECORDINGS) for name, path in recordings.items()]
    work = partial(measure_files, h=h, metrics=METRICS, delays=delays)
    found = parallel_map(work, files, crashed)
    results, errors = [], set()
    for result in tqdm(found, total=len(files), unit="file", disable=None):
        # The error of a recording was printed with its pair.
        if result.system != RECORDINGS or result.error not in errors:
            say_troubles(result, h)
            results.append(result)
            errors |= {result.error} - {""}
    return results


def main() -> int:
    """Prints tables in markdown. Returns 1 if a file was skipped."""
    a = parse_arguments()
    end_cleanly_on_sigterm()
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot print arrows
    h = load_config(a.config)
    systems, clips = find_clips(a)
    add_descriptions(systems, a.about)
    if a.page:
        check_page(a.page, [Path(system.folder) for system in systems.values()])
    with ParallelMap(min(a.workers, sum(map(len, clips.values())))) as parallel_map:
        delays = {} if a.no_align else find_delays(clips, h, parallel_map)
        results = measure_all(clips, h, parallel_map, delays)
    for name, delay in delays.items():
        systems[name].delay_samples = delay
    report = build_report(results, h, systems, METRICS)
    for name in clips:
        print(describe_files(report, name), file=sys.stderr)
    print_tables(report, a.per_file)
    if a.output:
        with atomic_write(a.output) as temporary:
            temporary.write_text(json.dumps(report, indent=2, allow_nan=False), encoding="utf-8")
    if a.page:
        write_page(a.page, report, h)
        print(f"open {a.page / 'index.html'}", file=sys.stderr)
    return 1 if report["skipped"] else 0


def print_tables(report: dict, per_file: bool) -> None:
    """Prints the tables of each group of clips in markdown."""
    blocks = []
    for group in groups_of(report):
        blocks += ["Without a recording:"] if group is not report else []
        blocks += [file_table(group)] if per_file else []
        blocks += [mean_table(group), difference_table(group)]
    print("\n\n".join(filter(None, blocks)))


if __name__ == "__main__":
    command_line(main)
