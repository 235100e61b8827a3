"""The frame-rate head: a harmonic-plus-noise source, shaped by the mel, and Griffin-Lim.

For each frame t and each bin k of an STFT,

    S[t, k] = (1 - ap[t, k]^2)^0.5 * P[t, k] + ap[t, k] * W[t, k]

where P is the STFT of a pulse train at the predicted F0, W is the STFT of white noise, and ap is
the predicted aperiodicity, from 0 to 1. P and W have unit power. The head keeps the phase of S and
corrects its magnitude:

    x [B, in_channels, T], predicted from the mel at the mel's frame rate
     |-- F0 -----------> pulse train -> STFT -> P --+
     |-- aperiodicity -> noise ------> STFT -> W --+-> S -> match the mel's levels --+
     |-- magnitude correction ------------------------------------------------------(+)
     '-- conditioning ------------------------------------------------> refiner ----(+)
                                                                                     |
          wav <- Griffin-Lim with momentum <- inverse STFT <- phase of S, exp(log magnitude)

In voiced frames the noise is modulated: it comes in bursts, one burst for each pulse.

Training regresses no phase. F0 and aperiodicity are trained on measurements of the recordings
(pitch.py); the magnitudes are trained with an energy distance between two samples and the recording
(losses.py). No gradient of the energy distance reaches F0 and aperiodicity, because spectral losses
favour noise. Griffin-Lim runs without gradients.

Sources: McAulay and Quatieri, 1986, and Griffin and Lim, 1988 (multiband excitation), for the
source; Stylianou, 2001, for modulated noise; Griffin and Lim, 1984, and Perraudin et al., 2013, for
phase reconstruction with momentum.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from env import Config
from meldataset import LogMelSpectrogram
from pitch import F0_RANGE

F0_CANDIDATES = 64  # the predicted log F0 is their mean, weighted by a softmax
NOISE_FRAMES = 2048  # the noise repeats after so many frames
NOISE_FACTORS = (123456789, 362436069, 521288629)  # of the rounds of white_noise
VOICING_BAND = 1000.0  # Hz; the mean aperiodicity below it tells voiced from unvoiced frames
# The envelope exp(SHARPNESS * (cos(2 pi phase) - 1)) of noise bursts, and its root mean square.
BURST_SHARPNESS = 2.0
BURST_RMS = math.exp(-BURST_SHARPNESS) * math.sqrt(float(torch.i0(torch.tensor(4.0))))

GRIFFIN_LIM_MOMENTUM = 0.99
MAX_TRAINING_STEPS = 8  # Griffin-Lim steps in training
PHASE_SOFTNESS = 0.08  # share of the target power; bins with less power are attenuated

PATCH_BINS = 4  # neighbouring bins form one patch: one position of the refiner's convolutions
COND_CHANNELS = 3  # conditioning of the refiner, for each patch
REFINER_DILATIONS = (1, 2, 4)  # along frequency
LOG_MAG_SCALE = 3.0  # divides the log magnitudes that the refiner sees
LRELU_SLOPE = 0.1

MIN_WINDOW_SUM = 1e-3  # of squared windows, at the ends of a waveform
EPSILON = 1e-5  # magnitude


class PhaseState(NamedTuple):
    """The position of a piece of a mel in the whole mel, so that pulses and noise continue.

    The unwrapped phase of the pulse train is known at the first sample of one frame, the anchor.
    """

    frame: int | torch.Tensor = 0  # index of the piece's first frame in the whole mel
    anchor: int = 0  # index of the anchor in the piece
    phase: float | torch.Tensor = 0.0  # unwrapped phase at the anchor, in cycles


class Excitation(NamedTuple):
    """STFTs [B, T, bins] (complex) of unit power, and the aperiodicity [B, T, bins] to mix them."""

    pulses: torch.Tensor
    noise: torch.Tensor
    aperiodicity: torch.Tensor


class HarmonicNoiseHead(nn.Module):
    """Turns predictions at the frame rate into a waveform; the top of this file has the equation.

    forward(x [B, in_channels, T], mel [B, num_mels, T], state) -> wav [B, 1, T * hop_size]. In
    training, each mel gets a random state. Otherwise the default is the state at the start of a
    mel.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.stft, self.pulse_train = STFT(h), PulseTrain(h)
        self.refiner = Refiner(h)
        self.griffin_lim_steps = h.griffin_lim_steps
        self.hop_size = h.hop_size
        self.mel_power, self.mel_floor = h.mel_power, h.mel_floor
        self.min_log_mel, self.log_amplitude_scale = h.silent_log_mel, h.log_amplitude_scale
        bins = h.n_fft // 2 + 1
        # Of x: magnitude correction, aperiodicity, F0, conditioning.
        self.splits = (bins, bins, F0_CANDIDATES, COND_CHANNELS * self.refiner.patches)
        self.in_channels = sum(self.splits)
        self.max_log_magnitude = math.log(h.n_fft)  # no window of a wav in [-1, 1] exceeds it
        self.voicing_bins = math.ceil(VOICING_BAND / h.sampling_rate * h.n_fft)
        log_f0 = torch.linspace(*map(math.log, F0_RANGE), F0_CANDIDATES, dtype=torch.float64)
        filterbank = LogMelSpectrogram(h, h.fmax).filterbank
        noise = white_noise(torch.arange(NOISE_FRAMES * h.hop_size))
        self.register_buffer("log_f0_candidates", log_f0, persistent=False)
        self.register_buffer("filterbank", filterbank.T, persistent=False)
        self.register_buffer("mel_to_bins", mel_to_bins(filterbank), persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    def forward(
        self, x: torch.Tensor, mel: torch.Tensor, state: PhaseState | None = None
    ) -> torch.Tensor:
        if self.training:
            state = random_phase_state(mel)
        excitation = self.excitation(x, state or PhaseState())
        spectrum, log_magnitude = self.spectrum(x, mel, excitation)
        with _full_precision(x):
            return self.griffin_lim(spectrum, self.magnitude(log_magnitude))

    def f0_aperiodicity(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log F0 [B, T] in log Hz, float64, and the aperiodicity [B, T, bins].

        F0 is in float64 because the phase is its cumulative sum, in which rounding errors add up.
        """
        _, aperiodicity, log_f0, _ = self._split(x)
        with _full_precision(x):
            log_f0 = log_f0.double().softmax(2) @ self.log_f0_candidates
            return log_f0, aperiodicity.sigmoid()

    def excitation(self, x: torch.Tensor, state: PhaseState) -> Excitation:
        """Returns the STFTs of pulses at the predicted F0 and of noise, modulated where voiced."""
        log_f0, aperiodicity = self.f0_aperiodicity(x)
        with _full_precision(x):
            f0, phase = self.pulse_train.phase(log_f0.detach(), state)
            f0, wrapped_phase = f0.to(x.dtype), (phase - phase.round()).to(x.dtype)
            noise = self.noise_from(state.frame, f0.shape[1]) * self.burst_envelope(
                wrapped_phase, self.along_time(self.voicing(aperiodicity.detach()))
            )
            pulses = self.pulse_train(f0, wrapped_phase)
            return Excitation(self.stft(pulses), self.stft(noise), aperiodicity)

    def spectrum(
        self, x: torch.Tensor, mel: torch.Tensor, excitation: Excitation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns S [B, T, bins] (complex), for its phase, and the log magnitude [B, T, bins]."""
        spectrum, log_magnitude, patches = self.unrefined(x, mel, excitation)
        return spectrum, log_magnitude + self.refiner(patches).to(x.dtype)

    def unrefined(
        self, x: torch.Tensor, mel: torch.Tensor, excitation: Excitation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns S, its log magnitude before the refiner, and the input of the refiner.

        The shapes are [B, T, bins] (complex), [B, T, bins] and [B, channels, T, patches].
        """
        correction, _, _, conditioning = self._split(x)
        with _full_precision(x):
            mel = self.log_amplitude_scale * mel.clamp(min=self.min_log_mel)
            mel = mel.to(x.dtype).transpose(1, 2)
            aperiodicity = excitation.aperiodicity.detach()
            spectrum = (1 - aperiodicity.square()).sqrt() * excitation.pulses
            spectrum = spectrum + aperiodicity * excitation.noise
            magnitude = _magnitude(spectrum)
            gain = self.match_levels(magnitude, mel)
            log_magnitude = magnitude.log() + gain + correction
            maps = (
                log_magnitude.detach() / LOG_MAG_SCALE,
                _magnitude(excitation.pulses).log() / LOG_MAG_SCALE,
                _magnitude(excitation.noise).log() / LOG_MAG_SCALE,
                gain / LOG_MAG_SCALE,
                mel / LOG_MAG_SCALE @ self.mel_to_bins,
                aperiodicity,
            )
        return spectrum, log_magnitude, self.refiner.to_patches(maps, conditioning)

    def magnitude(self, log_magnitude: torch.Tensor) -> torch.Tensor:
        """Returns the magnitude [B, T, bins], limited to that of a waveform in [-1, 1]."""
        return log_magnitude.clamp(max=self.max_log_magnitude).exp()

    def match_levels(self, magnitude: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
        """Returns the log gain [B, T, bins] from magnitudes [B, T, bins] to the levels of the mel.

        In each mel band, the gain is the difference between mel [B, T, num_mels], in natural
        logarithms of amplitudes, and the mel of the magnitudes.
        """
        bands = (magnitude if self.mel_power == 1 else magnitude.square()) @ self.filterbank
        log_mel = bands.clamp(min=self.mel_floor).log() / self.mel_power
        return (mel - log_mel) @ self.mel_to_bins

    def griffin_lim(self, spectrum: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """Returns the waveform [B, 1, N] of a magnitude [B, T, bins].

        The initial phase is that of `spectrum` [B, T, bins]. Each step replaces it by the phase of
        the waveform's STFT, extrapolated with momentum.
        """
        normaliser = self.stft.normaliser(magnitude.shape[1])
        floor = magnitude_floor(magnitude)
        with torch.no_grad():
            phase = previous = spectrum * (magnitude / _magnitude(spectrum))
            steps = min(self.griffin_lim_steps, MAX_TRAINING_STEPS if self.training else 2**31)
            for step in range(steps):
                wav = self.stft.inverse(with_magnitude(phase, magnitude, floor))
                spectrum = self.stft(wav.mul_(normaliser))
                phase = spectrum
                if step > 0:
                    phase = _extrapolate(previous, spectrum, 1 + GRIFFIN_LIM_MOMENTUM)
                previous = spectrum
        wav = self.stft.inverse(with_magnitude(phase, magnitude, floor)) * normaliser
        before, after = self.stft.margins
        return wav[:, None, before : wav.shape[1] - after]

    def next_state(
        self, x: torch.Tensor, state: PhaseState | None, frame: int, first: int
    ) -> PhaseState:
        """Returns the state for a later piece that starts at frame `first` of this one.

        `frame` is the anchor of the new state, as an index in this piece. It must lie in both
        pieces.
        """
        state = state or PhaseState()
        log_f0, _ = self.f0_aperiodicity(x)
        _, phase = self.pulse_train.phase(log_f0, state)
        at_frame = phase[0, self.stft.margins[0] + frame * self.hop_size]
        return PhaseState(state.frame + first, anchor=frame - first, phase=at_frame)

    def voicing(self, aperiodicity: torch.Tensor) -> torch.Tensor:
        """Returns how voiced each frame is, [B, T] from 0 to 1, from aperiodicity [B, T, bins]."""
        return 1 - aperiodicity[:, :, : self.voicing_bins].mean(2)

    def along_time(self, x: torch.Tensor) -> torch.Tensor:
        """Interpolates x [B, T] to the samples of the STFT's input, [B, N + margins]."""
        samples = self.pulse_train.interpolate(x)
        return F.pad(samples.unsqueeze(1), self.stft.margins, mode="replicate")[:, 0]

    def noise_from(self, frame: int | torch.Tensor, size: int) -> torch.Tensor:
        """Returns `size` samples, [size] or [B, size], of the noise from frame `frame` on.

        The samples start `stft.margins[0]` before the frame, as the input of the STFT does.
        """
        first, skipped = divmod(-self.stft.margins[0], self.hop_size)
        count = math.ceil((skipped + size) / self.hop_size)
        frames = frame + first + torch.arange(count, device=self.noise.device)
        noise = self.noise.unflatten(0, (NOISE_FRAMES, self.hop_size))[frames % NOISE_FRAMES]
        return noise.flatten(-2)[..., skipped : skipped + size]

    @staticmethod
    def burst_envelope(wrapped_phase: torch.Tensor, voicing: torch.Tensor) -> torch.Tensor:
        """Returns the amplitude of the noise: constant where unvoiced, in bursts where voiced.

        Both arguments and the result are [B, N + margins]. The envelope has unit power at a voicing
        of 0 and 1, and slightly less between; the level matching compensates for that.
        """
        cosine = (2 * math.pi * wrapped_phase).cos()
        bursts = (BURST_SHARPNESS * (cosine - 1)).exp() / BURST_RMS
        return torch.lerp(torch.ones_like(bursts), bursts, voicing)

    def sources(self, first: int, last: int) -> tuple[int, int]:
        """Returns the first and the last frame of x that samples `first` to `last` need."""
        before, after = self.receptive_field
        return first // self.hop_size - before, last // self.hop_size + after

    @property
    def receptive_field(self) -> tuple[int, int]:
        """The numbers of frames, before and after its own, that a sample depends on."""
        n_fft, hop_size, before = self.stft.n_fft, self.hop_size, self.stft.margins[0]
        # A sample lies in the windows of several frames. The pulses in a window depend on F0 at the
        # centres of the two nearest frames.
        first = -((n_fft - 1 - before) // hop_size) * hop_size - before
        last = (hop_size - 1 + before) // hop_size * hop_size - before + n_fft - 1
        window = max(-((first - hop_size // 2) // hop_size), (last + hop_size // 2) // hop_size)
        reach = window + self.griffin_lim_steps * self.stft.overlap
        refiner_before, refiner_after = self.refiner.receptive_field
        return reach + refiner_before, reach + refiner_after

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Splits x [B, in_channels, T] into four parts [B, T, channels]."""
        return x.transpose(1, 2).split(self.splits, dim=2)


class PulseTrain(nn.Module):
    """Sums all harmonics of F0 below half the sampling rate, in closed form, with unit power.

    forward(f0 [B, N] in Hz, wrapped_phase [B, N] in cycles from -0.5 to 0.5) -> pulses [B, N].
    """

    def __init__(self, h: Config):
        super().__init__()
        self.sampling_rate, self.hop_size = h.sampling_rate, h.hop_size
        self.margins = stft_margins(h)
        # Weights of the previous, the same and the next frame in the F0 of each sample of a frame.
        offset = (torch.arange(h.hop_size, dtype=torch.float64) + 0.5) / h.hop_size - 0.5
        weights = torch.stack([(-offset).relu(), 1 - offset.abs(), offset.relu()])
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, f0: torch.Tensor, wrapped_phase: torch.Tensor) -> torch.Tensor:
        half_angle, harmonics = math.pi * wrapped_phase, 0.5 * self.sampling_rate / f0
        count, is_peak = harmonics.floor(), half_angle.abs() < 1e-4
        # The sum of cos(k a) for k = 1 ... n is (sin((2 n + 1) a / 2) / sin(a / 2) - 1) / 2.
        sine = torch.where(is_peak, 1.0, half_angle.sin())
        total = 0.5 * (((2 * count + 1) * half_angle).sin() / sine - 1)
        total = torch.where(is_peak, count, total)
        # The next harmonic fades in with F0, so that the sum is continuous.
        total = total + (harmonics - count) * (2 * (count + 1) * half_angle).cos()
        return total / (0.5 * harmonics).sqrt()

    def phase(self, log_f0: torch.Tensor, state: PhaseState) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns F0 in Hz and the unwrapped phase in cycles, both [B, N + margins], float64.

        log_f0 is [B, T]. In the margins, before the first frame and after the last, F0 is held.
        """
        f0 = self.interpolate(log_f0).exp()
        increment = f0 / self.sampling_rate  # cycles per sample
        phase = increment.cumsum(1) - increment  # at the start of each sample
        phase = phase - phase[:, state.anchor * self.hop_size, None] + state.phase
        before, after = (torch.arange(1, n + 1, device=f0.device) for n in self.margins)
        phase = torch.cat(
            [
                phase[:, :1] - increment[:, :1] * before.flip(0),
                phase,
                phase[:, -1:] + increment[:, -1:] * after,
            ],
            dim=1,
        )
        return F.pad(f0.unsqueeze(1), self.margins, mode="replicate")[:, 0], phase

    def interpolate(self, x: torch.Tensor) -> torch.Tensor:
        """Interpolates x [B, T] linearly between the centres of frames: [B, T * hop_size]."""
        neighbours = F.pad(x.unsqueeze(1), (1, 1), mode="replicate")[:, 0].unfold(1, 3, 1)
        return (neighbours @ self.weights.to(x.dtype)).flatten(1)


class Refiner(nn.Module):
    """Predicts a correction of the log magnitudes, for example of the valleys between harmonics.

    forward(patches [B, channels, T, patches], from `to_patches`) -> [B, T, bins]. It is a residual
    network over time and frequency, on patches of PATCH_BINS bins. Its residual units have two
    convolutions with `resblock` "1" and one with "2". The highest bins, which fill no patch, get no
    correction.
    """

    MAPS = 6  # log magnitude, log pulses, log noise, level gain, mel, aperiodicity

    def __init__(self, h: Config):
        super().__init__()
        C, self.bins = h.refiner_channels, h.n_fft // 2 + 1
        self.patches = self.bins // PATCH_BINS
        ahead_first, ahead = (None, None) if h.lookahead_frames is None else (1, 0)
        channels = self.MAPS * PATCH_BINS + COND_CHANNELS
        self.conv_pre = Conv3x3(channels, C, lookahead=ahead_first)
        self.convs1 = nn.ModuleList(
            Conv3x3(C, C, dilation=dilation, lookahead=ahead) for dilation in REFINER_DILATIONS
        )
        seconds = len(REFINER_DILATIONS) if h.resblock == "1" else 0
        self.convs2 = nn.ModuleList(Conv3x3(C, C, lookahead=ahead) for _ in range(seconds))
        self.linear_post = nn.Linear(C, PATCH_BINS)
        nn.init.normal_(self.linear_post.weight, std=0.01)  # the initial refinement is near 0
        nn.init.zeros_(self.linear_post.bias)

    @property
    def receptive_field(self) -> tuple[int, int]:
        """The numbers of frames before and after a frame that its refinement depends on."""
        pads = [conv.time_padding for conv in (self.conv_pre, *self.convs1, *self.convs2)]
        return sum(before for before, _ in pads), sum(after for _, after in pads)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x = self.conv_pre(patches)
        for convs in self.units():
            hidden = convs[0](F.leaky_relu(x, LRELU_SLOPE))
            for conv in convs[1:]:
                hidden = conv(F.leaky_relu_(hidden, LRELU_SLOPE))
            x = hidden.add_(x)  # in place: no new memory
        return self.to_bins(x)

    def units(self) -> list[tuple[nn.Module, ...]]:
        """Returns the convolutions of each residual unit."""
        if not self.convs2:
            return [(conv,) for conv in self.convs1]
        return list(zip(self.convs1, self.convs2, strict=True))

    def to_patches(self, maps: Sequence[torch.Tensor], conditioning: torch.Tensor) -> torch.Tensor:
        """Returns the input of conv_pre, [B, channels, T, patches].

        `maps` are MAPS tensors [B, T, bins]; conditioning is [B, T, COND_CHANNELS * patches].
        """
        parts = [each[:, :, : self.patches * PATCH_BINS] for each in maps]
        parts = [part.unflatten(2, (self.patches, -1)) for part in (*parts, conditioning)]
        return torch.cat(parts, dim=3).to(self.linear_post.bias.dtype).permute(0, 3, 1, 2)

    def to_bins(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the refinement [B, T, bins] from the last features [B, C, T, patches]."""
        x = F.leaky_relu(x, LRELU_SLOPE).permute(0, 2, 3, 1)
        refinement = self.linear_post(x).flatten(2)
        return F.pad(refinement, (0, self.bins - refinement.shape[2]))


class Conv3x3(nn.Conv2d):
    """A convolution of [B, C, T, patches] over three frames and three patches; keeps the sizes.

    `dilation` is along frequency. `lookahead` is the number of later frames (0 to 2) that the
    output depends on. None selects the symmetric convolution, with one later frame.
    """

    def __init__(self, c_in: int, c_out: int, dilation: int = 1, lookahead: int | None = None):
        super().__init__(c_in, c_out, 3, padding=(0, dilation), dilation=(1, dilation))
        self.time_padding = (1, 1) if lookahead is None else (2 - lookahead, lookahead)
        if lookahead is None:
            self.padding = (1, dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Padded at both ends and cropped: cheaper than to pad a copy of x at one end.
        (before, after), T = self.time_padding, x.shape[2]
        ends, frequency = max(before, after), self.padding[1]
        y = F.conv2d(x, self.weight, self.bias, padding=(ends, frequency), dilation=self.dilation)
        return y[:, :, ends - before : ends - before + T]


class STFT(nn.Module):
    """Computes spectra with the windows of LogMelSpectrogram.

    forward(wav [B, N + margins]) -> spectrum [B, T, bins] (complex), for N = T * hop_size. Frame t
    is centred on samples t * hop_size to (t + 1) * hop_size of the N samples between the margins.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.n_fft, self.hop_size, self.margins = h.n_fft, h.hop_size, stft_margins(h)
        self.overlap = sum(self.margins) // h.hop_size  # in frames
        window = LogMelSpectrogram(h, h.fmax).window
        window = F.pad(window, ((h.n_fft - h.win_size) // 2,) * 2)
        window = F.pad(window, (0, h.n_fft - len(window)))
        self.register_buffer("window", window, persistent=False)

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(wav.unfold(1, self.n_fft, self.hop_size) * self.window)

    def inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Returns the overlap-added waveform [B, N + margins], to be multiplied by `normaliser`."""
        return self.overlap_add(torch.fft.irfft(spectrum, n=self.n_fft), self.window)

    def normaliser(self, frames: int) -> torch.Tensor:
        """Returns one over the sum of the squared windows, [1, N + margins].

        With it, `inverse` gives the waveform whose STFT is nearest to the spectrum.
        """
        window = self.window.expand(1, frames, -1)
        return self.overlap_add(window, self.window).clamp(min=MIN_WINDOW_SUM).reciprocal()

    def overlap_add(self, frames: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """Adds frames [B, T, n_fft], each multiplied by a window [n_fft]: [B, N + margins]."""
        rest = -self.n_fft % self.hop_size
        if rest > 0:  # a padding of 0 would copy
            frames, window = F.pad(frames, (0, rest)), F.pad(window, (0, rest))
        # Hop k of every frame is added at once.
        hops, windows = (x.unflatten(-1, (-1, self.hop_size)) for x in (frames, window))
        B, T = frames.shape[:2]
        wav = frames.new_zeros(B, T + self.overlap, self.hop_size)
        for k, window_hop in enumerate(windows):
            wav[:, k : k + T].addcmul_(hops[:, :, k], window_hop)
        return wav.flatten(1)


def stft_margins(h: Config) -> tuple[int, int]:
    """Returns how far the windows of T frames extend beyond T * hop_size samples.

    The two numbers are samples before the first and after the last of them.
    """
    before, hops = (h.n_fft - h.hop_size) // 2, math.ceil(h.n_fft / h.hop_size)
    return before, (hops - 1) * h.hop_size - before


def white_noise(positions: torch.Tensor) -> torch.Tensor:
    """Returns the samples [...] of white noise of unit power at integer positions [...].

    A formula of integers, so that exported files compute the same noise and need not store it. The
    samples are uniform; their spectra are as those of Gaussian noise.
    """
    prime = 2**31 - 1
    x = (positions * 1103515245 + 12345) % prime
    for factor in NOISE_FACTORS:
        x = x * (x + factor) % prime
    return (x.float() / prime * 2 - 1) * math.sqrt(3)


def random_phase_state(mel: torch.Tensor) -> PhaseState:
    """Returns a pseudo-random state for each mel of a batch [B, num_mels, T].

    It is computed from the mel and its row, so that training is reproducible.
    """
    rows = torch.arange(len(mel), device=mel.device)[:, None]
    number = mel.double().sum((1, 2)).square()[:, None] + 1000 * math.pi * rows
    return PhaseState(frame=number.long(), phase=number)


def mel_to_bins(filterbank: torch.Tensor) -> torch.Tensor:
    """Returns the matrix [num_mels, bins] that maps a log gain of mel bands to a log gain of bins.

    A bin has the mean gain of the bands it lies in, weighted by filterbank [num_mels, bins]; a bin
    outside all bands has the gain of the nearest bin inside.
    """
    covered = (filterbank.sum(0) > 0).nonzero()
    nearest = torch.arange(filterbank.shape[1]).clamp(int(covered.min()), int(covered.max()))
    weights = filterbank[:, nearest]
    return weights / weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)


def with_magnitude(x: torch.Tensor, magnitude: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Returns complex numbers [...] with the phase of x [...] and a magnitude [...].

    Where |x| is much smaller than the magnitude, rounding errors change the phase of x. The floor
    of |x|^2, from `magnitude_floor`, makes the result smaller there.
    """
    power = torch.add(floor, _power(x), alpha=1 - PHASE_SOFTNESS)
    return x * (magnitude / power.sqrt_())  # faster than rsqrt


def magnitude_floor(magnitude: torch.Tensor) -> torch.Tensor:
    """Returns the `floor` of `with_magnitude` for a magnitude [...]."""
    return PHASE_SOFTNESS * magnitude.square() + EPSILON**2


def _extrapolate(start: torch.Tensor, end: torch.Tensor, weight: float) -> torch.Tensor:
    """Returns start + weight * (end - start), complex; three times as fast on real numbers."""
    pairs = torch.lerp(torch.view_as_real(start), torch.view_as_real(end), weight)
    return torch.view_as_complex(pairs)


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    """Returns |x| [...], at least EPSILON."""
    return _power(x).clamp(min=EPSILON**2).sqrt()


def _power(x: torch.Tensor) -> torch.Tensor:
    """Returns |x|^2 [...] of complex x [...]."""
    squares = torch.view_as_real(x).square().flatten(-2)
    return squares[..., ::2] + squares[..., 1::2]  # several times faster than a sum over pairs


def _full_precision(x: torch.Tensor) -> torch.autocast:
    """Returns a context that switches autocast off."""
    return torch.autocast(x.device.type, enabled=False)
