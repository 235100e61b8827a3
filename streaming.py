"""Streaming synthesis of a mel that arrives in pieces: every layer computes every frame once.

    streamer = Streamer(generator)
    for mel in acoustic_model:          # [num_mels, n], any n
        play(streamer.feed(mel))        # [samples], those that are final
    play(streamer.flush())              # the rest; the next feed starts a new mel

Each layer keeps its state. A convolution keeps the last samples of its input, a transposed
convolution keeps the tail of its output. The frame-rate head keeps the phase of its pulse train,
its position in the noise, and the frames that Griffin-Lim has not completed.

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

from harmonic import LRELU_SLOPE, Conv3x3, Refiner
from harmonic_stream import GRIFFIN_LIM_LOOKAHEAD, HarmonicStream
from models import MISR, POST_LRELU_SLOPE, Generator, ISTFTHead, TanhHead, time_padding


class Streamer:
    """Synthesizes a mel that arrives in pieces.

    Several streamers may share a generator. `latency` is the algorithmic latency in frames: how
    many frames after its own must arrive before a sample is final.

    Args:
        generator: as from `load_generator`.
        griffin_lim_lookahead: number of later frames that Griffin-Lim waits for before it completes
            a frame; for frame-rate generators only.
    """

    def __init__(self, generator: Generator, griffin_lim_lookahead: int = GRIFFIN_LIM_LOOKAHEAD):
        self.generator = generator
        self.griffin_lim_lookahead = griffin_lim_lookahead
        self.num_mels = generator.conv_pre.in_channels
        self.reset()

    def reset(self) -> None:
        """Clears the state: the next frame is the first of a new mel."""
        generator = self.generator
        self.conv_pre = ConvStream(generator.conv_pre)
        self.stages = [StageStream(up, blocks) for up, blocks in generator.stages()]
        is_padded = isinstance(generator.pad_post, nn.ReflectionPad1d)
        self.pad_post = ReflectedStart() if is_padded else None
        self.conv_post = ConvStream(generator.conv_post)
        self.head = head_stream(generator.head, self.griffin_lim_lookahead)
        self.frames, self.to_skip = 0, generator.lead

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
        mel = mel.T.to(generator.conv_post.bias.device).unsqueeze(0)
        x = mel if generator.min_log_mel is None else mel.clamp(min=generator.min_log_mel)
        x = self.conv_pre(x.to(generator.conv_pre.bias.dtype), is_last)
        for stage in self.stages:
            x = stage(F.leaky_relu(x, LRELU_SLOPE), is_last)
        x = F.leaky_relu(x, POST_LRELU_SLOPE).to(generator.conv_post.bias.dtype)
        if self.pad_post is not None:
            x = self.pad_post(x)
        wav = self.head(self.conv_post(x, is_last), mel, is_last)
        skipped = min(self.to_skip, len(wav))
        self.to_skip -= skipped
        return wav[skipped:]


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
# Each is called with the next piece x [B, n, C] (of the refiner: [B, n, patches, C]), n >= 0, and
# returns the outputs that are final. After the piece with is_last=True, all have been returned.


class ConvStream:
    """Runs a convolution that keeps the length, of models.py or harmonic.py, piece by piece.

    Short pieces are computed as one matrix product. For them, the convolutions of CPU libraries
    take longer to start than to compute.
    """

    MAX_PRODUCT = 2**18  # elements of the matrix of windows

    def __init__(self, conv: nn.Module):
        self.bias, self.weight = conv.bias, conv.weight.flatten(2)
        self.before, self.after = time_padding(conv)[:2]
        self.dilation, self.taps = conv.dilation[0], conv.kernel_size[0]
        self.matrix = conv.weight.movedim(1, -1).flatten(1)  # [C_out, taps * C_in]
        self.past = None

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        context = self.before + self.after
        if context == 0:
            return F.linear(x, self.matrix, self.bias)
        pieces = [x if self.past is None else self.past, x]
        if self.past is None:
            pieces[0] = x.new_zeros(x.shape[0], self.before, *x.shape[2:])
        if is_last:
            pieces.append(x.new_zeros(x.shape[0], self.after, *x.shape[2:]))
        x = torch.cat(pieces, dim=1)
        self.past = x[:, max(0, x.shape[1] - context) :]
        return self.convolve(x, max(0, x.shape[1] - context))

    def convolve(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the `count` outputs whose taps all lie in x [B, n, C]."""
        (B, _, C), (batch_stride, stride, _) = x.shape, x.stride()
        if B * count * self.taps * C > self.MAX_PRODUCT:
            x, weight = x.mT.unsqueeze(2), self.weight.unsqueeze(2)  # channels-last, height 1
            y = F.conv2d(x, weight, self.bias, dilation=(1, self.dilation))
            return y.squeeze(2).mT
        shape = (B, count, self.taps, C)
        windows = x.as_strided(shape, (batch_stride, stride, self.dilation * stride, 1))
        return F.linear(windows.flatten(2), self.matrix, self.bias)


