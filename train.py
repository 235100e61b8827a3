"""Trains a vocoder: the generator of the config against HiFi-GAN's discriminators.

    python train.py --config config_v1.json                     # every GPU here, or the CPU
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT \\
        train.py --config config_v1.json                        # several machines

One update is one discriminator step and one generator step, as in HiFi-GAN (section 2.4). `steps`
counts completed updates everywhere.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.run
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.nn.utils import parametrize

from checkpoint import (
    NEVER,
    State,
    build_state,
    check_losses,
    locked,
    resume,
    save,
    share_over_processes,
    warm_start,
)
from distributed import (
    init_processes,
    leave_processes,
    max_over_processes,
    rank,
    select_device,
    sum_over_processes,
    world_size,
)
from env import UsageError, UserError, load_config
from meldataset import EndlessBatches, MelDataset
from models import discriminator_loss, feature_loss, generator_loss
from monitor import Monitor, describe
from utils import (
    boolean,
    command_line,
    command_parser,
    is_out_of_memory,
    natural,
    positive,
    remove_temporary_files,
    replacing,
    say,
)

SHOWN_CLIPS = 5  # of the validation clips go to TensorBoard, as in HiFi-GAN
BAD_DATA = 1  # exit status

# ------------------------------------------------------------------------------------- one update


def training_step(
    state: State, mel: torch.Tensor, wav: torch.Tensor, adversarial: bool = True
) -> dict[str, torch.Tensor]:
    """One update of the discriminators, then one of the generator; or the generator's alone.

    Args:
        mel: [B, num_mels, T].
        wav: [B, 1, T * hop_size], from which the mel was taken.
        adversarial: without, the generator learns from the mel loss and nothing else moves.

    Returns:
        The losses by name, on the device.
    """
    with state.autocast():
        wav_hat = state.shared_generator(mel)
    losses = discriminator_step(state, wav, wav_hat) if adversarial else {}
    return losses | generator_step(state, wav, wav_hat, adversarial)


def discriminator_step(state: State, wav: torch.Tensor, wav_hat: torch.Tensor) -> dict:
    """Updates the discriminators; real and generated waveforms go through them as one batch."""
    with state.autocast():
        scores, _ = state.shared_discriminators(torch.cat([wav, wav_hat.detach()]))
    real_scores, fake_scores = zip(*(score.chunk(2) for score in scores), strict=True)
    loss = discriminator_loss(real_scores, fake_scores)
    state.optim_d.zero_grad()
    loss.backward()
    state.optim_d.step()
    return {"disc_loss_total": loss.detach()}


def generator_step(
    state: State, wav: torch.Tensor, wav_hat: torch.Tensor, adversarial: bool = True
) -> dict:
    """Updates the generator."""
    losses = adversarial_losses(state, wav, wav_hat) if adversarial else {}
    mel_loss, h = state.mel_loss, state.h
    losses[mel_loss.name] = mel_loss(wav_hat.squeeze(1), wav.squeeze(1))
    weights = {"gen_loss_feature": h.lambda_feature, mel_loss.name: h.lambda_mel}
    loss = sum(weights.get(name, 1) * value for name, value in losses.items())
    state.optim_g.zero_grad()
    loss.backward()
    state.optim_g.step()
    return {name: value.detach() for name, value in ({"gen_loss_total": loss} | losses).items()}


def adversarial_losses(state: State, wav: torch.Tensor, wav_hat: torch.Tensor) -> dict:
    """What discriminators that stand still tell the generator."""
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
    """Gradients flow through `module` but not into it, and its spectral norm does not iterate.

    Normalised weights are computed once for all calls inside.
    """
    module.eval().requires_grad_(False)
    try:
        with parametrize.cached():
            yield
    finally:
        module.train().requires_grad_(True)


def set_learning_rate(state: State) -> None:
    """HiFi-GAN's exponential decay from epoch to epoch, in closed form."""
    for optimizer in (state.optim_g, state.optim_d):
        for group in optimizer.param_groups:
            group["lr"] = state.h.learning_rate * state.h.lr_decay**state.epoch


