"""What evaluate.py found, as JSON, as tables and in words."""

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
from evaluation.metrics import SEED, SIDES, Measurement, Metric, name_missing

RECORDINGS = SIDES[0]  # the system that the others are compared with
CONFIDENCE = 0.95
RESAMPLES = 9999  # of the bootstrap
NAMED_FILES = 5  # of those without a partner are named on the terminal


@dataclass
class System:
    """A folder of generated speech, or that of the recordings."""

    folder: str
    unpaired: dict[str, list[str]]  # files without a partner, of "reference" and "generated"
    delay_samples: int = 0  # that were made up for, at h.sampling_rate; above 0 it lags


@dataclass(kw_only=True)
class FileResult(Measurement):
    """A Measurement of two files, or the error that stopped it.

    Dictionaries are of "reference" and "generated".
    """

    name: str
    system: str
    paths: dict[str, str]
    error: str = ""
    sampling_rates: dict[str, int] = field(default_factory=dict)  # Hz, of the files
    samples: int = 0  # that were compared, at h.sampling_rate
    cut_samples: dict[str, int] = field(default_factory=dict)  # off the end, at h.sampling_rate


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
    results: list[FileResult], h: Config, systems: dict[str, System], metrics: Iterable[Metric]
) -> dict:
    """Everything that was found, for JSON. `systems`: RECORDINGS first, by name."""
    measured = [result for result in results if not result.error]
    missing = {name: reason for result in measured for name, reason in result.missing.items()}
    metrics = [metric for metric in metrics if metric.name not in missing]
    files: dict[str, dict] = {}
    for result in measured:
        facts = _without(asdict(result), "name", "system", "error", "missing")
        files.setdefault(result.name, {})[result.system] = facts
    report = {"config": asdict(h), "versions": _versions(metrics), "confidence": CONFIDENCE}
    report["systems"] = {name: asdict(system) for name, system in systems.items()}
    report["metrics"] = {metric.name: _column(metric, files, systems) for metric in metrics}
    report["missing"] = missing
    report["files"] = [{"name": name, "systems": found} for name, found in files.items()]
    report["skipped"] = [
        {"name": result.name, "system": result.system, "error": result.error}
        for result in results
        if result.error
    ]
    return report


def _column(metric: Metric, files: dict[str, dict], systems: Iterable[str]) -> dict:
    """What a metric is, its mean of each system, and the differences over the same clips."""
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
    facts = _without(vars(metric), "function", "requirements")
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


def columns_of(report: dict) -> list[str]:
    """The systems that have a column: the recordings only where a metric knows them."""
    metrics = report["metrics"].values()
    known = any(facts["systems"][RECORDINGS]["n"] for facts in metrics)
    return [name for name in report["systems"] if known or name != RECORDINGS]


def mean_table(report: dict) -> str:
    """The means with their intervals, a column a system, in markdown."""
    columns = columns_of(report)
    rows = []
    for name, facts in report["metrics"].items():
        cells = [_mean_cell(facts["systems"][system], report, system) for system in columns]
        rows.append([f"{name} {arrow(facts)}", facts["unit"], *cells])
    clips = [str(count_files(report, system)) for system in columns]
    return _table(["metric", "unit", *columns], [*rows, ["clips", "", *clips]])


def difference_table(report: dict) -> str:
    """The differences of generated systems over the same clips, in markdown; "" for one system."""
    found = [each for facts in report["metrics"].values() for each in facts["differences"]]
    pairs = dict.fromkeys((f["system"], f["minus"]) for f in found if f["minus"] != RECORDINGS)
    rows = []
    for name, facts in report["metrics"].items():
        found = {(each["system"], each["minus"]): each for each in facts["differences"]}
        cells = [difference_cell(found[pair]) if pair in found else "-" for pair in pairs]
        rows.append([f"{name} {arrow(facts)}", facts["unit"], *cells])
    return _table(["metric", "unit", *map(" - ".join, pairs)], rows) if pairs else ""


