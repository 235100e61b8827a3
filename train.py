"""Trains a vocoder: the generator of the config against HiFi-GAN's discriminators.

    python train.py --config config_v1.json                     # every GPU here, or the CPU
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT \\
        train.py --config config_v1.json                        # several machines

One update is one discriminator step and one generator step, as in HiFi-GAN (section 2.4). `steps`
counts completed updates everywhere.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from env import (
    Config,
    UsageError,
    UserError,
    init_processes,
    leave_processes,
    load_config,
    max_over_processes,
    mean_over_processes,
    rank,
    select_device,
    world_size,
)
from meldataset import EndlessBatches, LogMelSpectrogram, MelDataset, audio_seconds
from models import (
    Discriminators,
    Generator,
    discriminator_loss,
    feature_loss,
    generator_loss,
    modern_keys,
)
from utils import (
    boolean,
    checkpoint_path,
    checkpoint_steps,
    command_line,
    load_checkpoint,
    load_matching,
    load_optimizer,
    load_weights,
    paired_steps,
    plot_spectrogram,
    positive,
    replacing,
    save_checkpoint,
)

SHOWN_CLIPS = 5  # of the validation clips go to TensorBoard, as in HiFi-GAN
NEVER = sys.maxsize
BAD_DATA = 1  # why a run stops, where it is no signal's number
GENERATOR_KEYS = ("generator",)  # of g_* files
TRAINING_KEYS = ("mpd", "msd", "optim_g", "optim_d", "steps", "epoch")  # of do_* files
DURATION_PROBES = 1000  # clips from which the hours of a corpus are estimated


@dataclass
class State:
    """Everything that training owns. A checkpoint holds it all but what follows from the config."""

    h: Config
    device: torch.device
    precision: str  # "fp32" or "bf16"
    generator: Generator
    discriminators: Discriminators
    optim_g: torch.optim.Optimizer
    optim_d: torch.optim.Optimizer
    mel_for_loss: LogMelSpectrogram
    # The same modules as one process of several runs them: averaging gradients over all.
    shared_generator: nn.Module
    shared_discriminators: nn.Module
    first_bad_step: torch.Tensor  # the first whose losses were not finite, or NEVER
    steps: int = 0  # completed updates
    epoch: int = 0
    epoch_step: int = 0  # completed updates of this epoch

    def autocast(self) -> torch.autocast:
        """The context in which convolutions run in the precision asked for."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def build_state(h: Config, device: torch.device, precision: str = "fp32") -> State:
    """A fresh state: the same weights on every device and in every process."""
    torch.manual_seed(h.seed)
    generator, discriminators = Generator(h).to(device), Discriminators(h).to(device)

    def adamw(module: nn.Module) -> torch.optim.AdamW:
        betas = (h.adam_b1, h.adam_b2)
        return torch.optim.AdamW(module.parameters(), h.learning_rate, betas=betas, fused=True)

    return State(
        h=h,
        device=device,
        precision=precision,
        generator=generator,
        discriminators=discriminators,
        optim_g=adamw(generator),
        optim_d=adamw(discriminators),
        mel_for_loss=LogMelSpectrogram(h, h.fmax_for_loss).to(device),
        shared_generator=generator,
        shared_discriminators=discriminators,
        first_bad_step=torch.tensor(NEVER, device=device),
    )


def share_over_processes(state: State) -> None:
    """Lets the processes of a run average their gradients; nothing to do in a run of one."""
    if world_size() > 1:
        ids = [state.device] if state.device.type == "cuda" else None
        # The buffers, spectral norm's power iteration, follow from the weights alone.
        state.shared_generator, state.shared_discriminators = (
            DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
            for module in (state.generator, state.discriminators)
        )


# ------------------------------------------------------------------------------------- one update


def training_step(state: State, mel: torch.Tensor, wav: torch.Tensor) -> dict[str, torch.Tensor]:
    """One update of the discriminators, then one of the generator.

    Args:
        mel: [B, num_mels, T].
        wav: [B, 1, T * hop_size], from which the mel was taken.

    Returns:
        The losses by name, on the device.
    """
    with state.autocast():
        wav_hat = state.shared_generator(mel)
    losses = discriminator_step(state, wav, wav_hat)
    return losses | generator_step(state, wav, wav_hat)


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


