"""What the person watching a run sees: the terminal and TensorBoard."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from audio import audio_seconds
from checkpoint import State
from distributed import mean_over_processes, rank, world_size
from env import Config, UserError
from evaluation.plots import plot_spectrogram
from meldataset import MelDataset
from utils import end_with_parent, say

DURATION_PROBES = 1000  # clips from which the hours of a corpus are estimated

# The losses on the terminal: beside a bar, and in lines such as HiFi-GAN's.
SHORT = {
    "gen_loss_total": "G",
    "disc_loss_total": "D",
    "mel_spec_error": "mel",
    "gen_loss_mel": "mel loss",
    "gen_loss_energy": "energy distance",
    "gen_loss_voice": "voice",
    "log_magnitude": "log magnitude",
}
LONG = {
    "gen_loss_total": "Gen Loss Total",
    "disc_loss_total": "Disc Loss Total",
    "mel_spec_error": "Mel-Spec. Error",
    "gen_loss_mel": "Mel Loss",
    "gen_loss_energy": "Energy Distance",
    "gen_loss_voice": "Voice",
    "pitch": "Pitch",
    "noise": "Noise",
    "log_magnitude": "Log Magnitude",
}

METRICS_PATIENCE = 120  # seconds that the end of a run waits for its last metrics


class Monitor:
    """Every process calls it, the first one shows. With `eval_metrics`, PESQ and its like of the
    clips that are shown too. `error` is what the run shall save and end for: logs that cannot be
    written.
    """

    def __init__(self, state: State, folder: Path, last_step: int, eval_metrics: bool):
        self.h = state.h
        self.marks: dict[str, tuple[int, float]] = {}  # steps and seconds, for _speed
        self._start_clock(state.steps)
        self.shown: set[int] = set()
        self.clips: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the validation under way
        is_first = rank() == 0
        self.bar = tqdm(
            initial=state.steps,
            total=last_step,
            unit="step",
            disable=not (is_first and sys.stderr.isatty()),
        )
        self.logs, self.writer = folder / "logs", None
        self.error: UserError | None = None
        threading.excepthook = _leave_to_caller
        if is_first:
            with self._noting_errors():
                # What a killed run has logged after its last checkpoint will come again.
                self.writer = SummaryWriter(self.logs, purge_step=state.steps + 1)
        self.metrics = None
        if eval_metrics and is_first:
            try:
                self.metrics = BackgroundMetrics(self.h)
            except OSError as error:  # its locks lie in /dev/shm
                reason = f"--eval_metrics: no process can be started ({error.strerror})"
                self.error = UserError(f"{reason}; is /dev/shm writable?")

    def progress(self, state: State, losses: dict[str, torch.Tensor]) -> None:
        """News for the bar, or a line of text where there is none. Waits for the device."""
        self._write_metrics()
        # Before discriminator_train_start_steps, discriminators have no loss.
        shown = [name for name in LONG if name in losses]
        shown += [name for name in losses if name.startswith("stage_")]
        values = mean_over_processes(torch.stack([losses[name] for name in shown])).tolist()
        means = dict(zip(shown, values, strict=True))
        speed = self._speed("line", state.steps)
        if not self.bar.disable:
            text = ", ".join(f"{SHORT.get(name, name)} {means[name]:.3f}" for name in means)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(state.steps - self.bar.n)
        else:
            text = ", ".join(f"{LONG.get(name, name)} : {means[name]:.4f}" for name in means)
            say(f"Steps : {state.steps}, {text}, s/b : {1 / speed:.3f}")

    def summary(self, state: State, losses: dict[str, torch.Tensor]) -> None:
        """The scalars of training, in every process together."""
        means = mean_over_processes(torch.stack(list(losses.values())))
        if self.writer is None:
            return
        scalars = dict(zip(losses, means, strict=True)) | {
            "learning_rate": state.optim_g.param_groups[0]["lr"],
            "steps_per_second": self._speed("summary", state.steps),
        }
        for name in ("generator", "discriminators"):
            if (norm := gradient_norm(getattr(state, name))) is not None:
                scalars[f"gradient_norm_{name}"] = norm
        for name, value in scalars.items():
            self._log(SummaryWriter.add_scalar, f"training/{name}", value, state.steps)

    def validation(self, state: State, mel_error: float) -> None:
        """The mel error of the validation clips."""
        say(f"Steps : {state.steps}, Validation Mel-Spec. Error : {mel_error:.4f}")
        self._log(SummaryWriter.add_scalar, "validation/mel_spec_error", mel_error, state.steps)
        self._log(SummaryWriter.flush)
        if self.metrics is not None:
            self._write_metrics()
            self.metrics.submit(state.steps, self.clips)
        self.clips = []
        self._start_clock(state.steps)

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
        if self.metrics is not None:
            self.clips.append((real[0], generated[0]))
        rate = self.h.sampling_rate
        for tag, (wav, mel) in kinds.items():
            shown = wav[0].float().cpu().numpy(), mel.cpu().numpy()
            picture = plot_spectrogram(*shown, self.h, self.h.fmax_for_loss)
            # An iSTFT head may leave [-1, 1] a little, of which TensorBoard would warn.
            sound = wav.clamp(-1, 1)
            self._log(SummaryWriter.add_audio, f"{tag}_{index}", sound, steps, rate)
            self._log(SummaryWriter.add_figure, f"{tag}_spec_{index}", picture, steps)

    def flush(self) -> None:
        """Writes what TensorBoard still waits for: a save's steps will not come again."""
        self._log(SummaryWriter.flush)

    def finish(self) -> None:
        """Waits, a while, for the metrics of the last validation."""
        self._write_metrics(patience=METRICS_PATIENCE)

    def close(self) -> None:
        """Ends the bar and writes what TensorBoard still waits for."""
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
        self._log(SummaryWriter.close)

    def _start_clock(self, steps: int) -> None:
        """Begins to time updates: what came before is not training."""
        self.marks = dict.fromkeys(("line", "summary"), (steps, time.monotonic()))

    def _speed(self, reader: str, steps: int) -> float:
        """Steps a second since this reader asked last, or since the clock was started."""
        before, now = self.marks[reader], time.monotonic()
        self.marks[reader] = (steps, now)
        return (steps - before[0]) / max(1e-9, now - before[1])

    def _log(self, write: Callable, *arguments) -> None:
        """Calls a method of the writer, where there is one."""
        if self.writer is not None:
            with self._noting_errors():
                write(self.writer, *arguments)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Makes a failure to write `error`; from then on nothing is logged."""
        try:
            yield
        except OSError as error:
            self.writer = None
            self.error = UserError(f"{self.logs}: cannot be written ({error.strerror or error})")

    def _write_metrics(self, patience: float = 0) -> None:
        """Writes the metrics that have been measured by now, or in `patience` seconds."""
        if self.metrics is None:
            return
        for steps, means in self.metrics.finished(patience):
            for name, value in means.items():
                self._log(SummaryWriter.add_scalar, f"validation/{name}", value, steps)
            self._log(SummaryWriter.flush)
            text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            say(f"Steps : {steps}, Validation metrics : {text}")


def _leave_to_caller(raised: threading.ExceptHookArgs) -> None:
    """SummaryWriter's thread hands its errors to the next call: no traceback is wanted as well."""
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