class Conv3x3Stream(ConvStream):
    """Runs a Conv3x3 piece by piece on x [1, n, patches, C]."""

    def __init__(self, conv: Conv3x3):
        super().__init__(conv)
        self.conv, self.frequency_dilation = conv, conv.dilation[1]

    def convolve(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the `count` outputs whose taps all lie in x [1, n, patches, C]."""
        d, (_, _, P, C) = self.frequency_dilation, x.shape
        if count * P * 9 * C > self.MAX_PRODUCT:
            conv = self.conv
            y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, 1, (0, d), (1, d))
            return y.permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, d, d))
        row = (P + 2 * d) * C
        windows = x.as_strided((1, count, P, 3, 3, C), (0, row, C, row, d * C, 1))
        return F.linear(windows.flatten(3), self.matrix, self.bias)


class Delay:
    """Buffers pieces [B, n, ...] to align them with the output of a slower layer."""

    def __init__(self):
        self.kept = None

    def __call__(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Appends x and takes the first `count` positions out."""
        if self.kept is not None:
            x = torch.cat([self.kept, x], dim=1)
        self.kept = x[:, count:] if count < x.shape[1] else None
        return x[:, :count]


class ResidualStream:
    """Runs residual units: x + conv(lrelu(conv(lrelu(x)))), or with one convolution."""

    def __init__(self, units: Sequence[Sequence[nn.Module]], stream: type = ConvStream):
        self.units = [([stream(conv) for conv in unit], Delay()) for unit in units]

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        for convs, delay in self.units:
            y = x
            for conv in convs:
                y = conv(F.leaky_relu(y, LRELU_SLOPE), is_last)
            x = delay(x, y.shape[1]) + y
        return x


class MISRStream:
    """Runs a MISR: the shared block keeps the past of its N inputs, a batch of N."""

    def __init__(self, misr: MISR):
        self.num_inputs = misr.num_inputs
        self.input_conv = ConvStream(misr.input_conv)
        self.resblock = ResidualStream(misr.resblock.units())
        self.output_conv = None if misr.output_conv is None else ConvStream(misr.output_conv)

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        y = self.input_conv(x, is_last).unflatten(2, (self.num_inputs, -1))
        y = self.resblock(y[0].transpose(0, 1).contiguous(), is_last)
        if self.output_conv is None:
            return y.mean(0, keepdim=True)
        return self.output_conv(y.transpose(0, 1).flatten(1).unsqueeze(0), is_last)


class MRFStream:
    """Runs the residual blocks of an MRF, whose outputs come after different delays."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = [(ResidualStream(block.units()), Delay()) for block in blocks]
        self.waiting = [0] * len(self.blocks)

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        outputs = [block(x, is_last) for block, _ in self.blocks]
        ready = [n + y.shape[1] for n, y in zip(self.waiting, outputs, strict=True)]
        count = min(ready)
        self.waiting = [n - count for n in ready]
        delays = [delay for _, delay in self.blocks]
        aligned = [delay(y, count) for delay, y in zip(delays, outputs, strict=True)]
        return sum(aligned) / len(aligned)


class UpsamplingStream:
    """Runs a transposed convolution: outputs are final once no later input reaches them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rate: int, padding: int):
        C, self.channels, self.kernel_size = weight.shape
        self.bias, self.rate, self.padding, self.to_skip = bias, rate, padding, padding
        self.hops = math.ceil(self.kernel_size / rate)  # outputs of one input, in hops of `rate`
        weight = F.pad(weight, (0, self.hops * rate - self.kernel_size))
        self.matrix = weight.permute(2, 1, 0).reshape(-1, C)  # [hops * rate * C_out, C]
        self.tail = weight.new_zeros(self.hops - 1, rate * self.channels)

    def __call__(self, x: torch.Tensor, is_last: bool) -> torch.Tensor:
        n, rate, hops = x.shape[1], self.rate, self.hops
        frames = F.linear(x[0], self.matrix).unflatten(1, (hops, -1))
        y = frames.new_zeros(n + hops - 1, frames.shape[2])
        y[: hops - 1] += self.tail
        for k in range(hops):
            y[k : k + n] += frames[:, k]
        self.tail = y[n:]
        y = y.view(1, (n + hops - 1) * rate, self.channels)
        count = n * rate
        if is_last:
            count += self.kernel_size - rate - self.padding
        y = y[:, min(self.to_skip, count) : count]
        self.to_skip -= count - y.shape[1]
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
        x = x if self.first is None else torch.cat([self.first, x], dim=1)
        self.first, self.is_done = x, x.shape[1] > 1
        return torch.cat([x[:, 1:2], x], dim=1) if self.is_done else x[:, :0]