def generator_step(state: State, wav: torch.Tensor, wav_hat: torch.Tensor) -> dict:
    """Updates the generator through discriminators that stand still."""
    h = state.h
    with frozen(state.discriminators), state.autocast():
        with torch.no_grad():
            _, real_features = state.discriminators(wav)
        fake_scores, fake_features = state.discriminators(wav_hat)
    with torch.no_grad():
        real_mel = state.mel_for_loss(wav.squeeze(1))
    mel_error = F.l1_loss(state.mel_for_loss(wav_hat.squeeze(1)), real_mel)
    adversarial = generator_loss(fake_scores)
    feature = feature_loss(real_features, fake_features)
    loss = adversarial + h.lambda_feature * feature + h.lambda_mel * mel_error
    state.optim_g.zero_grad()
    loss.backward()
    state.optim_g.step()
    losses = {
        "gen_loss_total": loss,
        "gen_loss_adversarial": adversarial,
        "gen_loss_feature": feature,
        "mel_spec_error": mel_error,
    }
    return {name: value.detach() for name, value in losses.items()}


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


def start_epoch(state: State) -> None:
    """Sets the learning rate of `state.epoch`, HiFi-GAN's exponential decay in closed form."""
    for optimizer in (state.optim_g, state.optim_d):
        for group in optimizer.param_groups:
            group["lr"] = state.h.learning_rate * state.h.lr_decay**state.epoch


@torch.no_grad()
def validate(state: State, clips: MelDataset, monitor: "Monitor") -> float:
    """The mean mel error of whole clips, which the processes share out."""
    state.generator.eval()
    error_sum = torch.zeros((), device=state.device)
    # cuDNN would try its algorithms anew for the length of each clip.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False), parametrize.cached():
        for index in range(rank(), len(clips), world_size()):
            mel, wav = (x.to(state.device) for x in clips.whole(index))
            with state.autocast():
                wav_hat = state.generator(mel.unsqueeze(0))[0]
            real, generated = ((x, state.mel_for_loss(x)[0]) for x in (wav, wav_hat))
            error_sum += F.l1_loss(generated[1], real[1])
            if index < SHOWN_CLIPS:
                monitor.clip(state.steps, index, real=real, generated=generated)
    state.generator.train()
    return float(mean_over_processes(error_sum)) * world_size() / len(clips)


# ------------------------------------------------------------------------------------ checkpoints


def save(state: State, folder: Path, keep: int) -> None:
    """Writes `do_` and then `g_`, each whole or not at all, and removes all but `keep` `do_` files.

    So a `g_` stands only beside a `do_` of the same update. Raises UserError, and writes nothing,
    where a loss or a weight is not finite.
    """
    check_losses(state, folder)
    modules = (state.generator, state.discriminators)
    if not all(p.isfinite().all() for module in modules for p in module.parameters()):
        raise UserError(f"a weight is not finite at step {state.steps}; {_last_good(folder)}")
    if rank() > 0:
        return
    contents = {
        "mpd": state.discriminators.mpd.state_dict(),
        "msd": state.discriminators.msd.state_dict(),
        "optim_g": state.optim_g.state_dict(),
        "optim_d": state.optim_d.state_dict(),
        "steps": state.steps,
        "epoch": state.epoch,
        "epoch_step": state.epoch_step,
    }
    save_checkpoint(checkpoint_path(folder, "do", state.steps), contents)
    generator = {"generator": state.generator.state_dict()}
    save_checkpoint(checkpoint_path(folder, "g", state.steps), generator)
    for steps in checkpoint_steps(folder, "do")[:-keep]:
        checkpoint_path(folder, "do", steps).unlink(missing_ok=True)


def check_losses(state: State, folder: Path) -> None:
    """Raises UserError, in every process, where any has seen a loss that was not finite."""
    first = -max_over_processes(-int(state.first_bad_step))
    if first < NEVER:
        raise UserError(f"a loss was not finite at step {first}; {_last_good(folder)}")


def _last_good(folder: Path) -> str:
    pairs = paired_steps(folder)
    if not pairs:
        return f"{folder} holds no checkpoint yet"
    return f"the last good checkpoint is {checkpoint_path(folder, 'g', pairs[-1])}"


def resume(state: State, folder: Path) -> bool:
    """Continues from the newest pair of `g_` and `do_` in `folder` that can be read, if any.

    HiFi-GAN's own files will do. Damaged files are named and left alone.

    Raises:
        UserError: a pair that does not fit the config, or files from which nothing can be resumed.
    """
    pairs = paired_steps(folder)
    for steps in reversed(pairs):
        paths = [checkpoint_path(folder, prefix, steps) for prefix in ("g", "do")]
        try:
            g, do = (load_checkpoint(path) for path in paths)
        except UserError as error:
            say(f"skipped: {error}")
            continue
        _restore(state, g, do, paths)
        say(f"resumed from {paths[0]} and {paths[1].name}, after {state.steps} steps")
        return True
    if pairs:
        raise UserError(f"{folder}: no checkpoint in it can be read; move them away to start anew")
    if checkpoint_steps(folder, "g"):
        raise UserError(
            f"{folder}: holds g_* but no do_* of the same step, so nothing to resume; to start "
            "from their weights, pass --warm_start and another --checkpoint_path"
        )
    return False


