"""The generator and HiFi-GAN's discriminators.

    mel [B, num_mels, T] -> Generator -> wav [B, 1, N], N = T * hop_size
    wav [B, 1, N] -> MultiPeriodDiscriminator, MultiScaleDiscriminator -> (scores, features)

A generator is a chain of four parts:

    mel -> conv_pre -> stages (upsampling, fusion block) -> conv_post -> head -> wav

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
from fastconv import (
    Conv1d,
    ConvTranspose1d,
    channels_last,
    conv_along_time,
    is_channels_last,
    reshape,
    scale_conv,
)
from harmonic import LRELU_SLOPE, HarmonicNoiseHead, PhaseState

POST_LRELU_SLOPE = 0.01  # before conv_post: PyTorch's default, with which HiFi-GAN was trained

# Initialisation of MISR, found by measurement. The standard deviation of the shared block's weights
# is RESIDUAL_STD. That of the noise on the input convolutions is INPUT_NOISE / sqrt(channels).
RESIDUAL_STD = 0.01
INPUT_NOISE = 0.5


class LookaheadConv1d(Conv1d):
    """A convolution of [B, C, T] that keeps the length and depends on `lookahead` later frames."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, dilation: int, lookahead: int):
        super().__init__(c_in, c_out, kernel_size, dilation=dilation)
        self.time_padding = (dilation * (kernel_size - 1) - lookahead, lookahead)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_channels_last(x):  # it stays so
            x = F.pad(x.transpose(1, 2), (0, 0, *self.time_padding)).transpose(1, 2)
        else:
            x = F.pad(x, self.time_padding)
        return super().forward(x)


def conv1d(
    c_in: int, c_out: int, kernel_size: int, dilation: int = 1, lookahead: int | None = None
) -> nn.Module:
    """Returns a weight-normalised convolution that keeps the length; kernel_size is odd.

    Without `lookahead` it is symmetric. Otherwise the output depends on `lookahead` later frames.
    """
    if lookahead is not None and kernel_size > 1:
        conv = LookaheadConv1d(c_in, c_out, kernel_size, dilation, lookahead)
    else:
        padding = dilation * (kernel_size - 1) // 2
        conv = Conv1d(c_in, c_out, kernel_size, dilation=dilation, padding=padding)
    return weight_norm(conv)


def time_padding(conv: nn.Module) -> tuple[int, int]:
    """Returns how many samples, before and after its own, a convolution's output depends on."""
    return getattr(conv, "time_padding", None) or conv.padding * 2


