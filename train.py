"""Trains a vocoder: the generator of a config, with HiFi-GAN's discriminators unless it has none.

    python train.py --config config_v1.json                     # on every GPU, or on the CPU
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT \\
        train.py --config config_v1.json                        # on several machines

This file contains the whole training, in reading order: flags, data, update, loop, validation,
main. One update is a discriminator step and a generator step, as in HiFi-GAN (section 2.4). `steps`
counts completed updates. distill.py runs the same loop with another update.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from checkpoint import (
    NEVER,
    State,
    build_state,
    check_losses,
    locked,
    resume_or_start,
    run_meta,
    save,
)
from distributed import (
    Stopped,
    StopRequest,
    check_environment,
    count_processes,
    joined_processes,
    launch,
    raise_on_all_ranks,
    rank,
    select_device,
    sum_over_processes,
    world_size,
)
from env import Config, UsageError, UserError, load_config
from loader import next_batch, training_batches
from losses import LOSSES, Loss, discriminator_loss, feature_loss, generator_loss, weighted_sum
from meldataset import MelDataset, check_pairs
from monitor import Monitor, describe
from muon import MUON_LR_SCALE, Muon
from utils import (
    boolean,
    command_line,
    command_parser,
    is_out_of_memory,
    positive,
    say,
    say_if_slow,
)

SHOWN_CLIPS = 5  # validation clips that are written to TensorBoard, as in HiFi-GAN

Losses = dict[str, torch.Tensor]  # scalars by name, on the device
Update = Callable[[State, torch.Tensor, torch.Tensor], Losses]  # (state, mel, wav) -> losses


# ------------------------------------------------------------------------------------------ flags


class Schedule(NamedTuple):
    """The flags of the loop; intervals are in updates."""

    training_epochs: int
    training_steps: int | None
    stdout_interval: int
    summary_interval: int
    checkpoint_interval: int
    validation_interval: int
    keep_checkpoints: int

    def last_step(self, state: State, steps_per_epoch: int) -> int:
        """Returns the last step, by the limit of epochs or of steps, whichever comes first."""
        remaining = (self.training_epochs - state.epoch) * steps_per_epoch - state.epoch_step
        return min(state.steps + remaining, self.training_steps or NEVER)


def schedule_of(a: argparse.Namespace) -> Schedule:
    """Returns the schedule that the flags describe."""
    return Schedule(*(getattr(a, name) for name in Schedule._fields))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of train.py and distill.py; HiFi-GAN's keep their names and defaults."""
    corpus, file, folder = "LJSpeech-1.1", {"metavar": "FILE"}, {"metavar": "DIR"}
    add = parser.add_argument_group("data").add_argument
    add("--input_wavs_dir", default=f"{corpus}/wavs", help="audio in any format and rate", **folder)
    help_ = "<id>.npy [num_mels, T] for --fine_tuning"
    add("--input_mels_dir", default="ft_dataset", help=help_, **folder)
    help_ = "one clip per line: id|..."
    add("--input_training_file", default=f"{corpus}/training.txt", help=help_, **file)
    add("--input_validation_file", default=f"{corpus}/validation.txt", help=help_, **file)
    help_ = "train on an acoustic model's mels from --input_mels_dir"
    add("--fine_tuning", type=boolean, default=False, metavar="True|False", help=help_)

    add = parser.add_argument_group("model").add_argument
    add("--config", required=True, help="JSON config in HiFi-GAN's format", **file)
    add("--checkpoint_path", default="cp_misrnet", help="to resume from and to save to", **folder)
    help_ = "g_* and do_* files of HiFi-GAN's family; a new run starts from their matching weights"
    add("--warm_start", nargs="+", type=Path, default=[], metavar="PATH", help=help_)

    add = parser.add_argument_group("schedule").add_argument
    count = {"type": positive, "metavar": "N"}
    add("--training_epochs", default=3100, help="stop after this many epochs", **count)
    help_ = "stop after this many updates in all, if that is earlier"
    add("--training_steps", help=help_, **count)
    for name, default, what in (
        ("stdout", 5, "lines on the terminal"),
        ("checkpoint", 5000, "pairs of g_* and do_*"),
        ("summary", 100, "entries in TensorBoard"),
        ("validation", 1000, "validations"),
    ):
        add(f"--{name}_interval", default=default, help=f"updates between {what}", **count)
    help_ = "keep the newest N do_* files; every g_* is kept"
    add("--keep_checkpoints", default=3, help=help_, **count)
    help_ = (
        f"at each validation also compute PESQ, STOI and evaluate.py's other metrics, for the "
        f"first {SHOWN_CLIPS} clips, in the background"
    )
    add("--eval_metrics", action="store_true", help=help_)

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    help_ = "precision of the convolutions"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=help_)
    add("--compile", action="store_true", help="compile the models with torch.compile")


