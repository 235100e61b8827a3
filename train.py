"""Trains a vocoder: the generator of the config, against HiFi-GAN's discriminators if it has any.

    python train.py --config config_v1.json                     # every GPU here, or the CPU
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT \\
        train.py --config config_v1.json                        # several machines

One update is one discriminator step, where there are discriminators, and one generator step, as in
HiFi-GAN (section 2.4). `steps` counts completed updates everywhere.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from checkpoint import State, average_gradients, build_state
from env import Config
from harmonic import PhaseState
from launch import add_arguments, launch_or_train
from loop import Losses, Update
from losses import discriminator_loss, feature_loss, generator_loss
from muon import RATE, Muon
from pitch import Voice
from utils import command_line, command_parser

LAMBDA_VOICE = 100.0  # beside a lambda_mel of 45


def training_step(state: State, mel: torch.Tensor, wav: torch.Tensor) -> Losses:
    """One update of the discriminators, then one of the generator.

    Before the config's `discriminator_train_start_steps`, or where that is null, the generator learns without
    discriminators, and these stay as they are.

    Args:
        mel: [B, num_mels, T].
        wav: [B, 1, T * hop_size], from which the mel was taken.
    """
    h = state.h
    adversarial = h.uses_discriminators and state.steps >= h.discriminator_train_start_steps
    if h.is_frame_rate:  # two draws of each, for an energy distance
        mel = mel.repeat(2, 1, 1)
    with state.autocast():
        wav_hat, voice = state.ddp_generator(mel, PhaseState())
    losses = discriminator_step(state, wav, wav_hat[: len(wav)]) if adversarial else {}
    return losses | generator_step(state, wav, wav_hat, voice, adversarial)


def discriminator_step(state: State, wav: torch.Tensor, wav_hat: torch.Tensor) -> Losses:
    """Updates the discriminators; wav and wav_hat [B, 1, N] go through them as one batch."""
    with state.autocast():
        scores, _ = state.ddp_discriminators(torch.cat([wav, wav_hat.detach()]))
    real_scores, fake_scores = zip(*(score.chunk(2) for score in scores), strict=True)
    loss = discriminator_loss(real_scores, fake_scores)
    state.optim_d.zero_grad()
    loss.backward()
    state.optim_d.step()
    return {"disc_loss_total": loss.detach()}


def generator_step(
    state: State,
    wav: torch.Tensor,
    wav_hat: torch.Tensor,
    voice: Voice | None = None,
    adversarial: bool = True,
) -> Losses:
    """Updates the generator, from which wav_hat [B, 1, N] came.

    Where it heard a voice, wav_hat and the voice are two draws of each, [2 * B, ...].
    """
    h, B = state.h, len(wav)
    if voice is None:
        mel = state.mel_loss(wav_hat.squeeze(1), wav.squeeze(1))
        loss, losses = h.lambda_mel * mel, {state.mel_loss.name: mel}
    else:
        draws, wav_hat = wav_hat.view(2, B, -1), wav_hat[:B]
        mel = state.mel_loss.energy_distance(draws, wav.squeeze(1))
        heard = state.voice_loss(Voice(*(x[:B] for x in voice)), wav.squeeze(1))
        loss = h.lambda_mel * mel + LAMBDA_VOICE * heard
        losses = {"gen_loss_energy": mel, "gen_loss_voice": heard}
    if adversarial:
        deceit, feature = adversarial_losses(state, wav, wav_hat)
        loss = loss + deceit + h.lambda_feature * feature
        losses |= {"gen_loss_adversarial": deceit, "gen_loss_feature": feature}
    state.optim_g.zero_grad()
    loss.backward()
    state.optim_g.step()
    losses["gen_loss_total"] = loss
    return {name: value.detach() for name, value in losses.items()}


def adversarial_losses(
    state: State, wav: torch.Tensor, wav_hat: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(adversarial, feature) losses of wav_hat [B, 1, N], by discriminators that stand still."""
    with frozen(state.discriminators), state.autocast():
        with torch.no_grad():
            _, real_features = state.discriminators(wav)
        fake_scores, fake_features = state.discriminators(wav_hat)
    return generator_loss(fake_scores), feature_loss(real_features, fake_features)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients flow through `module` but not into it, and its spectral norm does not iterate.

    Normalised weights are computed once for all calls inside.
    """
    module.eval().requires_grad_(False)
    try:
        with parametrize.cached():
            yield
    finally:
        module.train().requires_grad_(True)


def prepare(
    a: argparse.Namespace, h: Config, device: torch.device
) -> tuple[State, Callable[[], Update]]:
    """A fresh state, and what gives the update once that stands where the run begins."""
    state = build_state(h, device, a.precision)

    def start() -> Update:
        if a.compile:
            state.generator.compile()
            state.discriminators.compile()
        average_gradients(state)
        return update

    return state, start


def update(state: State, mel: torch.Tensor, wav: torch.Tensor) -> Losses:
    """What train.py does with a batch: a training step at the epoch's learning rate."""
    set_learning_rate(state)
    return training_step(state, mel, wav)


def set_learning_rate(state: State) -> None:
    """HiFi-GAN's exponential decay from epoch to epoch, in closed form."""
    lr = state.h.learning_rate * state.h.lr_decay**state.epoch
    for optimizer in (state.optim_g, state.optim_d):
        for group in optimizer.param_groups:
            group["lr"] = RATE * lr if isinstance(optimizer, Muon) else lr


def main() -> int:
    """Trains a vocoder."""
    parser = command_parser(
        "Trains a vocoder. Run it again to resume; Ctrl-C saves and stops.",
        example="python train.py --config config_v2.json --input_wavs_dir my_voice/wavs \\\n"
        "    --input_training_file my_voice/training.txt \\\n"
        "    --input_validation_file my_voice/validation.txt --checkpoint_path cp_my_voice",
    )
    add_arguments(parser)
    return launch_or_train(parser.parse_args(), prepare)


if __name__ == "__main__":
    command_line(main)
