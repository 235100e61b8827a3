"""The generator at the mel's own rate: its pulses, noise and STFTs, its streams, its configs."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoint import build_state
from env import UserError, load_config
from harmonic import (
    COND_CHANNELS,
    PATCH_BINS,
    TRAINED_STEPS,
    HarmonicNoiseHead,
    PhaseState,
    Refiner,
    _softness,
    _with_magnitude,
)
from inference import Streamer, synthesize, to_inference
from losses import REPULSION, MelLoss, SourceLoss, discriminator_loss
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram
from models import Generator
from tools.toy import speech_like, toy_config, write_config
from train import LAMBDA_VOICE, training_step

FRAMES = "configs/frame_v2.json"
ODD = {"hop_size": 200, "n_fft": 900, "win_size": 800, "segment_size": 4000}


def make_head(tmp_path, **changes) -> HarmonicNoiseHead:
    return HarmonicNoiseHead(toy_config(tmp_path, FRAMES, **changes)).double().eval()


def sizes(spectrum: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(spectrum).abs()


@pytest.mark.parametrize("changes", [{}, ODD], ids=["shipped", "odd"])
def test_the_transforms_are_torchs_and_undo_each_other(tmp_path, changes):
    stft = make_head(tmp_path, **changes).stft
    wav = torch.randn(2, (9 + stft.overlap) * stft.hop_size, dtype=torch.float64)
    spectrum = stft(wav)
    expected = torch.stft(
        wav, stft.n_fft, stft.hop_size, window=stft.window, center=False, return_complex=True
    )
    frames = spectrum.shape[1]
    torch.testing.assert_close(
        torch.view_as_complex(spectrum).transpose(1, 2), expected[..., :frames]
    )
    weights = stft.weights(frames)
    inner = weights[0] < 10
    back = stft.inverse(spectrum) * weights
    torch.testing.assert_close(back[:, inner], wav[:, inner])


def test_exported_transforms_equal_the_fast_ones(tmp_path, monkeypatch):
    stft = make_head(tmp_path).stft
    wav = torch.randn(2, 12 * stft.hop_size, dtype=torch.float64)
    fast = stft(wav)
    back = stft.inverse(fast)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(stft(wav), fast, atol=1e-5, rtol=0)
    torch.testing.assert_close(stft.inverse(fast), back, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [0, 3])
def test_of_a_right_spectrum_it_makes_the_waveform(tmp_path, steps):
    head = make_head(tmp_path, griffin_lim_steps=steps)
    wav = torch.from_numpy(speech_like(0.6))[None, : 50 * head.stft.hop_size].double()
    spectrum = head.stft(torch.nn.functional.pad(wav, head.stft.edges))
    again = head._consistent(spectrum, sizes(spectrum))[:, 0]
    inner = slice(head.stft.n_fft, -head.stft.n_fft)
    torch.testing.assert_close(again[:, inner], wav[:, inner], atol=2e-4, rtol=0)


def test_steps_make_a_spectrogram_of_some_waveform(tmp_path):
    """The magnitude of the STFT of what comes out nears the magnitude that was asked for."""
    wav = torch.from_numpy(speech_like(0.4))[None, : 33 * 256].double()
    wanted, errors = sizes(make_head(tmp_path).stft(wav)) + 1e-6, []
    torch.manual_seed(1)
    random = torch.randn(*wanted.shape, 2, dtype=torch.float64)
    for steps in (0, 4, 16):
        head = make_head(tmp_path, griffin_lim_steps=steps)
        made = head._consistent(random, wanted)[:, 0].detach()
        magnitude = sizes(head.stft(torch.nn.functional.pad(made, head.stft.edges)))
        errors.append(float(((magnitude - wanted)[:, 4:-4]).norm() / wanted[:, 4:-4].norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * errors[0]


def test_pulses_are_all_harmonics_of_a_pitch_that_glides(tmp_path):
    """Against sums of cosines, whose pitch is interpolated between the centres of the frames."""
    head = make_head(tmp_path)
    log_f0 = torch.linspace(math.log(90), math.log(400), 12, dtype=torch.float64)[None]
    edge, hop = head.stft.edges[0], head.stft.hop_size
    pulses, between, cycles = head.pulses(log_f0, PhaseState(cycles=0.3), torch.float64)
    centres = (np.arange(12) + 0.5) * hop
    f0 = np.exp(np.interp(np.arange(12 * hop) + 0.5, centres, log_f0[0]))
    turns = 0.3 + np.concatenate([[0], np.cumsum(f0 / 22050)[:-1]])
    harmonics = 11025 / f0
    expected = sum(
        np.clip(harmonics - k + 1, 0, 1) * np.cos(2 * np.pi * k * turns)
        for k in range(1, int(harmonics.max()) + 2)
    ) / np.sqrt(harmonics / 2)
    assert pulses.shape == (1, (12 + head.stft.overlap) * hop)
    np.testing.assert_allclose(pulses[0, edge : edge + 12 * hop], expected, atol=2e-3)
    np.testing.assert_allclose(cycles[0], turns[::hop], atol=1e-9)
    np.testing.assert_allclose(between[0, edge : edge + 12 * hop], turns - turns.round(), atol=1e-9)
    assert 0.9 < float(pulses.square().mean()) < 1.1  # as the noise has


def test_noise_comes_with_the_pulses_where_a_frame_is_voiced(tmp_path):
    """In bursts of the same power, which follow a linear path from frame to frame."""
    head = make_head(tmp_path)
    frames, (edge, after) = 40, head.stft.edges
    turns = torch.linspace(0, 400, frames * 256 + edge + after, dtype=torch.float64)[None]
    turns = turns - turns.round()
    bursts = head._bursts(turns, torch.ones(1, frames).double())
    assert float(bursts.square().mean()) == pytest.approx(1, abs=0.01)
    near, far = (float(bursts[where].mean()) for where in (turns.abs() < 0.02, turns.abs() > 0.48))
    assert near / far == pytest.approx(math.exp(4), rel=0.1)
    assert (head._bursts(turns, torch.zeros(1, frames).double()) == 1).all()
    voiced = torch.zeros(1, frames).double()
    voiced[0, 20:] = 1
    share = ((head._bursts(turns, voiced) - 1) / (bursts - 1))[0, edge : edge + frames * 256]
    centres = (np.arange(frames) + 0.5) * 256
    expected = np.interp(np.arange(frames * 256) + 0.5, centres, voiced[0])
    np.testing.assert_allclose(share, expected, atol=1e-6)


def test_what_nearly_cancels_is_given_no_direction_of_its_own():
    magnitude = torch.full((5,), 2.0)
    x = torch.tensor([[-2.0, 0.0], [0.0, 40.0], [0.2, 0.0], [2e-4, 0.0], [0.0, 0.0]])
    expected = [2.0, 2.085, 0.67, 7.07e-4, 0.0]
    made = torch.view_as_complex(_with_magnitude(x, magnitude, _softness(magnitude)))
    torch.testing.assert_close(made.abs(), torch.tensor(expected), rtol=0.01, atol=0)
    assert made[0].real < 0 and made[1].imag > 0


def test_in_training_phases_are_given(tmp_path):
    """A magnitude is heard in its own window, though the steps change phases farther away."""
    torch.manual_seed(0)
    head, frames = make_head(tmp_path, griffin_lim_steps=6).train(), 40
    spectrum = torch.randn(1, frames, 513, 2, dtype=torch.float64)
    magnitude = sizes(spectrum).requires_grad_()
    wav = head._consistent(spectrum, magnitude)
    other = magnitude.detach().clone()
    other[:, 20] *= 2
    changed = ((head._consistent(spectrum, other) - wav)[0, 0].abs() > 1e-9).nonzero() // 256
    assert int(changed.min()) < 12 and int(changed.max()) > 28
    wav[0, 0, 20 * 256 : 21 * 256].square().sum().backward()
    heard = magnitude.grad.abs().sum((0, 2)).nonzero()
    assert (int(heard.min()), int(heard.max())) == (18, 22)


def test_one_trains_with_the_first_steps(tmp_path):
    torch.manual_seed(0)
    few, many = (make_head(tmp_path, griffin_lim_steps=n) for n in (TRAINED_STEPS, 12))
    spectrum = torch.randn(1, 20, 513, 2, dtype=torch.float64)
    heard = few._consistent(spectrum, sizes(spectrum))
    assert not torch.allclose(heard, many._consistent(spectrum, sizes(spectrum)), atol=1e-3)
    torch.testing.assert_close(heard, many.train()._consistent(spectrum, sizes(spectrum)))


@pytest.mark.parametrize(
    ("changes", "frames", "places"),
    [({}, 7, 11), ({"resblock": "2", "refiner_channels": 16}, 4, 8)],
)
def test_a_refiner_adds_little_at_first_and_sees_frames_as_far_as_it_says(
    tmp_path, changes, frames, places
):
    """Frames: one for each convolution; places: 1 + 1, 2, 4, and 3 in second convolutions."""
    torch.manual_seed(0)
    refiner = Refiner(toy_config(tmp_path, FRAMES, **changes)).double().requires_grad_(False)
    views = list(torch.randn(Refiner.VIEWS, 1, 41, 513, dtype=torch.float64))
    hints = torch.randn(1, 41, COND_CHANNELS * refiner.places, dtype=torch.float64)
    refinement = refiner(views, hints)
    assert 0 < float(refinement.std()) < 0.05
    size, place = PATCH_BINS, 30
    assert refiner.reach == frames
    for number in range(Refiner.VIEWS + 1):
        others = [each.clone() for each in (*views, hints)]
        others[number][:, 20, (size if number < Refiner.VIEWS else COND_CHANNELS) * place] += 1
        changed = (refiner(others[:-1], others[-1]) != refinement).nonzero()
        first, last = changed.amin(0), changed.amax(0)
        assert (int(first[1]), int(last[1])) == (20 - frames, 20 + frames)
        ends = size * (place - places), size * (place + places + 1) - 1
        assert (int(first[2]), int(last[2])) == ends


@pytest.mark.parametrize(("changes", "places"), [({}, 128), (ODD, 112)])
def test_bins_at_the_top_that_fill_no_place_are_not_refined(tmp_path, changes, places):
    h = toy_config(tmp_path, FRAMES, **changes)
    refiner, bins = Refiner(h).requires_grad_(False), h.n_fft // 2 + 1
    assert refiner.places == places
    views = [torch.randn(1, 7, bins) for _ in range(Refiner.VIEWS)]
    refinement = refiner(views, torch.randn(1, 7, COND_CHANNELS * places))
    assert refinement.shape == (1, 7, bins)
    assert (refinement[:, :, : PATCH_BINS * places] != 0).all()
    assert (refinement[:, :, PATCH_BINS * places :] == 0).all()


def test_pulses_and_noise_mix_and_take_the_level_of_the_mel(tmp_path):
    """Whatever the noise, a mel is heard again; pulses at a wrong pitch leave some bands empty."""
    h = toy_config(tmp_path, FRAMES, griffin_lim_steps=0)
    head = HarmonicNoiseHead(h).eval().requires_grad_(False)
    torch.nn.init.zeros_(head.refiner.linear_post.weight)
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(speech_like(1.0)).float()[None])
    bins, errors = 513, []
    for noisy in (-9.0, 0.0, 9.0):
        x = torch.zeros(1, head.in_channels, mel.shape[2])
        x[:, bins : 2 * bins] = noisy
        wav, voice = head(x, mel, PhaseState())
        errors.append(float((LogMelSpectrogram(h, h.fmax)(wav[:, 0]) - mel).abs().mean()))
        assert float(voice.noise.mean()) == pytest.approx(1 / (1 + math.exp(-noisy)))
    assert errors == pytest.approx([0.75, 0.32, 0.30], abs=0.03)
    assert float(mel.std()) > 1.1  # which the errors are below


def test_only_the_voice_loss_teaches_pitch_and_noise(tmp_path):
    h = toy_config(tmp_path, FRAMES)
    torch.manual_seed(0)
    generator = Generator(h)
    wav = torch.from_numpy(speech_like(h.segment_size / h.sampling_rate)).float()[None]
    mel = LogMelSpectrogram(h, h.fmax)(wav)
    wav_hat, voice = generator(mel, PhaseState())

    def gradients(loss: torch.Tensor) -> tuple[float, ...]:
        (gradient,) = torch.autograd.grad(loss, generator.conv_post.bias, retain_graph=True)
        return tuple(float(part.abs().max()) for part in gradient.split(generator.head.channels))

    correction, noise, pitch, hints = gradients(wav_hat.square().mean())
    assert correction > 0 and hints > 0 and noise == pitch == 0
    correction, noise, pitch, hints = gradients(SourceLoss(h)(voice, wav))
    assert correction == hints == 0 and noise > 0 and pitch > 0


def test_each_segment_learns_with_another_noise_and_the_same_again(tmp_path):
    torch.manual_seed(0)
    generator = Generator(toy_config(tmp_path, FRAMES)).requires_grad_(False)
    mel = torch.randn(1, 80, 20) - 5
    other = mel.clone()
    other[0, 40, 10] += 1e-3  # heard by nobody
    first, again, third = (generator(x)[0, 0] for x in (mel, mel, other))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert float((first - third).norm() / first.norm()) > 0.5
    draws = generator(mel.repeat(2, 1, 1))[:, 0]
    torch.testing.assert_close(draws[0], first, atol=1e-3, rtol=0)
    assert float((draws[0] - draws[1]).norm() / first.norm()) > 0.5
    generator.eval()
    first, third = (generator(x)[0, 0] for x in (mel, other))
    assert float((first - third).norm() / first.norm()) < 0.1


@pytest.mark.parametrize(
    ("steps", "changes", "learnt", "fixed"),
    [
        (0, {}, 3 + 2 * 24 + 7, 4),
        (2, {}, 3 + 2 * 24 + 7, 10),
        (1, ODD | {"win_size": 900}, 3 + 2 * 24 + 7, 9),
        (0, {"resblock": "2"}, 3 + 2 * 18 + 4, 4),  # units of one convolution
    ],
)
def test_a_frame_is_heard_as_far_as_the_receptive_field_says(
    tmp_path, steps, changes, learnt, fixed
):
    """But for the phase, which goes on from wherever the pulses are anchored."""
    torch.manual_seed(0)
    h = toy_config(tmp_path, FRAMES, griffin_lim_steps=steps, **changes)
    generator = Generator(h).double().eval()
    generator.remove_weight_norm()
    for weight in generator.parameters():  # heard as far as they reach
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    before, after = generator.receptive_field
    assert (before, after) == (learnt + fixed,) * 2
    frame = before + 1
    mel = torch.randn(1, 80, 2 * frame + 1) - 5
    other = mel.clone()
    other[:, :, frame] += 100
    for anchor, least in ((0, 0.0), (2 * frame, 1e-9)):  # what comes before has the same rounding
        wavs = [generator(x, PhaseState(anchor=anchor))[0] for x in (mel, other)]
        samples = ((wavs[0] - wavs[1])[0, 0].abs() > least).nonzero()
        first, last = int(samples.min()) // h.hop_size, int(samples.max()) // h.hop_size
        if anchor == 0:
            assert frame - first == after
        else:
            assert learnt < last - frame <= before


def test_pieces_are_the_whole_and_one_frame_speaks(tmp_path):
    """In float64: in float32 the pitch is rounded, and a long voice adds that up in its phase."""
    torch.manual_seed(3)
    generator = Generator(toy_config(tmp_path, FRAMES, griffin_lim_steps=4)).double().eval()
    mel = torch.randn(80, 300) - 5
    whole = synthesize(generator, mel)
    for cuts in ([37] * 8 + [4], [160] + [1] * 30 + [110]):
        streamer = Streamer(generator)
        pieces = [streamer.feed(frames) for frames in mel.split(cuts, dim=1)]
        assert all(
            len(piece) == 256 * size for piece, size in zip(pieces[4:], cuts[4:], strict=True)
        )
        difference = torch.cat([*pieces, streamer.flush()]) - whole
        assert float(difference.abs().max() / whole.abs().max()) < 1e-6
    assert synthesize(generator, mel[:, :1]).shape == (256,)


def test_in_bfloat16_the_refiner_is_too_and_the_spectrum_is_not(tmp_path):
    h = toy_config(tmp_path, FRAMES, griffin_lim_steps=2)
    mel = LogMelSpectrogram(h, h.fmax)(torch.from_numpy(speech_like(0.5)).float()[None])
    wavs = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        generator = to_inference(Generator(h), torch.device("cpu"), precision)
        wavs[precision] = generator(mel)[:, 0]
    assert {p.dtype for p in generator.head.refiner.parameters()} == {torch.bfloat16}
    assert generator.conv_post.weight.dtype == wavs["bf16"].dtype == torch.float32
    mels = [LogMelSpectrogram(h, h.fmax)(wav) for wav in wavs.values()]
    assert 0 < float((mels[0] - mels[1]).abs().mean()) < 0.1


def test_padding_with_less_than_silence_is_silence(tmp_path):
    """Acoustic models may pad log-mels with log(1e-10), say, which the refiner would shout at."""
    h = toy_config(tmp_path, FRAMES)
    torch.manual_seed(0)
    generator = to_inference(Generator(h), torch.device("cpu"), "fp32")
    mel = torch.randn(1, h.num_mels, 12).clamp(-2, 2) - 5
    padded = (F.pad(mel, (4, 4), value=value) for value in (SILENT_LOG_MEL, math.log(1e-10)))
    silent, less = map(generator, padded)
    torch.testing.assert_close(less, silent, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"griffin_lim_steps": -1}, "0 or more"),
        ({"refiner_channels": 0}, "refiner_channels = 0: expected more than 0"),
        ({"upsample_rates": [1, 2]}, "rates of 1 beside griffin_lim_steps"),
        ({"gen_istft_n_fft": 16, "gen_istft_hop_size": 4}, "no such key beside gen_istft_n_fft"),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(write_config(tmp_path / "config.json", FRAMES, **changes))


def test_nothing_is_halved_from_stage_to_stage(tmp_path):
    stages = {"upsample_rates": [1] * 5, "upsample_kernel_sizes": [1] * 5}
    h = toy_config(tmp_path, FRAMES, upsample_initial_channel=16, **stages)
    assert Generator(h).conv_post.in_channels == 16


def test_every_weight_learns(tmp_path):
    h = toy_config(tmp_path, FRAMES)
    torch.manual_seed(0)
    generator, wav = Generator(h), torch.from_numpy(speech_like(0.3)).float()[None, :5120]
    wav_hat, voice = generator(LogMelSpectrogram(h, h.fmax)(wav), PhaseState())
    (wav_hat.square().sum() + SourceLoss(h)(voice, wav)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in generator.parameters())


def lasting_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of log magnitudes, each bin averaged over 16 frames: a mean, by NumPy."""
    spectra = []
    for wav in (x, y):
        padded = np.pad(wav.numpy(), ((0, 0), (384, 384)), mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, 1024, axis=1)[:, ::256]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
        logs = np.log(np.abs(np.fft.rfft(frames * window)))
        stretches = np.array_split(logs, range(16, logs.shape[1], 16), axis=1)
        spectra.append(np.stack([stretch.mean(1) for stretch in stretches], axis=1))
    return torch.tensor(np.abs(spectra[0] - spectra[1]).mean(), dtype=torch.float32)


