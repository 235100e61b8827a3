"""Synthesis while the mel is still being made: every frame passes through every layer once.

    streamer = Streamer(generator)
    for mel in acoustic_model:          # [num_mels, n], any n
        play(streamer.feed(mel))        # [samples], those that are final
    play(streamer.flush())              # the rest; the next feed starts a new mel

Each layer keeps what it needs of its past: a convolution the last samples of its input, a
transposed convolution the tail of its output, the frame-rate head the phase of its pulse train, its
position in the noise and the frames that Griffin-Lim has not settled yet.

The samples do not depend on how the mel is cut. With a tanh or an iSTFT head they equal those of
the whole mel, to rounding. Frame-rate generators run Griffin-Lim frame by frame with a bounded
look-ahead instead of over the whole mel.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from harmonic import (
    GRIFFIN_LIM_MOMENTUM,
    LRELU_SLOPE,
    MIN_WINDOW_SUM,
    Excitation,
    HarmonicNoiseHead,
    with_magnitude,
)
from models import MISR, POST_LRELU_SLOPE, Generator, ISTFTHead, TanhHead, time_padding

GRIFFIN_LIM_LOOKAHEAD = 3  # frames


class Streamer:
    """Synthesizes a mel that arrives in pieces; see the head of this file.

    Several streamers may share a generator. `latency` is the algorithmic latency in frames: how
    many frames after its own must arrive before a sample is final.

    Args:
        generator: as from `load_generator`.
        griffin_lim_lookahead: frames after its own that Griffin-Lim waits for to settle a frame;
            for frame-rate generators only.
    """

    def __init__(self, generator: Generator, griffin_lim_lookahead: int = GRIFFIN_LIM_LOOKAHEAD):
        self.generator = generator
        self.griffin_lim_lookahead = griffin_lim_lookahead
        self.num_mels = generator.conv_pre.in_channels
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the next frame is the first of a new mel."""
        generator = self.generator
        self.conv_pre = ConvStream(generator.conv_pre)
        self.stages = [StageStream(up, blocks) for up, blocks in generator.stages()]
        is_padded = isinstance(generator.pad_post, nn.ReflectionPad1d)
        self.pad_post = ReflectedStart() if is_padded else None
        self.conv_post = ConvStream(generator.conv_post)
        self.head = head_stream(generator.head, self.griffin_lim_lookahead)
        self.frames = 0

    @property
    def latency(self) -> int:
        """The number of frames after its own that a sample waits for."""
        after = self.generator.receptive_field[1]
        if isinstance(self.head, HarmonicStream):
            after += self.head.latency - self.generator.head.receptive_field[1]
        return after

    def feed(self, mel: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Takes frames [num_mels, n] or [1, num_mels, n]; returns the samples [N] that are final.

        Raises:
            TypeError: not a tensor or array of real numbers.
            ValueError: another shape, NaN or infinity.
        """
        return self._advance(as_mel(mel, self.num_mels), is_last=False)

    def flush(self, mel: torch.Tensor | np.ndarray | None = None) -> torch.Tensor:
        """Takes the last frames, if any; returns the remaining samples [N] and starts a new mel.

        Raises:
            TypeError, ValueError: as `feed`.
        """
        mel = torch.zeros(self.num_mels, 0) if mel is None else as_mel(mel, self.num_mels)
        if self.frames + mel.shape[1] == 0:
            return torch.zeros(0, device=self.generator.conv_post.bias.device)
        wav = self._advance(mel, is_last=True)
        self.reset()
        return wav

    @torch.inference_mode()
    def _advance(self, mel: torch.Tensor, is_last: bool) -> torch.Tensor:
        generator = self.generator
        self.frames += mel.shape[1]
        mel = mel.to(generator.conv_post.bias.device).unsqueeze(0)
        x = mel if generator.min_log_mel is None else mel.clamp(min=generator.min_log_mel)
        x = self.conv_pre(x.to(generator.conv_pre.bias.dtype), is_last)
        for stage in self.stages:
            x = stage(F.leaky_relu(x, LRELU_SLOPE), is_last)
        x = F.leaky_relu(x, POST_LRELU_SLOPE).to(generator.conv_post.bias.dtype)
        if self.pad_post is not None:
            x = self.pad_post(x)
        return self.head(self.conv_post(x, is_last), mel, is_last)


def as_mel(mel: torch.Tensor | np.ndarray, num_mels: int) -> torch.Tensor:
    """Returns a tensor or NumPy array [num_mels, T] or [1, num_mels, T] as float32 [num_mels, T].

    Raises:
        TypeError: not a tensor or array of real numbers.
        ValueError: another shape, NaN or infinity.
    """
    if isinstance(mel, np.ndarray):
        mel = mel.copy()  # torch takes no array with negative strides
    try:
        mel = torch.as_tensor(mel).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"a mel of type {type(mel).__name__}: expected a tensor") from None
    if mel.is_complex() or mel.dtype == torch.bool:
        raise TypeError(f"a mel of {mel.dtype}: expected real numbers")
    shape = list(mel.shape)
    if mel.dim() == 3 and shape[0] == 1:
        mel = mel[0]
    if mel.dim() != 2 or mel.shape[0] != num_mels:
        raise ValueError(f"mel of shape {shape}: expected [{num_mels}, T] or [1, {num_mels}, T]")
    mel = mel.float()  # 1e39 becomes infinite
    if not mel.isfinite().all():
        raise ValueError("mel holds NaN or infinity")
    return mel


# ------------------------------------------------------------------------------------------ layers
#
# Each is called with the next piece x [B, C, n, ...], n >= 0, and returns the outputs that are
# final. After the piece with is_last=True, all outputs have been returned.


class ConvStream:
    """Runs a convolution that keeps the length, of models.py or harmonic.py, piece by piece."""

    def __init__(self, conv: nn.Module, batch: int = 1):
        self.conv, self.batch = conv, batch
        self.before, self.after = time_padding(conv)[:2]
        self.past = None

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        conv = self.conv
        if self.before + self.after == 0:
            return conv(x)
        if self.past is None:
            self.past = x.new_zeros(*x.shape[:2], self.before, *x.shape[3:])
        x = torch.cat([self.past, x], dim=2)
        if is_last:
            padding = x.new_zeros(*x.shape[:2], self.after, *x.shape[3:])
            x = torch.cat([x, padding], dim=2)
        context = self.before + self.after
        self.past = x[:, :, max(0, x.shape[2] - context) :]
        if x.shape[2] <= context:
            return x.new_zeros(x.shape[0], conv.out_channels, 0, *x.shape[3:])
        if x.dim() == 4:
            return F.conv2d(
                x, conv.weight, conv.bias, padding=(0, conv.padding[1]), dilation=conv.dilation
            )
        return F.conv1d(x, conv.weight, conv.bias, dilation=conv.dilation)


class Delay:
    """Keeps pieces [B, C, n, ...] until as many positions are asked for."""

    def __init__(self, dim: int = 2):
        self.dim, self.kept = dim, None

    def __call__(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Appends x and takes the first `count` positions out."""
        if self.kept is not None and self.kept.shape[self.dim] > 0:
            x = torch.cat([self.kept, x], dim=self.dim)
        size = x.shape[self.dim]
        self.kept = x.narrow(self.dim, count, size - count)
        return x.narrow(self.dim, 0, count)


class ResidualStream:
    """Runs residual units, each x + conv(lrelu(conv(lrelu(x)))) or x + conv(lrelu(x))."""

    def __init__(self, units: Sequence[Sequence[nn.Module]]):
        self.units = [([ConvStream(conv) for conv in unit], Delay()) for unit in units]

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        for convs, delay in self.units:
            y = x
            for conv in convs:
                y = conv(F.leaky_relu(y, LRELU_SLOPE), is_last)
            x = delay(x, y.shape[2]) + y
        return x


class MISRStream:
    """Runs a MISR piece by piece: the shared block keeps the past of its N inputs."""

    def __init__(self, misr: MISR):
        self.misr, self.resblock = misr, ResidualStream(misr.resblock.units())

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        misr, N = self.misr, self.misr.num_inputs
        y = misr.input_conv(x).reshape(N, x.shape[1], x.shape[2])
        y = self.resblock(y, is_last)
        if misr.output_conv is None:
            return y.mean(0, keepdim=True)
        return misr.output_conv(y.reshape(1, -1, y.shape[2]))


class MRFStream:
    """Runs the residual blocks of an MRF, whose outputs come after different delays."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = [(ResidualStream(block.units()), Delay()) for block in blocks]
        self.waiting = [0] * len(self.blocks)

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        outputs = [block(x, is_last) for block, _ in self.blocks]
        ready = [n + y.shape[2] for n, y in zip(self.waiting, outputs, strict=True)]
        count = min(ready)
        self.waiting = [n - count for n in ready]
        delays = [delay for _, delay in self.blocks]
        return sum(delay(y, count) for delay, y in zip(delays, outputs, strict=True)) / len(outputs)


class UpsamplingStream:
    """Runs a transposed convolution: outputs are final once no later input reaches them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rate: int, padding: int):
        self.weight, self.bias = weight, None if bias is None else bias[:, None]
        self.rate, self.padding, self.to_skip = rate, padding, padding
        self.tail = weight.new_zeros(1, weight.shape[1], weight.shape[2] - rate)

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        y, count = self.tail, x.shape[2] * self.rate
        if count > 0:
            y = F.conv_transpose1d(x, self.weight, stride=self.rate)
            y[:, :, : self.tail.shape[2]] += self.tail
        self.tail = y[:, :, count:]
        if is_last:
            count = y.shape[2] - self.padding
        y = y[:, :, min(self.to_skip, count) : count]
        self.to_skip -= count - y.shape[2]
        return y if self.bias is None else y + self.bias


