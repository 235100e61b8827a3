"""The models against oracles: plain loops, textbook HiFi-GAN, formulas and known counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from env import load_config
from fastconv import Conv1d, ConvTranspose1d, channels_last, is_channels_last
from models import (
    MISR,
    Discriminators,
    Generator,
    MultiPeriodDiscriminator,
    MultiScaleDiscriminator,
    ResBlock1,
    ResBlock2,
)
from tests.conftest import ALL_CONFIGS
from tools import hifigan_reference as textbook
from tools.toy import ROOT, toy_config
from weights import load_weights

MERGES = ["mean", "conv"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Weights large enough for every path to matter."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, std)
    return module


def assert_same_gradients(ours: torch.Tensor, theirs: torch.Tensor, wanted: list) -> None:
    """Two float64 tensors, and their gradients to `wanted`, are equal to rounding."""
    atol = 1e-10 * float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (ours, theirs)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


# ------------------------------------------------------------------------------------------- MISR


def grouped_misr(misr: MISR, x: torch.Tensor) -> torch.Tensor:
    """MISR as the paper names it: a grouped convolution of N copies of the input."""
    N = misr.num_inputs
    conv = misr.input_conv
    inputs = F.conv1d(x.repeat(1, N, 1), conv.weight, conv.bias, groups=N).chunk(N, dim=1)
    outputs = [misr.resblock(y) for y in inputs]
    if misr.output_conv is None:
        return sum(outputs) / N
    return misr.output_conv(torch.cat(outputs, dim=1))


@pytest.mark.parametrize("oracle", [textbook.misr_loop, grouped_misr])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    ("num_inputs", "resblock"), [(3, ResBlock1), (3, ResBlock2), (1, ResBlock1)]
)
def test_misr_equals_the_loop(num_inputs, resblock, merge, oracle):
    misr = randomise(MISR(6, num_inputs, 5, (1, 3), merge, resblock)).double()
    x = torch.randn(2, 6, 40, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(misr(x), oracle(misr, x), [x, *misr.parameters()])


def test_misr_calls_the_shared_block_once_with_all_inputs():
    misr = MISR(8, 3, 11, (1, 3, 5), "mean")
    shapes = []
    misr.resblock.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    assert misr(torch.randn(2, 8, 50)).shape == (2, 8, 50)
    assert shapes == [(6, 8, 50)]
    assert misr.input_conv.weight.shape == (24, 8, 1)


def test_conv_merge_starts_as_the_mean():
    torch.manual_seed(0)
    mean = MISR(16, 3, 3, (1,), "mean")
    torch.manual_seed(0)
    conv = MISR(16, 3, 3, (1,), "conv")
    conv.load_state_dict(mean.state_dict(), strict=False)
    x = torch.randn(1, 16, 30)
    torch.testing.assert_close(conv(x), mean(x))


# ---------------------------------------------------------------------------------------- layouts

CONVOLUTIONS = {
    "plain": lambda: Conv1d(4, 6, 5, padding=2),
    "dilated": lambda: Conv1d(4, 6, 5, padding=6, dilation=3),
    "strided": lambda: Conv1d(4, 6, 5, stride=3, padding=2),
    "grouped": lambda: Conv1d(4, 6, 5, groups=2),
    "1x1": lambda: Conv1d(4, 6, 1),
    "transposed": lambda: ConvTranspose1d(4, 6, 8, 4, padding=2),
    "transposed, kernel = rate": lambda: ConvTranspose1d(4, 6, 3, 3),
    "transposed, odd": lambda: ConvTranspose1d(4, 6, 7, 5, padding=1),
}
BLOCKS = {
    "ResBlock1": lambda: ResBlock1(6, 5, (1, 3)),
    "ResBlock2": lambda: ResBlock2(6, 5, (1, 3)),
    "MISR mean": lambda: MISR(6, 3, 5, (1, 3), "mean"),
    "MISR conv": lambda: MISR(6, 3, 5, (1, 3), "conv"),
}


def test_channels_last_moves_values_only_where_it_must():
    x = torch.randn(2, 3, 4)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert (x.stride(), y.stride()) == ((12, 4, 1), (12, 1, 3))
    assert (is_channels_last(x), is_channels_last(y)) == (False, True)
    assert channels_last(y).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_takes_and_gives_either_layout(make):
    conv = make().double()
    for batch in (1, 3):  # a dimension of 1 has two layouts
        x = torch.randn(batch, 4, 17, dtype=torch.float64)
        expected = type(conv).__base__.forward(conv, x)  # of torch.nn
        for layout in (channels_last, torch.Tensor.contiguous):
            y = conv(layout(x))
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
            assert is_channels_last(y) == (layout is channels_last)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_a_block_is_the_same_in_both_layouts(make):
    block = randomise(make()).double()
    for batch in (1, 3):
        x = torch.randn(batch, 6, 40, dtype=torch.float64, requires_grad=True)
        last, plain = block(channels_last(x)), block(x)
        assert (is_channels_last(last), is_channels_last(plain)) == (True, False)
        assert_same_gradients(last, plain, [x, *block.parameters()])


# -------------------------------------------------------------------------------------- generator

FUSIONS = {
    "MISR": ("config_v2.json", {}),
    "MISR conv": ("config_v2.json", {"misr_merge": "conv"}),
    "MISR resblock 2": ("config_v2.json", {"resblock": "2"}),
    "MRF": ("configs/hifigan_v2.json", {}),
    "MRF resblock 2": ("configs/hifigan_v3.json", {}),
}
GENERATORS = FUSIONS | {"iSTFT": ("configs/istft_v2.json", {})}


@pytest.mark.parametrize(("config", "changes"), GENERATORS.values(), ids=GENERATORS)
def test_the_generator_s_layout_changes_nothing(config, changes, tmp_path, monkeypatch):
    h = toy_config(tmp_path, config, upsample_initial_channel=32, **changes)
    generator = Generator(h).double()
    layouts = []
    for up in generator.ups:
        up.register_forward_hook(lambda _, __, y: layouts.append(is_channels_last(y)))
    mel = torch.randn(2, h.num_mels, 5, dtype=torch.float64, requires_grad=True)
    wav = generator(mel)
    monkeypatch.setattr(models, "channels_last", lambda x: x)
    plain = generator(mel)
    stages = len(generator.ups)
    assert layouts == [True] * stages + [False] * stages
    assert_same_gradients(wav, plain, [mel, *generator.parameters()])


def upsampling(*kernels: int, rates: tuple[int, ...], istft: tuple = (None, None)) -> dict:
    """Config keys for these stages; the mel's STFT is only made to fit."""
    hop_size = math.prod(rates) * (istft[1] or 1)
    return {
        "upsample_rates": rates,
        "upsample_kernel_sizes": kernels,
        "gen_istft_n_fft": istft[0],
        "gen_istft_hop_size": istft[1],
        "hop_size": hop_size,
        "segment_size": 8 * hop_size,
        "n_fft": hop_size + 1024,
        "win_size": hop_size + 1024,
    }


