"""Measures generated speech against the recordings that it was made from.

    python evaluate.py --reference_dir LJSpeech-1.1/wavs --generated_dir generated_files \\
        --output results.json --plot pictures

From Python, on waveforms [N] at h.sampling_rate:

    from evaluate import evaluate_pair
    values = evaluate_pair(wav, wav_hat, h)    # {"mel_l1": 0.31, ..., "pesq_wb": None, ...}

METRICS, below, says what each number is; `--help` prints it. The libraries are those of
requirements-dev.txt, imported where they are used: a metric whose library is missing is left out.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import soundfile
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from audio import AUDIO_EXTENSIONS, load_wav
from env import Config, UserError, load_config, one_line
from metrics import METRICS, SEED, SIDES, Measurement, Pair, measure, name_missing
from utils import (
    PICTURED_LOG_MELS,
    check_inside,
    command_line,
    command_parser,
    end_cleanly_on_sigterm,
    end_with_parent,
    positive,
    replacing,
)

ENDINGS = ("_generated", "_generated_e2e")  # what the inference scripts add to a name
NAMED_FILES = 5  # of those without a partner are named on the terminal


CONFIDENCE = 0.95
RESAMPLES = 9999  # of the bootstrap

PICTURED_DIFFERENCE = 3.0  # of log-mels, either way

# ----------------------------------------------------------------------------------- the metrics


# ------------------------------------------------------------------------------------- the files


class FilePair(NamedTuple):
    """Two files of one name, which is relative to their folders and has no extension."""

    name: str
    reference: Path
    generated: Path


@dataclass(kw_only=True)
class FileResult(Measurement):
    """A Measurement of two files, or the error that stopped it.

    Dictionaries are of "reference" and "generated".
    """

    name: str
    paths: dict[str, str]
    error: str = ""
    sampling_rates: dict[str, int] = field(default_factory=dict)  # Hz, of the files
    samples: int = 0  # that were compared, at h.sampling_rate
    cut_samples: dict[str, int] = field(default_factory=dict)  # off the end, at h.sampling_rate


def pair_files(
    reference_dir: str | Path, generated_dir: str | Path
) -> tuple[list[FilePair], list[str], list[str]]:
    """Pairs the audio files of two folders, in depth, by name: `a/b.flac` and `a/b_generated.wav`.

    Returns:
        The pairs, and the references and the generated files without a partner.

    Raises:
        UserError: no such folder, no pair, or more than one file for one name.
    """
    folders = Path(reference_dir), Path(generated_dir)
    if folders[0].resolve() == folders[1].resolve():
        raise UserError(f"{generated_dir}: reference and generated files in one folder; use two")
    references, generated = _by_name(*folders), _by_name(*reversed(folders))
    pairs = []
    for name, path in references.items():
        names = [name, *(name + end for end in ENDINGS if name + end not in references)]
        found = [generated[each] for each in names if each in generated]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} are both named after {path}; keep one")
        pairs += [FilePair(name, path, each) for each in found]
    if not pairs:
        raise UserError(
            f"{generated_dir}: no audio file is named as one in {reference_dir}; expected <name>"
            f"{', '.join(('', *(f' or <name>{end}' for end in ENDINGS)))} in the same subfolder"
        )
    left = [set(references.values()), set(generated.values())]
    for pair in pairs:
        left[0].remove(pair.reference)
        left[1].remove(pair.generated)
    return pairs, *(sorted(map(str, paths)) for paths in left)


def _by_name(folder: Path, other: Path) -> dict[str, Path]:
    """The audio files of `folder`, but for those of an `other` inside it, by name."""
    if not os.path.isdir(folder):  # Path.is_dir raises where a name is too long
        raise UserError(f"{folder}: no such folder")
    other = other.resolve()
    holds_other = other.is_relative_to(folder.resolve())
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in AUDIO_EXTENSIONS or not path.is_file():
            continue
        if holds_other and path.resolve().is_relative_to(other):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UserError(f"{files[name]} and {path} have one name; keep one")
        files[name] = path
    return files


def measure_files(files: FilePair, h: Config, plot_dir: Path | None) -> FileResult:
    """Compares two files; with `plot_dir`, pictures them to `<plot_dir>/<name>.png`."""
    paths = {side: getattr(files, side) for side in SIDES}
    result = FileResult(name=files.name, paths={side: str(path) for side, path in paths.items()})
    try:
        wavs = {
            side: load_wav(path, h.sampling_rate, min_samples=h.hop_size)
            for side, path in paths.items()
        }
    except UserError as error:
        return replace(result, error=str(error))
    pair = Pair(**wavs, h=h)
    if plot_dir is not None:
        check_inside(plot_dir, plot_dir / files.name)
        with replacing(plot_dir / f"{files.name}.png") as temporary:
            picture(pair).savefig(temporary, format="png")
    samples = len(pair.wavs[0])
    return replace(
        result,
        **vars(measure(pair)),
        sampling_rates={
            side: soundfile.info(os.fsencode(path)).samplerate for side, path in paths.items()
        },
        samples=samples,
        cut_samples={side: len(wav) - samples for side, wav in wavs.items()},
    )


def picture(pair: Pair) -> Figure:
    """Both log-mels, the generated one less the reference, and the fundamental frequencies."""
    hop_seconds = pair.h.hop_size / pair.h.sampling_rate
    mel, mel_hat = (mel.numpy() for mel in pair.mels)
    figure = Figure(figsize=(10, 10), layout="constrained")
    *mel_axes, pitch_axes = figure.subplots(4, sharex=True)
    low, high = PICTURED_LOG_MELS
    for axes, title, image, colours in (
        (mel_axes[0], "reference", mel, {"vmin": low, "vmax": high}),
        (mel_axes[1], "generated", mel_hat, {"vmin": low, "vmax": high}),
        (
            mel_axes[2],
            "generated - reference",
            mel_hat - mel,
            {"cmap": "RdBu_r", "vmin": -PICTURED_DIFFERENCE, "vmax": PICTURED_DIFFERENCE},
        ),
    ):
        extent = (0, image.shape[1] * hop_seconds, 0, image.shape[0])
        shown = axes.imshow(image, aspect="auto", origin="lower", extent=extent, **colours)
        axes.set(title=title, ylabel="mel band")
        figure.colorbar(shown, ax=axes, label="log magnitude")
    try:
        pitches = pair.pitches
    except Exception:  # three metrics have said why
        pitches = ()
    for label, pitch in zip(SIDES, pitches, strict=False):
        pitch_axes.plot(np.arange(len(pitch.f0)) * hop_seconds, pitch.f0, label=label)
    pitch_axes.set(title="fundamental frequency", xlabel="time (s)", ylabel="Hz")
    pitch_axes.legend(*pitch_axes.get_legend_handles_labels(), loc="upper right")
    return figure


def measure_all(
    pairs: list[FilePair], h: Config, plot_dir: Path | None, workers: int
) -> Iterator[FileResult]:
    """Yields the results of `pairs` in their order, whatever the number of processes."""
    work = partial(measure_files, h=h, plot_dir=plot_dir)
    if min(workers, len(pairs)) == 1:
        torch.set_num_threads(1)
        yield from map(work, pairs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's threads: the workers inherit it
    pool = ProcessPoolExecutor(
        min(workers, len(pairs)), multiprocessing.get_context("spawn"), _prepare_worker
    )
    try:
        yield from pool.map(work, pairs)
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


# ------------------------------------------------------------------------------------ the report


def summarize(values: list[float]) -> dict:
    """Mean, its percentile bootstrap interval (None for fewer than two values) and count."""
    mean = float(np.mean(values)) if values else None
    if len(values) < 2:
        return {"mean": mean, "interval": None, "n": len(values)}
    interval = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=100,  # memory: thousands of files, thousands of resamples
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return {"mean": mean, "interval": [float(end) for end in interval], "n": len(values)}


def build_report(
    results: list[FileResult], h: Config, unpaired: tuple[list[str], list[str]]
) -> dict:
    """Everything that was found, for JSON."""
    measured = [result for result in results if not result.error]
    missing = {name: reason for result in measured for name, reason in result.missing.items()}
    report = {"config": asdict(h), "versions": _versions(), "confidence": CONFIDENCE}
    report["metrics"] = {}
    for metric in METRICS:
        if metric.name in missing:
            continue
        facts = {key: value for key, value in vars(metric).items() if key != "function"}
        values = (result.values[metric.name] for result in measured)
        summary = summarize([value for value in values if value is not None])
        report["metrics"][metric.name] = facts | summary
    report["missing"] = missing
    report["files"] = [_without(asdict(result), "error", "missing") for result in measured]
    report["skipped"] = [
        {"name": result.name, "error": result.error} for result in results if result.error
    ]
    report["unpaired"] = dict(zip(SIDES, unpaired, strict=True))
    return report


def _without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in sorted({"numpy", "scipy", "soxr", *(metric.library for metric in METRICS)}):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions


def mean_table(report: dict) -> str:
    """The means, in markdown."""
    rows = [f"| metric | unit | mean | {CONFIDENCE:.0%} interval | n |", "|---|---|---|---|---|"]
    for name, facts in report["metrics"].items():
        low_high = [_cell(end) for end in facts["interval"] or (None,)]
        rows.append(
            f"| {name} {_arrow(facts)} | {facts['unit']} | {_cell(facts['mean'])} | "
            f"{' to '.join(low_high)} | {facts['n']} |"
        )
    return "\n".join(rows)


def file_table(report: dict) -> str:
    """The value of each file, in markdown."""
    metrics = report["metrics"]
    head = ["file", *(f"{name} {_arrow(facts)}" for name, facts in metrics.items())]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in report["files"]:
        cells = [_cell(result["values"][name]) for name in metrics]
        name = one_line(result["name"]).replace("|", r"\|")
        rows.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(rows)


def _arrow(facts: dict) -> str:
    return {"higher": "↑", "lower": "↓"}[facts["better"]]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}"


def name_unpaired(folder: str, names: list[str]) -> None:
    """Says on standard error how many files of `folder` have no partner, and which."""
    if names:
        more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
        listed = ", ".join(names[:NAMED_FILES])
        note = f"{folder}: without a partner {len(names)}: {listed}{more}"
        print(one_line(note), file=sys.stderr)


def name_troubles(result: FileResult, h: Config) -> None:
    """Says on standard error what is amiss with a pair, and which metrics are missing."""
    lines = [f"skipped: {result.error}"] if result.error else []
    for side, cut in result.cut_samples.items():
        if cut > h.n_fft:
            path = result.paths[side]
            lines.append(f"{path}: its last {cut} samples were cut off; its partner is shorter")
    lines += [f"{result.name}: no {name} ({reason})" for name, reason in result.reasons.items()]
    for line in lines:
        tqdm.write(one_line(line), file=sys.stderr)
    for name, reason in result.missing.items():
        name_missing(name, reason)


def describe_files(report: dict, h: Config) -> str:
    """What was done to the files before they were compared."""
    files = report["files"]
    cuts = [max(result["cut_samples"].values()) for result in files]
    rates = [set(result["sampling_rates"].values()) for result in files]
    resampled = sum(each != {h.sampling_rate} for each in rates)
    skipped = len(report["skipped"])
    return (
        f"{len(files)} pairs at {h.sampling_rate} Hz"
        + (f", {resampled} of them resampled to it" if resampled else "")
        + (
            f", {sum(map(bool, cuts))} cut to the shorter by at most {max(cuts)} samples"
            if any(cuts)
            else ""
        )
        + (f", {skipped} skipped" if skipped else "")
    )


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
        f"resamples).\n\n{metrics_help()}",
        example="python evaluate.py --reference_dir test_files --generated_dir generated_files "
        "--output results.json",
    )
    parser.add_argument(
        "--reference_dir", metavar="DIR", required=True, help="recordings; searched in depth"
    )
    parser.add_argument(
        "--generated_dir",
        metavar="DIR",
        required=True,
        help="their generated partners: <name>, <name>_generated or <name>_generated_e2e, of any "
        "audio format, in the same subfolder",
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
    parser.add_argument("--per_file", action="store_true", help="print the values of each file too")
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        default=os.cpu_count() or 1,
        help="processes; the results are the same",
    )
    return parser.parse_args()


def main() -> int:
    """Prints a table in markdown; returns 1 where a file had to be skipped."""
    a = parse_arguments()
    end_cleanly_on_sigterm()
    sys.stdout.reconfigure(errors="replace")  # a terminal without arrows shall not end the run
    h = load_config(a.config)
    pairs, *unpaired = pair_files(a.reference_dir, a.generated_dir)
    for folder, names in zip((a.reference_dir, a.generated_dir), unpaired, strict=True):
        name_unpaired(folder, names)
    results = []
    work = measure_all(pairs, h, a.plot, a.workers)
    for result in tqdm(work, total=len(pairs), unit="file", disable=None):
        name_troubles(result, h)
        results.append(result)
    report = build_report(results, h, unpaired)
    print(describe_files(report, h), file=sys.stderr)
    if a.per_file:
        print(f"{file_table(report)}\n")
    print(mean_table(report))
    if a.output:
        with replacing(a.output) as temporary:
            temporary.write_text(json.dumps(report, indent=2, allow_nan=False), encoding="utf-8")
    return 1 if report["skipped"] else 0


if __name__ == "__main__":
    command_line(main)
