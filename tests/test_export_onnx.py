"""The ONNX file: PyTorch's samples, from ONNX Runtime alone."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export_onnx
from env import UserError, load_config
from inference import synthesize
from tools.toy import run_main


def export(folder) -> int:
    flags = ("--checkpoint_file", folder / "g_00500000", "--output", folder / "misrnet.onnx")
    return run_main(export_onnx, *flags)


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


def test_the_file_is_whole_and_says_which_mel_it_takes(exported):
    model = onnx.load(exported / "misrnet.onnx", load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    h = load_config(exported / "config.json")
    for key in ("sampling_rate", "hop_size", "num_mels", "n_fft", "win_size", "fmin", "fmax"):
        assert json.loads(metadata[key]) == getattr(h, key)
    assert "1e-5" in metadata["mel"]
    (mel,), (wav,) = model.graph.input, model.graph.output
    assert [mel.name, wav.name] == ["mel", "wav"]
    assert [d.dim_param or d.dim_value for d in mel.type.tensor_type.shape.dim] == ["B", 80, "T"]


def test_the_file_names_no_path_of_the_machine_that_made_it(exported):
    assert b".py" not in (exported / "misrnet.onnx").read_bytes()


def test_a_wrong_export_is_not_written(exported, tmp_path, monkeypatch):
    for name in ("g_00500000", "config.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    other = (exported / "misrnet.onnx").read_bytes()
    broken = onnx.load_from_string(other)
    bias = next(t for t in broken.graph.initializer if t.name == "conv_post.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0.01], np.float32), bias.name))
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: broken)
    with pytest.raises(UserError, match=r"misrnet\.onnx: not written"):
        export(tmp_path)
    assert not (tmp_path / "misrnet.onnx").exists()


def test_a_missing_package_is_named(exported, monkeypatch):
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: onnx.load(exported / "misrnet.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is missing: pip install"):
        export(exported)
