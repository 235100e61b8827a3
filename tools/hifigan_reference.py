"""HiFi-GAN's training step in textbook form: the oracle of the tests, the baseline of benchmark.py.

It follows the paper and the public description of the loop. The convolutions are plain: (k, 1), or
strided and grouped. Weight norm and spectral norm are the old ones, with their key names. Real and
generated waveforms pass through each discriminator separately. The generator step also computes the
gradients of the discriminators' weights, which are dropped. Module names are those of
jik876/hifi-gan's checkpoints.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

PERIOD_LAYERS = [(1, 32, 3), (32, 128, 3), (128, 512, 3), (512, 1024, 3), (1024, 1024, 1)]
SCALE_LAYERS = [  # in, out, kernel, stride, groups
    (1, 128, 15, 1, 1),
    (128, 128, 41, 2, 4),
    (128, 256, 41, 2, 16),
    (256, 512, 41, 4, 16),
    (512, 1024, 41, 4, 16),
    (1024, 1024, 41, 1, 16),
    (1024, 1024, 5, 1, 1),
]


def weight_norm(module: nn.Module) -> nn.Module:
    """Applies the old weight norm, whose key names HiFi-GAN's files have, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def remove_weight_norms(module: nn.Module) -> None:
    """Removes the old weight norm from every layer that has it."""
    for each in module.modules():
        if hasattr(each, "weight_g"):
            nn.utils.remove_weight_norm(each)


def misr_loop(misr, x):
    """Computes MISR as in its diagram, by N convolutions and N calls of the block."""
    N, C = misr.num_inputs, x.shape[1]
    weights, biases = misr.input_conv.weight.unsqueeze(2).split(C), misr.input_conv.bias.split(C)
    x = x.unsqueeze(2)  # a 2-D convolution of height 1 keeps the memory layout
    inputs = [F.conv2d(x, *each).squeeze(2) for each in zip(weights, biases, strict=True)]
    branches = [misr.resblock(each) for each in inputs]
    if misr.output_conv is None:
        return sum(branches) / N
    return misr.output_conv(torch.cat(branches, dim=1))


def scaled(channels: int, mult: float) -> int:
    """Returns the width of a discriminator layer; 1 channel is the waveform."""
    return channels if channels == 1 else max(16, round(channels * mult / 16) * 16)


class Period(nn.Module):
    """A discriminator of every `period`-th sample: [B, 1, N] -> (score [B, S], features)."""

    def __init__(self, period: int, mult: float):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList(
            weight_norm(
                nn.Conv2d(scaled(a, mult), scaled(b, mult), (5, 1), (stride, 1), padding=(2, 0))
            )
            for a, b, stride in PERIOD_LAYERS
        )
        self.conv_post = weight_norm(nn.Conv2d(scaled(1024, mult), 1, (3, 1), 1, padding=(1, 0)))

    def forward(self, x):
        batch, channels, length = x.shape
        if length % self.period:
            x = F.pad(x, (0, self.period - length % self.period), "reflect")
        x = x.view(batch, channels, -1, self.period)
        return run_layers(self, x)


class Scale(nn.Module):
    """A discriminator of a waveform: [B, 1, N] -> (score [B, S], features)."""

    def __init__(self, norm, mult: float):
        super().__init__()
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(scaled(a, mult), scaled(b, mult), k, s, padding=(k - 1) // 2, groups=g))
            for a, b, k, s, g in SCALE_LAYERS
        )
        self.conv_post = norm(nn.Conv1d(scaled(1024, mult), 1, 3, 1, padding=1))

    def forward(self, x):
        return run_layers(self, x)


def run_layers(discriminator, x):
    """Returns (score [B, S], features) of one discriminator."""
    features = []
    for conv in discriminator.convs:
        x = F.leaky_relu(conv(x), 0.1)
        features.append(x)
    x = discriminator.conv_post(x)
    features.append(x)
    return torch.flatten(x, 1, -1), features


class MultiPeriod(nn.Module):
    """HiFi-GAN's MPD, section 2.3: the outputs of each Period for real and fake, both [B, 1, N]."""

    def __init__(self, mult: float = 1.0):
        super().__init__()
        self.discriminators = nn.ModuleList(Period(p, mult) for p in (2, 3, 5, 7, 11))

    def forward(self, real, fake):
        return [(each(real), each(fake)) for each in self.discriminators]


class MultiScale(nn.Module):
    """HiFi-GAN's MSD: the outputs of each Scale for real and fake, which are pooled in between."""

    def __init__(self, mult: float = 1.0):
        super().__init__()
        norms = (spectral_norm, weight_norm, weight_norm)
        self.discriminators = nn.ModuleList(Scale(norm, mult) for norm in norms)
        self.pool = nn.AvgPool1d(4, 2, padding=2)

    def forward(self, real, fake):
        results = []
        for i, discriminator in enumerate(self.discriminators):
            if i > 0:
                real, fake = self.pool(real), self.pool(fake)
            results.append((discriminator(real), discriminator(fake)))
        return results


