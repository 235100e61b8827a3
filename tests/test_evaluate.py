"""The command evaluate.py: pairs, delays, tables, JSON and crashes."""

import io
import json
import math
import sys
import unicodedata
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch

import evaluate
from env import Config, UsageError, UserError, load_config
from evaluation import plots, report
from evaluation.metrics import METRICS
from evaluation.pairs import constant_delay, list_files, name_systems, pair_files, without_reference
from evaluation.parallel import ParallelMap
from evaluation.report import FileResult, System, build_report, summarize
from meldataset import LogMelSpectrogram
from tests.workers import record
from tools.toy import ROOT, run_main, speech_like

RATE = 22050
SECONDS = 0.8
NAMES = [metric.name for metric in METRICS if metric.lowest_sampling_rate <= RATE]


def config() -> Config:
    return load_config(ROOT / "config_v1.json")


def noisy(wav: np.ndarray, amount: float) -> np.ndarray:
    return wav + amount * np.random.default_rng(1).standard_normal(len(wav))


# ------------------------------------------------------------------------------------- the pairs


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(pairs) -> dict[str, str]:
    return {pair.name: pair.generated.name for pair in pairs}


def test_files_are_paired_by_name_in_subfolders(tmp_path):
    references = touch(
        tmp_path / "r", "a.wav", "b.flac", "c.wav", "s/a.wav", "s/d.e.wav", "x.wav", "notes.txt"
    )
    generated = touch(
        tmp_path / "g",
        *("a_generated.wav", "b.WAV", "c_generated_e2e.wav", "s/a.mp3", "s/d.e_generated.wav"),
        *("c_other.wav", "t/x_generated.wav", "notes.txt"),
    )
    pairs, recordings, left = pair_files(references, generated)
    assert names(pairs) == {
        "a": "a_generated.wav",
        "b": "b.WAV",
        "c": "c_generated_e2e.wav",
        "s/a": "a.mp3",
        "s/d.e": "d.e_generated.wav",
    }
    assert [pair.reference.name for pair in pairs][1] == "b.flac"
    assert recordings == [references / "x.wav"]
    assert list(left.values()) == [generated / "c_other.wav", generated / "t/x_generated.wav"]
    assert names(without_reference(left, "g")) == {
        "c_other": "c_other.wav",
        "t/x": "x_generated.wav",
    }


def test_an_exact_name_has_priority(tmp_path):
    references = touch(tmp_path / "r", "a.wav", "a_generated.wav")
    pairs, recordings, left = pair_files(references, touch(tmp_path / "g", "a_generated.wav"))
    assert names(pairs) == {"a_generated": "a_generated.wav"}
    assert (recordings, left) == ([references / "a.wav"], {})


def test_names_are_paired_whether_accents_are_composed_or_not(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "ü") for form in ("NFC", "NFD"))
    references = touch(tmp_path / "r", f"{composed}.wav", f"{decomposed}2/a.wav")
    generated = touch(tmp_path / "g", f"{decomposed}_generated.wav", f"{composed}2/a.wav")
    pairs, recordings, left = pair_files(references, generated)
    assert {pair.name for pair in pairs} == {composed, f"{composed}2/a"}
    assert (recordings, left) == ([], {})


@pytest.mark.parametrize(("inner", "outer"), [("r/g", "r"), ("g", "g/r")])
def test_a_folder_inside_the_other_is_not_part_of_it(tmp_path, inner, outer):
    references, generated = touch(tmp_path / outer, "a.wav"), touch(tmp_path / inner, "a.wav")
    pairs, *others = pair_files(references, generated)
    assert [pair[1:3] for pair in pairs] == [(references / "a.wav", generated / "a.wav")]
    assert others == [[], {}]


