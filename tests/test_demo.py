"""demo/learn_a_voice.py, with three sentences and seconds of training."""

import importlib
import sys

import numpy as np
import pytest
import soundfile

import evaluate
from audio import load_wav
from checkpoint import checkpoint_steps
from demo import learn_a_voice as demo
from env import UserError, load_config
from meldataset import LogMelSpectrogram
from tools.toy import run_main

STEPS, INTERVAL = 40, 4


@pytest.fixture
def short(monkeypatch):
    """Shortens the demonstration; all scripts but train.py run in this process."""
    monkeypatch.setattr(demo, "SENTENCES", ["A first one.", "And a second.", "Held out."])
    monkeypatch.setattr(demo, "HELD_OUT", 1)
    monkeypatch.setattr(demo, "CHECKPOINT_INTERVAL", INTERVAL)
    small = {"batch_size": 2, "num_workers": 0}
    monkeypatch.setattr(demo, "CONFIG_CHANGES", demo.CONFIG_CHANGES | small)
    monkeypatch.setattr(evaluate, "METRICS", [m for m in evaluate.METRICS if m.name in SHOWN])
    run_script = demo.run_script

    def run(script, *flags, seconds=None):
        if script == "train.py":
            return run_script(script, *flags, "--training_steps", STEPS, seconds=seconds)
        flags += ("--workers", 1) if script == "evaluate.py" else ()
        return run_main(importlib.import_module(script.removesuffix(".py")), *flags)

    monkeypatch.setattr(demo, "run_script", run)


SHOWN = ("mel_l1", "stoi")


def test_training_improves_the_held_out_sentence(short, tmp_path, capfd):
    folder = tmp_path / "demo"
    assert run_main(demo, "--minutes", 9, "--output_dir", folder) == 0
    steps = checkpoint_steps(folder / "cp", "g")
    assert steps == list(range(INTERVAL, STEPS + 1, INTERVAL))
    printed = capfd.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("| ")][-3:]
    names = ["pretrained", f"after_{steps[0]}_steps", f"after_{steps[-1]}_steps"]
    assert [row.split(" | ")[0] for row in table] == [f"| {name}" for name in names]
    assert "\n".join(table) in (folder / "report.md").read_text()
    for name in names:
        assert [path.name for path in (folder / name).iterdir()] == ["sentence03_generated.wav"]
    assert [path.name for path in (folder / "streamed").iterdir()] == [
        "sentence03_generated_e2e.wav"
    ]
    assert f"open {folder}/index.html in a browser" in printed
    assert (folder / "index.html").read_text().count("<audio") == 4
    assert (folder / "curve.png").exists()
    pretrained, early, final = (float(row.split(" | ")[1]) for row in table)  # mel_l1
    assert pretrained < final < 0.95 * early
    assert final == pytest.approx(mel_l1(folder, names[-1]), abs=0.02)


def mel_l1(folder, name: str) -> float:
    """Computes the L1 distance of the log-mels up to half of the sampling rate."""
    h = load_config(folder / "config.json")
    log_mel = LogMelSpectrogram(h, fmax=None)
    wavs = (folder / "held_out/sentence03.wav", folder / f"{name}/sentence03_generated.wav")
    one, other = (log_mel(load_wav(path, h.sampling_rate)[None]) for path in wavs)
    frames = min(one.shape[2], other.shape[2])
    return float((one[..., :frames] - other[..., :frames]).abs().mean())


def test_training_is_interrupted_after_its_time(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(
        "import sys, time\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    demo.run_script("a.py", seconds=1)


def test_the_corpus_has_60_sentences_of_speech(tmp_path):
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


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="exists; remove it"):
        run_main(demo, "--output_dir", tmp_path)


def test_missing_espeak_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_espeak", demo.load_espeak.__wrapped__)  # without its cache
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        run_main(demo, "--output_dir", tmp_path / "demo")


def test_a_failing_script_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"a\.py failed with exit status 3"):
        demo.run_script("a.py")
