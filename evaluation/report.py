"""The results of evaluate.py as JSON, as tables in markdown and as lines on standard error.

    report = build_report(results, h, systems, METRICS)
    report["metrics"]["mel_l1"]["systems"]["frame_v2"]["mean"]

A report has one group of clips, "metrics" and "files". Clips without a recording beside clips with
one are a second group, report["unpaired"].
"""

import itertools
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata

import numpy as np
import scipy.stats
from tqdm import tqdm

from env import Config, one_line
from evaluation.metrics import SIDES, Measurement, Metric, say_missing
from evaluation.opinion import SEED

RECORDINGS = SIDES[0]  # the name of the recordings as a system
CONFIDENCE = 0.95
RESAMPLES = 9999  # of the bootstrap
NAMED_FILES = 5  # number of files without a partner that are named on the terminal


@dataclass
class System:
    """A folder of generated speech, or the folder of the recordings."""

    folder: str
    unpaired: dict[str, list[str]] = field(default_factory=dict)  # files without partner, by SIDES
    delay_samples: int = 0  # compensated, at h.sampling_rate; a positive delay is a lag
    about: str = ""  # one line for the page


@dataclass(kw_only=True)
class FileResult(Measurement):
    """The Measurement of two files, or the error that prevented it.

    The dictionaries have the keys SIDES; a file without a recording has no "reference".
    """

    name: str
    system: str
    paths: dict[str, str]
    error: str = ""
    sampling_rates: dict[str, int] = field(default_factory=dict)  # Hz, of the files
    samples: int = 0  # compared, at h.sampling_rate
    cut_samples: dict[str, int] = field(default_factory=dict)  # cut at the end, at h.sampling_rate


# ------------------------------------------------------------------------------------ the report


def summarize(values: list[float]) -> dict:
    """Returns mean, percentile bootstrap interval (None for fewer than two values) and count."""
    mean = float(np.mean(values)) if values else None
    if len(values) < 2:
        return {"mean": mean, "interval": None, "n": len(values)}
    interval = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=100,  # bounds the memory for thousands of files
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return {"mean": mean, "interval": [float(end) for end in interval], "n": len(values)}


def build_report(
    results: list[FileResult], h: Config, systems: dict[str, System], metrics: Iterable[Metric]
) -> dict:
    """Returns everything that was measured, for JSON. `systems` starts with RECORDINGS, if any."""
    measured = [result for result in results if not result.error]
    missing = {name: reason for result in measured for name, reason in result.missing.items()}
    metrics = [
        metric
        for metric in metrics
        if metric.name not in missing and metric.lowest_sampling_rate <= h.sampling_rate
    ]
    with_reference = [r for r in measured if r.system == RECORDINGS or RECORDINGS in r.paths]
    without = [result for result in measured if result not in with_reference]
    report = {"config": asdict(h), "versions": _versions(metrics), "confidence": CONFIDENCE}
    report["systems"] = {name: asdict(system) for name, system in systems.items()}
    if RECORDINGS in systems:
        report |= _group(with_reference, [*systems], metrics)
    if without or RECORDINGS not in systems:
        generated = [name for name in systems if name != RECORDINGS]
        group = _group(without, generated, [m for m in metrics if not m.needs_reference])
        report |= {"unpaired": group} if RECORDINGS in systems else group
    report["missing"] = missing
    report["skipped"] = [
        {"name": result.name, "system": result.system, "error": result.error}
        for result in results
        if result.error
    ]
    return report


def _group(results: list[FileResult], systems: list[str], metrics: list[Metric]) -> dict:
    files: dict[str, dict] = {}
    for result in results:
        facts = _without(asdict(result), "name", "system", "error", "missing")
        files.setdefault(result.name, {})[result.system] = facts
    return {
        "metrics": {metric.name: _column(metric, files, systems) for metric in metrics},
        "files": [{"name": name, "systems": found} for name, found in files.items()],
    }


def _column(metric: Metric, files: dict[str, dict], systems: list[str]) -> dict:
    """Returns a metric's definition, its means by system and the differences of the same clips."""
    columns = {}
    for system in systems:
        found = {name: by[system]["values"] for name, by in files.items() if system in by}
        known = {name: values.get(metric.name) for name, values in found.items()}
        columns[system] = {name: value for name, value in known.items() if value is not None}
    differences = []
    for first, second in itertools.combinations(columns, 2):
        same = [name for name in columns[first] if name in columns[second]]
        gaps = [columns[second][name] - columns[first][name] for name in same]
        if gaps:
            differences.append({"system": second, "minus": first} | summarize(gaps))
    facts = _without(vars(metric), "function", "install", "lowest_sampling_rate")
    means = {name: summarize(list(values.values())) for name, values in columns.items()}
    return facts | {"systems": means, "differences": differences}


def _without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


