"""A few cases of each kind of tools/stress/fuzz.py."""

import pytest

from env import UserError
from tools.stress import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_read_correctly_or_refused_in_one_line(kind):
    taken, refused = fuzz.try_cases(kind, 10)
    assert taken + refused == 10


class TwoLinedError(UserError):
    """An error whose message keeps its line breaks; a UserError joins them."""

    def __str__(self) -> str:
        return self.args[0]


def fail_with(error: Exception):
    def check(_path):
        raise error

    return check


@pytest.mark.parametrize(
    "error", [AssertionError("wrong"), UserError("unnamed"), TwoLinedError("a.npy\nb")], ids=repr
)
def test_other_results_are_noticed_and_the_file_is_kept(monkeypatch, tmp_path, error):
    kind = fuzz.Kind("a.npy", lambda draw: b"x", fail_with(error))
    monkeypatch.setitem(fuzz.KINDS, "npy, damaged", kind)
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(AssertionError, match=r"npy, damaged, case 0, left in .*a\.npy"):
        fuzz.try_cases("npy, damaged", 1)
    (kept,) = tmp_path.glob("fuzz_*/a.npy")
    assert kept.read_bytes() == b"x"
