"""distill.py: its losses and Muon against plain computations, and the command."""

import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import distill
import muon
import train
from checkpoint import build_state
from distill import (
    Distillation,
    HarmonicLoss,
    StagewiseLoss,
    at_other_levels,
    check_teacher,
    distance,
)
from env import UserError
from harmonic import random_phase_state
from inference import load_generator, synthesize
from meldataset import LogMelSpectrogram
from models import Generator
from muon import MOMENTUM, RMS, Muon, orthogonalise
from tests.runs import contents, equal_but_meta
from tools.toy import corpus_arguments, run_main, save_checkpoint, toy_config, write_config
from weights import to_hifigan_names

MRF, FRAMES = "configs/hifigan_v1.json", "configs/frame_v2.json"
TOY_MISR = {"resblock_kernel_size": 11, "learning_rate": 0.0002}


def loud(generator: Generator) -> Generator:
    """`generator` with weights so large that each stage matters."""
    with torch.no_grad():
        for name, p in generator.named_parameters():
            if not name.endswith("bias") and "original0" not in name:
                p.normal_(0, 0.1)
    return generator


EXACT = torch.autocast("cpu", torch.bfloat16, enabled=False)


def student_and_teacher(student_h, teacher_h) -> list[Generator]:
    both = [loud(Generator(h)) for h in (student_h, teacher_h)]
    for generator in both:
        generator.remove_weight_norm()
    return both


def make_stagewise_loss(student_h, teacher_h) -> tuple[StagewiseLoss, Generator]:
    student, teacher = student_and_teacher(student_h, teacher_h)
    return StagewiseLoss(student, teacher.requires_grad_(False), student_h, EXACT), teacher


def test_distance_equals_a_plain_computation():
    y, target = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    overall = (y - target).abs().sum() / target.abs().sum()
    errors, sizes = [], []
    for b in range(2):
        for first in range(0, 12, 4):
            part = (b, slice(None), slice(first, first + 4))
            errors.append(float((y[part] - target[part]).abs().mean()))
            sizes.append(float(target[part].abs().mean()))
    typical = sum(sizes) / len(sizes)
    by_frame = sum(e / (s + 0.05 * typical) for e, s in zip(errors, sizes, strict=True)) / len(
        sizes
    )
    expected = 0.5 * float(overall) + 0.5 * by_frame
    assert float(distance(y, target, frame=4)) == pytest.approx(expected, rel=1e-5)