def read_config(path: str, processes: int, say: Callable[[str], object] | None = None) -> Config:
    """Returns the config of a run of `processes` processes; see `load_config`.

    Raises:
        UsageError: the config cannot be used, or its batch cannot be divided.
    """
    h = load_config(path, say)
    if h.batch_size % processes:
        raise UsageError(
            f"{path}: batch_size = {h.batch_size}: expected a multiple of {processes}, the "
            "number of processes"
        )
    check_environment(h.num_workers)
    return h


# ------------------------------------------------------------------------------------------- data


def read_data(a: argparse.Namespace, h: Config) -> tuple[MelDataset, MelDataset]:
    """Returns the training and the validation clips that the flags name.

    Raises:
        UserError: a list or a validation clip cannot be used, or there are too few clips.
    """
    mels_dir = a.input_mels_dir if a.fine_tuning else None
    if a.fine_tuning and not os.path.isdir(mels_dir):
        raise UserError(
            f"{mels_dir}: no such folder; expected an acoustic model's mels: pass --input_mels_dir"
        )
    clips, validation = (
        MelDataset(h, file_list, a.input_wavs_dir, mels_dir)
        for file_list in (a.input_training_file, a.input_validation_file)
    )
    if len(clips) < h.batch_size:
        raise UserError(
            f"{a.input_training_file}: {len(clips)} clips, fewer than batch_size = {h.batch_size} "
            f"of {a.config}; lower it or add clips"
        )
    for index in own_share(validation):  # an unusable clip ends the run now instead of hours later
        validation.whole(index)
    if not len(validation):
        say(f"{a.input_validation_file}: no clips, so no validation")
    if a.fine_tuning and rank() == 0:
        check_pairs(clips)
    return clips, validation


# ----------------------------------------------------------------------------------------- update


def update(state: State, mel: torch.Tensor, wav: torch.Tensor) -> Losses:
    """Sets the learning rate of the epoch and runs a training step: the update of train.py."""
    set_learning_rate(state)
    return training_step(state, mel, wav)


def set_learning_rate(state: State) -> None:
    """Applies HiFi-GAN's exponential decay per epoch, in closed form."""
    lr = state.h.learning_rate * state.h.lr_decay**state.epoch
    for optimizer in (state.optim_g, state.optim_d):
        for group in optimizer.param_groups:
            group["lr"] = MUON_LR_SCALE * lr if isinstance(optimizer, Muon) else lr


def training_step(state: State, mel: torch.Tensor, wav: torch.Tensor) -> Losses:
    """Updates the discriminators, then the generator; returns the losses by name.

    Before `discriminator_train_start_steps` updates, or if that is null, the discriminators are
    neither used nor updated.

    Args:
        mel: [B, num_mels, T].
        wav: [B, 1, T * hop_size], the waveform of the mel.
    """
    h = state.h
    generate = generate_frame_rate if h.is_frame_rate else generate_and_compare
    wav_hat, g_losses = generate(state, mel, wav)
    d_losses = {}
    if h.uses_discriminators and state.steps >= h.discriminator_train_start_steps:
        d_losses = discriminator_step(state, wav, wav_hat)
        g_losses |= adversarial_losses(state, wav, wav_hat)
    return d_losses | generator_step(state, g_losses)


def generate_and_compare(
    state: State, mel: torch.Tensor, wav: torch.Tensor
) -> tuple[torch.Tensor, Losses]:
    """Returns wav_hat [B, 1, N] and its mel loss."""
    with state.autocast():
        wav_hat = state.ddp_generator(mel)
    return wav_hat, {state.mel_loss.name: state.mel_loss(wav_hat.squeeze(1), wav.squeeze(1))}


