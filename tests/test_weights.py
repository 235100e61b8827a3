"""Weights of the whole family load; saved ones load in HiFi-GAN; the shipped ones synthesize."""

import argparse
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import inference_e2e
from audio import load_wav
from checkpoint import build_state, checkpoint_path, checkpoint_steps, resume, save, warm_start
from env import Config, UserError, load_config
from evaluation.metrics import METRICS, Pair
from inference import load_generator, synthesize
from meldataset import LogMelSpectrogram
from models import Generator
from tests.conftest import new_checkpoint, random_mel
from tools import hifigan_reference as textbook
from tools.hifigan_reference import weight_norm
from tools.toy import ROOT, run_main, save_checkpoint, toy_config, write_config
from weights import generator_weights, load_checkpoint, load_weights, to_hifigan_names

MRF_CONFIG = "configs/hifigan_v2.json"
CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------- loading


class YChansGenerator(nn.Module):
    """y-chan/hifi-gan-misrnet's generator in plain loops, under the names that its files have.

    N 1x1 convolutions of the same input, the shared block on each, and a 1x1 convolution of all:
    these without weight norm, everything else with the old one.
    """

    def __init__(self, h: Config):
        super().__init__()
        C, N = h.upsample_initial_channel, h.resblock_num
        self.conv_pre = weight_norm(nn.Conv1d(h.num_mels, C, 7, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        self.expand_convs, self.reduce_convs = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(h.upsample_rates, h.upsample_kernel_sizes, strict=True):
            up = nn.ConvTranspose1d(C, C // 2, kernel, rate, padding=(kernel - rate) // 2)
            C = C // 2
            self.ups.append(weight_norm(up))
            self.expand_convs.append(nn.Conv1d(C, N * C, 1))
            block = textbook.Block(C, h.resblock_kernel_size, h.resblock_dilation_sizes)
            self.resblocks.append(block)
            self.reduce_convs.append(nn.Conv1d(N * C, C, 1))
        self.conv_post = weight_norm(nn.Conv1d(C, 1, 7, padding=3))

    def forward(self, mel):
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            C, expand, reduce = x.shape[1], self.expand_convs[i], self.reduce_convs[i]
            merged = reduce.bias[:, None]
            for first in range(0, expand.out_channels, C):
                part = slice(first, first + C)
                branch = F.conv1d(x, expand.weight[part], expand.bias[part])
                branch = self.resblocks[i](branch)
                merged = merged + F.conv1d(branch, reduce.weight[:, part])
            x = merged
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


@torch.no_grad()
def old_generator(kind: type[nn.Module], h: Config) -> nn.Module:
    """A loud generator with the old weight norm, whose gains are not the norms of directions."""
    generator = kind(h)
    for name, p in generator.named_parameters():
        if name.endswith("weight_g"):
            p.mul_(1 + 2 * torch.rand_like(p))
    outputs = []
    hook = generator.conv_post.register_forward_hook(lambda _, __, y: outputs.append(y))
    generator(random_mel(40)[None])
    hook.remove()
    generator.conv_post.weight_g.mul_(0.3 / outputs[0].std())
    generator.conv_post.bias.zero_()
    return generator


def assert_same_speech(ours: nn.Module, theirs: nn.Module) -> None:
    """Asserts that both are equal to a millionth of the peak; leaves them in float64."""
    mel = torch.stack([random_mel(40), random_mel(40)]).double()
    with torch.no_grad():
        wavs = [each.eval().double()(mel) for each in (ours, theirs)]
    peak = float(wavs[1].abs().max())
    assert wavs[1].std() > 0.03
    torch.testing.assert_close(*wavs, rtol=0, atol=1e-6 * peak)


@pytest.mark.parametrize("merge", [None, "mean", "conv"])
def test_y_chans_weights_load_and_are_merged_by_conv(merge, tmp_path, capsys):
    path = write_config(tmp_path / "config.json", misr_merge=merge)
    theirs = old_generator(YChansGenerator, load_config(path))
    torch.save({"generator": theirs.state_dict()}, tmp_path / "g_00000001")
    ours, h = load_generator(tmp_path / "g_00000001")
    assert h.misr_merge == "conv"
    said = f'{tmp_path}/g_00000001: from y-chan\'s port, so misr_merge is "conv"\n'
    assert capsys.readouterr().out == ("" if merge == "conv" else said)
    assert_same_speech(ours, theirs)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_hifigans_weights_load(version, tmp_path):
    path = write_config(tmp_path / "config.json", f"configs/hifigan_{version}.json")
    theirs = old_generator(textbook.TextbookGenerator, load_config(path))
    torch.save({"generator": theirs.state_dict()}, tmp_path / "g_00000001")
    assert_same_speech(load_generator(tmp_path / "g_00000001")[0], theirs)


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in weights.items()}


OTHERS = {"discriminator.convs.0.weight": torch.ones(3)}
CONTAINERS = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {}},
    "net_g": lambda w: {"net_g": w, "net_d": OTHERS},
    "ema": lambda w: {"ema": prefixed("net_g.", w)},
    "model.generator": lambda w: {"model": {"generator": w, "discriminator": OTHERS}},
    "three prefixes": lambda w: {"model": prefixed("generator.module._orig_mod.", w)},
    "of a model of speech": lambda w: prefixed("model.vocoder.", w) | OTHERS,
    "beside others": lambda w: {"state_dict": prefixed("generator.", w) | OTHERS},
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_weights_are_found_in_any_container(contain, tmp_path):
    checkpoint = new_checkpoint(tmp_path)
    expected, mel = load_generator(checkpoint)[0], random_mel(9)
    torch.save(contain(torch.load(checkpoint)["generator"]), checkpoint)
    assert torch.equal(synthesize(load_generator(checkpoint)[0], mel), synthesize(expected, mel))


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"params": {"conv_pre.bias": torch.ones(3)}, "epoch": 1}, "its keys are params, epoch"),
        ({"model": OTHERS}, "its keys are discriminator.convs.0.weight"),
        ({f"k{i}": 0 for i in range(99)}, "its keys are k0, k1, k2, k3, k4, k5, k6, k7"),
        ({"state_dict": {}}, "its keys are state_dict"),
        ({"mpd": {}, "optim_g": {}}, "take the g_* file beside it"),
    ],
)
def test_a_file_without_a_generator_is_refused_and_its_keys_are_named(contents, said):
    with pytest.raises(UserError, match=r"^a\.pth: holds no generator; ") as error:
        generator_weights(contents, "a.pth")
    assert str(error.value).endswith(said)


