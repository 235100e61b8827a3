"""The benchmark's tables."""

import json

import pytest
import torch

from tools import benchmark
from tools.toy import ROOT, run_main, write_config


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
    config, output = write_config(tmp_path / "toy.json"), tmp_path / "results.json"
    flags = ("--train", "--batch_size", 2, "--repeats", 1, "--device", "cpu", "--output", output)
    run_main(benchmark, "--config", config, *flags)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[2] for row in rows] == ["textbook, fp32", "ours, fp32", "ours, bf16"]
    assert rows[0][-1] == "1.00 |"
    for row in rows:
        seconds, ratio = float(row[3].split()[0]), float(row[4].split()[0])
        assert seconds > 0 and ratio > 0
    results = json.loads(output.read_text())
    assert {"device", "PyTorch", "commit"} <= results["machine"].keys()
    assert results["sizes"][0]["config"] == str(config)
    assert [row["step"] for row in results["training"]] == [row[2] for row in rows]


def test_inference_is_timed_beside_plain_hifigan(tmp_path, capsys):
    """Of the same width, where there is one; MRF has no loop to be compared with."""
    toy = write_config(tmp_path / "toy.json", "configs/hifigan_v2.json")
    wide = write_config(tmp_path / "wide.json", upsample_initial_channel=128)
    flags = ("--seconds", 1, "--repeats", 1, "--device", "cpu")
    run_main(benchmark, "--infer", "--config", toy, wide, *flags)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    beside = [[bool(row[i].strip(" |")) for i in (3, 6, 8)] for row in rows]
    assert beside == [[False] * 3, [True] * 3]
    for row in rows:
        assert float(row[2].split()[0]) > 0 and float(row[5].split()[0]) > 0


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    config = write_config(tmp_path / "toy.json")
    row = benchmark.memory_row(str(config), 0.1, 64, torch.device("cpu"))
    assert row["chunk_frames"] == 64
    assert 100 < row["peak MB"] < 2000
    assert row["first sound, s"] < 60 / row["times real time"]  # before the last


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.012345, "0.0123"),
        (1.2345, "1.23"),
        (41.69, "41.7"),
        (1234.5, "1234"),
        (benchmark.Spread(0.5, 1.0, 20.0), "1.00 (0.500 to 20.0)"),
    ],
)
def test_figures_have_three_digits(value, text):
    assert benchmark.cell(value) == text


def test_memory_has_a_row_for_each_length_and_chunk(tmp_path, monkeypatch):
    def row(config, minutes, chunk, device) -> dict:
        return {"minutes": minutes, "chunk": chunk}

    monkeypatch.setattr(benchmark, "memory_row", row)
    flags = ("--config", write_config(tmp_path / "toy.json"), "--output", tmp_path / "a.json")
    run_main(
        benchmark,
        *("--memory", *flags, "--minutes", 1, "--chunk_frames", 0, 64, "--device", "cpu"),
    )
    rows = json.loads((tmp_path / "a.json").read_text())["memory"]
    assert rows == [{"minutes": 1, "chunk": 0}, {"minutes": 1, "chunk": 64}]
