"""The scores in cards and docs/results.md are those that evaluate.py wrote to docs/figures."""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest

from tools.toy import ROOT

COLUMNS = {
    "DistillMOS": "distill_mos",
    "PLCMOS": "plcmos",
    "PESQ-WB": "pesq_wb",
    "mel L1": "mel_l1",
    "LTAS": "ltas",
    "STOI": "stoi",
}
PAGES = [
    ROOT / "docs/results.md",
    *sorted(ROOT.glob("pretrained/*/README.md")),
]


@cache
def measured() -> list[dict[str, float]]:
    """Returns the means of each system on each list of clips, by metric."""
    reports = [json.loads(path.read_text()) for path in ROOT.glob("docs/figures/*.json")]
    return [
        {name: facts["systems"][system]["mean"] for name, facts in group["metrics"].items()}
        for report in reports
        for group in (report, report.get("unpaired", {"metrics": {}}))
        for system in next(iter(group["metrics"].values()), {"systems": ()})["systems"]
    ]


def tables(text: str) -> list[list[list[str]]]:
    """Returns the cells of each table in markdown, without the line below the header."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = [line.strip().strip("|").split("|") for line in block.splitlines()]
        found.append([[cell.strip() for cell in line] for line in [lines[0], *lines[2:]]])
    return found


def scores(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Returns the rows of tables with a DistillMOS, each with its scores as they are written."""
    known, found = set().union(*measured()), []
    for header, *rows in tables(path.read_text()):
        names = [re.sub(r"\W*[↑↓]", "", cell) for cell in header]
        columns = [COLUMNS.get(name, name) for name in names]
        for row in rows if "distill_mos" in columns else ():
            cells = dict(zip(columns, row, strict=True))
            numbers = {k: v for k, v in cells.items() if k in known and re.fullmatch(r"[\d.]+", v)}
            found.append((row[0], numbers))
    return found


def is_written(value: float | None, cell: str) -> bool:
    """True if `cell` is `value`, rounded to the digits of the cell."""
    digits = len(cell.partition(".")[2])
    return value is not None and math.isclose(value, float(cell), abs_tol=0.5001 * 10**-digits)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_scores_are_those_that_were_measured(path):
    assert len(scores(path)) >= 3
    for title, cells in scores(path):
        assert any(
            all(is_written(row.get(name), cell) for name, cell in cells.items())
            for row in measured()
        ), f"{title}: {cells} belongs to no system in docs/figures"
