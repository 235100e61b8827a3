"""All losses but distillation's."""

import torch
import torch.nn.functional as F
from torch import nn

from env import Config
from meldataset import LogMelSpectrogram, MelRecipe
from pitch import PitchEstimator, Voice
from weights import at_least_fp32

LASTING = 16  # frames over which bins are averaged in an energy distance
REPULSION = 0.5  # of two draws; 1 makes more noise than one likes to hear
VOICED = 0.5  # the periodicity from which the pitch of a frame counts, the more the higher
EDGE = 4  # frames at either end of a segment, whose windows reach beyond it


def discriminator_loss(real_scores: list, fake_scores: list) -> torch.Tensor:
    """LSGAN: real scores to 1, fake ones to 0; summed over the discriminators (HiFi-GAN, eq. 1).

    Takes a score [B, S] of each discriminator; gives a scalar.
    """
    return sum(
        (1 - at_least_fp32(real)).square().mean() + at_least_fp32(fake).square().mean()
        for real, fake in zip(real_scores, fake_scores, strict=True)
    )


def generator_loss(fake_scores: list) -> torch.Tensor:
    """LSGAN: fake scores to 1; summed over the discriminators (HiFi-GAN, eq. 2).

    Takes a score [B, S] of each discriminator; gives a scalar.
    """
    return sum((1 - at_least_fp32(fake)).square().mean() for fake in fake_scores)


def feature_loss(real_features: list, fake_features: list) -> torch.Tensor:
    """Mean L1 distance of each feature, summed over layers and discriminators (HiFi-GAN, eq. 4).

    Takes, of each discriminator, the list of its features: [B, C, S] of a scale, [B, C, S, period]
    of a period. Gives a scalar, which the caller weights.
    """
    return sum(
        F.l1_loss(at_least_fp32(fake), at_least_fp32(real))
        for reals, fakes in zip(real_features, fake_features, strict=True)
        for real, fake in zip(reals, fakes, strict=True)
    )


class MelLoss(nn.Module):
    """The mean distance of log-mels, (wav_hat [B, N], wav [B, N]) -> scalar.

    HiFi-GAN's (eq. 3) by default. With `n_ffts_for_loss`, the mean over mels of those windows, a
    quarter of one apart. Long windows resolve the harmonics of a voice, so that a generator learns
    its pitch without adversaries too; with the one mel alone it hums at the rate of the frames.

    A generator to which chance belongs has an energy distance, over two draws: by a plain distance
    it would learn the average of all that may be, which has no noise. There, bins are compared too,
    each averaged over LASTING frames: bands hide how a level is shared out among the bins within,
    single frames are all chance.

    Source: Yamamoto et al., "Parallel WaveGAN", section 2.2, for several resolutions; Gritsenko et
    al., "A Spectral Energy Distance for Parallel Speech Synthesis", NeurIPS 2020.
    """

    def __init__(self, h: Config):
        super().__init__()
        # HiFi-GAN's name is for HiFi-GAN's error, which validation shows in any case.
        self.name = "mel_spec_error" if h.n_ffts_for_loss is None else "gen_loss_mel"
        recipes = [h]
        if h.n_ffts_for_loss is not None:
            recipes = [
                MelRecipe(h.sampling_rate, h.fmin, n_fft, n_fft // 4, n_fft, num_mels)
                for n_fft, num_mels in zip(h.n_ffts_for_loss, h.num_mels_for_loss, strict=True)
            ]
        self.log_mels = nn.ModuleList(LogMelSpectrogram(r, h.fmax_for_loss) for r in recipes)
        self.log_mel = LogMelSpectrogram(h, h.fmax)  # the generator's, of which the bins are

    def forward(self, wav_hat: torch.Tensor, wav: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            mels = self._mels(wav)
        return _mean_distance(self._mels(wav_hat), mels)

    def energy_distance(self, draws: torch.Tensor, wav: torch.Tensor) -> torch.Tensor:
        """Two draws [2, B, N] of what may sound as wav [B, N] does -> scalar.

        The mean distance of a draw to wav, less REPULSION times half of that between the draws:
        of mels, and of bins over LASTING frames. With a REPULSION of 1, draws would come to differ
        from each other as from recordings.
        """
        of_mels = _energy_distance(*(self._mels(x) for x in (*draws, wav)))
        return of_mels + _energy_distance(*([self._lasting(x)] for x in (*draws, wav)))

    def _lasting(self, wav: torch.Tensor) -> torch.Tensor:
        """wav [B, N] -> log magnitudes of bins, [B, bins, ceil(N // hop_size / LASTING)]."""
        bins = self.log_mel.of_bins(wav)
        return F.avg_pool1d(bins, LASTING, ceil_mode=True)  # at the end, what is there

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
    """How far a Voice is from that of the recording [B, N]: a scalar.

    The mean distance of log_f0, in frames that are voiced the more the clearer they are, and that
    of noise. The ends of segments do not count, where there are other frames.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.meter = PitchEstimator(h)

    def forward(self, voice: Voice, wav: torch.Tensor) -> torch.Tensor:
        log_f0, periodicity, noise = self.meter(wav)
        frames = log_f0.shape[1]
        inner = slice(EDGE, frames - EDGE) if frames > 2 * EDGE else slice(None)
        weight = (periodicity - VOICED).clamp(min=0)[:, inner]
        distance = (voice.log_f0.float() - log_f0).abs()[:, inner]
        pitch = (weight * distance).sum() / weight.sum().clamp(min=1)
        return pitch + F.l1_loss(voice.noise[:, inner], noise[:, inner])
