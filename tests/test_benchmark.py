"""The benchmark's tables."""

import json

import pytest

from tools import benchmark
from tools.toy import ROOT, run_main, write_config

NAMES = ("istft", "hifigan")


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


def test_inference_is_timed_beside_plain_hifigan(tmp_path, capsys):
    configs = [
        write_config(tmp_path / f"{i}.json", f"configs/{i}_v2.json", upsample_initial_channel=128)
        for i in NAMES
    ]
    run_main(
        benchmark,
        *("--infer", "--config", *configs),
        *("--seconds", 1, "--repeats", 2, "--device", "cpu"),
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    for row in rows:
        speeds = [float(cell.split()[0]) for cell in (row[2], row[3], row[5], row[6])]
        assert min(speeds) > 0
    assert [bool(row[-1].strip(" |")) for row in rows] == [True, False]  # MRF has no loop


def test_a_generator_of_another_width_has_no_plain_hifigan_beside_it(tmp_path, capsys):
    config = write_config(tmp_path / "toy.json")
    flags = ("--seconds", 1, "--repeats", 1, "--device", "cpu")
    run_main(benchmark, "--infer", "--config", config, *flags)
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert cells[3] == cells[6] == ""


def test_memory_is_measured_whole_and_in_chunks(tmp_path, capsys):
    config = write_config(tmp_path / "toy.json")
    flags = ("--memory", "--minutes", 1, "--chunk_frames", 0, 64, "--device", "cpu")
    run_main(benchmark, "--config", config, *flags, "--output", tmp_path / "results.json")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[2] for row in rows] == ["whole", "64"]
    whole, chunked = (float(row[3].replace(",", "")) for row in rows)
    assert 100 < chunked < whole
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["peak MB"] for row in results["memory"]] == [whole, chunked]
    assert {"device", "PyTorch", "commit"} <= results["machine"].keys()
    assert results["sizes"][0]["config"] == str(config)


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
