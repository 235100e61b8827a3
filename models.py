"""The generator, the discriminators and the losses.

    mel [B, num_mels, T] -> Generator -> wav [B, 1, N], N = T * hop_size
    wav [B, 1, N] -> MultiPeriodDiscriminator, MultiScaleDiscriminator -> (scores, features)

MISRNet (Kaneko et al., Interspeech 2022) is HiFi-GAN (Kong et al., NeurIPS 2020) with each
multi-receptive-field fusion (MRF) replaced by a multi-input single shared residual block (MISR).
Parameters have the names of jik876/hifi-gan; weights.py reads and writes its files.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from env import Config
from fastconv import Conv1d, ConvTranspose1d, channels_last, conv_along_time, reshape, scale_conv
from harmonic import LRELU_SLOPE, HarmonicNoiseHead, ISTFTHead, PhaseState
from meldataset import SILENT_LOG_MEL
from pitch import Voice

POST_LRELU_SLOPE = 0.01  # before the generator's conv_post; HiFi-GAN's quirk, its weights need it

# MISR's start, found by measurement: the standard deviation of the shared block's weights, and that
# of the noise that makes N views of the identity differ, times the root of the channels.
RESIDUAL_STD = 0.01
VIEW_NOISE = 0.5


def _conv1d(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> Conv1d:
    """A weight-normalised convolution that keeps the length (kernel_size is odd)."""
    padding = dilation * (kernel_size - 1) // 2
    conv = Conv1d(in_channels, out_channels, kernel_size, dilation=dilation, padding=padding)
    return weight_norm(conv)


class ResBlock1(nn.Module):
    """Residual units of a dilated and a plain convolution, [B, C, T] -> [B, C, T].

    Source: HiFi-GAN, appendix A.1.
    """

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(_conv1d(channels, channels, kernel_size, d) for d in dilations)
        self.convs2 = nn.ModuleList(_conv1d(channels, channels, kernel_size) for _ in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            hidden = conv1(F.leaky_relu(x, LRELU_SLOPE))
            x = x + conv2(F.leaky_relu_(hidden, LRELU_SLOPE))
        return x


class ResBlock2(nn.Module):
    """Residual units of one dilated convolution, [B, C, T] -> [B, C, T]; HiFi-GAN's V3."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs = nn.ModuleList(_conv1d(channels, channels, kernel_size, d) for d in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, LRELU_SLOPE))
        return x


RESBLOCKS = {"1": ResBlock1, "2": ResBlock2}


