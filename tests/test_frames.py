"""The generator at the mel's own rate: its head against STFTs of torch, streams, configs."""

import math

import pytest
import torch

from env import UserError, load_config
from heads import ConsistentSTFT
from inference import Streamer, synthesize
from meldataset import LogMelSpectrogram
from models import Generator
from tools.toy import speech_like, toy_config, write_config

FRAMES = "configs/frame_v2.json"
ODD = {"hop_size": 200, "n_fft": 900, "win_size": 800, "segment_size": 4000}


def make_head(tmp_path, **changes) -> ConsistentSTFT:
    return ConsistentSTFT(toy_config(tmp_path, FRAMES, **changes)).double()


@pytest.mark.parametrize("changes", [{}, ODD], ids=["shipped", "odd"])
def test_the_transforms_are_torchs_and_undo_each_other(tmp_path, changes):
    head = make_head(tmp_path, **changes)
    samples = (9 + head.overlap) * head.hop_size
    wav = torch.randn(2, samples, dtype=torch.float64)
    spectrum = head._stft(wav)
    expected = torch.stft(
        wav, head.n_fft, head.hop_size, window=head.window, center=False, return_complex=True
    )
    frames = spectrum.shape[1]
    torch.testing.assert_close(
        torch.view_as_complex(spectrum).transpose(1, 2), expected[..., :frames]
    )
    weights = head._overlap_add(head.window.square().expand(1, frames, -1))
    inner = weights[0] > 0.1
    back = head._istft(spectrum) / weights
    torch.testing.assert_close(back[:, inner], wav[:, inner])


def test_exported_transforms_equal_the_fast_ones(tmp_path, monkeypatch):
    head = make_head(tmp_path)
    wav = torch.randn(2, 12 * head.hop_size, dtype=torch.float64)
    fast = head._stft(wav)
    back = head._istft(fast)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(head._stft(wav), fast, atol=1e-5, rtol=0)
    torch.testing.assert_close(head._istft(fast), back, atol=1e-5, rtol=0)


def test_of_a_right_spectrum_it_makes_the_waveform(tmp_path):
    """The magnitudes and phases of a recording give it back, with and without steps."""
    h = toy_config(tmp_path, FRAMES)
    wav = torch.from_numpy(speech_like(0.6))[None].double()
    wav = wav[:, : wav.shape[1] // h.hop_size * h.hop_size]
    edge = (h.n_fft - h.hop_size) // 2
    mel = LogMelSpectrogram(h, h.fmax).double()(wav)
    for steps in (0, 3):
        head = make_head(tmp_path, consistency_steps=steps)
        spectrum = torch.view_as_complex(head._stft(torch.nn.functional.pad(wav, (edge, edge))))
        prior = (mel.exp().transpose(1, 2) @ head.mel_inverse.T).clamp(min=1e-4).log()
        x = torch.cat([(spectrum.abs() + 1e-9).log() - prior, spectrum.real, spectrum.imag], dim=2)
        again = head(x.transpose(1, 2), mel)[:, 0]
        inner = slice(h.n_fft, -h.n_fft)
        torch.testing.assert_close(again[:, inner], wav[:, inner], atol=2e-4, rtol=0)


def test_steps_make_a_spectrogram_of_some_waveform(tmp_path):
    """The magnitude of the STFT of what comes out nears the magnitude that was asked for."""
    wav = torch.from_numpy(speech_like(0.4))[None, : 33 * 256].double()
    wanted, errors = torch.view_as_complex(make_head(tmp_path)._stft(wav)).abs() + 1e-6, []
    for steps in (0, 4, 16):
        head = make_head(tmp_path, consistency_steps=steps)
        torch.manual_seed(1)
        phase = torch.randn(1, 30, 2 * 513, dtype=torch.float64)
        mel = torch.zeros(1, 80, 30, dtype=torch.float64)
        prior = (mel.exp().transpose(1, 2) @ head.mel_inverse.T).clamp(min=1e-4).log()
        x = torch.cat([wanted.log() - prior, phase], dim=2).transpose(1, 2)
        wav = torch.nn.functional.pad(head(x, mel)[:, 0].detach(), (384, 384))
        magnitude = torch.view_as_complex(head._stft(wav)).abs()
        errors.append(float(((magnitude - wanted)[:, 4:-4]).norm() / wanted[:, 4:-4].norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * errors[0]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_frame_is_heard_as_far_as_the_receptive_field_says(tmp_path, steps):
    generator = Generator(toy_config(tmp_path, FRAMES, consistency_steps=steps))
    before, after = generator.receptive_field
    assert (before, after) == (3 + 2 * 24 + 2 + 3 * steps,) * 2
    frame = before + 1
    mel = torch.zeros(1, 80, 2 * frame + 1)
    mel[:, :, frame] = math.nan
    samples = generator(mel)[0, 0].isnan().nonzero()
    first, stop = int(samples.min()) // 256, int(samples.max()) // 256 + 1
    assert (frame - first, stop - frame - 1) == (after, before)


def test_pieces_are_the_whole_and_one_frame_speaks(tmp_path):
    torch.manual_seed(3)
    generator = Generator(toy_config(tmp_path, FRAMES)).eval()
    mel = torch.randn(80, 300) - 5
    whole, streamer = synthesize(generator, mel), Streamer(generator)
    pieces = [streamer.feed(mel[:, i : i + 37]) for i in range(0, 300, 37)] + [streamer.flush()]
    difference = (torch.cat(pieces) - whole).abs().max() / whole.abs().max()
    assert float(difference) < 1e-4  # phases of what is nearly nothing are rounding's
    assert synthesize(generator, mel[:, :1]).shape == (256,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"consistency_steps": -1}, "0 or more"),
        ({"upsample_rates": [1, 2]}, "rates of 1 beside consistency_steps"),
        ({"gen_istft_n_fft": 16, "gen_istft_hop_size": 4}, "no such key beside gen_istft_n_fft"),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(write_config(tmp_path / "config.json", FRAMES, **changes))


def test_every_weight_learns(tmp_path):
    generator = Generator(toy_config(tmp_path, FRAMES))
    generator(torch.randn(2, 80, 12) - 5).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in generator.parameters())
