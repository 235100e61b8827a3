"""The metrics, on made-up speech and what spoils it, and the command that measures folders."""

import io
import itertools
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import librosa
import matplotlib.image
import numpy as np
import pesq
import pystoi
import pytest
import scipy.fft
import scipy.signal
import soundfile
import torch
import torch.nn.functional as F

import evaluate
from env import Config, UserError, load_config
from evaluate import pair_files, summarize
from meldataset import LogMelSpectrogram
from metrics import METRICS, Pair, Pitch, evaluate_pair, measure
from tools.toy import ROOT, run_main, speech_like

RATE = 22050
SECONDS = 1.3  # of speech: enough for every metric
CONFIG = ROOT / "config_v1.json"

PERFECT = {
    "mel_l1": 0,
    "mr_stft": 0,
    "mcd": 0,
    "pesq_wb": 4.644,
    "stoi": 1,
    "estoi": 1,
    "f0_rmse": 0,
    "vuv_f1": 1,
    "periodicity_rmse": 0,
}
SPECTRAL = {"mel_l1", "mr_stft", "mcd"}
HEARING = {"pesq_wb", "stoi", "estoi"}


def config() -> Config:
    return load_config(CONFIG)


def spoil(wav: np.ndarray, how: str, amount: float) -> np.ndarray:
    """`wav` [N] at RATE with more of a fault the larger `amount` is."""
    if how == "noise":
        return wav + amount * np.random.default_rng(1).standard_normal(len(wav))
    if how == "lowpass":
        octaves = scipy.signal.butter(4, 8000 / 2**amount, fs=RATE, output="sos")
        return scipy.signal.sosfiltfilt(octaves, wav)
    if how == "pitch":
        return librosa.effects.pitch_shift(wav, sr=RATE, n_steps=amount)
    if how == "griffin-lim":
        magnitude = np.abs(librosa.stft(wav, n_fft=1024))
        n_iter = round(32 / amount)
        return librosa.griffinlim(magnitude, n_iter=n_iter, random_state=0, length=len(wav))
    if how == "level":
        return wav / 2**amount
    raise ValueError(how)


@cache
def scores(how: str = "level", amount: float = 0) -> dict[str, float]:
    """The metrics of made-up speech and what has become of it."""
    wav = speech_like(SECONDS)
    wav_hat = np.ascontiguousarray(spoil(wav, how, amount), dtype=np.float32)
    return evaluate_pair(torch.from_numpy(wav), torch.from_numpy(wav_hat), config())


def value(name: str, reference: np.ndarray, generated: np.ndarray) -> float:
    """One metric; raises what it raises."""
    (metric,) = (metric for metric in METRICS if metric.name == name)
    wavs = (torch.from_numpy(np.float32(wav)) for wav in (reference, generated))
    return metric.function(Pair(*wavs, h=config()))


# ----------------------------------------------------------------------------------- the metrics


def test_identical_waveforms_score_perfectly():
    assert scores() == pytest.approx(PERFECT, abs=1e-3)
    assert [metric.name for metric in METRICS] == list(PERFECT)


@pytest.mark.parametrize(
    ("how", "amounts", "seen_by"),
    [
        ("noise", (0.003, 0.01, 0.03), SPECTRAL | HEARING | {"periodicity_rmse"}),
        ("noise", (0.03, 0.1), {"vuv_f1"}),
        ("lowpass", (0.0, 1.0, 2.0), SPECTRAL),
        ("lowpass", (1.0, 2.0, 3.0), HEARING | {"periodicity_rmse"}),
        ("pitch", (0.5, 1.0, 2.0), SPECTRAL | HEARING | {"f0_rmse"}),
        ("griffin-lim", (1, 8, 32), SPECTRAL | HEARING | {"periodicity_rmse"}),
    ],
)
def test_worse_speech_scores_worse(how, amounts, seen_by):
    steps = [scores(), *(scores(how, amount) for amount in amounts)]
    better = {metric.name: metric.better for metric in METRICS}
    for name in seen_by:
        for good, bad in itertools.pairwise(step[name] for step in steps):
            assert bad > good + 1e-3 if better[name] == "lower" else bad < good - 1e-3, name


def test_mel_l1_is_the_error_that_training_shows():
    h = config()
    wav, wav_hat = (torch.from_numpy(speech_like(0.7, seed=seed)) for seed in (0, 1))
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss)
    expected = F.l1_loss(log_mel(wav_hat[None]), log_mel(wav[None])).item()
    assert value("mel_l1", wav.numpy(), wav_hat.numpy()) == expected > 0.1


