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
look-ahead instead of over the whole mel. They compute in NumPy, on the CPU.
"""

from functools import partial

import numpy as np
import torch
from torch import nn

from harmonic import LRELU_SLOPE, HarmonicNoiseHead
from harmonic_stream import GRIFFIN_LIM_LOOKAHEAD, HarmonicStream
from models import POST_LRELU_SLOPE, Generator, ISTFTHead, TanhHead
from stream_layers import (
    ConvStream,
    Signal,
    StageStream,
    UpsamplingStream,
    leaky_relu,
    to_array,
    to_tensor,
)

MAX_ARRAY_FRAMES = 32  # that are computed at a time in NumPy


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
        self.is_frame_rate = isinstance(generator.head, HarmonicNoiseHead)
        self.reset()

    def reset(self) -> None:
        """Clears the state: the next frame is the first of a new mel."""
        generator = self.generator
        stream = partial(ConvStream, convert=to_array if self.is_frame_rate else to_tensor)
        self.conv_pre = stream(generator.conv_pre)
        self.stages = [StageStream(up, blocks, stream) for up, blocks in generator.stages()]
        is_padded = isinstance(generator.pad_post, nn.ReflectionPad1d)
        self.pad_post = ReflectedStart() if is_padded else None
        self.conv_post = stream(generator.conv_post)
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
        generator, frames = self.generator, mel.shape[1]
        bias, device = generator.conv_pre.bias, generator.conv_post.bias.device
        self.frames += frames
        mel = mel.T[None]
        if not self.is_frame_rate:
            return self._synthesize(mel.to(device, bias.dtype), is_last)
        mel = np.maximum(to_array(mel).astype(self.conv_pre.matrix.dtype), generator.min_log_mel)
        wavs = []
        for first in range(0, max(1, frames), MAX_ARRAY_FRAMES):
            later = first + MAX_ARRAY_FRAMES
            wavs.append(self._synthesize(mel[:, first:later], is_last and later >= frames))
        return torch.from_numpy(np.concatenate(wavs)).to(device)

    def _synthesize(self, mel: Signal, is_last: bool) -> Signal:
        """Takes frames [1, n, num_mels] of the mel; returns the samples [N] that are final."""
        x = self.conv_pre(mel, is_last)
        for stage in self.stages:
            x = stage(leaky_relu(x, LRELU_SLOPE), is_last)
        x = leaky_relu(x, POST_LRELU_SLOPE)
        if not self.is_frame_rate:
            x = x.to(self.conv_post.bias.dtype)
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
    if not np.isfinite(mel.numpy(force=True)).all():
        raise ValueError("mel holds NaN or infinity")
    return mel


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
    return HarmonicStream(head, griffin_lim_lookahead)


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
