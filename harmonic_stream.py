"""The frame-rate head of a mel that arrives in pieces, frame by frame.

harmonic.py has the equations. Two things differ. After the centre of a frame, its window holds F0
and voicing, so that the spectrum does not wait for later frames. And Griffin-Lim settles one frame
after the other, with a bounded look-ahead.

It computes in NumPy; stream_layers.py says why.
"""

import math

import numpy as np
import scipy.fft
import scipy.special

from harmonic import (
    BURST_RMS,
    BURST_SHARPNESS,
    COND_CHANNELS,
    EPSILON,
    GRIFFIN_LIM_MOMENTUM,
    LOG_MAG_SCALE,
    LRELU_SLOPE,
    MIN_WINDOW_SUM,
    PATCH_BINS,
    PHASE_SOFTNESS,
    HarmonicNoiseHead,
)
from stream_layers import (
    Conv3x3Stream,
    Delay,
    ResidualStream,
    leaky_relu,
    linear,
    strided,
    to_array,
)

GRIFFIN_LIM_LOOKAHEAD = 3  # frames


class HarmonicStream:
    """Streams a HarmonicNoiseHead; Griffin-Lim looks `lookahead` frames ahead."""

    def __init__(self, head: HarmonicNoiseHead, lookahead: int):
        self.head = head
        self.excitation = ExcitationStream(head)
        self.griffin_lim = GriffinLimStream(head, lookahead)
        self.filterbank, self.mel_to_bins = to_array(head.filterbank), to_array(head.mel_to_bins)
        self.log_f0_candidates = to_array(head.log_f0_candidates)
        self.ends = np.cumsum(head.splits)
        refiner = head.refiner
        self.refiner_pre = Conv3x3Stream(refiner.conv_pre)
        self.refiner = ResidualStream(refiner.units(), Conv3x3Stream)
        self.linear_post = to_array(refiner.linear_post.weight), to_array(refiner.linear_post.bias)
        self.mel, self.spectrum, self.log_magnitude = Delay(), Delay(), Delay()

    @property
    def latency(self) -> int:
        """The number of frames of x after its own that a sample waits for."""
        stft = self.head.stft
        window = math.ceil(stft.margins[0] / stft.hop_size)
        return window + self.griffin_lim.lookahead + self.head.refiner.receptive_field[1]

    def __call__(self, x: np.ndarray, mel: np.ndarray, is_last: bool) -> np.ndarray:
        """Takes features [1, n, C] and frames of the mel [1, m, num_mels]; returns samples [N]."""
        mel = self.mel(mel, x.shape[1])  # it is ahead of x by the look-ahead of the network
        spectrum, log_magnitude, patches = self.unrefined(x[0], mel[0])
        refinement = self.refine(patches, is_last)
        spectrum = self.spectrum(spectrum[None], len(refinement))[0]
        log_magnitude = self.log_magnitude(log_magnitude[None], len(refinement))[0]
        log_magnitude[:, : refinement.shape[1]] += refinement
        magnitude = np.exp(np.minimum(log_magnitude, self.head.max_log_magnitude))
        return self.griffin_lim(spectrum, magnitude, is_last)

    def refine(self, patches: np.ndarray, is_last: bool) -> np.ndarray:
        """Takes patches [n, patches, channels]; returns final refinements [m, bins in patches]."""
        x = self.refiner(self.refiner_pre(patches[None], is_last), is_last)[0]
        x = linear(leaky_relu(x, LRELU_SLOPE), *self.linear_post)
        return x.reshape(len(x), PATCH_BINS * self.head.refiner.patches)

    def unrefined(
        self, features: np.ndarray, mel: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `HarmonicNoiseHead.unrefined` of n frames.

        The shapes are [n, bins] (complex), [n, bins] and [n, patches, channels].
        """
        head = self.head
        correction, aperiodicity, f0, conditioning = (
            features[:, end - size : end] for end, size in zip(self.ends, head.splits, strict=True)
        )
        aperiodicity = scipy.special.expit(aperiodicity)
        weights = np.exp(f0.astype(np.float64) - f0.max(1, keepdims=True))
        log_f0 = weights @ self.log_f0_candidates / weights.sum(1)
        voicing = 1 - aperiodicity[:, : head.voicing_bins].mean(1)
        pulses, noise = self.excitation(log_f0, voicing)
        spectrum = np.sqrt(1 - aperiodicity * aperiodicity) * pulses + aperiodicity * noise
        magnitude = magnitude_of(spectrum)
        mel = head.log_amplitude_scale * mel
        bands = magnitude if head.mel_power == 1 else magnitude * magnitude
        log_mel = np.log(np.maximum(bands @ self.filterbank, head.mel_floor)) / head.mel_power
        gain, mel_bins = np.stack([mel - log_mel, mel]) @ self.mel_to_bins
        log_magnitude = np.log(magnitude) + gain + correction
        log_pulses, log_noise = np.log(magnitude_of(pulses)), np.log(magnitude_of(noise))
        scaled = [log_magnitude, log_pulses, log_noise, gain, mel_bins]
        maps = [*(x * (1 / LOG_MAG_SCALE) for x in scaled), aperiodicity]
        return spectrum, log_magnitude, to_patches(maps, conditioning, head.refiner.patches)


class ExcitationStream:
    """Computes the spectra of pulses and noise.

    The samples of a window are known up to the centre of its frame. In the rest of the window, F0
    and voicing keep their values.
    """

    def __init__(self, head: HarmonicNoiseHead):
        self.hop_size, self.n_fft = head.hop_size, head.stft.n_fft
        self.rate, self.before = head.pulse_train.sampling_rate, head.stft.margins[0]
        half = (self.hop_size + 1) // 2
        self.known = self.before + half
        self.held = np.arange(self.n_fft - self.known)
        # Weights of the later frame, from the centre of one frame to the centre of the next.
        weights = to_array(head.pulse_train.weights)
        self.later = np.concatenate([weights[2, half:], weights[1, :half]])
        self.noise, self.window = to_array(head.noise), to_array(head.stft.window)
        self.samples = np.arange(self.n_fft) - self.before
        # Index of the next frame, phase of the next sample, log F0 and voicing of the last frame,
        # and pulses and noise envelope of the known samples that later windows also contain.
        self.frame, self.phase, self.last, self.past = 0, None, None, None

    def __call__(self, log_f0: np.ndarray, voicing: np.ndarray) -> np.ndarray:
        """Returns the spectra of pulses and noise, [2, n, bins], for tracks [n] of n frames."""
        n = len(log_f0)
        frames = np.empty((2, n, self.n_fft), self.window.dtype)
        if n > 0:
            self.fill(frames, np.stack([log_f0, voicing]))
        starts = np.arange(self.frame, self.frame + n)[:, None] * self.hop_size
        frames[1] *= self.noise.take(starts + self.samples, mode="wrap")
        self.frame += n
        return scipy.fft.rfft(frames * self.window)

    def fill(self, frames: np.ndarray, tracks: np.ndarray) -> None:
        """Writes pulses and noise envelope into the windows [2, n, n_fft] of new frames.

        `tracks` [2, n] are log F0 and voicing at the centres of the frames.
        """
        hop_size, size = self.hop_size, self.known - self.hop_size
        if self.past is None:  # before the first centre, everything is constant
            f0, self.last = np.exp(tracks[0, :1]), tracks[:, :1]
            self.past = self.signals(f0, f0 / self.rate * self.samples[:size], tracks[1, :1])
            self.phase = f0 / self.rate * (size - self.before)
        points = np.concatenate([self.last, tracks], axis=1)
        self.last = points[:, -1:]
        steps = (points[:, 1:] - points[:, :-1])[:, :, None] * self.later
        f0, voicing = (points[:, :-1, None] + steps).reshape(2, -1)
        f0 = np.exp(f0)
        phase = np.concatenate([self.phase, self.phase + (f0 / self.rate).cumsum()])
        self.phase = phase[-1:]
        known = np.concatenate([self.past, self.signals(f0, phase[:-1], voicing)], axis=1)
        self.past = known[:, known.shape[1] - size :]
        f0, voicing = np.exp(tracks[0, :, None]), tracks[1, :, None]
        phase = phase[hop_size::hop_size, None] + f0 / self.rate * self.held
        frames[:, :, self.known :] = self.signals(f0, phase, voicing)
        for i in range(frames.shape[1]):
            frames[:, i, : self.known] = known[:, i * hop_size :][:, : self.known]

    def signals(self, f0: np.ndarray, phase: np.ndarray, voicing: np.ndarray) -> np.ndarray:
        """Returns `PulseTrain` and `burst_envelope` of F0, unwrapped phase and voicing, [2, ...].

        The arguments are in float64; F0 and voicing may be constant along time.
        """
        phase, f0, voicing = (
            x.astype(self.window.dtype) for x in (phase - np.rint(phase), f0, voicing)
        )
        half_angle, harmonics = math.pi * phase, 0.5 * self.rate / f0
        count, is_peak = np.floor(harmonics), np.abs(half_angle) < 1e-4
        sine = np.where(is_peak, 1, np.sin(half_angle))
        total = 0.5 * (np.sin((2 * count + 1) * half_angle) / sine - 1)
        total = np.where(is_peak, count, total)
        total += (harmonics - count) * np.cos(2 * (count + 1) * half_angle)
        cosine = np.cos(2 * half_angle)
        bursts = np.exp(BURST_SHARPNESS * (cosine - 1)) / BURST_RMS
        return np.stack([total / np.sqrt(0.5 * harmonics), 1 + voicing * (bursts - 1)])


def stream_steps(head: HarmonicNoiseHead, lookahead: int) -> int:
    """Returns the number of Griffin-Lim steps each time that a frame is completed.

    A frame takes part in the steps of the `lookahead` frames before it, so that it gets
    `griffin_lim_steps` in all, as in a whole mel.
    """
    return math.ceil(head.griffin_lim_steps / (lookahead + 1))


class GriffinLimStream:
    """Griffin-Lim with a bounded look-ahead.

    Frames are settled (completed) in order. A frame gets its steps together with the `lookahead`
    frames after it; settled frames do not change.
    """

    def __init__(self, head: HarmonicNoiseHead, lookahead: int):
        stft = head.stft
        self.window, self.overlap = to_array(stft.window), stft.overlap
        self.n_fft, self.hop_size, self.lookahead = stft.n_fft, stft.hop_size, lookahead
        self.steps = stream_steps(head, lookahead)
        # Phase, previous spectrum and magnitude of frames that are not settled.
        self.pending: list[np.ndarray] | None = None
        # The overlap-added settled frames, from the start of the first pending window to their end.
        self.tail = np.zeros(self.n_fft - self.hop_size, self.window.dtype)
        self.settled, self.normalisers = 0, {}
        self.to_skip, self.to_return = stft.margins[0], 0

    def __call__(self, spectrum: np.ndarray, magnitude: np.ndarray, is_last: bool) -> np.ndarray:
        """Takes spectra and magnitudes [n, bins]; returns the final samples [N]."""
        self.to_return += len(spectrum) * self.hop_size
        start = with_magnitude(spectrum, magnitude, floor_of(magnitude))
        self.append([start, start, magnitude])
        pieces, left = [self.tail[:0]], 0 if is_last else self.lookahead
        while len(self.pending[0]) > left:
            pieces.append(self.settle())
        if is_last:
            pieces.append(self.tail * self.normaliser(0)[: len(self.tail)])
        wav = np.concatenate(pieces)
        skipped = min(self.to_skip, len(wav))
        self.to_skip -= skipped
        wav = wav[skipped:][: self.to_return]
        self.to_return -= len(wav)
        return wav

    def append(self, frames: list[np.ndarray]) -> None:
        """Adds pending frames: phase, previous spectrum, magnitude."""
        if self.pending is not None:
            frames = [np.concatenate(pair) for pair in zip(self.pending, frames, strict=True)]
        self.pending = frames

    def settle(self) -> np.ndarray:
        """Settles the first pending frame; returns the hop of samples that it completes."""
        count, hop_size = min(len(self.pending[0]), self.lookahead + 1), self.hop_size
        phase, previous, magnitude = (x[:count] for x in self.pending)
        floor, normaliser = floor_of(magnitude), self.normaliser(count)
        for _ in range(self.steps):
            wav = self.overlap_add(with_magnitude(phase, magnitude, floor))
            wav *= normaliser
            windows = strided(wav, (count, self.n_fft), (hop_size, 1))
            spectrum = scipy.fft.rfft(windows * self.window)
            phase = previous + (1 + GRIFFIN_LIM_MOMENTUM) * (spectrum - previous)
            previous = spectrum
        wav = self.overlap_add(with_magnitude(phase[:1], magnitude[:1], floor[:1]))
        later = [x[count:] for x in self.pending]
        self.pending = [phase[1:], previous[1:], magnitude[1:]]
        if len(later[0]) > 0:
            self.append(later)
        self.tail = wav[hop_size:]
        piece = wav[:hop_size] * self.normaliser(1)[:hop_size]
        self.settled += 1
        return piece

    def overlap_add(self, spectrum: np.ndarray) -> np.ndarray:
        """Adds pending frames [n, bins] to the settled ones: [(n - 1) * hop_size + n_fft]."""
        frames = scipy.fft.irfft(spectrum, self.n_fft)
        frames *= self.window
        wav = np.zeros((len(frames) - 1) * self.hop_size + self.n_fft, frames.dtype)
        wav[: len(self.tail)] = self.tail
        for i, frame in enumerate(frames):
            wav[i * self.hop_size :][: self.n_fft] += frame
        return wav

    def normaliser(self, pending: int) -> np.ndarray:
        """Returns one over the sum of squared windows where `pending` frames follow the settled."""
        key = settled, pending = min(self.settled, self.overlap), pending
        if key not in self.normalisers:
            total = np.zeros((settled + pending) * self.hop_size + self.n_fft, self.window.dtype)
            for i in range(settled + pending):
                total[i * self.hop_size :][: self.n_fft] += self.window**2
            total = total[settled * self.hop_size :][: (pending - 1) * self.hop_size + self.n_fft]
            self.normalisers[key] = 1 / np.maximum(total, MIN_WINDOW_SUM)
        return self.normalisers[key]


def to_patches(maps: list[np.ndarray], conditioning: np.ndarray, patches: int) -> np.ndarray:
    """Returns `Refiner.to_patches` of maps [n, bins]: [n, patches, channels]."""
    parts = [x[:, : patches * PATCH_BINS].reshape(-1, patches, PATCH_BINS) for x in maps]
    return np.concatenate([*parts, conditioning.reshape(-1, patches, COND_CHANNELS)], axis=2)


def magnitude_of(x: np.ndarray) -> np.ndarray:
    """Returns |x| [...], at least EPSILON."""
    return np.maximum(np.abs(x), EPSILON)


def floor_of(magnitude: np.ndarray) -> np.ndarray:
    """Returns `harmonic.magnitude_floor` of a magnitude [...]."""
    return PHASE_SOFTNESS * (magnitude * magnitude) + EPSILON**2


def with_magnitude(x: np.ndarray, magnitude: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Returns `harmonic.with_magnitude` of arrays [...]."""
    power = np.abs(x)
    power *= power
    power *= 1 - PHASE_SOFTNESS
    power += floor
    np.sqrt(power, out=power)
    return x * np.divide(magnitude, power, out=power)
