"""Training: its updates against the textbook, what is learnt, saved, resumed and shown."""

import concurrent.futures
import contextlib
import itertools
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import launch
import meldataset
import monitor
import train
import utils
from checkpoint import State, build_state, checkpoint_path, paired_steps, resume, save, warm_start
from env import UserError, load_config
from loop import StopRequest, count_update, validate
from meldataset import LogMelSpectrogram, MelDataset
from models import Generator
from monitor import BackgroundMetrics
from tools import hifigan_reference as textbook
from tools.toy import (
    corpus_arguments,
    run_main,
    save_checkpoint,
    speech_like,
    toy_config,
    write_config,
)
from weights import load_checkpoint, load_weights, to_hifigan_names

CPU = torch.device("cpu")


# ------------------------------------------------------------------ one update against the textbook


class Textbook:
    """HiFi-GAN's models and optimizers at toy size, in float64, with old-style norms."""

    def __init__(self, h, power_iterations: int):
        self.h = h
        self.generator = textbook.TextbookGenerator(h).double()
        self.mpd = textbook.MultiPeriod(h.discriminator_channel_mult).double()
        self.msd = textbook.MultiScale(h.discriminator_channel_mult).double()
        set_power_iterations(self.msd, power_iterations)
        discriminator_parameters = itertools.chain(self.msd.parameters(), self.mpd.parameters())
        self.optim_g, self.optim_d = (
            torch.optim.AdamW(p, h.learning_rate, betas=(h.adam_b1, h.adam_b2))
            for p in (self.generator.parameters(), discriminator_parameters)
        )
        self.log_mel = LogMelSpectrogram(h, h.fmax_for_loss).double()

    def step(self, mel, wav):
        return textbook.textbook_step(
            *(self.generator, self.mpd, self.msd, self.optim_g, self.optim_d),
            *(self.log_mel, mel, wav),
        )

    def save(self, folder, steps: int) -> None:
        """As jik876/hifi-gan saves with its torch 1.4: old archives and optimizer states."""
        generator = {"generator": self.generator.state_dict()}
        contents = {
            "mpd": self.mpd.state_dict(),
            "msd": self.msd.state_dict(),
            "optim_g": old_optimizer_state(self.optim_g),
            "optim_d": old_optimizer_state(self.optim_d),
            "steps": steps,
            "epoch": 0,
        }
        for prefix, saved in (("g", generator), ("do", contents)):
            path = checkpoint_path(folder, prefix, steps)
            torch.save(saved, path, _use_new_zipfile_serialization=False)


def old_optimizer_state(optimizer) -> dict:
    """Parameters called by their addresses, `step` a plain integer, few settings in the group."""
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    address = {key: 140_000_000_000 + 64 * key for key in group["params"]}
    moments = {
        address[key]: {**state, "step": int(state["step"])} for key, state in saved["state"].items()
    }
    settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    settings["initial_lr"] = group["lr"]
    params = [address[key] for key in group["params"]]
    return {"state": moments, "param_groups": [settings | {"params": params}]}


def set_power_iterations(module: nn.Module, count: int) -> None:
    """Of every spectral norm, old or new."""
    for part in module.modules():
        for holder in (part, *part._forward_pre_hooks.values()):
            if hasattr(holder, "n_power_iterations"):
                holder.n_power_iterations = count


def state_of(textbook: Textbook, power_iterations: int) -> State:
    """Our state with the textbook's weights, in float64."""
    state = build_state(textbook.h, CPU)
    for module in (state.generator, state.discriminators, state.mel_loss, state.mel_for_loss):
        module.double()
    for ours, theirs in (
        (state.generator, textbook.generator),
        (state.discriminators.mpd, textbook.mpd),
        (state.discriminators.msd, textbook.msd),
    ):
        load_weights(ours, theirs.state_dict(), "the textbook")
    set_power_iterations(state.discriminators, power_iterations)
    return state


def batch(h) -> tuple[torch.Tensor, torch.Tensor]:
    frames = h.segment_size // h.hop_size
    mel = torch.randn(h.batch_size, h.num_mels, frames, dtype=torch.float64)
    return mel, 0.1 * torch.randn(h.batch_size, 1, h.segment_size, dtype=torch.float64)


