"""Extreme mels, sounds and weights give finite sound within bounds, or a one-line error."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import inference_e2e
from audio import load_wav
from env import load_config
from inference import load_generator, synthesize
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram
from models import Generator
from tools.toy import run_main, save_checkpoint, toy_config, write_config

CONFIGS = {
    "MISR": "config_v2.json",
    "MRF": "configs/hifigan_v2.json",
    "iSTFT": "configs/istft_v2.json",
}
LARGEST_ISTFT = 50  # the magnitudes of an iSTFT head are clamped
FRAMES = 30
random = torch.Generator().manual_seed(0)
EXTREMES = {
    "silence": torch.full((80, FRAMES), -11.5),
    "random within 50": torch.rand(80, FRAMES, generator=random) * 100 - 50,
    "1e30": torch.full((80, FRAMES), 1e30),
    "-1e4": torch.full((80, FRAMES), -1e4),
    "one giant in each frame": 1e4 * torch.eye(80, FRAMES),
    "denormal": torch.full((80, FRAMES), 1e-40),
}
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def new_checkpoint(folder: Path, config: str) -> Path:
    """Writes a toy g_ file of random weights into `folder`, with its config.json."""
    h = load_config(write_config(folder / "config.json", config))
    save_checkpoint(folder / "g_00000001", {"generator": Generator(h).state_dict()})
    return folder / "g_00000001"


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def checkpoint(request, tmp_path) -> Path:
    """A toy g_ file of each kind of generator."""
    return new_checkpoint(tmp_path, request.param)


@pytest.fixture
def misr(tmp_path) -> Path:
    """A toy g_ file, for what does not depend on the model."""
    return new_checkpoint(tmp_path, "config_v2.json")


def vocode(checkpoint: Path, inputs: Path, output_dir: Path, *flags, module=inference_e2e) -> int:
    kind = "mels" if module is inference_e2e else "wavs"
    return run_main(
        module,
        *(f"--input_{kind}_dir", inputs, "--output_dir", output_dir),
        *("--checkpoint_file", checkpoint, "--device", "cpu", *flags),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_extreme_mels_give_finite_sound_within_bounds(checkpoint, precision, tmp_path):
    generator, h = load_generator(checkpoint, precision=precision)
    (tmp_path / "in").mkdir()
    for name, mel in EXTREMES.items():
        wav = synthesize(generator, mel)
        assert wav.shape == (FRAMES * h.hop_size,) and wav.isfinite().all()
        assert wav.abs().max() <= (LARGEST_ISTFT if h.uses_istft else 1), name
        np.save(tmp_path / f"in/{name}.npy", mel)
    flags = ("--precision", precision, "--batch_size", 3)
    assert vocode(checkpoint, tmp_path / "in", tmp_path / "out", *flags) == 0
    for name in EXTREMES:
        wav, _ = soundfile.read(tmp_path / f"out/{name}_generated_e2e.wav")
        assert len(wav) == FRAMES * h.hop_size and np.abs(wav).max() < 1


@pytest.mark.filterwarnings("error")  # a warning would be a second line
@pytest.mark.parametrize("value", [*NOT_FINITE, 1e39])
def test_a_mel_file_with_one_value_that_is_not_finite_is_skipped(misr, value, tmp_path, capsys):
    mel = np.zeros((80, FRAMES))
    mel[11, 7] = value
    np.save(tmp_path / "a.npy", mel)
    assert vocode(misr, tmp_path / "a.npy", tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped: {tmp_path / 'a.npy'}: ") and "NaN or infinite" in line


@pytest.mark.parametrize("value", NOT_FINITE)
def test_weights_that_are_not_finite_write_nothing(checkpoint, value, tmp_path, capsys):
    weights = Generator(load_config(checkpoint.with_name("config.json"))).state_dict()
    weights["conv_pre.bias"][3] = value
    save_checkpoint(checkpoint, {"generator": weights})
    np.save(tmp_path / "a.npy", np.zeros((80, FRAMES)))
    assert vocode(checkpoint, tmp_path / "a.npy", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the waveform is not finite" in line
    assert list((tmp_path / "out").glob("*")) == []


def test_the_mel_of_any_sound_is_finite_and_has_a_floor(tmp_path):
    h = toy_config(tmp_path)
    log_mel = LogMelSpectrogram(h, h.fmax)
    for wav in (
        torch.full((5000,), 1e-40),
        torch.ones(5000),
        torch.tensor([1.0, -1.0]).repeat(2500),
        torch.eye(1, 5000)[0],
    ):
        mel = log_mel(wav[None])
        assert mel.isfinite().all() and mel.min() >= SILENT_LOG_MEL - 1e-4 and mel.max() < 10


def test_digital_silence_has_the_mel_that_pads_shorter_clips(tmp_path):
    """Silence has the same mel in files, in training and in a batch."""
    h = toy_config(tmp_path)
    soundfile.write(tmp_path / "a.wav", np.zeros(44100), 22050)
    mel = LogMelSpectrogram(h, h.fmax)(load_wav(tmp_path / "a.wav", 22050, min_peak=0)[None])
    assert (mel - SILENT_LOG_MEL).abs().max() < 1e-4
