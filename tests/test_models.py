"""The models against oracles: plain loops, HiFi-GAN's reference, torch.istft and known counts."""

import math
from dataclasses import replace

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
    ISTFTHead,
    MultiPeriodDiscriminator,
    MultiScaleDiscriminator,
    ResBlock1,
    ResBlock2,
    conv1d,
)
from tests.conftest import ALL_CONFIGS
from tools import hifigan_reference as reference
from tools.toy import ROOT, toy_config
from weights import load_weights

FRAME_RATE = "configs/frame_v2.json"
FUSIONS = {
    "MISR": ("config_v2.json", {}),
    "MISR conv": ("config_v2.json", {"misr_merge": "conv"}),
    "MISR resblock 2": ("config_v2.json", {"resblock": "2"}),
    "MRF": ("configs/hifigan_v2.json", {}),
    "MRF resblock 2": ("configs/hifigan_v3.json", {}),
}
GENERATORS = FUSIONS | {"iSTFT": ("configs/istft_v2.json", {})}


def each(cases: dict) -> pytest.MarkDecorator:
    """Runs a test for each config and its changes."""
    return pytest.mark.parametrize(("config", "changes"), cases.values(), ids=cases)


def count(module: nn.Module) -> int:
    """Counts parameters, without the gains of weight norm."""
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if not name.endswith("original0"))


def randomise(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Draws weights so large that every path matters."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, std)
    return module


def assert_same_gradients(
    ours: torch.Tensor, theirs: torch.Tensor, inputs: list, rtol: float = 1e-10
) -> None:
    """Compares two tensors and their gradients with respect to `inputs`."""
    atol = rtol * float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, theirs)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


# ------------------------------------------------------------------------------------------- MISR


def grouped_misr(misr: MISR, x: torch.Tensor) -> torch.Tensor:
    """MISR as the paper has it: a grouped convolution of N copies of the input."""
    N, conv = misr.num_inputs, misr.input_conv
    inputs = F.conv1d(x.repeat(1, N, 1), conv.weight, conv.bias, groups=N).chunk(N, dim=1)
    outputs = [misr.resblock(y) for y in inputs]
    if misr.output_conv is None:
        return sum(outputs) / N
    return misr.output_conv(torch.cat(outputs, dim=1))