def generate_frame_rate(
    state: State, mel: torch.Tensor, wav: torch.Tensor
) -> tuple[torch.Tensor, Losses]:
    """Returns wav_hat [B, 1, N], its energy distance, its F0 loss and its aperiodicity loss.

    The energy distance needs two samples of each mel, which differ by their random phases.
    """
    B, target = len(mel), wav.squeeze(1)
    with state.autocast():
        samples, log_f0, aperiodicity = state.ddp_generator(mel.repeat(2, 1, 1))
    f0_loss, aperiodicity_loss = state.source_loss(log_f0[:B], aperiodicity[:B], target)
    return samples[:B], {
        "gen_loss_energy": state.mel_loss.energy_distance(samples.view(2, B, -1), target),
        "gen_loss_f0": f0_loss,
        "gen_loss_aperiodicity": aperiodicity_loss,
    }


def discriminator_step(state: State, wav: torch.Tensor, wav_hat: torch.Tensor) -> Losses:
    """Updates the discriminators; wav and wav_hat [B, 1, N] pass through them as one batch."""
    with state.autocast():
        scores, _ = state.ddp_discriminators(torch.cat([wav, wav_hat.detach()]))
    real_scores, fake_scores = zip(*(score.chunk(2) for score in scores), strict=True)
    loss = discriminator_loss(real_scores, fake_scores)
    state.optim_d.zero_grad()
    loss.backward()
    state.optim_d.step()
    return {"disc_loss_total": loss.detach()}


def adversarial_losses(state: State, wav: torch.Tensor, wav_hat: torch.Tensor) -> Losses:
    """Returns the adversarial and the feature loss of wav_hat [B, 1, N]."""
    with frozen(state.discriminators), state.autocast():
        with torch.no_grad():
            _, real_features = state.discriminators(wav)
        fake_scores, fake_features = state.discriminators(wav_hat)
    return {
        "gen_loss_adversarial": generator_loss(fake_scores),
        "gen_loss_feature": feature_loss(real_features, fake_features),
    }


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Lets gradients flow through `module`, and computes none for its parameters.

    Spectral norm runs no power iteration. Normalised weights are computed once for all calls in the
    block.
    """
    module.eval().requires_grad_(False)
    try:
        with parametrize.cached():
            yield
    finally:
        module.train().requires_grad_(True)


def generator_step(state: State, losses: Losses) -> Losses:
    """Updates the generator on the weighted sum of its losses; returns them and the sum."""
    loss = weighted_sum(losses, state.h)
    state.optim_g.zero_grad()
    loss.backward()
    state.optim_g.step()
    return {name: each.detach() for name, each in (losses | {"gen_loss_total": loss}).items()}


# --------------------------------------------------------------------------------------- the loop


def run(
    state: State,
    clips: MelDataset,
    validation: MelDataset,
    update: Update,
    *,
    schedule: Schedule,
    folder: Path,
    eval_metrics: bool,
    losses: tuple[Loss, ...] = LOSSES,
) -> int:
    """Trains until the last step, a signal or an error, then saves; returns the exit status.

    `update` maps (state, mel, wav) to named losses. `losses` declares those that are printed.
    """
    every, steps_per_epoch = schedule, len(clips) // state.h.batch_size
    state.end_epoch(steps_per_epoch)  # the corpus may have become smaller
    last_step = schedule.last_step(state, steps_per_epoch)
    if state.steps >= last_step:
        done = f"{state.steps} steps and {state.epoch} epochs are done"
        say(f"nothing to do: {done}; raise --training_steps or --training_epochs")
        return 0
    stop, reason = StopRequest(), None
    with raise_on_all_ranks():
        batches = training_batches(
            clips,
            epoch=state.epoch,
            epoch_step=state.epoch_step,
            pin_memory=state.device.type == "cuda",
        )
    monitor = Monitor(state, folder, losses=losses, last_step=last_step, eval_metrics=eval_metrics)
    with contextlib.closing(monitor):
        try:
            while state.steps < last_step:
                mel, wav = (x.to(state.device) for x in next_batch(batches, stop, monitor.error))

                found = update(state, mel, wav)  # the discriminator step, the generator step
                state.count_update(found, steps_per_epoch)

                if state.steps % every.stdout_interval == 0:
                    check_losses(state, folder)
                    monitor.progress(state, found)
                if state.steps % every.summary_interval == 0:
                    monitor.summary(state, found)
                if state.steps % every.checkpoint_interval == 0:
                    monitor.flush()
                    save(state, folder, every.keep_checkpoints)
                if state.steps % every.validation_interval == 0 and len(validation):
                    monitor.validation(state, validate(state, validation, monitor, stop))
        except (UserError, Stopped) as ending:  # in every process at the same step
            reason = ending
        if state.steps > state.saved_steps:
            save(state, folder, every.keep_checkpoints)
        if reason is None:
            monitor.finish()
    return finish(state, folder, reason)


def finish(state: State, folder: Path, reason: UserError | Stopped | None) -> int:
    """Prints why the run ends and returns the exit status; raises `reason` if it is an error."""
    if reason is None:
        say(f"{state.steps} steps are done, saved in {folder}")
        return 0
    for process in multiprocessing.active_children():  # data workers may wait for a slow disk
        process.terminate()
    if isinstance(reason, UserError):
        raise reason
    name = signal.Signals(reason.status - 128).name
    say(f"stopped by {name} after step {state.steps}, saved in {folder}")
    return reason.status


# ------------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(state: State, clips: MelDataset, monitor: Monitor, stop: StopRequest) -> float:
    """Returns the mean mel error of whole clips, which are divided among the processes.

    Raises:
        Stopped: a process received a signal.
        UserError: a clip is unusable; in every process.
    """
    state.generator.eval()
    error_sum = torch.zeros((), device=state.device)
    # cuDNN would search for its fastest algorithms again for each length.
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    with raise_on_all_ranks(), parametrize.cached():
        for index in own_share(clips):
            if stop.status:
                break
            wav, wav_hat = vocode_clip(state, clips, index)
            mel, mel_hat = state.mel_for_loss(wav)[0], state.mel_for_loss(wav_hat)[0]
            error_sum += F.l1_loss(mel_hat, mel)
            if index < SHOWN_CLIPS:
                monitor.clip(state.steps, index, real=(wav, mel), generated=(wav_hat, mel_hat))
    torch.backends.cudnn.benchmark = benchmark
    state.generator.train()
    stop.agree()
    return float(sum_over_processes(error_sum)) / len(clips)


def own_share(clips: MelDataset) -> list[int]:
    """Returns the validation clips of this process; rank 0 has the first SHOWN_CLIPS."""
    owners = (0 if i < SHOWN_CLIPS else i % world_size() for i in range(len(clips)))
    return [i for i, owner in enumerate(owners) if owner == rank()]


def vocode_clip(state: State, clips: MelDataset, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a whole clip and the generator's output for its mel, both [1, N].

    Raises:
        UserError: the clip is unusable, or too long for the memory.
    """
    mel, wav = (x.to(state.device) for x in clips.whole(index))
    try:
        with state.autocast():
            return wav, state.generator(mel.unsqueeze(0))[0]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        clip, seconds = clips.path(index), wav.shape[1] / state.h.sampling_rate
        raise UserError(
            f"{clip}: {seconds:.0f} s, out of memory in validation; shorten it or remove it from "
            "the list"
        ) from None