def test_an_energy_distance_wants_draws_that_differ_as_recordings_do(tmp_path):
    """Of noise, another noise each time; to the mean error the same one would be as good."""
    torch.manual_seed(0)
    loss = MelLoss(toy_config(tmp_path, FRAMES))
    wav, first, second = (torch.randn(4, 40 * 256) for _ in range(3))
    pairs = (first, wav), (second, wav), (first, second)
    mel_errors = [loss(*pair) for pair in pairs]
    assert max(mel_errors) < 1.05 * min(mel_errors)
    errors = [loss(*pair) + lasting_distance(*pair) for pair in pairs]
    differ = loss.energy_distance(torch.stack([first, second]), wav)
    expected = errors[0] + errors[1] - REPULSION * errors[2]
    torch.testing.assert_close(differ, expected / 2)
    assert loss.energy_distance(torch.stack([first, first]), wav) > 1.3 * differ


def test_an_energy_distance_sees_a_comb_that_bands_hide(tmp_path):
    """Each fourth bin louder and quieter, as by an echo of a hop; bands of many bins stay."""
    torch.manual_seed(0)
    loss = MelLoss(toy_config(tmp_path, FRAMES))
    wav, first, second = (torch.randn(4, 17000) for _ in range(3))
    echo = torch.stack([x[:, 256:] + 0.7 * x[:, :-256] for x in (first, second)])
    draws, wav = torch.stack([first, second])[:, :, 256:], wav[:, 256:]
    echo = echo * draws.std() / echo.std()
    assert loss(echo[0], wav) < 1.06 * loss(draws[0], wav)
    assert loss.energy_distance(echo, wav) > 1.15 * loss.energy_distance(draws, wav)


