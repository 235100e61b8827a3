"""Reports a run: lines or a progress bar on the terminal, and TensorBoard."""

import contextlib
import multiprocessing
import os
import signal
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
from distributed import STOP_SIGNALS, mean_over_processes, rank, world_size
from env import Config, UserError, one_line
from evaluation.plots import plot_spectrogram
from losses import Loss
from meldataset import MelDataset
from utils import end_with_parent, say

DURATION_PROBES = 1000  # clips from which the duration of a corpus is estimated
METRICS_PATIENCE = 120  # seconds that the end of a run waits for its last metrics

Clip = tuple[torch.Tensor, torch.Tensor]  # wav [1, N], log-mel [num_mels, T]


class Monitor:
    """Writes to the terminal and to TensorBoard on rank 0; every rank must call it.

    `losses` declares the losses to print. With `eval_metrics`, the metrics of evaluate.py are
    computed for the validation clips that are written. `error` is set when TensorBoard's files
    cannot be written; the run should then save and end.
    """

    def __init__(
        self,
        state: State,
        folder: Path,
        *,
        losses: tuple[Loss, ...],
        last_step: int,
        eval_metrics: bool,
    ):
        self.h = state.h
        self.printed = {loss.name: loss.printed for loss in losses if loss.printed}
        self.marks: dict[str, tuple[int, float]] = {}  # steps and seconds, for _speed
        self._start_clock(state.steps)
        self.written_clips: set[int] = set()
        self.clips: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the current validation
        is_first = rank() == 0
        self.bar = tqdm(
            initial=state.steps,
            total=last_step,
            unit="step",
            disable=not (is_first and sys.stderr.isatty()),
        )
        self.logs, self.writer = folder / "logs", None
        self.error: UserError | None = None
        self.metrics: BackgroundMetrics | None = None
        if is_first:
            threading.excepthook = _print_no_write_errors
            with self._noting_errors():
                # A killed run has logged steps after its last checkpoint. They are computed again.
                self.writer = SummaryWriter(self.logs, purge_step=state.steps + 1)
        if is_first and eval_metrics:
            self.metrics = BackgroundMetrics(self.h)

    def progress(self, state: State, losses: dict[str, torch.Tensor]) -> None:
        """Prints the losses, or updates the progress bar; waits for the device."""
        self._write_metrics()
        # Without discriminators, their loss is absent.
        names = [name for name in self.printed if name in losses]
        values = mean_over_processes(torch.stack([losses[name] for name in names])).tolist()
        named = ", ".join(
            f"{self.printed[name]} : {value:.4f}" for name, value in zip(names, values, strict=True)
        )
        speed = self._speed("line", state.steps)
        if self.bar.disable:
            say(f"Steps : {state.steps}, {named}, s/b : {1 / speed:.3f}")
        else:
            self.bar.set_postfix_str(named, refresh=False)
            self.bar.update(state.steps - self.bar.n)

    def summary(self, state: State, losses: dict[str, torch.Tensor]) -> None:
        """Writes the losses, the learning rate, the speed and gradient norms to TensorBoard."""
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
        """Prints and writes the mel error of a validation, and starts to compute its metrics."""
        say(f"Steps : {state.steps}, Validation Mel-Spec. Error : {mel_error:.4f}")
        self._log(SummaryWriter.add_scalar, "validation/mel_spec_error", mel_error, state.steps)
        self._log(SummaryWriter.flush)
        if self.metrics is not None:
            self._write_metrics()
            self.metrics.submit(state.steps, self.clips)
        self.clips = []
        self._start_clock(state.steps)

    def clip(self, steps: int, index: int, *, real: Clip, generated: Clip) -> None:
        """Writes the audio and the spectrogram of a validation clip; `real` only once a run."""
        if self.writer is None:
            return
        kinds = {"generated/y_hat": generated}
        if index not in self.written_clips:
            kinds["gt/y"] = real
            self.written_clips.add(index)
        if self.metrics is not None:
            self.clips.append((real[0], generated[0]))
        for tag, (wav, mel) in kinds.items():
            arrays = wav[0].float().cpu().numpy(), mel.cpu().numpy()
            figure = plot_spectrogram(*arrays, self.h, self.h.fmax_for_loss)
            # An iSTFT head may exceed [-1, 1] slightly, which TensorBoard would warn about.
            sound, sampling_rate = wav.clamp(-1, 1), self.h.sampling_rate
            self._log(SummaryWriter.add_audio, f"{tag}_{index}", sound, steps, sampling_rate)
            self._log(SummaryWriter.add_figure, f"{tag}_spec_{index}", figure, steps)

    def flush(self) -> None:
        """Writes TensorBoard's queue to disk, before a checkpoint of the same steps is saved."""
        self._log(SummaryWriter.flush)

    def finish(self) -> None:
        """Waits up to METRICS_PATIENCE seconds for the metrics of the last validation."""
        self._write_metrics(METRICS_PATIENCE)

    def close(self) -> None:
        """Ends the progress bar and TensorBoard's files."""
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
        self._log(SummaryWriter.close)

    def _start_clock(self, steps: int) -> None:
        """Starts to time updates, so that loading and validation do not count."""
        now = time.monotonic()
        self.marks = {"line": (steps, now), "summary": (steps, now)}

    def _speed(self, reader: str, steps: int) -> float:
        """Returns the steps per second since this reader's last call, or since _start_clock."""
        before, now = self.marks[reader], time.monotonic()
        self.marks[reader] = (steps, now)
        return (steps - before[0]) / max(1e-9, now - before[1])

    def _log(self, write: Callable, *arguments) -> None:
        """Calls a method of TensorBoard's writer, if there is one."""
        if self.writer is not None:
            with self._noting_errors():
                write(self.writer, *arguments)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Sets `error` if the block cannot write; nothing is logged afterwards."""
        try:
            yield
        except OSError as error:
            self.writer = None
            self.error = UserError(f"{self.logs}: cannot be written ({error.strerror or error})")

    def _write_metrics(self, patience: float = 0) -> None:
        """Writes the metrics if they are ready now or within `patience` seconds."""
        if self.metrics is None or (finished := self.metrics.finished(patience)) is None:
            return
        steps, means = finished
        for name, value in means.items():
            self._log(SummaryWriter.add_scalar, f"validation/{name}", value, steps)
        self._log(SummaryWriter.flush)
        text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        say(f"Steps : {steps}, Validation metrics : {text}")


def _print_no_write_errors(raised: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a thread unless it is an OSError.

    TensorBoard raises an OSError of its writer thread again in the next call, which handles it.
    """
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


