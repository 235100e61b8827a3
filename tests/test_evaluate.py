"""The command that measures folders: pairs, delays, tables and pictures."""

import io
import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import librosa
import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch

import evaluate
from env import Config, UserError, load_config
from evaluation import metrics
from evaluation import plots as pictures
from evaluation.metrics import METRICS, Pair
from evaluation.pairs import constant_delay, name_systems, pair_files
from evaluation.report import FileResult, System, build_report, summarize
from meldataset import LogMelSpectrogram
from tools.toy import ROOT, run_main, speech_like

RATE = 22050
SECONDS = 1.3  # of speech: enough for every metric
NAMES = [metric.name for metric in METRICS]


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


def test_files_are_paired_by_name_in_depth(tmp_path):
    references = touch(
        tmp_path / "r", "a.wav", "b.flac", "c.wav", "s/a.wav", "s/d.e.wav", "x.wav", "notes.txt"
    )
    generated = touch(
        tmp_path / "g",
        *("a_generated.wav", "b.WAV", "c_generated_e2e.wav", "s/a.mp3", "s/d.e_generated.wav"),
        *("c_other.wav", "t/x_generated.wav", "notes.txt"),
    )
    pairs, *unpaired = pair_files(references, generated)
    assert names(pairs) == {
        "a": "a_generated.wav",
        "b": "b.WAV",
        "c": "c_generated_e2e.wav",
        "s/a": "a.mp3",
        "s/d.e": "d.e_generated.wav",
    }
    assert [pair.reference.name for pair in pairs][1] == "b.flac"
    assert unpaired == [
        [str(references / "x.wav")],
        [str(generated / "c_other.wav"), str(generated / "t/x_generated.wav")],
    ]


def test_an_exact_name_goes_first(tmp_path):
    references = touch(tmp_path / "r", "a.wav", "a_generated.wav")
    pairs, *unpaired = pair_files(references, touch(tmp_path / "g", "a_generated.wav"))
    assert names(pairs) == {"a_generated": "a_generated.wav"}
    assert unpaired == [[str(references / "a.wav")], []]


@pytest.mark.parametrize(("inner", "outer"), [("r/g", "r"), ("g", "g/r")])
def test_a_folder_inside_the_other_is_not_part_of_it(tmp_path, inner, outer):
    references, generated = touch(tmp_path / outer, "a.wav"), touch(tmp_path / inner, "a.wav")
    pairs, *unpaired = pair_files(references, generated)
    assert [(pair.reference, pair.generated) for pair in pairs] == [
        (references / "a.wav", generated / "a.wav")
    ]
    assert unpaired == [[], []]


@pytest.mark.parametrize(
    ("reference_names", "generated_names", "message"),
    [
        (["a.wav"], ["b.wav", "a.txt"], "no audio file is named as one in"),
        (["a.wav"], ["s/a.wav"], "<name>_generated_e2e in the same subfolder"),
        (["a.wav"], ["a.wav", "a_generated.wav"], "are both named after"),
        (["a.wav", "a.flac"], ["a.wav"], "have one name"),
    ],
)
def test_what_cannot_be_paired_is_an_error(tmp_path, reference_names, generated_names, message):
    references = touch(tmp_path / "r", *reference_names)
    generated = touch(tmp_path / "g", *generated_names)
    with pytest.raises(UserError, match=message):
        pair_files(references, generated)


def test_folders_must_exist_and_differ(tmp_path):
    folder = touch(tmp_path / "r", "a.wav")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        pair_files(folder, tmp_path / "nowhere")
    with pytest.raises(UserError, match="use two"):
        pair_files(folder, tmp_path / "r" / ".." / "r")


