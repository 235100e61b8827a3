"""Vocodes thousands of short files and one of an hour, and watches the memory that it takes.

    python tools/stress/load.py --files 5000 --minutes 60

Made-up sound and weights, in a temporary folder, through the real command on the CPU. Prints the
resident memory at intervals, and fails where the short files leave more and more of it behind.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
from env import load_config
from models import Generator
from tools.toy import ROOT, save_checkpoint, speech_like, write_config

RATE = 22050
INTERVAL = 5.0  # seconds from one look to the next
MAX_GROWTH = 30  # MiB, from the first to the last quarter of the short files


def make_inputs(folder: Path, files: int, minutes: int) -> None:
    """Short clips of 0.2 to 0.5 s, in folders of 100, and a long one."""
    random = np.random.default_rng(0)
    voice = speech_like(10)
    for i in range(files):
        path = folder / f"short/{i // 100:02}/{i:05}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        start, length = random.integers(9 * RATE), random.integers(0.2 * RATE, 0.5 * RATE)
        soundfile.write(path, voice[start : start + length], RATE, subtype="PCM_16")
    (folder / "long").mkdir()
    soundfile.write(folder / "long/long.wav", np.tile(voice, 6 * minutes), RATE, subtype="PCM_16")


def make_checkpoint(folder: Path, config: str) -> Path:
    """A g_ file of random weights beside its config."""
    torch.manual_seed(0)
    generator = Generator(load_config(write_config(folder / "config.json", config)))
    save_checkpoint(folder / "g_00000001", {"generator": generator.state_dict()})
    return folder / "g_00000001"


def resident_mib(pid: int, name: str) -> int:
    """VmRSS, now, or VmHWM, the most so far, of a process; 0 once it has ended."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def watch(command: list[str], log: Path) -> list[tuple[float, int]]:
    """Runs `command` to its end and returns [(seconds, MiB)]; prints the peak and the duration."""
    begin, seen, peak = time.monotonic(), [], 0
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        while process.poll() is None:
            seen.append((time.monotonic() - begin, resident_mib(process.pid, "VmRSS")))
            peak = max(peak, resident_mib(process.pid, "VmHWM"))
            try:
                process.wait(INTERVAL)
            except subprocess.TimeoutExpired:
                continue
    seconds = time.monotonic() - begin
    assert process.returncode == 0, log.read_text()
    print(f"{seconds:.0f} s, peak {peak} MiB; {log.read_text().splitlines()[-1]}")
    shown = seen[:: max(1, len(seen) // 20)]
    print("  " + ", ".join(f"{at:.0f} s: {mib}" for at, mib in shown))
    return seen


def main() -> None:
    """Makes the inputs, vocodes them and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--config", default="configs/istft_v2.json", help="made toy-sized")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder / "in", a.files, a.minutes)
        checkpoint = make_checkpoint(folder, a.config)
        for kind, count in (("short", a.files), ("long", 1)):
            print(f"{kind}: {count} files")
            command = [sys.executable, "inference.py", "--device", "cpu"]
            command += ["--input_wavs_dir", str(folder / "in" / kind)]
            command += ["--output_dir", str(folder / "out" / kind)]
            command += ["--checkpoint_file", str(checkpoint)]
            seen = watch(command, folder / "log")
            written = list((folder / "out" / kind).rglob("*_generated.wav"))
            assert len(written) == count, f"{len(written)} files written, not {count}"
            if kind == "short" and len(seen) >= 8:
                quarter = len(seen) // 4
                growth = np.mean([m for _, m in seen[-quarter:]]) - np.mean(
                    [m for _, m in seen[quarter : 2 * quarter]]
                )
                print(f"  grew by {growth:.0f} MiB from the second quarter to the last")
                assert growth <= MAX_GROWTH


if __name__ == "__main__":
    main()