def lsgan_discriminator(results):
    """Returns the sum over discriminators of E[(D(x) - 1)^2] + E[D(G(s))^2]."""
    return sum(
        torch.mean((1 - real_score) ** 2) + torch.mean(fake_score**2)
        for (real_score, _), (fake_score, _) in results
    )


def lsgan_generator(results):
    """Returns the sum over discriminators of E[(D(G(s)) - 1)^2]."""
    return sum(torch.mean((1 - fake_score) ** 2) for _, (fake_score, _) in results)


def feature_matching(results):
    """Returns twice the sum over discriminators and layers of the mean L1 distance."""
    return 2 * sum(
        torch.mean(torch.abs(real - fake))
        for (_, real_features), (_, fake_features) in results
        for real, fake in zip(real_features, fake_features, strict=True)
    )


def textbook_step(generator, mpd, msd, optim_g, optim_d, log_mel, mel, wav):
    """Makes one update in HiFi-GAN's order; returns (discriminator loss, generator loss)."""
    wav_hat = generator(mel)
    mel_hat = log_mel(wav_hat.squeeze(1))
    optim_d.zero_grad()
    detached = wav_hat.detach()
    loss_d = lsgan_discriminator(mpd(wav, detached)) + lsgan_discriminator(msd(wav, detached))
    loss_d.backward()
    optim_d.step()
    optim_g.zero_grad()
    loss_mel = F.l1_loss(log_mel(wav.squeeze(1)), mel_hat) * 45
    by_period, by_scale = mpd(wav, wav_hat), msd(wav, wav_hat)
    loss_features = feature_matching(by_period) + feature_matching(by_scale)
    loss_adversarial = lsgan_generator(by_period) + lsgan_generator(by_scale)
    loss_g = loss_adversarial + loss_features + loss_mel
    loss_g.backward()
    optim_g.step()
    return loss_d.detach(), loss_g.detach()


class Block(nn.Module):
    """HiFi-GAN's ResBlock1 with old weight norm; kernel k, dilations d."""

    def __init__(self, channels: int, k: int, dilations):
        super().__init__()
        conv = nn.Conv1d
        self.convs1 = nn.ModuleList(
            weight_norm(conv(channels, channels, k, 1, dilation=d, padding=(k * d - d) // 2))
            for d in dilations
        )
        self.convs2 = nn.ModuleList(
            weight_norm(conv(channels, channels, k, 1, padding=(k - 1) // 2)) for _ in dilations
        )

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2, strict=True):
            y = first(F.leaky_relu(x, 0.1))
            x = second(F.leaky_relu(y, 0.1)) + x
        return x


class Block2(nn.Module):
    """HiFi-GAN's ResBlock2 with old weight norm; kernel k, dilations d."""

    def __init__(self, channels: int, k: int, dilations):
        super().__init__()
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, k, 1, dilation=d, padding=(k * d - d) // 2))
            for d in dilations
        )

    def forward(self, x):
        for conv in self.convs:
            x = conv(F.leaky_relu(x, 0.1)) + x
        return x


class TextbookGenerator(nn.Module):
    """HiFi-GAN's generator with old weight norm, `resblocks.{stage * kernels + k}`."""

    def __init__(self, h):
        super().__init__()
        c, block = h.upsample_initial_channel, {"1": Block, "2": Block2}[h.resblock]
        self.num_kernels = len(h.resblock_kernel_sizes)
        self.conv_pre = weight_norm(nn.Conv1d(h.num_mels, c, 7, 1, padding=3))
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for i, (u, k) in enumerate(zip(h.upsample_rates, h.upsample_kernel_sizes, strict=True)):
            up = nn.ConvTranspose1d(c // 2**i, c // 2 ** (i + 1), k, u, padding=(k - u) // 2)
            self.ups.append(weight_norm(up))
            pairs = zip(h.resblock_kernel_sizes, h.resblock_dilation_sizes, strict=True)
            self.resblocks.extend(block(c // 2 ** (i + 1), kernel, d) for kernel, d in pairs)
        self.conv_post = weight_norm(nn.Conv1d(c // 2 ** len(self.ups), 1, 7, 1, padding=3))

    def forward(self, x):
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            blocks = self.resblocks[i * self.num_kernels : (i + 1) * self.num_kernels]
            x = sum(block(x) for block in blocks) / self.num_kernels
        return torch.tanh(self.conv_post(F.leaky_relu(x)))