class ResBlock1(nn.Module):
    """Residual units of a dilated and a plain convolution, [B, C, T] -> [B, C, T].

    `lookahead` is the number of later frames that each convolution depends on; None selects
    symmetric convolutions.

    Source: HiFi-GAN, appendix A.1.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int],
        lookahead: int | None = None,
    ):
        super().__init__()
        self.convs1 = nn.ModuleList(
            conv1d(channels, channels, kernel_size, dilation=d, lookahead=lookahead)
            for d in dilations
        )
        self.convs2 = nn.ModuleList(
            conv1d(channels, channels, kernel_size, lookahead=lookahead) for _ in dilations
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv1, conv2 in self.units():
            hidden = conv1(F.leaky_relu(x, LRELU_SLOPE))
            x = x + conv2(F.leaky_relu_(hidden, LRELU_SLOPE))
        return x

    def units(self) -> list[tuple[nn.Module, nn.Module]]:
        """Returns the convolutions of each residual unit."""
        return list(zip(self.convs1, self.convs2, strict=True))


class ResBlock2(nn.Module):
    """Residual units of one dilated convolution, [B, C, T] -> [B, C, T]; HiFi-GAN's V3."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int],
        lookahead: int | None = None,
    ):
        super().__init__()
        self.convs = nn.ModuleList(
            conv1d(channels, channels, kernel_size, dilation=d, lookahead=lookahead)
            for d in dilations
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for (conv,) in self.units():
            x = x + conv(F.leaky_relu(x, LRELU_SLOPE))
        return x

    def units(self) -> list[tuple[nn.Module]]:
        """Returns the convolution of each residual unit."""
        return [(conv,) for conv in self.convs]


RESBLOCKS = {"1": ResBlock1, "2": ResBlock2}


def mrf(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Returns the mean of the outputs of residual blocks for x [B, C, T]: [B, C, T].

    The blocks keep PyTorch's default initialisation. So does HiFi-GAN: it writes N(0, 0.01) into
    weights that weight norm overwrites in the first forward.

    Source: HiFi-GAN, section 2.2.
    """
    return sum(block(x) for block in blocks) / len(blocks)


def fuse(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Applies the fusion block of a stage, one MISR or the blocks of an MRF, to x [B, C, T]."""
    return blocks[0](x) if len(blocks) == 1 else mrf(blocks, x)


class MISR(nn.Module):
    """Multi-input single shared residual block, [B, C, T] -> [B, C, T].

    N different 1x1 convolutions of the same input, ONE residual block shared by all N results, and
    a merge: their mean, as in MRF, or a learned 1x1 convolution. The N results pass through the
    block as one batch of B * N, so that the block runs once.

    Source: Kaneko et al., "MISRNet: Lightweight Neural Vocoder Using Multi-Input Single Shared
    Residual Blocks", Interspeech 2022.
    """

    def __init__(
        self,
        channels: int,
        num_inputs: int,
        kernel_size: int,
        dilations: Sequence[int],
        merge: str,
        resblock: type[nn.Module] = ResBlock1,
        lookahead: int | None = None,
    ):
        super().__init__()
        self.num_inputs = num_inputs
        # Dense C -> N * C holds the same [N * C, C, 1] weight as N groups over N copies of the
        # input, and needs no copies.
        self.input_conv = conv1d(channels, num_inputs * channels, kernel_size=1)
        self.resblock = resblock(channels, kernel_size, dilations, lookahead=lookahead)
        self.output_conv = None
        if merge == "conv":
            self.output_conv = conv1d(num_inputs * channels, channels, kernel_size=1)
        self.initialise()

    @torch.no_grad()
    def initialise(self, input_noise: float = INPUT_NOISE) -> None:
        """Initialises the block near the identity, with N different inputs of the shared block.

        With PyTorch's default, the block starts from N random mixtures of its channels and learns
        much more slowly than MRF. Weights are assigned because weight norm recomputes them.
        """
        channels = self.input_conv.in_channels
        for conv in self.resblock.modules():
            if isinstance(conv, nn.Conv1d):
                conv.weight = RESIDUAL_STD * torch.randn_like(conv.weight)
        identities = torch.eye(channels).repeat(self.num_inputs, 1).unsqueeze(-1)
        noise = torch.randn_like(self.input_conv.weight)
        self.input_conv.weight = identities + input_noise / math.sqrt(channels) * noise
        self.input_conv.bias.zero_()
        if self.output_conv is not None:  # initially the mean
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


def fusion_blocks(h: Config, channels: int) -> list[nn.Module]:
    """Returns the fusion block of a stage: one MISR, or the residual blocks of an MRF."""
    resblock = RESBLOCKS[h.resblock]
    lookahead = None if h.lookahead_frames is None else 0
    if not h.uses_misr:
        pairs = zip(h.resblock_kernel_sizes, h.resblock_dilation_sizes, strict=True)
        return [resblock(channels, size, dilations, lookahead) for size, dilations in pairs]
    misr = MISR(
        channels,
        h.resblock_num,
        kernel_size=h.resblock_kernel_size,
        dilations=h.resblock_dilation_sizes,
        merge=h.misr_merge,
        resblock=resblock,
        lookahead=lookahead,
    )
    return [misr]


class TanhHead(nn.Module):
    """HiFi-GAN's head: x [B, 1, N] -> wav [B, 1, N] in [-1, 1]. It ignores mel and state."""

    in_channels = 1

    def forward(
        self, x: torch.Tensor, mel: torch.Tensor, state: PhaseState | None = None
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.tanh(x)

    def sources(self, first: int, last: int) -> tuple[int, int]:
        """Returns the first and the last position of x that samples `first` to `last` need."""
        return first, last

    def next_state(self, x: torch.Tensor, state: PhaseState | None, frame: int, first: int) -> None:
        """Returns None: this head keeps no state."""


class ISTFTHead(nn.Module):
    """iSTFTNet's head: x [B, n_fft + 2, F] -> wav [B, 1, (F - 1) * hop_size].

    The lower half of the channels holds log magnitudes, the upper half phases.

    Equals torch.istft (centred, periodic Hann window) in a form that ONNX supports: a fixed
    transposed convolution, divided by the sum of the squared windows. It ignores mel and state.

    As in the public ports, the phase is the sine of the upper half of the channels. Pi times the
    sine, which covers all phases, learned no faster in a comparison of 600 updates.

    Source: Kaneko et al., "iSTFTNet", ICASSP 2022.
    """

    def __init__(self, n_fft: int, hop_size: int):
        super().__init__()
        self.n_fft, self.hop_size, self.in_channels = n_fft, hop_size, n_fft + 2
        # A waveform in [-1, 1] has no magnitude above n_fft / 2, the sum of the window. Eight times
        # as much never limits speech and prevents overflow in early training.
        self.max_log_magnitude = math.log(4 * n_fft)
        window = torch.hann_window(n_fft, dtype=torch.float64)
        bins = torch.eye(n_fft // 2 + 1, dtype=torch.complex128)
        basis = torch.fft.irfft(torch.cat([bins, 1j * bins]), n=n_fft) * window
        squared_window = window.square()[None, None].float()
        self.register_buffer("basis", basis.unsqueeze(1).float(), persistent=False)
        self.register_buffer("squared_window", squared_window, persistent=False)

    def forward(
        self, x: torch.Tensor, mel: torch.Tensor, state: PhaseState | None = None
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            window_sum = self._overlap_add(torch.ones_like(x[:1, :1]), self.squared_window)
            return self._overlap_add(self.to_spectrum(x), self.basis) / window_sum

    def to_spectrum(self, x: torch.Tensor) -> torch.Tensor:
        """Returns real and imaginary parts of the spectrum, [B, n_fft + 2, F], from x [same]."""
        log_magnitude, phase = x.chunk(2, dim=1)
        magnitude, angle = log_magnitude.clamp(max=self.max_log_magnitude).exp(), phase.sin()
        return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=1)

    def _overlap_add(self, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose1d(x, frames, stride=self.hop_size, padding=self.n_fft // 2)

    def sources(self, first: int, last: int) -> tuple[int, int]:
        """Returns the first and the last position of x that samples `first` to `last` need."""
        first, last = upsampling_sources(
            first, last, kernel_size=self.n_fft, rate=self.hop_size, padding=self.n_fft // 2
        )
        return first - 1, last - 1  # the reflected frame comes first

    def next_state(self, x: torch.Tensor, state: PhaseState | None, frame: int, first: int) -> None:
        """Returns None: this head keeps no state."""


class Generator(nn.Module):
    """Log-mel [B, num_mels, T] -> waveform [B, 1, T * hop_size].

    The waveform starts `lead` samples before that of the mel: see Config. It is in [-1, 1] with a
    tanh head; other heads may exceed it slightly. A stage is a transposed convolution and a fusion
    block. At the frame rate (`griffin_lim_steps` in the config) nothing is upsampled and the head
    is a HarmonicNoiseHead. The blocks of all stages are in one list, `resblocks`, as in HiFi-GAN's
    files.

    Source: HiFi-GAN, section 2.2, with MISR in place of MRF; iSTFTNet for the iSTFT head.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.hop_size, self.lead, self.silent_log_mel = h.hop_size, h.lead, h.silent_log_mel
        # Some acoustic models pad with values below silence.
        self.min_log_mel = h.silent_log_mel if h.is_frame_rate else None
        channels = h.upsample_initial_channel
        # Of the frames of look-ahead, the refiner takes one and conv_pre the rest.
        lookahead = None if h.lookahead_frames is None else h.lookahead_frames - 1
        self.conv_pre = conv1d(h.num_mels, channels, kernel_size=7, lookahead=lookahead)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(h.upsample_rates, h.upsample_kernel_sizes, strict=True):
            if h.is_frame_rate:
                self.ups.append(nn.Identity())
            else:
                padding = (kernel - rate) // 2
                up = ConvTranspose1d(channels, channels // 2, kernel, rate, padding=padding)
                self.ups.append(weight_norm(up))
                channels //= 2
            self.resblocks.extend(fusion_blocks(h, channels))
        self.pad_post, kernel = nn.Identity(), 7
        if h.is_frame_rate:
            self.head, kernel = HarmonicNoiseHead(h), 1
        elif h.uses_istft:
            self.head = ISTFTHead(h.gen_istft_n_fft, h.gen_istft_hop_size)
            self.pad_post = nn.ReflectionPad1d((1, 0))  # n frames make n - 1 hops
        else:
            self.head = TanhHead()
        self.conv_post = conv1d(channels, self.head.in_channels, kernel_size=kernel)

    def forward(self, mel: torch.Tensor, state: PhaseState | None = None) -> torch.Tensor:
        """Returns the waveform [B, 1, T * hop_size] of a log-mel [B, num_mels, T].

        `state` is the position of this mel in a longer one, for frame-rate generators.
        """
        return self.head(self.features(mel), mel, state)

    def features(self, mel: torch.Tensor) -> torch.Tensor:
        """Returns the input of the head, [B, head.in_channels, T'], in fp32.

        T' is T * hop_size, T at the frame rate, or the number of frames of an ISTFTHead.
        """
        x = self.first(mel)
        for up, blocks in self.stages():
            x = fuse(blocks, up(F.leaky_relu(x, LRELU_SLOPE)))
        return self.last(x)

    def first(self, mel: torch.Tensor) -> torch.Tensor:
        """Applies conv_pre: [B, num_mels, T] -> [B, C, T], channels-last on CPUs."""
        x = mel if self.min_log_mel is None else mel.clamp(min=self.min_log_mel)
        x = x.to(self.conv_pre.bias.dtype)
        # CPU libraries convolve up to three times as fast in this layout. Compilers choose theirs.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            x = channels_last(x)
        return self.conv_pre(x)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """Applies conv_post, in fp32: [B, C, T'] -> [B, head.in_channels, T']."""
        x = F.leaky_relu(x, POST_LRELU_SLOPE)
        # A waveform in bfloat16 has a signal-to-noise ratio of 56 dB only.
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_post(self.pad_post(x.to(self.conv_post.bias.dtype)))

    def stages(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """Returns each stage's transposed convolution and its blocks: one MISR, or an MRF's."""
        blocks, count = list(self.resblocks), len(self.resblocks) // len(self.ups)
        return [(up, blocks[i * count : (i + 1) * count]) for i, up in enumerate(self.ups)]

    @property
    def receptive_field(self) -> tuple[int, int]:
        """The numbers of frames, before and after its own, that a sample depends on at most."""
        # Starts with the samples of frame 0 and goes back to the mel, layer by layer.
        first, last = self.head.sources(0, self.hop_size - 1)
        before, after = time_padding(self.conv_post)
        first, last = first - before, last + after
        for up, blocks in reversed(self.stages()):
            before, after = (max(pads) for pads in zip(*map(block_padding, blocks), strict=True))
            first, last = first - before, last + after
            if isinstance(up, nn.ConvTranspose1d):
                (kernel_size,), (rate,), (padding,) = up.kernel_size, up.stride, up.padding
                first, last = upsampling_sources(
                    first, last, kernel_size=kernel_size, rate=rate, padding=padding
                )
        before, after = time_padding(self.conv_pre)
        return before - first, last + after

    def remove_weight_norm(self) -> None:
        """Replaces each normalised weight by its value: the same function, faster."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight")
                # weight_norm leaves a hook behind, which cannot be pickled.
                module._load_state_dict_pre_hooks.clear()


def block_padding(block: nn.Module) -> tuple[int, int]:
    """Returns how many samples, before and after its own, a residual block's output depends on."""
    pads = [time_padding(conv) for conv in block.modules() if isinstance(conv, nn.Conv1d)]
    return sum(before for before, _ in pads), sum(after for _, after in pads)


def upsampling_sources(
    first: int, last: int, *, kernel_size: int, rate: int, padding: int
) -> tuple[int, int]:
    """Returns the first and the last input that the outputs `first` to `last` depend on.

    The layer is a transposed convolution with stride `rate`.
    """
    return -((kernel_size - 1 - padding - first) // rate), (last + padding) // rate


def _width(channels: int, h: Config) -> int:
    """Returns `channels` times `discriminator_channel_mult`, rounded to a multiple of 16.

    MSD's convolutions have up to 16 groups.
    """
    return max(16, round(channels * h.discriminator_channel_mult / 16) * 16)


class PeriodDiscriminator(nn.Module):
    """Scores every `period`-th sample of a waveform, for each of the `period` offsets.

    wav [B, 1, N] -> (scores [B, S], features), each feature [B, C, S', period]. The features are
    the outputs of all convolutions. N is padded to a multiple of `period` by reflection.

    Weights and features have HiFi-GAN's shapes, with kernels (k, 1) over time and offset. The
    convolutions run on the transposed input, with time as the innermost dimension. This computes
    the same sums up to 1.6 times as fast on CPUs.

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
    """Scores a waveform at one time scale by strided, grouped convolutions.

    wav [B, 1, N] -> (scores [B, S], features), each feature [B, C, S']. The features are the
    outputs of all convolutions. `norm` is the weight or spectral norm of every convolution.

    Source: HiFi-GAN, section 2.3; Kumar et al., "MelGAN", NeurIPS 2019.
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
    """Multi-period discriminator (MPD): one PeriodDiscriminator for each of 2, 3, 5, 7 and 11.

    wav [B, 1, N] -> (scores, features), two lists with one entry for each period.

    Source: HiFi-GAN, section 2.3.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(p, h) for p in (2, 3, 5, 7, 11))

    def forward(self, wav: torch.Tensor) -> tuple[list, list]:
        scores, features = zip(*(each(wav) for each in self.discriminators), strict=True)
        return list(scores), list(features)


class MultiScaleDiscriminator(nn.Module):
    """Multi-scale discriminator (MSD): ScaleDiscriminators of wav and of its averages by 2 and 4.

    wav [B, 1, N] -> (scores, features), two lists with one entry for each scale. The first scale
    has spectral norm, the others have weight norm.

    Source: HiFi-GAN, section 2.3.
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
    """MSD and MPD in one module.

    wav [B, 1, N] -> (scores, features), two lists with one entry for each of the eight
    discriminators, MSD's first. This is the order of the parameters in HiFi-GAN's optim_d. If the
    config trains no discriminators, `msd` and `mpd` are empty modules without parameters.
    """

    def __init__(self, h: Config):
        super().__init__()
        self.msd, self.mpd = nn.Module(), nn.Module()
        if h.uses_discriminators:
            self.msd, self.mpd = MultiScaleDiscriminator(h), MultiPeriodDiscriminator(h)

    def forward(self, wav: torch.Tensor) -> tuple[list, list]:
        (msd_scores, msd_features), (mpd_scores, mpd_features) = self.msd(wav), self.mpd(wav)
        return msd_scores + mpd_scores, msd_features + mpd_features