@pytest.mark.parametrize(
    ("reference_names", "generated_names", "message"),
    [
        (["a.wav"], ["b.wav", "a.txt"], "no audio file is named as one in"),
        (["a.wav"], ["s/a.wav"], "<name>_generated in the same subfolder"),
        (["a.wav"], ["a.wav", "a_generated.wav"], "are both named after"),
        (["a.wav", "a.flac"], ["a.wav"], "have one name; keep one"),
        (
            ["\u00fc.wav", "u\u0308.wav"],
            ["a.wav"],
            r"have one name, with .* \(NFC, NFD\); keep one",
        ),
    ],
)
def test_files_that_cannot_be_paired_are_an_error(
    tmp_path, reference_names, generated_names, message
):
    references = touch(tmp_path / "r", *reference_names)
    with pytest.raises(UserError, match=message):
        pair_files(references, touch(tmp_path / "g", *generated_names))


def test_folders_must_exist_and_differ(tmp_path):
    folder = touch(tmp_path / "r", "a.wav")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        pair_files(folder, tmp_path / "nowhere")
    with pytest.raises(UserError, match="use two"):
        pair_files(folder, tmp_path / "r" / ".." / "r")
    with pytest.raises(UserError, match="no audio file"):
        list_files(touch(tmp_path / "g", "a.txt"), ())
    with pytest.raises(UserError, match="have one name"):
        without_reference(list_files(touch(tmp_path / "h", "a.wav", "a_generated.wav"), ()), "h")


def test_systems_have_given_names_or_the_end_of_their_path(tmp_path):
    def names_of(*folders: str) -> list[str]:
        given = [str(tmp_path / folder) for folder in folders]
        assert [str(folder) for folder in name_systems(given).values()] == given
        return list(name_systems(given))

    assert names_of("a", "b") == ["a", "b"]
    assert names_of("a/out", "b/out") == ["a/out", "b/out"]
    assert names_of("x/a/out", "y/a/out", "c") == ["x/a/out", "y/a/out", "c"]
    assert names_of("reference") == [f"{tmp_path.name}/reference"]  # the recordings' name
    assert name_systems(["HiFi-GAN V1=a/b", "c"]) == {"HiFi-GAN V1": Path("a/b"), "c": Path("c")}
    (tmp_path / "a=b").mkdir()
    assert names_of("a=b") == ["a=b"]
    for given in (["a", "b/../a"], ["x=a", "x=b"], ["reference=a"]):
        with pytest.raises(UsageError, match=r"given twice|already used"):
            name_systems([str(each) for each in given])


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    for folder in ("r", "g"):
        touch(tmp_path / f"elsewhere/{folder}", "a.wav")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "speaker").symlink_to(tmp_path / "elsewhere" / folder)
        (tmp_path / folder / "round").symlink_to(tmp_path / folder)
    pairs, *others = pair_files(tmp_path / "r", tmp_path / "g")
    assert names(pairs) == {"speaker/a": "a.wav"} and others == [[], {}]


# ------------------------------------------------------------------------------------- the delay


def write(path: Path, wav: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, subtype="FLOAT")


def write_pairs(folder: Path, *noises: float, delay: int = 0) -> None:
    """Writes r/clip0.wav and g/clip0_generated.wav, ..., the latter with noise and a delay."""
    for i, noise in enumerate(noises):
        wav = speech_like(SECONDS, seed=i)
        write(folder / f"r/clip{i}.wav", wav)
        late = np.pad(noisy(wav, noise), (max(0, delay), 0))[max(0, -delay) :]
        write(folder / f"g/clip{i}_generated.wav", late)


def choose(monkeypatch, *chosen: str) -> None:
    monkeypatch.setattr(evaluate, "METRICS", [m for m in METRICS if m.name in chosen])


@pytest.fixture
def mel_l1(monkeypatch):
    """For tests of everything around the metrics."""
    choose(monkeypatch, "mel_l1")


def run(folder: Path, *flags, status: int = 0, folders: tuple = ("g",)) -> dict:
    """Runs the script in this process on r and g, or `folders`; returns the JSON."""
    output = folder / "results.json"
    generated = ("--generated_dir", *(folder / name for name in folders))
    reference = () if "alone" in flags else ("--reference_dir", folder / "r")
    flags = [flag for flag in flags if flag != "alone"]
    flags += [] if "--workers" in flags else ["--workers", 1]
    assert run_main(evaluate, *generated, *reference, "--output", output, *flags) == status
    return json.loads(output.read_text())


