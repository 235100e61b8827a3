"""The table of runtimes."""

import onnx

from tools import runtimes
from tools.toy import run_main


def test_runtimes_take_turns_beside_eager(exported, capsys, monkeypatch):
    # A process of its own has never heard of the second, as of a package that is not installed.
    names = (runtimes.BASE, "none such", "ONNX Runtime fp32")
    monkeypatch.setattr(runtimes, "RUNTIMES", dict.fromkeys(names))
    monkeypatch.setattr(runtimes, "to_onnx", lambda *_: onnx.load(exported / "misrnet.onnx"))
    flags = ("--config", exported / "config.json", "--seconds", 1, "--repeats", 2, "--clock", "cpu")
    run_main(runtimes, *flags)
    said = capsys.readouterr()
    assert "none such: passed over, KeyError" in said.err
    rows = [line.strip("| ").split(" | ") for line in said.out.splitlines()[-2:]]
    assert [row[3] for row in rows] == [runtimes.BASE, "ONNX Runtime fp32"]
    assert rows[0][-1].startswith("1.00 (1.00")
    for row in rows:
        speed, ratio = float(row[4].split()[0].replace(",", "")), float(row[5].split()[0])
        assert speed > 1 and ratio > 0.01