def test_systems_are_named_by_what_tells_them_apart(tmp_path):
    def names_of(*folders: str) -> list[str]:
        given = [tmp_path / folder for folder in folders]
        assert list(name_systems(given).values()) == given
        return list(name_systems(given))

    assert names_of("a", "b/") == ["a", "b"]
    assert names_of("a/out", "b/out") == ["a/out", "b/out"]
    assert names_of("x/a/out", "y/a/out", "c") == ["x/a/out", "y/a/out", "c"]
    (name,) = names_of("reference")  # which the recordings are called
    assert name == f"{tmp_path.name}/reference"
    with pytest.raises(UserError, match="given twice"):
        name_systems([tmp_path / "a", tmp_path / "b/../a"])


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    for folder in ("r", "g"):
        touch(tmp_path / f"elsewhere/{folder}", "a.wav")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "speaker").symlink_to(tmp_path / "elsewhere" / folder)
        (tmp_path / folder / "round").symlink_to(tmp_path / folder)
    pairs, *unpaired = pair_files(tmp_path / "r", tmp_path / "g")
    assert names(pairs) == {"speaker/a": "a.wav"} and unpaired == [[], []]


# ------------------------------------------------------------------------------------- the delay


def write_late(folder: Path, *delays: int) -> None:
    """As `write_pairs`, the generated ones late by so many samples."""
    for i, delay in enumerate(delays):
        wav = speech_like(SECONDS, seed=i)
        late = noisy(wav, 0.001)
        late = np.pad(late, (delay, 0)) if delay > 0 else late[-delay:]
        write(folder / f"r/clip{i}.wav", wav)
        write(folder / f"g/clip{i}.wav", late)


def mel_error(report: dict) -> float:
    return report["metrics"]["mel_l1"]["systems"]["g"]["mean"]


@pytest.fixture
def mel_metric(monkeypatch):
    monkeypatch.setattr(evaluate, "METRICS", [m for m in METRICS if m.name == "mel_l1"])


@pytest.mark.usefixtures("mel_metric")
@pytest.mark.parametrize("delay", [128, -300])
def test_a_constant_delay_is_named_and_made_up_for(tmp_path, capsys, delay):
    write_late(tmp_path / "punctual", 0, 0)
    expected = mel_error(run(tmp_path / "punctual"))
    assert "samples (" not in capsys.readouterr().err
    write_late(tmp_path / "late", delay, delay)
    report = run(tmp_path / "late")
    words = "lags by 128 samples (5.8 ms)" if delay > 0 else "leads by 300 samples (13.6 ms)"
    assert f"g: {words}, which is made up for; --no_align" in capsys.readouterr().err
    assert report["systems"]["g"]["delay_samples"] == delay
    # Of those that are early the beginning is lost.
    assert mel_error(report) == pytest.approx(expected, rel=1e-6 if delay > 0 else 0.03)
    as_it_is = run(tmp_path / "late", "--no_align")
    assert mel_error(as_it_is) > 1.2 * expected
    assert as_it_is["systems"]["g"]["delay_samples"] == 0
    assert "made up" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("delays", "expected"),
    [
        ([128, 128, 130, 126], 128),
        ([-128, -127, None, -129], -128),
        ([128, 128, 128, -400], 128),  # most
        ([128, -128, 300, 0], 0),  # they share none
        ([3, 5, 2], 0),  # next to nothing
        ([None], 0),
    ],
)
def test_a_delay_is_what_most_clips_share(delays, expected):
    assert constant_delay(delays, hop_size=256) == expected


# ----------------------------------------------------------------------------------- the command


def write(path: Path, wav: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, subtype="FLOAT")


def write_pairs(folder: Path, *noises: float) -> None:
    """Writes r/clip0.wav and g/clip0_generated.wav, ..., with so much noise in the latter."""
    for i, noise in enumerate(noises):
        wav = speech_like(SECONDS, seed=i)
        write(folder / f"r/clip{i}.wav", wav)
        write(folder / f"g/clip{i}_generated.wav", noisy(wav, noise))


@pytest.fixture
def two_metrics(monkeypatch):
    """For tests of what is around the metrics."""
    chosen = [metric for metric in METRICS if metric.name in ("mel_l1", "pesq_wb")]
    monkeypatch.setattr(evaluate, "METRICS", chosen)