@pytest.mark.parametrize("oracle", [reference.misr_loop, grouped_misr])
@pytest.mark.parametrize("merge", ["mean", "conv"])
@pytest.mark.parametrize(
    ("num_inputs", "resblock", "lookahead"),
    [(3, ResBlock1, None), (3, ResBlock2, None), (1, ResBlock1, None), (3, ResBlock1, 0)],
)
def test_misr_equals_the_loop(num_inputs, resblock, lookahead, merge, oracle):
    misr = randomise(MISR(6, num_inputs, 5, (1, 3), merge, resblock, lookahead)).double()
    x = torch.randn(2, 6, 40, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(misr(x), oracle(misr, x), [x, *misr.parameters()])


def test_misr_calls_the_shared_block_once_with_all_inputs():
    misr, shapes = MISR(8, 3, 11, (1, 3, 5), "mean"), []
    misr.resblock.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    assert misr(torch.randn(2, 8, 50)).shape == (2, 8, 50)
    assert shapes == [(6, 8, 50)]
    assert misr.input_conv.weight.shape == (24, 8, 1)


def test_merge_by_convolution_starts_as_the_mean():
    mean, conv = (MISR(16, 3, 3, (1,), merge) for merge in ("mean", "conv"))
    conv.load_state_dict(mean.state_dict(), strict=False)
    x = torch.randn(1, 16, 30)
    torch.testing.assert_close(conv(x), mean(x))


@pytest.mark.parametrize("config", ["config_v2.json", "configs/hifigan_v2.json"])
def test_the_first_forward_uses_the_initial_weights(config):
    """Weight norm recomputes weights, so their standard deviations are compared after a forward."""
    h = load_config(ROOT / config)
    generator = Generator(h)
    generator(torch.randn(1, h.num_mels, 2))
    for name, module in generator.named_modules():
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        weight = module.weight.detach()
        expected = (3 * weight[0].numel()) ** -0.5  # PyTorch's: uniform up to 1 / sqrt(fan_in)
        if h.uses_misr and ".resblock." in name:
            expected = 0.01
        if name.endswith("input_conv"):
            C = weight.shape[1]
            weight = weight.squeeze(-1) - torch.eye(C).repeat(h.resblock_num, 1)
            expected = 0.5 / C**0.5
            assert not module.bias.any()
        assert float(weight.std()) == pytest.approx(expected, rel=0.25), name


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


def test_channels_last_copies_only_what_has_another_layout():
    x = torch.randn(2, 3, 4)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert (x.stride(), y.stride()) == ((12, 4, 1), (12, 1, 3))
    assert (is_channels_last(x), is_channels_last(y)) == (False, True)
    assert channels_last(y).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_keeps_the_layout_of_its_input(make):
    conv = make().double()
    for batch in (1, 3):  # a dimension of 1 has two layouts
        x = torch.randn(batch, 4, 17, dtype=torch.float64)
        expected = type(conv).__base__.forward(conv, x)  # of torch.nn
        for layout in (channels_last, torch.Tensor.contiguous):
            y = conv(layout(x))
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
            assert is_channels_last(y) == (layout is channels_last)


@each(GENERATORS)
def test_a_generator_is_the_same_in_both_layouts(config, changes, tmp_path, monkeypatch):
    h = toy_config(tmp_path, config, upsample_initial_channel=32, **changes)
    generator, layouts = Generator(h).double(), []
    for _, blocks in generator.stages():
        hook = blocks[-1].register_forward_hook
        hook(lambda _, inputs, y: layouts.append([is_channels_last(x) for x in (*inputs, y)]))
    for batch in (1, 2):
        layouts.clear()
        mel = torch.randn(batch, h.num_mels, 5, dtype=torch.float64, requires_grad=True)
        features = generator.features(mel)
        with monkeypatch.context() as patch:
            patch.setattr(models, "channels_last", lambda x: x)
            plain = generator.features(mel)
        stages = len(generator.ups)
        assert layouts == [[True, True]] * stages + [[False, False]] * stages
        assert_same_gradients(features, plain, [mel, *generator.parameters()])


# -------------------------------------------------------------------------------- receptive field


def upsampling(*kernels: int, rates: tuple[int, ...], istft: tuple = (None, None)) -> dict:
    """Returns config keys of these stages, with a mel that fits."""
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
    "kernel = rate": upsampling(8, 8, 2, 2, rates=(8, 8, 2, 2)),
    "odd": upsampling(7, 9, rates=(3, 5)),
    "odd, kernel = rate": upsampling(3, 5, rates=(3, 5)),
    "long kernels": upsampling(22, 9, rates=(4, 3)),
    "one stage": upsampling(21, rates=(7,)),
    "a rate of 1": upsampling(3, 4, rates=(1, 4)),
    "iSTFT": upsampling(16, 16, rates=(8, 8), istft=(16, 4)),
    "iSTFT, odd": upsampling(7, rates=(3,), istft=(12, 5)),
}
UPSAMPLING_GENERATORS = FUSIONS | {
    name: ("config_v2.json", changes) for name, changes in UPSAMPLINGS.items()
}


def dependence(compute, num_mels: int, rate: int, frames: int) -> tuple[int, int]:
    """Returns how many frames before and after its own an output of `compute` depends on.

    `compute` maps a mel to [1, C, T * rate]. A NaN in one frame reaches all that depends on it.
    """
    mel = torch.zeros(1, num_mels, 2 * frames + 1)
    mel[:, :, frames] = math.nan
    reached = compute(mel)[0, 0].isnan().nonzero()
    return int(reached.max()) // rate - frames, frames - int(reached.min()) // rate


@each(UPSAMPLING_GENERATORS)
def test_a_sample_depends_on_the_frames_of_the_receptive_field(config, changes, tmp_path):
    generator = Generator(toy_config(tmp_path, config, **changes))
    frames = max(generator.receptive_field) + 1
    field = dependence(generator, num_mels=80, rate=generator.hop_size, frames=frames)
    assert field == generator.receptive_field


