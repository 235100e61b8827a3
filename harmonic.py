"""Heads that make a waveform of a generator's last channels, read as spectra."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from env import Config
from meldataset import MIN_MAGNITUDE, LogMelSpectrogram
from pitch import F0_RANGE, Voice

PITCHES = 64  # between which a pitch lies, weighed by a softmax
NOISE_FRAMES = 2048  # of noise, which then comes again
NOISE_SEED = 0
LOWEST = 1000.0  # Hz, below which the noise says how voiced a frame is
# The bell by which noise comes with the pulses of a voice: how narrow, and its root mean square.
BELL = 2.0
BELL_SIZE = math.exp(-BELL) * math.sqrt(float(torch.i0(torch.tensor(2 * BELL))))
MOMENTUM = 0.99  # of the consistency steps
TRAINED_STEPS = 8  # of them, at most, while one trains
SOFTNESS = 0.08  # the share of the power asked for in the power that a direction is divided by
PATCH_BINS = 4  # bins, which the refiner sees as one
COND_CHANNELS = 3  # of the blocks to the refiner, for each place
REFINER_DILATIONS = (1, 2, 4)  # along frequency
LOG_MAG_SCALE = 3.0  # a log magnitude that counts as 1
LRELU_SLOPE = 0.1  # as in all of HiFi-GAN but its last layer
MIN_WINDOW = 1e-3  # sum of squared windows, near the ends
MIN_SIZE = 1e-5  # of the numbers of a spectrum, for their directions


class ISTFTHead(nn.Module):
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
        _keep(self, "basis", basis.unsqueeze(1).float())
        _keep(self, "squared_window", window.square()[None, None].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        log_magnitude, phase = x.chunk(2, dim=1)
        magnitude, angle = log_magnitude.clamp(max=self.max_log_magnitude).exp(), phase.sin()
        spectrum = torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=1)
        return self._overlap_add(spectrum, self.basis) / self._overlap_add(
            torch.ones_like(x[:1, :1]), self.squared_window
        )

    def _overlap_add(self, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose1d(x, frames, stride=self.hop_size, padding=self.n_fft // 2)


class PhaseState(NamedTuple):
    """Where a piece of a mel lies in the whole, so that its pulses and its noise go on."""

    frame: int = 0  # which frame of the whole is the piece's first
    anchor: int = 0  # the frame of the piece at whose start
    cycles: float = 0.0  # the pulses have come so far


class Sources(NamedTuple):
    """What a HarmonicNoiseHead makes speech of: STFTs [B, T, bins, 2] of unit power, and their voice."""

    pulses: torch.Tensor
    noise: torch.Tensor
    voice: Voice


class HarmonicNoiseHead(nn.Module):
    """Pulses and noise, given the mel's spectrum: [B, channels, T], mel -> [B, 1, T * hop_size].

    The channels are, for each frame, a pitch, how much of each bin is noise, a correction of its
    magnitude, and hints for the refiner. A mel says little of phases, and those that are learnt by
    regression sound like a hum; but pulses at the right pitch, and noise, have phases like speech.
    In a voice, noise comes in bursts, one with each pulse. Their STFT is brought to the levels of
    the mel, band by band, corrected, and refined. What comes out is no STFT of any waveform, so the
    inverse is followed by `griffin_lim_steps`: STFT, keep the phase, put the magnitude back,
    inverse STFT, with momentum. One trains with the phases to which these lead, but not through the
    steps.

    Pitch and noise are learnt from what voice.py measures, and no other gradient reaches them: of
    two spectra with unlike phases, the noisier one is the nearer.

    Source: McAulay and Quatieri 1986, Griffin and Lim 1988 (multiband excitation) for pulses and
    noise; Stylianou 2001 for noise in bursts; Perraudin et al. 2013 for steps with momentum.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.stft, self.pulses, self.steps = STFT(h), Pulses(h), h.griffin_lim_steps
        bins = h.n_fft // 2 + 1
        self.refiner = Refiner(h)
        self.channels = (bins, bins, PITCHES, COND_CHANNELS * self.refiner.places)
        self.in_channels = sum(self.channels)
        self.max_log_magnitude = math.log(h.n_fft)  # which no window of [-1, 1] exceeds
        low, high = map(math.log, F0_RANGE)
        _keep(self, "pitches", torch.linspace(low, high, PITCHES, dtype=torch.float64))
        filterbank = LogMelSpectrogram(h, h.fmax).filterbank
        _keep(self, "filterbank", filterbank.T)
        _keep(self, "spread", _spread(filterbank))
        random = torch.Generator().manual_seed(NOISE_SEED)
        _keep(self, "noise", torch.randn(NOISE_FRAMES * h.hop_size, generator=random))
        self.lowest_bins = math.ceil(LOWEST / h.sampling_rate * h.n_fft)

    @property
    def reach(self) -> int:
        """How many frames before, and after, its own frame a sample hears."""
        n_fft, hop_size, edge = self.stft.n_fft, self.stft.hop_size, self.stft.edges[0]
        # The pulses that lie with a sample of frame 0 in a window, and the centres between which
        # their pitch lies.
        first = -((n_fft - 1 - edge) // hop_size) * hop_size - edge
        last = (hop_size - 1 + edge) // hop_size * hop_size - edge + n_fft - 1
        before, after = -((first - hop_size // 2) // hop_size), (last + hop_size // 2) // hop_size
        return max(before, after) + self.refiner.reach + self.steps * self.stft.overlap

    def forward(
        self, x: torch.Tensor, mel: torch.Tensor, origin: PhaseState
    ) -> tuple[torch.Tensor, Voice]:
        sources = self.sources(x, random_phase_state(mel) if self.training else origin)
        spectrum, log_magnitude = self.spectrum(x, mel, sources)
        with _in_full_precision(x):
            magnitude = log_magnitude.clamp(max=self.max_log_magnitude).exp()
            return self._consistent(spectrum, magnitude), sources.voice

    def voice(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of which voice x [B, in_channels, T] speaks: log_f0 [B, T], share of noise [B, T, bins].

        The pitch is in float64, for what rounding does to it adds up in the phase.
        """
        _, noise, pitch, _ = self._split(x)
        with _in_full_precision(x):
            return pitch.double().softmax(2) @ self.pitches, noise.sigmoid()

    def sources(self, x: torch.Tensor, origin: PhaseState) -> Sources:
        """Pulses and noise of the voice of which x [B, in_channels, T] speaks."""
        log_f0, share = self.voice(x)
        with _in_full_precision(x):
            pulses, turns, cycles = self.pulses(log_f0.detach(), origin, x.dtype)
            samples = torch.arange(pulses.shape[1], device=x.device) - self.stft.edges[0]
            samples = samples + origin.frame * self.stft.hop_size
            amplitude = self._bursts(turns, self.voiced(share.detach()))
            bursts = self.noise[samples % len(self.noise)] * amplitude
            return Sources(self.stft(pulses), self.stft(bursts), Voice(log_f0, share, cycles))

    def spectrum(
        self, x: torch.Tensor, mel: torch.Tensor, sources: Sources
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A spectrum [B, T, bins, 2], whose phases count, and log magnitudes for it, [B, T, bins].

        Pulses and noise by the voice's share of noise, at the levels of the mel [B, num_mels, T],
        corrected and refined as x [B, in_channels, T] asks for.
        """
        correction, _, _, hints = self._split(x)
        with _in_full_precision(x):
            pulses, noise, share = sources.pulses, sources.noise, sources.voice.noise.detach()
            spectrum = _times(pulses, (1 - share.square()).sqrt()) + _times(noise, share)
            size, mel = _size(spectrum), mel.to(x.dtype).transpose(1, 2)
            level = (size @ self.filterbank).clamp(min=MIN_MAGNITUDE).log()
            lift = (mel - level) @ self.spread
            log_magnitude = size.log() + lift + correction
            logs = log_magnitude.detach(), _size(pulses).log(), _size(noise).log(), lift
            views = [
                *(log / LOG_MAG_SCALE for log in logs),
                mel / LOG_MAG_SCALE @ self.spread,
                share,
            ]
        refinement = self.refiner(views, hints)
        return spectrum, log_magnitude + refinement.to(x.dtype)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Correction, noise, pitch and hints, each [B, T, channels], of x [B, channels, T]."""
        return x.transpose(1, 2).split(self.channels, dim=2)

    def voiced(self, share: torch.Tensor) -> torch.Tensor:
        """How voiced frames are, 0 to 1, [B, T], by their share of noise [B, T, bins]."""
        return 1 - share[:, :, : self.lowest_bins].mean(2)

    def _bursts(self, turns: torch.Tensor, voiced: torch.Tensor) -> torch.Tensor:
        """The amplitude of noise [B, N + beyond], of unit power, by how voiced frames are [B, T].

        Between voiced and not its power is a little less, until the mel's levels are put on it.
        """
        voiced = self.pulses.along(voiced.to(turns.dtype))
        voiced = F.pad(voiced.unsqueeze(1), self.stft.edges, mode="replicate")[:, 0]
        bell = (BELL * ((2 * math.pi * turns).cos() - 1)).exp() / BELL_SIZE
        return 1 + voiced * (bell - 1)

    def _consistent(self, spectrum: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """The phases of a spectrum [B, T, bins, 2] with magnitudes [B, T, bins]: [B, 1, N]."""
        weights = self.stft.weights(magnitude.shape[1])
        softness = _softness(magnitude)
        with torch.no_grad():
            direction = before = _times(spectrum, magnitude / _size(spectrum))
            for step in range(min(self.steps, TRAINED_STEPS) if self.training else self.steps):
                wav = self.stft.inverse(_with_magnitude(direction, magnitude, softness)) * weights
                spectrum = self.stft(wav)
                # Beyond the new spectrum by a share of the way to it.
                direction = torch.lerp(before, spectrum, 1 + MOMENTUM) if step else spectrum
                before = spectrum
        wav = self.stft.inverse(_with_magnitude(direction, magnitude, softness)) * weights
        first, last = self.stft.edges
        return wav[:, None, first : wav.shape[1] - last]


class Refiner(nn.Module):
    """Spectra seen as a picture, and hints for its places -> what to add to log magnitudes.

    VIEWS of [B, T, bins], hints [B, T, COND_CHANNELS * places] -> [B, T, bins].

    Residual units of convolutions over time and frequency, of two as in ResBlock1 or of one as in
    ResBlock2; a place is PATCH_BINS bins. What the blocks know of many bins, the few bands of a mel say;
    here harmonics are seen, and what lies between them. At the top, bins too few for a place are
    left.
    """

    VIEWS = 6  # the magnitude so far, of pulses, of noise; its lift; the mel; the share of noise

    def __init__(self, h: Config):
        super().__init__()
        C, self.bins = h.refiner_channels, h.n_fft // 2 + 1
        self.places = self.bins // PATCH_BINS
        self.conv_pre = _conv2d(self.VIEWS * PATCH_BINS + COND_CHANNELS, C)
        self.convs1 = nn.ModuleList(_conv2d(C, C, dilation) for dilation in REFINER_DILATIONS)
        seconds = REFINER_DILATIONS if h.resblock == "1" else ()
        self.convs2 = nn.ModuleList(_conv2d(C, C) for _ in seconds)
        self.linear_post = nn.Linear(C, PATCH_BINS)
        nn.init.normal_(self.linear_post.weight, std=0.01)  # it starts by adding next to nothing
        nn.init.zeros_(self.linear_post.bias)

    @property
    def reach(self) -> int:
        """How many frames before, and after, a frame is refined by."""
        return 1 + len(self.convs1) + len(self.convs2)

    def forward(self, views: Sequence[torch.Tensor], hints: torch.Tensor) -> torch.Tensor:
        picture = [view[:, :, : self.places * PATCH_BINS] for view in views]
        x = torch.cat([each.unflatten(2, (self.places, -1)) for each in (*picture, hints)], dim=3)
        x = self.conv_pre(x.to(self.linear_post.bias.dtype).permute(0, 3, 1, 2))
        for conv1, conv2 in itertools.zip_longest(self.convs1, self.convs2):
            hidden = conv1(F.leaky_relu(x, LRELU_SLOPE))
            if conv2 is not None:
                hidden = conv2(F.leaky_relu_(hidden, LRELU_SLOPE))
            x = hidden.add_(x)  # in place: no new memory
        x = F.leaky_relu(x, LRELU_SLOPE).permute(0, 2, 3, 1)
        refinement = self.linear_post(x).flatten(2)
        return F.pad(refinement, (0, self.bins - refinement.shape[2]))


class Pulses(nn.Module):
    """A log pitch [B, T], in float64 -> pulses and turns [B, N + beyond], cycles [B, T].

    A pulse is the sum of all harmonics below half of the sampling rate, in closed form, of unit
    power. Turns say where a sample lies between two pulses, -0.5 to 0.5, cycles how many pulses
    came before a frame. The pitch is interpolated between the centres of frames, and goes on before
    the first and after the last.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.sampling_rate, self.hop_size = h.sampling_rate, h.hop_size
        self.edges = _edges(h)
        # How much of the frame before, of the frame and of the next each sample's pitch is.
        place = (torch.arange(h.hop_size, dtype=torch.float64) + 0.5) / h.hop_size - 0.5
        _keep(self, "shares", torch.stack([(-place).relu(), 1 - place.abs(), place.relu()]))

    def forward(
        self, log_f0: torch.Tensor, origin: PhaseState, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        f0 = self.along(log_f0).exp()
        per_sample = f0 / self.sampling_rate
        cycles = per_sample.cumsum(1) - per_sample  # at the start of each sample
        cycles = cycles - cycles[:, origin.anchor * self.hop_size, None] + origin.cycles
        before, after = (torch.arange(1, n + 1, device=f0.device) for n in self.edges)
        turns = [
            cycles[:, :1] - per_sample[:, :1] * before.flip(0),
            cycles,
            cycles[:, -1:] + per_sample[:, -1:] * after,
        ]
        f0 = F.pad(f0.unsqueeze(1), self.edges, mode="replicate")[:, 0]
        turns = torch.cat(turns, dim=1)
        turns = (turns - turns.round()).to(dtype)
        return self._harmonics(turns, f0.to(dtype)), turns, cycles[:, :: self.hop_size]

    def along(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T] at samples, [B, N]: linear between the centres of frames."""
        near = F.pad(x.unsqueeze(1), (1, 1), mode="replicate")[:, 0].unfold(1, 3, 1)
        return (near @ self.shares.to(x.dtype)).flatten(1)

    def _harmonics(self, turns: torch.Tensor, f0: torch.Tensor) -> torch.Tensor:
        """The sum of all harmonics at phases in [-0.5, 0.5] and pitches in Hz, both [B, N]."""
        half, number = math.pi * turns, 0.5 * self.sampling_rate / f0
        whole, is_peak = number.floor(), half.abs() < 1e-4
        sine = torch.where(is_peak, 1.0, half.sin())
        sum_of_cosines = torch.where(
            is_peak, whole, 0.5 * (((2 * whole + 1) * half).sin() / sine - 1)
        )
        highest = (number - whole) * (2 * (whole + 1) * half).cos()  # which fades in or out
        return (sum_of_cosines + highest) / (0.5 * number).sqrt()


class STFT(nn.Module):
    """wav [B, N + beyond] -> spectrum [B, T, bins, 2], N = T * hop_size.

    Its windows are LogMelSpectrogram's: frame t is centred on samples t * hop_size to
    (t + 1) * hop_size of the N that `edges` leave.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.n_fft, self.hop_size, self.edges = h.n_fft, h.hop_size, _edges(h)
        self.beyond = sum(self.edges)
        self.overlap = self.beyond // h.hop_size  # frames before that a frame overlaps with
        window = LogMelSpectrogram(h, h.fmax).window
        window = F.pad(window, ((h.n_fft - h.win_size) // 2,) * 2)
        _keep(self, "window", F.pad(window, (0, h.n_fft - len(window))))
        # Both transforms as matrices, real and imaginary parts in turns.
        samples = torch.eye(h.n_fft, dtype=torch.float64)
        real = torch.eye(h.n_fft // 2 + 1, dtype=torch.complex128)
        _keep(self, "fourier", torch.view_as_real(torch.fft.rfft(samples)).flatten(1).float())
        inverse = torch.fft.irfft(torch.stack([real, 1j * real], dim=1).flatten(0, 1), n=h.n_fft)
        _keep(self, "inverse_fourier", inverse.float())

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        windowed = wav.unfold(1, self.n_fft, self.hop_size) * self.window
        if torch.compiler.is_exporting():  # ONNX has no fast Fourier transform worth its name
            return (windowed @ self.fourier).unflatten(2, (-1, 2))
        return torch.view_as_real(torch.fft.rfft(windowed))

    def inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
        """[B, T, bins, 2] -> [B, N + beyond], to be multiplied by `weights`."""
        if torch.compiler.is_exporting():
            frames = spectrum.flatten(2) @ self.inverse_fourier
        else:
            frames = torch.fft.irfft(torch.view_as_complex(spectrum), n=self.n_fft)
        return self._overlap_add(frames, self.window)

    def weights(self, frames: int) -> torch.Tensor:
        """[1, N + beyond], by which the inverse is the waveform of the nearest spectrum."""
        window = self.window.expand(1, frames, -1)
        return self._overlap_add(window, self.window).clamp(min=MIN_WINDOW).reciprocal()

    def _overlap_add(self, frames: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """[B, T, n_fft], each times a window [n_fft] -> [B, N + beyond]: their sum, shifted."""
        rest, last = -self.n_fft % self.hop_size, self.overlap
        hops, windows = (
            F.pad(x, (0, rest)).unflatten(-1, (-1, self.hop_size)) for x in (frames, window)
        )
        if torch.compiler.is_exporting():  # ONNX is slow at writing in place
            shifts = (
                F.pad(hops[:, :, k], (0, 0, k, last - k)) * windows[k] for k in range(last + 1)
            )
            return sum(shifts).flatten(1)
        count = frames.shape[1]
        wav = frames.new_zeros(len(frames), count + last, self.hop_size)
        for k in range(last + 1):
            wav[:, k : k + count].addcmul_(hops[:, :, k], windows[k])
        return wav.flatten(1)


def _edges(h: Config) -> tuple[int, int]:
    """How many samples the windows of T frames need before T * hop_size samples, and after."""
    before, hops = (h.n_fft - h.hop_size) // 2, math.ceil(h.n_fft / h.hop_size)
    return before, (hops - 1) * h.hop_size - before


def _conv2d(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Conv2d:
    """A convolution over time and, dilated, frequency, that keeps the sizes."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size=3, padding=(1, dilation), dilation=(1, dilation)
    )


def random_phase_state(mel: torch.Tensor) -> PhaseState:
    """Of no meaning, but another for each of [B, num_mels, T], and the same again."""
    rows = torch.arange(len(mel), device=mel.device)[:, None]
    chance = mel.double().sum((1, 2)).square()[:, None] + 1000 * math.pi * rows
    return PhaseState(chance.long(), cycles=chance)


def _in_full_precision(x: torch.Tensor) -> torch.autocast:
    """Where nothing that follows from x is computed in bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def _keep(module: nn.Module, name: str, constant: torch.Tensor) -> None:
    """Registers what moves with the module and is not saved."""
    module.register_buffer(name, constant, persistent=False)


def _with_magnitude(
    x: torch.Tensor, magnitude: torch.Tensor, softness: torch.Tensor
) -> torch.Tensor:
    """Complex numbers [..., 2] of the directions of x [..., 2] and of a magnitude [...]."""
    squares = torch.add(softness, _squares(x), alpha=1 - SOFTNESS)
    return _times(x, magnitude * squares.rsqrt())


def _softness(magnitude: torch.Tensor) -> torch.Tensor:
    """What keeps numbers that are small beside a magnitude [...] from being given all of it.

    The direction of what nearly cancels is chance, and rounding would turn it.
    """
    return SOFTNESS * magnitude.square() + MIN_SIZE**2


def _times(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Complex numbers [..., 2] by real ones [...]."""
    if torch.compiler.is_exporting():
        return x * scale.unsqueeze(-1)
    return torch.view_as_real(torch.view_as_complex(x) * scale)  # several times as fast


def _size(x: torch.Tensor) -> torch.Tensor:
    """The size [...] of complex numbers [..., 2], MIN_SIZE at least."""
    return _squares(x).clamp(min=MIN_SIZE**2).sqrt()


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The squared size [...] of complex numbers [..., 2]."""
    squares = x.square().flatten(-2)  # a sum over the last axis would be several times as slow
    return squares[..., ::2] + squares[..., 1::2]


def _spread(filterbank: torch.Tensor) -> torch.Tensor:
    """What a change of log-mels [num_mels] is to log magnitudes: [num_mels, bins] of a [same].

    Each bin is changed as the bands are that it lies in; beyond all bands, as the nearest one.
    """
    bins = filterbank.shape[1]
    heard = filterbank.sum(0) > 0
    first, last = int(heard.nonzero().min()), int(heard.nonzero().max())
    nearest = torch.arange(bins).clamp(first, last)
    share = filterbank[:, nearest]
    return share / share.sum(0).clamp(min=torch.finfo(share.dtype).tiny)