def mean(results: dict, system: str = "g", name: str = "mel_l1") -> float:
    return results["metrics"][name]["systems"][system]["mean"]


@pytest.mark.usefixtures("mel_l1")
@pytest.mark.parametrize("delay", [128, -300])
def test_a_constant_delay_is_named_and_compensated(tmp_path, capsys, delay):
    write_pairs(tmp_path / "punctual", 0.001, 0.001)
    expected = mean(run(tmp_path / "punctual"))
    assert "samples (" not in capsys.readouterr().err
    write_pairs(tmp_path / "late", 0.001, 0.001, delay=delay)
    results = run(tmp_path / "late")
    words = "lags by 128 samples (5.8 ms)" if delay > 0 else "leads by 300 samples (13.6 ms)"
    assert f"g: {words}, which is compensated; --no_align" in capsys.readouterr().err
    assert results["systems"]["g"]["delay_samples"] == delay
    # A file that leads has lost its beginning.
    assert mean(results) == pytest.approx(expected, rel=1e-6 if delay > 0 else 0.05)
    as_it_is = run(tmp_path / "late", "--no_align")
    assert mean(as_it_is) > 1.2 * expected
    assert as_it_is["systems"]["g"]["delay_samples"] == 0
    assert "compensated" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("delays", "expected"),
    [
        ([128, 128, 130, 126], 128),
        ([-128, -127, None, -129], -128),
        ([128, 128, 128, -400], 128),  # most
        ([128, -128, 300, 0], 0),  # none is common
        ([3, 5, 2], 0),  # too small
        ([None], 0),
    ],
)
def test_a_constant_delay_is_what_most_clips_share(delays, expected):
    assert constant_delay(delays, hop_size=256) == expected


# ----------------------------------------------------------------------------------- the command


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_table_and_json_hold_every_metric(tmp_path, capsys):
    write_pairs(tmp_path, 0.003, 0.01)
    results = run(tmp_path, "--per_file")
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line]
    per_file, means = rows[2 : 2 + 2 * len(NAMES)], rows[-len(NAMES) - 1 : -1]
    assert list(results["metrics"]) == NAMES
    assert [file["name"] for file in results["files"]] == ["clip0", "clip1"]
    for i, file in enumerate(results["files"]):
        result = file["systems"]["g"]
        assert Path(result["paths"]["generated"]).name == f"clip{i}_generated.wav"
        assert list(result["values"]) == NAMES and result["reasons"] == {}
        assert list(file["systems"]["reference"]["values"]) == ["distill_mos", "plcmos"]
        for name, row in zip(NAMES, per_file[i::2], strict=True):
            assert row[0].split()[0] == name and row[1] == f"clip{i}"
            assert float(row[3]) == pytest.approx(result["values"][name], rel=1e-3)
    for name, row in zip(NAMES, means, strict=True):
        (metric,) = (metric for metric in METRICS if metric.name == name)
        facts = results["metrics"][name]
        summary = facts["systems"]["g"]
        low, high = summary["interval"]
        values = [file["systems"]["g"]["values"][name] for file in results["files"]]
        assert summary["mean"] == pytest.approx(np.mean(values)) and summary["n"] == 2
        assert low <= summary["mean"] <= high
        assert (facts["better"], facts["library"]) == (metric.better, metric.library)
        assert row[:2] == [f"{name} {'↑' if metric.better == 'higher' else '↓'}", metric.unit]
        assert (row[2] == "-") == metric.needs_reference
        printed = row[3].replace("(", "").replace(")", "").replace("to ", "").split()
        assert [*map(float, printed)] == pytest.approx([summary["mean"], low, high], rel=1e-3)
    assert rows[-1] == ["clips", "", "2", "2"]
    assert results["config"]["sampling_rate"] == RATE and results["missing"] == {}
    assert results["versions"]["pesq"] and results["skipped"] == []