def count_update(state: State, losses: dict[str, torch.Tensor], steps_per_epoch: int) -> None:
    """Counts a completed update and notes, on the device, whether its losses were finite."""
    state.steps += 1
    state.epoch_step += 1
    state.end_epoch(steps_per_epoch)
    finite = torch.stack(list(losses.values())).isfinite().all()
    bad_step = state.first_bad_step.clamp(max=state.steps)
    state.first_bad_step = torch.where(finite, state.first_bad_step, bad_step)


# ------------------------------------------------------------------------------------- validation


def own_share(clips: MelDataset) -> list[int]:
    """The validation clips of this process; those to be shown are of the first, which writes."""
    owners = (0 if i < SHOWN_CLIPS else i % world_size() for i in range(len(clips)))
    return [i for i, owner in enumerate(owners) if owner == rank()]


@torch.no_grad()
def validate(state: State, clips: MelDataset, monitor: Monitor) -> float:
    """The mean mel error of whole clips, which the processes share out; NaN where one is unusable.

    Such a clip becomes the monitor's error, so that the run saves and ends.
    """
    state.generator.eval()
    error_sum = torch.zeros((), device=state.device)
    # cuDNN would try its algorithms anew for the length of each clip.
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    with parametrize.cached():
        for index in own_share(clips):
            try:
                wav, wav_hat = vocode_whole(state, clips, index)
            except UserError as error:
                monitor.error, error_sum = error, error_sum + math.nan
                continue
            mel, mel_hat = state.mel_for_loss(wav)[0], state.mel_for_loss(wav_hat)[0]
            error_sum += F.l1_loss(mel_hat, mel)
            if index < SHOWN_CLIPS:
                monitor.clip(state.steps, index, real=(wav, mel), generated=(wav_hat, mel_hat))
    torch.backends.cudnn.benchmark = benchmark
    state.generator.train()
    return float(sum_over_processes(error_sum)) / len(clips)


