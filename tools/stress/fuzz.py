"""Tries many more cases of each kind than the tests do, and prints what happened as a table.

    OMP_NUM_THREADS=1 python tools/stress/fuzz.py 10000 --only sound

By hand, not by pytest. What fails is shown as by pytest, with the smallest case that was found.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
from utils import command_line, positive

ADDRESS_SPACE = 12 * 2**30  # bytes; what would take more fails here, and harms nothing else


class Table:
    """A pytest plugin that prints the outcomes of test_fuzz.py."""

    def pytest_sessionfinish(self):
        outcomes = sys.modules["tests.test_fuzz"].OUTCOMES
        print("\n\n| kind of case | taken | refused in one line |\n|---|---|---|")
        for kind in sorted({kind for kind, _ in outcomes}):
            taken, refused = outcomes[kind, "taken"], outcomes[kind, "refused in one line"]
            print(f"| {kind} | {taken} | {refused} |")


def main() -> int:
    """Runs test_fuzz.py with more cases."""
    parser = argparse.ArgumentParser(description="Tries many cases of each kind.")
    parser.add_argument("cases", type=positive, help="of each kind that is drawn at random")
    parser.add_argument("--only", default="", help="pytest's -k: a word of the tests' names")
    a = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    settings.register_profile(
        "many", max_examples=a.cases, derandomize=True, database=None, deadline=None
    )
    settings.load_profile("many")
    start = time.monotonic()
    status = pytest.main(["-x", "-k", a.only, "tests/test_fuzz.py"], plugins=[Table()])
    print(f"{time.monotonic() - start:.0f} s")
    return int(status)


if __name__ == "__main__":
    command_line(main)