# ------------------------------------------------------------------------------------------- heads
#
# Each is called with the next piece of the generator's features, x [1, n, C], and the next frames
# of the mel, [1, m, num_mels], and returns the final samples [N].


def head_stream(
    head: nn.Module, griffin_lim_lookahead: int
) -> "TanhStream | ISTFTStream | HarmonicStream":
    """Returns the stream of a generator's head."""
    if isinstance(head, TanhHead):
        return TanhStream()
    if isinstance(head, ISTFTHead):
        return ISTFTStream(head)
    return HarmonicStream(head, RefinerStream(head.refiner), griffin_lim_lookahead)


class TanhStream:
    """Streams a TanhHead."""

    def __call__(self, x: torch.Tensor, mel: torch.Tensor, is_last: bool) -> torch.Tensor:
        return torch.tanh(x).flatten()


class ISTFTStream:
    """Streams an ISTFTHead: two overlap-adds, of the spectrum and of the squared windows."""

    def __init__(self, head: ISTFTHead):
        self.head = head
        self.overlap_add, self.window_sum = (
            UpsamplingStream(frames, None, rate=head.hop_size, padding=head.n_fft // 2)
            for frames in (head.basis, head.squared_window)
        )

    def __call__(self, x: torch.Tensor, mel: torch.Tensor, is_last: bool) -> torch.Tensor:
        wav = self.overlap_add(self.head.to_spectrum(x.mT).mT, is_last)
        window_sum = self.window_sum(torch.ones_like(x[:, :, :1]), is_last)
        return (wav / window_sum).flatten()


class RefinerStream:
    """Runs a Refiner on patches [n, patches, channels], as arrays."""

    def __init__(self, refiner: Refiner):
        self.conv_pre = Conv3x3Stream(refiner.conv_pre)
        self.units = ResidualStream(refiner.units(), stream=Conv3x3Stream)
        self.linear_post = refiner.linear_post

    def __call__(self, patches: np.ndarray, is_last: bool) -> np.ndarray:
        """Returns the refinements [m, patches * PATCH_BINS] that are final."""
        bias = self.linear_post.bias
        x = torch.from_numpy(patches).to(bias.device, bias.dtype).unsqueeze(0)
        x = self.units(self.conv_pre(x, is_last), is_last)
        x = self.linear_post(F.leaky_relu(x[0], LRELU_SLOPE)).flatten(1)
        return x.float().numpy(force=True) if x.dtype == torch.bfloat16 else x.numpy(force=True)