def test_mr_stft_is_relative_to_the_reference():
    """Half the amplitude: a convergence of 0.5, and ln 2 in the logarithm. Twice: 1, and ln 2."""
    wav = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    assert value("mr_stft", wav, wav / 2) == pytest.approx(0.5 + math.log(2), abs=1e-3)
    assert value("mr_stft", wav, wav * 2) == pytest.approx(1.0 + math.log(2), abs=1e-3)


def test_mcd_is_the_difference_of_smoothed_spectra_in_decibels():
    h = config()
    wav, wav_hat = (np.float32(speech_like(0.7, seed=seed)) for seed in (0, 1))
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss)
    mel, mel_hat = (log_mel(torch.from_numpy(each)[None])[0].double() for each in (wav, wav_hat))
    decibels = 20 / math.log(10) * (mel - mel_hat).numpy()
    cepstrum = scipy.fft.dct(decibels, axis=0, norm="ortho")
    cepstrum[0] = 0
    cepstrum[25:] = 0
    smooth = scipy.fft.idct(cepstrum, axis=0, norm="ortho")
    expected = np.sqrt((smooth**2).mean(axis=0)).mean()
    assert value("mcd", wav, wav_hat) == pytest.approx(expected, rel=1e-6)


def test_hearing_metrics_are_the_libraries_own_at_the_rates_they_are_defined_for():
    wav = speech_like(2 * SECONDS)
    wav[len(wav) // 2 :] = 0  # STOI looks only where the reference speaks
    noisy = spoil(wav, "noise", 0.01).astype(np.float32)

    def expected(reference: np.ndarray, generated: np.ndarray) -> dict[str, float]:
        at_16k, at_10k = (
            [librosa.resample(x, orig_sr=RATE, target_sr=rate) for x in (reference, generated)]
            for rate in (16000, 10000)
        )
        return {
            "pesq_wb": pesq.pesq(16000, *at_16k, mode="wb"),
            "stoi": pystoi.stoi(*at_10k, 10000),
            "estoi": pystoi.stoi(*at_10k, 10000, extended=True),
        }

    forward, backward = expected(wav, noisy), expected(noisy, wav)
    for name, number in forward.items():
        assert value(name, wav, noisy) == pytest.approx(number, rel=1e-6), name
        assert number != pytest.approx(backward[name], rel=1e-3)  # the reference comes first
    assert forward["estoi"] < forward["stoi"] - 0.1


def test_level_is_heard_by_the_mel_but_not_by_mcd():
    louder = scores("level", -1)
    assert louder["mel_l1"] == pytest.approx(math.log(2), abs=0.01)
    unheard = PERFECT.keys() - {"mel_l1", "mr_stft"}
    for name in unheard:
        assert louder[name] == pytest.approx(PERFECT[name], abs=1e-3), name


def tone(pitch: float, seconds: float = 1.0) -> np.ndarray:
    """A steady voice."""
    time = np.arange(int(seconds * RATE)) / RATE
    return 0.1 * sum(np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 10))


@pytest.mark.parametrize("pitch", [90.0, 220.0, 400.0])
@pytest.mark.parametrize("cents", [-100, 50, 100, 300])
def test_f0_rmse_of_two_tones_is_their_interval(pitch, cents):
    off = value("f0_rmse", tone(pitch), tone(pitch * 2 ** (cents / 1200)))
    assert off == pytest.approx(abs(cents), abs=8)


def test_f0_metrics_by_hand():
    wav = torch.zeros(5 * 256)
    pair = Pair(wav, wav, config())
    nan = math.nan
    pair.pitches = (
        Pitch(
            np.array([100, 100, 200, nan, nan]),
            np.array([True, True, True, False, False]),
            np.array([0.9, 0.8, 0.7, 0.1, 0.0]),
        ),
        Pitch(
            np.array([100 * 2 ** (30 / 1200), 100 * 2 ** (-40 / 1200), nan, 150, nan]),
            np.array([True, True, False, True, False]),
            np.array([0.9, 0.8, 0.4, 0.5, 0.0]),
        ),
    )
    values = {metric.name: metric.function for metric in METRICS}
    assert values["f0_rmse"](pair) == pytest.approx(math.sqrt((30**2 + 40**2) / 2))
    assert values["vuv_f1"](pair) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert values["periodicity_rmse"](pair) == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 5))