FOREIGN_FILES = {
    "empty": (b"", "an empty file"),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "a pointer of Git LFS; run `git lfs pull`",
    ),
    "page": (b"\n<!DOCTYPE html><html>", "a web page; download the file itself"),
    "tar.gz": (b"\x1f\x8b\x08\0", "an archive of another kind; name a g_* file out of it"),
    "safetensors": (b"\x10" + bytes(7) + b'{"conv_pre.bias"', "of safetensors; write it by torch"),
}


@pytest.mark.parametrize(("contents", "said"), FOREIGN_FILES.values(), ids=FOREIGN_FILES)
def test_a_file_of_another_kind_is_refused_with_the_cure(tmp_path, contents, said):
    (tmp_path / "a.pth").write_bytes(contents)
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "a.pth")
    assert f"a.pth: not a readable checkpoint ({said}" in str(error.value)


def test_weights_of_another_model_name_one_layer_that_is_missing(tmp_path):
    weights = {"conv_pre.bias": torch.zeros(3)}
    with pytest.raises(UserError) as error:
        load_weights(Generator(toy_config(tmp_path)), weights, "a.pth")
    assert re.search(
        r'^a\.pth: does not fit .* state_dict: "[^"]*" and \d+ more$', str(error.value)
    )


@pytest.mark.parametrize("config", ["config_v2.json", MRF_CONFIG, "configs/istft_v2.json"])
def test_weights_load_in_any_form(config, tmp_path):
    """The forms: earlier versions of this repository, without weight norm, in half precision."""
    checkpoint = new_checkpoint(tmp_path, config)
    generator, h = load_generator(checkpoint)
    normalised = Generator(h)
    load_weights(normalised, torch.load(checkpoint)["generator"], checkpoint)
    earlier, folded = normalised.state_dict(), generator.state_dict()
    assert any("parametrizations" in key for key in earlier)
    assert not any(key.endswith(("_g", "_v", "original0")) for key in folded)
    mel = random_mel(9)
    wav = synthesize(generator, mel)
    for weights in (earlier, folded):
        torch.save({"generator": weights}, checkpoint)
        torch.testing.assert_close(
            synthesize(load_generator(checkpoint)[0], mel), wav, rtol=0, atol=1e-6
        )
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({"generator": {k: v.to(dtype) for k, v in folded.items()}}, checkpoint)
        rounded = copy.deepcopy(generator)
        with torch.no_grad():
            for p in rounded.parameters():
                p.copy_(p.to(dtype))
        loaded, _ = load_generator(checkpoint)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(synthesize(loaded, mel), synthesize(rounded, mel))


