"""What is measured of a voice, against pulses and noise of which it is known."""

import math

import numpy as np
import pytest
import torch

from losses import EDGE, SourceLoss
from meldataset import LogMelSpectrogram
from pitch import F0_PERIODS, PitchEstimator, Voice
from tools.toy import toy_config

FRAMES = "configs/frame_v2.json"
SHAPES = {
    "shipped": {},
    "44 kHz": {"sampling_rate": 44100, "hop_size": 512, "n_fft": 2048, "win_size": 2048},
    "odd": {"hop_size": 200, "n_fft": 900, "win_size": 800},
    "short windows": {"n_fft": 512, "win_size": 512, "hop_size": 128, "num_mels": 40},
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def h(request, tmp_path):
    hop_size = request.param.get("hop_size", 256)
    return toy_config(tmp_path, FRAMES, segment_size=32 * hop_size, **request.param)


def sung(h, log_f0: np.ndarray) -> torch.Tensor:
    """Harmonics, softer the higher, at a pitch [T] in the middle of each frame: wav [1, N]."""
    count = len(log_f0) * h.hop_size
    centres = (np.arange(len(log_f0)) + 0.5) * h.hop_size
    f0 = np.exp(np.interp(np.arange(count) + 0.5, centres, log_f0))
    turns, highest = np.cumsum(f0 / h.sampling_rate), int(0.5 * h.sampling_rate / f0.max())
    wav = sum(np.cos(2 * np.pi * k * turns + k * k) / k for k in range(1, highest + 1))
    return 0.1 * torch.from_numpy(wav).float()[None]


@pytest.mark.parametrize("hz", [70, 120, 210, 380])
def test_the_pitch_of_a_steady_voice(h, hz):
    log_f0, periodicity, noise = PitchEstimator(h)(sung(h, np.full(40, math.log(hz))))
    assert log_f0.shape == periodicity.shape == (1, 40)
    assert noise.shape == (1, 40, h.n_fft // 2 + 1)
    cents = 1200 / math.log(2) * (log_f0 - math.log(hz))[0, EDGE + 4 : -EDGE - 4]
    assert cents.abs().max() < 5
    assert periodicity[0, EDGE + 4 : -EDGE - 4].min() > 0.98
    voiced = noise[0, EDGE + 4 : -EDGE - 4, : h.n_fft // 4]
    assert voiced.max() < 0.05


def test_the_pitch_of_a_voice_that_glides(h):
    expected = math.log(200) + 0.3 * np.sin(np.arange(60) * h.hop_size / h.sampling_rate * 6)
    log_f0, _, noise = PitchEstimator(h)(sung(h, expected))
    inner = slice(EDGE + 4, -EDGE - 4)
    cents = 1200 / math.log(2) * (log_f0[0].numpy() - expected)[inner]
    assert np.abs(cents).max() < 40
    assert noise[0, inner, : h.n_fft // 16].mean() < 0.2


def test_noise_is_noise_above_a_voice_and_everywhere_without_one(h):
    """A voice below 2 kHz under noise above 4 kHz: each is heard where it is."""
    torch.manual_seed(0)
    n = 60 * h.hop_size
    hiss = torch.fft.rfft(torch.randn(1, n))
    hz = torch.arange(hiss.shape[1]) / n * h.sampling_rate
    hiss = torch.fft.irfft(hiss * (hz > 4000), n=n)
    voice = torch.fft.rfft(sung(h, np.full(60, math.log(150))))
    voice = torch.fft.irfft(voice * (hz < 2000), n=n)
    meter = PitchEstimator(h)
    _, periodicity, noise = meter(voice + 0.03 * hiss)
    bins = torch.arange(h.n_fft // 2 + 1) * h.sampling_rate / h.n_fft
    inner = noise[0, EDGE + 4 : -EDGE - 4]
    assert periodicity[0, EDGE + 4 : -EDGE - 4].min() > 0.8
    assert inner[:, bins < 1200].mean() < 0.05
    assert inner[:, (bins > 5000) & (bins < 9000)].mean() > 0.6
    _, periodicity, noise = meter(0.1 * torch.randn(1, n))
    assert periodicity.median() < 0.5
    assert noise.mean() > 0.6


def test_the_periodicity_is_the_correlation_with_what_comes_a_period_later(h):
    """A few clicks a period, so that one sample more or less counts."""
    generator = torch.Generator().manual_seed(0)
    clicks = torch.rand(147, generator=generator) < 0.07
    wav = clicks.float().repeat(-(-40 * h.hop_size // 147))[None, : 40 * h.hop_size]
    meter = PitchEstimator(h)
    log_f0, periodicity, _ = meter(wav)
    cosine = torch.nn.CosineSimilarity(dim=0)
    compared = F0_PERIODS * meter.longest
    frames = meter._frames(wav, compared + meter.longest)[0].double()
    for frame, lag, heard in zip(
        frames, h.sampling_rate / log_f0[0].exp(), periodicity[0], strict=True
    ):
        frame, lags = frame - frame.mean(), (int(lag), int(lag) + 1)
        plain = [cosine(frame[:compared], frame[lag : lag + compared]) for lag in lags]
        assert min(abs(float(heard) - max(0, x)) for x in plain) < 1e-3


def test_silence_has_no_voice(h):
    for value in PitchEstimator(h)(torch.zeros(2, 20 * h.hop_size)):
        assert value.isfinite().all()


def test_the_loss_is_nothing_for_what_is_right_and_counts_what_is_voiced(tmp_path):
    h = toy_config(tmp_path, FRAMES)
    wav = sung(h, np.full(40, math.log(180)))
    wav[:, 20 * 256 :] = 0.05 * torch.randn(1, 20 * 256, generator=torch.Generator().manual_seed(0))
    loss, (log_f0, periodicity, noise) = SourceLoss(h), PitchEstimator(h)(wav)
    right = Voice(log_f0, noise, cycles=torch.zeros(1, 40))
    assert float(loss(right, wav)) == 0
    weight = (periodicity - 0.5).clamp(min=0)[:, EDGE:-EDGE]
    wrong = torch.where(torch.arange(40) < 20, 0.1, 0.7)
    share = float((weight * wrong[EDGE:-EDGE]).sum() / weight.sum())
    assert float(loss(right._replace(log_f0=log_f0 + wrong), wav)) == pytest.approx(share, rel=1e-4)
    assert share < 0.15  # the second half is hardly voiced
    noisier = noise + 0.25
    assert float(loss(right._replace(noise=noisier), wav)) == pytest.approx(0.25, rel=1e-4)
    ends = log_f0.clone()
    ends[:, :EDGE] += 1
    assert float(loss(right._replace(log_f0=ends), wav)) == 0


def test_frames_lie_where_the_mels_lie(tmp_path):
    """A click of voice in silence is found in the frames in which the mel has it."""
    h = toy_config(tmp_path, FRAMES)
    wav = torch.zeros(1, 60 * 256)
    wav[:, 24 * 256 : 36 * 256] = sung(h, np.full(12, math.log(200)))
    _, periodicity, _ = PitchEstimator(h)(wav)
    loud = LogMelSpectrogram(h, h.fmax)(wav)[0].mean(0)
    middles = [float((x * torch.arange(60)).sum() / x.sum()) for x in (periodicity[0], loud.exp())]
    assert middles == pytest.approx([29.5, 29.5], abs=0.6)
