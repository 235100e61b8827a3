"""The metrics, on speech-like signals and degradations of them."""

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
from speechmos import plcmos

from audio import load_wav
from env import Config, load_config
from evaluation import metrics, opinion
from evaluation.metrics import METRICS, F0Track, Pair, evaluate_pair, measure
from meldataset import LogMelSpectrogram
from tools.toy import ROOT, speech_like, toy_config

RATE = 22050
SECONDS = 1.3  # of speech, enough for every metric
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
OPINIONS = ("distill_mos", "plcmos")
HIGH_BAND = ("mel_l1_8_12khz", "ltas_8_12khz")
SPECTRAL = ("mel_l1", "mr_stft", "ltas", "mcd")
PERCEPTUAL = ("pesq_wb", "stoi", "estoi")


@cache
def config() -> Config:
    return load_config(ROOT / "config_v1.json")


def metric(name: str) -> metrics.Metric:
    (found,) = (metric for metric in METRICS if metric.name == name)
    return found


def value(
    name: str, reference: np.ndarray, generated: np.ndarray, h: Config | None = None
) -> float:
    """Returns one metric; raises what it raises."""
    wavs = (torch.from_numpy(np.float32(wav)) for wav in (reference, generated))
    return metric(name).function(Pair(*wavs, h=h or config()))


def degrade(wav: np.ndarray, how: str, amount: float) -> np.ndarray:
    """Returns `wav` [N] at RATE with a fault that grows with `amount`."""
    if how == "noise":
        return wav + amount * np.random.default_rng(1).standard_normal(len(wav))
    if how == "lowpass":
        octaves = scipy.signal.butter(4, 8000 / 2**amount, fs=RATE, output="sos")
        return scipy.signal.sosfiltfilt(octaves, wav)
    if how == "pitch":
        return librosa.effects.pitch_shift(wav, sr=RATE, n_steps=amount)
    magnitude = np.abs(librosa.stft(wav, n_fft=1024))  # Griffin-Lim
    return librosa.griffinlim(magnitude, n_iter=32 // amount, random_state=0, length=len(wav))


def white_noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


def test_identical_waveforms_score_perfectly_at_any_level():
    wav = torch.from_numpy(speech_like(SECONDS))
    comparing = [metric for metric in METRICS if metric.needs_reference]
    assert measure(Pair(wav, wav, config()), comparing).values == pytest.approx(PERFECT, abs=1e-3)
    louder = measure(Pair(wav, 2 * wav, config()), comparing).values
    levels = {"mel_l1": math.log(2), "ltas": 20 * math.log10(2)}
    del louder["mr_stft"]  # it has a test of its own
    expected = {name: levels.get(name, PERFECT[name]) for name in louder}
    assert louder == pytest.approx(expected, abs=0.1, rel=1e-3)
    assert {metric.name for metric in METRICS} == {*OPINIONS, *HIGH_BAND, *PERFECT}


@pytest.mark.parametrize(
    ("how", "amounts", "names"),
    [
        ("noise", (0.003, 0.01, 0.03), (*SPECTRAL, *PERCEPTUAL)),
        ("noise", (0.03, 0.1), ("vuv_f1", "periodicity_rmse")),
        ("lowpass", (0.0, 1.0, 2.0), SPECTRAL),
        ("lowpass", (1.0, 2.0, 3.0), PERCEPTUAL),
        ("pitch", (0.5, 2.0), ("mel_l1", *PERCEPTUAL, "f0_rmse")),
        ("griffin-lim", (1, 8), ("mel_l1", "mr_stft", "mcd", *PERCEPTUAL, "periodicity_rmse")),
    ],
)
def test_worse_speech_scores_worse(how, amounts, names):
    wav = speech_like(SECONDS)
    steps = []
    for generated in (wav, *(degrade(wav, how, amount) for amount in amounts)):
        pair = Pair(torch.from_numpy(wav), torch.from_numpy(np.float32(generated)), config())
        steps.append(measure(pair, map(metric, names)).values)
    for name in names:
        sign = 1 if metric(name).better == "lower" else -1
        for good, bad in itertools.pairwise(step[name] for step in steps):
            assert sign * (bad - good) > 1e-3, name


def test_mel_l1_is_the_error_of_validation():
    h = config()
    wav, wav_hat = (torch.from_numpy(speech_like(0.7, seed=seed)) for seed in (0, 1))
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss)
    expected = F.l1_loss(log_mel(wav_hat[None]), log_mel(wav[None])).item()
    assert value("mel_l1", wav.numpy(), wav_hat.numpy()) == expected > 0.1