def _restore(state: State, g: dict, do: dict, paths: list[Path]) -> None:
    for path, contents, keys in zip(paths, (g, do), (GENERATOR_KEYS, TRAINING_KEYS), strict=True):
        missing = [key for key in keys if key not in contents]
        if missing:
            raise UserError(f"{path}: holds no {', '.join(missing)}")
    load_weights(state.generator, g["generator"], paths[0])
    load_weights(state.discriminators.mpd, do["mpd"], paths[1])
    load_weights(state.discriminators.msd, do["msd"], paths[1])
    load_optimizer(state.optim_g, do["optim_g"], paths[1])
    load_optimizer(state.optim_d, do["optim_d"], paths[1])
    state.steps, state.epoch = do["steps"], do["epoch"]
    state.epoch_step = do.get("epoch_step", 0)  # not in HiFi-GAN's files


def warm_start(state: State, paths: list[Path]) -> None:
    """Takes what fits out of `g_*` and `do_*` files, ours or HiFi-GAN's; says what it did not take.

    A layer is taken where all of its tensors match in name and shape. Optimizers start anew.
    """
    modules = {
        "generator": state.generator,
        "mpd": state.discriminators.mpd,
        "msd": state.discriminators.msd,
    }
    for path in paths:
        contents = load_checkpoint(path)
        found = [name for name in modules if name in contents]
        if not found:
            raise UserError(f"{path}: holds none of {', '.join(modules)}")
        for name in found:
            taken, left = load_matching(modules[name], modern_keys(contents[name]))
            left_out = f"; not taken: {', '.join(left)}" if left else ""
            say(f"{path}: {name}: {len(taken)} of {len(taken) + len(left)} layers taken{left_out}")


# ----------------------------------------------------------------------------------- what is seen