class StageStream:
    """Runs a stage of the generator: upsampling, if any, and a fusion block."""

    def __init__(self, up: nn.Module, blocks: Sequence[nn.Module]):
        self.up = None
        if isinstance(up, nn.ConvTranspose1d):
            self.up = UpsamplingStream(up.weight, up.bias, rate=up.stride[0], padding=up.padding[0])
        is_misr = isinstance(blocks[0], MISR)
        self.fusion = MISRStream(blocks[0]) if is_misr else MRFStream(blocks)

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        return self.fusion(x if self.up is None else self.up(x, is_last), is_last)


class ReflectedStart:
    """Puts the second position before the first one, as ReflectionPad1d((1, 0)) does."""

    def __init__(self):
        self.first, self.is_done = None, False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_done:
            return x
        x = x if self.first is None else torch.cat([self.first, x], dim=2)
        self.first, self.is_done = x, x.shape[2] > 1
        return torch.cat([x[:, :, 1:2], x], dim=2) if self.is_done else x[:, :, :0]


# ------------------------------------------------------------------------------------------- heads
#
# Each is called with the next piece of the generator's features, x [1, C, n], and the next frames
# of the mel, [1, num_mels, m], and returns the final samples [N].


def head_stream(
    head: nn.Module, griffin_lim_lookahead: int
) -> "TanhStream | ISTFTStream | HarmonicStream":
    """Returns the stream of a generator's head."""
    if isinstance(head, TanhHead):
        return TanhStream()
    if isinstance(head, ISTFTHead):
        return ISTFTStream(head)
    return HarmonicStream(head, griffin_lim_lookahead)