@pytest.mark.parametrize("discriminator_train_start_steps", [0, 9, None])
def test_a_training_step_is_of_two_draws(tmp_path, discriminator_train_start_steps):
    h = toy_config(
        tmp_path,
        FRAMES,
        batch_size=2,
        discriminator_train_start_steps=discriminator_train_start_steps,
    )
    state = build_state(h, torch.device("cpu"))
    wav = torch.from_numpy(speech_like(2 * h.segment_size / h.sampling_rate)).float()
    wav = wav[: 2 * h.segment_size].view(2, 1, -1)
    mel = LogMelSpectrogram(h, h.fmax)(wav[:, 0])
    draws, _ = state.generator(mel.repeat(2, 1, 1), PhaseState())
    expected = state.mel_loss.energy_distance(draws.view(2, 2, -1), wav[:, 0])
    discriminators = copy.deepcopy(state.discriminators)
    losses = training_step(state, mel, wav)
    torch.testing.assert_close(losses["gen_loss_energy"], expected.detach())
    expected_names = {"gen_loss_total", "gen_loss_energy", "gen_loss_voice"}
    if discriminator_train_start_steps == 0:
        expected_names |= {"gen_loss_adversarial", "gen_loss_feature", "disc_loss_total"}
    assert losses.keys() == expected_names
    total = h.lambda_mel * losses["gen_loss_energy"] + LAMBDA_VOICE * losses["gen_loss_voice"]
    if discriminator_train_start_steps == 0:
        total = total + losses["gen_loss_adversarial"] + 2 * losses["gen_loss_feature"]
        scores, _ = discriminators(torch.cat([wav, draws[:2]]).detach())
        real_scores, fake_scores = zip(*(score.chunk(2) for score in scores), strict=True)
        of_first = discriminator_loss(real_scores, fake_scores)
        torch.testing.assert_close(losses["disc_loss_total"], of_first)
    torch.testing.assert_close(losses["gen_loss_total"], total)
    assert losses["gen_loss_voice"] > 0
