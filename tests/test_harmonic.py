"""The harmonic-plus-noise head against sums of cosines, PyTorch's STFT and least squares."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from env import Config
from harmonic import (
    COND_CHANNELS,
    F0_CANDIDATES,
    MAX_TRAINING_STEPS,
    PATCH_BINS,
    STFT,
    HarmonicNoiseHead,
    PhaseState,
    Refiner,
    magnitude_floor,
    with_magnitude,
)
from inference import to_inference
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram
from models import Generator
from tools.toy import speech_like, toy_config

FRAME_RATE = "configs/frame_v2.json"
GOLDEN = Path(__file__).parent / "golden"
ODD = {"hop_size": 200, "n_fft": 900, "win_size": 800, "segment_size": 4000}
SMALL = {"hop_size": 32, "n_fft": 128, "win_size": 128, "num_mels": 10}
SMALL_ODD = {"hop_size": 30, "n_fft": 130, "win_size": 120, "num_mels": 10, "segment_size": 2100}


@pytest.fixture
def head_of(tmp_path):
    """A function that makes a head in float64 from changes of the config."""
    return lambda **changes: HarmonicNoiseHead(frame_rate(tmp_path, **changes)).double().eval()


def frame_rate(tmp_path, **changes) -> Config:
    return toy_config(tmp_path, FRAME_RATE, **{"lookahead_frames": None} | changes)


def log_mel_of_speech(h: Config, seconds: float = 0.5) -> torch.Tensor:
    return LogMelSpectrogram(h, h.fmax)(torch.from_numpy(speech_like(seconds)).float()[None])


def predictions(head: HarmonicNoiseHead, frames: int, aperiodicity: float) -> torch.Tensor:
    """Returns an x [1, in_channels, frames] of constant F0, 173 Hz, with logits of aperiodicity."""
    x = torch.zeros(1, head.in_channels, frames, dtype=head.noise.dtype)
    bins = head.splits[0]
    x[:, bins : 2 * bins] = aperiodicity
    return x


# ------------------------------------------------------------------------------------------- STFT


@pytest.mark.parametrize("changes", [{}, ODD], ids=["shipped", "odd"])
def test_the_stft_is_torchs_at_the_frames_of_the_mel(tmp_path, changes):
    h = frame_rate(tmp_path, **changes)
    stft, wav = STFT(h), torch.randn(2, 20 * h.hop_size)
    padded = F.pad(wav, stft.margins, mode="reflect")
    spectrum = stft(padded)
    assert spectrum.shape == (2, 20, h.n_fft // 2 + 1)
    expected = torch.stft(
        padded, h.n_fft, h.hop_size, window=stft.window, center=False, return_complex=True
    )
    torch.testing.assert_close(spectrum, expected.transpose(1, 2)[:, :20], rtol=0, atol=1e-4)
    log_mel = LogMelSpectrogram(h, h.fmax)
    mel = (spectrum.abs() @ log_mel.filterbank.T).clamp(min=1e-5).log().transpose(1, 2)
    torch.testing.assert_close(mel, log_mel(wav), rtol=0, atol=1e-3)


@pytest.mark.parametrize("changes", [SMALL, SMALL_ODD], ids=["even", "odd"])
def test_the_inverse_stft_solves_the_least_squares_problem(tmp_path, changes):
    """The waveform whose windowed frames are nearest to the inverse FFTs of the spectra."""
    stft, T = STFT(frame_rate(tmp_path, **changes)).double(), 6
    spectrum = torch.randn(1, T, stft.n_fft // 2 + 1, dtype=torch.complex128)
    normaliser = stft.normaliser(T)
    wav = (stft.inverse(spectrum) * normaliser)[0]
    identity = torch.eye(len(wav), dtype=torch.float64)
    to_frames = (identity.unfold(1, stft.n_fft, stft.hop_size)[:, :T] * stft.window).flatten(1).T
    frames = torch.fft.irfft(spectrum, n=stft.n_fft).flatten()
    expected = torch.linalg.lstsq(to_frames, frames[:, None], driver="gelsd").solution[:, 0]
    inner = normaliser[0] < 100  # elsewhere, windows are almost 0
    assert inner.sum() > 0.8 * T * stft.hop_size
    torch.testing.assert_close(wav[inner], expected[inner])


# ------------------------------------------------------------------------------------- excitation


def test_the_pulse_train_is_the_sum_of_all_harmonics(head_of):
    """A gliding F0, interpolated between the centres of frames; the anchor has the given phase."""
    head = head_of()
    before, hop = head.stft.margins[0], head.hop_size
    log_f0 = torch.linspace(math.log(90), math.log(400), 12, dtype=torch.float64)[None]
    f0, phase = head.pulse_train.phase(log_f0, PhaseState(anchor=2, phase=0.3))
    pulses = head.pulse_train(f0, phase - phase.round())
    inner = slice(before, before + 12 * hop)
    centres = (np.arange(12) + 0.5) * hop
    expected_f0 = np.exp(np.interp(np.arange(12 * hop) + 0.5, centres, log_f0[0]))
    expected_phase = np.concatenate([[0], np.cumsum(expected_f0 / 22050)[:-1]])
    expected_phase = expected_phase - expected_phase[2 * hop] + 0.3
    harmonics = 11025 / expected_f0
    expected = sum(
        np.clip(harmonics - k + 1, 0, 1) * np.cos(2 * np.pi * k * expected_phase)
        for k in range(1, int(harmonics.max()) + 2)
    ) / np.sqrt(harmonics / 2)
    assert pulses.shape == (1, (12 + head.stft.overlap) * hop)
    np.testing.assert_allclose(f0[0, inner], expected_f0, rtol=1e-9)
    np.testing.assert_allclose(phase[0, inner], expected_phase, atol=1e-9)
    np.testing.assert_allclose(pulses[0, inner], expected, atol=2e-3)


def test_noise_comes_in_bursts_of_the_same_power_where_voiced(head_of):
    head, frames = head_of(), 40
    before, after = head.stft.margins
    phase = torch.linspace(0, 400, frames * 256 + before + after, dtype=torch.float64)[None]
    phase = phase - phase.round()
    zeros = torch.zeros_like(phase)
    bursts = head.burst_envelope(phase, voicing=zeros + 1)
    assert float(bursts.square().mean()) == pytest.approx(1, abs=0.01)
    peak, valley = (
        float(bursts[where].mean()) for where in (phase.abs() < 0.02, phase.abs() > 0.48)
    )
    assert peak / valley == pytest.approx(math.exp(4), rel=0.1)
    assert (head.burst_envelope(phase, voicing=zeros) == 1).all()


def test_tracks_are_interpolated_between_the_centres_of_frames(head_of):
    head, track = head_of(), torch.rand(1, 9, dtype=torch.float64)
    before, after = head.stft.margins
    samples = np.arange(-before, 9 * 256 + after) + 0.5
    expected = np.interp(samples, (np.arange(9) + 0.5) * 256, track[0])
    np.testing.assert_allclose(head.along_time(track)[0], expected, atol=1e-12)


def test_pulses_noise_and_their_mixtures_have_unit_power(head_of):
    head, frames = head_of(), 60
    x, mel = predictions(head, frames, aperiodicity=-20), torch.zeros(1, 80, frames)
    excitation = head.excitation(x, PhaseState())
    unit, mixtures = head.stft.window.square().sum(), []
    for aperiodicity in (0.0, 0.3, 0.6, 1.0):
        parts = excitation._replace(aperiodicity=torch.full((1, frames, 513), aperiodicity))
        mixtures.append(head.spectrum(x, mel, parts)[0])
        assert float(mixtures[-1].abs().square().mean() / unit) == pytest.approx(1, abs=0.12)
    torch.testing.assert_close(mixtures[0], excitation.pulses)
    torch.testing.assert_close(mixtures[-1], excitation.noise)


def test_a_piece_with_the_next_state_continues_the_whole(head_of):
    head = head_of(griffin_lim_steps=0).requires_grad_(False)
    x = torch.randn(1, head.in_channels, 60, dtype=torch.float64)
    mel = torch.randn(1, 80, 60) - 5
    whole, state, begin = head(x, mel), None, 0
    for first, stop in ((15, 25), (30, 35)):  # the second state follows from the first
        piece = x[:, :, begin:]
        state = head.next_state(piece, state, frame=stop - begin, first=first - begin)
        begin = first
        wav = head(x[:, :, begin:], mel[:, :, begin:], state)
        edge = head.receptive_field[0] * 256
        expected = whole[:, :, begin * 256 + edge :]
        torch.testing.assert_close(wav[:, :, edge:], expected, rtol=0, atol=1e-9)


def test_in_training_each_mel_draws_a_random_but_reproducible_state(tmp_path):
    generator = Generator(frame_rate(tmp_path)).requires_grad_(False)
    mel = torch.randn(1, 80, 20) - 5
    other = mel.clone()
    other[0, 40, 10] += 1e-3  # inaudible

    def difference(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first - second).norm() / first.norm())

    first, again, third = (generator(x)[0, 0] for x in (mel, mel, other))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert difference(first, third) > 0.5
    samples = generator(mel.repeat(2, 1, 1))[:, 0]
    torch.testing.assert_close(samples[0], first, atol=1e-3, rtol=0)
    assert difference(*samples) > 0.5
    generator.eval()
    assert difference(*(generator(x)[0, 0] for x in (mel, other))) < 0.1


# ------------------------------------------------------------------------------------- magnitudes


def test_any_mixture_is_brought_to_the_levels_of_the_mel(tmp_path):
    """Pulses at a wrong F0 leave some low bands empty, so their error is larger."""
    h = frame_rate(tmp_path, griffin_lim_steps=0)
    head = HarmonicNoiseHead(h).eval().requires_grad_(False)
    torch.nn.init.zeros_(head.refiner.linear_post.weight)
    mel, errors = log_mel_of_speech(h, seconds=1.0), []
    for logit in (-9.0, 0.0, 9.0):
        wav = head(predictions(head, mel.shape[2], aperiodicity=logit), mel)
        errors.append(float((LogMelSpectrogram(h, h.fmax)(wav[:, 0]) - mel).abs().mean()))
    assert errors == pytest.approx([0.75, 0.32, 0.30], abs=0.03)
    assert float(mel.std()) > 1.1


def test_the_gain_is_the_difference_of_the_log_mels(head_of):
    head = head_of()
    magnitude, step = torch.rand(1, 5, 513).double() + 0.1, torch.rand(1, 5, 1).double()
    mel = (magnitude @ head.filterbank).log()
    gain = head.match_levels(magnitude, mel + step)
    torch.testing.assert_close(gain, step.expand_as(gain))


def test_log_mels_below_silence_are_silence(tmp_path):
    """Acoustic models may pad with log(1e-10)."""
    h = frame_rate(tmp_path)
    generator = to_inference(Generator(h), torch.device("cpu"), "fp32")
    mel = torch.randn(1, h.num_mels, 12).clamp(-2, 2) - 5
    padded = (F.pad(mel, (4, 4), value=value) for value in (SILENT_LOG_MEL, math.log(1e-10)))
    silent, lower = map(generator, padded)
    torch.testing.assert_close(lower, silent, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "before", "after", "patches"),
    [
        ({}, 7, 7, 11),
        ({"resblock": "2", "refiner_channels": 16}, 4, 4, 8),
        ({"lookahead_frames": 3}, 13, 1, 11),
    ],
)
def test_the_refiner_starts_near_zero_and_has_the_stated_receptive_field(
    tmp_path, changes, before, after, patches
):
    """In patches: 1 of conv_pre, 1 + 2 + 4 of the units, and 3 of their second convolutions."""
    refiner = Refiner(frame_rate(tmp_path, **changes)).double().requires_grad_(False)
    maps = torch.randn(Refiner.MAPS, 1, 41, 513, dtype=torch.float64)
    conditioning = torch.randn(1, 41, COND_CHANNELS * refiner.patches, dtype=torch.float64)
    x = refiner.to_patches(list(maps), conditioning)
    refinement = refiner(x)
    assert 0 < float(refinement.std()) < 0.05
    assert refiner.receptive_field == (before, after)
    for channel in range(x.shape[1]):
        changed = x.clone()
        changed[:, channel, 20, 30] += 1
        _, frames, bins = (refiner(changed) != refinement).nonzero().T
        assert (int(frames.min()), int(frames.max())) == (20 - after, 20 + before)
        first, last = PATCH_BINS * (30 - patches), PATCH_BINS * (30 + patches + 1) - 1
        assert (int(bins.min()), int(bins.max())) == (first, last)


@pytest.mark.parametrize(("changes", "patches"), [({}, 128), (ODD, 112)])
def test_the_highest_bins_that_fill_no_patch_are_not_refined(tmp_path, changes, patches):
    h = frame_rate(tmp_path, **changes)
    refiner, bins = Refiner(h).requires_grad_(False), h.n_fft // 2 + 1
    maps = list(torch.randn(Refiner.MAPS, 1, 7, bins))
    x = refiner.to_patches(maps, torch.randn(1, 7, COND_CHANNELS * patches))
    assert x.shape[3] == refiner.patches == patches
    refinement = refiner(x)
    assert refinement.shape == (1, 7, bins)
    assert (refinement[:, :, : PATCH_BINS * patches] != 0).all()
    assert (refinement[:, :, PATCH_BINS * patches :] == 0).all()


# ------------------------------------------------------------------------------------ Griffin-Lim


@pytest.mark.parametrize("steps", [0, 3])
def test_a_consistent_spectrum_gives_its_waveform(head_of, steps):
    """Only the phase of the spectrum is used."""
    head = head_of(griffin_lim_steps=steps)
    wav = torch.from_numpy(speech_like(0.6))[None, : 50 * head.hop_size].double()
    spectrum = head.stft(F.pad(wav, head.stft.margins))
    again = head.griffin_lim(7 * spectrum, spectrum.abs())[:, 0]
    inner = slice(head.stft.n_fft, -head.stft.n_fft)
    torch.testing.assert_close(again[:, inner], wav[:, inner], atol=2e-4, rtol=0)


def test_more_steps_lower_the_inconsistency(head_of):
    """From random phases, the STFT's magnitude nears the given one."""
    wav, errors = torch.from_numpy(speech_like(0.4))[None, : 33 * 256].double(), []
    magnitude = head_of().stft(wav).abs() + 1e-6
    random = torch.randn(magnitude.shape, dtype=torch.complex128)
    for steps in (0, 4, 16):
        head = head_of(griffin_lim_steps=steps)
        wav_hat = head.griffin_lim(random, magnitude)[:, 0]
        result = head.stft(F.pad(wav_hat, head.stft.margins)).abs()
        errors.append(float((result - magnitude)[:, 4:-4].norm() / magnitude[:, 4:-4].norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * errors[0]


def test_training_runs_at_most_some_steps_and_without_gradients(head_of):
    """The gradient of a frame's samples reaches the magnitudes of its own windows only."""
    few, many = (head_of(griffin_lim_steps=n) for n in (MAX_TRAINING_STEPS, 12))
    spectrum = torch.randn(1, 40, 513, dtype=torch.complex128)
    magnitude = spectrum.abs().requires_grad_()
    wav = few.griffin_lim(spectrum, magnitude)
    assert not torch.allclose(wav, many.griffin_lim(spectrum, magnitude), atol=1e-3)
    torch.testing.assert_close(wav, many.train().griffin_lim(spectrum, magnitude))
    wav[0, 0, 20 * 256 : 21 * 256].square().sum().backward()
    reached = magnitude.grad.abs().sum((0, 2)).nonzero()
    assert (int(reached.min()), int(reached.max())) == (18, 22)


def test_the_phase_of_nearly_cancelling_frames_counts_less():
    magnitude = torch.full((5,), 2.0)
    x = torch.tensor([-2, 40j, 0.2, 2e-4, 0])
    result = with_magnitude(x, magnitude, magnitude_floor(magnitude))
    expected = torch.tensor([2.0, 2.085, 0.67, 7.07e-4, 0.0])
    torch.testing.assert_close(result.abs(), expected, rtol=0.01, atol=0)
    assert result[0].real < 0 and result[1].imag > 0


# --------------------------------------------------------------------------------- whole generator


@pytest.mark.parametrize(
    ("steps", "changes", "excitation", "field"),
    [
        (0, {}, 4, (62, 62)),  # conv_pre 3, two blocks of 24, refiner 7
        (2, {}, 10, (68, 68)),
        (1, ODD | {"win_size": 900}, 9, (67, 67)),
        (0, {"resblock": "2"}, 4, (47, 47)),
        (1, {"lookahead_frames": 3}, 7, (120, 10)),
    ],
)
def test_a_sample_depends_on_the_frames_of_the_receptive_field(
    tmp_path, steps, changes, excitation, field
):
    """The refiner is switched off. Phases also depend on the F0 of all frames up to the anchor."""
    generator = Generator(frame_rate(tmp_path, griffin_lim_steps=steps, **changes)).double()
    head, frame = generator.eval().requires_grad_(False).head, 20
    assert generator.receptive_field == field
    reach = [a - b for a, b in zip(head.receptive_field, head.refiner.receptive_field, strict=True)]
    assert reach == [excitation, excitation]
    torch.nn.init.zeros_(head.refiner.linear_post.weight)
    mel, x = torch.randn(1, 80, 41) - 5, torch.randn(1, head.in_channels, 41, dtype=torch.float64)
    changed, bins = x.clone(), head.splits[0]
    changed[:, 2 * bins : 2 * bins + F0_CANDIDATES, frame] = 0
    reached = []
    for anchor, tolerance in ((0, 0.0), (40, 1e-9)):  # at 40, rounding changes every sample
        wavs = [head(each, mel, PhaseState(anchor=anchor))[0, 0] for each in (x, changed)]
        reached.append(((wavs[0] - wavs[1]).abs() > tolerance).nonzero() // head.hop_size)
    assert frame - int(reached[0].min()) == excitation
    assert 0 <= frame + excitation - int(reached[1].max()) <= 1


def test_bf16_runs_in_the_refiner_and_is_close_to_fp32(tmp_path):
    h = frame_rate(tmp_path, griffin_lim_steps=2)
    fp32, bf16 = Generator(h), Generator(h)
    bf16.load_state_dict(fp32.state_dict())
    fp32 = to_inference(fp32, torch.device("cpu"), "fp32")
    bf16 = to_inference(bf16, torch.device("cpu"), "bf16")
    assert {p.dtype for p in bf16.head.refiner.parameters()} == {torch.bfloat16}
    mel = log_mel_of_speech(h)
    wavs = [generator(mel)[:, 0] for generator in (fp32, bf16)]
    assert bf16.conv_post.weight.dtype == wavs[1].dtype == torch.float32
    mels = [LogMelSpectrogram(h, h.fmax)(wav) for wav in wavs]
    assert 0 < float((mels[0] - mels[1]).abs().mean()) < 0.1


def golden_generator(h: Config) -> Generator:
    """Returns a generator whose weights follow from NumPy's RandomState, which never changes."""
    generator, random = Generator(h), np.random.RandomState(0)
    generator = to_inference(generator, torch.device("cpu"), "fp32").double()
    for _, weight in sorted(generator.named_parameters()):
        values = random.standard_normal(tuple(weight.shape))
        weight.copy_(torch.from_numpy(0.3 * values / math.sqrt(max(1, weight[0].numel()))))
    return generator


@pytest.mark.parametrize(("name", "steps"), [("frame_v2", 16), ("frame_v3", 6)])
def test_a_stored_mel_gives_the_stored_samples(tmp_path, name, steps):
    """tests/golden/<name>.wav is the output of this generator when the tests above had passed."""
    mel = torch.from_numpy(np.load(GOLDEN / "mel.npy")) - 1  # within full scale
    h = toy_config(tmp_path, f"configs/{name}.json", griffin_lim_steps=steps)
    wav = golden_generator(h)(mel[None])[0, 0]
    expected, _ = soundfile.read(GOLDEN / f"{name}.wav")
    assert expected.std() > 0.01 and np.abs(expected).max() < 0.9
    np.testing.assert_allclose(wav, expected, rtol=0, atol=1e-4)