class TanhStream:
    """Streams a TanhHead."""

    def __call__(self, x: torch.Tensor, mel: torch.Tensor, is_last: bool) -> torch.Tensor:
        return torch.tanh(x)[0, 0]


class ISTFTStream:
    """Streams an ISTFTHead: two overlap-adds, of the spectrum and of the squared windows."""

    def __init__(self, head: ISTFTHead):
        self.head = head
        self.overlap_add, self.window_sum = (
            UpsamplingStream(frames, None, rate=head.hop_size, padding=head.n_fft // 2)
            for frames in (head.basis, head.squared_window)
        )

    def __call__(self, x: torch.Tensor, mel: torch.Tensor, is_last: bool) -> torch.Tensor:
        ones = torch.ones_like(x[:, :1])
        wav = self.overlap_add(self.head.to_spectrum(x), is_last)
        return (wav / self.window_sum(ones, is_last))[0, 0]


class HarmonicStream:
    """Streams a HarmonicNoiseHead, with Griffin-Lim frame by frame."""

    def __init__(self, head: HarmonicNoiseHead, lookahead: int):
        self.head = head
        self.excitation = ExcitationStream(head)
        refiner = head.refiner
        self.refiner_pre, self.refiner = (
            ConvStream(refiner.conv_pre),
            ResidualStream(refiner.units()),
        )
        self.griffin_lim = GriffinLimStream(head, lookahead)
        self.mel, self.spectrum, self.log_magnitude = Delay(), Delay(dim=1), Delay(dim=1)

    @property
    def latency(self) -> int:
        """The number of frames of x after its own that a sample waits for."""
        stft = self.head.stft
        window = math.ceil(stft.margins[0] / stft.hop_size)
        return window + self.griffin_lim.lookahead + self.head.refiner.receptive_field[1]

    def __call__(self, x: torch.Tensor, mel: torch.Tensor, is_last: bool) -> torch.Tensor:
        head, refiner = self.head, self.head.refiner
        mel = self.mel(mel, x.shape[2])  # the mel is ahead of x by the look-ahead of the network
        spectrum, log_magnitude, patches = head.unrefined(x, mel, self.excitation(x))
        patches = self.refiner(self.refiner_pre(patches, is_last), is_last)
        spectrum = self.spectrum(spectrum, patches.shape[2])
        log_magnitude = self.log_magnitude(log_magnitude, patches.shape[2])
        log_magnitude = log_magnitude + refiner.to_bins(patches).to(x.dtype)
        return self.griffin_lim(spectrum[0], head.magnitude(log_magnitude[0]), is_last)


class ExcitationStream:
    """Computes pulses and noise frame by frame.

    The window of a frame extends beyond the frame. There F0 and voicing are held at the frame's
    own values, so that its spectrum waits for no later frame.
    """

    def __init__(self, head: HarmonicNoiseHead):
        self.head, self.frames = head, 0
        stft, hop_size = head.stft, head.hop_size
        # Of a window, the samples up to the centre of its frame, and those after it.
        self.known = stft.margins[0] + (hop_size + 1) // 2
        self.held = stft.n_fft - self.known
        weights = head.pulse_train.weights
        # Between two centres: the second half of a frame, then the first half of the next one.
        half = (hop_size + 1) // 2
        later = torch.cat([weights[2, half:], weights[1, :half]])
        self.later = later
        self.past = None

    def __call__(self, x: torch.Tensor) -> Excitation:
        head, stft, n = self.head, self.head.stft, x.shape[2]
        log_f0, aperiodicity = head.f0_aperiodicity(x)
        if n == 0:
            nothing = torch.zeros_like(aperiodicity, dtype=torch.complex64)
            return Excitation(nothing, nothing, aperiodicity)
        f0, phase, voicing = self.windows(log_f0[0], head.voicing(aperiodicity)[0].double())
        wrapped_phase = (phase - phase.round()).to(x.dtype)
        f0, voicing = f0.to(x.dtype), voicing.to(x.dtype)
        samples = torch.arange(stft.n_fft, device=x.device) - stft.margins[0]
        frames = torch.arange(self.frames, self.frames + n, device=x.device)
        samples = samples + head.hop_size * frames[:, None]
        noise = head.noise[samples % len(head.noise)] * head.burst_envelope(wrapped_phase, voicing)
        pulses = head.pulse_train(f0, wrapped_phase)
        self.frames += n
        spectra = torch.fft.rfft(torch.stack([pulses, noise]) * stft.window)
        return Excitation(spectra[:1], spectra[1:], aperiodicity)

    def windows(
        self, log_f0: torch.Tensor, voicing: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns F0, unwrapped phase and voicing [n, n_fft] in the windows of n new frames [n]."""
        head, hop_size = self.head, self.head.hop_size
        rate = head.pulse_train.sampling_rate
        tracks = torch.stack([log_f0, voicing])  # [2, n]
        if self.past is None:
            tracks = torch.cat([tracks[:, :1], tracks], dim=1)
        else:
            tracks = torch.cat([self.last, tracks], dim=1)
        self.last = tracks[:, -1:]
        # From the centre of a frame to that of the next, [2, n * hop_size].
        between = torch.lerp(tracks[:, :-1, None], tracks[:, 1:, None], self.later).flatten(1)
        f0, voicing = between[0].exp(), between[1]
        cycles = f0 / rate
        if self.past is None:  # F0 and voicing are constant before the first centre
            size = self.known - hop_size
            start = cycles[0] * -(self.known - (hop_size + 1) // 2)
            before = start + cycles[0] * torch.arange(size, device=f0.device)
            self.past = torch.stack([f0[:1].expand(size), before, voicing[:1].expand(size)])
            self.phase = start + cycles[0] * size
        phase = self.phase + cycles.cumsum(0) - cycles
        self.phase = phase[-1] + cycles[-1]
        known = torch.cat([self.past, torch.stack([f0, phase, voicing])], dim=1)
        self.past = known[:, known.shape[1] - (self.known - hop_size) :]
        known = known.unfold(1, self.known, hop_size)  # [3, n, known]
        own_f0, own_voicing = tracks[0, 1:].exp(), tracks[1, 1:]
        # The first held sample is one sample after the last known one.
        steps = torch.arange(1, self.held + 1, device=f0.device)
        last_cycles = known[0, :, -1] / rate
        first_phase = known[1, :, -1] + last_cycles
        held_phase = first_phase[:, None] + own_f0[:, None] / rate * (steps - 1)
        held = torch.stack(
            [
                own_f0[:, None].expand(-1, self.held),
                held_phase,
                own_voicing[:, None].expand(-1, self.held),
            ]
        )
        f0, phase, voicing = torch.cat([known, held], dim=2)
        return f0, phase, voicing


class GriffinLimStream:
    """Griffin-Lim with a bounded look-ahead.

    Frames are settled one after the other. A frame gets its steps together with the `lookahead`
    frames after it, while the settled frames before it stay as they were returned. In all, a frame
    gets about as many steps as over a whole mel.
    """

    def __init__(self, head: HarmonicNoiseHead, lookahead: int):
        self.stft, self.lookahead = head.stft, lookahead
        self.steps = max(1, round(head.griffin_lim_steps / (lookahead + 1)))
        n_fft, hop_size = self.stft.n_fft, self.stft.hop_size
        self.settled = 0
        # The overlap-added settled frames, from the start of the first pending window on.
        self.tail = self.stft.window.new_zeros(n_fft - hop_size)
        self.pending = None  # phase, previous, magnitude
        self.normalisers = {}
        self.to_skip, self.to_return = self.stft.margins[0], 0

    def __call__(
        self, spectrum: torch.Tensor, magnitude: torch.Tensor, is_last: bool
    ) -> torch.Tensor:
        """Takes spectra and magnitudes [n, bins]; returns the final samples [N]."""
        self.to_return += len(spectrum) * self.stft.hop_size
        if len(spectrum):
            start = with_magnitude(spectrum, magnitude)
            frames = (start, start, magnitude)
            if self.pending is not None:
                frames = [torch.cat(pair) for pair in zip(self.pending, frames, strict=True)]
            self.pending = frames
        pieces = []
        while self.pending is not None and len(self.pending[0]) > (
            0 if is_last else self.lookahead
        ):
            pieces.append(self.settle())
        if is_last:
            pieces.append(self.tail * self.normaliser(0)[: len(self.tail)])
        wav = torch.cat(pieces) if pieces else self.tail[:0]
        skipped = min(self.to_skip, len(wav))
        self.to_skip -= skipped
        wav = wav[skipped:][: self.to_return]
        self.to_return -= len(wav)
        return wav

    def settle(self) -> torch.Tensor:
        """Settles the first pending frame; returns the hop of samples that it completes."""
        stft, hop_size = self.stft, self.stft.hop_size
        count = min(len(self.pending[0]), self.lookahead + 1)
        phase, previous, magnitude = (x[:count] for x in self.pending)
        normaliser = self.normaliser(count)
        for _ in range(self.steps):
            wav = self.overlap_add(phase, magnitude) * normaliser
            spectrum = torch.fft.rfft(wav.unfold(0, stft.n_fft, hop_size) * stft.window)
            phase = torch.lerp(previous, spectrum, 1 + GRIFFIN_LIM_MOMENTUM)
            previous = spectrum
        wav = self.overlap_add(phase[:1], magnitude[:1])
        self.pending = [
            torch.cat([new[1:], old[count:]])
            for new, old in zip((phase, previous, magnitude), self.pending, strict=True)
        ]
        piece = wav[:hop_size] * self.normaliser(1)[:hop_size]
        self.tail = wav[hop_size:]
        self.settled += 1
        return piece

    def overlap_add(self, phase: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """Adds pending frames [n, bins] to the settled ones: [(n - 1) * hop_size + n_fft]."""
        stft = self.stft
        frames = torch.fft.irfft(with_magnitude(phase, magnitude), n=stft.n_fft)
        wav = stft.overlap_add(frames[None], stft.window)[0]
        wav = wav[: (len(frames) - 1) * stft.hop_size + stft.n_fft]
        wav[: len(self.tail)] += self.tail
        return wav

    def normaliser(self, pending: int) -> torch.Tensor:
        """Returns one over the sum of squared windows where `pending` frames follow the settled."""
        stft = self.stft
        settled = min(self.settled, stft.overlap)
        if (settled, pending) not in self.normalisers:
            window = stft.window.expand(1, settled + pending, -1)
            total = stft.overlap_add(window, stft.window)[0, settled * stft.hop_size :]
            total = total[: max(0, pending - 1) * stft.hop_size + stft.n_fft]
            total = total.clamp(min=MIN_WINDOW_SUM).reciprocal()
            self.normalisers[settled, pending] = total
        return self.normalisers[settled, pending]