def test_python_objects_are_named_and_never_loaded(tmp_path):
    torch.save({"generator": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "g_00000001")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "g_00000001")
    begin = f"{tmp_path}/g_00000001: holds Python objects (argparse.Namespace), which are never "
    assert str(error.value).startswith(begin)


def test_a_run_of_y_chans_port_resumes(tmp_path, capsys):
    path = write_config(tmp_path / "config.json", misr_merge="conv")
    h = load_config(path)
    theirs, mult = old_generator(YChansGenerator, h), h.discriminator_channel_mult
    mpd, msd = textbook.MultiPeriod(mult), textbook.MultiScale(mult)
    optim_g = torch.optim.AdamW(theirs.parameters())
    optim_d = torch.optim.AdamW([*msd.parameters(), *mpd.parameters()])
    torch.save({"generator": theirs.state_dict()}, tmp_path / "g_00000007")
    contents = {"mpd": mpd.state_dict(), "msd": msd.state_dict()}
    contents |= {"optim_g": optim_g.state_dict(), "optim_d": optim_d.state_dict()}
    torch.save(contents | {"steps": 7, "epoch": 2}, tmp_path / "do_00000007")
    state = build_state(h, CPU)
    assert resume(state, tmp_path)
    assert (
        "from y-chan's port; the generator's optimizer starts from scratch"
        in capsys.readouterr().out
    )
    assert_same_speech(state.generator, theirs)
    state.h = load_config(write_config(path, misr_merge="mean"))
    with pytest.raises(UserError, match='y-chan\'s port, which needs "misr_merge": "conv"'):
        resume(state, tmp_path)


# ----------------------------------------------------------------------------------- warm starts


@pytest.mark.parametrize("prefix", ["", "generator.module."])
def test_misr_starts_from_the_shared_layers_of_an_mrf_generator(prefix, tmp_path, capsys):
    h = toy_config(tmp_path)
    mrf_h = toy_config(tmp_path, MRF_CONFIG)
    theirs = old_generator(textbook.TextbookGenerator, mrf_h)
    torch.save({"model": prefixed(prefix, theirs.state_dict())}, tmp_path / "g_00000001")
    state = build_state(h, CPU)
    before = [block.input_conv.weight.detach().clone() for block in state.generator.resblocks]
    warm_start(state, [tmp_path / "g_00000001"])
    said = capsys.readouterr().out
    assert "the shared blocks from its resblocks 2, 5, 8, 11; not taken: " in said
    pairs = [(state.generator.conv_pre, theirs.conv_pre)]
    pairs += [(state.generator.conv_post, theirs.conv_post)]
    pairs += zip(state.generator.ups, theirs.ups, strict=True)
    for misr, block in zip(state.generator.resblocks, theirs.resblocks[2::3], strict=True):
        pairs += zip(misr.resblock.convs1, block.convs1, strict=True)
        pairs += zip(misr.resblock.convs2, block.convs2, strict=True)
    for ours, conv in pairs:
        norm = conv.weight_v / torch.norm_except_dim(conv.weight_v, 2, 0)
        torch.testing.assert_close(ours.weight, conv.weight_g * norm)
        assert torch.equal(ours.bias, conv.bias)
    for misr, weight in zip(state.generator.resblocks, before, strict=True):
        assert torch.equal(misr.input_conv.weight, weight)
        assert f"resblocks.{len(before) - 1}.input_conv" in said