UPSAMPLINGS = {
    "shipped": upsampling(16, 16, 4, 4, rates=(8, 8, 2, 2)),
    "kernel = rate": upsampling(8, 8, 2, 2, rates=(8, 8, 2, 2)),
    "odd": upsampling(7, 9, rates=(3, 5)),
    "odd, kernel = rate": upsampling(3, 5, rates=(3, 5)),
    "long kernels": upsampling(22, 9, rates=(4, 3)),
    "one stage": upsampling(21, rates=(7,)),
    "a rate of 1": upsampling(3, 4, rates=(1, 4)),
    "iSTFT": upsampling(16, 16, rates=(8, 8), istft=(16, 4)),
    "iSTFT, odd": upsampling(7, rates=(3,), istft=(12, 5)),
}


def spread(generator: Generator) -> tuple[float, float]:
    """How many frames before its start, and after its end, a frame of the mel is heard."""
    frame = max(generator.receptive_field) + 1
    mel = torch.zeros(1, generator.conv_pre.in_channels, 2 * frame + 1)
    mel[:, :, frame] = math.nan
    (samples,) = generator(mel)[0, 0].isnan().nonzero(as_tuple=True)
    first, stop = int(samples[0]), int(samples[-1]) + 1
    return frame - first / generator.hop_size, stop / generator.hop_size - (frame + 1)