def test_a_voice_that_stops_early_loses_recall():
    """All is voiced in one, half in the other: precision 1, recall 1/2, F1 2/3."""
    half = tone(150.0, seconds=2.0) * (np.arange(2 * RATE) < RATE)
    noise = 1e-3 * np.random.default_rng(0).standard_normal(2 * RATE)
    assert value("vuv_f1", tone(150.0, seconds=2.0), half + noise) == pytest.approx(2 / 3, abs=0.03)


def test_f0_has_one_frame_each_hop():
    pair = Pair(torch.zeros(10 * 256 + 17), torch.zeros(9999), config())
    assert [len(pitch.f0) for pitch in pair.pitches] == [11, 11]


def test_what_cannot_be_measured_is_none():
    h = config()
    wav = torch.from_numpy(speech_like(0.5))
    for generated in (torch.full_like(wav, math.nan), torch.zeros(0)):
        assert set(evaluate_pair(wav, generated, h).values()) == {None}
    for number in (math.nan, math.inf):  # in one sample; they must not reach pesq's C code
        broken = wav.clone()
        broken[100] = number
        reasons = measure(Pair(wav, broken, h)).reasons
        assert reasons["pesq_wb"] == "the generated waveform is silent or not finite"
        assert reasons.keys() == PERFECT.keys()
    too_short = evaluate_pair(wav[:3000], wav[:3000], h)
    none = {name for name, each in too_short.items() if each is None}
    assert none >= {"pesq_wb", "stoi", "estoi"} and too_short["mel_l1"] == 0
    with pytest.raises(ValueError, match="20 s"):  # pesq would crash at the 50th utterance
        value("pesq_wb", np.ones(21 * RATE), np.ones(21 * RATE))
    with pytest.raises(ValueError, match=r"shape \[1, 11025\]"):
        evaluate_pair(wav[None], wav, h)


def test_intelligibility_leaves_random_numbers_as_they_were():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    noisy = spoil(speech_like(SECONDS), "noise", 0.01)
    first, second = (value("estoi", speech_like(SECONDS), noisy) for _ in range(2))
    assert first == second  # to the last bit: pystoi adds noise
    assert np.random.random() == expected


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


# ----------------------------------------------------------------------------------- the command


def write(path: Path, wav: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, subtype="FLOAT")


def write_pairs(folder: Path, *noises: float) -> None:
    """Writes r/clip0.wav and g/clip0_generated.wav, ..., with so much noise in the latter."""
    for i, noise in enumerate(noises):
        wav = speech_like(SECONDS, seed=i)
        write(folder / f"r/clip{i}.wav", wav)
        write(folder / f"g/clip{i}_generated.wav", spoil(wav, "noise", noise))


@pytest.fixture
def two_metrics(monkeypatch):
    """For tests of what is around the metrics."""
    chosen = [metric for metric in METRICS if metric.name in ("mel_l1", "pesq_wb")]
    monkeypatch.setattr(evaluate, "METRICS", chosen)


def run(folder: Path, *flags, status: int = 0) -> dict:
    """Runs the script in this process on r and g of `folder`; returns the JSON."""
    output = folder / "results.json"
    arguments = ("--reference_dir", folder / "r", "--generated_dir", folder / "g")
    workers = () if "--workers" in flags else ("--workers", 1)
    assert run_main(evaluate, *arguments, "--output", output, *workers, *flags) == status
    return json.loads(output.read_text())


def test_table_and_json_hold_every_metric(tmp_path, capsys):
    write_pairs(tmp_path, 0.003, 0.01)
    report = run(tmp_path, "--per_file")
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines()]
    assert len(report["files"]) == 2 and list(report["metrics"]) == list(PERFECT)
    for i, result in enumerate(report["files"]):
        assert result["name"] == f"clip{i}"
        assert Path(result["paths"]["generated"]).name == f"clip{i}_generated.wav"
        assert list(result["values"]) == list(PERFECT) and result["reasons"] == {}
        assert rows[2 + i][0] == f"| clip{i}"
        assert float(rows[2 + i][1]) == pytest.approx(result["values"]["mel_l1"], rel=1e-3)
    for metric, row in zip(METRICS, rows[-len(METRICS) :], strict=True):
        facts = report["metrics"][metric.name]
        low, high = facts["interval"]
        values = [result["values"][metric.name] for result in report["files"]]
        assert facts["mean"] == pytest.approx(np.mean(values))
        assert low <= facts["mean"] <= high and facts["n"] == 2
        assert facts["better"] == metric.better and facts["library"] == metric.library
        assert row[0] == f"| {metric.name} {'↑' if metric.better == 'higher' else '↓'}"
        assert row[1] == metric.unit and row[-1] == "2 |"
        assert float(row[2]) == pytest.approx(facts["mean"], rel=1e-3)
        assert [float(end) for end in row[3].split(" to ")] == pytest.approx([low, high], rel=1e-3)
    assert report["config"]["sampling_rate"] == RATE and report["missing"] == {}
    assert report["versions"]["pesq"] and report["skipped"] == []