def run(folder: Path, *flags, status: int = 0, folders: tuple = ("g",)) -> dict:
    """Runs the script in this process on r and g, or `folders`; returns the JSON."""
    output = folder / "results.json"
    generated = [folder / name for name in folders]
    arguments = ("--reference_dir", folder / "r", "--generated_dir", *generated)
    workers = () if "--workers" in flags else ("--workers", 1)
    assert run_main(evaluate, *arguments, "--output", output, *workers, *flags) == status
    return json.loads(output.read_text())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def mean_and_interval(cell: str) -> list[float]:
    mean, low, high = cell.replace("(", "").replace(")", "").replace("to ", "").split()
    return [float(mean), float(low), float(high)]


def test_table_and_json_hold_every_metric(tmp_path, capsys):
    write_pairs(tmp_path, 0.003, 0.01)
    report = run(tmp_path, "--per_file")
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line]
    per_file, means = rows[2 : 2 + 2 * len(NAMES)], rows[-len(NAMES) - 1 : -1]
    assert len(report["files"]) == 2 and list(report["metrics"]) == NAMES
    for i, file in enumerate(report["files"]):
        result = file["systems"]["g"]
        assert file["name"] == f"clip{i}"
        assert Path(result["paths"]["generated"]).name == f"clip{i}_generated.wav"
        assert list(result["values"]) == NAMES and result["reasons"] == {}
        assert list(file["systems"]["reference"]["values"]) == ["distill_mos"]
        for metric, row in zip(NAMES, per_file[i::2], strict=True):
            assert row[0].split()[0] == metric and row[1] == f"clip{i}"
            assert float(row[3]) == pytest.approx(result["values"][metric], rel=1e-3)
    for metric, row in zip(METRICS, means, strict=True):
        facts = report["metrics"][metric.name]
        mean = facts["systems"]["g"]
        low, high = mean["interval"]
        values = [file["systems"]["g"]["values"][metric.name] for file in report["files"]]
        assert mean["mean"] == pytest.approx(np.mean(values))
        assert low <= mean["mean"] <= high and mean["n"] == 2
        assert facts["better"] == metric.better and facts["library"] == metric.library
        assert row[0] == f"{metric.name} {'↑' if metric.better == 'higher' else '↓'}"
        assert row[1] == metric.unit
        assert (row[2] == "-") == metric.needs_reference
        assert mean_and_interval(row[3]) == pytest.approx([mean["mean"], low, high], rel=1e-3)
    assert rows[-1] == ["clips", "", "2", "2"]
    assert report["config"]["sampling_rate"] == RATE and report["missing"] == {}
    assert report["versions"]["pesq"] and report["skipped"] == []