def vocode_whole(state: State, clips: MelDataset, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole clip and what the generator makes of its mel, both [1, N].

    Raises:
        UserError: a clip that is unusable, or too long for the memory.
    """
    mel, wav = (x.to(state.device) for x in clips.whole(index))
    try:
        with state.autocast():
            return wav, state.generator(mel.unsqueeze(0))[0]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        clip, seconds = clips.wavs_dir / clips.clips[index], wav.shape[1] / state.h.sampling_rate
        raise UserError(
            f"{clip}: {seconds:.0f} s, out of memory in validation; cut it or take it off the list"
        ) from None


# --------------------------------------------------------------------------------------- the loop


class StopRequest:
    """Notes SIGINT or SIGTERM, so that the run can stop at a step's end; a second one kills.

    `status` is what the run shall exit with, 0 before a signal.
    """

    def __init__(self):
        self.status = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        self.status = 128 + number
        signal.signal(number, signal.SIG_DFL)


def make_loader(clips: MelDataset, state: State) -> torch.utils.data.DataLoader:
    """Endless batches for this process, from where `state` stands."""
    keys = EndlessBatches(
        len(clips),
        state.h,
        epoch=state.epoch,
        epoch_step=state.epoch_step,
        rank=rank(),
        world_size=world_size(),
    )
    return torch.utils.data.DataLoader(
        clips,
        batch_sampler=keys,
        num_workers=state.h.num_workers,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=state.device.type == "cuda",
    )


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and torchrun signal a whole group of processes; the parent still needs its data."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends it


def fetch(batches: Iterator) -> tuple[list[torch.Tensor], UserError | None]:
    """The next (mel, wav), or the error that a clip has caused."""
    try:
        return next(batches), None
    except UserError as error:
        return [], error


def find_last_step(a: argparse.Namespace, state: State, steps_per_epoch: int) -> int:
    """Where --training_epochs or --training_steps ends the run, whichever comes first."""
    left_in_epochs = (a.training_epochs - state.epoch) * steps_per_epoch - state.epoch_step
    return min(state.steps + left_in_epochs, a.training_steps or NEVER)


def run(a: argparse.Namespace, state: State, clips: MelDataset, validation: MelDataset) -> int:
    """Trains until the last step, a signal, an unusable clip or unwritable logs, and saves.

    Returns the exit status.
    """
    folder, steps_per_epoch = Path(a.checkpoint_path), len(clips) // state.h.batch_size
    state.end_epoch(steps_per_epoch)  # the corpus may have shrunk since
    last_step = find_last_step(a, state, steps_per_epoch)
    if state.steps >= last_step:
        done = f"{state.steps} steps and {state.epoch} epochs are done"
        say(f"nothing to do: {done}; raise --training_steps or --training_epochs")
        return 0
    request, batches = StopRequest(), iter(make_loader(clips, state))
    status, error, saved_step = 0, None, state.steps
    with contextlib.closing(Monitor(state, folder, last_step, a.eval_metrics)) as monitor:
        while state.steps < last_step:
            batch, error = fetch(batches)
            error = error or monitor.error
            status = max_over_processes(BAD_DATA if error else request.status)
            if status:
                break
            set_learning_rate(state)
            mel, wav = (x.to(state.device, non_blocking=True) for x in batch)
            losses = training_step(state, mel, wav, state.steps >= a.adversarial_from)
            count_update(state, losses, steps_per_epoch)
            if state.steps % a.stdout_interval == 0:
                check_losses(state, folder)
                monitor.progress(state, losses)
            if state.steps % a.summary_interval == 0:
                monitor.summary(state, losses)
            if state.steps % a.checkpoint_interval == 0:
                monitor.flush()
                save(state, folder, keep=a.keep_checkpoints)
                saved_step = state.steps
            if state.steps % a.validation_interval == 0 and len(validation):
                monitor.validation(state, validate(state, validation, monitor))
        if state.steps > saved_step:
            save(state, folder, keep=a.keep_checkpoints)
        if not status:
            monitor.finish()
    if error or monitor.error:
        leave_processes()  # all are here, whichever has the error
        raise error or monitor.error
    if status > BAD_DATA:
        name = signal.Signals(status - 128).name
        say(f"stopped by {name} after step {state.steps}, saved in {folder}")
    return status


# ------------------------------------------------------------------------------- the command line


def parse_arguments() -> argparse.Namespace:
    """The command line; HiFi-GAN's flags keep their names and defaults."""
    parser = command_parser(
        "Trains a vocoder. Run it again to resume; Ctrl-C saves and stops.",
        example="python train.py --config config_v2.json --input_wavs_dir my_voice/wavs \\\n"
        "    --input_training_file my_voice/training.txt \\\n"
        "    --input_validation_file my_voice/validation.txt --checkpoint_path cp_my_voice",
    )
    data = parser.add_argument_group("data")
    for flag, metavar, default, meaning in (
        ("input_wavs_dir", "DIR", "LJSpeech-1.1/wavs", "audio in any format and at any rate"),
        ("input_mels_dir", "DIR", "ft_dataset", "<id>.npy [num_mels, T], for --fine_tuning"),
        ("input_training_file", "FILE", "LJSpeech-1.1/training.txt", "a line a clip: id|..."),
        ("input_validation_file", "FILE", "LJSpeech-1.1/validation.txt", "the same"),
    ):
        data.add_argument(f"--{flag}", metavar=metavar, default=default, help=meaning)
    data.add_argument(
        "--fine_tuning",
        type=boolean,
        default=False,
        metavar="True|False",
        help="learn from an acoustic model's mels in --input_mels_dir",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--config", metavar="FILE", required=True, help="JSON config, HiFi-GAN's format"
    )
    model.add_argument(
        "--checkpoint_path",
        metavar="DIR",
        default="cp_misrnet",
        help="to resume from and to save to",
    )
    model.add_argument(
        "--warm_start",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="g_* and do_* files, ours or HiFi-GAN's, whose matching weights a new run begins with",
    )
    length = parser.add_argument_group("length and cadence")
    for flag, default, meaning in (
        ("training_epochs", 3100, "stop after so many epochs"),
        ("training_steps", None, "stop after so many updates in all, if that comes first"),
        ("stdout_interval", 5, "updates from one line on the terminal to the next"),
        ("checkpoint_interval", 5000, "updates from one pair of g_* and do_* to the next"),
        ("summary_interval", 100, "updates from one entry in TensorBoard to the next"),
        ("validation_interval", 1000, "updates from one validation to the next"),
        ("keep_checkpoints", 3, "of do_* the newest N stay; every g_* stays"),
    ):
        length.add_argument(f"--{flag}", type=positive, default=default, metavar="N", help=meaning)
    length.add_argument(
        "--adversarial_from",
        type=natural,
        default=0,
        metavar="N",
        help="the first N updates train the generator alone, on the mel loss: a cheap start on "
        "small machines",
    )
    length.add_argument(
        "--eval_metrics",
        action="store_true",
        help=f"at each validation also PESQ, STOI and what else evaluate.py measures, of the first "
        f"{SHOWN_CLIPS} clips, in the background",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    machine.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the convolutions"
    )
    machine.add_argument("--compile", action="store_true", help="torch.compile the models")
    return parser.parse_args()


def gpus_to_launch(device: str) -> int:
    """How many processes of its own this run shall start, one for each GPU; 0 for none."""
    gpus = torch.cuda.device_count()
    return gpus if device in ("auto", "cuda") and gpus > 1 and "RANK" not in os.environ else 0


def launch(processes: int) -> int:
    """Runs this command under torchrun, as `processes` processes; returns the exit status."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds, to save in
    options = ["--standalone", f"--nproc_per_node={processes}"]
    try:
        torch.distributed.run.main([*options, *sys.argv])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def main() -> int:
    """Trains as the command line says."""
    a = parse_arguments()
    h, config = load_config(a.config), Path(a.config).read_bytes()
    device = select_device(a.device)
    gpus = gpus_to_launch(a.device)
    if h.batch_size % (gpus or world_size()):
        raise UsageError(
            f"{a.config}: batch_size = {h.batch_size}: expected a multiple of "
            f"{gpus or world_size()}, the number of processes"
        )
    mels_dir = a.input_mels_dir if a.fine_tuning else None
    clips, validation = (
        MelDataset(h, file_list, a.input_wavs_dir, mels_dir)
        for file_list in (a.input_training_file, a.input_validation_file)
    )
    if len(clips) < h.batch_size:
        raise UserError(
            f"{a.input_training_file}: {len(clips)} clips, fewer than batch_size = {h.batch_size} "
            f"of {a.config}; lower it or add clips"
        )
    for index in own_share(validation):  # an unusable clip shall end the run now, not hours later
        validation.whole(index)
    if gpus:
        return launch(gpus)
    with locked(a.checkpoint_path):
        status = train(a, device, config, clips, validation)
    leave_processes()
    return status


def train(
    a: argparse.Namespace,
    device: torch.device,
    config: bytes,
    clips: MelDataset,
    validation: MelDataset,
) -> int:
    """Prepares the state, by resuming where there is something to resume, and runs.

    `config` is the text of the config as it was when the run began.
    """
    init_processes(device)
    torch.backends.cudnn.benchmark = True  # all segments have one size
    torch.backends.cudnn.allow_tf32 = True  # fp32 convolutions on GPUs; other products are exact
    folder = Path(a.checkpoint_path)
    state = build_state(clips.h, device, a.precision)
    if not resume(state, folder):
        warm_start(state, a.warm_start)
    elif a.warm_start:
        say(f"--warm_start not used: {folder} holds a run of its own")
    if rank() == 0:
        remove_temporary_files(folder)
        with replacing(folder / "config.json") as temporary:
            temporary.write_bytes(config)
    if a.compile:
        state.generator.compile()
        state.discriminators.compile()
    share_over_processes(state)
    describe(state, clips, a.config, folder)
    return run(a, state, clips, validation)


if __name__ == "__main__":
    command_line(main)