def test_high_band_metrics_measure_8_to_12_khz_alone(tmp_path):
    h = toy_config(tmp_path, sampling_rate=24000, fmax=12000, fmax_for_loss=12000)
    wav = white_noise(1.0, rate=24000)
    bins = np.fft.rfftfreq(len(wav), 1 / 24000)

    def halved(is_halved: np.ndarray) -> np.ndarray:
        return np.fft.irfft(np.fft.rfft(wav) * np.where(is_halved, 0.5, 1), len(wav))

    above, below = halved(bins > 7900), halved(bins < 7900)
    assert value("mel_l1_8_12khz", wav, above, h) == pytest.approx(math.log(2), abs=0.02)
    assert value("ltas_8_12khz", wav, above, h) == pytest.approx(20 * math.log10(2), abs=0.1)
    for name in HIGH_BAND:
        assert value(name, wav, below, h) < 0.05
    assert value("pesq_wb", wav, above, h) > 4.6  # why these two exist
    wavs = torch.from_numpy(np.float32([wav, above]))
    assert set(HIGH_BAND) <= evaluate_pair(*wavs, h).keys()


def test_mr_stft_is_relative_to_the_reference():
    """Half the amplitude: a convergence of 0.5, and ln 2 in the logarithm. Twice: 1, and ln 2."""
    wav = white_noise(1.0)
    assert value("mr_stft", wav, wav / 2) == pytest.approx(0.5 + math.log(2), abs=1e-3)
    assert value("mr_stft", wav, wav * 2) == pytest.approx(1.0 + math.log(2), abs=1e-3)


def test_ltas_shows_a_comb_filter_that_mel_bands_hide():
    """An echo after 256 samples raises and lowers every fourth bin of 1,024."""
    wav = white_noise(10.0)
    comb = wav.copy()
    comb[256:] += 0.3 * wav[:-256]
    comb /= np.std(comb) / np.std(wav)
    window = np.hanning(1025)[:-1]
    overlap = np.sum(window[256:] * window[:-256]) / np.sum(window**2)  # echo inside a window
    power = 1 + 0.6 * overlap * np.cos(2 * np.pi * np.arange(513) / 4) / 1.09
    assert value("ltas", wav, comb) == pytest.approx(np.abs(10 * np.log10(power)).mean(), rel=0.1)
    other = white_noise(10.0, seed=1)
    assert value("ltas", wav, other) < 0.3
    assert value("mel_l1", wav, comb) < value("mel_l1", wav, other)


def test_mcd_is_the_difference_of_smoothed_spectra_in_decibels():
    h = config()
    wav, wav_hat = (speech_like(0.7, seed=seed) for seed in (0, 1))
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss)
    mel, mel_hat = (log_mel(torch.from_numpy(each)[None])[0].double() for each in (wav, wav_hat))
    decibels = 20 / math.log(10) * (mel - mel_hat).numpy()
    cepstrum = scipy.fft.dct(decibels, axis=0, norm="ortho")
    cepstrum[0] = 0
    cepstrum[25:] = 0
    smooth = scipy.fft.idct(cepstrum, axis=0, norm="ortho")
    expected = np.sqrt((smooth**2).mean(axis=0)).mean()
    assert value("mcd", wav, wav_hat) == pytest.approx(expected, rel=1e-6)