def say(text: str) -> None:
    """Prints on the first process, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


class Monitor:
    """What the person watching sees: a bar or lines on the terminal, and TensorBoard.

    Every process calls it, the first one shows.
    """

    def __init__(self, state: State, folder: Path, last_step: int):
        self.h = state.h
        self.steps, self.time = state.steps, time.monotonic()
        self.steps_per_second = 0.0
        self.shown: set[int] = set()
        is_first = rank() == 0
        self.bar = tqdm(
            initial=state.steps,
            total=last_step,
            unit="step",
            disable=not (is_first and sys.stderr.isatty()),
        )
        purge_step = state.steps + 1 if state.steps else None
        self.writer = SummaryWriter(folder / "logs", purge_step=purge_step) if is_first else None

    def progress(self, state: State, losses: dict[str, torch.Tensor]) -> None:
        """News for the bar, or a line of text where there is none. Waits for the device."""
        names = ("gen_loss_total", "disc_loss_total", "mel_spec_error")
        means = mean_over_processes(torch.stack([losses[name] for name in names]))
        generator, discriminator, mel_error = means.tolist()
        steps, now = state.steps - self.steps, time.monotonic()
        self.steps_per_second = steps / max(1e-9, now - self.time)
        self.steps, self.time = state.steps, now
        if not self.bar.disable:
            self.bar.set_postfix_str(
                f"mel {mel_error:.3f}, G {generator:.2f}, D {discriminator:.2f}", refresh=False
            )
            self.bar.update(state.steps - self.bar.n)
        else:
            say(
                f"Steps : {state.steps}, Gen Loss Total : {generator:.3f}, Disc Loss Total : "
                f"{discriminator:.3f}, Mel-Spec. Error : {mel_error:.4f}, "
                f"s/b : {1 / self.steps_per_second:.3f}"
            )

    def summary(self, state: State, losses: dict[str, torch.Tensor]) -> None:
        """The scalars of training, in every process together."""
        means = mean_over_processes(torch.stack(list(losses.values())))
        if self.writer is None:
            return
        scalars = dict(zip(losses, means, strict=True)) | {
            "learning_rate": state.optim_g.param_groups[0]["lr"],
            "gradient_norm_generator": gradient_norm(state.generator),
            "gradient_norm_discriminators": gradient_norm(state.discriminators),
            "steps_per_second": self.steps_per_second,
        }
        for name, value in scalars.items():
            self.writer.add_scalar(f"training/{name}", value, state.steps)

    def validation(self, state: State, mel_error: float) -> None:
        """The mel error of the validation clips."""
        say(f"Steps : {state.steps}, Validation Mel-Spec. Error : {mel_error:.4f}")
        self.steps, self.time = state.steps, time.monotonic()
        if self.writer is not None:
            self.writer.add_scalar("validation/mel_spec_error", mel_error, state.steps)
            self.writer.flush()

    def clip(self, steps: int, index: int, real: tuple, generated: tuple) -> None:
        """Sound and picture, (wav [1, N], log-mel [num_mels, T]), of a validation clip.

        The real one is written once a run.
        """
        if self.writer is None:
            return
        kinds = {"generated/y_hat": generated}
        if index not in self.shown:
            kinds["gt/y"] = real
            self.shown.add(index)
        rate = self.h.sampling_rate
        for tag, (wav, mel) in kinds.items():
            picture = plot_spectrogram(mel.cpu().numpy(), self.h.hop_size / rate)
            self.writer.add_audio(f"{tag}_{index}", wav, steps, rate)
            self.writer.add_figure(f"{tag}_spec_{index}", picture, steps)

    def close(self) -> None:
        """Ends the bar and writes what TensorBoard still waits for."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def gradient_norm(module: nn.Module) -> torch.Tensor:
    """The 2-norm of the gradients of the last update."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])


def describe(a: argparse.Namespace, state: State, clips: MelDataset) -> None:
    """Prints what is about to run."""
    h = state.h
    count = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in (("G", state.generator), ("D", state.discriminators))
    }
    probe = clips.clips[:: -(-len(clips) // DURATION_PROBES)]
    seconds = [audio_seconds(clips.wavs_dir / clip) for clip in probe]
    hours = sum(seconds) / len(probe) * len(clips) / 3600
    fusion = "MISR" if h.uses_misr else "MRF"
    say(
        f"{a.config}: {fusion} generator {count['G']:.2f}M parameters, discriminators "
        f"{count['D']:.1f}M\n"
        f"{state.device}, {state.precision}, {world_size()} process(es), batch {h.batch_size} of "
        f"{h.segment_size} samples\n"
        f"{len(clips)} clips, about {hours:.2f} h; {len(clips) // h.batch_size} steps an epoch\n"
        f"checkpoints and logs in {a.checkpoint_path}"
    )


# --------------------------------------------------------------------------------------- the loop


class StopRequest:
    """Notes SIGINT or SIGTERM, so that the run can stop at a step's end; a second one kills."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        self.number = number
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fetch(batches: Iterator) -> tuple[list[torch.Tensor], UserError | None]:
    """The next (mel, wav), or the error that a clip has caused."""
    try:
        return next(batches), None
    except UserError as error:
        return [], error


def advance(state: State, losses: dict[str, torch.Tensor], steps_per_epoch: int) -> None:
    """Counts a completed update and notes, on the device, whether its losses were finite."""
    state.steps += 1
    state.epoch_step += 1
    if state.epoch_step >= steps_per_epoch:
        state.epoch, state.epoch_step = state.epoch + 1, 0
    finite = torch.stack(list(losses.values())).isfinite().all()
    bad_step = state.first_bad_step.clamp(max=state.steps)
    state.first_bad_step = torch.where(finite, state.first_bad_step, bad_step)


def run(a: argparse.Namespace, state: State, clips: MelDataset, validation: MelDataset) -> int:
    """Trains until the last step, a signal or an unusable clip, and saves; returns the status."""
    folder, steps_per_epoch = Path(a.checkpoint_path), len(clips) // state.h.batch_size
    if state.epoch_step >= steps_per_epoch:  # the corpus has shrunk since
        state.epoch, state.epoch_step = state.epoch + 1, 0
    left_in_epochs = (a.training_epochs - state.epoch) * steps_per_epoch - state.epoch_step
    last_step = min(state.steps + left_in_epochs, a.training_steps or NEVER)
    if state.steps >= last_step:
        say(f"nothing to do: {state.steps} steps and {state.epoch} epochs are done")
        return 0
    signals, batches = StopRequest(), iter(make_loader(clips, state))
    stop, error, saved_step = 0, None, state.steps
    with contextlib.closing(Monitor(state, folder, last_step)) as monitor:
        while state.steps < last_step:
            batch, error = fetch(batches)
            stop = max_over_processes(BAD_DATA if error else signals.number)
            if stop:
                break
            start_epoch(state)
            mel, wav = (x.to(state.device, non_blocking=True) for x in batch)
            losses = training_step(state, mel, wav)
            advance(state, losses, steps_per_epoch)
            if state.steps % a.stdout_interval == 0:
                check_losses(state, folder)
                monitor.progress(state, losses)
            if state.steps % a.summary_interval == 0:
                monitor.summary(state, losses)
            if state.steps % a.checkpoint_interval == 0:
                save(state, folder, keep=a.keep_checkpoints)
                saved_step = state.steps
            if state.steps % a.validation_interval == 0 and len(validation):
                monitor.validation(state, validate(state, validation, monitor))
        if state.steps > saved_step:
            save(state, folder, keep=a.keep_checkpoints)
    if error:
        raise error
    if stop > BAD_DATA:
        say(f"stopped by {signal.Signals(stop).name} after step {state.steps}, saved")
        return 128 + stop
    return stop