@pytest.mark.parametrize(
    ("config", "fusion", "changes"),
    [
        *((*fusion, UPSAMPLINGS["shipped"]) for fusion in FUSIONS.values()),
        *(("config_v2.json", {}, each) for each in UPSAMPLINGS.values()),
    ],
)
def test_a_frame_is_heard_as_far_as_the_receptive_field_says(config, fusion, changes, tmp_path):
    generator = Generator(toy_config(tmp_path, config, **fusion, **changes))
    back, ahead = spread(generator)
    # A sample hears frames to its right by as much as a frame is heard to its left.
    assert (math.ceil(ahead), math.ceil(back)) == generator.receptive_field


def test_the_receptive_field_of_v2_is_13_frames_to_each_side(tmp_path):
    generator = Generator(toy_config(tmp_path, "config_v2.json"))
    assert generator.receptive_field == (13, 13)
    assert spread(generator) == pytest.approx((12.73, 12.73), abs=0.01)


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        ("config_v1.json", {}, 8_960_417),
        ("config_v1.json", {"misr_merge": "conv"}, 9_222_017),
        ("config_v2.json", {}, 614_825),
        ("config_v2.json", {"misr_merge": "conv"}, 631_265),
        ("configs/hifigan_v1.json", {}, 13_926_017),
        ("configs/hifigan_v2.json", {}, 925_985),
        ("configs/hifigan_v3.json", {}, 1_462_273),
    ],
)
def test_parameter_counts(config, changes, expected, tmp_path):
    full_size = load_config(ROOT / config).upsample_initial_channel
    h = toy_config(tmp_path, config, upsample_initial_channel=full_size, **changes)
    with torch.device("meta"):
        generator = Generator(h)
    generator.remove_weight_norm()
    assert count(generator) == expected


def test_discriminator_parameter_counts():
    h = load_config(ROOT / "config_v1.json")
    with torch.device("meta"):
        discriminators = Discriminators(h)
    gains = sum(
        p.numel() for name, p in discriminators.named_parameters() if name.endswith("original0")
    )
    assert count(discriminators) - gains == 41_092_165 + 29_610_627


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=lambda path: path.stem)
def test_generator_makes_hop_size_samples_a_frame(config, tmp_path):
    h = toy_config(tmp_path, config, upsample_initial_channel=32)
    generator = Generator(h)
    for frames in (1, 2, 33):
        wav = generator(torch.randn(2, h.num_mels, frames))
        assert wav.shape == (2, 1, frames * h.hop_size)
        assert wav.abs().max() <= 1 or generator.head is not None


@pytest.mark.parametrize(
    ("config", "merge"), [("config_v2.json", "conv"), ("configs/hifigan_v3.json", "mean")]
)
def test_remove_weight_norm_is_complete_and_changes_nothing(config, merge, tmp_path):
    h = toy_config(tmp_path, config, misr_merge=merge)
    generator = randomise(Generator(h).double())
    mel = torch.randn(1, h.num_mels, 9, dtype=torch.float64)
    before = generator(mel)
    generator.remove_weight_norm()
    torch.testing.assert_close(generator(mel), before, rtol=0, atol=1e-10)
    assert not any("parametrizations" in key for key in generator.state_dict())


@pytest.mark.parametrize("config", ["config_v2.json", "configs/hifigan_v2.json"])
def test_effective_initialisation(config):
    """The standard deviations of the weights that a first forward really uses."""
    h = load_config(ROOT / config)
    generator = Generator(h)
    generator(torch.randn(1, h.num_mels, 2))
    for name, module in generator.named_modules():
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        weight = module.weight.detach()
        fan_in = weight[0].numel()
        expected = (1 / 3 / fan_in) ** 0.5  # PyTorch's default: uniform up to 1 / sqrt(fan_in)
        if h.uses_misr and ".resblock." in name:
            expected = 0.01
        if name.endswith("input_conv"):
            C = weight.shape[1]
            weight = weight.squeeze(-1) - torch.eye(C).repeat(h.resblock_num, 1)
            expected = 0.5 / C**0.5
            assert not module.bias.any()
        assert float(weight.std()) == pytest.approx(expected, rel=0.25), name