def test_stage_errors_equal_those_of_the_two_generators_layer_by_layer(tmp_path):
    h = toy_config(tmp_path)
    loss, teacher = make_stagewise_loss(h, toy_config(tmp_path, MRF))
    mel = torch.randn(2, h.num_mels, 6)
    (errors, mel_error), x, frame = loss(mel, True), teacher.conv_pre(mel), 1
    own = x
    for stage in range(4):
        given = teacher.ups[stage](F.leaky_relu(x, 0.1))
        blocks = teacher.resblocks[3 * stage : 3 * stage + 3]
        x = sum(block(given) for block in blocks) / 3
        y, frame = loss.student.resblocks[stage](given), frame * h.upsample_rates[stage]
        if stage < 3:
            pair = [teacher.ups[stage + 1](F.leaky_relu(z, 0.1)) for z in (y, x)]
            rate = frame * h.upsample_rates[stage + 1]
        else:
            pair = [teacher.conv_post(F.leaky_relu(z, 0.01)) for z in (y, x)]
            rate = frame
        expected = torch.stack([distance(y, x, frame), distance(*pair, rate)])
        torch.testing.assert_close(errors[stage], expected, rtol=1e-4, atol=1e-6)
        own = loss.student.resblocks[stage](teacher.ups[stage](F.leaky_relu(own, 0.1)))
    wav_hat = torch.tanh(teacher.conv_post(F.leaky_relu(own, 0.01)))
    log_mel = LogMelSpectrogram(h, h.fmax_for_loss)
    expected = (log_mel(wav_hat[:, 0]) - log_mel(teacher(mel)[:, 0])).abs().mean()
    torch.testing.assert_close(mel_error, expected, rtol=1e-4, atol=1e-6)
    of_stages, none = loss(mel, False)
    assert none is None
    torch.testing.assert_close(of_stages, errors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", ["config_v1.json", "configs/istft_v2.json"])
def test_a_student_that_equals_its_teacher_has_no_error_and_another_learns(tmp_path, config):
    h = toy_config(tmp_path, config)
    loss, teacher = make_stagewise_loss(h, h)
    loss.student.load_state_dict(teacher.state_dict())
    for errors in loss(torch.randn(2, h.num_mels, 6), True):
        assert float(errors.detach().abs().max()) < 1e-5
    loud(loss.student)
    sum(errors.sum() for errors in loss(torch.randn(2, h.num_mels, 6), True)).backward()
    assert all(p.grad.abs().max() > 0 for p in loss.student.resblocks.parameters())


def test_frame_rate_errors_are_of_f0_aperiodicity_and_magnitudes(tmp_path):
    h = toy_config(tmp_path, FRAMES, upsample_initial_channel=8, refiner_channels=8)
    student, teacher = student_and_teacher(h, toy_config(tmp_path, FRAMES))
    loss, mel = HarmonicLoss(student, teacher, EXACT), torch.randn(2, h.num_mels, 12) - 4
    log_f0, aperiodicity = teacher.head.f0_aperiodicity(teacher.features(mel))
    own_f0, own_aperiodicity = student.head.f0_aperiodicity(student.features(mel))
    weight = 1 - aperiodicity[:, :, :47].mean(2)  # bins below 1 kHz
    excitation = teacher.head.excitation(teacher.features(mel), random_phase_state(mel))
    magnitudes = [
        generator.head.spectrum(generator.features(mel), mel, excitation)[1]
        for generator in (student, teacher)
    ]
    expected = [
        (weight * (own_f0 - log_f0).abs()).sum() / weight.sum(),
        (own_aperiodicity - aperiodicity).abs().mean(),
        (magnitudes[0] - magnitudes[1]).abs().mean(),
    ]
    torch.testing.assert_close(loss(mel), torch.stack(expected).float())
    assert min(expected) > 1e-3
    with torch.no_grad():  # in unvoiced frames any F0 is right
        teacher.conv_post.bias[513:1026] = 30.0
    assert float(loss(mel).detach()[0]) == 0


def test_a_frame_rate_student_that_equals_its_teacher_has_no_error(tmp_path):
    h = toy_config(tmp_path, FRAMES)
    student, teacher = student_and_teacher(h, h)
    student.load_state_dict(teacher.state_dict())
    loss = HarmonicLoss(student, teacher.requires_grad_(False), EXACT)
    mel = torch.randn(2, h.num_mels, 12) - 4
    assert float(loss(mel).detach().abs().max()) < 1e-5
    loud(student)
    loss(mel).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().max() > 0 for p in student.parameters())


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_orthogonalise_is_near_the_polar_factor_of_a_plain_svd(monkeypatch, has_bfloat16, shape):
    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda _: has_bfloat16)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, min(shape))) @ v
    inner = u.T @ orthogonalise(matrix) @ v.T  # the identity for the polar factor u @ v
    assert 0.5 < float(inner.diag().min()) <= float(inner.diag().max()) < 1.3
    assert float((inner - inner.diag().diag()).abs().max()) < 0.05


def test_muon_takes_nesterov_steps_of_one_size():
    conv = torch.nn.Conv1d(6, 10, 3)
    optimizer, before = Muon([conv.weight], 0.01, (0.8, 0.99)), conv.weight.detach().clone()
    gradients, momentum = [torch.randn(10, 6, 3) for _ in range(2)], torch.zeros(10, 6, 3)
    for gradient in gradients:
        conv.weight.grad = gradient.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + gradient
        direction = orthogonalise((gradient + MOMENTUM * momentum).reshape(10, 18))
        before -= 0.01 * RMS * math.sqrt(18) * direction.reshape(10, 6, 3)
        torch.testing.assert_close(conv.weight.detach(), before)


