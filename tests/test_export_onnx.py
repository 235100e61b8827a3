"""Exported files give PyTorch's samples in ONNX Runtime."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

import export_onnx
from env import UserError, load_config
from export_onnx import Check, OnnxVocoder
from harmonic import STFT
from inference import Streamer, load_generator, synthesize, to_inference
from meldataset import LogMelSpectrogram
from models import Generator
from onnx_graph import GraphSTFT
from tests.conftest import new_generator, random_mel
from tools.toy import ROOT, run_main, speech_like, toy_config

ONE_STAGE = {"upsample_rates": [256], "upsample_kernel_sizes": [512]}
FRAME_RATE = {"griffin_lim_steps": 4, "refiner_channels": 4}
SMALL_STFT = {"n_fft": 90, "win_size": 72, "hop_size": 20, "segment_size": 2000, "num_mels": 20}
GENERATORS = {
    "MISR mean": ("config_v2.json", ONE_STAGE),
    "MISR conv": ("config_v2.json", ONE_STAGE | {"misr_merge": "conv"}),
    "ResBlock2": ("config_v2.json", ONE_STAGE | {"resblock": "2", "resblock_num": 2}),
    "two stages": (
        "config_v2.json",
        {"upsample_rates": [16, 16], "upsample_kernel_sizes": [32, 32]},
    ),
    "MRF": ("configs/hifigan_v2.json", ONE_STAGE | {"resblock_kernel_sizes": [3, 5, 7]}),
    "iSTFT": (
        "configs/istft_v2.json",
        {"upsample_rates": [64], "upsample_kernel_sizes": [128]},
    ),
    "frame rate": ("configs/frame_v2.json", FRAME_RATE),
    "frame rate, ResBlock2": ("configs/frame_v3.json", FRAME_RATE | SMALL_STFT),
    "frame rate, look-ahead": (
        "configs/frame_v2.json",
        FRAME_RATE | SMALL_STFT | {"lookahead_frames": 2},
    ),
}


def new_inference_generator(folder, kind: str):
    """Returns a toy generator ready for inference, and its config."""
    config, changes = GENERATORS[kind]
    if kind.startswith("frame rate"):
        h = toy_config(folder, config, **changes)
        torch.manual_seed(0)
        generator = Generator(h)
    else:
        generator = new_generator(folder, config, **changes)
        h = load_config(folder / "config.json")
    generator = to_inference(generator, torch.device("cpu"), "fp32")
    with torch.no_grad():
        for parameter in generator.parameters():  # new biases are zero in places
            if parameter.dim() == 1:
                parameter += 0.05 * torch.randn_like(parameter)
    return generator, h


@pytest.fixture(scope="module", params=GENERATORS)
def generator_and_config(request, tmp_path_factory):
    """A toy generator of each kind, and its config."""
    return new_inference_generator(tmp_path_factory.mktemp("toy"), request.param)


def export(folder, *flags) -> int:
    files = ("--checkpoint_file", folder / "g_00500000", "--output", folder / "misrnet.onnx")
    return run_main(export_onnx, *files, *flags)


def copy_checkpoint(folder, to):
    for name in ("g_00500000", "config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def metadata_of(path) -> dict[str, str]:
    model = onnx.load(path, load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    return {entry.key: entry.value for entry in model.metadata_props}


def assert_same(wav: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    assert wav.shape == expected.shape
    assert expected.std() > 0
    torch.testing.assert_close(wav, expected, rtol=0, atol=allowed * float(expected.abs().max()))


def test_onnx_runtime_gives_pytorchs_samples(generator_and_config):
    generator, h = generator_and_config
    vocoder = OnnxVocoder(export_onnx.to_onnx(generator, h).SerializeToString())
    allowed = 2e-3 if h.is_frame_rate else 1e-5
    for batch, frames in ((1, 1), (1, 2), (3, 20), (1, 100)):
        mel = torch.rand(batch, h.num_mels, frames) * 12 - 11
        with torch.inference_mode():
            expected = generator(mel)
        assert_same(vocoder(mel), expected, allowed)


def test_a_stream_gives_the_samples_of_streamer(generator_and_config):
    """At the start and at the end, too, and with mels shorter than what a stream waits for."""
    generator, h = generator_and_config
    frames = 1 if h.resblock == "2" else 3
    vocoder = OnnxVocoder(export_onnx.to_stream_onnx(generator, h, frames).SerializeToString())
    allowed = 2e-3 if h.is_frame_rate else 1e-5
    for length in (1, 2, 5, 50):
        mel = torch.rand(h.num_mels, length) * 12 - 11
        streamer = Streamer(generator)
        expected = torch.cat([streamer.feed(mel), streamer.flush()])
        assert_same(vocoder(mel[None])[0, 0], expected, allowed)


def test_a_wrong_sample_late_in_a_long_mel_fails_the_check(tmp_path):
    generator, h = new_inference_generator(tmp_path, "frame rate")
    file = export_onnx.to_onnx(generator, h).SerializeToString()
    assert Check(file, generator, h, frames=None).log_mel_difference <= 1e-3
    late = generator.head.noise[100 * h.hop_size : -h.n_fft]
    late.copy_(late.flip(0))
    check = Check(file, generator, h, frames=None)
    assert check.difference <= 1e-2
    assert check.log_mel_difference > 10 * export_onnx.MAX_LOG_MEL_DIFFERENCE


@pytest.mark.parametrize(
    ("n_fft", "win_size", "hop_size"),
    [(1024, 1024, 256), (64, 48, 16), (90, 90, 20), (45, 40, 15), (24, 24, 24)],
)
def test_products_of_small_matrices_are_an_stft(n_fft, win_size, hop_size, tmp_path):
    sizes = {"n_fft": n_fft, "win_size": win_size, "hop_size": hop_size, "num_mels": 4}
    h = toy_config(tmp_path, "configs/frame_v3.json", segment_size=8 * hop_size, **sizes)
    oracle = STFT(h)
    stft = GraphSTFT(oracle)
    stft.prepare()
    wav = torch.randn(2, (7 + oracle.overlap) * hop_size)
    z = stft(stft.to_hops(wav))
    spectrum = oracle(wav).transpose(1, 2)[:, stft.bins]
    assert set(stft.bins.tolist()) == set(range(n_fft // 2 + 1))
    torch.testing.assert_close(z[:, 0], spectrum.real, rtol=0, atol=1e-4)
    torch.testing.assert_close(z[:, 1].abs(), spectrum.imag.abs(), rtol=0, atol=1e-4)
    expected = oracle.inverse(oracle(wav))
    torch.testing.assert_close(stft.to_wav(stft.inverse(z)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "largest"), [("frame_v3", 0.8), ("frame_v2", 2.5)])
def test_shipped_weights_are_exported_to_a_small_file(name, largest, tmp_path):
    (checkpoint,) = (ROOT / f"pretrained/{name}_universal").glob("g_*")
    generator, h = load_generator(checkpoint)
    file = export_onnx.to_onnx(generator, h).SerializeToString()
    assert len(file) < largest * 1e6
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(speech_like(1.5))[None])
    assert_same(OnnxVocoder(file)(mel)[0, 0], synthesize(generator, mel[0]), 0.01)


def test_the_metadata_describe_the_mel(exported):
    about = metadata_of(exported / "misrnet.onnx")
    generator, h = load_generator(exported / "g_00500000")
    for key in ("sampling_rate", "hop_size", "num_mels", "n_fft", "win_size", "fmin", "fmax"):
        assert json.loads(about[key]) == getattr(h, key)
    assert json.loads(about["mel_floor"]) == h.mel_floor
    assert tuple(json.loads(about["receptive_field"])) == generator.receptive_field
    graph = onnx.load(exported / "misrnet.onnx").graph
    (mel,), (wav,) = graph.input, graph.output
    assert [mel.name, wav.name] == ["mel", "wav"]
    assert [d.dim_param or d.dim_value for d in mel.type.tensor_type.shape.dim] == ["B", 80, "T"]


def test_the_metadata_describe_the_state(exported, tmp_path, capsys):
    copy_checkpoint(exported, tmp_path)
    assert export(tmp_path, "--stream", 2) == 0
    assert "largest difference from PyTorch" in capsys.readouterr().out
    about = metadata_of(tmp_path / "misrnet.onnx")
    assert (about["frames"], int(about["latency_samples"]) > 0) == ("2", True)
    graph = onnx.load(tmp_path / "misrnet.onnx").graph
    state = json.loads(about["state"])
    assert [each.name for each in graph.input] == ["mel", *state]
    assert [each.name for each in graph.output] == ["wav", *(f"next.{name}" for name in state)]


def test_a_file_contains_no_paths(exported):
    assert b".py" not in (exported / "misrnet.onnx").read_bytes()


def test_a_wrong_export_is_not_written(exported, tmp_path, monkeypatch):
    copy_checkpoint(exported, tmp_path)
    broken = onnx.load(exported / "misrnet.onnx")
    bias = next(t for t in broken.graph.initializer if t.name == "conv_pre.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.ones(bias.dims, np.float32), bias.name))
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: broken)
    with pytest.raises(UserError, match=r"misrnet\.onnx: not written"):
        export(tmp_path)
    assert not (tmp_path / "misrnet.onnx").exists()


def test_a_missing_package_is_named(exported, monkeypatch):
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: onnx.load(exported / "misrnet.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is missing: pip install"):
        export(exported)


def test_all_convolutions_have_two_dimensions(exported):
    """ONNX Runtime's convolutions of one dimension are slow."""
    graph = onnx.load(exported / "misrnet.onnx").graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    kernels = [a.ints for node in convolutions for a in node.attribute if a.name == "kernel_shape"]
    assert len(kernels) == len(convolutions) > 10
    assert {len(kernel) for kernel in kernels} == {2}


