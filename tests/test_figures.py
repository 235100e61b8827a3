"""The scores in cards, README and docs are those that evaluate.py wrote to docs/figures."""

import json
import math
import re

import pytest

from tools.toy import ROOT

COLUMNS = {
    "DistillMOS": "distill_mos",
    "PESQ-WB": "pesq_wb",
    "mel L1": "mel_l1",
    "LTAS": "ltas",
    "STOI": "stoi",
}
PAGES = [
    *(ROOT / name for name in ("README.md", "docs/results.md")),
    *sorted(ROOT.glob("pretrained/*/README.md")),
]


def measured() -> list[dict[str, float]]:
    """The means of each system on each list of clips, by metric."""
    rows = []
    for path in sorted(ROOT.glob("docs/figures/*_validation.json")):
        report = json.loads(path.read_text())
        rows += [
            {name: facts["systems"][system]["mean"] for name, facts in report["metrics"].items()}
            for system in report["systems"]
        ]
    return rows


def tables(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of each table in markdown, in cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        )
        found.append((header, rows))
    return found


def scores(path) -> list[tuple[str, dict[str, str]]]:
    """The rows of a page with a DistillMOS, each with its scores as they are written."""
    found = []
    for header, rows in tables(path.read_text()):
        names = [re.sub(r"\W*[↑↓]", "", cell) for cell in header]
        columns = {i: COLUMNS.get(name, name) for i, name in enumerate(names)}
        if "distill_mos" not in columns.values():
            continue
        for row in rows:
            numbers = {i: cell for i, cell in enumerate(row) if re.fullmatch(r"[\d.]+", cell)}
            cells = {columns[i]: cell for i, cell in numbers.items() if columns[i] in METRICS}
            found.append((row[0], cells))
    return found


METRICS = {name for row in measured() for name in row}


def is_written(value: float | None, cell: str) -> bool:
    """True where `cell` is `value` to the digits that it has."""
    digits = len(cell.partition(".")[2])
    return value is not None and math.isclose(value, float(cell), abs_tol=0.5001 * 10**-digits)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_scores_are_those_that_were_measured(path):
    for title, cells in scores(path):
        fitting = [
            row
            for row in measured()
            if all(is_written(row.get(name), cell) for name, cell in cells.items())
        ]
        assert fitting, f"{title}: {cells} is of no system in docs/figures"


def test_every_card_has_scores():
    for card in ROOT.glob("pretrained/*/README.md"):
        assert len(scores(card)) >= 3, card