@pytest.mark.parametrize("shape", [(4, 3, 2), (4,)])
def test_muon_leaves_parameters_without_gradient_unchanged(shape):
    idle = torch.nn.Parameter(torch.ones(shape))
    Muon([idle], 0.01, (0.8, 0.99)).step()
    assert torch.equal(idle, torch.ones(shape))


def test_muon_updates_biases_as_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    betas = (0.8, 0.99)
    optimizers = (
        Muon([ours], 0.01, betas),
        torch.optim.AdamW([theirs], 0.01, betas=betas, weight_decay=0),
    )
    for _ in range(3):
        ours.grad = torch.randn(7)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def distillation(
    tmp_path, teacher: Generator, last_step=None, is_warm=False, config="config_v2.json", **changes
) -> tuple[Distillation, object]:
    h = toy_config(tmp_path, config, **(TOY_MISR | changes))
    state = build_state(h, torch.device("cpu"))
    return Distillation(state, teacher, last_step, is_warm), state


def test_the_student_starts_from_the_teacher_s_layers_and_its_blocks_of_the_same_kernel(
    tmp_path, capsys
):
    teacher = loud(Generator(toy_config(tmp_path, MRF)))
    teacher.remove_weight_norm()
    learner, state = distillation(tmp_path, teacher)
    for ours in (learner.student, state.generator):
        for layer in ("conv_pre", "ups.2", "conv_post"):
            theirs = teacher.get_submodule(layer).weight
            torch.testing.assert_close(ours.get_submodule(layer).weight, theirs)
        shared = ours.resblocks[1].resblock.convs2[0].weight
        torch.testing.assert_close(shared, teacher.resblocks[5].convs2[0].weight)
    assert "the shared blocks from its resblocks 2, 5, 8, 11" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [0, 5])
def test_the_outer_layers_are_the_teacher_s_after_a_warm_start_or_a_resume(tmp_path, steps):
    """This holds for files of another teacher, too. The blocks are those of the files."""
    teacher = loud(Generator(toy_config(tmp_path, MRF)))
    learner, state = distillation(tmp_path, teacher)
    other = Generator(state.h)
    other.remove_weight_norm()
    for generator in (state.generator, learner.student) if steps else (state.generator,):
        generator.load_state_dict(other.state_dict())
    state.steps = steps
    learner.start(state, compiled=False)
    for generator in (state.generator, learner.student):
        for name, weight in generator.state_dict().items():
            is_block = name.startswith("resblocks.")
            theirs = (other if is_block else teacher).state_dict()[name]
            torch.testing.assert_close(weight, theirs)


def test_a_misr_can_be_distilled_into_an_equal_misr(tmp_path):
    """The student can equal the teacher, so its errors vanish."""
    stages = {"upsample_rates": [16, 16], "upsample_kernel_sizes": [32, 32]}
    changes = TOY_MISR | stages | {"learning_rate": 0.0004}
    h = toy_config(tmp_path, **changes)
    torch.manual_seed(1)
    teacher = loud(Generator(h)).requires_grad_(False)
    teacher.remove_weight_norm()
    learner, state = distillation(tmp_path, teacher, **changes)
    with torch.no_grad():  # near the teacher, as after a warm start
        for p in learner.student.resblocks.parameters():
            p.add_(0.02 * torch.randn_like(p))
    state.generator.load_state_dict(learner.student.state_dict())
    learner.last_step = 400
    first = None
    for _ in range(400):
        losses = learner.update(state, torch.randn(2, h.num_mels, 4), None)
        first = first or float(losses["gen_loss_total"])
        state.steps += 1
    assert float(losses["gen_loss_total"]) < 4 * 1e-3 < 0.05 * first