def test_without_recordings_the_metrics_that_need_none_are_computed(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    results = run(tmp_path, "alone")
    assert list(results["metrics"]) == ["distill_mos", "plcmos"]
    assert list(results["systems"]) == ["g"]
    (file,) = results["files"]
    assert file["name"] == "clip0" and file["systems"]["g"]["values"].keys() == {
        "distill_mos",
        "plcmos",
    }
    printed = capsys.readouterr()
    assert "| metric | unit | g |" in printed.out
    assert "g at 22050 Hz: 1 files without a recording" in printed.err


def test_files_without_a_recording_are_a_second_group_on_request(tmp_path, capsys, monkeypatch):
    choose(monkeypatch, "plcmos", "mel_l1")
    write_pairs(tmp_path, 0.01)
    write(tmp_path / "g/tacotron_generated_e2e.wav", speech_like(SECONDS))
    assert "unpaired" not in run(tmp_path)
    assert "tacotron_generated_e2e.wav; --unpaired measures" in capsys.readouterr().err
    results = run(tmp_path, "--unpaired")
    second = results["unpaired"]
    assert list(results["metrics"]) == ["plcmos", "mel_l1"] and list(second["metrics"]) == [
        "plcmos"
    ]
    assert [file["name"] for file in results["files"]] == ["clip0"]
    assert [file["name"] for file in second["files"]] == ["tacotron"]
    alone = second["files"][0]["systems"]["g"]["values"]["plcmos"]
    assert mean(second, name="plcmos") == alone != mean(results, name="plcmos")
    printed = capsys.readouterr()
    assert "Without a recording:\n\n| metric | unit | g |\n" in printed.out
    assert "g at 22050 Hz: 1 pairs, 1 files without a recording\n" in printed.err


@pytest.mark.usefixtures("mel_l1")
def test_lengths_are_cut_to_the_shorter_and_the_cut_is_named(tmp_path, capsys):
    wav = speech_like(SECONDS)
    for path, samples in (("r/a", 0), ("g/a", 200), ("r/b", 1025), ("g/b", 0)):
        write(tmp_path / f"{path}.wav", wav[: len(wav) - samples])
    results = run(tmp_path)
    err = capsys.readouterr().err
    assert "g at 22050 Hz: 2 pairs, 2 cut to the shorter by at most 1025 samples" in err
    assert f"{tmp_path / 'g/b.wav'}: its last 1025 samples were cut off" in err
    assert "a.wav" not in err  # 200 are less than n_fft
    a, b = (file["systems"]["g"] for file in results["files"])
    assert a["cut_samples"] == {"reference": 200, "generated": 0}
    assert b["cut_samples"] == {"reference": 0, "generated": 1025}
    assert (a["samples"], b["samples"]) == (len(wav) - 200, len(wav) - 1025)
    assert mean(results) == 0
    assert results["metrics"]["mel_l1"]["systems"]["reference"]["n"] == 0


@pytest.mark.usefixtures("mel_l1")
def test_sampling_rates_may_differ(tmp_path, capsys):
    wav = speech_like(SECONDS, sampling_rate=44100)
    write(tmp_path / "r/a.wav", wav, rate=44100)
    write(tmp_path / "g/a.wav", librosa.resample(wav, orig_sr=44100, target_sr=RATE))
    results = run(tmp_path)
    assert "1 of them resampled" in capsys.readouterr().err
    rates = results["files"][0]["systems"]["g"]["sampling_rates"]
    assert rates == {"reference": 44100, "generated": 22050}
    assert mean(results) < 0.01


@pytest.mark.parametrize("side", ["r/clip1.wav", "g/clip1_generated.wav"])
def test_metrics_of_silence_are_left_out_of_the_means(tmp_path, capsys, monkeypatch, side):
    choose(monkeypatch, "plcmos", "mel_l1", "mr_stft", "pesq_wb", "estoi", "f0_rmse", "vuv_f1")
    write_pairs(tmp_path, 0.01, 0.01)
    write(tmp_path / side, np.zeros(int(SECONDS * RATE)))
    results = run(tmp_path)
    err = capsys.readouterr().err
    speech, silence = (file["systems"]["g"] for file in results["files"])
    is_reference = side.startswith("r/")
    nulls = {"pesq_wb", "f0_rmse"} | ({"mr_stft", "estoi"} if is_reference else {"plcmos"})
    assert {name for name, each in silence["values"].items() if each is None} == nulls
    assert silence["reasons"].keys() == nulls and speech["reasons"] == {}
    assert silence["reasons"]["f0_rmse"] == "no frame is voiced in both files"
    expected = f"the {'reference' if is_reference else 'generated'} waveform is silent"
    assert all(silence["reasons"][name].startswith(expected) for name in nulls - {"f0_rmse"})
    for name, facts in results["metrics"].items():
        assert (f"clip1_generated.wav: no {name} (" in err) == (name in nulls)
        assert facts["systems"]["g"]["n"] == (1 if name in nulls else 2)
    assert results["metrics"]["plcmos"]["systems"]["reference"]["n"] == (1 if is_reference else 2)
    assert mean(results, name="pesq_wb") == speech["values"]["pesq_wb"]


def test_a_bad_file_is_named_once_and_skipped(tmp_path, capsys, monkeypatch):
    choose(monkeypatch, "plcmos", "mel_l1")
    write_pairs(tmp_path, 0.01, 0.01, 0.01)
    (tmp_path / "g/clip1_generated.wav").write_text("no audio")
    write(tmp_path / "r/clip2.wav", np.zeros(100))  # less than a hop
    results = run(tmp_path, status=1)
    err = capsys.readouterr().err
    assert err.count("clip1_generated.wav: cannot be read as audio") == 1
    assert err.count("clip2.wav: 100 samples") == 1
    assert "g at 22050 Hz: 1 pairs, 2 skipped" in err
    assert [each["name"] for each in results["skipped"]] == ["clip1", "clip2"]
    assert results["metrics"]["mel_l1"]["systems"]["g"]["n"] == 1


@pytest.mark.usefixtures("mel_l1")
def test_nothing_but_bad_files_makes_an_empty_table(tmp_path, capsys):
    for folder in ("r", "g"):
        touch(tmp_path / folder, "a.wav")
    results = run(tmp_path, status=1)
    assert mean(results) is None and results["files"] == []
    assert "| mel_l1 ↓ | Np | - |\n" in capsys.readouterr().out


@pytest.mark.usefixtures("mel_l1")
def test_files_without_a_partner_are_counted_and_the_first_named(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    touch(tmp_path / "r", *(f"other{i}.wav" for i in range(7)))
    touch(tmp_path / "g", "stray.wav")
    unpaired = run(tmp_path)["systems"]["g"]["unpaired"]
    err = capsys.readouterr().err
    assert f"{tmp_path / 'r'}: without a partner in {tmp_path / 'g'} 7: " in err
    assert "other4.wav and 2 more" in err
    assert f"{tmp_path / 'r'} 1: {tmp_path / 'g/stray.wav'}; " in err
    assert len(unpaired["reference"]) == 7
    assert unpaired["generated"] == [str(tmp_path / "g/stray.wav")]


@pytest.mark.usefixtures("mel_l1")
def test_several_systems_have_a_column_each(tmp_path, capsys):
    write_pairs(tmp_path, 0.01, 0.01)
    for i in range(2):
        wav = soundfile.read(tmp_path / f"r/clip{i}.wav")[0]
        write(tmp_path / f"other/clip{i}.wav", noisy(wav, 0.05))
    results = run(tmp_path, "--per_file", "--about", "g=the fine one", folders=("g", "other"))
    out = capsys.readouterr().out
    assert "| metric | unit | g | other |" in out and "| metric | file | g | other |" in out
    assert "| metric | unit | other - g |" in out
    assert list(results["systems"]) == ["reference", "g", "other"]
    assert results["systems"]["g"]["about"] == "the fine one"
    (difference,) = results["metrics"]["mel_l1"]["differences"]
    assert difference["mean"] == pytest.approx(mean(results, "other") - mean(results))
    assert difference["mean"] > 0
    with pytest.raises(UsageError, match="expected NAME=TEXT, NAME one of reference, g"):
        run(tmp_path, "--about", "h=x")


@pytest.mark.usefixtures("mel_l1")
def test_an_output_that_cannot_be_written_loses_no_table(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path, "--output", tmp_path / "r/clip0.wav/results.json")
    out = capsys.readouterr().out
    assert "| mel_l1 ↓ |" in out and "clip0" not in out  # files are listed with --per_file


@pytest.mark.usefixtures("mel_l1")
def test_a_terminal_without_arrows_prints_the_table(tmp_path, monkeypatch):
    write_pairs(tmp_path, 0.01)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run(tmp_path)
    terminal.flush()
    assert b"| mel_l1 ? | Np | " in terminal.buffer.getvalue()


def test_help_explains_every_metric(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main(evaluate, "--help")
    text = capsys.readouterr().out
    for metric in METRICS:
        direction = f"{metric.better} is better"
        line = f"{metric.name} (unit: {metric.unit}; {direction}; library: {metric.library})"
        assert line in text
        assert metric.description.split(":")[0][:60] in " ".join(text.split())


# --------------------------------------------------------------------------------- the processes


def test_a_crash_loses_one_item_and_the_first_item_runs_alone(tmp_path):
    with ParallelMap(2) as parallel_map:
        results = list(parallel_map(partial(record, tmp_path), range(4), lambda n: f"lost {n}"))
    assert results[0] == [] and results[2] == "lost 2"
    assert "0" in results[1] and "0" in results[3]


@pytest.mark.usefixtures("mel_l1")
def test_the_result_does_not_depend_on_the_workers(tmp_path):
    write_pairs(tmp_path, 0.003, 0.01)
    assert run(tmp_path, "--workers", 2) == run(tmp_path, "--workers", 1)


@pytest.mark.usefixtures("mel_l1")
def test_a_crash_is_one_line_and_the_other_files_are_measured(tmp_path, capsys, monkeypatch):
    def map_and_crash(self, function, items, crashed):
        return (crashed(item) if item.name == "clip1" else function(item) for item in items)

    monkeypatch.setattr(ParallelMap, "__call__", map_and_crash)
    write_pairs(tmp_path, 0.003, 0.01)
    results = run(tmp_path, status=1)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "skipped: " in line)
    assert line.startswith(f"skipped: {tmp_path / 'g/clip1_generated.wav'}: its process died")
    assert results["metrics"]["mel_l1"]["systems"]["g"]["n"] == 1


# ----------------------------------------------------------------------------- the spectrograms


@pytest.mark.parametrize("fmax", [8000, None])
def test_the_frequency_axis_is_that_of_the_filterbank(fmax):
    """A tone at a mark of the axis is loudest in the band of the mark, or beside it."""
    h = config()
    time = np.arange(RATE) / RATE
    marks = plots.marked_bands(h, fmax)
    assert list(marks) == [500, 1000, 2000, 4000] + ([8000] if fmax is None else [])
    for hertz, band in marks.items():
        tone = torch.from_numpy(np.float32(0.5 * np.sin(2 * np.pi * hertz * time)))
        loudest = LogMelSpectrogram(h, fmax)(tone[None])[0].mean(dim=1).argmax().item()
        assert abs(loudest + 0.5 - band) <= 1, hertz


def test_figures_of_training_have_an_envelope_above_a_mel_in_hertz():
    h = config()
    wav = speech_like(0.5)
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav)[None])[0].numpy()
    top, bottom = plots.plot_spectrogram(wav, mel, h, h.fmax).axes[:2]
    assert top.get_position().y0 > bottom.get_position().y0
    bounds = top.collections[0].get_datalim(top.transData)
    hops = wav[: len(wav) // 256 * 256]
    assert (bounds.y0, bounds.y1) == pytest.approx((hops.min(), hops.max()))
    np.testing.assert_array_equal(bottom.images[0].get_array(), mel)
    assert bottom.get_ylabel() == "Hz"
    assert [text.get_text() for text in bottom.get_yticklabels()] == ["500", "1000", "2000", "4000"]


# ------------------------------------------------------------------------------------ the report


def test_intervals_come_from_the_variation_between_files():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400).tolist()
    summary = summarize(values)
    margin = 1.96 * np.std(values) / math.sqrt(len(values))
    assert summary["mean"] == pytest.approx(np.mean(values)) and summary["n"] == 400
    expected = (summary["mean"] - margin, summary["mean"] + margin)
    assert summary["interval"] == pytest.approx(expected, 0.01)
    assert summarize(values) == summary
    assert summarize([2.0, 2.0, 2.0]) == {"mean": 2.0, "interval": [2.0, 2.0], "n": 3}
    assert summarize([2.0]) == {"mean": 2.0, "interval": None, "n": 1}
    assert summarize([]) == {"mean": None, "interval": None, "n": 0}