def test_misr_starts_near_the_identity():
    misr = MISR(64, 3, 11, (1, 3, 5), "mean")
    x = torch.randn(1, 64, 200)
    correlation = torch.corrcoef(torch.stack([misr(x).flatten(), x.flatten()]))[0, 1]
    assert correlation > 0.9


def test_bf16_waveforms_leave_the_generator_in_fp32(tmp_path):
    h = toy_config(tmp_path)
    generator = Generator(h)
    seen = []
    generator.ups[0].register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wav = generator(torch.randn(1, h.num_mels, 3))
    assert (seen, wav.dtype) == ([torch.bfloat16], torch.float32)


# ------------------------------------------------------------------- HiFi-GAN's weights and layout


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_hifigan_generator_files_load(tmp_path, version):
    h = toy_config(tmp_path, f"configs/hifigan_{version}.json")
    original = randomise(textbook.TextbookGenerator(h).double())
    generator = Generator(h).double()
    load_weights(generator, original.state_dict(), "")
    mel = torch.randn(2, h.num_mels, 12, dtype=torch.float64)
    torch.testing.assert_close(generator(mel), original(mel), rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [2049, 777])
@pytest.mark.parametrize(
    ("ours", "by_the_book"),
    [
        (MultiPeriodDiscriminator, textbook.MultiPeriod),
        (MultiScaleDiscriminator, textbook.MultiScale),
    ],
)
def test_discriminators_equal_the_textbook(ours, by_the_book, length, tmp_path):
    """Old key names; lengths that no period divides; scores, features and their shapes."""
    h = toy_config(tmp_path, discriminator_channel_mult=0.05)
    original = by_the_book(h.discriminator_channel_mult).double().eval()
    discriminator = ours(h).double().eval()
    load_weights(discriminator, original.state_dict(), "")
    wav = torch.randn(2, 1, length, dtype=torch.float64)
    scores, features = discriminator(wav)
    for ours, (theirs, _) in zip(
        zip(scores, features, strict=True), original(wav, wav), strict=True
    ):
        for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_old_and_new_spectral_norm_train_alike(tmp_path):
    """Gradients through a frozen power iteration are the same."""
    h = toy_config(tmp_path)
    original = textbook.MultiScale(h.discriminator_channel_mult).double().eval()
    discriminator = MultiScaleDiscriminator(h).double().eval()
    load_weights(discriminator, original.state_dict(), "")
    wav = torch.randn(1, 1, 2048, dtype=torch.float64)
    ours, theirs = discriminator(wav)[0][0], original(wav, wav)[0][0][0]
    for scores in (ours, theirs):
        scores.square().sum().backward()
    weight = discriminator.discriminators[0].convs[1].parametrizations.weight.original
    expected = original.discriminators[0].convs[1].weight_orig
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------- losses


def test_losses_equal_their_formulas():
    real, fake = [[torch.randn(2, 5), torch.randn(2, 9)] for _ in range(2)]
    expected = sum(((r - 1) ** 2).mean() + (f**2).mean() for r, f in zip(real, fake, strict=True))
    torch.testing.assert_close(models.discriminator_loss(real, fake), expected)
    expected = sum(((f - 1) ** 2).mean() for f in fake)
    torch.testing.assert_close(models.generator_loss(fake), expected)
    real, fake = [[[torch.randn(2, 3, 4)], [torch.randn(1), torch.randn(5)]] for _ in range(2)]
    expected = sum(
        (r - f).abs().mean()
        for rs, fs in zip(real, fake, strict=True)
        for r, f in zip(rs, fs, strict=True)
    )
    torch.testing.assert_close(models.feature_loss(real, fake), expected)


def test_losses_of_unequal_lists_are_refused():
    with pytest.raises(ValueError):
        models.feature_loss([[torch.ones(1)]], [[torch.ones(1), torch.ones(1)]])


def test_mrf_is_the_mean_of_its_blocks():
    blocks = [randomise(ResBlock2(4, 3, (1, 2))), randomise(ResBlock2(4, 5, (1, 3)))]
    x = torch.randn(1, 4, 20)
    expected = (blocks[0](x) + blocks[1](x)) / 2
    torch.testing.assert_close(models.mrf(blocks, x), expected)