def test_a_lighter_frame_rate_generator_learns_from_a_larger_one(tmp_path):
    torch.manual_seed(1)
    teacher = Generator(toy_config(tmp_path, FRAMES, upsample_initial_channel=24))
    with torch.no_grad():
        for p in teacher.head.refiner.parameters():
            p.normal_(0, 0.1)
    teacher.remove_weight_norm()
    changes = {"config": FRAMES, "refiner_channels": 8, "learning_rate": 0.002}
    learner, state = distillation(tmp_path, teacher, 150, **changes)
    random, errors = torch.Generator().manual_seed(0), []
    for state.steps in range(150):
        mel = torch.randn(2, state.h.num_mels, 16, generator=random) - 4
        errors.append(learner.update(state, mel, None))
    first, last = errors[0], errors[-1]
    weighed = 2 * last["f0"] + 2 * last["aperiodicity"] + last["log_magnitude"]
    torch.testing.assert_close(last["gen_loss_total"], weighed)
    for name in ("f0", "aperiodicity", "log_magnitude"):
        assert float(last[name]) < 0.6 * float(first[name])


def test_a_frame_rate_student_starts_from_the_teacher_s_layers_that_fit(tmp_path, capsys):
    """If only the refiner is smaller, all other layers fit."""
    teacher = Generator(toy_config(tmp_path, FRAMES))
    teacher.remove_weight_norm()
    with torch.no_grad():
        for p in teacher.parameters():
            p.normal_()
    changes = {"config": FRAMES, "refiner_channels": 8, "resblock_kernel_size": 5}
    learner, state = distillation(tmp_path, teacher, **changes)
    theirs = teacher.state_dict()
    for generator in (learner.student, state.generator):
        ours = generator.state_dict()
        taken = {key for key, value in theirs.items() if torch.equal(ours[key], value)}
        assert taken == {key for key in theirs if ".refiner." not in key}
    fitting = {key.rpartition(".")[0] for key in theirs if ".refiner." not in key}
    assert re.match(rf"{len(fitting)} of \d+ layers from the teacher\n", capsys.readouterr().out)


def test_the_mel_loss_is_added_late_in_the_run_or_at_once_after_a_warm_start(tmp_path):
    teacher = loud(Generator(toy_config(tmp_path, MRF))).requires_grad_(False)
    teacher.remove_weight_norm()
    for last_step, is_warm, first in ((10, False, 7), (None, False, 3500), (10, True, 0)):
        learner, state = distillation(tmp_path, teacher, last_step, is_warm)
        for state.steps in range(max(0, first - 1), first + 1):
            losses = learner.update(state, torch.randn(1, 80, 4), None)
            total = sum(value for name, value in losses.items() if name.startswith("stage"))
            if state.steps >= first:
                total = total + 0.3 * losses["gen_loss_mel"]
            torch.testing.assert_close(losses["gen_loss_total"], total)
            assert ("gen_loss_mel" in losses) == (state.steps >= first)


def test_levels_follow_from_seed_and_step_and_silence_is_kept(tmp_path):
    state = SimpleNamespace(h=toy_config(tmp_path), steps=3)
    mel = torch.full((64, 80, 2), -5.0)
    quieter = at_other_levels(mel, state)
    torch.testing.assert_close(quieter, at_other_levels(mel, state))
    gains = (quieter - mel)[:, 0, 0]
    assert 16 < int((gains < 0).sum()) < 48
    assert -2.31 < float(gains.min()) < -1
    assert float(at_other_levels(torch.full((64, 80, 2), -11.5), state).min()) > -11.52


def test_levels_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    state = SimpleNamespace(h=toy_config(tmp_path), steps=3)
    mel = torch.linspace(-6, -4, 8).view(8, 1, 1).expand(8, 80, 2)
    whole = at_other_levels(mel, state)
    monkeypatch.setattr(distill, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distill, "rank", lambda r=rank: r)
        assert torch.equal(at_other_levels(mel[rank::2], state), whole[rank::2])


@pytest.fixture
def configs(request):
    """The configs of teacher and student."""
    return getattr(request, "param", (MRF, "config_v2.json"))


