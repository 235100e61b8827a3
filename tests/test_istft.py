"""The iSTFT head is torch.head, at every sample."""

import math

import pytest
import torch

from harmonic import ISTFTHead
from inference import load_generator
from models import Generator
from tests.conftest import new_generator
from tools.toy import save_checkpoint, toy_config


def by_torch(x: torch.Tensor, n_fft: int, hop_size: int) -> torch.Tensor:
    """What torch.istft makes of log magnitudes and phases [B, n_fft + 2, F]."""
    log_magnitude, phase = x.chunk(2, dim=1)
    spectrum = torch.polar(log_magnitude.exp(), phase.sin())
    window = torch.hann_window(n_fft, dtype=x.dtype)
    return torch.istft(spectrum, n_fft, hop_size, window=window).unsqueeze(1)


@pytest.mark.parametrize(("n_fft", "hop_size"), [(16, 4), (16, 8), (20, 5), (8, 1)])
def test_it_equals_torch_istft_at_the_edges_too(n_fft, hop_size):
    istft = ISTFTHead(n_fft, hop_size)
    for frames in (2, 3, 65):
        x = 0.5 * torch.randn(3, n_fft + 2, frames)  # below the bound on magnitudes
        wav = istft(x)
        assert wav.shape == (3, 1, (frames - 1) * hop_size)
        expected = by_torch(x.double(), n_fft, hop_size).float()
        torch.testing.assert_close(wav, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_gradients_are_those_of_torch_istft():
    istft = ISTFTHead(16, 4).double()
    x = torch.randn(2, 18, 9, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 1, 32, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((wav * weights).sum(), x)[0] for wav in (istft(x), by_torch(x, 16, 4))
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_no_waveform_is_bent_by_the_bound_on_magnitudes():
    """The loudest there is, full scale at every frequency a frame can hold, stays far below."""
    n_fft = 16
    time = torch.arange(400, dtype=torch.float64)
    tones = [torch.cos(2 * math.pi * k * time / n_fft) for k in range(n_fft // 2 + 1)]
    square = torch.sign(torch.sin(2 * math.pi * time / n_fft + 0.1))
    wavs = torch.stack([*tones, square, torch.ones(400)])
    window = torch.hann_window(n_fft, dtype=torch.float64)
    magnitude = torch.stft(wavs, n_fft, 4, window=window, return_complex=True).abs()
    assert 0.99 * n_fft / 2 < magnitude.max() <= n_fft / 2 + 1e-9
    assert ISTFTHead(n_fft, 4).max_log_magnitude >= math.log(8 * n_fft / 2) - 1e-9


@pytest.mark.parametrize("value", [60.0, 1e30])
def test_overflowing_magnitudes_give_finite_samples_and_gradients(value):
    x = torch.full((1, 18, 9), value, requires_grad=True)
    wav = ISTFTHead(16, 4)(x)
    wav.square().sum().backward()
    assert wav.isfinite().all()
    assert x.grad.isfinite().all()


def test_the_head_computes_in_fp32_under_autocast(tmp_path):
    h = toy_config(tmp_path, "configs/istft_v2.json")
    generator = Generator(h)
    dtypes = []
    generator.head.register_forward_hook(lambda _, inputs, __: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        wav = generator(torch.randn(1, h.num_mels, 5))
    assert dtypes == [torch.float32]
    assert wav.dtype == torch.float32
    assert wav.shape == (1, 1, 5 * h.hop_size)


@pytest.mark.parametrize("excess", [0.0, 9.0])
def test_weights_whose_magnitudes_meet_the_bound_say_so(tmp_path, capsys, excess):
    generator = new_generator(tmp_path, "configs/istft_v2.json")
    weights = generator.state_dict()
    bins = generator.head.in_channels // 2
    weights["conv_post.bias"][:bins] += excess
    save_checkpoint(tmp_path / "g_00000001", {"generator": weights})
    load_generator(tmp_path / "g_00000001")
    said = capsys.readouterr().out
    assert ("magnitudes above 64, more than any waveform" in said) == (excess > 0)
