"""The benchmark's tables."""

import pytest

import benchmark
from tests.conftest import ROOT, run_main, write_config


@pytest.mark.parametrize(
    ("config", "row"),
    [
        ("config_v2.json", "| 614,825 | 2.61 | 70,702,792 | 22.9 |"),
        ("configs/hifigan_v2.json", "| 925,985 | 1.66 | 70,702,792 | 22.9 |"),
    ],
)
def test_sizes_and_arithmetic(config, row, capsys):
    """The generators' figures are known from elsewhere, counted by hooks on HiFi-GAN's classes."""
    run_main(benchmark, "--config", ROOT / config)
    assert capsys.readouterr().out.splitlines()[-1].endswith(row)


def test_training_steps_are_timed_in_turns(tmp_path, capsys):
    config = write_config(tmp_path / "toy.json")
    flags = ("--train", "--batch_size", 2, "--repeats", 2, "--device", "cpu")
    run_main(benchmark, "--config", config, *flags)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[2] for row in rows] == ["textbook, fp32", "ours, fp32", "ours, bf16"]
    assert rows[0][-1] == "1.00 |"
    for row in rows:
        seconds, ratio = float(row[3].split()[0]), float(row[4].split()[0])
        assert seconds > 0 and ratio > 0
