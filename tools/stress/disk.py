"""Runs the scripts on disks that are really full: small file systems in memory, of many sizes.

    python tools/stress/disk.py --seed 0 --disks 20

Needs Linux and `unshare -rm`, which lets a user mount. On each disk train.py, inference.py and
meldataset.py end with one line and status 1, or are done; no half file has a final name, nothing
temporary is left, and with more room a trainer goes on to where an undisturbed one gets.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
from checkpoint import checkpoint_path, checkpoint_steps, paired_steps
from tools.toy import ROOT, corpus_arguments, make_corpus, write_config
from weights import load_checkpoint

STEPS = 4


def run(*command, stdout: int = subprocess.DEVNULL) -> tuple[int, list[str]]:
    """A script of the repository: its status and its lines on standard error."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr.splitlines()


def check(what: str, disk: Path, status: int, lines: list[str]) -> None:
    """Asserts that a script is done, or has failed as it should, and left no half file."""
    if status != 0:
        assert status == 1 and len(lines) == 1 and "cannot be written" in lines[0], lines
    assert not list(disk.rglob("*.tmp"))
    for prefix in ("g", "do"):
        for steps in checkpoint_steps(disk / "cp", prefix):
            load_checkpoint(checkpoint_path(disk / "cp", prefix, steps))
    for path in disk.rglob("*.wav"):
        assert len(soundfile.read(path)[0]) % 256 == 0 and path.stat().st_size > 256
    for path in disk.rglob("*.npy"):
        np.load(path)
    said = lines[0].split("/", 1)[1].split("/", 3)[-1] if lines else "done"
    print(f"  {what}: {said}; pairs {paired_steps(disk / 'cp')}")


def mount(disk: Path, kib: int, way: str = "") -> None:
    """Mounts a disk of `kib` KiB in memory; `way` may be "remount,", which keeps its files."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{way}size={kib}k", "disk", disk], check=True)


def main() -> None:
    """Fills disks of random sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if "IN_NAMESPACE" not in os.environ:
        command = ["unshare", "-rm", sys.executable, *sys.argv]
        os.execvpe("unshare", command, os.environ | {"IN_NAMESPACE": "1"})
    choose = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name, "disk")
        disk.mkdir()
        corpus, config = make_corpus(folder), write_config(folder / "config.json")
        train = ["train.py", *corpus_arguments(corpus), "--config", config]
        train += ["--checkpoint_interval", 1, "--summary_interval", 1, "--validation_interval", 2]
        train += ["--training_steps", STEPS, "--checkpoint_path"]
        assert run(*train, folder / "straight") == (0, [])
        expected = load_checkpoint(checkpoint_path(folder / "straight", "do", STEPS))
        for _ in range(a.disks):
            kib = choose.choice((8, 60, 400, 1300, 2600, 4500, 6000))
            kib = choose.randint(kib // 2, kib)
            print(f"{kib} KiB")
            mount(disk, kib)
            check("train", disk, *run(*train, disk / "cp"))
            mount(disk, 100_000, "remount,")
            assert run(*train, disk / "cp") == (0, [])
            found = load_checkpoint(checkpoint_path(disk / "cp", "do", STEPS))
            assert all((found["mpd"][key] == expected["mpd"][key]).all() for key in found["mpd"])
            subprocess.run(["umount", disk], check=True)
            mount(disk, choose.randint(2, 40) * 4)
            flags = ("--input_wavs_dir", corpus / "wavs", "--output_dir", disk / "wavs")
            checkpoint = checkpoint_path(folder / "straight", "g", STEPS)
            flags += ("--checkpoint_file", checkpoint, "--device", "cpu")
            check("inference", disk, *run("inference.py", *flags))
            subprocess.run(["umount", disk], check=True)
        print("read-only")
        mount(disk, 100_000)
        assert run(*train, disk / "cp") == (0, [])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        train[train.index("--training_steps") + 1] = STEPS + 1
        check("train", disk, *run(*train, disk / "cp"))
        check("train", disk, *run(*train, disk / "new"))
        check("inference", disk, *run("inference.py", *flags))
        subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    main()
