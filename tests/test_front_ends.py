"""The mels of other projects' front ends, computed by the config, against independent code.

Each reference follows its project's public description, in float64.
"""

import dataclasses
import math

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import torch.nn.functional as F

from audio import mel_warning
from distill import at_other_levels
from env import Config, load_config
from harmonic import HarmonicNoiseHead
from inference import load_generator, stream, synthesize, synthesize_batch
from losses import MelLoss
from meldataset import LogMelSpectrogram, MelDataset, mel_of_stretch
from models import Generator
from streaming import Streamer
from tools.toy import ROOT, speech_like, toy_config, write_config

VOCOS = {
    **{"mel_scale": "htk", "mel_norm": None, "mel_floor": 1e-7, "stft_epsilon": 0},
    **{"mel_center": True, "sampling_rate": 24000, "num_mels": 100, "fmax": None},
}
ESPNET = {
    **{"mel_log_base": 10, "mel_floor": 1e-10, "stft_epsilon": 0, "mel_center": True},
    **{"sampling_rate": 24000, "n_fft": 2048, "hop_size": 300, "win_size": 1200},
    **{"fmin": 80, "fmax": 7600, "segment_size": 2400},
}
LIBROSA = {
    **{"mel_power": 2, "mel_log_base": 10.0, "mel_floor": 1e-10, "stft_epsilon": 0},
    **{"mel_center": True, "n_fft": 2048, "win_size": 2048, "hop_size": 512, "num_mels": 128},
    **{"fmax": None},
}
RECIPES = {
    "HiFi-GAN": {},
    "Tacotron 2": {"stft_epsilon": 0, "mel_center": True},
    "BigVGAN": {"sampling_rate": 24000, "num_mels": 100, "fmax": 12000},
    "BigVGAN, 44 kHz": {
        **{"sampling_rate": 44100, "num_mels": 128, "fmax": None},
        **{"n_fft": 2048, "win_size": 2048, "hop_size": 512},
    },
    "vocos": VOCOS,
    "librosa": LIBROSA,
    "ESPnet, ParallelWaveGAN": ESPNET,
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def config(tmp_path, recipe: dict) -> Config:
    """A toy frame-rate config, which fits any hop."""
    hop_size = recipe.get("hop_size", 256)
    return toy_config(tmp_path, "configs/frame_v2.json", **{"segment_size": 8 * hop_size} | recipe)


def half_silent(h: Config, seconds: float = 0.5) -> np.ndarray:
    """Speech-like sound, then nothing at all."""
    return np.concatenate([speech_like(seconds, h.sampling_rate), np.zeros(9000, np.float32)])


def mel_of(wav: np.ndarray, h: Config) -> torch.Tensor:
    return LogMelSpectrogram(h, h.fmax)(torch.from_numpy(wav)[None])[0]


# ---------------------------------------------------------------------------------- the references


def hifigan(wav: np.ndarray, h: Config) -> np.ndarray:
    """torch.stft, not centred, of a reflected waveform; BigVGAN's is the same."""
    padding = (h.n_fft - h.hop_size) // 2
    wav = F.pad(torch.from_numpy(wav).double()[None], (padding, padding), mode="reflect")
    window = torch.hann_window(h.win_size, dtype=torch.float64)
    sizes = (h.n_fft, h.hop_size, h.win_size, window)
    spectrum = torch.view_as_real(torch.stft(wav, *sizes, center=False, return_complex=True))
    magnitude = (spectrum.pow(2).sum(-1) + 1e-9).sqrt()[0].numpy()
    return np.log(np.maximum(slaney_bank(h) @ magnitude, 1e-5))


def tacotron_2(wav: np.ndarray, h: Config) -> np.ndarray:
    """A convolution with a windowed Fourier basis; the waveform is reflected by n_fft / 2."""
    wav = np.pad(wav.astype(np.float64), h.n_fft // 2, mode="reflect")
    basis = np.fft.fft(np.eye(h.n_fft))[: h.n_fft // 2 + 1]
    basis = basis * scipy.signal.get_window("hann", h.win_size, fftbins=True)
    frames = np.lib.stride_tricks.sliding_window_view(wav, h.n_fft)[:: h.hop_size]
    magnitude = np.hypot(basis.real @ frames.T, basis.imag @ frames.T)
    return np.log(np.maximum(slaney_bank(h) @ magnitude, 1e-5))


def vocos(wav: np.ndarray, h: Config) -> np.ndarray:
    """torchaudio's MelSpectrogram of power 1: triangles of height 1, in HTK's mels."""
    window = torch.hann_window(h.n_fft, dtype=torch.float64)
    spectrum = torch.stft(
        torch.from_numpy(wav).double()[None],
        h.n_fft,
        h.hop_size,
        window=window,
        return_complex=True,
    )
    frequencies = torch.linspace(0, h.sampling_rate / 2, h.n_fft // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + h.sampling_rate / 2 / 700)
    points = 700 * (10 ** (torch.linspace(0, top, h.num_mels + 2, dtype=torch.float64) / 2595) - 1)
    slopes = points[:, None] - frequencies
    rising, falling = -slopes[:-2] / points.diff()[:-1, None], slopes[2:] / points.diff()[1:, None]
    bank = torch.minimum(rising, falling).clamp(min=0)
    return (bank @ spectrum[0].abs()).clamp(min=1e-7).log().numpy()


def librosa_feature(wav: np.ndarray, h: Config) -> np.ndarray:
    """librosa.feature.melspectrogram by default, in bels, but reflected: it pads with zeros."""
    power = librosa.feature.melspectrogram(
        y=wav.astype(np.float64), sr=h.sampling_rate, pad_mode="reflect"
    )
    return librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None) / 10


def espnet(wav: np.ndarray, h: Config) -> np.ndarray:
    sizes = {"n_fft": h.n_fft, "hop_length": h.hop_size, "win_length": h.win_size}
    spectrum = librosa.stft(wav.astype(np.float64), **sizes, pad_mode="reflect")
    return np.log10(np.maximum(1e-10, slaney_bank(h) @ np.abs(spectrum)))


def slaney_bank(h: Config) -> np.ndarray:
    sizes = {"sr": h.sampling_rate, "n_fft": h.n_fft, "n_mels": h.num_mels, "dtype": np.float64}
    return librosa.filters.mel(**sizes, fmin=h.fmin, fmax=h.fmax)


REFERENCES = (hifigan, tacotron_2, hifigan, hifigan, vocos, librosa_feature, espnet)


@pytest.mark.parametrize(
    ("recipe", "reference"), [*zip(RECIPES.values(), REFERENCES, strict=True)], ids=RECIPES
)
def test_the_mel_of_each_front_end(tmp_path, recipe, reference):
    h = config(tmp_path, recipe)
    wav = half_silent(h)
    mel, expected = mel_of(wav, h).numpy(), reference(wav, h)
    assert mel.shape == expected.shape
    assert np.abs(mel - expected).mean() < 1e-5
    assert np.abs(mel - expected).max() < 5e-3


# ----------------------------------------------------------------------------------- centred frames


def test_centred_frames_are_those_of_a_waveform_that_starts_half_a_hop_earlier(tmp_path):
    h = config(tmp_path, {})
    centred = dataclasses.replace(h, mel_center=True)
    wav = speech_like(0.5)
    mel, mel_of_earlier = mel_of(wav, centred), mel_of(np.pad(wav, (centred.lead, 0)), h)
    inner = slice(2, len(wav) // 256 - 2)
    torch.testing.assert_close(mel[:, inner], mel_of_earlier[:, inner], rtol=0, atol=1e-3)


@pytest.mark.parametrize("samples", [300, 5 * 256, 5 * 256 + 255, 40 * 256 + 100])
def test_a_stretch_of_centred_frames_equals_the_slice_of_the_whole(tmp_path, samples):
    h = config(tmp_path, VOCOS)
    log_mel, wav = LogMelSpectrogram(h, h.fmax), torch.from_numpy(speech_like(1)[:samples])
    whole = log_mel(wav[None])[0]
    assert whole.shape[1] == log_mel.frames(samples) == samples // 256 + 1
    for size in (1, 7, 100):
        stretches = [
            mel_of_stretch(log_mel, wav, i, i + size) for i in range(0, len(whole.T), size)
        ]
        torch.testing.assert_close(torch.cat(stretches, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["config_v2.json", "configs/istft_v2.json"])
def test_chunks_batches_and_streams_of_centred_frames_equal_the_whole(tmp_path, name):
    torch.manual_seed(0)
    h = load_config(write_config(tmp_path / "config.json", name, mel_center=True))
    generator = Generator(h).double().eval().requires_grad_(False)
    generator.remove_weight_norm()
    mel = torch.rand(80, 40) * 12 - 11
    whole = generator(mel[None].double())[0, 0, 128:]
    chunks = torch.cat(list(stream(generator, mel, chunk_frames=1)))
    streamer = Streamer(generator)
    streamed = torch.cat([*map(streamer.feed, mel.split(1, dim=1)), streamer.flush()])
    again = streamer.flush(mel)
    (batch,) = synthesize_batch(generator, [mel.double()])
    for wav in (synthesize(generator, mel), chunks, streamed, again, batch):
        torch.testing.assert_close(wav, whole.to(wav.dtype), rtol=0, atol=1e-6)


def test_the_samples_of_a_centred_frame_rate_stream_do_not_depend_on_the_cuts(tmp_path):
    h = config(tmp_path, VOCOS)
    generator = Generator(h).double().eval().requires_grad_(False)
    generator.remove_weight_norm()
    mel = torch.rand(100, 40) * 12 - 14
    whole, streamer = Streamer(generator).flush(mel), Streamer(generator)
    assert len(whole) == 40 * 256 - 128
    streamed = torch.cat([*map(streamer.feed, mel.split(1, dim=1)), streamer.flush()])
    assert (streamed - whole).abs().max() < 1e-9 * whole.abs().max()


def test_a_recording_comes_back_in_its_place(tmp_path):
    """The shipped weights take centred frames of their recipe, too."""
    generator, h = load_generator(next((ROOT / "pretrained/frame_v3_universal").glob("g_*")))
    h = dataclasses.replace(h, mel_center=True)
    generator.lead, wav = h.lead, torch.from_numpy(speech_like(1.0))
    wav_hat = synthesize(generator, mel_of(wav.numpy(), h))
    assert len(wav_hat) == (len(wav) // 256 + 1) * 256 - 128
    hifigan_mel = LogMelSpectrogram(load_config(ROOT / "config_v1.json"), 8000)

    def difference(delay: int) -> float:
        mels = (hifigan_mel(x[None, 200 + d :][:, :20000]) for x, d in ((wav, 0), (wav_hat, delay)))
        return float(torch.sub(*mels).abs().mean())

    assert min(range(-192, 193, 32), key=difference) == 0


@recipes
def test_the_waveform_of_a_training_pair_starts_where_the_generators_does(tmp_path, recipe):
    h = config(tmp_path, recipe)
    wavs, mels = tmp_path / "wavs", tmp_path / "mels"
    wavs.mkdir()
    mels.mkdir()
    wav = speech_like(0.6, h.sampling_rate)
    soundfile.write(wavs / "a.wav", wav, h.sampling_rate, subtype="FLOAT")
    (tmp_path / "list.txt").write_text("a")
    np.save(mels / "a.npy", mel_of(wav, h).numpy())
    for mels_dir in (mels, None):
        dataset = MelDataset(h, tmp_path / "list.txt", wavs, mels_dir)
        for mel, segment in (dataset[0, 0], dataset[5, 0], dataset.whole(0)):
            T = mel.shape[1]
            assert segment.shape == (1, T * h.hop_size)
            inner = slice(4, T - 4)
            expected = dataset.log_mel(segment[:, h.lead :])[0]
            assert expected.shape == mel.shape
            torch.testing.assert_close(mel[:, inner], expected[:, inner], rtol=0, atol=2e-3)


# ------------------------------------------------------------- constants that follow the recipe


@recipes
def test_silence_is_the_lowest_value(tmp_path, recipe):
    h = config(tmp_path, recipe)
    mel = mel_of(np.zeros(9000, np.float32), h)
    torch.testing.assert_close(mel, torch.full_like(mel, h.silent_log_mel))
    assert Generator(h).min_log_mel == Generator(h).silent_log_mel == h.silent_log_mel


@recipes
def test_the_head_raises_magnitudes_to_the_levels_of_the_mel(tmp_path, recipe):
    """Three times the magnitudes are log(3) more, in any recipe."""
    h = config(tmp_path, recipe)
    head = HarmonicNoiseHead(h)
    log_mel = LogMelSpectrogram(h, h.fmax)
    magnitude = torch.rand(1, h.n_fft // 2 + 1, 5) + 0.1
    mel = log_mel.compress(log_mel.filterbank @ (3 * magnitude) ** h.mel_power)
    levels = head.log_amplitude_scale * mel.transpose(1, 2)
    gain = head.match_levels(magnitude.transpose(1, 2), levels)
    torch.testing.assert_close(gain, torch.full_like(gain, math.log(3)), rtol=0, atol=1e-5)


@recipes
def test_a_teacher_gets_the_mels_of_quieter_speech(tmp_path, recipe, monkeypatch):
    h = config(tmp_path, recipe)
    wav = speech_like(0.5, h.sampling_rate)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.4))
    quieter = at_other_levels(mel_of(wav, h)[None], type("State", (), {"h": h, "steps": 0}))[0]
    expected = mel_of(wav * np.float32(0.1**0.4), h)
    assert (quieter - expected).abs().mean() * h.log_amplitude_scale < 2e-3


@recipes
def test_mels_of_a_recipe_are_not_doubted_and_others_are(tmp_path, recipe):
    h = config(tmp_path, recipe)
    log_mel, mel = LogMelSpectrogram(h, h.fmax), mel_of(0.3 * speech_like(2, h.sampling_rate), h)
    assert mel_warning(mel, log_mel) is None
    assert mel_warning(torch.full_like(mel, h.silent_log_mel), log_mel) is None
    silence = f"from about {h.silent_log_mel:.1f} to"
    for wrong in (mel.exp(), mel * 20, mel / 20):
        assert silence in mel_warning(wrong, log_mel)


@recipes
def test_losses_do_not_depend_on_the_recipe(tmp_path, recipe):
    h = config(tmp_path, recipe)
    default = config(
        tmp_path, {k: v for k, v in recipe.items() if not k.startswith(("mel_", "stft"))}
    )
    wavs = [torch.from_numpy(speech_like(0.3, h.sampling_rate, seed=i))[None] for i in (0, 1)]
    for resolutions in ({}, {"n_ffts_for_loss": None, "num_mels_for_loss": None}):
        losses = [MelLoss(dataclasses.replace(each, **resolutions)) for each in (h, default)]
        assert torch.equal(losses[0](*wavs), losses[1](*wavs))