def test_the_receptive_field_of_v2_is_13_frames_to_each_side(tmp_path):
    assert Generator(toy_config(tmp_path, "config_v2.json")).receptive_field == (13, 13)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_convolution_with_lookahead_is_the_symmetric_one_delayed(lookahead):
    symmetric, delayed = (conv1d(4, 6, 5, dilation=2, lookahead=n) for n in (None, lookahead))
    delayed.load_state_dict(symmetric.state_dict())
    x, delay = torch.randn(2, 4, 30), 4 - lookahead
    torch.testing.assert_close(delayed(x)[:, :, delay:], symmetric(x)[:, :, :-delay])


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({"lookahead_frames": None}, 3 + 2 * 24, 3 + 2 * 24),
        *(({"lookahead_frames": n}, 103 - n, n - 1) for n in (1, 3, 7)),
    ],
)
def test_of_the_lookahead_frames_all_but_one_are_of_the_features(changes, before, after, tmp_path):
    """conv_pre depends on them and the blocks on none. test_harmonic.py tests the refiner's one."""
    generator = Generator(toy_config(tmp_path, FRAME_RATE, **changes))
    assert dependence(generator.features, num_mels=80, rate=1, frames=110) == (before, after)


# -------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize(
    ("config", "merge", "expected"),
    [
        ("config_v1.json", "mean", 8_960_417),
        ("config_v1.json", "conv", 9_222_017),
        ("config_v2.json", "mean", 614_825),
        ("config_v2.json", "conv", 631_265),
        ("configs/hifigan_v1.json", "mean", 13_926_017),
        ("configs/hifigan_v2.json", "mean", 925_985),
        ("configs/hifigan_v3.json", "mean", 1_462_273),
        ("configs/frame_v2.json", "mean", 992_270),
        ("configs/frame_v3.json", "mean", 241_718),
    ],
)
def test_parameter_counts(config, merge, expected):
    generator = Generator(replace(load_config(ROOT / config), misr_merge=merge))
    assert count(generator) == expected


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=lambda path: path.stem)
def test_a_frame_becomes_hop_size_samples(config, tmp_path):
    h = toy_config(tmp_path, config, upsample_initial_channel=32)
    generator = Generator(h)
    for frames in (1, 2, 33):
        mel = torch.randn(2, h.num_mels, frames)
        wav = generator(mel)
        assert wav.shape == (2, 1, frames * h.hop_size)
        assert generator.features(mel).shape[1] == generator.head.in_channels


@each(GENERATORS | {"look-ahead": (FRAME_RATE, {"lookahead_frames": 3})})
def test_remove_weight_norm_is_complete_and_keeps_the_function(config, changes, tmp_path):
    generator = randomise(Generator(toy_config(tmp_path, config, **changes)).double())
    mel = torch.randn(1, 80, 9, dtype=torch.float64)
    before = generator.features(mel)
    generator.remove_weight_norm()
    torch.testing.assert_close(generator.features(mel), before, rtol=1e-10, atol=1e-10)
    assert not any("parametrizations" in key for key in generator.state_dict())


