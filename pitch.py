"""F0 and aperiodicity of recordings, which the frame-rate generators learn to predict.

    wav [B, N] -> PitchEstimator -> log_f0 [B, T], periodicity [B, T], aperiodicity [B, T, bins]

Frame t is centred on samples t * hop_size to (t + 1) * hop_size, as in LogMelSpectrogram.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from env import Config

F0_RANGE = (60.0, 500.0)  # Hz; covers speech
CORRELATION_PERIODS = 4  # of the lowest F0: length of the segments that are correlated
OCTAVE_COST = 0.03  # per octave below F0_RANGE[1]; two periods correlate as well as one
BANDWIDTH = 600.0  # Hz; half the width of the triangle that smooths power spectra
EPSILON = 1e-7  # power


class PitchEstimator(nn.Module):
    """Estimates log F0, periodicity and aperiodicity of wav [B, N], for T = N // hop_size frames.

    Returns (log_f0 [B, T] in log Hz, periodicity [B, T] from 0 to 1, aperiodicity [B, T, bins] from
    0 to 1). F0 is the lag that maximises the normalised cross-correlation; the maximum is the
    periodicity. The aperiodicity of a bin is one minus the correlation at that lag of the band
    around the bin, squared because a gliding F0 lowers the correlation of a periodic signal.

    Source: Talkin, "A robust algorithm for pitch tracking", 1995, without its dynamic programming.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.sampling_rate, self.n_fft, self.hop_size = h.sampling_rate, h.n_fft, h.hop_size
        self.min_lag = math.floor(h.sampling_rate / F0_RANGE[1])
        self.max_lag = math.ceil(h.sampling_rate / F0_RANGE[0]) + 1
        # A multiple of n_fft, so that every bin of the generator's STFT is a bin of this spectrum.
        self.window_size = h.n_fft * math.ceil(2 * self.max_lag / h.n_fft)
        window = torch.hann_window(self.window_size)
        correlation = torch.fft.irfft(_power(window, 2 * self.window_size))[: self.window_size]
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("window_correlation", correlation / correlation[0], persistent=False)

    @torch.no_grad()
    def forward(self, wav: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wav = wav.float()
        lag, periodicity = self.lag(wav)
        return (self.sampling_rate / lag).log(), periodicity, self.aperiodicity(wav, lag)

    def lag(self, wav: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the period in samples and the periodicity of each frame of wav [B, N]: [B, T]."""
        size = CORRELATION_PERIODS * self.max_lag
        frames = self._frames(wav, size + self.max_lag)
        frames = frames - frames.mean(-1, keepdim=True)
        n_fft = 2 ** math.ceil(math.log2(frames.shape[-1]))
        spectrum = torch.fft.rfft(frames, n=n_fft)
        start = torch.fft.rfft(frames[..., :size], n=n_fft)
        products = torch.fft.irfft(start.conj() * spectrum, n=n_fft)
        energy = F.pad(frames.square().cumsum(-1), (1, 0))
        lags = torch.arange(self.min_lag, self.max_lag + 1, device=wav.device)
        shifted = energy[..., lags + size] - energy[..., lags]
        correlation = products[..., lags] / (energy[..., size, None] * shifted + EPSILON).sqrt()
        cost = OCTAVE_COST * (lags / self.min_lag).log2()
        best = (correlation - cost)[..., 1:-1].argmax(-1, keepdim=True) + 1
        # A parabola through the maximum and its neighbours.
        before, peak, after = (correlation.gather(-1, best + i) for i in (-1, 0, 1))
        curvature = (before - 2 * peak + after).clamp(max=-1e-6)
        lag = lags[best] + (0.5 * (before - after) / curvature).clamp(-0.5, 0.5)
        return lag.squeeze(-1), peak.squeeze(-1).clamp(0, 1)

    def aperiodicity(self, wav: torch.Tensor, lag: torch.Tensor) -> torch.Tensor:
        """Returns the aperiodicity [B, T, bins] of wav [B, N], given its periods [B, T]."""
        n_fft = 2 * self.window_size
        power = _power(self._frames(wav, self.window_size) * self.window, n_fft)
        bins = torch.arange(power.shape[-1], device=wav.device)
        # The power spectrum times this cosine, summed, is the autocorrelation at `lag`.
        cosine = torch.cos(2 * math.pi / n_fft * bins * lag.unsqueeze(-1))
        width = round(BANDWIDTH * n_fft / self.sampling_rate)
        at_lag, total = _smooth(power * cosine, width), _smooth(power, width)
        # The window lowers the correlation of even an exactly periodic signal: compensate for it.
        floor = lag.long()
        of_window = torch.lerp(
            self.window_correlation[floor], self.window_correlation[floor + 1], lag - floor
        )
        correlation = (at_lag / (total + EPSILON) / of_window.unsqueeze(-1)).clamp(0, 1)
        return (1 - correlation[..., :: n_fft // self.n_fft]).square()

    def _frames(self, wav: torch.Tensor, size: int) -> torch.Tensor:
        """Cuts wav [B, N] into frames [B, T, size], zero-padded at both ends."""
        count, before = wav.shape[1] // self.hop_size, (size - self.hop_size) // 2
        return F.pad(wav, (before, size)).unfold(1, size, self.hop_size)[:, :count]


def _power(x: torch.Tensor, n_fft: int) -> torch.Tensor:
    spectrum = torch.fft.rfft(x, n=n_fft)
    return spectrum.real.square() + spectrum.imag.square()


def _smooth(x: torch.Tensor, width: int) -> torch.Tensor:
    """Averages spectra [B, T, bins] over a triangle of 2 * width bins, mirrored at both ends.

    With a rectangle, the result would depend on the number of harmonics in it.
    """
    padded = F.pad(x.double(), (width, width), mode="reflect")
    for _ in range(2):
        sums = F.pad(padded.cumsum(-1), (1, 0))
        padded = (sums[..., width:] - sums[..., :-width]) / width
    return padded[..., 1 : x.shape[-1] + 1].float()