def assert_same(ours, textbook) -> None:
    """Of two lists of tensors, to the rounding of sums of terms as large as the largest."""
    for a, b in zip(ours, textbook, strict=True):
        atol = max(1e-11, 1e-13 * float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


def assert_same_weights(state: State, textbook: Textbook) -> None:
    """Of the generators and of the discriminators, which both list in the same order."""
    assert_same(state.generator.parameters(), textbook.generator.parameters())
    discriminators = itertools.chain(textbook.msd.parameters(), textbook.mpd.parameters())
    assert_same(state.discriminators.parameters(), discriminators)


def gradients_at_each_update(optimizer) -> list[list[torch.Tensor]]:
    """A list that fills with the gradients that each step of `optimizer` is given."""
    seen = []

    def note(optimizer, *_):
        seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    optimizer.register_step_pre_hook(note)
    return seen


@pytest.fixture
def mrf_config(tmp_path):
    return toy_config(tmp_path, "configs/hifigan_v2.json", discriminator_channel_mult=0.02)


def test_an_update_equals_the_textbook(mrf_config):
    """Equal losses, gradients and weights; the power iteration stands still on both sides."""
    textbook = Textbook(mrf_config, power_iterations=0)
    state = state_of(textbook, power_iterations=0)
    optimizers = (textbook.optim_d, state.optim_d, textbook.optim_g, state.optim_g)
    expected_d, gradients_d, expected_g, gradients_g = map(gradients_at_each_update, optimizers)
    mel, wav = batch(mrf_config)
    for step in range(2):
        loss_d, loss_g = textbook.step(mel, wav)
        losses = train.training_step(state, mel, wav)
        assert float(losses["disc_loss_total"]) == pytest.approx(float(loss_d), rel=1e-9)
        assert float(losses["gen_loss_total"]) == pytest.approx(float(loss_g), rel=1e-9)
        assert_same(gradients_d[step], expected_d[step])
        assert_same(gradients_g[step], expected_g[step])
    assert_same_weights(state, textbook)


def test_an_update_with_its_own_power_iteration_stays_close(mrf_config):
    """One iteration a step against the original's four: the losses differ by less than 1%."""
    textbook = Textbook(mrf_config, power_iterations=1)
    state = state_of(textbook, power_iterations=1)
    mel, wav = batch(mrf_config)
    for _ in range(3):
        loss_d, loss_g = textbook.step(mel, wav)
        losses = train.training_step(state, mel, wav)
        assert float(losses["disc_loss_total"]) == pytest.approx(float(loss_d), rel=0.01)
        assert float(losses["gen_loss_total"]) == pytest.approx(float(loss_g), rel=0.01)


def test_before_adversarial_from_the_mel_loss_alone_moves_the_generator_alone(tmp_path):
    h = toy_config(
        tmp_path,
        "configs/hifigan_v2.json",
        discriminator_channel_mult=0.02,
        discriminator_train_start_steps=1,
    )
    state = build_state(h, CPU)
    mel, wav = (x.float() for x in batch(h))
    discriminators = [p.clone() for p in state.discriminators.state_dict().values()]
    with torch.no_grad():
        error = state.mel_loss(state.generator(mel).squeeze(1), wav.squeeze(1))
    losses = train.training_step(state, mel, wav)
    assert losses.keys() == {"gen_loss_total", "mel_spec_error"}
    torch.testing.assert_close(losses["gen_loss_total"], 45 * error)
    assert all(map(torch.equal, discriminators, state.discriminators.state_dict().values()))
    with torch.no_grad():
        assert state.mel_loss(state.generator(mel).squeeze(1), wav.squeeze(1)) < error
    state.steps = 1
    assert "disc_loss_total" in train.training_step(state, mel, wav)


def test_the_power_iteration_runs_in_the_discriminator_step_only(tmp_path):
    h = toy_config(tmp_path)
    state = build_state(h, CPU)
    conv = state.discriminators.msd.discriminators[0].convs[1]
    mel, wav = (x.float() for x in batch(h))
    wav_hat = state.generator(mel)
    weight = conv.parametrizations.weight.original.detach().flatten(1)
    expected = nn.functional.normalize(weight @ conv.parametrizations.weight[0]._v, dim=0)
    train.discriminator_step(state, wav, wav_hat)
    after = conv.parametrizations.weight[0]._u.clone()
    torch.testing.assert_close(after, expected)  # one iteration
    gradients = [p.grad.clone() for p in state.discriminators.parameters()]
    train.generator_step(state, wav, wav_hat)
    assert torch.equal(conv.parametrizations.weight[0]._u, after)
    for parameter, gradient in zip(state.discriminators.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.requires_grad


def test_a_folder_of_hifigan_resumes(mrf_config, tmp_path):
    """Old key names and optimizers: the next update equals the textbook's next.

    HiFi-GAN saves before it counts: its do_00000007 is of the 8th update.
    """
    textbook = Textbook(mrf_config, power_iterations=0)
    mel, wav = batch(mrf_config)
    textbook.step(mel, wav)
    textbook.save(tmp_path, steps=7)
    state = state_of(Textbook(mrf_config, power_iterations=0), power_iterations=0)
    assert resume(state, tmp_path)
    assert (state.steps, state.epoch, state.epoch_step) == (8, 0, 0)
    textbook.step(mel, wav)
    train.training_step(state, mel, wav)
    assert_same_weights(state, textbook)


def test_bf16_is_of_the_convolutions_alone(tmp_path):
    """Losses, weights and moments stay in float32, and the losses near float32's."""
    h = toy_config(tmp_path)
    mel, wav = (x.float() for x in batch(h))
    results = []
    for precision in ("fp32", "bf16"):
        state = build_state(h, CPU, precision)
        convolved = []
        conv = state.discriminators.mpd.discriminators[0]
        conv.register_forward_hook(lambda _, __, y, seen=convolved: seen.append(y[0].dtype))
        results.append(train.training_step(state, mel, wav))
        assert set(convolved) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    for name, loss in results[1].items():
        assert loss.dtype == torch.float32
        # In the log-mel of a fresh, quiet generator the rounding shows.
        tolerance = 0.02 if name in ("disc_loss_total", "gen_loss_feature") else 0.2
        assert float(loss) == pytest.approx(float(results[0][name]), rel=tolerance)
    for moments in state.optim_d.state.values():
        assert moments["exp_avg"].dtype == torch.float32


def test_compiled_models_make_the_same_losses(tmp_path):
    """One of each kind, traced as by torch.compile, whose code generator would take minutes."""
    h = toy_config(tmp_path)
    mel, wav = (x.float() for x in batch(h))
    eager, compiled = build_state(h, CPU), build_state(h, CPU)
    msd, mpd = compiled.discriminators.msd, compiled.discriminators.mpd
    for module in (compiled.generator, msd.discriminators[0], mpd.discriminators[0]):
        module.compile(backend="eager")
    expected = train.training_step(eager, mel, wav)
    for name, loss in train.training_step(compiled, mel, wav).items():
        assert float(loss) == pytest.approx(float(expected[name]), rel=1e-5)


@pytest.mark.parametrize("discriminator_train_start_steps", [0, 1])
@pytest.mark.parametrize("config", ["config_v2.json", "configs/istft_v2.json"])
def test_an_update_stays_on_its_device(
    tmp_path, monkeypatch, config, discriminator_train_start_steps
):
    """As it must on a GPU. The meta device, which has no autocast, refuses tensors of others."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    h = toy_config(
        tmp_path, config, discriminator_train_start_steps=discriminator_train_start_steps
    )
    meta = torch.device("meta")
    state = build_state(h, meta)
    for name in ("generator", "discriminators"):  # the fused kind is not for this device
        parameters = getattr(state, name).parameters()
        setattr(state, f"optim_{name[0]}", torch.optim.AdamW(parameters, h.learning_rate))
    mel, wav = (x.float().to(meta) for x in batch(h))
    try:
        losses = train.update(state, mel, wav)
    except NotImplementedError as error:  # of weight norm, in PyTorch 2.7
        pytest.skip(str(error))
    count_update(state, losses, steps_per_epoch=2)
    assert all(loss.device == meta for loss in losses.values())
    assert ("disc_loss_total" in losses) == (discriminator_train_start_steps == 0)
    assert state.first_bad_step.device == meta


def test_one_clip_can_be_learnt_by_heart(tmp_path):
    """In 120 updates its mel error falls to a quarter, below its distance from a similar clip."""
    h = toy_config(
        tmp_path, discriminator_train_start_steps=120, learning_rate=0.003, segment_size=8192
    )
    state = build_state(h, CPU)
    wav, similar = (torch.from_numpy(speech_like(0.5, seed=seed)[:8192])[None] for seed in (0, 1))
    mel = state.mel_for_loss(wav)
    errors = [
        float(train.training_step(state, mel, wav[None])["mel_spec_error"]) for _ in range(120)
    ]
    assert errors[-1] < errors[0] / 4
    assert errors[-1] < float((mel - state.mel_for_loss(similar)).abs().mean())


def test_the_learning_rate_decays_exponentially(tmp_path):
    h = toy_config(tmp_path, lr_decay=0.9)
    state = build_state(h, CPU)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(
        torch.optim.AdamW([nn.Parameter(torch.ones(1))], h.learning_rate), h.lr_decay
    )
    for state.epoch in range(4):
        train.set_learning_rate(state)
        for optimizer in (state.optim_g, state.optim_d):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()


# ------------------------------------------------------------------------------------ whole runs


class Run:
    """train.py's command line on the toy corpus; 2 steps an epoch."""

    def __init__(self, corpus, tmp_path, **changes):
        self.config = write_config(tmp_path / "config.json", **changes)
        self.folder = tmp_path / "cp"
        self.arguments = [*corpus_arguments(corpus), "--config", str(self.config)]

    def __call__(self, steps: int, *arguments, folder=None) -> int:
        folder = folder or self.folder
        return run_main(
            train,
            *(*self.arguments, "--checkpoint_path", folder, "--training_steps", steps),
            *(arguments or ("--checkpoint_interval", 1)),
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*_0*"))


@pytest.fixture
def run(corpus, tmp_path):
    return Run(corpus, tmp_path)


def contents(folder, steps: int) -> dict:
    return {p: load_checkpoint(checkpoint_path(folder, p, steps)) for p in ("g", "do")}


def equal_but_meta(a: dict, b: dict) -> bool:
    """Of the contents of two runs, whose commands differ: all else, bit for bit."""
    return equal(*({"g": each["g"], "do": each["do"] | {"meta": None}} for each in (a, b)))


def equal(a, b) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_exact(run, tmp_path, optimizer):
    """6 steps equal 3, and 3 more, an epoch's end among them; workers change nothing."""
    write_config(run.config, optimizer=optimizer)
    assert run(6, folder=tmp_path / "straight") == 0
    write_config(run.config, optimizer=optimizer, num_workers=1)
    assert run(3) == 0
    write_config(run.config, optimizer=optimizer)
    assert run(6) == 0
    assert equal_but_meta(contents(run.folder, 6), contents(tmp_path / "straight", 6))


def test_the_recipe_is_the_config_s_and_what_changes_is_said(run, capsys):
    """With `discriminator_train_start_steps` 2, updates 1 and 2 have no discriminator loss, whatever the flags."""
    write_config(run.config, discriminator_train_start_steps=2)
    for steps in (1, 3):
        assert run(steps, "--stdout_interval", 1) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Steps : ")]
    assert ["Disc Loss Total" in line for line in lines] == [False, False, True]
    meta = contents(run.folder, 3)["do"]["meta"]
    assert meta.keys() == {"version", "commit", "torch", "command", "config"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", meta["version"])
    assert meta["torch"] == torch.__version__
    assert meta["commit"]
    assert meta["command"].startswith("train.py --input_wavs_dir ")
    assert meta["command"].endswith("--training_steps 3 --stdout_interval 1")
    assert meta["config"] == run.config.read_text()
    write_config(run.config, lr_decay=0.5)  # and without discriminator_train_start_steps
    assert run(4) == 0
    said = capsys.readouterr().out
    assert (
        "changed since then: discriminator_train_start_steps 2 -> 0; lr_decay 0.999 -> 0.5\n"
        in said
    )
    assert run(5) == 0
    assert "changed since then" not in capsys.readouterr().out


def test_a_run_in_bfloat16_is_warned_where_the_processor_has_none(run, monkeypatch, capsys):
    monkeypatch.setattr(utils, "computes_in_bfloat16", lambda _: False)
    assert run(1, "--precision", "bf16") == 0
    assert "this processor has no bfloat16" in capsys.readouterr().err


def test_steps_and_epochs_bound_a_run(run, capsys):
    assert run(100, "--training_epochs", 2) == 0
    assert run.names() == ["do_00000004", "g_00000004"]
    assert contents(run.folder, 4)["do"]["epoch"] == 2
    assert run(3) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run.names() == ["do_00000004", "g_00000004"]


def test_a_corpus_may_shrink(run, corpus, tmp_path):
    """The epoch ends where the smaller corpus has no more steps, for the data and the count."""
    (tmp_path / "short.txt").write_text("clip0\nclip1\n")
    run(1)
    flags = ("--input_training_file", tmp_path / "short.txt")
    run(2, *flags)
    assert [contents(run.folder, 2)["do"][key] for key in ("epoch", "epoch_step")] == [2, 0]


def test_a_damaged_checkpoint_is_named_and_skipped(run, capsys):
    run(2)
    for prefix, damage in itertools.product(("g", "do"), (b"", b"text", None)):
        file = checkpoint_path(run.folder, prefix, 2)
        whole = file.read_bytes()
        damaged = whole[:-2000] if damage is None else damage
        file.write_bytes(damaged)
        state = build_state(load_config(run.config), CPU)
        assert resume(state, run.folder)
        assert state.steps == 1
        assert f"skipped: {file}" in capsys.readouterr().out
        assert file.read_bytes() == damaged
        file.write_bytes(whole)


def test_nothing_is_lost_where_nothing_can_be_resumed(run):
    run(1)
    checkpoint_path(run.folder, "g", 1).write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint in it can be read"):
        run(2)
    checkpoint_path(run.folder, "do", 1).unlink()
    with pytest.raises(UserError, match="--warm_start"):
        run(2)
    assert run.names() == ["g_00000001"]


def test_a_checkpoint_of_another_model_is_an_error(run):
    run(1)
    (run.folder / "config.json").unlink()  # which would have told
    write_config(run.config, upsample_initial_channel=32)
    with pytest.raises(UserError, match=r"g_00000001: does not fit the config: .*size mismatch"):
        run(2)


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    run(2)
    calls = itertools.count(3)
    loss = train.generator_loss

    def broken(scores):
        return loss(scores) * (float("nan") if next(calls) == 4 else 1)

    monkeypatch.setattr(train, "generator_loss", broken)
    with pytest.raises(UserError, match=r"not finite at step 4; .*g_00000002"):
        run(9, "--checkpoint_interval", 6, "--stdout_interval", 5)
    assert run.names() == ["do_00000001", "do_00000002", "g_00000001", "g_00000002"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    state = build_state(toy_config(tmp_path), CPU)
    with torch.no_grad():
        state.generator.conv_pre.bias[0] = float("inf")
    with pytest.raises(UserError, match=r"not finite at step 0; .*no checkpoint yet"):
        save(state, tmp_path, keep=3)
    assert not list(tmp_path.glob("g_*"))


def test_validation_leaves_training_untouched(run, tmp_path):
    run(4, "--validation_interval", 1)
    run(4, "--validation_interval", 100, folder=tmp_path / "without")
    assert equal_but_meta(contents(run.folder, 4), contents(tmp_path / "without", 4))


def test_validation_is_the_mean_mel_error_of_whole_clips(run, corpus):
    h = load_config(run.config)
    state = build_state(h, CPU)
    clips = meldataset.MelDataset(h, corpus / "validation.txt", corpus / "wavs")

    class Shown(list):
        def clip(self, _steps, index, real, generated):
            self.append((index, real[0].shape == generated[0].shape))

    shown = Shown()
    random_state = torch.get_rng_state()
    error = validate(state, clips, shown, StopRequest())
    assert torch.equal(random_state, torch.get_rng_state())
    assert state.generator.training
    assert shown == [(0, True), (1, True)]
    errors = []
    for mel, wav in map(clips.whole, range(2)):
        wav_hat = state.generator(mel.unsqueeze(0))[0].detach()
        errors.append(float((state.mel_for_loss(wav_hat) - state.mel_for_loss(wav)).abs().mean()))
    assert error == pytest.approx(np.mean(errors), rel=1e-5)


def test_tensorboard_is_purged_back_to_the_checkpoint(run):
    intervals = ("--summary_interval", 1, "--validation_interval", 2, "--checkpoint_interval", 2)
    run(4, *intervals)
    for prefix in ("g", "do"):
        checkpoint_path(run.folder, prefix, 4).unlink()
    run(4, *intervals)
    events = EventAccumulator(str(run.folder / "logs"))
    events.Reload()
    tags = events.Tags()
    # Where lines on the terminal are rarer than entries, too, each has a speed of its own.
    speeds = [event.value for event in events.Scalars("training/steps_per_second")]
    assert len(set(speeds)) == 4 and min(speeds) > 0
    steps = [event.step for event in events.Scalars("training/gen_loss_total")]
    assert steps == [1, 2, 3, 4]
    assert {
        *("training/mel_spec_error", "training/disc_loss_total", "training/learning_rate"),
        *("training/gradient_norm_generator", "training/steps_per_second"),
        "validation/mel_spec_error",
    } <= set(tags["scalars"])
    assert {"gt/y_0", "generated/y_hat_1"} <= set(tags["audio"])
    assert {"gt/y_spec_0", "generated/y_hat_spec_1"} <= set(tags["images"])


def test_eval_metrics_are_measured_beside_training(run, capsys):
    """The second validation comes while the first is measured, and is passed over."""
    run(2, "--validation_interval", 1, "--eval_metrics")
    events = EventAccumulator(str(run.folder / "logs"))
    events.Reload()
    for tag in ("validation/mel_l1", "validation/stoi", "validation/periodicity_rmse"):
        (event,) = events.Scalars(tag)
        assert event.step == 1
        assert np.isfinite(event.value)
    assert re.search(r"Steps : 1, Validation metrics : .*mel_l1 \d", capsys.readouterr().out)
    (mel_error, _) = events.Scalars("validation/mel_spec_error")
    assert events.Scalars("validation/mel_l1")[0].value == pytest.approx(mel_error.value, rel=1e-2)


def test_metrics_are_of_whole_validations(run, monkeypatch, capsys):
    """However fast they are measured, and however slowly clips are generated."""

    class Instant(concurrent.futures.Executor):
        def submit(self, _, wav, wav_hat, h):
            future = concurrent.futures.Future()
            future.set_result({"seconds": len(wav) / h.sampling_rate})
            return future

    monkeypatch.setattr(monitor, "ProcessPoolExecutor", lambda *_, **__: Instant())
    run(3, "--validation_interval", 1, "--eval_metrics")
    shown = re.findall(r"Steps : (\d), Validation metrics : seconds (.*)", capsys.readouterr().out)
    lengths = [0.4 + 0.05 * 5, 0.4 + 0.05 * 6]  # of the corpus' validation clips
    assert [steps for steps, _ in shown] == ["1", "2", "3"]
    for _, mean in shown:
        assert float(mean) == pytest.approx(np.mean(lengths), abs=0.012)  # cut to whole frames


def test_a_killed_measurement_is_named_and_training_goes_on(tmp_path, capsys):
    metrics = BackgroundMetrics(toy_config(tmp_path))
    wav = torch.zeros(1, 22050)
    metrics.submit(1, [(wav, wav)])
    for pid in list(metrics.pool._processes):
        os.kill(pid, signal.SIGKILL)
    assert metrics.finished(patience=60) == []
    assert "Steps : 1, no metrics of 1 clips : BrokenProcessPool" in capsys.readouterr().out
    metrics.submit(2, [(wav, wav)])
    assert metrics.finished(patience=0) == []
    metrics.close()


def test_a_validation_clip_too_long_for_the_memory_ends_the_run_saved(run, monkeypatch):
    forward = Generator.forward

    def scarce(self, mel, *origin):
        if not self.training:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, mel, *origin)

    monkeypatch.setattr(Generator, "forward", scarce)
    with pytest.raises(
        UserError, match=r"/clip[56]\.wav: 1 s, out of memory in validation; cut it"
    ):
        run(9, "--validation_interval", 2)
    assert paired_steps(run.folder) == [2]


def test_the_config_of_a_run_is_the_one_it_began_with(run, monkeypatch):
    text = run.config.read_bytes()

    def edited_meanwhile(*arguments):
        write_config(run.config, fmax=4000)
        return MelDataset(*arguments)

    monkeypatch.setattr(launch, "MelDataset", edited_meanwhile)
    run(1)
    assert (run.folder / "config.json").read_bytes() == text


def test_a_damaged_checkpoint_is_not_the_last_good_one(run, monkeypatch):
    run(2)
    checkpoint_path(run.folder, "do", 2).write_bytes(b"damaged")
    monkeypatch.setattr(train, "generator_loss", lambda scores: scores[0].sum() * math.nan)
    with pytest.raises(UserError, match=r"not finite at step 2; .* is .*g_00000001$"):
        run(3, "--stdout_interval", 1)


def test_fine_tuning(run, corpus, tmp_path, capsys):
    """From the mels that meldataset.py writes, one of them with Tacotron 2's extra frame."""
    mels = tmp_path / "ft_dataset"
    run_main(
        meldataset,
        *("--config", run.config, "--input_wavs_dir", corpus / "wavs", "--output_dir", mels),
    )
    mel = np.load(mels / "clip0.npy")
    np.save(mels / "clip0.npy", np.pad(mel, ((0, 0), (0, 1)), mode="edge")[None])
    run(1)
    fine_tuning = ("--fine_tuning", "True", "--input_mels_dir", mels)
    capsys.readouterr()
    assert run(3, *fine_tuning, "--validation_interval", 1) == 0
    assert "recipe" not in capsys.readouterr().out
    np.save(mels / "clip0.npy", mel / np.log(10))
    run(4, *fine_tuning)
    assert f"{mels}/clip0.npy: values from" in capsys.readouterr().out
    np.save(mels / "clip0.npy", mel.T)
    with pytest.raises(UserError, match=r"clip0\.npy: .*looks transposed"):
        run(8, *fine_tuning)


@pytest.mark.parametrize(
    ("flag", "others"), [("--input_wavs_dir", ()), ("--input_mels_dir", ("--fine_tuning", "True"))]
)
def test_a_folder_that_is_not_there_is_said_with_its_flag(run, tmp_path, flag, others):
    with pytest.raises(UserError, match=rf"{tmp_path}/nowhere: no such folder; .*{flag}$"):
        run(1, flag, tmp_path / "nowhere", *others)
    assert not run.folder.exists()


def test_whole_paths_as_ids_need_no_folder(run, corpus, tmp_path):
    clips = sorted((corpus / "wavs").glob("*.wav"))
    (tmp_path / "list.txt").write_text("".join(f"{clip}\n" for clip in clips))
    lists = ("--input_training_file", "--input_validation_file")
    flags = (word for flag in lists for word in (flag, tmp_path / "list.txt"))
    assert run(1, "--input_wavs_dir", tmp_path / "nowhere", *flags) == 0


def test_an_mrfs_run_is_not_continued_as_a_misr(run):
    write_config(run.config, "configs/hifigan_v2.json")
    run(1)
    write_config(run.config)
    with pytest.raises(UserError, match="an MRF's, now a MISR's: expected the same model"):
        run(2)


def test_a_run_without_discriminators_saves_none(run, tmp_path, capsys):
    write_config(run.config, discriminator_train_start_steps=None)
    assert run(3, folder=tmp_path / "straight") == 0
    assert run(2) == 0
    assert "M parameters, no discriminators\n" in capsys.readouterr().out
    assert run(3) == 0
    do = contents(run.folder, 3)["do"]
    assert do["mpd"] == do["msd"] == do["optim_d"]["state"] == {}
    assert equal_but_meta(contents(run.folder, 3), contents(tmp_path / "straight", 3))
    write_config(run.config)
    assert run(4) == 0
    assert "do_00000003: of a run without discriminators; they start" in capsys.readouterr().out
    assert contents(run.folder, 4)["do"]["mpd"]


def test_a_run_may_go_on_with_other_consistency_steps(run):
    write_config(run.config, "configs/frame_v3.json", griffin_lim_steps=1)
    run(1)
    write_config(run.config, "configs/frame_v3.json", griffin_lim_steps=2)
    assert run(2) == 0
    write_config(run.config)
    with pytest.raises(UserError, match="a run with griffin_lim_steps, but now without: expected"):
        run(3)


def test_a_run_may_go_on_without_its_discriminators(run):
    run(1)
    write_config(run.config, discriminator_train_start_steps=None)
    assert run(2) == 0
    assert contents(run.folder, 2)["do"]["mpd"] == {}


@pytest.mark.parametrize("clip", ["clip3", "clip6"])
def test_a_file_that_is_no_audio_is_found_at_the_start(run, corpus, tmp_path, clip):
    """One to train on, by its header, and one to validate with."""
    shutil.copytree(corpus / "wavs", tmp_path / "wavs")
    (tmp_path / "wavs" / f"{clip}.wav").write_text("not a wav")
    with pytest.raises(UserError, match=rf"{clip}\.wav: cannot be read as audio"):
        run(1, "--input_wavs_dir", tmp_path / "wavs")
    assert not run.names()


def test_fewer_clips_than_a_batch_is_an_error(run):
    write_config(run.config, batch_size=6)
    with pytest.raises(UserError, match="5 clips, fewer than batch_size = 6"):
        run(1)
    assert not run.folder.exists()


def test_an_empty_validation_list_is_said_and_no_crash(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    run(1, "--input_validation_file", tmp_path / "empty.txt", "--validation_interval", 1)
    assert run.names() == ["do_00000001", "g_00000001"]
    printed = capsys.readouterr().out
    assert f"{tmp_path}/empty.txt: no clips, so no validation\n" in printed
    assert printed.endswith(f"1 steps are done, saved in {run.folder}\n")


def test_warm_start_takes_what_fits(run, tmp_path, capsys):
    """An MRF generator gives a MISR one its outer layers; the discriminators are taken whole."""
    other = toy_config(tmp_path, "configs/hifigan_v2.json")
    textbook = Textbook(other, power_iterations=1)
    textbook.save(tmp_path, steps=9)
    h = load_config(run.config)
    state = build_state(h, CPU)
    warm_start(state, [checkpoint_path(tmp_path, p, 9) for p in ("g", "do")])
    for ours, theirs in (
        (state.generator.conv_pre, textbook.generator.conv_pre),
        (state.generator.ups[1], textbook.generator.ups[1]),
        (
            state.discriminators.mpd.discriminators[4].convs[3],
            textbook.mpd.discriminators[4].convs[3],
        ),
    ):
        torch.testing.assert_close(ours.weight, theirs.weight.float())
    output = capsys.readouterr().out
    taken = r"g_00000009: generator: 30 of 34 layers taken, the shared blocks from its resblocks \d"
    assert re.search(taken, output)
    assert "not taken: resblocks.0.input_conv" in output
    assert "do_00000009: msd: 24 of 24 layers taken\n" in output
    assert state.steps == 0


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (None, 0, "do_00000001: msd: nothing taken, for the file has no discriminators\n"),
        (0, None, "do_00000001: msd: nothing taken, for the config has no discriminators\n"),
    ],
)
def test_warm_start_goes_on_where_there_are_no_discriminators(run, capsys, theirs, ours, said):
    write_config(run.config, discriminator_train_start_steps=theirs)
    run(1)
    write_config(run.config, discriminator_train_start_steps=ours)
    state = build_state(load_config(run.config), CPU)
    warm_start(state, [checkpoint_path(run.folder, p, 1) for p in ("g", "do")])
    output = capsys.readouterr().out
    assert re.search(r"g_00000001: generator: (\d+) of \1 layers taken", output)
    assert output.endswith(said)


def test_an_mrf_of_more_stages_gives_the_blocks_of_the_first(tmp_path, capsys):
    """HiFi-GAN's V1 has four stages, an iSTFT head two after the same first layers."""
    torch.manual_seed(0)
    theirs = Generator(toy_config(tmp_path, "configs/hifigan_v1.json"))
    path = tmp_path / "g_00000001"
    save_checkpoint(path, {"generator": to_hifigan_names(theirs)})
    state = build_state(toy_config(tmp_path, "configs/istft_v2.json"), CPU)
    warm_start(state, [path])
    output = capsys.readouterr().out
    assert re.search(r"the shared blocks from its resblocks 2, 5;", output)
    ours = state.generator.resblocks[1].resblock.convs1[0].weight
    torch.testing.assert_close(ours, theirs.resblocks[5].convs1[0].weight)


def test_warm_start_is_for_new_runs_only(run, capsys):
    run(1)
    run(2, "--warm_start", checkpoint_path(run.folder, "g", 1))
    assert "--warm_start not used" in capsys.readouterr().out
    assert contents(run.folder, 2)["do"]["steps"] == 2
