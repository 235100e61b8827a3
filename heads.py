"""What makes a waveform of a generator's last channels where they are spectra."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from env import Config
from meldataset import LogMelSpectrogram

MIN_PRIOR = 1e-4  # magnitude; a pseudo-inverse has negative values
MIN_WINDOW = 1e-3  # sum of squared windows, near the ends
MIN_POWER = 1e-10


class InverseSTFT(nn.Module):
    """Log magnitudes and phases [B, n_fft + 2, F] -> waveform [B, 1, (F - 1) * hop_size].

    The upper half of the channels becomes angles by a sine, as in the public ports; pi times the
    sine, which could reach every angle, learnt no faster (one pair of runs of 600 updates). Equals
    torch.istft (centred, periodic Hann window) in a form that ONNX has: a fixed transposed
    convolution, divided by the sum of the squared windows that are really there. (On GPUs in TF32,
    where other convolutions are, too.)

    Source: Kaneko et al., "iSTFTNet", ICASSP 2022.
    """

    def __init__(self, n_fft: int, hop_size: int):
        super().__init__()
        self.n_fft, self.hop_size, self.in_channels = n_fft, hop_size, n_fft + 2
        # No waveform in [-1, 1] has a magnitude above the window's sum, n_fft / 2. Eight times as
        # much never bends speech, and keeps early training from overflowing.
        self.max_log_magnitude = math.log(4 * n_fft)
        window = torch.hann_window(n_fft, dtype=torch.float64)
        bins = torch.eye(n_fft // 2 + 1, dtype=torch.complex128)
        basis = torch.fft.irfft(torch.cat([bins, 1j * bins]), n=n_fft) * window
        self.register_buffer("basis", basis.unsqueeze(1).float(), persistent=False)
        self.register_buffer(
            "squared_window", window.square()[None, None].float(), persistent=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        log_magnitude, phase = x.chunk(2, dim=1)
        magnitude, angle = log_magnitude.clamp(max=self.max_log_magnitude).exp(), phase.sin()
        spectrum = torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=1)
        return self._overlap_add(spectrum, self.basis) / self._overlap_add(
            torch.ones_like(x[:1, :1]), self.squared_window
        )

    def _overlap_add(self, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose1d(x, frames, stride=self.hop_size, padding=self.n_fft // 2)


class ConsistentSTFT(nn.Module):
    """Spectra at the mel's own rate -> waveform: [B, 3 * bins, T], mel -> [B, 1, T * hop_size].

    Of the channels, a third is the log magnitude on top of what the mel already says, which is the
    pseudo-inverse of its filterbank; the others are a vector whose direction is the phase. Such a
    spectrogram is none of any waveform, so the inverse STFT is followed by `consistency_steps`,
    through which one trains: STFT, keep the phase, put the magnitude back, inverse STFT, with a
    learnt momentum. STFT and inverse are those of LogMelSpectrogram: frame t is centred on samples
    t * hop_size to (t + 1) * hop_size.

    Source: Griffin-Lim with momentum (Perraudin et al. 2013), unrolled as in Masuyama et al., "Deep
    Griffin-Lim iteration", 2019.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.n_fft, self.hop_size, self.steps = h.n_fft, h.hop_size, h.consistency_steps
        bins = h.n_fft // 2 + 1
        self.in_channels = 3 * bins
        log_mel = LogMelSpectrogram(h, h.fmax)
        window = F.pad(log_mel.window, ((h.n_fft - h.win_size) // 2,) * 2)
        window = F.pad(window, (0, h.n_fft - len(window)))
        self.momentum = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mel_inverse", torch.linalg.pinv(log_mel.filterbank), persistent=False)
        self.register_buffer("window", window, persistent=False)
        self.overlap = -(-h.n_fft // h.hop_size) - 1  # frames before that a frame overlaps with
        # The two transforms as matrices, real and imaginary parts in turns.
        samples, real = torch.eye(h.n_fft).double(), torch.eye(bins, dtype=torch.complex128)
        fourier = torch.view_as_real(torch.fft.rfft(samples)).flatten(1)
        inverse = torch.fft.irfft(torch.stack([real, 1j * real], dim=1).flatten(0, 1), n=h.n_fft)
        self.register_buffer("fourier", fourier.float(), persistent=False)
        self.register_buffer("inverse_fourier", inverse.float(), persistent=False)

    @property
    def reach(self) -> int:
        """How many frames before, and after, its own frame a sample hears."""
        return (self.n_fft + self.hop_size) // (2 * self.hop_size) + self.steps * self.overlap

    def forward(self, x: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
        log_magnitude, *phase = x.transpose(1, 2).chunk(3, dim=2)  # [B, T, bins], as FFTs like it
        prior = (mel.to(x.dtype).exp().transpose(1, 2) @ self.mel_inverse.T).clamp(min=MIN_PRIOR)
        magnitude = (prior.log() + log_magnitude).clamp(max=math.log(self.n_fft)).exp()
        squares = self.window.square().expand(1, x.shape[2], -1)
        weights = self._overlap_add(squares).clamp(min=MIN_WINDOW).reciprocal()
        before = direction = torch.stack(phase, dim=3)  # [B, T, bins, 2], real and imaginary
        for step in range(self.steps + 1):
            wav = self._istft(_with_magnitude(direction, magnitude)) * weights
            if step < self.steps:
                spectrum = self._stft(wav)
                momentum = self.momentum if step > 0 else 0.0
                direction = spectrum + momentum * (spectrum - before)
                before = spectrum
        edge, samples = (self.n_fft - self.hop_size) // 2, mel.shape[2] * self.hop_size
        return wav[:, None, edge : edge + samples]

    def _stft(self, wav: torch.Tensor) -> torch.Tensor:
        """[B, (T + overlap) * hop_size] -> [B, T, bins, 2]."""
        hops = wav.unflatten(1, (-1, self.hop_size))
        frames = hops.shape[1] - self.overlap
        shifted = [hops[:, k : k + frames] for k in range(self.overlap + 1)]
        windowed = torch.cat(shifted, dim=2)[:, :, : self.n_fft] * self.window
        if torch.compiler.is_exporting():  # ONNX has no fast Fourier transform worth its name
            return (windowed @ self.fourier).unflatten(2, (-1, 2))
        return torch.view_as_real(torch.fft.rfft(windowed))

    def _istft(self, spectrum: torch.Tensor) -> torch.Tensor:
        """[B, T, bins, 2] -> [B, (T + overlap) * hop_size], times the squared windows."""
        if torch.compiler.is_exporting():
            frames = spectrum.flatten(2) @ self.inverse_fourier
        else:
            frames = torch.fft.irfft(torch.complex(*spectrum.unbind(3)), n=self.n_fft)
        return self._overlap_add(frames * self.window)

    def _overlap_add(self, frames: torch.Tensor) -> torch.Tensor:
        """[B, T, n_fft] -> [B, (T + overlap) * hop_size]: the sum of the frames' hops, shifted."""
        hops = F.pad(frames, (0, -self.n_fft % self.hop_size)).unflatten(2, (-1, self.hop_size))
        shifts = range(self.overlap + 1)
        return sum(F.pad(hops[:, :, k], (0, 0, k, self.overlap - k)) for k in shifts).flatten(1)


def _with_magnitude(x: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Complex numbers [..., 2] of the directions of x [..., 2] and of a magnitude [...]."""
    scale = magnitude * (x.square().sum(-1) + MIN_POWER).rsqrt()
    return x * scale.unsqueeze(-1)