@pytest.mark.usefixtures("two_metrics")
def test_files_are_listed_only_when_asked_for(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    report = run(tmp_path)
    assert "clip0" not in capsys.readouterr().out
    assert report["metrics"]["mel_l1"]["interval"] is None  # of one file


def test_result_does_not_depend_on_the_workers(tmp_path):
    """In processes of their own, by the script itself."""
    write_pairs(tmp_path, 0.003, 0.01, 0.03)
    expected = run(tmp_path, "--workers", 1)
    flags = ("--reference_dir", "r", "--generated_dir", "g", "--output", "two.json")
    script = [sys.executable, str(ROOT / "evaluate.py"), *flags, "--workers", "2"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    report = json.loads((tmp_path / "two.json").read_text())
    for result in (*expected["files"], *report["files"]):
        del result["paths"]  # absolute in one, relative in the other
    assert report == expected and len(report["files"]) == 3


@pytest.mark.usefixtures("two_metrics")
def test_lengths_are_cut_to_the_shorter_and_the_cut_is_told(tmp_path, capsys):
    wav = speech_like(SECONDS)
    write(tmp_path / "r/a.wav", wav)
    write(tmp_path / "g/a.wav", wav[:-200])
    write(tmp_path / "r/b.wav", wav[:-1025])
    write(tmp_path / "g/b.wav", wav)
    report = run(tmp_path)
    err = capsys.readouterr().err
    assert "2 pairs at 22050 Hz, 2 cut to the shorter by at most 1025 samples" in err
    assert f"{tmp_path / 'g/b.wav'}: its last 1025 samples were cut off" in err
    assert "a.wav" not in err  # 200 are less than n_fft
    a, b = report["files"]
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
    (result,) = report["files"]
    assert result["sampling_rates"] == {"reference": 44100, "generated": 22050}
    assert result["values"]["mel_l1"] < 0.01 and result["values"]["pesq_wb"] > 4.6


@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        ("auraloss.freq", {"mr_stft"}),
        ("mel_cepstral_distance", {"mcd"}),
        ("pesq", {"pesq_wb"}),
        ("pystoi", {"stoi", "estoi"}),
    ],
)
def test_a_missing_library_is_named_once_and_left_out(
    tmp_path, capsys, monkeypatch, module, left_out
):
    monkeypatch.setitem(sys.modules, module, None)
    evaluate.name_missing.cache_clear()
    kept = [metric for metric in METRICS if metric.library != "librosa"]
    monkeypatch.setattr(evaluate, "METRICS", kept)
    write_pairs(tmp_path, 0.01, 0.01)
    report = run(tmp_path)
    captured = capsys.readouterr()
    (library,) = {metric.library for metric in kept if metric.name in left_out}
    notice = (
        f"{{}}: left out, it needs {library} (import of {module} halted; None in sys.modules); "
        "pip install -r requirements-dev.txt"
    )
    for metric in kept:
        is_missing = metric.name in left_out
        assert captured.err.splitlines().count(notice.format(metric.name)) == is_missing
        assert (metric.name in report["missing"]) == is_missing
        assert (metric.name not in report["metrics"]) == is_missing
        assert (f"| {metric.name} " not in captured.out) == is_missing
    assert all(not left_out & result["values"].keys() for result in report["files"])
    wav = torch.from_numpy(speech_like(SECONDS))
    assert not left_out & evaluate_pair(wav, wav, config()).keys()


def test_without_pyin_its_three_metrics_are_left_out(capsys, monkeypatch):
    def no_numba(*_, **__):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(librosa, "pyin", no_numba)
    evaluate.name_missing.cache_clear()
    wav = torch.from_numpy(speech_like(0.5))
    for _ in range(2):
        values = evaluate_pair(wav, wav, config())
    assert PERFECT.keys() - values.keys() == {"f0_rmse", "vuv_f1", "periodicity_rmse"}
    assert capsys.readouterr().err.count("it needs librosa (No module named 'numba')") == 3