def _versions(metrics: Iterable[Metric]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in sorted({"numpy", "scipy", "soxr", *(metric.library for metric in metrics)}):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions


def groups_of(report: dict) -> list[dict]:
    """Returns the groups of clips, each with "metrics" and "files"."""
    return [report, report["unpaired"]] if "unpaired" in report else [report]


def systems_of(group: dict) -> list[str]:
    """Returns the systems that have a mean of some metric, in order."""
    means = [facts["systems"] for facts in group["metrics"].values()]
    known = {name for each in means for name, mean in each.items() if mean["n"]}
    return [name for name in next(iter(means), {}) if name in known or name != RECORDINGS]


def count_files(group: dict, system: str) -> int:
    """Returns the number of measured files of a system."""
    return sum(system in file["systems"] for file in group["files"])


# ------------------------------------------------------------------------------------ the tables


def mean_table(group: dict) -> str:
    """Returns the means with their intervals, one column for each system, in markdown."""
    columns = systems_of(group)
    rows = []
    for name, facts in group["metrics"].items():
        cells = [_mean_cell(facts["systems"][system], group, system) for system in columns]
        rows.append([f"{name} {arrow(facts)}", facts["unit"], *cells])
    clips = [str(count_files(group, system)) for system in columns]
    return _table(["metric", "unit", *columns], [*rows, ["clips", "", *clips]])


def difference_table(group: dict) -> str:
    """Returns the differences of systems over the same clips, in markdown; "" for one system."""
    found = [each for facts in group["metrics"].values() for each in facts["differences"]]
    pairs = dict.fromkeys((f["system"], f["minus"]) for f in found if f["minus"] != RECORDINGS)
    rows = []
    for name, facts in group["metrics"].items():
        found = {(each["system"], each["minus"]): each for each in facts["differences"]}
        cells = [difference_cell(found[pair]) if pair in found else "-" for pair in pairs]
        rows.append([f"{name} {arrow(facts)}", facts["unit"], *cells])
    return _table(["metric", "unit", *map(" - ".join, pairs)], rows) if pairs else ""


def file_table(group: dict) -> str:
    """Returns the value of each file, one column for each system, in markdown."""
    columns = systems_of(group)
    rows = []
    for name, facts in group["metrics"].items():
        for file in group["files"]:
            values = [file["systems"].get(system, {"values": {}})["values"] for system in columns]
            cells = [number(each.get(name)) for each in values]
            rows.append([f"{name} {arrow(facts)}", file["name"], *cells])
    return _table(["metric", "file", *columns], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([one_line(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _mean_cell(summary: dict, group: dict, system: str) -> str:
    some = 0 < summary["n"] < count_files(group, system)
    return number(summary["mean"]) + between(summary) + (f" n={summary['n']}" if some else "")


def difference_cell(summary: dict) -> str:
    """Returns a difference with its interval, in bold if the interval excludes zero."""
    text = f"{summary['mean']:+.3g}{between(summary, '+.3g')}"
    low, high = summary["interval"] or (0, 0)
    return f"**{text}**" if low > 0 or high < 0 else text


def between(summary: dict, form: str = "#.4g") -> str:
    """Returns the interval as " (low to high)", or "" if there is none."""
    low_high = summary["interval"]
    return f" ({' to '.join(format(end, form) for end in low_high)})" if low_high else ""


def number(value: float | None) -> str:
    """Returns a value with four digits, or "-" for None."""
    return "-" if value is None else f"{value:#.4g}"


def arrow(facts: dict) -> str:
    """Returns the direction in which a metric is better."""
    return {"higher": "↑", "lower": "↓"}[facts["better"]]


# ------------------------------------------------------------------------ lines on standard error


def say_unpaired(folder: str, files: list[str], other: str, hint: str = "") -> None:
    """Prints how many files of `folder` have no partner in `other`, and the first of them."""
    if files:
        more = f" and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
        listed = ", ".join(files[:NAMED_FILES])
        note = f"{folder}: without a partner in {other} {len(files)}: {listed}{more}{hint}"
        print(one_line(note), file=sys.stderr)


def say_troubles(result: FileResult, h: Config) -> None:
    """Prints what is wrong with a pair, and which metrics are missing."""
    lines = [f"skipped: {result.error}"] if result.error else []
    for side, cut in result.cut_samples.items():
        if cut > h.n_fft:
            path = result.paths[side]
            lines.append(f"{path}: its last {cut} samples were cut off; its partner is shorter")
    path = result.paths["generated"]
    lines += [f"{path}: no {name} ({reason})" for name, reason in result.reasons.items()]
    for line in lines:
        tqdm.write(one_line(line), file=sys.stderr)
    for name, reason in result.missing.items():
        say_missing(name, reason)


def describe_delay(system: str, samples: int, h: Config) -> str:
    """Returns a line about a compensated delay."""
    verb = "lags" if samples > 0 else "leads"
    milliseconds = 1000 * abs(samples) / h.sampling_rate
    return (
        f"{system}: {verb} by {abs(samples)} samples ({milliseconds:.1f} ms), which is "
        "compensated; --no_align measures the files as they are"
    )


def describe_files(report: dict, system: str) -> str:
    """Returns a line about the files of a system: their number, and what was done to them."""
    files = [
        file["systems"][system]
        for group in groups_of(report)
        for file in group["files"]
        if system in file["systems"]
    ]
    pairs = sum(RECORDINGS in file["paths"] for file in files)
    rate = report["config"]["sampling_rate"]
    cuts = [max(file["cut_samples"].values()) for file in files]
    resampled = sum(set(file["sampling_rates"].values()) != {rate} for file in files)
    skipped = sum(each["system"] == system for each in report["skipped"])
    parts = [
        (pairs, f"{pairs} pairs"),
        (len(files) - pairs, f"{len(files) - pairs} files without a recording"),
        (resampled, f"{resampled} of them resampled"),
        (
            any(cuts),
            f"{sum(map(bool, cuts))} cut to the shorter by at most {max(cuts, default=0)} samples",
        ),
        (skipped, f"{skipped} skipped"),
    ]
    listed = ", ".join(text for applies, text in parts if applies) or "no files"
    return f"{system} at {rate} Hz: {listed}"