def test_half_precision_halves_the_file(exported, tmp_path, capsys):
    copy_checkpoint(exported, tmp_path)
    export(tmp_path, "--precision", "fp16")
    said = re.findall(r"largest difference from (.+): (\S+) of the peak", capsys.readouterr().out)
    (from_rounded, from_pytorch), (from_fp32, difference) = said
    assert [from_rounded, from_fp32] == ["PyTorch", "fp32 weights"]
    assert float(from_pytorch) < 1e-5 < float(difference) < 0.05
    sizes = [(folder / "misrnet.onnx").stat().st_size for folder in (exported, tmp_path)]
    weights = sum(p.numel() for p in load_generator(exported / "g_00500000")[0].parameters())
    assert sizes[0] - sizes[1] > 1.5 * weights
    mel = random_mel(30)[None]
    files = [(folder / "misrnet.onnx").read_bytes() for folder in (exported, tmp_path)]
    expected, wav = (OnnxVocoder(file)(mel) for file in files)
    assert 0 < (wav - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_documented_lines_stream(exported, tmp_path, monkeypatch):
    copy_checkpoint(exported, tmp_path)
    export(tmp_path, "--stream", 4)
    (tmp_path / "misrnet.onnx").rename(tmp_path / "misrnet_stream.onnx")
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs/onnx.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    mel = random_mel(30).numpy()
    pieces = [mel[:, i : i + 4] for i in range(0, 30, 4)]
    wav = np.concatenate(list(names["vocode"](pieces)))
    expected = OnnxVocoder((exported / "misrnet.onnx").read_bytes())(torch.from_numpy(mel)[None])
    assert_same(torch.from_numpy(wav), expected[0, 0], 1e-5)


# Runs an acoustic model that outputs a fixed mel for any text.
SHERPA = """
import sys, numpy, sherpa_onnx
folder = sys.argv[1]
matcha = sherpa_onnx.OfflineTtsMatchaModelConfig(
    acoustic_model=f"{folder}/acoustic.onnx", vocoder=f"{folder}/misrnet.onnx",
    lexicon=f"{folder}/lexicon.txt", tokens=f"{folder}/tokens.txt")
model = sherpa_onnx.OfflineTtsModelConfig(matcha=matcha, num_threads=1, debug=True)
tts = sherpa_onnx.OfflineTts(sherpa_onnx.OfflineTtsConfig(model=model, silence_scale=1.0))
audio = tts.generate("a")
numpy.save(f"{folder}/wav.npy", numpy.array(audio.samples, numpy.float32))
print(audio.sample_rate)
"""


def write_acoustic_model(folder, mel: np.ndarray, sampling_rate: int) -> None:
    """Writes a model for sherpa-onnx's Matcha path that outputs `mel` [1, num_mels, T]."""
    one = onnx.helper.make_tensor_value_info
    inputs = [one("x", onnx.TensorProto.INT64, [1, "L"])]
    inputs += [one("x_length", onnx.TensorProto.INT64, [1])]
    inputs += [one(name, onnx.TensorProto.FLOAT, [1]) for name in ("noise_scale", "length_scale")]
    node = onnx.helper.make_node("Constant", [], ["mel"], value=onnx.numpy_helper.from_array(mel))
    output = one("mel", onnx.TensorProto.FLOAT, mel.shape)
    graph = onnx.helper.make_graph([node], "acoustic", inputs, [output])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    metadata = {"sample_rate": sampling_rate, "n_speakers": 1, "pad_id": 0, "use_eos_bos": 0}
    metadata |= {"jieba": 1, "has_espeak": 0}  # a lexicon of its own, no phonemizer's data
    onnx.helper.set_model_props(model, {key: str(value) for key, value in metadata.items()})
    onnx.save(model, folder / "acoustic.onnx")
    (folder / "tokens.txt").write_text("_ 0\na 1\n")
    (folder / "lexicon.txt").write_text("a a\n")


@pytest.mark.skipif(not importlib.util.find_spec("sherpa_onnx"), reason="no sherpa-onnx")
@pytest.mark.parametrize("kind", ["MISR mean", "frame rate"])
def test_sherpa_onnx_gives_the_same_samples(kind, tmp_path):
    """Runs in a process of its own, because sherpa-onnx brings its own ONNX Runtime."""
    generator, h = new_inference_generator(tmp_path, kind)
    file = export_onnx.to_onnx(generator, h).SerializeToString()
    (tmp_path / "misrnet.onnx").write_bytes(file)
    mel = random_mel(40)[None]
    write_acoustic_model(tmp_path, mel.numpy(), h.sampling_rate)
    command = [sys.executable, "-c", SHERPA, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "model_type=hifigan" in done.stderr
    assert int(done.stdout) == h.sampling_rate
    expected = OnnxVocoder(file)(mel)[0, 0].numpy()
    wav = np.load(tmp_path / "wav.npy")
    np.testing.assert_allclose(wav, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