@pytest.mark.parametrize("side", ["r/clip1.wav", "g/clip1_generated.wav"])
def test_silence_is_left_out_of_the_means_it_has_no_part_in(tmp_path, capsys, side):
    write_pairs(tmp_path, 0.01, 0.01)
    write(tmp_path / side, np.zeros(int(SECONDS * RATE)))
    report = run(tmp_path)
    err = capsys.readouterr().err
    speech, silence = report["files"]
    is_reference = side.startswith("r/")
    nulls = {"pesq_wb", "f0_rmse"} | ({"mr_stft", "stoi", "estoi"} if is_reference else set())
    assert {name for name, each in silence["values"].items() if each is None} == nulls
    assert silence["reasons"].keys() == nulls and speech["reasons"] == {}
    assert silence["reasons"]["f0_rmse"] == "no frame is voiced in both files"
    silent_side = "reference" if is_reference else "generated"
    expected = f"the {silent_side} waveform is silent or not finite"
    assert all(silence["reasons"][name] == expected for name in nulls - {"f0_rmse"})
    for name, facts in report["metrics"].items():
        assert (f"clip1: no {name} (" in err) == (name in nulls)
        assert facts["n"] == (1 if name in nulls else 2)
    assert report["metrics"]["pesq_wb"]["mean"] == speech["values"]["pesq_wb"]
    assert silence["values"]["vuv_f1"] == 0 and silence["values"]["mel_l1"] > 1


@pytest.mark.usefixtures("two_metrics")
def test_a_bad_file_is_named_and_skipped(tmp_path, capsys):
    write_pairs(tmp_path, 0.01, 0.01, 0.01)
    (tmp_path / "g/clip1_generated.wav").write_text("no audio")
    write(tmp_path / "r/clip2.wav", np.zeros(100))  # less than a hop
    report = run(tmp_path, status=1)
    err = capsys.readouterr().err
    assert f"skipped: {tmp_path / 'g/clip1_generated.wav'}: cannot be read as audio" in err
    assert "1 pairs at 22050 Hz, 2 skipped" in err
    assert [result["name"] for result in report["files"]] == ["clip0"]
    assert [result["name"] for result in report["skipped"]] == ["clip1", "clip2"]
    assert "100 samples" in report["skipped"][1]["error"]


@pytest.mark.usefixtures("two_metrics")
def test_nothing_but_bad_files_makes_an_empty_table(tmp_path, capsys):
    for folder in ("r", "g"):
        touch(tmp_path / folder, "a.wav")
    report = run(tmp_path, status=1)
    assert report["metrics"]["mel_l1"]["mean"] is None and report["files"] == []
    assert "| mel_l1 ↓ | Np | - | - | 0 |" in capsys.readouterr().out


@pytest.mark.usefixtures("two_metrics")
def test_files_without_a_partner_are_counted_and_the_first_named(tmp_path, capsys):
    write_pairs(tmp_path, 0.01)
    touch(tmp_path / "r", *(f"other{i}.wav" for i in range(7)))
    touch(tmp_path / "g", "stray.wav")
    report = run(tmp_path)
    err = capsys.readouterr().err
    assert f"{tmp_path / 'r'}: without a partner 7: " in err and "other4.wav and 2 more" in err
    assert f"{tmp_path / 'g'}: without a partner 1: {tmp_path / 'g/stray.wav'}\n" in err
    assert len(report["unpaired"]["reference"]) == 7
    assert report["unpaired"]["generated"] == [str(tmp_path / "g/stray.wav")]


def test_pictures_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "METRICS", METRICS[:1])
    write(tmp_path / "r/s/a.wav", speech_like(0.5))
    write(tmp_path / "g/s/a_generated.wav", speech_like(0.5, seed=1))
    run(tmp_path, "--plot", tmp_path / "pictures")
    assert [path.name for path in (tmp_path / "pictures").rglob("*.*")] == ["a.png"]
    image = matplotlib.image.imread(tmp_path / "pictures/s/a.png")
    assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.1


def test_picture_shows_mels_their_difference_and_both_pitches():
    wavs = [torch.from_numpy(speech_like(0.5, seed=seed)) for seed in (0, 1)]
    pair = Pair(*wavs, h=config())
    figure = evaluate.picture(pair)
    panels = [axes for axes in figure.axes if axes.get_title()]
    images = [axes.images[0].get_array() for axes in panels[:3]]
    for image, expected in zip(images, (*pair.mels, pair.mels[1] - pair.mels[0]), strict=True):
        np.testing.assert_array_equal(image, expected.numpy())
    for line, pitch in zip(panels[3].lines, pair.pitches, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), pitch.f0)


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