@pytest.mark.parametrize("config", ["config_v2.json", "configs/istft_v2.json", FRAME_RATE])
def test_under_autocast_the_last_layer_and_the_head_compute_in_fp32(config, tmp_path):
    h = toy_config(tmp_path, config)
    generator, dtypes = Generator(h), []
    for module in (generator.conv_pre, generator.resblocks[0], generator.conv_post):
        module.register_forward_hook(lambda _, __, y: dtypes.append(y.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wav = generator(torch.randn(1, h.num_mels, 3))
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert wav.dtype == torch.float32


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_hifigans_generator_is_reproduced(tmp_path, version):
    h = toy_config(tmp_path, f"configs/hifigan_{version}.json")
    original = randomise(reference.TextbookGenerator(h).double())
    generator = Generator(h).double()
    load_weights(generator, original.state_dict(), "")
    mel = torch.randn(2, h.num_mels, 12, dtype=torch.float64)
    torch.testing.assert_close(generator(mel), original(mel), rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------- iSTFT head


def torch_istft(x: torch.Tensor, n_fft: int, hop_size: int) -> torch.Tensor:
    """Returns torch.istft of log magnitudes and phases [B, n_fft + 2, F] as [B, 1, N]."""
    log_magnitude, phase = x.chunk(2, dim=1)
    spectrum = torch.polar(log_magnitude.exp(), phase.sin())
    window = torch.hann_window(n_fft, dtype=x.dtype)
    return torch.istft(spectrum, n_fft, hop_size, window=window).unsqueeze(1)


@pytest.mark.parametrize("frames", [2, 3, 65])
@pytest.mark.parametrize(("n_fft", "hop_size"), [(16, 4), (16, 8), (20, 5), (8, 1)])
def test_the_istft_head_equals_torch_istft(n_fft, hop_size, frames):
    head = ISTFTHead(n_fft, hop_size).double()
    x = 0.5 * torch.randn(3, n_fft + 2, frames, dtype=torch.float64)
    x.requires_grad_()
    wav, expected = head(x, mel=None), torch_istft(x, n_fft, hop_size)
    assert wav.shape == (3, 1, (frames - 1) * hop_size)
    assert_same_gradients(wav, expected, [x], rtol=1e-6)  # the head's buffers are float32


def test_the_largest_magnitude_is_eight_times_that_of_full_scale():
    """The loudest waveforms are full-scale tones at the frequencies of the bins."""
    n_fft, time = 16, torch.arange(400, dtype=torch.float64)
    wavs = torch.stack([torch.cos(2 * math.pi * k * time / n_fft) for k in range(n_fft // 2 + 1)])
    window = torch.hann_window(n_fft, dtype=torch.float64)
    magnitude = torch.stft(wavs, n_fft, 4, window=window, return_complex=True).abs().max()
    limit = math.exp(ISTFTHead(n_fft, 4).max_log_magnitude)
    assert limit == pytest.approx(8 * float(magnitude), rel=0.01)


@pytest.mark.parametrize("value", [60.0, 1e30])
def test_overflowing_magnitudes_give_finite_samples_and_gradients(value):
    x = torch.full((1, 18, 9), value, requires_grad=True)
    wav = ISTFTHead(16, 4)(x, mel=None)
    wav.square().sum().backward()
    assert wav.isfinite().all()
    assert x.grad.isfinite().all()


# --------------------------------------------------------------------------------- discriminators


def test_discriminators_have_hifigans_parameter_counts():
    with torch.device("meta"):
        discriminators = Discriminators(load_config(ROOT / "config_v1.json"))
    assert (count(discriminators.mpd), count(discriminators.msd)) == (41_092_165, 29_610_627)


@pytest.mark.parametrize("length", [2049, 777])
@pytest.mark.parametrize(
    ("kind", "reference_kind"),
    [
        (MultiPeriodDiscriminator, reference.MultiPeriod),
        (MultiScaleDiscriminator, reference.MultiScale),
    ],
)
def test_discriminators_equal_hifigans(kind, reference_kind, length, tmp_path):
    """Scores, features and their shapes, for lengths that no period divides."""
    h = toy_config(tmp_path, discriminator_channel_mult=0.05)
    original = reference_kind(h.discriminator_channel_mult).double().eval()
    discriminator = kind(h).double().eval()
    load_weights(discriminator, original.state_dict(), "")
    wav = torch.randn(2, 1, length, dtype=torch.float64)
    results = zip(*discriminator(wav), strict=True)
    for (score, features), (expected, _) in zip(results, original(wav, wav), strict=True):
        for ours, theirs in zip([score, *features], [expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_spectral_norm_has_the_gradients_of_its_old_form(tmp_path):
    h = toy_config(tmp_path)
    original = reference.MultiScale(h.discriminator_channel_mult).double().eval()
    discriminator = MultiScaleDiscriminator(h).double().eval()
    load_weights(discriminator, original.state_dict(), "")
    wav = torch.randn(1, 1, 2048, dtype=torch.float64)
    for scores in (discriminator(wav)[0][0], original(wav, wav)[0][0][0]):
        scores.square().sum().backward()
    weight = discriminator.discriminators[0].convs[1].parametrizations.weight.original
    expected = original.discriminators[0].convs[1].weight_orig
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_discriminators_return_the_scales_before_the_periods(tmp_path):
    discriminators, wav = Discriminators(toy_config(tmp_path)).eval(), torch.randn(1, 1, 2048)
    scores, features = discriminators(wav)
    expected = [x for part in (discriminators.msd, discriminators.mpd) for x in part(wav)[0]]
    assert len(scores) == len(features) == 8
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_config_without_discriminators_gives_them_no_parameters(tmp_path):
    h = toy_config(tmp_path, discriminator_train_start_steps=None)
    assert count(Discriminators(h)) == 0
