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


@pytest.fixture(params=[True, False], ids=["bfloat16", "none"])
def has_bfloat16(monkeypatch, request) -> bool:
    """Whether the processor is said to have it. Where not, it is not measured."""
    monkeypatch.setattr(benchmark, "computes_in_bfloat16", lambda _: request.param)
    return request.param


def test_training_steps_are_timed_in_turns(tmp_path, capsys, has_bfloat16):
    config, output = write_config(tmp_path / "toy.json"), tmp_path / "results.json"
    flags = ("--train", "--batch_size", 2, "--repeats", 1, "--device", "cpu", "--output", output)
    run_main(benchmark, "--config", config, *flags)
    steps = ["textbook, fp32", "ours, fp32"] + ["ours, bf16"] * has_bfloat16
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-len(steps) :]]
    assert [row[2] for row in rows] == steps
    assert rows[0][-1] == "1.00 |"
    for row in rows:
        seconds, ratio = float(row[3].split()[0]), float(row[4].split()[0])
        assert seconds > 0 and ratio > 0
    results = json.loads(output.read_text())
    assert {"device", "PyTorch", "commit"} <= results["machine"].keys()
    assert results["sizes"][0]["config"] == str(config)
    assert [row["step"] for row in results["training"]] == [row[2] for row in rows]


def test_inference_is_timed_beside_plain_hifigan(tmp_path, monkeypatch, capsys, has_bfloat16):
    """Of the same width, where there is one; MRF has no loop to be compared with."""
    monkeypatch.setattr(benchmark, "MATMUL_SIZE", 64)  # minutes, where bfloat16 is made up
    toy = write_config(tmp_path / "toy.json", "configs/hifigan_v2.json")
    wide = write_config(tmp_path / "wide.json", upsample_initial_channel=128)
    flags = ("--seconds", 1, "--repeats", 1, "--device", "cpu")
    run_main(benchmark, "--infer", "--config", toy, wide, *flags)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    first = (2, 5) if has_bfloat16 else (2,)  # column of each precision: its speed
    beside = [[bool(row[i].strip(" |")) for i in (*(i + 1 for i in first), -1)] for row in rows]
    assert beside == [[False] * (len(first) + 1), [True] * (len(first) + 1)]
    assert all(float(row[i].split()[0]) > 0 for row in rows for i in first)


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
