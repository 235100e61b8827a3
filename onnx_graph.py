"""The generator in a form that ONNX Runtime runs fast: the same samples, with real tensors only.

Time is the last axis everywhere, so that nothing is transposed. Convolutions are two-dimensional,
over [B, C, rows, T], because ONNX Runtime has fast kernels for two dimensions only. The rows are
the inputs of a MISR's shared block or the patches of the refiner.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from harmonic import (
    COND_CHANNELS,
    EPSILON,
    GRIFFIN_LIM_MOMENTUM,
    LOG_MAG_SCALE,
    LRELU_SLOPE,
    MIN_WINDOW_SUM,
    PATCH_BINS,
    PHASE_SOFTNESS,
    STFT,
    HarmonicNoiseHead,
    Refiner,
    white_noise,
)
from models import MISR, POST_LRELU_SLOPE, Generator, time_padding


class TimeConv(nn.Module):
    """A convolution of models.py or harmonic.py on x [B, C, rows, T]; keeps the sizes."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d):
        super().__init__()
        self.before, self.after = time_padding(conv)[:2]
        is_line = isinstance(conv, nn.Conv1d)
        weight = conv.weight.unsqueeze(2) if is_line else conv.weight.transpose(2, 3)
        self.row_padding = 0 if is_line else conv.padding[1]
        self.dilation = (1, *conv.dilation) if is_line else conv.dilation[::-1]
        self.weight, self.bias = parameter(weight), conv.bias
        self.register_buffer("scale", None)  # of the input channels, [C, 1, 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.before == self.after:
            return self.convolve(x, self.before)
        return self.convolve(F.pad(x, (self.before, self.after)))

    def convolve(self, x: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """Convolves x, padded by so many samples before and after."""
        padding = (self.row_padding, padding)
        weight = self.weight if self.scale is None else self.weight * self.scale
        return F.conv2d(x, weight, self.bias, padding=padding, dilation=self.dilation)


class ResidualUnits(nn.Module):
    """The residual units of a ResBlock or a Refiner, on x [B, C, rows, T]."""

    def __init__(self, units: Sequence[Sequence[nn.Module]]):
        super().__init__()
        self.units = nn.ModuleList(nn.ModuleList(map(TimeConv, unit)) for unit in units)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self.units:
            y = x
            for conv in unit:
                y = conv(F.leaky_relu(y, LRELU_SLOPE))
            x = x + y
        return x


class RowMISR(nn.Module):
    """A MISR on x [B, C, 1, T]. The shared block runs on one row for each of the N inputs."""

    def __init__(self, misr: MISR):
        super().__init__()
        N, C = misr.num_inputs, misr.input_conv.in_channels
        self.num_inputs = N
        # The results of each channel follow one another: [B, C * N, 1, T] is [B, C, N, T].
        weight, bias = misr.input_conv.weight, misr.input_conv.bias
        self.weight = parameter(weight.reshape(N, C, C, 1, 1).transpose(0, 1).flatten(0, 1))
        self.bias = parameter(bias.reshape(N, C).T.flatten())
        self.resblock = ResidualUnits(misr.resblock.units())
        self.merge = None
        if misr.output_conv is not None:
            merge = misr.output_conv.weight.reshape(C, N, C).transpose(1, 2)
            self.merge, self.merge_bias = parameter(merge.unsqueeze(3)), misr.output_conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.resblock(self.input(x)))

    def input(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the N inputs of the shared block, [B, C, N, T], of x [B, C, 1, T]."""
        B, C, _, T = x.shape
        return F.conv2d(x, self.weight, self.bias).reshape(B, C, self.num_inputs, T)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Merges the N results [B, C, N, T] into [B, C, 1, T]."""
        if self.merge is None:
            return x.mean(2, keepdim=True)
        return F.conv2d(x, self.merge, self.merge_bias)


class Stage(nn.Module):
    """A stage of the generator on x [B, C, 1, T]: upsampling, if any, and a fusion block."""

    def __init__(self, up: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.up = up if isinstance(up, nn.ConvTranspose1d) else None
        is_misr = isinstance(blocks[0], MISR)
        self.misr = RowMISR(blocks[0]) if is_misr else None
        mrf = [] if is_misr else [ResidualUnits(block.units()) for block in blocks]
        self.mrf = nn.ModuleList(mrf)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up is not None:
            up = self.up
            x = F.conv_transpose1d(
                x.flatten(2), up.weight, up.bias, stride=up.stride, padding=up.padding
            ).unsqueeze(2)
        if self.misr is not None:
            return self.misr(x)
        return sum(block(x) for block in self.mrf) / len(self.mrf)


class GraphGenerator(nn.Module):
    """A Generator, mel [B, num_mels, T] -> wav [B, 1, N], for the exporter."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.min_log_mel, self.pad_post = generator.min_log_mel, generator.pad_post
        self.conv_pre = TimeConv(generator.conv_pre)
        self.stages = nn.ModuleList(Stage(up, blocks) for up, blocks in generator.stages())
        self.conv_post, self.head = TimeConv(generator.conv_post), generator.head
        if isinstance(generator.head, HarmonicNoiseHead):
            self.head = GraphHead(generator.head)
            channels = self.head.channels
            self.conv_post.weight = parameter(self.conv_post.weight[channels])
            self.conv_post.bias = parameter(self.conv_post.bias[channels])

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = mel if self.min_log_mel is None else mel.clamp(min=self.min_log_mel)
        x = self.conv_pre(x.unsqueeze(2))
        for stage in self.stages:
            x = stage(F.leaky_relu(x, LRELU_SLOPE))
        x = F.leaky_relu(x, POST_LRELU_SLOPE)
        x = self.pad_post(x.flatten(2)).unsqueeze(2)
        return self.head(self.conv_post(x).flatten(2), mel)


class GraphSTFT(nn.Module):
    """The STFT of harmonic.py and its inverse as small matrix products.

    forward(hops [B, hop_size, T + overlap]) -> Z [B, 2, positions, T], real and imaginary parts.

    A signal is given in columns of one hop each. With n_fft = N1 * N2, n = N2 * n1 + n2 and
    k = k1 + N1 * k2 (Cooley and Tukey, 1965),

        X[k] = sum over n2 of W(N2, n2 k2) * sum over n1 of window[n] W(n_fft, n k1) x[n]

    for W(N, m) = exp(-2 pi i m / N). The inner sum is a convolution of the hops, in N2 groups; the
    outer sum is one matrix product. As x is real, k1 = 0 ... N1 / 2 suffice: the others are
    conjugates. A spectrum stays in the order (k2, k1) of its positions; `bins` holds the bin of
    each position. A bin that two positions hold counts half in `inverse`. Where hop_size
    and n_fft have no large common divisor, the matrices are larger, up to a dense transform.
    """

    def __init__(self, stft: STFT):
        super().__init__()
        n_fft, hop_size = stft.n_fft, stft.hop_size
        self.n_fft, self.hop_size, self.margins = n_fft, hop_size, stft.margins
        self.groups = N2 = number_of_groups(n_fft, hop_size)
        N1, self.per_hop = n_fft // N2, hop_size // N2
        self.hops = stft.overlap + 1
        self.rows = N1 // 2 + 1  # of k1
        k1, n2 = torch.arange(self.rows), torch.arange(N2)
        # In the order of the convolution's weight: n2, k1, n1 within its hop, hop.
        n1 = torch.arange(self.hops * self.per_hop).reshape(self.hops, self.per_hop).T
        n = N2 * n1 + n2[:, None, None, None]
        window = F.pad(stft.window, (0, self.hops * hop_size - n_fft))
        self.register_buffer("n", n)
        self.register_buffer("window", window[n])
        self.register_buffer(
            "roots", torch.stack(roots_of_unity(torch.arange(n_fft), n_fft)).float()
        )
        re, im = roots_of_unity(n2[:, None] * n2, N2)  # [k2, n2]
        outer = torch.stack([torch.stack([re, -im], dim=2), torch.stack([im, re], dim=2)])
        self.register_buffer("outer", outer.reshape(2 * N2, 2 * N2).float())
        counts = torch.where((k1 == 0) | (2 * k1 == N1), 1, 2) / n_fft
        self.register_buffer("counts", counts.repeat(2 * N2)[:, None, None].float())
        squares = window.square().reshape(self.hops, self.per_hop, N2)
        self.register_buffer("squares", squares.permute(2, 1, 0).reshape(1, hop_size, -1))
        k = (k1 + N1 * n2[:, None]).flatten()
        self.bins = torch.minimum(k, n_fft - k)

    def prepare(self) -> None:
        """Computes the weights of the two convolutions.

        Runtimes do it once, when they load the file, which is smaller without them.
        """
        powers = self.n * torch.arange(self.rows)[:, None, None] % self.n_fft
        inner = torch.cat([self.roots[0][powers], self.roots[1][powers]], dim=1) * self.window
        self.inner = inner.flatten(0, 1)
        self.inverse_inner = self.inner * self.counts

    def forward(self, hops: torch.Tensor) -> torch.Tensor:
        B, frames = hops.shape[0], hops.shape[2] - self.hops + 1
        x = F.conv1d(hops, self.inner, groups=self.groups)
        x = self.outer @ x.reshape(B, 2 * self.groups, -1)
        return x.reshape(B, 2, self.groups * self.rows, frames)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Returns the overlap-added hops [B, hop_size, T + overlap] of Z [B, 2, positions, T]."""
        B, frames = z.shape[0], z.shape[3]
        x = self.outer.T @ z.reshape(B, 2 * self.groups, -1)
        x = x.reshape(B, 2 * self.groups * self.rows, frames)
        return F.conv_transpose1d(x, self.inverse_inner, groups=self.groups)

    def normaliser(self, valid: torch.Tensor) -> torch.Tensor:
        """Returns one over the sum of squared windows of the valid frames [B, 1, T], 1 or 0."""
        return F.conv_transpose1d(valid, self.squares).clamp(min=MIN_WINDOW_SUM).reciprocal()

    def to_hops(self, wav: torch.Tensor) -> torch.Tensor:
        """Returns wav [B, n * hop_size] in columns, [B, hop_size, n]."""
        wav = wav.reshape(wav.shape[0], -1, self.per_hop, self.groups)
        return wav.permute(0, 3, 2, 1).flatten(1, 2)

    def to_wav(self, hops: torch.Tensor) -> torch.Tensor:
        """Inverts `to_hops`."""
        hops = hops.reshape(hops.shape[0], self.groups, self.per_hop, -1)
        return hops.permute(0, 3, 2, 1).flatten(1)


def number_of_groups(n_fft: int, hop_size: int) -> int:
    """Returns the N2 with the fewest multiplications: a divisor of n_fft and hop_size."""
    common = math.gcd(n_fft, hop_size)
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    return min(divisors, key=lambda n2: n_fft // n2 + 2 * n2)


def roots_of_unity(powers: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the real and imaginary parts of exp(-2 pi i p / n), float64, for integers p [...]."""
    angle = -2 * math.pi * (powers % n).double() / n
    return angle.cos(), angle.sin()


class GraphHead(nn.Module):
    """A HarmonicNoiseHead, x [B, channels, T] and mel [B, num_mels, T] -> wav [B, 1, N].

    Its bins are in the order of the refiner: bin 4 p + q is at position q * patches + p. `channels`
    is the order in which conv_post gives its channels.
    """

    def __init__(self, head: HarmonicNoiseHead):
        super().__init__()
        self.stft, self.source = GraphSTFT(head.stft), GraphSource(head)
        self.refiner = GraphRefiner(head.refiner)
        self.griffin_lim_steps, self.max_log_magnitude = (
            head.griffin_lim_steps,
            head.max_log_magnitude,
        )
        bins, patches = head.stft.n_fft // 2 + 1, head.refiner.patches
        order = torch.arange(bins)
        in_patches = order[: patches * PATCH_BINS].reshape(patches, PATCH_BINS).T.flatten()
        order = torch.cat([in_patches, order[patches * PATCH_BINS :]])
        conditioning = torch.arange(COND_CHANNELS * patches).reshape(patches, -1).T.flatten()
        self.splits, parts, first = head.splits, [], 0
        for size, part in zip(
            head.splits, (order, order, torch.arange(head.splits[2]), conditioning), strict=True
        ):
            parts.append(first + part)
            first += size
        self.channels = torch.cat(parts)
        self.mel_power, self.mel_floor = head.mel_power, head.mel_floor
        self.min_log_mel, self.log_amplitude_scale = head.min_log_mel, head.log_amplitude_scale
        self.register_buffer("filterbank", head.filterbank.T[:, order].contiguous())
        self.register_buffer("mel_to_bins", head.mel_to_bins.T[order].contiguous())
        voicing = (order < head.voicing_bins).float() / head.voicing_bins
        self.register_buffer("voicing_weights", voicing[None])
        position = torch.empty(bins, dtype=torch.long)
        position[order] = torch.arange(bins)
        self.register_buffer("to_stft", position[self.stft.bins])
        where = {int(k): i for i, k in enumerate(self.stft.bins)}
        self.register_buffer("to_bins", torch.tensor([where[int(k)] for k in order]))

    def forward(self, x: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
        self.prepare()
        correction, aperiodicity, f0, conditioning = x.split(self.splits, dim=1)
        aperiodicity = aperiodicity.sigmoid()
        pulses, noise = self.source(f0, self.voicing(aperiodicity))
        pulses, noise = (self.stft(self.stft.to_hops(wav)) for wav in (pulses, noise))
        spectrum, log_magnitude, patches = self.unrefined(
            pulses, noise, correction, aperiodicity, mel, conditioning
        )
        magnitude = self.magnitude(log_magnitude + self.refiner(patches))
        wav = self.stft.to_wav(self.griffin_lim(spectrum, magnitude))
        before, after = self.stft.margins
        return wav[:, None, before : wav.shape[1] - after]

    def prepare(self) -> None:
        """Computes what does not depend on the input; must come first."""
        self.stft.prepare()
        self.source.prepare()

    def voicing(self, aperiodicity: torch.Tensor) -> torch.Tensor:
        """Returns how voiced each frame is, [B, 1, T]."""
        return 1 - self.voicing_weights @ aperiodicity

    def unrefined(self, pulses, noise, correction, aperiodicity, mel, conditioning):
        """Returns Z of S, its log magnitude before the refiner, and the refiner's input."""
        mel = self.log_amplitude_scale * mel.clamp(min=self.min_log_mel)
        share = aperiodicity[:, self.to_stft].unsqueeze(1)
        spectrum = (1 - share.square()).sqrt() * pulses + share * noise
        powers = [self.power(z) for z in (spectrum, pulses, noise)]
        magnitude = powers[0].sqrt()
        bands = self.filterbank @ (magnitude if self.mel_power == 1 else powers[0])
        log_mel = bands.clamp(min=self.mel_floor).log() / self.mel_power
        levels = self.mel_to_bins @ mel
        gain = levels - self.mel_to_bins @ log_mel
        log_magnitude = magnitude.log() + gain + correction
        maps = (log_magnitude, powers[1].log(), powers[2].log(), gain, levels, aperiodicity)
        return spectrum, log_magnitude, self.refiner.to_patches(maps, conditioning)

    def power(self, z: torch.Tensor) -> torch.Tensor:
        """Returns the power [B, bins, T] of Z, at least EPSILON squared."""
        return power_of(z)[:, 0, self.to_bins].clamp(min=EPSILON**2)

    def magnitude(self, log_magnitude: torch.Tensor) -> torch.Tensor:
        """Returns the magnitude [B, 1, positions, T], limited to that of a waveform in [-1, 1]."""
        magnitude = log_magnitude.clamp(max=self.max_log_magnitude).exp()
        return magnitude[:, self.to_stft].unsqueeze(1)

    def griffin_lim(self, spectrum: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """Returns the hops [B, hop_size, T + overlap] after all steps, from the phase of Z."""
        valid = torch.ones_like(magnitude[:1, :, 0])
        normaliser = self.stft.normaliser(valid)
        power = power_of(spectrum).clamp(min=EPSILON**2)
        phase, previous = spectrum * (magnitude / power.sqrt()), None
        phase_to_magnitude = WithMagnitude(magnitude)
        for step in range(self.griffin_lim_steps):
            wav = (
                self.stft.inverse(phase_to_magnitude(phase, is_extrapolated=step > 1)) * normaliser
            )
            spectrum = self.stft(wav)
            phase = spectrum if step == 0 else extrapolate(previous, spectrum)
            previous = spectrum
        is_extrapolated = self.griffin_lim_steps > 1
        return self.stft.inverse(phase_to_magnitude(phase, is_extrapolated)) * normaliser


# lerp(previous, spectrum, 1 + m) is (1 + m) * (spectrum - m / (1 + m) * previous). The factor
# 1 + m does not change the phase; WithMagnitude accounts for it.
SCALE = 1 + GRIFFIN_LIM_MOMENTUM


def extrapolate(previous: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    """Returns the spectrum that the momentum extrapolates, divided by SCALE."""
    return spectrum - previous * (GRIFFIN_LIM_MOMENTUM / SCALE)


def power_of(z: torch.Tensor) -> torch.Tensor:
    """Returns the power [B, 1, positions, T] of Z [B, 2, positions, T]."""
    squares = z.square()
    return squares[:, :1] + squares[:, 1:]  # faster than a sum over an axis of two


class WithMagnitude:
    """`with_magnitude` of harmonic.py for several phases and one magnitude [B, 1, positions, T]."""

    def __init__(self, magnitude: torch.Tensor):
        share = 1 - PHASE_SOFTNESS
        floor = magnitude.square() * (PHASE_SOFTNESS / share) + EPSILON**2 / share
        self.magnitude = magnitude * share**-0.5
        self.floor, self.scaled_floor = floor, floor * SCALE**-2

    def __call__(self, z: torch.Tensor, is_extrapolated: bool) -> torch.Tensor:
        floor = self.scaled_floor if is_extrapolated else self.floor
        return z * (self.magnitude / (floor + power_of(z)).sqrt())


class GraphSource(nn.Module):
    """Computes pulses and noise, [B, N + margins] each, from F0 candidates and voicing."""

    def __init__(self, head: HarmonicNoiseHead):
        super().__init__()
        self.margins, self.hop_size = head.stft.margins, head.hop_size
        self.pulse_train, self.burst_envelope = head.pulse_train, head.burst_envelope
        self.sampling_rate = head.pulse_train.sampling_rate
        self.register_buffer("log_f0_candidates", head.log_f0_candidates[None])
        self.register_buffer("weights", head.pulse_train.weights[::2].float())
        # From the centre of a frame to that of the next, the weights of the next, in float64.
        half = (head.hop_size + 1) // 2
        later = torch.cat([head.pulse_train.weights[2, half:], head.pulse_train.weights[1, :half]])
        self.register_buffer("later", later)
        # The positions of the samples of each hop; the first starts the margin before frame 0.
        starts = torch.arange(0, len(head.noise), self.hop_size) - self.margins[0]
        self.register_buffer("hop_starts", starts[:, None])
        self.register_buffer("in_hop", torch.arange(self.hop_size))

    def prepare(self) -> None:
        """Computes the noise [frames, hop_size], as GraphSTFT.prepare does its weights."""
        samples = self.hop_starts.numel() * self.hop_size
        self.noise = white_noise((self.hop_starts + self.in_hop) % samples)

    def forward(self, f0: torch.Tensor, voicing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_f0 = self.log_f0(f0)
        at_centre = log_f0.exp().float()
        f0 = self.with_margins((at_centre.transpose(1, 2) * self.change(log_f0).exp()).flatten(1))
        voicing = (voicing.transpose(1, 2) + self.change(voicing)).flatten(1)
        wrapped_phase = self.wrapped_phase(f0)
        envelope = self.burst_envelope(wrapped_phase, self.with_margins(voicing))
        return self.pulse_train(f0, wrapped_phase), self.noise_like(f0) * envelope

    def log_f0(self, x: torch.Tensor) -> torch.Tensor:
        """Returns log F0 [B, 1, T] in float64, from the scores [B, F0_CANDIDATES, T]."""
        return self.log_f0_candidates @ x.double().softmax(1)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the linear interpolation of x [B, 1, T] minus x, [B, T, hop_size], in float32."""
        first, last = x[:, :, :1], x[:, :, -1:]
        before, after = torch.cat([first, x[:, :, :-1]], 2), torch.cat([x[:, :, 1:], last], 2)
        changes = torch.cat([before - x, after - x], dim=1).float()
        return changes.transpose(1, 2) @ self.weights

    def with_margins(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x.unsqueeze(1), self.margins, mode="replicate")[:, 0]

    def wrapped_phase(self, f0: torch.Tensor) -> torch.Tensor:
        """Returns the wrapped phase [B, N + margins] in cycles; 0 at the first frame's start."""
        cycles = f0.double() / self.sampling_rate
        phase = cycles.cumsum(1) - cycles
        phase = phase - phase[:, self.margins[0], None]
        return (phase - phase.round()).float()

    def noise_like(self, x: torch.Tensor) -> torch.Tensor:
        """Returns as much noise [N + margins] as x [B, N + margins] is long."""
        hops = torch.arange(x.shape[1] // self.hop_size) % len(self.noise)
        return self.noise[hops].flatten()


class GraphRefiner(nn.Module):
    """A Refiner, patches [B, channels, patches, T] -> [B, bins, T]."""

    def __init__(self, refiner: Refiner):
        super().__init__()
        self.bins, self.patches = refiner.bins, refiner.patches
        self.conv_pre, self.resblock = TimeConv(refiner.conv_pre), ResidualUnits(refiner.units())
        self.weight = parameter(refiner.linear_post.weight[:, :, None, None])
        self.bias = refiner.linear_post.bias
        # ONNX Runtime is ten times as slow where the channels are no multiple of four.
        self.to_fill = -self.conv_pre.weight.shape[1] % 4
        self.conv_pre.weight = parameter(F.pad(self.conv_pre.weight, (0, 0, 0, 0, 0, self.to_fill)))
        # Refiner divides its maps by LOG_MAG_SCALE; and log powers are twice log magnitudes.
        scale = torch.tensor([1, 0.5, 0.5, 1, 1, LOG_MAG_SCALE]) / LOG_MAG_SCALE
        scale = torch.cat(
            [scale.repeat_interleave(PATCH_BINS), torch.ones(COND_CHANNELS + self.to_fill)]
        )
        self.conv_pre.scale = scale[:, None, None]

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.to_bins(self.resblock(self.conv_pre(patches)))

    def to_patches(self, maps: Sequence[torch.Tensor], conditioning: torch.Tensor):
        """Returns the input of conv_pre; see Refiner.to_patches."""
        parts = [each[:, : self.patches * PATCH_BINS] for each in maps]
        filling = conditioning[:, : self.to_fill * self.patches]  # with weights of zero
        x = torch.cat([*parts, conditioning, filling], dim=1)
        return x.reshape(x.shape[0], -1, self.patches, x.shape[2])

    def to_bins(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the refinement [B, bins, T] from the last features [B, C, patches, T]."""
        x = F.conv2d(F.leaky_relu(x, LRELU_SLOPE), self.weight, self.bias).flatten(1, 2)
        return F.pad(x, (0, 0, 0, self.bins - x.shape[1]))


def parameter(weight: torch.Tensor) -> nn.Parameter:
    """Returns a parameter with memory of its own."""
    weight = weight.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(weight, requires_grad=False)
