"""The ONNX file: PyTorch's samples, from ONNX Runtime alone."""

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export_onnx
from env import UserError, load_config
from inference import synthesize, to_inference
from meldataset import LogMelSpectrogram
from tests.conftest import new_generator, random_mel
from tools.toy import ROOT, run_main, save_checkpoint, speech_like


def export(folder, *flags) -> int:
    files = ("--checkpoint_file", folder / "g_00500000", "--output", folder / "misrnet.onnx")
    return run_main(export_onnx, *files, *flags)


def copy_checkpoint(folder, to):
    for name in ("g_00500000", "config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


@pytest.fixture(scope="module")
def halved(exported, tmp_path_factory):
    """A folder as `exported`, with weights in fp16, and what the export said."""
    folder = copy_checkpoint(exported, tmp_path_factory.mktemp("halved"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        export(folder, "--precision", "fp16")
    return folder, said.getvalue()


def run_onnx(folder, mel: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "misrnet.onnx")
    return session.run(None, {"mel": mel})[0]


@pytest.mark.parametrize("frames", [1, 2, 50, 333])
@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_runtime_gives_pytorchs_samples(exported, batch, frames):
    generator, h = export_onnx.load_generator(exported / "g_00500000")
    mel = np.random.default_rng(0).uniform(-11, 2, (batch, h.num_mels, frames)).astype(np.float32)
    wav = run_onnx(exported, mel)
    assert wav.shape == (batch, 1, frames * h.hop_size)
    assert wav.std() > 0
    for given, heard in zip(mel, wav[:, 0], strict=True):
        expected = synthesize(generator, torch.from_numpy(given)).numpy()
        np.testing.assert_allclose(heard, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "config, changes",
    [
        ("configs/istft_v2.json", {"upsample_rates": [64], "upsample_kernel_sizes": [64]}),
        (
            "configs/hifigan_v2.json",
            {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]]},
        ),
        ("config_v2.json", {"misr_merge": "conv"}),
    ],
)
def test_other_generators_are_the_same_in_onnx_runtime(config, changes, tmp_path):
    one_stage = {"upsample_rates": [256], "upsample_kernel_sizes": [256]} | changes
    generator = new_generator(tmp_path, config, **one_stage)
    h = load_config(tmp_path / "config.json")
    file = export_onnx.to_onnx(to_inference(generator, torch.device("cpu"), "fp32"), h)
    assert export_onnx.largest_difference(file.SerializeToString(), generator) <= 1e-5


def test_pulses_and_noise_are_the_same_in_onnx_runtime(tmp_path, capsys):
    """Of the mel's own rate. A phase of many cycles is as exact as its pitch; see export_onnx."""
    generator = new_generator(tmp_path, "configs/frame_v2.json", griffin_lim_steps=4)
    save_checkpoint(tmp_path / "g_00500000", {"generator": generator.state_dict()})
    assert export(tmp_path) == 0
    assert "largest difference from PyTorch" in capsys.readouterr().out
    generator, _ = export_onnx.load_generator(tmp_path / "g_00500000")
    for frames, allowed in ((20, 3e-4), (333, 5e-3)):
        mel = random_mel(frames)
        (wav,) = run_onnx(tmp_path, mel[None].numpy())[:, 0]
        expected = synthesize(generator, mel).numpy()
        np.testing.assert_allclose(wav, expected, rtol=0, atol=allowed * np.abs(expected).max())
    metadata = onnx.load(tmp_path / "misrnet.onnx").metadata_props
    assert "receptive_field" not in {entry.key for entry in metadata}  # it is spoken whole
    # A mistake late in a long mel, of which samples are not compared, is found by its log-mel.
    file = (tmp_path / "misrnet.onnx").read_bytes()
    generator, h = export_onnx.load_generator(tmp_path / "g_00500000")
    assert export_onnx.log_mel_difference(file, generator, h) <= 1e-3
    late = generator.head.noise[100 * h.hop_size : -h.n_fft]  # its end is heard before a mel, too
    late.copy_(late.flip(0))
    assert export_onnx.largest_difference(file, generator) <= 1e-2
    assert export_onnx.log_mel_difference(file, generator, h) > 10 * export_onnx.LARGEST_OF_LOG_MELS


def test_the_shipped_weights_of_pulses_are_exported(tmp_path):
    (file,) = (ROOT / "pretrained/frame_v2_universal").glob("g_*")
    output = tmp_path / "misrnet.onnx"
    assert run_main(export_onnx, "--checkpoint_file", file, "--output", output) == 0
    session = onnxruntime.InferenceSession(output)
    generator, h = export_onnx.load_generator(file)
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(speech_like(1.5))[None])
    (wav,) = session.run(["wav"], {"mel": mel.numpy()})[0][:, 0]
    expected = synthesize(generator, mel[0]).numpy()
    np.testing.assert_allclose(wav, expected, rtol=0, atol=0.01 * np.abs(expected).max())