@pytest.mark.usefixtures("two_metrics")
def test_files_are_listed_only_when_asked_for(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    report = run(tmp_path)
    assert "clip0" not in capsys.readouterr().out
    assert report["metrics"]["mel_l1"]["systems"]["g"]["interval"] is None  # of one file


def done_before(folder: Path, number: int) -> list[str]:
    """The items that were done when this one began; it takes longer than the start of others."""
    done = sorted(path.name for path in folder.iterdir())
    time.sleep(0.5)
    (folder / str(number)).touch()
    return done


def test_the_first_item_is_done_alone(tmp_path):
    with evaluate.processes(2) as run:
        first, *others = run(partial(done_before, tmp_path), range(4))
    assert first == []
    assert len(others) == 3
    assert all("0" in done for done in others)


def test_result_does_not_depend_on_the_workers(tmp_path):
    """In processes of their own, by the script itself."""
    write_pairs(tmp_path, 0.003, 0.01)
    expected = run(tmp_path, "--workers", 1)
    flags = ("--reference_dir", "r", "--generated_dir", "g", "--output", "two.json")
    script = [sys.executable, str(ROOT / "evaluate.py"), *flags, "--workers", "2"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    report = json.loads((tmp_path / "two.json").read_text())
    for each in (expected, report):
        del each["systems"]  # paths, absolute in one, relative in the other
        for result in (result for file in each["files"] for result in file["systems"].values()):
            del result["paths"]
    assert report == expected and len(report["files"]) == 2


@pytest.mark.usefixtures("two_metrics")
def test_lengths_are_cut_to_the_shorter_and_the_cut_is_told(tmp_path, capsys):
    wav = speech_like(SECONDS)
    write(tmp_path / "r/a.wav", wav)
    write(tmp_path / "g/a.wav", wav[:-200])
    write(tmp_path / "r/b.wav", wav[:-1025])
    write(tmp_path / "g/b.wav", wav)
    report = run(tmp_path)
    err = capsys.readouterr().err
    assert "g: 2 pairs at 22050 Hz, 2 cut to the shorter by at most 1025 samples" in err
    assert f"{tmp_path / 'g/b.wav'}: its last 1025 samples were cut off" in err
    assert "a.wav" not in err  # 200 are less than n_fft
    a, b = (file["systems"]["g"] for file in report["files"])
    assert a["cut_samples"] == {"reference": 200, "generated": 0}
    assert b["cut_samples"] == {"reference": 0, "generated": 1025}
    assert (a["samples"], b["samples"]) == (len(wav) - 200, len(wav) - 1025)
    assert a["values"]["mel_l1"] == b["values"]["mel_l1"] == 0


@pytest.mark.usefixtures("two_metrics")
def test_sampling_rates_may_differ(tmp_path, capsys):
    write(tmp_path / "r/a.wav", speech_like(SECONDS, sampling_rate=44100), rate=44100)
    wav = librosa.resample(speech_like(SECONDS, sampling_rate=44100), orig_sr=44100, target_sr=RATE)
    write(tmp_path / "g/a.wav", wav)
    report = run(tmp_path)
    assert "1 of them resampled" in capsys.readouterr().err
    result = report["files"][0]["systems"]["g"]
    assert result["sampling_rates"] == {"reference": 44100, "generated": 22050}
    assert result["values"]["mel_l1"] < 0.01 and result["values"]["pesq_wb"] > 4.6


@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        ("auraloss.freq", {"mr_stft"}),
        ("mel_cepstral_distance", {"mcd"}),
        ("pesq", {"pesq_wb"}),
        ("pystoi", {"stoi", "estoi"}),
        ("distillmos", {"distill_mos"}),
    ],
)
def test_a_missing_library_is_named_once_and_left_out(
    tmp_path, capsys, monkeypatch, module, left_out
):
    monkeypatch.setitem(sys.modules, module, None)
    metrics.name_missing.cache_clear()
    metrics._opinion_model.cache_clear()
    kept = [metric for metric in METRICS if metric.name in left_out | {"mel_l1"}]
    monkeypatch.setattr(evaluate, "METRICS", kept)
    write_pairs(tmp_path, 0.01, 0.01)
    report = run(tmp_path)
    captured = capsys.readouterr()
    (library,) = {metric.library for metric in kept if metric.name in left_out}
    (words,) = {metric.requirements for metric in kept if metric.name in left_out}
    notice = (
        f"{{}}: left out, it needs {library} (import of {module} halted; None in sys.modules); "
        f"pip install {words}"
    )
    for metric in kept:
        is_missing = metric.name in left_out
        assert captured.err.splitlines().count(notice.format(metric.name)) == is_missing
        assert (metric.name in report["missing"]) == is_missing
        assert (metric.name not in report["metrics"]) == is_missing
        assert (f"| {metric.name} " not in captured.out) == is_missing
    results = [result for file in report["files"] for result in file["systems"].values()]
    assert results and all(not left_out & result["values"].keys() for result in results)


