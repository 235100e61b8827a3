"""A few cases of each kind of tools/stress/fuzz.py: enough are taken, and enough are refused."""

import pytest

from env import UserError
from tools.stress import fuzz

# Of 20 cases, how many must be taken, and how many refused, at the least: libraries differ a little
# in what they make of a damaged file.
LEAST = {
    "config, one value replaced": (4, 12),
    "file list": (5, 12),
    "WAV file, damaged": (12, 2),
    "RF64 file, damaged": (8, 5),
    "FLAC file, damaged": (1, 12),
    "OGG file, damaged": (1, 10),
    "MP3 file, damaged": (10, 1),
    "AIFF file, damaged": (11, 2),
    "AU file, damaged": (14, 1),
    "W64 file, damaged": (12, 2),
    "WAV header that lies": (10, 3),
    "npy, damaged": (7, 7),
    "npy, another header": (3, 14),
    "checkpoint, damaged": (4, 8),
    "old checkpoint, damaged": (2, 10),
    "checkpoint, another tensor": (8, 5),
}


@pytest.mark.parametrize("kind", LEAST)
def test_what_is_damaged_is_taken_and_right_or_refused_in_one_line(kind):
    taken, refused = fuzz.try_cases(kind, 20)
    assert taken >= LEAST[kind][0]
    assert refused >= LEAST[kind][1]


def test_each_kind_of_file_is_tried():
    assert set(fuzz.KINDS) - set(LEAST) == {"config, damaged"}  # all 20 of which would be refused


def taken_but_wrong(path):
    raise AssertionError("not what was to be")


def refused_without_its_name(path):
    raise UserError("a file cannot be read")


def refused_in_two_lines(path):
    raise BadUserError(f"{path}: cannot be read\nthe end")


class BadUserError(UserError):
    """Keeps its lines."""

    def __str__(self) -> str:
        return self.args[0]


@pytest.mark.parametrize("check", [taken_but_wrong, refused_without_its_name, refused_in_two_lines])
def test_what_is_neither_is_noticed_and_kept(monkeypatch, tmp_path, check):
    monkeypatch.setitem(fuzz.KINDS, "npy, damaged", fuzz.Kind("a.npy", lambda draw: b"x", check))
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(AssertionError, match=r"npy, damaged, case 0, left in .*a\.npy"):
        fuzz.try_cases("npy, damaged", 1)
    (kept,) = tmp_path.glob("fuzz_*/a.npy")
    assert kept.read_bytes() == b"x"