def test_pesq_and_stoi_are_the_libraries_own_at_the_rates_of_their_definitions():
    wav = speech_like(2 * SECONDS)
    wav[len(wav) // 2 :] = 0  # STOI ignores frames in which the reference is silent
    noisy = degrade(wav, "noise", 0.01).astype(np.float32)

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
        assert number != pytest.approx(backward[name], rel=1e-3)  # the order matters
    assert forward["estoi"] < forward["stoi"] - 0.1


def tone(pitch: float, seconds: float = 1.0) -> np.ndarray:
    """Returns a steady harmonic tone."""
    time = np.arange(int(seconds * RATE)) / RATE
    return 0.1 * sum(np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 10))


@pytest.mark.parametrize(("pitch", "cents"), [(90.0, -100), (220.0, 50), (400.0, 300)])
def test_f0_rmse_of_two_tones_is_their_interval(pitch, cents):
    off = value("f0_rmse", tone(pitch, 0.5), tone(pitch * 2 ** (cents / 1200), 0.5))
    assert off == pytest.approx(abs(cents), abs=8)


def test_f0_metrics_equal_a_computation_by_hand():
    wav, nan = torch.zeros(5 * 256), math.nan
    pair = Pair(wav, wav, config())
    pair.f0_tracks = (
        F0Track(
            np.array([100, 100, 200, nan, nan]),
            np.array([True, True, True, False, False]),
            np.array([0.9, 0.8, 0.7, 0.1, 0.0]),
        ),
        F0Track(
            np.array([100 * 2 ** (30 / 1200), 100 * 2 ** (-40 / 1200), nan, 150, nan]),
            np.array([True, True, False, True, False]),
            np.array([0.9, 0.8, 0.4, 0.5, 0.0]),
        ),
    )
    expected = {
        "f0_rmse": math.sqrt((30**2 + 40**2) / 2),
        "vuv_f1": 2 * 2 / (2 * 2 + 1 + 1),
        "periodicity_rmse": math.sqrt((0.3**2 + 0.4**2) / 5),
    }
    for name, number in expected.items():
        assert metric(name).function(pair) == pytest.approx(number)


def test_f0_has_one_frame_for_each_hop():
    pair = Pair(torch.zeros(10 * 256 + 17), torch.zeros(9999), config())
    assert [len(track.f0) for track in pair.f0_tracks] == [11, 11]


def test_a_metric_that_is_not_defined_for_a_pair_is_none():
    h = config()
    wav = torch.from_numpy(speech_like(0.5))
    for generated in (torch.full_like(wav, math.nan), torch.zeros(0)):
        assert set(evaluate_pair(wav, generated, h).values()) == {None}
    broken = wav.clone()
    broken[100] = math.inf  # must not reach the C code of pesq
    reasons = measure(Pair(wav, broken, h)).reasons
    assert reasons["pesq_wb"] == "the generated waveform is silent or not finite"
    assert reasons.keys() == {*OPINIONS, *PERFECT}
    too_short = evaluate_pair(wav[:3000], wav[:3000], h)
    assert {"pesq_wb", "stoi", "estoi"} <= {n for n, each in too_short.items() if each is None}
    assert too_short["mel_l1"] == 0
    with pytest.raises(ValueError, match="20 s"):  # pesq would crash at the 50th utterance
        value("pesq_wb", np.ones(21 * RATE), np.ones(21 * RATE))
    with pytest.raises(ValueError, match=r"shape \[1, 11025\]"):
        evaluate_pair(wav[None], wav, h)


# ------------------------------------------------------------------ networks that predict opinions


@cache
def recording() -> np.ndarray:
    """Returns 4 s of LJSpeech from the page of the shipped weights."""
    return load_wav(ROOT / "pretrained/samples/index_files/0001-0.flac", RATE).numpy()


def opinion_of(wav: np.ndarray, name: str = "distill_mos") -> float:
    """Returns a metric that ignores the reference."""
    return value(name, np.zeros_like(wav), wav)