def test_a_warm_start_without_a_matching_layer_is_an_error(tmp_path):
    wide = old_generator(
        textbook.TextbookGenerator, toy_config(tmp_path, MRF_CONFIG, upsample_initial_channel=32)
    )
    torch.save({"generator": wide.state_dict()}, tmp_path / "g_00000001")
    with pytest.raises(UserError, match="no layer of its generator fits --config; use the"):
        warm_start(build_state(toy_config(tmp_path), CPU), [tmp_path / "g_00000001"])


# ---------------------------------------------------------------------------------------- saving


def test_saved_weights_load_strictly_into_hifigans_modules(tmp_path):
    """The modules have the old weight norm and spectral norm, and HiFi-GAN's names."""
    h = toy_config(tmp_path, MRF_CONFIG)
    state = build_state(h, CPU)
    loud = old_generator(textbook.TextbookGenerator, h)
    load_weights(state.generator, loud.state_dict(), "")
    save(state, tmp_path, keep=1)
    g, do = (torch.load(checkpoint_path(tmp_path, prefix, 0)) for prefix in ("g", "do"))
    generator, mult = textbook.TextbookGenerator(h), h.discriminator_channel_mult
    generator.load_state_dict(g["generator"], strict=True)
    assert_same_speech(state.generator, generator)
    wav = torch.randn(1, 1, 4096, dtype=torch.float64)
    discriminators = state.discriminators.double().eval()
    for ours, old, saved in (
        (discriminators.mpd, textbook.MultiPeriod(mult), do["mpd"]),
        (discriminators.msd, textbook.MultiScale(mult), do["msd"]),
    ):
        old.load_state_dict(saved, strict=True)
        expected = [score for (score, _), _ in old.double().eval()(wav, wav)]
        for score, theirs in zip(ours(wav)[0], expected, strict=True):
            torch.testing.assert_close(score, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("config", ["config_v2.json", "configs/istft_v2.json"])
def test_misr_and_istft_weights_are_saved_with_weight_norm(config, tmp_path):
    """This includes generators whose weight norm was removed."""
    generator = Generator(toy_config(tmp_path, config))
    convs = [name for name, m in generator.named_modules() if isinstance(m, nn.Conv1d)]
    convs += [f"ups.{i}" for i in range(len(generator.ups))]
    expected = {f"{name}.{part}" for name in convs for part in ("bias", "weight_g", "weight_v")}
    normalised = to_hifigan_names(generator)
    generator.remove_weight_norm()
    folded = to_hifigan_names(generator)
    assert set(normalised) == set(folded) == expected
    for weights in (normalised, folded):
        for name in convs:
            v, g = weights[f"{name}.weight_v"], weights[f"{name}.weight_g"]
            weight = v * (g / torch.norm_except_dim(v, 2, 0))
            torch.testing.assert_close(weight, generator.get_submodule(name).weight.detach())


# --------------------------------------------------------------------------------------- golden

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CONFIGS = {
    "misr": ("config_v2.json", {"misr_merge": "conv"}),
    "mrf": (MRF_CONFIG, {}),
    "istft": ("configs/istft_v2.json", {}),
}


def golden_checkpoint(folder: Path, config: str, changes: dict) -> Path:
    """A toy g_ file whose weights follow from NumPy's RandomState, which never changes."""
    h = load_config(write_config(folder / "config.json", config, **changes))
    shapes = {key: value.shape for key, value in to_hifigan_names(Generator(h)).items()}
    random, weights = np.random.RandomState(0), {}
    for key, shape in sorted(shapes.items()):
        values = random.standard_normal(tuple(shape))
        if key.endswith("weight_g"):
            values = 1 + 0.1 * values
        elif key.endswith("bias"):
            values = 0.1 * values
        weights[key] = torch.from_numpy(values).float()
    weights["conv_post.weight_g"] *= 0.3  # loud, but within full scale
    save_checkpoint(folder / "g_00000001", {"generator": weights})
    return folder / "g_00000001"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_weights_that_are_zero_or_not_finite_are_kept(value):
    folded, normed = (torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3)) for _ in range(2))
    torch.nn.init.constant_(folded[0].weight, value)
    torch.nn.utils.parametrizations.weight_norm(normed[0])
    load_weights(normed, folded.state_dict(), "g")
    direction = normed[0].parametrizations.weight.original1
    torch.testing.assert_close(direction, folded[0].weight, equal_nan=True)