def file_table(report: dict) -> str:
    """The value of each file, a column a system, in markdown."""
    columns = columns_of(report)
    rows = []
    for name, facts in report["metrics"].items():
        for file in report["files"]:
            values = [file["systems"].get(system, {"values": {}})["values"] for system in columns]
            cells = [number(each.get(name)) for each in values]
            rows.append([f"{name} {arrow(facts)}", file["name"], *cells])
    return _table(["metric", "file", *columns], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([one_line(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _mean_cell(summary: dict, report: dict, system: str) -> str:
    some = 0 < summary["n"] < count_files(report, system)
    return number(summary["mean"]) + between(summary) + (f" n={summary['n']}" if some else "")


def difference_cell(summary: dict) -> str:
    """A difference with its interval; in bold where that does not hold zero."""
    text = f"{summary['mean']:+.3g}{between(summary, '+.3g')}"
    low, high = summary["interval"] or (0, 0)
    return f"**{text}**" if low > 0 or high < 0 else text


def between(summary: dict, form: str = "#.4g") -> str:
    """The interval in words; "" where there is none."""
    low_high = summary["interval"]
    return f" ({' to '.join(format(end, form) for end in low_high)})" if low_high else ""


def number(value: float | None) -> str:
    """A value as the tables show it."""
    return "-" if value is None else f"{value:#.4g}"


def arrow(facts: dict) -> str:
    """Where better is."""
    return {"higher": "↑", "lower": "↓"}[facts["better"]]


def count_files(report: dict, system: str) -> int:
    """The files of a system that were measured."""
    return sum(system in file["systems"] for file in report["files"])


def name_unpaired(folder: str, names: list[str], other: str) -> None:
    """Says on standard error how many files of `folder` have no partner in `other`, and which."""
    if names:
        more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
        listed = ", ".join(names[:NAMED_FILES])
        note = f"{folder}: without a partner in {other} {len(names)}: {listed}{more}"
        print(one_line(note), file=sys.stderr)


def name_troubles(result: FileResult, h: Config) -> None:
    """Says on standard error what is amiss with a pair, and which metrics are missing."""
    lines = [f"skipped: {result.error}"] if result.error else []
    for side, cut in result.cut_samples.items():
        if cut > h.n_fft:
            path = result.paths[side]
            lines.append(f"{path}: its last {cut} samples were cut off; its partner is shorter")
    path = result.paths.get("generated", result.name)
    lines += [f"{path}: no {name} ({reason})" for name, reason in result.reasons.items()]
    for line in lines:
        tqdm.write(one_line(line), file=sys.stderr)
    for name, reason in result.missing.items():
        name_missing(name, reason)


def describe_delay(system: str, samples: int, h: Config) -> str:
    """That a system lags or leads, by how much, and what was done."""
    verb = "lags" if samples > 0 else "leads"
    milliseconds = 1000 * abs(samples) / h.sampling_rate
    return (
        f"{system}: {verb} by {abs(samples)} samples ({milliseconds:.1f} ms), which is made up "
        "for; --no_align measures it as it is"
    )


def describe_files(report: dict, system: str) -> str:
    """What was done to the files of a system before they were compared."""
    files = [file["systems"][system] for file in report["files"] if system in file["systems"]]
    rate = report["config"]["sampling_rate"]
    cuts = [max(result["cut_samples"].values()) for result in files]
    resampled = sum(set(result["sampling_rates"].values()) != {rate} for result in files)
    skipped = sum(each["system"] == system for each in report["skipped"])
    return (
        f"{system}: {len(files)} pairs at {rate} Hz"
        + (f", {resampled} of them resampled to it" if resampled else "")
        + (
            f", {sum(map(bool, cuts))} cut to the shorter by at most {max(cuts)} samples"
            if any(cuts)
            else ""
        )
        + (f", {skipped} skipped" if skipped else "")
    )