@pytest.mark.parametrize("side", ["r/clip1.wav", "g/clip1_generated.wav"])
def test_silence_is_left_out_of_the_means_it_has_no_part_in(tmp_path, capsys, side):
    write_pairs(tmp_path, 0.01, 0.01)
    write(tmp_path / side, np.zeros(int(SECONDS * RATE)))
    report = run(tmp_path)
    err = capsys.readouterr().err
    speech, silence = (file["systems"]["g"] for file in report["files"])
    is_reference = side.startswith("r/")
    nulls = {"pesq_wb", "f0_rmse"}
    nulls |= {"mr_stft", "stoi", "estoi"} if is_reference else {"distill_mos"}
    assert {name for name, each in silence["values"].items() if each is None} == nulls
    assert silence["reasons"].keys() == nulls and speech["reasons"] == {}
    assert silence["reasons"]["f0_rmse"] == "no frame is voiced in both files"
    silent_side = "reference" if is_reference else "generated"
    expected = f"the {silent_side} waveform is silent or not finite"
    assert all(silence["reasons"][name] == expected for name in nulls - {"f0_rmse"})
    for name, facts in report["metrics"].items():
        assert (f"clip1_generated.wav: no {name} (" in err) == (name in nulls)
        assert facts["systems"]["g"]["n"] == (1 if name in nulls else 2)
    recordings = report["metrics"]["distill_mos"]["systems"]["reference"]
    assert recordings["n"] == (1 if is_reference else 2)
    assert report["metrics"]["pesq_wb"]["systems"]["g"]["mean"] == speech["values"]["pesq_wb"]
    assert silence["values"]["vuv_f1"] == 0 and silence["values"]["mel_l1"] > 1


@pytest.mark.usefixtures("two_metrics")
def test_a_bad_file_is_named_and_skipped(tmp_path, capsys):
    write_pairs(tmp_path, 0.01, 0.01, 0.01)
    (tmp_path / "g/clip1_generated.wav").write_text("no audio")
    write(tmp_path / "r/clip2.wav", np.zeros(100))  # less than a hop
    report = run(tmp_path, status=1)
    err = capsys.readouterr().err
    assert f"skipped: {tmp_path / 'g/clip1_generated.wav'}: cannot be read as audio" in err
    assert "g: 1 pairs at 22050 Hz, 2 skipped" in err
    assert [result["name"] for result in report["files"]] == ["clip0"]
    assert [result["name"] for result in report["skipped"]] == ["clip1", "clip2"]
    assert "100 samples" in report["skipped"][1]["error"]


@pytest.mark.usefixtures("two_metrics")
def test_nothing_but_bad_files_makes_an_empty_table(tmp_path, capsys):
    for folder in ("r", "g"):
        touch(tmp_path / folder, "a.wav")
    report = run(tmp_path, status=1)
    assert report["metrics"]["mel_l1"]["systems"]["g"]["mean"] is None and report["files"] == []
    assert "| mel_l1 ↓ | Np | - |\n" in capsys.readouterr().out


@pytest.mark.usefixtures("two_metrics")
def test_files_without_a_partner_are_counted_and_the_first_named(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    touch(tmp_path / "r", *(f"other{i}.wav" for i in range(7)))
    touch(tmp_path / "g", "stray.wav")
    report = run(tmp_path)
    err = capsys.readouterr().err
    assert (
        f"{tmp_path / 'r'}: without a partner in {tmp_path / 'g'} 7: " in err
        and "other4.wav and 2 more" in err
    )
    assert f"{tmp_path / 'r'} 1: {tmp_path / 'g/stray.wav'}\n" in err
    unpaired = report["systems"]["g"]["unpaired"]
    assert len(unpaired["reference"]) == 7
    assert unpaired["generated"] == [str(tmp_path / "g/stray.wav")]


# --------------------------------------------------------------------------------- the pictures


def test_pictures_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "METRICS", [metric for metric in METRICS if metric.name == "mcd"])
    write(tmp_path / "r/s/a.wav", speech_like(0.5))
    write(tmp_path / "g/s/a_generated.wav", speech_like(0.5, seed=1))
    run(tmp_path, "--plot", tmp_path / "pictures")
    assert [path.name for path in (tmp_path / "pictures").rglob("*.*")] == ["a.png"]
    image = matplotlib.image.imread(tmp_path / "pictures/s/a.png")
    assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.1


