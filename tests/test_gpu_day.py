"""tools/gpu_day.sh, dry: every step runs on the CPU and leaves its file."""

import os
import subprocess
import sys

from tools.toy import ROOT


def test_a_dry_run_does_every_step(tmp_path):
    out = tmp_path / "day"
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [ROOT / "tools/gpu_day.sh", out, "--dry-run"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    steps = dict(line.split(": ", 1) for line in (out / "summary.txt").read_text().splitlines())
    assert set(steps) == {"tests", "train_config_v2", "infer", "profile", "loader_1", "training"}
    failed = {name: told for name, told in steps.items() if not told.startswith("status 0,")}
    assert failed == {}, "\n".join((out / f"{name}.txt").read_text() for name in failed)
    assert (out / "train_config_v2.figures.json").exists()
    assert (out / "cp_training/g_00000004").exists()
