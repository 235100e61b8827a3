"""The losses against their formulas and NumPy."""

import math

import numpy as np
import pytest
import torch

from checkpoint import build_state
from losses import (
    EDGE,
    REPULSION,
    MelLoss,
    SourceLoss,
    discriminator_loss,
    feature_loss,
    generator_loss,
)
from meldataset import LogMelSpectrogram
from models import Generator
from pitch import PitchEstimator
from tests.test_pitch import harmonics
from tools.toy import speech_like, toy_config
from train import training_step

FRAME_RATE = "configs/frame_v2.json"


def test_adversarial_losses_equal_their_formulas():
    real, fake = [[torch.randn(2, 5), torch.randn(2, 9)] for _ in range(2)]
    expected = sum(((r - 1) ** 2).mean() + (f**2).mean() for r, f in zip(real, fake, strict=True))
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    expected = sum(((f - 1) ** 2).mean() for f in fake)
    torch.testing.assert_close(generator_loss(fake), expected)


def test_the_feature_loss_equals_its_formula():
    real, fake = [[[torch.randn(2, 3, 4)], [torch.randn(1), torch.randn(5)]] for _ in range(2)]
    pairs = [(real[0][0], fake[0][0]), (real[1][0], fake[1][0]), (real[1][1], fake[1][1])]
    expected = sum((r - f).abs().mean() for r, f in pairs)
    torch.testing.assert_close(feature_loss(real, fake), expected)
    with pytest.raises(ValueError):
        feature_loss([[torch.ones(1)]], [[torch.ones(1), torch.ones(1)]])


# -------------------------------------------------------------------------------- energy distance


def averaged_bins_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns by NumPy the L1 distance of log magnitudes, averaged over 16 frames."""
    spectra = []
    for wav in (x, y):
        padded = np.pad(wav.numpy(), ((0, 0), (384, 384)), mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, 1024, axis=1)[:, ::256]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
        logs = np.log(np.abs(np.fft.rfft(frames * window)))
        stretches = np.array_split(logs, range(16, logs.shape[1], 16), axis=1)
        spectra.append(np.stack([stretch.mean(1) for stretch in stretches], axis=1))
    return torch.tensor(np.abs(spectra[0] - spectra[1]).mean(), dtype=torch.float32)


def test_the_energy_distance_is_lower_for_two_different_samples_of_the_target_distribution(
    tmp_path,
):
    """The target is noise. By the mean error alone, twice the same noise would be as good."""
    loss = MelLoss(toy_config(tmp_path, FRAME_RATE))
    wav, first, second = (torch.randn(4, 40 * 256) for _ in range(3))
    pairs = (first, wav), (second, wav), (first, second)
    mel_errors = [loss(*pair) for pair in pairs]
    assert max(mel_errors) < 1.05 * min(mel_errors)
    errors = [loss(*pair) + averaged_bins_distance(*pair) for pair in pairs]
    distance = loss.energy_distance(torch.stack([first, second]), wav)
    expected = errors[0] + errors[1] - REPULSION * errors[2]
    torch.testing.assert_close(distance, expected / 2)
    assert loss.energy_distance(torch.stack([first, first]), wav) > 1.3 * distance


def test_the_energy_distance_detects_a_comb_that_mel_bands_hide(tmp_path):
    """An echo after one hop raises and lowers every fourth bin; wide bands keep their levels."""
    loss = MelLoss(toy_config(tmp_path, FRAME_RATE))
    wav, first, second = (torch.randn(4, 17000) for _ in range(3))
    echo = torch.stack([x[:, 256:] + 0.7 * x[:, :-256] for x in (first, second)])
    samples, wav = torch.stack([first, second])[:, :, 256:], wav[:, 256:]
    echo = echo * samples.std() / echo.std()
    assert loss(echo[0], wav) < 1.06 * loss(samples[0], wav)
    assert loss.energy_distance(echo, wav) > 1.15 * loss.energy_distance(samples, wav)


def test_a_frame_rate_update_compares_two_samples_of_the_generator(tmp_path):
    h = toy_config(tmp_path, FRAME_RATE, batch_size=2)
    state = build_state(h, torch.device("cpu"))
    wav = torch.from_numpy(speech_like(0.2)).float()[: 2 * h.segment_size].view(2, 1, -1)
    mel = LogMelSpectrogram(h, h.fmax)(wav[:, 0])
    samples = state.generator(mel.repeat(2, 1, 1))  # in training, the states follow from the mels
    expected = state.mel_loss.energy_distance(samples.view(2, 2, -1), wav[:, 0])
    losses = training_step(state, mel, wav)
    torch.testing.assert_close(losses["gen_loss_energy"], expected.detach())


# ----------------------------------------------------------------------------- F0 and aperiodicity


def test_source_losses_are_zero_for_the_measurements_and_weighted_by_periodicity(tmp_path):
    h = toy_config(tmp_path, FRAME_RATE)
    wav = harmonics(h, np.full(40, math.log(180)))
    wav[:, 20 * 256 :] = 0.05 * torch.randn(1, 20 * 256)
    loss, (log_f0, periodicity, aperiodicity) = SourceLoss(h), PitchEstimator(h)(wav)
    assert [float(x) for x in loss(log_f0, aperiodicity, wav)] == [0, 0]
    weight = (periodicity - 0.5).clamp(min=0)[:, EDGE:-EDGE]
    offset = torch.where(torch.arange(40) < 20, 0.1, 0.7)
    expected = float((weight * offset[EDGE:-EDGE]).sum() / weight.sum())
    f0_loss, aperiodicity_loss = loss(log_f0 + offset, aperiodicity + 0.25, wav)
    assert float(f0_loss) == pytest.approx(expected, rel=1e-4)
    assert expected < 0.15  # the second half is hardly periodic
    assert float(aperiodicity_loss) == pytest.approx(0.25, rel=1e-4)
    log_f0[:, :EDGE] += 1
    assert float(loss(log_f0, aperiodicity, wav)[0]) == 0


def test_f0_and_aperiodicity_learn_from_their_losses_only(tmp_path):
    h = toy_config(tmp_path, FRAME_RATE)
    generator = Generator(h)
    wav = torch.from_numpy(speech_like(0.3)).float()[None, :5120]
    mel = LogMelSpectrogram(h, h.fmax)(wav)
    x = generator.features(mel)
    wav_hat, sources = generator.head(x, mel), generator.head.f0_aperiodicity(x)

    def gradients(loss: torch.Tensor) -> list[bool]:
        """Returns whether correction, aperiodicity, F0 and conditioning have a gradient."""
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        return [bool(part.any()) for part in gradient.split(generator.head.splits, dim=1)]

    f0_loss, aperiodicity_loss = SourceLoss(h)(*sources, wav)
    assert gradients(wav_hat.square().mean()) == [True, False, False, True]
    assert gradients(aperiodicity_loss) == [False, True, False, False]
    assert gradients(f0_loss) == [False, False, True, False]
    (wav_hat.square().sum() + f0_loss + aperiodicity_loss).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in generator.parameters())