@pytest.mark.parametrize("name", OPINIONS)
def test_opinions_prefer_a_recording_and_do_not_depend_on_its_level(name):
    wav = recording()
    state = torch.random.get_rng_state(), np.random.get_state()[1]
    good = opinion_of(wav, name)
    assert 3.5 < good < 5
    assert opinion_of(degrade(wav, "noise", 0.03), name) < good - 0.3
    assert opinion_of(0.01 * wav, name) == pytest.approx(good, abs=1e-3)
    assert torch.equal(state[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(state[1], np.random.get_state()[1])


def test_plcmos_is_the_packages_own():
    at_16k = librosa.resample(recording(), orig_sr=RATE, target_sr=16000)
    np.random.seed(0)
    expected = plcmos.run(0.9 * at_16k / np.abs(at_16k).max(), 16000)["plcmos"]
    assert opinion_of(recording(), "plcmos") == pytest.approx(expected, abs=1e-4)


def test_distill_mos_of_a_long_file_is_the_models_own():
    """The windows are computed one by one here, all at once there."""
    wav = np.tile(recording(), 2)
    at_16k = librosa.resample(wav, orig_sr=RATE, target_sr=16000, res_type="soxr_hq")
    assert len(at_16k) > opinion.DISTILL_SAMPLES + 0.9 * opinion.DISTILL_HOP  # two windows
    with torch.no_grad():
        expected = opinion._distill_mos_model()(torch.from_numpy(at_16k)[None]).item()
    assert opinion_of(wav) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def anew(monkeypatch):
    """Unloads the networks and their packages."""
    opinion._distill_mos_model.cache_clear()
    opinion._plcmos_model.cache_clear()
    metrics.say_missing.cache_clear()
    packages = ("distillmos", "xls_r_sqa", "speechmos", "auraloss", "mel_cepstral_distance")
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    yield
    opinion._distill_mos_model.cache_clear()
    opinion._plcmos_model.cache_clear()


@pytest.mark.usefixtures("anew")
def test_distill_mos_needs_no_torchaudio_and_prints_nothing(tmp_path, monkeypatch, capsys):
    """An installed torchaudio was built for another torch."""
    (tmp_path / "torchaudio.py").write_text('raise OSError("undefined symbol")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    assert 1 < opinion_of(recording()) < 5
    with pytest.raises(OSError, match="undefined symbol"):  # its replacement is gone
        import torchaudio  # noqa: F401
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(
    ("module", "names", "command"),
    [
        ("distillmos", ["distill_mos"], metrics.NODEPS),
        ("xls_r_sqa", ["distill_mos"], metrics.NODEPS),
        ("speechmos", ["plcmos"], "pip install speechmos onnxruntime"),
        ("onnxruntime", ["plcmos"], "pip install speechmos onnxruntime"),
        ("auraloss", ["mr_stft"], "pip install auraloss"),
        ("mel_cepstral_distance", ["mcd"], "pip install mel-cepstral-distance"),
        ("pesq", ["pesq_wb"], "pip install pesq"),
        ("pystoi", ["stoi", "estoi"], "pip install pystoi"),
        ("numba", ["f0_rmse", "vuv_f1", "periodicity_rmse"], "pip install librosa"),
    ],
)
def test_a_missing_package_is_named_once_with_the_command_that_installs_it(
    capsys, monkeypatch, module, names, command
):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "numba":  # librosa has imported it

        def no_numba(*_, **__):
            raise ImportError("No module named 'numba'")

        monkeypatch.setattr(librosa, "pyin", no_numba)
    wav = torch.from_numpy(speech_like(0.5))
    kept = [metric("mel_l1"), *map(metric, names)]
    for _ in range(2):
        found = measure(Pair(wav, wav, config()), kept)
        assert found.values.keys() == {"mel_l1"} and found.missing.keys() == set(names)
        for name, reason in found.missing.items():
            metrics.say_missing(name, reason)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"{name}: left out, {metric(name).library} is missing (")
        assert line.endswith(f": {command}")
