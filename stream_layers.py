"""Layers that take a signal in pieces and keep their state, for streaming.py.

Each is called with the next piece x [B, n, C] (of the refiner: [B, n, patches, C]), n >= 0, and
returns the outputs that are final. After the piece with is_last=True, all have been returned.

Pieces are tensors or, for small networks, arrays: NumPy's functions start three times as fast as
PyTorch's, and a frame of a small network takes longer to start functions than to compute.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from harmonic import LRELU_SLOPE, Conv3x3
from models import MISR, time_padding

Signal = torch.Tensor | np.ndarray
Convert = Callable[[torch.Tensor], Signal]  # of weights: `to_tensor` or `to_array`


def to_tensor(x: torch.Tensor) -> torch.Tensor:
    """Returns a tensor as it is."""
    return x


def to_array(x: torch.Tensor) -> np.ndarray:
    """Returns the values of a tensor; bfloat16 becomes float32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)


def cat(pieces: Sequence[Signal]) -> Signal:
    """Concatenates pieces [B, n, ...] along time."""
    concatenate = np.concatenate if isinstance(pieces[0], np.ndarray) else torch.cat
    return concatenate(pieces, 1)


def zeros(like: Signal, *shape: int) -> Signal:
    """Returns zeros of the type of `like`."""
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def leaky_relu(x: Signal, slope: float) -> Signal:
    """Applies a leaky ReLU."""
    return np.maximum(x, slope * x) if isinstance(x, np.ndarray) else F.leaky_relu(x, slope)


def linear(x: Signal, weight: Signal, bias: Signal | None) -> Signal:
    """Returns x [..., C] @ weight [C_out, C].T + bias: [..., C_out]."""
    if not isinstance(x, np.ndarray):
        return F.linear(x, weight, bias)
    y = x.reshape(-1, x.shape[-1]) @ weight.T  # matmul is slow on more dimensions
    y += bias
    return y.reshape(*x.shape[:-1], len(weight))


def strided(x: Signal, shape: tuple[int, ...], strides: tuple[int, ...]) -> Signal:
    """Returns a view of contiguous x; strides are in elements."""
    if not isinstance(x, np.ndarray):
        return x.as_strided(shape, strides)
    return np.ndarray(shape, x.dtype, x, strides=[x.itemsize * stride for stride in strides])


class ConvStream:
    """Runs a convolution that keeps the length, of models.py or harmonic.py, piece by piece.

    Short pieces are computed as one matrix product. For them, the convolutions of CPU libraries
    take longer to start than to compute.
    """

    MAX_PRODUCT = 2**18  # elements of the matrix of windows, of tensors

    def __init__(self, conv: nn.Module, convert: Convert = to_tensor):
        self.weight = conv.weight.flatten(2)
        self.bias = convert(conv.bias)
        self.matrix = convert(conv.weight.movedim(1, -1).flatten(1))  # [C_out, taps * C_in]
        self.before, self.after = time_padding(conv)[:2]
        self.dilation, self.taps = conv.dilation[0], conv.kernel_size[0]
        self.past = None

    def __call__(self, x: Signal, is_last: bool) -> Signal:
        context = self.before + self.after
        if context == 0:
            return linear(x, self.matrix, self.bias)
        if self.past is None:
            self.past = zeros(x, x.shape[0], self.before, *x.shape[2:])
        pieces = [self.past, x]
        if is_last:
            pieces.append(zeros(x, x.shape[0], self.after, *x.shape[2:]))
        x = cat(pieces)
        count = max(0, x.shape[1] - context)
        self.past = x[:, count:]
        return self.convolve(x, count)

    def convolve(self, x: Signal, count: int) -> Signal:
        """Returns the `count` outputs whose taps all lie in x [B, n, C]."""
        B, n, C = x.shape
        size = B * count * self.taps * C
        if size > self.MAX_PRODUCT and not isinstance(x, np.ndarray):
            x, weight = x.mT.unsqueeze(2), self.weight.unsqueeze(2)  # channels-last, height 1
            y = F.conv2d(x, weight, self.bias, dilation=(1, self.dilation))
            return y.squeeze(2).mT
        windows = strided(x, (B, count, self.taps, C), (n * C, C, self.dilation * C, 1))
        return linear(windows.reshape(B, count, self.taps * C), self.matrix, self.bias)