# ------------------------------------------------------------------------------------------- main


def main() -> int:
    """Parses the flags, builds or resumes the state, and trains; returns the exit status."""
    parser = command_parser(
        "Trains a vocoder. Run it again to resume. Ctrl-C saves and stops.",
        example="python train.py --config config_v2.json --input_wavs_dir my_voice/wavs \\\n"
        "    --input_training_file my_voice/training.txt \\\n"
        "    --input_validation_file my_voice/validation.txt --checkpoint_path cp_my_voice",
    )
    add_arguments(parser)
    a = parser.parse_args()
    folder, processes = Path(a.checkpoint_path), count_processes(a.device)
    if processes > world_size():
        read_config(a.config, processes)  # an error is printed once, before processes start
        return launch(processes)
    device, h = select_device(a.device), read_config(a.config, processes, say)
    say_if_slow(a.precision, device)
    with joined_processes(device):
        with raise_on_all_ranks():
            state = build_state(h, device, a.precision)
            state.meta = run_meta(Path(a.config).read_bytes())
            clips, validation = read_data(a, h)
        with locked(folder):
            resume_or_start(
                state, folder, warm_start_files=a.warm_start, is_fine_tuning=a.fine_tuning
            )
            with raise_on_all_ranks():
                describe(state, clips, a.config, folder)
            if a.compile:
                state.compile()
            state.average_gradients()
            return run(
                *(state, clips, validation, update),
                schedule=schedule_of(a),
                folder=folder,
                eval_metrics=a.eval_metrics,
            )


if __name__ == "__main__":
    command_line(main)