def test_picture_shows_waveforms_mels_their_difference_and_both_pitches():
    wavs = [torch.from_numpy(speech_like(0.5, seed=seed)) for seed in (0, 1)]
    pair = Pair(*wavs, h=config())
    figure = pictures.plot_pair(pair)
    envelopes, *mels, pitch = [axes for axes in figure.axes if axes.get_title()]
    for collection, wav in zip(envelopes.collections, pair.wavs, strict=True):
        bounds = collection.get_datalim(envelopes.transData)
        hops = wav[: len(wav) // 256 * 256].numpy()
        assert (bounds.y0, bounds.y1) == pytest.approx((hops.min(), hops.max()))
    images = [axes.images[0].get_array() for axes in mels]
    for image, expected in zip(images, (*pair.mels, pair.mels[1] - pair.mels[0]), strict=True):
        np.testing.assert_array_equal(image, expected.numpy())
    assert all(axes.get_ylabel() == "Hz" for axes in (*mels, pitch))
    for line, expected in zip(pitch.lines, pair.pitches, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), expected.f0)


@pytest.mark.parametrize("fmax", [8000, None])
def test_the_frequency_axis_is_that_of_the_filterbank(fmax):
    """A tone at a mark of the axis is loudest in the band that the mark lies in, or beside it."""
    h = config()
    time = np.arange(RATE) / RATE
    marks = pictures.marked_bands(h, fmax)
    assert list(marks) == [500, 1000, 2000, 4000] + ([8000] if fmax is None else [])
    for hertz, band in marks.items():
        tone = torch.from_numpy(np.float32(0.5 * np.sin(2 * np.pi * hertz * time)))
        loudest = LogMelSpectrogram(h, fmax)(tone[None])[0].mean(dim=1).argmax().item()
        assert abs(loudest + 0.5 - band) <= 1, hertz


def test_training_pictures_have_an_envelope_above_and_hertz():
    h = config()
    wav = speech_like(0.5)
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav)[None])[0].numpy()
    figure = pictures.plot_spectrogram(wav, mel, h, h.fmax)
    top, bottom = figure.axes[:2]
    assert top.get_position().y0 > bottom.get_position().y0
    assert len(top.collections) == 1 and bottom.images[0].get_array().shape == mel.shape
    assert bottom.get_ylabel() == "Hz"
    assert [text.get_text() for text in bottom.get_yticklabels()] == ["500", "1000", "2000", "4000"]


def test_intervals_come_from_the_spread_of_files():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400).tolist()
    summary = summarize(values)
    low, high = summary["interval"]
    margin = 1.96 * np.std(values) / math.sqrt(len(values))
    assert summary["mean"] == pytest.approx(np.mean(values)) and summary["n"] == 400
    assert (low, high) == pytest.approx((summary["mean"] - margin, summary["mean"] + margin), 0.01)
    assert summarize(values) == summary
    assert summarize([2.0, 2.0, 2.0]) == {"mean": 2.0, "interval": [2.0, 2.0], "n": 3}
    assert summarize([2.0]) == {"mean": 2.0, "interval": None, "n": 1}
    assert summarize([]) == {"mean": None, "interval": None, "n": 0}


@pytest.mark.usefixtures("two_metrics")
def test_an_output_that_cannot_be_written_loses_no_table(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path, "--output", tmp_path / "r/clip0.wav/results.json")
    assert "| mel_l1 ↓ |" in capsys.readouterr().out


def result_of(name: str, system: str, value: float | None) -> FileResult:
    return FileResult(
        name=name,
        system=system,
        paths={"reference": f"r/{name}.wav", "generated": f"{system}/{name}.wav"},
        values={"mel_l1": value},
    )


def report_of(values: dict[str, dict[str, float | None]]) -> dict:
    """A report of the mel errors of systems, by clip."""
    results = [
        result_of(name, system, value)
        for system, column in values.items()
        for name, value in column.items()
    ]
    systems = {name: System(name, {}) for name in ("reference", *values)}
    chosen = [metric for metric in METRICS if metric.name == "mel_l1"]
    return build_report(results, config(), systems, chosen)