class Conv3x3Stream(ConvStream):
    """Runs a Conv3x3 piece by piece on arrays [1, n, patches, C]."""

    def __init__(self, conv: Conv3x3):
        super().__init__(conv, to_array)
        self.frequency_dilation = conv.dilation[1]

    def __call__(self, x: np.ndarray, is_last: bool) -> np.ndarray:
        (_, n, P, C), d = x.shape, self.frequency_dilation
        padded = np.zeros((1, n, P + 2 * d, C), x.dtype)
        padded[:, :, d:-d] = x
        return super().__call__(padded, is_last)

    def convolve(self, x: np.ndarray, count: int) -> np.ndarray:
        """Returns the `count` outputs whose taps all lie in x [1, n, patches + padding, C]."""
        d, (_, _, P, C) = self.frequency_dilation, x.shape
        row, P = P * C, P - 2 * d
        windows = strided(x, (1, count, P, 3, 3, C), (0, row, C, row, d * C, 1))
        return linear(windows.reshape(1, count, P, 9 * C), self.matrix, self.bias)


class Delay:
    """Buffers pieces [B, n, ...] to align them with the output of a slower layer."""

    def __init__(self):
        self.kept = None

    def __call__(self, x: Signal, count: int) -> Signal:
        """Appends x and takes the first `count` positions out."""
        if self.kept is not None:
            x = cat([self.kept, x])
        if count == x.shape[1]:
            self.kept = None
            return x
        self.kept = x[:, count:]
        return x[:, :count]


class ResidualStream:
    """Runs residual units: x + conv(lrelu(conv(lrelu(x)))), or with one convolution."""

    def __init__(self, units: Sequence[Sequence[nn.Module]], stream: Callable = ConvStream):
        self.units = [([stream(conv) for conv in unit], Delay()) for unit in units]

    def __call__(self, x: Signal, is_last: bool) -> Signal:
        for convs, delay in self.units:
            y = x
            for conv in convs:
                y = conv(leaky_relu(y, LRELU_SLOPE), is_last)
            x = delay(x, y.shape[1]) + y
        return x


class MISRStream:
    """Runs a MISR: the shared block keeps the past of its N inputs, a batch of N."""

    def __init__(self, misr: MISR, stream: Callable):
        self.num_inputs = misr.num_inputs
        self.input_conv = stream(misr.input_conv)
        self.resblock = ResidualStream(misr.resblock.units(), stream)
        self.output_conv = None if misr.output_conv is None else stream(misr.output_conv)

    def __call__(self, x: Signal, is_last: bool) -> Signal:
        N, C = self.num_inputs, x.shape[2]
        y = self.input_conv(x, is_last).reshape(-1, N, C).swapaxes(0, 1)
        y = self.resblock(y, is_last)
        if self.output_conv is None:
            return (y.sum(0) / N)[None]
        return self.output_conv(y.swapaxes(0, 1).reshape(1, -1, N * C), is_last)


class MRFStream:
    """Runs the residual blocks of an MRF, whose outputs come after different delays."""

    def __init__(self, blocks: Sequence[nn.Module], stream: Callable):
        self.blocks = [(ResidualStream(block.units(), stream), Delay()) for block in blocks]
        self.waiting = [0] * len(self.blocks)

    def __call__(self, x: Signal, is_last: bool) -> Signal:
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

    def __init__(self, up: nn.Module, blocks: Sequence[nn.Module], stream: Callable):
        self.up = None
        if isinstance(up, nn.ConvTranspose1d):
            self.up = UpsamplingStream(up.weight, up.bias, rate=up.stride[0], padding=up.padding[0])
        is_misr = isinstance(blocks[0], MISR)
        self.fusion = MISRStream(blocks[0], stream) if is_misr else MRFStream(blocks, stream)

    def __call__(self, x: Signal, is_last: bool) -> Signal:
        return self.fusion(x if self.up is None else self.up(x, is_last), is_last)