def mrf(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Multi-receptive-field fusion: the mean of what residual blocks make of x [B, C, T].

    The blocks keep PyTorch's default initialisation. That is what HiFi-GAN trains with: its
    N(0, 0.01) is written into weights that weight norm computes anew at the first forward.

    Source: HiFi-GAN, section 2.2.
    """
    return sum(block(x) for block in blocks) / len(blocks)


def fuse(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """What a stage's one MISR, or an MRF's blocks, make of x [B, C, T]."""
    return blocks[0](x) if len(blocks) == 1 else mrf(blocks, x)


class MISR(nn.Module):
    """Multi-input single shared residual block, [B, C, T] -> [B, C, T].

    N different 1x1 convolutions of the same input, ONE residual block shared by all N results, and
    a merge: their mean, as in MRF, or a learned 1x1 convolution. The N results go through the block
    as one batch of B * N, so that the block runs once.

    Source: Kaneko et al., "MISRNet: Lightweight Neural Vocoder Using Multi-Input Single Shared
    Residual Blocks", Interspeech 2022.
    """

    def __init__(
        self,
        channels: int,
        num_inputs: int,
        kernel_size: int,
        dilations: tuple[int, ...],
        merge: str,
        resblock: type[nn.Module] = ResBlock1,
    ):
        super().__init__()
        self.num_inputs = num_inputs
        # Dense C -> N * C holds the same [N * C, C, 1] weight as N groups over N copies of the
        # input, and needs no copies.
        self.input_conv = _conv1d(channels, num_inputs * channels, kernel_size=1)
        self.resblock = resblock(channels, kernel_size, dilations)
        self.output_conv = None
        if merge == "conv":
            self.output_conv = _conv1d(num_inputs * channels, channels, kernel_size=1)
        self.initialise()

    @torch.no_grad()
    def initialise(self, view_noise: float = VIEW_NOISE) -> None:
        """Starts near the identity, with N different views of it.

        With PyTorch's default input convolutions, the block starts from N random mixtures of its
        channels and learns markedly slower than MRF; so it starts, like MRF, from x itself plus
        small residuals. Weights are assigned, not written into: weight norm recomputes them.
        """
        channels = self.input_conv.in_channels
        for conv in self.resblock.modules():
            if isinstance(conv, nn.Conv1d):
                conv.weight = RESIDUAL_STD * torch.randn_like(conv.weight)
        views = torch.eye(channels).repeat(self.num_inputs, 1).unsqueeze(-1)
        noise = torch.randn_like(self.input_conv.weight)
        self.input_conv.weight = views + view_noise / math.sqrt(channels) * noise
        self.input_conv.bias.zero_()
        if self.output_conv is not None:  # starts as the mean
            mean = torch.eye(channels).repeat(1, self.num_inputs).unsqueeze(-1) / self.num_inputs
            self.output_conv.weight = mean
            self.output_conv.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, T = x.shape
        N = self.num_inputs
        y = self.resblock(reshape(self.input_conv(x), B * N, C, T))
        if self.output_conv is None:
            return sum(y.reshape(B, N, C, T).unbind(1)) / N
        return self.output_conv(reshape(y, B, N * C, T))


class Generator(nn.Module):
    """Log-mel [B, num_mels, T] -> waveform [B, 1, T * hop_size], in [-1, 1] but for iSTFT heads.

    A stage is a transposed convolution and a MISR, or the residual blocks of an MRF. The blocks of
    all stages lie in one list, `resblocks`, as in HiFi-GAN's files.

    With `griffin_lim_steps`, the stages work at the mel's own rate, and a HarmonicNoiseHead makes the
    waveform.

    Source: HiFi-GAN, section 2.2, with MISR in place of MRF; iSTFTNet, whose last stages are an
    inverse STFT.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.hop_size = h.hop_size
        channels = h.upsample_initial_channel
        self.conv_pre = _conv1d(h.num_mels, channels, kernel_size=7)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(h.upsample_rates, h.upsample_kernel_sizes, strict=True):
            if h.is_frame_rate:  # nothing is upsampled
                self.ups.append(nn.Identity())
            else:
                padding = (kernel - rate) // 2
                up = ConvTranspose1d(channels, channels // 2, kernel, rate, padding=padding)
                self.ups.append(weight_norm(up))
                channels //= 2
            self.resblocks.extend(_stage_blocks(h, channels))
        self.head = None
        if h.is_frame_rate:
            self.head = HarmonicNoiseHead(h)
            self.conv_post = _conv1d(channels, self.head.in_channels, kernel_size=1)
        elif h.uses_istft:
            self.head = ISTFTHead(h.gen_istft_n_fft, h.gen_istft_hop_size)
            self.conv_post = _conv1d(channels, self.head.in_channels, kernel_size=7)
        else:
            self.conv_post = _conv1d(channels, 1, kernel_size=7)

    def forward(
        self, mel: torch.Tensor, origin: PhaseState | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, Voice | None]:
        """The waveform; given an `origin`, the waveform and the voice that a HarmonicNoiseHead heard.

        An origin says where in a longer mel this one lies, so that the voice goes on.
        """
        if isinstance(self.head, HarmonicNoiseHead):  # some pad with less than silence
            mel = mel.clamp(min=SILENT_LOG_MEL)
        x, voice = self.features(mel), None
        if isinstance(self.head, HarmonicNoiseHead):
            wav, voice = self.head(x, mel, origin or PhaseState())
        else:
            with torch.autocast(x.device.type, enabled=False):  # as in `last`
                wav = torch.tanh(x) if self.head is None else self.head(x)
        return wav if origin is None else (wav, voice)

    def features(self, mel: torch.Tensor) -> torch.Tensor:
        """What tanh or an inverse STFT makes the waveform of: [B, num_mels, T] -> [B, C, T'].

        All layers, conv_post the last. T' is T * hop_size, T at the mel's own rate, or the frames
        of an ISTFTHead.
        """
        x = self.first(mel)
        for up, blocks in self.stages():
            x = fuse(blocks, up(F.leaky_relu(x, LRELU_SLOPE)))
        return self.last(x)

    def first(self, mel: torch.Tensor) -> torch.Tensor:
        """conv_pre, in the layout of all that follows: [B, num_mels, T] -> [B, C, T]."""
        x = mel.to(self.conv_pre.bias.dtype)
        # CPU libraries convolve up to three times as fast in this layout. Compilers choose theirs.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            x = channels_last(x)
        return self.conv_pre(x)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """conv_post, in fp32: [B, C, T'] -> what tanh or an inverse STFT makes the waveform of."""
        x = F.leaky_relu(x, POST_LRELU_SLOPE)
        # A waveform in bfloat16 has a signal-to-noise ratio of 56 dB only.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.conv_post.bias.dtype)
            if isinstance(self.head, ISTFTHead):  # n frames make n - 1 hops
                x = F.pad(x, (1, 0), mode="reflect")
            return self.conv_post(x)

    def stages(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """The transposed convolution of each stage, and its blocks: one MISR, or an MRF's."""
        blocks, count = list(self.resblocks), len(self.resblocks) // len(self.ups)
        return [(up, blocks[i * count : (i + 1) * count]) for i, up in enumerate(self.ups)]

    @property
    def receptive_field(self) -> tuple[int, int]:
        """How many frames before, and after, its own frame a sample depends on at most."""
        first, last = 0, self.hop_size - 1  # of the samples of frame 0, traced back to the mel
        if isinstance(self.head, HarmonicNoiseHead):
            first, last = -self.head.reach, self.head.reach
        elif self.head is not None:
            n_fft, rate = self.head.n_fft, self.head.hop_size
            first, last = _sources(first, last, kernel_size=n_fft, rate=rate, padding=n_fft // 2)
            first, last = first - 1, last - 1  # the reflected frame
        first, last = first - self.conv_post.padding[0], last + self.conv_post.padding[0]
        for up, blocks in reversed(self.stages()):
            reach = max(map(radius, blocks))
            first, last = first - reach, last + reach
            if isinstance(up, nn.ConvTranspose1d):
                (kernel_size,), (rate,), (padding,) = up.kernel_size, up.stride, up.padding
                first, last = _sources(first, last, kernel_size, rate=rate, padding=padding)
        return self.conv_pre.padding[0] - first, last + self.conv_pre.padding[0]

    def remove_weight_norm(self) -> None:
        """Replaces each normalised weight by its value: the same function, faster."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight")
                # weight_norm leaves a hook behind, which no pickle takes.
                module._load_state_dict_pre_hooks.clear()


def radius(block: nn.Module) -> int:
    """How many samples to each side a sample of a block's output depends on."""
    return sum(m.padding[0] for m in block.modules() if isinstance(m, nn.Conv1d))


def _sources(first: int, last: int, kernel_size: int, rate: int, padding: int) -> tuple[int, int]:
    """The first and last input of a transposed convolution that outputs `first` to `last` need."""
    return -((kernel_size - 1 - padding - first) // rate), (last + padding) // rate


def _stage_blocks(h: Config, channels: int) -> list[nn.Module]:
    """A stage's MISR, or the residual blocks of its MRF."""
    resblock = RESBLOCKS[h.resblock]
    if not h.uses_misr:
        pairs = zip(h.resblock_kernel_sizes, h.resblock_dilation_sizes, strict=True)
        return [resblock(channels, kernel, dilations) for kernel, dilations in pairs]
    misr = MISR(
        channels,
        h.resblock_num,
        kernel_size=h.resblock_kernel_size,
        dilations=h.resblock_dilation_sizes,
        merge=h.misr_merge,
        resblock=resblock,
    )
    return [misr]


def _width(channels: int, h: Config) -> int:
    """`channels` by `discriminator_channel_mult`, to a multiple of 16, the most groups of MSD."""
    return max(16, round(channels * h.discriminator_channel_mult / 16) * 16)


class PeriodDiscriminator(nn.Module):
    """Scores a waveform seen as `period` interleaved ones.

    wav [B, 1, N] -> (scores [B, S], features), each feature [B, C, S', period].

    Weights and features have HiFi-GAN's shapes, with (k, 1) kernels. The convolutions run on the
    transposed picture, where time lies innermost: the same sums, up to 1.6 times as fast on CPUs.

    Source: HiFi-GAN, section 2.3.
    """

    def __init__(self, period: int, h: Config):
        super().__init__()
        self.period = period
        widths = [1, *(_width(channels, h) for channels in (32, 128, 512, 1024, 1024))]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(c_in, c_out, (5, 1), (stride, 1), padding=(2, 0)))
            for (c_in, c_out), stride in zip(pairwise(widths), (3, 3, 3, 3, 1), strict=True)
        )
        self.conv_post = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        B, _, N = wav.shape
        wav = F.pad(wav, (0, -N % self.period), mode="reflect")
        x = wav.reshape(B, 1, -1, self.period).transpose(2, 3)  # [B, 1, period, N / period]
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv_along_time(conv, x), LRELU_SLOPE)
            features.append(x.transpose(2, 3))
        features.append(conv_along_time(self.conv_post, x).transpose(2, 3))
        return features[-1].flatten(1), features


class ScaleDiscriminator(nn.Module):
    """Scores a waveform by strided, grouped convolutions.

    wav [B, 1, N] -> (scores [B, S], features), each feature [B, C, S'].

    Source: HiFi-GAN, section 2.3; MelGAN.
    """

    def __init__(self, norm: Callable[[nn.Module], nn.Module], h: Config):
        super().__init__()
        widths = [1, *(_width(c, h) for c in (128, 128, 256, 512, 1024, 1024, 1024))]
        kernels, strides = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1)
        groups = (1, 4, 16, 16, 16, 16, 1)
        layers = zip(pairwise(widths), kernels, strides, groups, strict=True)
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(*channels, kernel, stride, padding=kernel // 2, groups=group))
            for channels, kernel, stride, group in layers
        )
        self.conv_post = norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, wav: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, features = wav, []
        for conv in self.convs:
            x = F.leaky_relu(scale_conv(conv, x), LRELU_SLOPE)
            features.append(x)
        features.append(scale_conv(self.conv_post, x))
        return features[-1].flatten(1), features


class MultiPeriodDiscriminator(nn.Module):
    """MPD: wav [B, 1, N] -> (scores, features), lists with an entry for each period.

    Source: HiFi-GAN, section 2.3.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(p, h) for p in (2, 3, 5, 7, 11))

    def forward(self, wav: torch.Tensor) -> tuple[list, list]:
        scores, features = zip(*(each(wav) for each in self.discriminators), strict=True)
        return list(scores), list(features)


class MultiScaleDiscriminator(nn.Module):
    """MSD: wav [B, 1, N] -> (scores, features), lists with an entry for each scale: N, N/2, N/4.

    Source: HiFi-GAN, section 2.3. The first scale has spectral norm, the others weight norm.
    """

    def __init__(self, h: Config):
        super().__init__()
        norms = (spectral_norm, weight_norm, weight_norm)
        self.discriminators = nn.ModuleList(ScaleDiscriminator(norm, h) for norm in norms)

    def forward(self, wav: torch.Tensor) -> tuple[list, list]:
        scores, features = [], []
        for scale, discriminator in enumerate(self.discriminators):
            if scale > 0:
                wav = F.avg_pool1d(wav, kernel_size=4, stride=2, padding=2)
            score, feature = discriminator(wav)
            scores.append(score)
            features.append(feature)
        return scores, features


class Discriminators(nn.Module):
    """MSD and MPD as one: wav [B, 1, N] -> (scores, features), eight lists of each.

    MSD comes first, as in the parameters of HiFi-GAN's optim_d. Where the config has no use for
    them, both are empty: nothing learns, and nothing is saved.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.msd, self.mpd = nn.Module(), nn.Module()
        if h.uses_discriminators:
            self.msd, self.mpd = MultiScaleDiscriminator(h), MultiPeriodDiscriminator(h)

    def forward(self, wav: torch.Tensor) -> tuple[list, list]:
        (msd_scores, msd_features), (mpd_scores, mpd_features) = self.msd(wav), self.mpd(wav)
        return msd_scores + mpd_scores, msd_features + mpd_features