def test_differences_are_of_the_same_clips():
    """Clips differ by 1; in each, the second system is 0.1 to 0.2 worse."""
    first = {f"clip{i}": float(i) for i in range(20)}
    gaps = np.random.default_rng(0).uniform(0.1, 0.2, 20)
    second = {name: value + gap for (name, value), gap in zip(first.items(), gaps, strict=True)}
    del second["clip0"]  # of which nothing is known there
    second["clip1"] = None
    report = report_of({"a": first, "b": second})
    facts = report["metrics"]["mel_l1"]
    (difference,) = facts["differences"]
    low, high = difference["interval"]
    assert (difference["system"], difference["minus"], difference["n"]) == ("b", "a", 18)
    assert difference["mean"] == pytest.approx(gaps[2:].mean())
    assert 0.1 < low < difference["mean"] < high < 0.2
    assert np.diff(facts["systems"]["a"]["interval"]) > 3  # clips are far apart
    assert facts["systems"]["b"]["n"] == 18
    assert "b - a" in evaluate.difference_table(report)
    assert "| **+0.1" in evaluate.difference_table(report)
    assert " n=18" in evaluate.mean_table(report)


@pytest.mark.parametrize("name", ["a\nb", "a|b", "a\x1b[31mb", "a\udcffb", "a\u202eb"])
def test_odd_names_do_not_break_tables_or_notes(name, capsys):
    report = report_of({"a": {name: 1.0}, "b": {name: 2.0}})
    tables = (evaluate.file_table, evaluate.mean_table, evaluate.difference_table)
    for lines in (table(report).splitlines() for table in tables):
        assert len(lines) >= 3 and all(line.isprintable() for line in lines)
        counts = {line.count("|") - line.count(r"\|") for line in lines}
        assert len(counts) == 1, lines
    trouble = result_of(name, "a", None)
    trouble.reasons = {"stoi": "why"}
    evaluate.name_troubles(trouble, config())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and line.endswith(".wav: no stoi (why)")


def test_a_difference_that_may_be_none_is_not_in_bold():
    values = np.random.default_rng(0).normal(size=40)
    columns = {
        name: {f"clip{i}": float(sign * value) for i, value in enumerate(values)}
        for name, sign in (("a", 1), ("b", -1))
    }
    report = report_of(columns)
    low, high = report["metrics"]["mel_l1"]["differences"][0]["interval"]
    assert low < 0 < high and "**" not in evaluate.difference_table(report)


@pytest.mark.usefixtures("two_metrics")
def test_several_systems_have_a_column_each(tmp_path, capsys):
    write_pairs(tmp_path, 0.01, 0.01)
    for i in range(2):
        wav = soundfile.read(tmp_path / f"r/clip{i}.wav")[0]
        write(tmp_path / f"other/clip{i}.wav", noisy(wav, 0.05))
    report = run(tmp_path, "--per_file", folders=("g", "other"))
    out = capsys.readouterr().out
    assert "| metric | unit | g | other |" in out and "| metric | file | g | other |" in out
    assert "| metric | unit | other - g |" in out
    assert list(report["systems"]) == ["reference", "g", "other"]
    for name, sign in (("mel_l1", 1), ("pesq_wb", -1)):
        facts = report["metrics"][name]
        values = [
            [file["systems"][system]["values"][name] for file in report["files"]]
            for system in ("g", "other")
        ]
        (difference,) = facts["differences"]
        assert sign * difference["mean"] > 0
        assert difference["mean"] == pytest.approx(np.mean(values[1]) - np.mean(values[0]))


def test_help_explains_every_metric(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main(evaluate, "--help")
    text = capsys.readouterr().out
    for metric in METRICS:
        direction = f"{metric.better} is better"
        line = f"{metric.name} (unit: {metric.unit}; {direction}; library: {metric.library})"
        assert line in text
        assert metric.description.split(":")[0][:60] in " ".join(text.split())


@pytest.mark.usefixtures("two_metrics")
def test_a_terminal_without_arrows_gets_its_table(tmp_path, monkeypatch):
    write_pairs(tmp_path, 0.01)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run(tmp_path)
    terminal.flush()
    assert b"| mel_l1 ? | Np | " in terminal.buffer.getvalue()
