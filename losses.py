"""All losses but distillation's, and their declarations.

To add a loss: declare it in LOSSES, add its weight to Config, compute it in train.py. The
declaration gives its printed name and its weight, and lets a resumed run change that weight.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from env import Config
from meldataset import LogMelSpectrogram, MelRecipe, hifigan_recipe
from pitch import PitchEstimator
from weights import at_least_fp32


class Loss(NamedTuple):
    """The declaration of a loss."""

    name: str  # key in the losses of an update; TensorBoard's tag is training/<name>
    printed: str | None = None  # name on the terminal; None: only TensorBoard has it
    weight: str | None = None  # key of its weight in the config; None: the weight is 1


LOSSES = (
    Loss("gen_loss_total", "Gen Loss Total"),
    Loss("disc_loss_total", "Disc Loss Total"),
    Loss("mel_spec_error", "Mel-Spec. Error", weight="lambda_mel"),
    Loss("gen_loss_mel", "Mel Loss", weight="lambda_mel"),  # with several resolutions
    Loss("gen_loss_energy", "Energy Distance", weight="lambda_mel"),
    Loss("gen_loss_f0", "F0", weight="lambda_f0"),
    Loss("gen_loss_aperiodicity", "Aperiodicity", weight="lambda_aperiodicity"),
    Loss("gen_loss_adversarial"),
    Loss("gen_loss_feature", weight="lambda_feature"),
)
WEIGHTS = {loss.name: loss.weight for loss in LOSSES}

SMOOTHED_FRAMES = 16  # over which the energy distance averages each bin
REPULSION = 0.5  # weight of the distance between two samples; 1 makes the speech too noisy
VOICED = 0.5  # periodicity above which the F0 of a frame counts
EDGE = 4  # frames at either end of a segment whose windows reach beyond it


def weighted_sum(losses: dict[str, torch.Tensor], h: Config) -> torch.Tensor:
    """Returns the sum of declared losses, scalars, each times its weight in the config."""
    return sum(
        loss if WEIGHTS[name] is None else getattr(h, WEIGHTS[name]) * loss
        for name, loss in losses.items()
    )


def discriminator_loss(
    real_scores: list[torch.Tensor], fake_scores: list[torch.Tensor]
) -> torch.Tensor:
    """Returns the LSGAN loss that pulls real scores to 1 and fake ones to 0 (HiFi-GAN, eq. 1).

    Takes one score [B, S] of each discriminator and sums over the discriminators.
    """
    return sum(
        (1 - at_least_fp32(real)).square().mean() + at_least_fp32(fake).square().mean()
        for real, fake in zip(real_scores, fake_scores, strict=True)
    )


def generator_loss(fake_scores: list[torch.Tensor]) -> torch.Tensor:
    """Returns the LSGAN loss that pulls fake scores [B, S] to 1, summed (HiFi-GAN, eq. 2)."""
    return sum((1 - at_least_fp32(fake)).square().mean() for fake in fake_scores)


def feature_loss(
    real_features: list[list[torch.Tensor]], fake_features: list[list[torch.Tensor]]
) -> torch.Tensor:
    """Returns the mean L1 distance of each feature, summed over layers (HiFi-GAN, eq. 4).

    Takes the list of features of each discriminator: [B, C, S] of a scale discriminator,
    [B, C, S, period] of a period discriminator.
    """
    return sum(
        F.l1_loss(at_least_fp32(fake), at_least_fp32(real))
        for reals, fakes in zip(real_features, fake_features, strict=True)
        for real, fake in zip(reals, fakes, strict=True)
    )


class MelLoss(nn.Module):
    """The L1 distance of log-mels, (wav_hat [B, N], wav [B, N]) -> scalar.

    By default it is HiFi-GAN's (eq. 3). With `n_ffts_for_loss` it is the mean over mels of several
    window lengths, each with a hop of a quarter window. Long windows resolve harmonics, so that a
    generator learns F0 without discriminators. HiFi-GAN's single mel leaves a hum at the frame
    rate.

    A generator with a random source is trained by an energy distance of two samples. A plain
    distance would train it to output the average of all plausible spectra, which has no noise. The
    energy distance also compares STFT bins, averaged over SMOOTHED_FRAMES frames: mel bands hide
    how a level is distributed over the bins of a band, and single frames are random.

    Source: Yamamoto et al., "Parallel WaveGAN", section 2.2, for several resolutions; Gritsenko et
    al., "A Spectral Energy Distance for Parallel Speech Synthesis", NeurIPS 2020.
    """

    def __init__(self, h: Config):
        super().__init__()
        # HiFi-GAN's name is kept for HiFi-GAN's loss.
        self.name = "mel_spec_error" if h.n_ffts_for_loss is None else "gen_loss_mel"
        recipes = [hifigan_recipe(h)]
        if h.n_ffts_for_loss is not None:
            recipes = [
                MelRecipe(h.sampling_rate, h.fmin, n_fft, n_fft // 4, n_fft, num_mels)
                for n_fft, num_mels in zip(h.n_ffts_for_loss, h.num_mels_for_loss, strict=True)
            ]
        self.log_mels = nn.ModuleList(LogMelSpectrogram(r, h.fmax_for_loss) for r in recipes)
        # For the bins of the generator's STFT.
        self.log_mel = LogMelSpectrogram(hifigan_recipe(h), h.fmax)

    def forward(self, wav_hat: torch.Tensor, wav: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            mels = self._mels(wav)
        return _mean_distance(self._mels(wav_hat), mels)

    def energy_distance(self, samples: torch.Tensor, wav: torch.Tensor) -> torch.Tensor:
        """Returns the energy distance of two generated samples [2, B, N] and wav [B, N], a scalar.

        It is the mean distance of the samples to wav, minus REPULSION times half the distance
        between the samples, of mels plus of averaged bins.
        """
        of_mels = _energy_distance(*(self._mels(x) for x in (*samples, wav)))
        return of_mels + _energy_distance(*([self._averaged_bins(x)] for x in (*samples, wav)))

    def _averaged_bins(self, wav: torch.Tensor) -> torch.Tensor:
        """wav [B, N] -> log magnitudes, [B, bins, ceil(N // hop_size / SMOOTHED_FRAMES)]."""
        bins = self.log_mel.of_bins(wav)
        return F.avg_pool1d(bins, SMOOTHED_FRAMES, ceil_mode=True)

    def _mels(self, wav: torch.Tensor) -> list[torch.Tensor]:
        return [log_mel(wav) for log_mel in self.log_mels]


def _mean_distance(mels: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
    return sum(map(F.l1_loss, mels, others)) / len(mels)


def _energy_distance(
    first: list[torch.Tensor], second: list[torch.Tensor], real: list[torch.Tensor]
) -> torch.Tensor:
    to_real = _mean_distance(first, real) + _mean_distance(second, real)
    return (to_real - REPULSION * _mean_distance(first, second)) / 2


class SourceLoss(nn.Module):
    """The F0 loss and the aperiodicity loss, both scalars.

    (log_f0 [B, T], aperiodicity [B, T, bins], wav [B, N]) -> (L1 distance of log F0, weighted by
    how periodic a frame of wav is; L1 distance of aperiodicity). The targets are measured in wav.
    EDGE frames at the ends of a segment are left out where others remain.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.estimator = PitchEstimator(h)

    def forward(
        self, log_f0: torch.Tensor, aperiodicity: torch.Tensor, wav: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        target_f0, periodicity, target_aperiodicity = self.estimator(wav)
        T = target_f0.shape[1]
        inner = slice(EDGE, T - EDGE) if T > 2 * EDGE else slice(None)
        weight = (periodicity - VOICED).clamp(min=0)[:, inner]
        distance = (log_f0.float() - target_f0).abs()[:, inner]
        f0_loss = (weight * distance).sum() / weight.sum().clamp(min=1)
        return f0_loss, F.l1_loss(aperiodicity[:, inner], target_aperiodicity[:, inner])


class GeneratorWithSource(nn.Module):
    """A frame-rate generator that also returns log F0 and aperiodicity, for SourceLoss.

    mel [B, num_mels, T] -> (wav_hat [B, 1, N], log_f0 [B, T], aperiodicity [B, T, bins])
    """

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.generator.features(mel)
        return self.generator.head(x, mel), *self.generator.head.f0_aperiodicity(x)