def launch_on_all_gpus(device_name: str) -> None:
    """Replaces this process by torchrun with a process for each GPU, where there are several."""
    gpus = torch.cuda.device_count()
    if device_name in ("auto", "cuda") and gpus > 1 and "RANK" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def parse_arguments() -> argparse.Namespace:
    """The command line; HiFi-GAN's flags keep their names and defaults."""
    parser = argparse.ArgumentParser(
        description="Trains a vocoder. Run it again to resume; Ctrl-C saves and stops.",
        epilog="Example: python train.py --config config_v2.json --input_wavs_dir my_voice/wavs "
        "--input_training_file my_voice/training.txt "
        "--input_validation_file my_voice/validation.txt --checkpoint_path cp_my_voice",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--input_wavs_dir", default="LJSpeech-1.1/wavs", help="audio, any format")
    data.add_argument("--input_mels_dir", default="ft_dataset", help="<id>.npy, for fine-tuning")
    data.add_argument(
        "--input_training_file", default="LJSpeech-1.1/training.txt", help="a line a clip: id|..."
    )
    data.add_argument(
        "--input_validation_file", default="LJSpeech-1.1/validation.txt", help="the same"
    )
    data.add_argument(
        "--fine_tuning",
        type=boolean,
        default=False,
        metavar="True|False",
        help="learn from an acoustic model's mels in --input_mels_dir",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--config", required=True, help="JSON config, HiFi-GAN's format")
    model.add_argument(
        "--checkpoint_path", default="cp_misrnet", help="folder to resume from and to save to"
    )
    model.add_argument(
        "--warm_start",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="g_* and do_* files, ours or HiFi-GAN's, whose matching weights a new run begins with",
    )
    length = parser.add_argument_group("length, in updates unless said otherwise")
    length.add_argument("--training_epochs", type=positive, default=3100, help="stop after, epochs")
    length.add_argument("--training_steps", type=positive, help="stop after, whichever is first")
    length.add_argument("--stdout_interval", type=positive, default=5, help="terminal")
    length.add_argument("--checkpoint_interval", type=positive, default=5000, help="g_* and do_*")
    length.add_argument("--summary_interval", type=positive, default=100, help="TensorBoard")
    length.add_argument("--validation_interval", type=positive, default=1000, help="all its clips")
    length.add_argument(
        "--keep_checkpoints",
        type=positive,
        default=3,
        metavar="K",
        help="the newest K do_* stay; every g_* stays",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    machine.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the convolutions"
    )
    machine.add_argument("--compile", action="store_true", help="torch.compile the models")
    return parser.parse_args()


def main() -> int:
    """Trains as the command line says."""
    a = parse_arguments()
    h = load_config(a.config)
    if h.batch_size % world_size():
        raise UsageError(
            f"{a.config}: batch_size = {h.batch_size}: expected a multiple of {world_size()}, the "
            "number of processes"
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
    launch_on_all_gpus(a.device)
    device = select_device(a.device)
    init_processes(device)
    torch.backends.cudnn.benchmark = True  # all segments have one size
    folder = Path(a.checkpoint_path)
    state = build_state(h, device, a.precision)
    if not resume(state, folder):
        warm_start(state, a.warm_start)
    elif a.warm_start:
        say(f"--warm_start not used: {folder} holds a run of its own")
    if rank() == 0:
        with replacing(folder / "config.json") as temporary:
            shutil.copyfile(a.config, temporary)
    if a.compile:
        state.generator.compile()
        state.discriminators.compile()
    share_over_processes(state)
    describe(a, state, clips)
    status = run(a, state, clips, validation)
    leave_processes()
    return status


if __name__ == "__main__":
    command_line(main)
