"""`make demo`, with three sentences and seconds of training."""

import json
import sys

import numpy as np
import pytest
import soundfile

import demo
from checkpoint import checkpoint_steps
from env import UserError
from tools.toy import run_main


@pytest.fixture
def short(monkeypatch):
    """Little to speak, and a smaller model to learn it."""
    monkeypatch.setattr(demo, "SENTENCES", ["A first one.", "And a second.", "Held out."])
    monkeypatch.setattr(demo, "HELD_OUT", 1)
    monkeypatch.setattr(demo, "CHECKPOINT_INTERVAL", 2)
    train = demo.train
    monkeypatch.setattr(demo, "train", lambda folder, minutes: train(folder, minutes / 6))
    monkeypatch.setattr(demo, "CHANGES", demo.CHANGES | {"batch_size": 2, "num_workers": 0})


def test_the_demonstration_shows_what_was_learnt(short, tmp_path, capfd):
    folder = tmp_path / "demo"
    assert run_main(demo, "--minutes", 1, "--output_dir", folder) == 0
    steps = checkpoint_steps(folder / "cp", "g")
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")][-3:]
    titles = ["shipped weights", f"after {steps[0]} steps", f"after {steps[-1]} steps"]
    assert [row.split(" | ")[0] for row in table] == [f"| {title}" for title in titles]
    assert "\n".join(table) in (folder / "report.md").read_text()
    values = json.loads((folder / "final.json").read_text())["metrics"]["mel_l1"]["mean"]
    assert f"{values:.3f}" == table[-1].split(" | ")[1]
    for name in ("before", "early", "final"):
        assert [path.name for path in (folder / name).iterdir()] == ["sentence03_generated.wav"]
    assert [path.name for path in (folder / "streamed").iterdir()] == [
        "sentence03_generated_e2e.wav"
    ]
    assert {path.name for path in folder.glob("*.png")} == {"spectrograms.png", "curve.png"}


def test_espeak_speaks(tmp_path):
    demo.write_corpus(tmp_path / "corpus")
    wavs = sorted((tmp_path / "corpus/wavs").iterdir())
    assert len(wavs) == len(demo.SENTENCES) == 60
    for path in wavs:
        wav, rate = soundfile.read(path)
        assert rate == 22050
        assert 2 < len(wav) / rate < 6
        assert 0.1 < np.abs(wav).max() <= 1
    lists = [
        (tmp_path / f"corpus/{name}.txt").read_text().splitlines()
        for name in ("training", "validation")
    ]
    assert [len(each) for each in lists] == [56, 4]
    assert lists[1][-1] == f"sentence60|{demo.SENTENCES[-1]}"


def test_an_earlier_demonstration_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="exists; remove it"):
        run_main(demo, "--output_dir", tmp_path)


def test_without_espeak_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        run_main(demo, "--output_dir", tmp_path / "demo")


def test_a_failing_script_is_named(tmp_path):
    with pytest.raises(UserError, match="exit status 1"):
        demo.vocode(tmp_path, tmp_path / "g_00000001", "early")