class BackgroundMetrics:
    """evaluate.py's metrics of validation clips, in a process of its own: training does not wait.

    A validation that comes before the last one is measured is passed over, as a whole.
    """

    def __init__(self, h: Config):
        self.h = h
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_step_back)
        self.steps = 0  # of the validation that is being measured
        self.futures: list[Future] = []

    def submit(self, steps: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Takes the validation at `steps`: (wav, wav_hat), both [1, N], of each clip."""
        if self.futures:
            return
        self.steps = steps
        for pair in pairs:
            wavs = (each[0].float().cpu().numpy() for each in pair)
            with contextlib.suppress(BrokenProcessPool):  # `finished` has said so
                self.futures.append(self.pool.submit(_evaluate, *wavs, self.h))

    def finished(self, patience: float) -> list[tuple[int, dict[str, float]]]:
        """[(steps, the means over clips by name)] once all clips are measured; before, nothing."""
        if not self.futures or wait(self.futures, timeout=patience).not_done:
            return []
        errors = [e for e in (future.exception() for future in self.futures) if e is not None]
        if errors:
            say(f"Steps : {self.steps}, no metrics of {len(errors)} clips : {errors[0]!r}")
        values = [future.result() for future in self.futures if future.exception() is None]
        self.futures = []
        names = dict.fromkeys(name for each in values for name in each)
        columns = {name: [v[name] for v in values if v.get(name) is not None] for name in names}
        means = {name: float(np.mean(values)) for name, values in columns.items() if values}
        return [(self.steps, means)] if means else []

    def close(self) -> None:
        """Drops what is not measured yet."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _step_back() -> None:
    """Leaves the machine to training, and signals to the group to the parent."""
    os.nice(10)
    os.setpgrp()
    end_with_parent()
    torch.set_num_threads(1)


def _evaluate(wav: np.ndarray, wav_hat: np.ndarray, h: Config) -> dict[str, float | None]:
    from evaluation.metrics import evaluate_pair

    return evaluate_pair(torch.from_numpy(wav), torch.from_numpy(wav_hat), h)


def gradient_norm(module: nn.Module) -> torch.Tensor | None:
    """The 2-norm of the gradients of the last update; None where there were none."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads) if grads else None


def describe(state: State, clips: MelDataset, config: str, folder: Path) -> None:
    """Prints what is about to run."""
    if rank() > 0:
        return
    h = state.h
    count = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in (("G", state.generator), ("D", state.discriminators))
    }
    probe = range(0, len(clips), -(-len(clips) // DURATION_PROBES))
    seconds = [audio_seconds(clips.path(index)) for index in probe]
    hours = sum(seconds) / len(probe) * len(clips) / 3600
    fusion = "MISR" if h.uses_misr else "MRF"
    against = f"discriminators {count['D']:.1f}M" if count["D"] else "no discriminators"
    say(
        f"{config}: {fusion} generator {count['G']:.2f}M parameters, {against}\n"
        f"{state.device}, {state.precision}, {world_size()} process(es), batch {h.batch_size} of "
        f"{h.segment_size} samples\n"
        f"{len(clips)} clips, about {hours:.2g} h; {len(clips) // h.batch_size} steps an epoch\n"
        f"checkpoints and logs in {folder}"
    )
