"""The table of tools/runtimes.py."""

import onnx

from tools import runtimes
from tools.toy import run_main


def test_runtimes_are_compared_with_eager_pytorch(exported, capsys, monkeypatch):
    # The spawned process does not see this patch and fails as it does without the package.
    names = (runtimes.BASELINE, "no such runtime", "ONNX Runtime fp32")
    monkeypatch.setattr(runtimes, "RUNTIMES", dict.fromkeys(names))
    monkeypatch.setattr(runtimes, "to_onnx", lambda *_: onnx.load(exported / "misrnet.onnx"))
    flags = ("--config", exported / "config.json", "--seconds", 1, "--repeats", 2, "--clock", "cpu")
    run_main(runtimes, *flags)
    printed = capsys.readouterr()
    assert "no such runtime: skipped, KeyError" in printed.err
    rows = [line.strip("| ").split(" | ") for line in printed.out.splitlines()[-2:]]
    assert [row[3] for row in rows] == [runtimes.BASELINE, "ONNX Runtime fp32"]
    assert rows[0][-1].startswith("1.00 (1.00")
    for row in rows:
        speed, ratio = float(row[4].split()[0].replace(",", "")), float(row[5].split()[0])
        assert speed > 1 and ratio > 0.01