class BackgroundMetrics:
    """Computes evaluate.py's metrics of validation clips in another process, beside training.

    While a validation is being measured, later ones are skipped. If the process fails, the error is
    printed and training continues; if it dies, no more metrics are computed.
    """

    def __init__(self, h: Config):
        self.h = h
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_set_up_process)
        self.steps, self.is_dead = 0, False
        self.future: Future | None = None  # the means of the validation at `steps`

    def submit(self, steps: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Starts to measure pairs (wav, wav_hat), both [1, N], of the validation at `steps`."""
        if self.future is not None or self.is_dead:
            return
        wavs = [[wav[0].float().cpu().numpy() for wav in pair] for pair in pairs]
        self.steps, self.future = steps, self.pool.submit(_mean_metrics, wavs, self.h)

    def finished(self, patience: float = 0) -> tuple[int, dict[str, float]] | None:
        """Returns (steps, mean of each metric) of a validation that is done; otherwise None."""
        if self.future is None or wait([self.future], timeout=patience).not_done:
            return None
        future, self.future = self.future, None
        if (error := future.exception()) is not None:
            self.is_dead = isinstance(error, BrokenProcessPool)
            rest = "; training goes on without metrics" if self.is_dead else ""
            say(one_line(f"Steps : {self.steps}, no validation metrics : {error!r}{rest}"))
            return None
        return (self.steps, future.result()) if future.result() else None

    def close(self) -> None:
        """Stops without waiting for the validation that is being measured."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _set_up_process() -> None:
    """Yields the CPU to training, and leaves signals of the process group to the trainer."""
    os.nice(10)
    os.setpgrp()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)


def _mean_metrics(pairs: list[list[np.ndarray]], h: Config) -> dict[str, float]:
    """Returns the mean of each metric over pairs (wav, wav_hat), both [N]."""
    from evaluation.metrics import evaluate_pair

    results = [evaluate_pair(*map(torch.from_numpy, pair), h) for pair in pairs]
    names = dict.fromkeys(name for result in results for name in result)
    values = {name: [r[name] for r in results if r.get(name) is not None] for name in names}
    return {name: float(np.mean(each)) for name, each in values.items() if each}


def gradient_norm(module: nn.Module) -> torch.Tensor | None:
    """Returns the 2-norm of the gradients of the last update, or None without gradients."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads) if grads else None


def describe(state: State, clips: MelDataset, config: str, folder: Path) -> None:
    """Prints the model, the machine, the data and the folder of a run."""
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