def test_the_file_is_whole_and_says_which_mel_it_takes(exported):
    model = onnx.load(exported / "misrnet.onnx", load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    h = load_config(exported / "config.json")
    for key in ("sampling_rate", "hop_size", "num_mels", "n_fft", "win_size", "fmin", "fmax"):
        assert json.loads(metadata[key]) == getattr(h, key)
    assert json.loads(metadata["mel_floor"]) == h.mel_floor
    generator, _ = export_onnx.load_generator(exported / "g_00500000")
    assert tuple(json.loads(metadata["receptive_field"])) == generator.receptive_field
    (mel,), (wav,) = model.graph.input, model.graph.output
    assert [mel.name, wav.name] == ["mel", "wav"]
    assert [d.dim_param or d.dim_value for d in mel.type.tensor_type.shape.dim] == ["B", 80, "T"]


def test_the_file_names_no_path_of_the_machine_that_made_it(exported):
    assert b".py" not in (exported / "misrnet.onnx").read_bytes()


def test_a_wrong_export_is_not_written(exported, tmp_path, monkeypatch):
    copy_checkpoint(exported, tmp_path)
    other = (exported / "misrnet.onnx").read_bytes()
    broken = onnx.load_from_string(other)
    bias = next(t for t in broken.graph.initializer if t.name == "conv_pre.bias")
    ones = np.ones(bias.dims, np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(ones, bias.name))
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: broken)
    with pytest.raises(UserError, match=r"misrnet\.onnx: not written"):
        export(tmp_path)
    assert not (tmp_path / "misrnet.onnx").exists()


def test_a_missing_package_is_named(exported, monkeypatch):
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: onnx.load(exported / "misrnet.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is missing: pip install"):
        export(exported)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("config_v2.json", {}),
        ("config_v2.json", {"misr_merge": "conv"}),
        ("config_v2.json", {"resblock": "2", "resblock_num": 2}),
        ("config_v2.json", {"upsample_initial_channel": 256}),
        ("config_v2.json", {"upsample_initial_channel": 256, "misr_merge": "conv"}),
        ("configs/hifigan_v2.json", {}),
    ],
    ids=["mean", "conv", "ResBlock2", "wide", "wide-conv", "MRF"],
)
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_pictures_give_the_same_samples(config, changes, frames, tmp_path):
    generator = new_generator(tmp_path, config, **changes).double().eval()
    with torch.no_grad():
        for module in generator.modules():  # a MISR's fresh biases are zero
            if isinstance(module, torch.nn.Conv1d):
                module.bias.add_(0.1 * torch.randn_like(module.bias))
        mel = torch.stack([random_mel(frames), random_mel(frames)]).double()
        expected = generator(mel)
        wav = export_onnx.with_conv2d_misr(generator)(mel)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(wav, expected, rtol=0, atol=1e-12)


def test_misrs_convolve_pictures_alone(exported):
    """Of lines, which have but one length, ONNX Runtime's convolutions are slow."""
    model = onnx.load(exported / "misrnet.onnx")
    taps = [
        attribute.ints
        for node in model.graph.node
        for attribute in node.attribute
        if node.op_type == "Conv" and attribute.name == "kernel_shape"
    ]
    h = load_config(exported / "config.json")
    stages, of_block = len(h.upsample_rates), 2 * len(h.resblock_dilation_sizes)
    assert taps.count([1, h.resblock_kernel_size]) == stages * of_block
    assert taps.count([h.resblock_num, 1]) == stages  # the views
    assert len(taps) == stages * (of_block + 1) + 2  # conv_pre, conv_post


def test_half_precision_halves_the_file_and_says_what_it_costs(exported, halved):
    folder, said = halved
    said = re.findall(r"largest difference from (.+): (\S+) of the peak", said)
    (from_rounded, from_pytorch), (from_fp32, difference) = said
    assert [from_rounded, from_fp32] == ["PyTorch", "fp32 weights"]
    assert float(from_pytorch) < 1e-5 < float(difference) < 0.05
    sizes = []
    for file in (exported / "misrnet.onnx", folder / "misrnet.onnx"):
        weights = [t for t in onnx.load(file).graph.initializer if len(t.dims) > 2]
        sizes.append(sum(len(t.raw_data) for t in weights))
    assert sizes[1] * 2 == sizes[0]
    mel = random_mel(30)[None].numpy()
    wav, expected = run_onnx(folder, mel), run_onnx(exported, mel)
    assert wav.dtype == np.float32
    assert 0 < np.abs(wav - expected).max() < 0.05 * np.abs(expected).max()


def test_the_documented_lines_stream(exported, monkeypatch):
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs/onnx.md").read_text(), re.S)
    monkeypatch.chdir(exported)
    names = {}
    exec(code, names)
    mel = random_mel(100).numpy()
    expected = run_onnx(exported, mel[None])[0, 0]
    for frames in (1, 32, 100, 1000):
        pieces = list(names["vocode"](mel, frames))
        assert len(pieces) == -(-100 // frames)
        wav = np.concatenate(pieces)
        np.testing.assert_allclose(wav, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# An acoustic model that says MEL whatever it is given to read.
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
    """A model for sherpa-onnx's Matcha path that gives `mel` [1, num_mels, T] for any text."""
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
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sherpa_onnx_speaks_with_it(exported, halved, precision, tmp_path):
    """In a process of its own, for sherpa-onnx brings its own ONNX Runtime."""
    folder = exported if precision == "fp32" else halved[0]
    (tmp_path / "misrnet.onnx").write_bytes((folder / "misrnet.onnx").read_bytes())
    mel, h = random_mel(40)[None].numpy(), load_config(folder / "config.json")
    write_acoustic_model(tmp_path, mel, h.sampling_rate)
    command = [sys.executable, "-c", SHERPA, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "model_type=hifigan" in done.stderr
    assert int(done.stdout) == h.sampling_rate
    expected = run_onnx(tmp_path, mel)[0, 0]
    wav = np.load(tmp_path / "wav.npy")
    np.testing.assert_allclose(wav, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