def result_of(name: str, system: str, value: float | None) -> FileResult:
    paths = {"reference": f"r/{name}.wav", "generated": f"{system}/{name}.wav"}
    return FileResult(name=name, system=system, paths=paths, values={"mel_l1": value})


def report_of(values: dict[str, dict[str, float | None]]) -> dict:
    """Returns a report of the mel errors of systems, by clip."""
    results = [
        result_of(name, system, value)
        for system, column in values.items()
        for name, value in column.items()
    ]
    systems = {name: System(name) for name in ("reference", *values)}
    return build_report(results, config(), systems, [m for m in METRICS if m.name == "mel_l1"])


def test_differences_are_of_the_same_clips():
    """Clips differ by 1; in each, the second system is 0.1 to 0.2 worse."""
    first = {f"clip{i}": float(i) for i in range(20)}
    gaps = np.random.default_rng(0).uniform(0.1, 0.2, 20)
    second = {name: value + gap for (name, value), gap in zip(first.items(), gaps, strict=True)}
    del second["clip0"]
    second["clip1"] = None
    results = report_of({"a": first, "b": second})
    facts = results["metrics"]["mel_l1"]
    (difference,) = facts["differences"]
    low, high = difference["interval"]
    assert (difference["system"], difference["minus"], difference["n"]) == ("b", "a", 18)
    assert difference["mean"] == pytest.approx(gaps[2:].mean())
    assert 0.1 < low < difference["mean"] < high < 0.2
    assert np.diff(facts["systems"]["a"]["interval"]) > 3  # clips differ much more
    assert facts["systems"]["b"]["n"] == 18
    assert "b - a" in report.difference_table(results)
    assert "| **+0.1" in report.difference_table(results)
    assert " n=18" in report.mean_table(results)


def test_a_difference_that_may_be_zero_is_not_in_bold():
    values = np.random.default_rng(0).normal(size=40)
    columns = {
        name: {f"clip{i}": float(sign * value) for i, value in enumerate(values)}
        for name, sign in (("a", 1), ("b", -1))
    }
    assert "**" not in report.difference_table(report_of(columns))


@pytest.mark.parametrize("name", ["a\nb", "a|b", "a\x1b[31mb", "a\udcffb", "a\u202eb"])
def test_odd_names_do_not_break_tables_or_notes(name, capsys):
    results = report_of({"a": {name: 1.0}, "b": {name: 2.0}})
    tables = (report.file_table, report.mean_table, report.difference_table)
    for lines in (table(results).splitlines() for table in tables):
        assert len(lines) >= 3 and all(line.isprintable() for line in lines)
        counts = {line.count("|") - line.count(r"\|") for line in lines}
        assert len(counts) == 1, lines
    trouble = result_of(name, "a", None)
    trouble.reasons = {"stoi": "why"}
    report.say_troubles(trouble, config())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and line.endswith(".wav: no stoi (why)")
