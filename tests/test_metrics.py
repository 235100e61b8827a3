"""The metrics, on speech and what spoils it."""

import itertools
import math
import sys
from functools import cache

import librosa
import numpy as np
import pesq
import pystoi
import pytest
import scipy.fft
import scipy.signal
import torch
import torch.nn.functional as F

from audio import load_wav
from env import Config, load_config
from evaluation import metrics
from evaluation.metrics import METRICS, Pair, Pitch, evaluate_pair, measure, name_missing
from meldataset import LogMelSpectrogram
from tools.toy import ROOT, speech_like

RATE = 22050
SECONDS = 1.3  # of speech: enough for every metric
COMPARING = [metric for metric in METRICS if metric.needs_reference]

PERFECT = {
    "mel_l1": 0,
    "mr_stft": 0,
    "ltas": 0,
    "mcd": 0,
    "pesq_wb": 4.644,
    "stoi": 1,
    "estoi": 1,
    "f0_rmse": 0,
    "vuv_f1": 1,
    "periodicity_rmse": 0,
}
SPECTRAL = {"mel_l1", "mr_stft", "mcd"}
LEVELS = {"mel_l1", "mr_stft", "ltas"}
HEARING = {"pesq_wb", "stoi", "estoi"}


def config() -> Config:
    return load_config(ROOT / "config_v1.json")


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
    pair = Pair(torch.from_numpy(wav), torch.from_numpy(wav_hat), config())
    return measure(pair, COMPARING).values


def value(name: str, reference: np.ndarray, generated: np.ndarray) -> float:
    """One metric; raises what it raises."""
    (metric,) = (metric for metric in METRICS if metric.name == name)
    wavs = (torch.from_numpy(np.float32(wav)) for wav in (reference, generated))
    return metric.function(Pair(*wavs, h=config()))


def test_identical_waveforms_score_perfectly():
    assert scores() == pytest.approx(PERFECT, abs=1e-3)
    assert [metric.name for metric in METRICS] == ["distill_mos", *PERFECT]


@pytest.mark.parametrize(
    ("how", "amounts", "seen_by"),
    [
        ("noise", (0.003, 0.01, 0.03), SPECTRAL | {"ltas"} | HEARING | {"periodicity_rmse"}),
        ("noise", (0.03, 0.1), {"vuv_f1"}),
        ("lowpass", (0.0, 1.0, 2.0), SPECTRAL | {"ltas"}),
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


def test_ltas_sees_a_comb_that_bands_hide():
    """An echo of 256 samples, which raises and lowers each fourth bin of 1,024."""
    wav = 0.1 * np.random.default_rng(0).standard_normal(10 * RATE)
    comb = wav.copy()
    comb[256:] += 0.3 * wav[:-256]
    comb /= np.std(comb) / np.std(wav)
    window = np.hanning(1025)[:-1]
    seen = np.sum(window[256:] * window[:-256]) / np.sum(window**2)  # of the echo in a window
    power = 1 + 0.6 * seen * np.cos(2 * np.pi * np.arange(513) / 4) / 1.09
    expected = 10 * np.log10(power)
    assert value("ltas", wav, comb) == pytest.approx(np.abs(expected).mean(), rel=0.1)
    other = 0.1 * np.random.default_rng(1).standard_normal(10 * RATE)
    assert value("ltas", wav, other) < 0.3
    assert value("mel_l1", wav, comb) < value("mel_l1", wav, other)


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
    assert louder["ltas"] == pytest.approx(20 * math.log10(2), abs=0.1)
    unheard = PERFECT.keys() - LEVELS
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
        assert reasons.keys() == {"distill_mos", *PERFECT}
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


def test_without_pyin_its_three_metrics_are_left_out(capsys, monkeypatch):
    def no_numba(*_, **__):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(librosa, "pyin", no_numba)
    name_missing.cache_clear()
    wav = torch.from_numpy(speech_like(0.5))
    for _ in range(2):
        values = evaluate_pair(wav, wav, config())
    assert PERFECT.keys() - values.keys() == {"f0_rmse", "vuv_f1", "periodicity_rmse"}
    assert capsys.readouterr().err.count("it needs librosa (No module named 'numba')") == 3


# --- DistillMOS, which hears one waveform


@cache
def recording() -> np.ndarray:
    """4 s of LJSpeech, on the page of the shipped weights."""
    return load_wav(ROOT / "pretrained/samples/index_files/0001-0.flac", RATE).numpy()


def opinion(wav: np.ndarray) -> float:
    """DistillMOS; the reference plays no part."""
    return value("distill_mos", np.zeros_like(wav), wav)


def griffin_lim(wav: np.ndarray) -> np.ndarray:
    """From the log-mel: what a vocoder is given."""
    h = config()
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav)[None])[0].exp().numpy()
    magnitude = librosa.feature.inverse.mel_to_stft(
        mel, sr=RATE, n_fft=h.n_fft, power=1, fmin=h.fmin, fmax=h.fmax
    )
    return librosa.griffinlim(magnitude, n_iter=32, hop_length=h.hop_size, random_state=0)


def test_opinion_of_a_recording_is_better_than_of_what_is_made_of_it():
    wav = recording()
    good = opinion(wav)
    assert 3.5 < good < 5
    assert opinion(spoil(wav, "noise", 0.01)) < good - 0.5
    assert opinion(griffin_lim(wav)) < good - 0.5


def test_opinion_is_the_same_each_time_and_at_each_level():
    wav = recording()
    expected = opinion(wav)
    assert opinion(wav) == expected
    for gain in (0.01, 0.7):
        assert opinion(gain * wav) == pytest.approx(expected, abs=1e-3), gain


def test_opinion_of_a_long_file_is_the_models_own():
    """Window by window here, all at once there."""
    wav = np.tile(recording(), 2)
    at_16k = librosa.resample(wav, orig_sr=RATE, target_sr=16000, res_type="soxr_hq")
    with torch.no_grad():
        expected = metrics._opinion_model()(torch.from_numpy(at_16k)[None]).item()
    assert len(at_16k) > metrics.OPINION_SAMPLES + 0.9 * metrics.OPINION_HOP  # two windows
    assert opinion(wav) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def anew(monkeypatch):
    """The package and its weights are not loaded yet."""
    metrics._opinion_model.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "distillmos"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("anew")
def test_opinion_needs_no_torchaudio(tmp_path, monkeypatch):
    """One that fits another torch is there."""
    (tmp_path / "torchaudio.py").write_text('raise OSError("undefined symbol")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    assert 1 < opinion(recording()) < 5
    with pytest.raises(OSError, match="undefined symbol"):  # what stood in for it is gone
        import torchaudio  # noqa: F401


@pytest.mark.usefixtures("anew")
def test_opinion_leaves_its_host_as_it_was(capsys):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    opinion(recording())
    assert torch.rand(1) == expected
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("module", ["distillmos", "xls_r_sqa"])
def test_without_its_packages_the_command_that_installs_them_is_named(capsys, monkeypatch, module):
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    name_missing.cache_clear()
    wav = torch.from_numpy(recording()[:RATE])
    for _ in range(2):
        assert "distill_mos" not in evaluate_pair(wav, wav, config())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distill_mos: left out, it needs distillmos (")
    assert line.endswith("; pip install --no-deps -r requirements-nodeps.txt")
    (wanted,) = (each for each in METRICS if each.name == "distill_mos")
    assert wanted.requirements.split()[-1] in [path.name for path in ROOT.glob("requirements*")]
