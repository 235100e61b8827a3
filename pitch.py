"""The voice in speech: its pitch and what of it is noise, measured, for a generator to learn.

    wav [B, N] -> PitchEstimator -> (log_f0 [B, T], periodicity [B, T], noise [B, T, bins])

Frame t is centred on samples t * hop_size to (t + 1) * hop_size, as in LogMelSpectrogram.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from env import Config

F0_RANGE = (60.0, 500.0)  # Hz, of speech
F0_PERIODS = 4  # of the lowest pitch, over which periods are compared
OCTAVE_COST = 0.03  # of each octave below the highest pitch, for two periods fit as well as one
BAND = 600.0  # Hz, half of the width over which noise is averaged
TINY = 1e-7  # power


class Voice(NamedTuple):
    """What a generator hears in a mel [B, num_mels, T]."""

    log_f0: torch.Tensor  # [B, T], float64, natural logarithm of Hz, in unvoiced frames too
    noise: torch.Tensor  # [B, T, bins], share of the amplitude that is noise, 0 to 1
    cycles: torch.Tensor  # [B, T], float64, of the pulses up to the start of each frame


class PitchEstimator(nn.Module):
    """wav [B, N] -> log_f0 [B, T], periodicity [B, T] and noise [B, T, bins], T = N // hop_size.

    The pitch is the lag at which a frame is most like itself, by normalised cross-correlation; the
    periodicity, 0 to 1, is how like. A bin's noise is the share of a band around it that does not
    repeat at that lag, squared, for a gliding pitch looks like noise.

    Source: Talkin, "A robust algorithm for pitch tracking", 1995, without its dynamic programming.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.sampling_rate, self.n_fft, self.hop_size = h.sampling_rate, h.n_fft, h.hop_size
        self.shortest = math.floor(h.sampling_rate / F0_RANGE[1])
        self.longest = math.ceil(h.sampling_rate / F0_RANGE[0]) + 1
        # A window of whole n_ffts, so that its spectrum has the generator's bins among its own.
        self.window_size = h.n_fft * math.ceil(2 * self.longest / h.n_fft)
        window = torch.hann_window(self.window_size)
        similarity = torch.fft.irfft(_power(window, 2 * self.window_size))[: self.window_size]
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("similarity", similarity / similarity[0], persistent=False)

    @torch.no_grad()
    def forward(self, wav: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lag, periodicity = self.pitch(wav.float())
        return (self.sampling_rate / lag).log(), periodicity, self.noise(wav.float(), lag)

    def pitch(self, wav: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """wav [B, N] -> the period of each frame, in samples, and its periodicity, both [B, T]."""
        compared = F0_PERIODS * self.longest
        frames = self._frames(wav, compared + self.longest)
        frames = frames - frames.mean(-1, keepdim=True)
        n_fft = 2 ** math.ceil(math.log2(frames.shape[-1]))
        spectrum = torch.fft.rfft(frames, n=n_fft)
        start = torch.fft.rfft(frames[..., :compared], n=n_fft)
        products = torch.fft.irfft(start.conj() * spectrum, n=n_fft)
        energy = F.pad(frames.square().cumsum(-1), (1, 0))
        lags = torch.arange(self.shortest, self.longest + 1, device=wav.device)
        shifted = energy[..., lags + compared] - energy[..., lags]
        likeness = products[..., lags] / (energy[..., compared, None] * shifted + TINY).sqrt()
        cost = OCTAVE_COST * (lags / self.shortest).log2()
        best = (likeness - cost)[..., 1:-1].argmax(-1, keepdim=True) + 1
        before, peak, after = (likeness.gather(-1, best + i) for i in (-1, 0, 1))
        curvature = (before - 2 * peak + after).clamp(max=-1e-6)
        lag = lags[best] + (0.5 * (before - after) / curvature).clamp(-0.5, 0.5)
        return lag.squeeze(-1), peak.squeeze(-1).clamp(0, 1)

    def noise(self, wav: torch.Tensor, lag: torch.Tensor) -> torch.Tensor:
        """wav [B, N], its periods [B, T] in samples -> the share of noise, [B, T, bins]."""
        n_fft = 2 * self.window_size
        power = _power(self._frames(wav, self.window_size) * self.window, n_fft)
        bins = torch.arange(power.shape[-1], device=wav.device)
        turns = torch.cos(2 * math.pi / n_fft * bins * lag.unsqueeze(-1))
        width = round(BAND * n_fft / self.sampling_rate)
        repeated, whole = _smooth(power * turns, width), _smooth(power, width)
        # What is exactly periodic is at that lag as like itself as the window.
        whole_lag = lag.long()
        similarity = torch.lerp(
            self.similarity[whole_lag], self.similarity[whole_lag + 1], lag - whole_lag
        )
        periodic = (repeated / (whole + TINY) / similarity.unsqueeze(-1)).clamp(0, 1)
        return (1 - periodic[..., :: n_fft // self.n_fft]).square()

    def _frames(self, wav: torch.Tensor, size: int) -> torch.Tensor:
        """wav [B, N] -> [B, T, size], silence around it."""
        count, before = wav.shape[1] // self.hop_size, (size - self.hop_size) // 2
        return F.pad(wav, (before, size)).unfold(1, size, self.hop_size)[:, :count]


def _power(x: torch.Tensor, n_fft: int) -> torch.Tensor:
    spectrum = torch.fft.rfft(x, n=n_fft)
    return spectrum.real.square() + spectrum.imag.square()


def _smooth(x: torch.Tensor, width: int) -> torch.Tensor:
    """A spectrum [B, T, bins], mirrored at both ends, averaged over a triangle of 2 * width bins.

    A plain mean would weigh the harmonics at its ends by chance.
    """
    around = F.pad(x.double(), (width, width), mode="reflect")
    for _ in range(2):
        sums = F.pad(around.cumsum(-1), (1, 0))
        around = (sums[..., width:] - sums[..., :-width]) / width
    return around[..., 1 : x.shape[-1] + 1].float()
