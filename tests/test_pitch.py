"""PitchEstimator against synthetic voices of known F0 and aperiodicity."""

import math

import numpy as np
import pytest
import torch

from env import Config
from losses import EDGE
from meldataset import LogMelSpectrogram
from pitch import CORRELATION_PERIODS, PitchEstimator
from tools.toy import toy_config

FRAME_RATE = "configs/frame_v2.json"
SHAPES = {
    "shipped": {},
    "44 kHz": {"sampling_rate": 44100, "hop_size": 512, "n_fft": 2048, "win_size": 2048},
    "odd": {"hop_size": 200, "n_fft": 900, "win_size": 800},
    "short windows": {"n_fft": 512, "win_size": 512, "hop_size": 128, "num_mels": 40},
}
INNER = slice(EDGE + 4, -EDGE - 4)  # frames whose windows lie within the voice


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def h(request, tmp_path) -> Config:
    hop_size = request.param.get("hop_size", 256)
    return toy_config(tmp_path, FRAME_RATE, segment_size=32 * hop_size, **request.param)


def harmonics(h: Config, log_f0: np.ndarray) -> torch.Tensor:
    """Returns harmonics of amplitude 1 / k at a log F0 [T] at the centres of frames: wav [1, N]."""
    count = len(log_f0) * h.hop_size
    centres = (np.arange(len(log_f0)) + 0.5) * h.hop_size
    f0 = np.exp(np.interp(np.arange(count) + 0.5, centres, log_f0))
    phase, highest = np.cumsum(f0 / h.sampling_rate), int(0.5 * h.sampling_rate / f0.max())
    wav = sum(np.cos(2 * np.pi * k * phase + k * k) / k for k in range(1, highest + 1))
    return 0.1 * torch.from_numpy(wav).float()[None]


def band(h: Config, wav: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Returns the part of wav [1, N] between two frequencies in Hz."""
    spectrum = torch.fft.rfft(wav)
    hz = torch.arange(spectrum.shape[1]) / wav.shape[1] * h.sampling_rate
    return torch.fft.irfft(spectrum * ((hz > low) & (hz < high)), n=wav.shape[1])


def cents(log_f0: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return 1200 / math.log(2) * (log_f0[0] - expected).abs()[INNER]


@pytest.mark.parametrize("hz", [70, 120, 210, 380])
def test_a_steady_voice(h, hz):
    expected = np.full(40, math.log(hz))
    log_f0, periodicity, aperiodicity = PitchEstimator(h)(harmonics(h, expected))
    assert log_f0.shape == periodicity.shape == (1, 40)
    assert aperiodicity.shape == (1, 40, h.n_fft // 2 + 1)
    assert cents(log_f0, torch.from_numpy(expected)).max() < 5
    assert periodicity[0, INNER].min() > 0.98
    assert aperiodicity[0, INNER, : h.n_fft // 4].max() < 0.05


def test_a_gliding_voice(h):
    expected = math.log(200) + 0.3 * np.sin(np.arange(60) * h.hop_size / h.sampling_rate * 6)
    log_f0, _, aperiodicity = PitchEstimator(h)(harmonics(h, expected))
    assert cents(log_f0, torch.from_numpy(expected)).max() < 40
    assert aperiodicity[0, INNER, : h.n_fft // 16].mean() < 0.2


def test_a_voice_below_noise(h):
    """Harmonics up to 2 kHz and noise above 4 kHz, then noise alone."""
    noise = torch.randn(1, 60 * h.hop_size)
    voice = band(h, harmonics(h, np.full(60, math.log(150))), low=0, high=2000)
    voice = voice + 0.03 * band(h, noise, low=4000, high=math.inf)
    _, periodicity, aperiodicity = PitchEstimator(h)(voice)
    hz = torch.arange(h.n_fft // 2 + 1) * h.sampling_rate / h.n_fft
    inner = aperiodicity[0, INNER]
    assert periodicity[0, INNER].min() > 0.8
    assert inner[:, hz < 1200].mean() < 0.05
    assert inner[:, (hz > 5000) & (hz < 9000)].mean() > 0.6
    _, periodicity, aperiodicity = PitchEstimator(h)(0.1 * noise)
    assert periodicity.median() < 0.5
    assert aperiodicity.mean() > 0.6


def test_the_periodicity_is_the_correlation_of_segments_one_lag_apart(h):
    """A few clicks in each period of 147 samples, so that a lag wrong by one sample shows."""
    clicks = (torch.rand(147) < 0.07).float()
    wav = clicks.repeat(-(-40 * h.hop_size // 147))[None, : 40 * h.hop_size]
    estimator = PitchEstimator(h)
    log_f0, periodicity, _ = estimator(wav)
    size = CORRELATION_PERIODS * estimator.max_lag
    before = (size + estimator.max_lag - h.hop_size) // 2
    padded, cosine = torch.nn.functional.pad(wav, (before, size)), torch.nn.CosineSimilarity(dim=0)
    for t, lag in enumerate(h.sampling_rate / log_f0[0].exp()):
        frame = padded[0, t * h.hop_size :][: size + estimator.max_lag].double()
        frame = frame - frame.mean()
        lags = (int(lag), int(lag) + 1)
        expected = [max(0, cosine(frame[:size], frame[lag : lag + size])) for lag in lags]
        assert min(abs(float(periodicity[0, t]) - x) for x in expected) < 1e-3


def test_silence_gives_finite_values(h):
    for value in PitchEstimator(h)(torch.zeros(2, 20 * h.hop_size)):
        assert value.isfinite().all()


def test_frames_lie_where_the_mels_frames_lie(tmp_path):
    """The centre of a short voice in silence is the same in periodicity and in the mel."""
    h = toy_config(tmp_path, FRAME_RATE)
    wav = torch.zeros(1, 60 * 256)
    wav[:, 24 * 256 : 36 * 256] = harmonics(h, np.full(12, math.log(200)))
    _, periodicity, _ = PitchEstimator(h)(wav)
    levels = LogMelSpectrogram(h, h.fmax)(wav)[0].mean(0).exp()
    centres = [float((x * torch.arange(60)).sum() / x.sum()) for x in (periodicity[0], levels)]
    assert centres == pytest.approx([29.5, 29.5], abs=0.6)
