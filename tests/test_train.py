"""The update of train.py against the textbook, and the declarations of losses."""

import contextlib
import itertools
from dataclasses import fields

import pytest
import torch
from torch import nn

import train
from checkpoint import CHANGEABLE_KEYS, State, build_state, checkpoint_path, resume
from env import Config
from losses import LOSSES, weighted_sum
from meldataset import LogMelSpectrogram
from tools import hifigan_reference as textbook
from tools.toy import ROOT, speech_like, toy_config
from weights import load_weights

CPU = torch.device("cpu")


class Textbook:
    """HiFi-GAN's models and optimizers at toy size, in float64, with old-style norms."""

    def __init__(self, h: Config, power_iterations: int):
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

    def step(self, mel: torch.Tensor, wav: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return textbook.textbook_step(
            *(self.generator, self.mpd, self.msd, self.optim_g, self.optim_d),
            *(self.log_mel, mel, wav),
        )

    def save(self, folder, steps: int) -> None:
        """Saves as jik876/hifi-gan with torch 1.4: old archives and optimizer states."""
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


def old_optimizer_state(optimizer: torch.optim.Optimizer) -> dict:
    """Parameters named by addresses, `step` a plain integer, few settings in the group."""
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
    """Sets the number of power iterations of every spectral norm, old or new."""
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


def batch(h: Config, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    frames = h.segment_size // h.hop_size
    mel = torch.randn(h.batch_size, h.num_mels, frames, dtype=dtype)
    return mel, 0.1 * torch.randn(h.batch_size, 1, h.segment_size, dtype=dtype)


def assert_same(ours, textbook) -> None:
    """Lists of tensors are equal to the rounding of sums of terms as large as the largest."""
    for a, b in zip(ours, textbook, strict=True):
        atol = max(1e-11, 1e-13 * float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


def assert_same_weights(state: State, textbook: Textbook) -> None:
    assert_same(state.generator.parameters(), textbook.generator.parameters())
    discriminators = itertools.chain(textbook.msd.parameters(), textbook.mpd.parameters())
    assert_same(state.discriminators.parameters(), discriminators)


def gradients_at_each_update(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """A list to which each step of `optimizer` adds its gradients."""
    seen = []

    def note(optimizer, *_):
        seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    optimizer.register_step_pre_hook(note)
    return seen


@pytest.fixture
def mrf_config(tmp_path) -> Config:
    return toy_config(tmp_path, "configs/hifigan_v2.json", discriminator_channel_mult=0.02)


def test_an_update_equals_the_textbook(mrf_config):
    """Losses, gradients and weights are equal without power iterations on both sides."""
    textbook = Textbook(mrf_config, power_iterations=0)
    state = state_of(textbook, power_iterations=0)
    optimizers = (textbook.optim_d, state.optim_d, textbook.optim_g, state.optim_g)
    expected_d, gradients_d, expected_g, gradients_g = map(gradients_at_each_update, optimizers)
    mel, wav = batch(mrf_config, torch.float64)
    for step in range(2):
        loss_d, loss_g = textbook.step(mel, wav)
        losses = train.training_step(state, mel, wav)
        assert float(losses["disc_loss_total"]) == pytest.approx(float(loss_d), rel=1e-9)
        assert float(losses["gen_loss_total"]) == pytest.approx(float(loss_g), rel=1e-9)
        assert_same(gradients_d[step], expected_d[step])
        assert_same(gradients_g[step], expected_g[step])
    assert_same_weights(state, textbook)


def test_an_update_with_one_power_iteration_stays_close_to_the_textbook(mrf_config):
    """One iteration per step against the original's four: losses differ by less than 1%."""
    textbook = Textbook(mrf_config, power_iterations=1)
    state = state_of(textbook, power_iterations=1)
    mel, wav = batch(mrf_config, torch.float64)
    for _ in range(3):
        loss_d, loss_g = textbook.step(mel, wav)
        losses = train.training_step(state, mel, wav)
        assert float(losses["disc_loss_total"]) == pytest.approx(float(loss_d), rel=0.01)
        assert float(losses["gen_loss_total"]) == pytest.approx(float(loss_g), rel=0.01)


def test_a_folder_of_hifigan_resumes(mrf_config, tmp_path):
    """The next update after resuming HiFi-GAN's files equals the textbook's.

    HiFi-GAN saves before it counts: its do_00000007 is of the 8th update.
    """
    textbook = Textbook(mrf_config, power_iterations=0)
    mel, wav = batch(mrf_config, torch.float64)
    textbook.step(mel, wav)
    textbook.save(tmp_path, steps=7)
    state = state_of(Textbook(mrf_config, power_iterations=0), power_iterations=0)
    assert resume(state, tmp_path)
    assert (state.steps, state.epoch, state.epoch_step) == (8, 0, 0)
    textbook.step(mel, wav)
    train.training_step(state, mel, wav)
    assert_same_weights(state, textbook)


def test_before_discriminator_train_start_steps_the_mel_loss_trains_the_generator(tmp_path):
    h = toy_config(tmp_path, "configs/hifigan_v2.json", discriminator_train_start_steps=1)
    state = build_state(h, CPU)
    mel, wav = batch(h)
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
    mel, wav = batch(h)
    wav_hat = state.generator(mel)
    weight = conv.parametrizations.weight.original.detach().flatten(1)
    expected = nn.functional.normalize(weight @ conv.parametrizations.weight[0]._v, dim=0)
    train.discriminator_step(state, wav, wav_hat)
    after = conv.parametrizations.weight[0]._u.clone()
    torch.testing.assert_close(after, expected)  # one iteration
    gradients = [p.grad.clone() for p in state.discriminators.parameters()]
    train.generator_step(state, train.adversarial_losses(state, wav, wav_hat))
    assert torch.equal(conv.parametrizations.weight[0]._u, after)
    for parameter, gradient in zip(state.discriminators.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.requires_grad


def test_bf16_affects_the_convolutions_only(tmp_path):
    """Losses, weights and moments stay in float32, and the losses stay near float32's."""
    h = toy_config(tmp_path)
    mel, wav = batch(h)
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
        # Rounding is larger in the log-mel of an untrained generator, which is quiet.
        tolerance = 0.02 if name in ("disc_loss_total", "gen_loss_feature") else 0.2
        assert float(loss) == pytest.approx(float(results[0][name]), rel=tolerance)
    for moments in state.optim_d.state.values():
        assert moments["exp_avg"].dtype == torch.float32


def test_compiled_models_make_the_same_losses(tmp_path):
    """One model of each kind, traced as by torch.compile without its slow code generator."""
    h = toy_config(tmp_path)
    mel, wav = batch(h)
    eager, compiled = build_state(h, CPU), build_state(h, CPU)
    msd, mpd = compiled.discriminators.msd, compiled.discriminators.mpd
    for module in (compiled.generator, msd.discriminators[0], mpd.discriminators[0]):
        module.compile(backend="eager")
    expected = train.training_step(eager, mel, wav)
    for name, loss in train.training_step(compiled, mel, wav).items():
        assert float(loss) == pytest.approx(float(expected[name]), rel=1e-5)


@pytest.mark.parametrize("config", ["config_v2.json", "configs/frame_v3.json"])
def test_compile_reaches_the_modules_that_training_calls(tmp_path, monkeypatch, config):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    state = build_state(toy_config(tmp_path, config), CPU)
    state.compile()
    assert compiled == [state.ddp_generator, state.ddp_discriminators]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("config", ["config_v2.json", "configs/istft_v2.json"])
def test_an_update_stays_on_its_device(tmp_path, monkeypatch, config, start):
    """This matters on a GPU. The meta device, which has no autocast, refuses other tensors."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    h = toy_config(tmp_path, config, discriminator_train_start_steps=start)
    meta = torch.device("meta")
    state = build_state(h, meta)
    for name in ("generator", "discriminators"):  # fused optimizers do not support this device
        parameters = getattr(state, name).parameters()
        setattr(state, f"optim_{name[0]}", torch.optim.AdamW(parameters, h.learning_rate))
    mel, wav = (x.to(meta) for x in batch(h))
    try:
        losses = train.update(state, mel, wav)
    except NotImplementedError as error:  # weight norm in PyTorch 2.7
        pytest.skip(str(error))
    state.count_update(losses, steps_per_epoch=2)
    assert all(loss.device == meta for loss in losses.values())
    assert ("disc_loss_total" in losses) == (start == 0)
    assert state.first_bad_step.device == meta


def test_one_clip_can_be_overfitted(tmp_path):
    """In 40 updates the mel error falls to half, below the distance from a similar clip."""
    h = toy_config(
        tmp_path, discriminator_train_start_steps=None, learning_rate=0.008, segment_size=4096
    )
    state = build_state(h, CPU)
    wav, similar = (
        torch.from_numpy(speech_like(0.5, seed=seed)[4096:8192])[None] for seed in (0, 1)
    )
    mel = state.mel_for_loss(wav)
    errors = [
        float(train.training_step(state, mel, wav[None])["mel_spec_error"]) for _ in range(40)
    ]
    assert errors[-1] < errors[0] / 2
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


# -------------------------------------------------------------------------- declarations of losses


def test_each_lambda_is_declared_as_a_loss_and_documented():
    """The declaration gives the weight, and lets a resumed run change it."""
    keys = {field.name for field in fields(Config) if field.name.startswith("lambda_")}
    assert keys == {loss.weight for loss in LOSSES if loss.weight}
    assert keys <= CHANGEABLE_KEYS
    documented = (ROOT / "docs/configs.md").read_text()
    assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []


@pytest.mark.parametrize("config", ["config_v2.json", "configs/frame_v3.json"])
def test_the_total_is_the_sum_of_declared_losses_with_the_weights_of_the_config(tmp_path, config):
    changes = {"lambda_mel": 3.0, "lambda_feature": 5.0, "lambda_f0": 7.0}
    h = toy_config(tmp_path, config, **changes, lambda_aperiodicity=11.0, segment_size=4096)
    losses = train.training_step(build_state(h, CPU), *batch(h))
    weights = {
        **{"mel_spec_error": 3, "gen_loss_adversarial": 1, "gen_loss_feature": 5},
        **{"gen_loss_energy": 3, "gen_loss_f0": 7, "gen_loss_aperiodicity": 11},
    }
    summed = losses.keys() - {"gen_loss_total", "disc_loss_total"}
    assert len(summed) == 3
    expected = sum(weights[name] * float(losses[name]) for name in summed)
    assert float(losses["gen_loss_total"]) == pytest.approx(expected, rel=1e-5)
    assert losses.keys() <= {loss.name for loss in LOSSES}


def test_an_undeclared_loss_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="gen_loss_wave"):
        weighted_sum({"gen_loss_wave": torch.ones(())}, toy_config(tmp_path))