@pytest.mark.parametrize("std", [0.003, 3.0])
def test_a_first_step_after_weight_norm_is_added_changes_weights_little(std):
    """The change is as small as with HiFi-GAN's own files. The weights are equal bit for bit."""
    folded, again, normed = (torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3)) for _ in range(3))
    torch.nn.init.normal_(folded[0].weight, std=std)
    load_weights(again, to_hifigan_names(folded), "g")
    assert torch.equal(again[0].weight, folded[0].weight)
    torch.nn.utils.parametrizations.weight_norm(normed[0])
    load_weights(normed, folded.state_dict(), "g")
    before = normed[0].weight.detach().clone()
    torch.testing.assert_close(before, folded[0].weight.detach(), rtol=1e-6, atol=0)
    optimizer = torch.optim.AdamW([normed[0].parametrizations.weight.original1], 2e-4)
    normed(torch.randn(1, 8, 9)).square().sum().backward()
    optimizer.step()
    assert float((normed[0].weight.detach() - before).norm() / before.norm()) < 0.002


@pytest.mark.parametrize("name", GOLDEN_CONFIGS)
def test_a_stored_mel_gives_the_stored_samples(name, tmp_path):
    """tests/golden/<name>.wav was written by inference_e2e.py when the tests above had passed."""
    config, changes = GOLDEN_CONFIGS[name]
    status = run_main(
        inference_e2e,
        *("--input_mels_dir", GOLDEN / "mel.npy", "--output_dir", tmp_path),
        *("--checkpoint_file", golden_checkpoint(tmp_path, config, changes), "--device", "cpu"),
    )
    assert status == 0
    wav, _ = soundfile.read(tmp_path / "mel_generated_e2e.wav")
    expected, _ = soundfile.read(GOLDEN / f"{name}.wav")
    assert expected.std() > 0.01 and np.abs(expected).max() < 0.9
    np.testing.assert_allclose(wav, expected, rtol=0, atol=1e-4)


SHIPPED = sorted(folder.parent for folder in ROOT.glob("pretrained/*/config.json"))
assert SHIPPED
RECORDING = ROOT / "pretrained/samples/index_files/0001-0.flac"  # LJ003-0140, in no training list
LARGEST_MEL_L1, LOWEST_PESQ = 0.4, 2.5
OF_MEASURED = 1.15  # the error of the first 2 s of a clip, at most, relative to the whole


def measured_error(system: str) -> float:
    """The mel_l1 of the whole recording, as evaluate.py measured it."""
    reports = [json.loads(path.read_text()) for path in ROOT.glob("docs/figures/*.json")]
    files = [
        file["systems"]
        for report in reports
        for file in report["files"]
        if file["name"] == "LJ003-0140"
    ]
    (found,) = (systems[system] for systems in files if system in systems)
    return found["values"]["mel_l1"]


def qualities(generator: Generator, h: Config) -> dict[str, float]:
    """mel_l1 and pesq_wb of 2 s of the recording, vocoded from their mel."""
    wav = load_wav(RECORDING, h.sampling_rate)[: 2 * h.sampling_rate]
    wav_hat = synthesize(generator, LogMelSpectrogram(h, h.fmax)(wav[None])[0])
    pair, names = Pair(wav, wav_hat, h), ("mel_l1", "pesq_wb")
    return {metric.name: metric.function(pair) for metric in METRICS if metric.name in names}


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_shipped_weights_synthesize_speech_and_random_ones_do_not(folder):
    path = checkpoint_path(folder, "g", checkpoint_steps(folder, "g")[-1])
    generator, h = load_generator(path)
    trained = qualities(generator, h)
    assert trained["mel_l1"] < min(LARGEST_MEL_L1, OF_MEASURED * measured_error(folder.name))
    assert trained["pesq_wb"] > LOWEST_PESQ
    random = qualities(Generator(h).eval(), h)
    assert random["mel_l1"] > 2 * trained["mel_l1"] and random["mel_l1"] > LARGEST_MEL_L1
    assert random["pesq_wb"] < trained["pesq_wb"] - 1
