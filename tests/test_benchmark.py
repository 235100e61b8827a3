"""The tables of tools/benchmark.py."""

import json

import pytest
import torch

from inference import Streamer
from tools import benchmark
from tools.tables import MedianRange, cell
from tools.toy import ROOT, run_main, write_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "row"),
    [
        ("config_v2.json", "| 614,825 | 2.61 | 70,702,792 | 22.9 |"),
        ("configs/hifigan_v2.json", "| 925,985 | 1.66 | 70,702,792 | 22.9 |"),
    ],
)
def test_sizes_and_arithmetic_equal_those_counted_on_hifigan_s_own_classes(config, row, capsys):
    run_main(benchmark, "--config", ROOT / config)
    assert capsys.readouterr().out.splitlines()[-1].endswith(row)


def test_training_steps_are_timed_beside_hifigan_s(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "computes_in_bfloat16", lambda _: True)
    config, output = write_config(tmp_path / "toy.json"), tmp_path / "results.json"
    flags = ("--train", "--batch_size", 2, "--repeats", 1, "--device", "cpu", "--output", output)
    run_main(benchmark, "--config", config, *flags)
    steps = [benchmark.REFERENCE_STEP, "ours, fp32", "ours, bf16"]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-len(steps) :]]
    assert [row[2] for row in rows] == steps
    assert rows[0][-1] == "1.00 |"
    for row in rows:
        assert float(row[3].split()[0]) > 0 and float(row[4].split()[0]) > 0
    results = json.loads(output.read_text())
    assert {"device", "PyTorch", "commit"} <= results["machine"].keys()
    assert results["sizes"][0]["config"] == str(config)
    assert [row["step"] for row in results["training"]] == steps


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_inference_is_timed_beside_hifigan_of_the_same_width(tmp_path, monkeypatch, has_bfloat16):
    monkeypatch.setattr(benchmark, "computes_in_bfloat16", lambda _: has_bfloat16)
    monkeypatch.setattr(benchmark, "MATMUL_SIZE", 64)  # bfloat16 may be emulated, which is slow
    toy = write_config(tmp_path / "toy.json", "configs/hifigan_v2.json")  # MRF has no loop
    wide = write_config(tmp_path / "wide.json", upsample_initial_channel=128)
    limits = benchmark.Limits(repeats=1)
    toy, wide = (benchmark.inference_row(str(c), 1, CPU, limits) for c in (toy, wide))
    for precision in ["fp32"] + ["bf16"] * has_bfloat16:
        assert toy[f"{precision}: times real time"].median > 0
        assert toy[f"{precision}: times HiFi-GAN fp32"] == ""
        assert wide[f"{precision}: times HiFi-GAN fp32"] > 0
    assert toy["fp32: times the MISR loop"] == "" != wide["fp32: times the MISR loop"]
    assert ("bf16: times real time" in toy) == has_bfloat16


def test_contestants_take_turns_until_the_time_is_over(monkeypatch):
    clock, order = iter(range(1000)), []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    contestants = {x: benchmark.Timing(lambda x=x: order.append(x)) for x in "ab"}
    benchmark.take_turns(contestants, CPU, benchmark.Limits(repeats=100, seconds=15))
    assert "".join(order) == "ab" * (len(order) // 2)
    # A turn after the first takes five readings of the clock, one of them for the limit.
    assert [len(timing.seconds) for timing in contestants.values()] == [3, 3]
    assert all(s == 1 for timing in contestants.values() for s in timing.seconds)
    benchmark.take_turns(contestants, CPU, benchmark.Limits(repeats=100, seconds=0))
    assert len(contestants["a"].seconds) == 4  # at least one turn


@pytest.mark.parametrize("frames", [1, 7])
def test_the_latency_of_a_stream_is_measured(tmp_path, frames):
    config = str(write_config(tmp_path / "toy.json"))
    row = benchmark.stream_row(config, seconds=1, frames=frames, device=CPU)
    h = benchmark.load_config(config)
    streamer = Streamer(benchmark.new_generator(h, CPU, "fp32"))
    fed = given = 0
    while not given:  # one frame at a time until the first sample
        fed, given = fed + 1, len(streamer.feed(torch.zeros(h.num_mels, 1)))
    hop = 1000 * h.hop_size / h.sampling_rate
    expected = fed * hop - 1000 * given / h.sampling_rate
    assert row["latency (ms)"] == pytest.approx(expected, abs=hop)
    assert row["times real time"] > 0


def test_memory_is_measured_in_a_new_process(tmp_path):
    config = write_config(tmp_path / "toy.json")
    row = benchmark.memory_row(str(config), 0.1, 64, CPU)
    assert row["chunk_frames"] == 64
    assert 100 < row["peak (MB)"] < 2000
    assert row["first samples (s)"] < 60 / row["times real time"]  # before the last


def test_each_value_of_a_flag_makes_a_row(tmp_path, monkeypatch):
    def row(config, length, frames, device):
        return {"length": length, "frames": frames}

    for name in ("memory_row", "stream_row"):
        monkeypatch.setattr(benchmark, name, row)
    flags = ("--config", write_config(tmp_path / "toy.json"), "--output", tmp_path / "a.json")
    flags += ("--stream", "--memory", "--minutes", 1, "--chunk_frames", 0, 64)
    run_main(benchmark, *flags, "--device", "cpu", "--stream_frames", 1, 8)
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["memory"] == [{"length": 1, "frames": frames} for frames in (0, 64)]
    assert results["stream"] == [{"length": 20, "frames": frames} for frames in (1, 8)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.012345, "0.0123"),
        (41.69, "41.7"),
        (1234.5, "1234"),
        (MedianRange(0.5, 1.0, 20.0), "1.00 (0.500 to 20.0)"),
    ],
)
def test_figures_have_three_digits(value, text):
    assert cell(value) == text