@pytest.fixture
def teacher_file(tmp_path, configs):
    """A toy teacher, with its config beside it."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    write_config(folder / "config.json", configs[0])
    torch.manual_seed(5)
    generator = loud(Generator(toy_config(tmp_path, configs[0])))
    save_checkpoint(folder / "g_00000007", {"generator": to_hifigan_names(generator)})
    return folder / "g_00000007"


@pytest.fixture
def command(corpus, tmp_path, configs, teacher_file):
    config = write_config(tmp_path / "config.json", configs[1], **TOY_MISR)
    arguments = ("--teacher_file", teacher_file, "--config", config, *corpus_arguments(corpus))

    def run(folder, steps, *flags, script=distill):
        kept = arguments if script is distill else arguments[2:]
        flags = ("--checkpoint_path", folder, "--training_steps", steps, *flags)
        return run_main(script, *kept, *flags)

    return run


@pytest.mark.parametrize(
    ("configs", "errors", "precision"),
    [
        ((MRF, "config_v2.json"), "Mel Loss : ", "fp32"),
        ((FRAMES, "configs/frame_v3.json"), "F0 : ", "bf16"),
    ],
    indirect=["configs"],
    ids=["stages", "frames"],
)
def test_a_run_resumes_bit_for_bit_and_train_py_continues_it(
    command, tmp_path, capsys, errors, precision
):
    every = ("--checkpoint_interval", 3, "--validation_interval", 3, "--stdout_interval", 1)
    every += ("--precision", precision)
    assert command(tmp_path / "whole", 6, *every) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("Steps : 6, Gen"))
    assert errors in line
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name in ("g_00000006", "do_00000006"):
        (tmp_path / "parts" / name).unlink()
    assert command(tmp_path / "parts", 6, *every) == 0
    whole, parts = (contents(tmp_path / each, 6) for each in ("whole", "parts"))
    assert equal_but_meta(whole, parts)
    assert whole["do"]["mpd"] == whole["do"]["msd"] == {}
    assert "no discriminators\n" in capsys.readouterr().out
    assert command(tmp_path / "parts", 8, script=train) == 0
    assert (tmp_path / "parts/do_00000008").exists()
    with pytest.raises(UserError, match=r"8: contains no student, muon; resume a run of train\.py"):
        command(tmp_path / "parts", 9)
    generator, h = load_generator(tmp_path / "parts/g_00000008")
    assert len(synthesize(generator, torch.zeros(h.num_mels, 5))) == 5 * h.hop_size


def test_a_teacher_of_another_mel_is_an_error(command, tmp_path, teacher_file):
    write_config(teacher_file.with_name("config.json"), MRF, fmax=7000)
    with pytest.raises(UserError, match=r"its config has fmax = 7000, the student's 8000"):
        command(tmp_path / "cp", 1)


def test_a_missing_teacher_is_named_before_data_are_read(command, tmp_path):
    missing = tmp_path / "none/g_00000001"
    flags = ("--teacher_file", missing, "--input_training_file", tmp_path / "none.txt")
    with pytest.raises(UserError, match=f"^{missing}: no such checkpoint file"):
        command(tmp_path / "cp", 1, *flags)
    assert not (tmp_path / "cp").exists()


def test_generators_of_two_kinds_are_an_error(tmp_path):
    frames, misr = toy_config(tmp_path, FRAMES), toy_config(tmp_path)
    with pytest.raises(UserError, match=r"g: .* with griffin_lim_steps, the student's without: "):
        check_teacher(frames, misr, "g")
    with pytest.raises(UserError, match=r"g: .* without griffin_lim_steps, the student's with: "):
        check_teacher(misr, frames, "g")
    with pytest.raises(UserError, match=r"hop_size = 256, .* 200: expected the same mel$"):
        check_teacher(frames, toy_config(tmp_path, FRAMES, hop_size=200, segment_size=4000), "g")


def test_a_student_that_is_no_misr_is_an_error(tmp_path):
    h = toy_config(tmp_path, MRF)
    with pytest.raises(UserError, match=r"g: can train a MISR only, .* use config_v1\.json"):
        check_teacher(h, h, "g")
