"""Runs of train.py: length, logs, validation, metrics, fine-tuning, stop signals, data workers."""

import concurrent.futures
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import meldataset
import monitor
import train
import utils
from checkpoint import build_state, checkpoint_path, paired_steps
from distributed import STOP_SIGNALS, Stopped, StopRequest
from env import UsageError, UserError, load_config
from loader import next_batch
from losses import LOSSES, Loss
from models import Generator
from monitor import BackgroundMetrics
from tests.runs import Run, contents, equal_but_meta
from tools.stress import kill
from tools.stress.kill import wait_for
from tools.toy import ROOT, run_main, toy_config, write_config

CPU = torch.device("cpu")
WAITS = 1000  # seconds, for a clip on a disk that hangs
PATIENCE = 60  # seconds on a busy machine, for what takes a few
AT_ONCE = 15  # seconds there, for what takes one


@pytest.fixture
def run(corpus, tmp_path) -> Run:
    return Run(corpus, tmp_path)


@pytest.fixture(autouse=True)
def _own_handlers():
    """Restores the signal handlers of the test process."""
    numbers = (*STOP_SIGNALS, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def logged(run: Run) -> EventAccumulator:
    """Returns the TensorBoard data of a run."""
    events = EventAccumulator(str(run.folder / "logs"))
    events.Reload()
    return events


# ---------------------------------------------------------------------------------- length and logs


def test_steps_and_epochs_limit_a_run(run, capsys):
    assert run(100, "--training_epochs", 2) == 0
    assert run.names() == ["do_00000004", "g_00000004"]
    assert contents(run.folder, 4)["do"]["epoch"] == 2
    assert run(3) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run.names() == ["do_00000004", "g_00000004"]


def test_losses_are_printed_under_the_names_of_their_declarations(run, monkeypatch, capsys):
    """HiFi-GAN's names for HiFi-GAN's losses; with a loss added, its name appears."""
    monkeypatch.setattr(train, "LOSSES", LOSSES)
    write_config(run.config, discriminator_train_start_steps=1)
    step = train.training_step
    added = lambda *args: step(*args) | {"gen_loss_wave": torch.tensor(2.0)}  # noqa: E731
    monkeypatch.setattr(train, "training_step", added)
    monkeypatch.setitem(
        train.run.__kwdefaults__, "losses", (*LOSSES, Loss("gen_loss_wave", "Wave"))
    )
    run(2, "--stdout_interval", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Steps : ")]
    number = r"\d+\.\d{4}"
    first, last = (
        rf"Steps : {step}, Gen Loss Total : {number},{disc} Mel-Spec\. Error : {number}, "
        rf"Wave : 2\.0000, s/b : \d+\.\d{{3}}"
        for step, disc in ((1, ""), (2, f" Disc Loss Total : {number},"))
    )
    assert re.fullmatch(first, lines[0]) and re.fullmatch(last, lines[1])


def test_tensorboard_is_purged_back_to_the_checkpoint(run):
    intervals = ("--summary_interval", 1, "--validation_interval", 2, "--checkpoint_interval", 2)
    run(4, *intervals)
    for prefix in ("g", "do"):
        checkpoint_path(run.folder, prefix, 4).unlink()
    run(4, *intervals)
    events = logged(run)
    # Entries have speeds of their own, even if lines on the terminal are rarer.
    speeds = [event.value for event in events.Scalars("training/steps_per_second")]
    assert len(set(speeds)) == 4 and min(speeds) > 0
    steps = [event.step for event in events.Scalars("training/gen_loss_total")]
    assert steps == [1, 2, 3, 4]
    tags = events.Tags()
    assert {
        *("training/mel_spec_error", "training/disc_loss_total", "training/learning_rate"),
        *("training/gradient_norm_generator", "training/steps_per_second"),
        "validation/mel_spec_error",
    } <= set(tags["scalars"])
    assert {"gt/y_0", "generated/y_hat_1"} <= set(tags["audio"])
    assert {"gt/y_spec_0", "generated/y_hat_spec_1"} <= set(tags["images"])


def test_a_run_in_bfloat16_is_warned_if_the_processor_has_none(run, monkeypatch, capsys):
    monkeypatch.setattr(utils, "computes_in_bfloat16", lambda _: False)
    assert run(1, "--precision", "bf16") == 0
    assert "this processor has no bfloat16" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- validation


def test_validation_is_the_mean_mel_error_of_whole_clips(run, corpus):
    h = load_config(run.config)
    state = build_state(h, CPU)
    clips = meldataset.MelDataset(h, corpus / "validation.txt", corpus / "wavs")

    class Shown(list):
        def clip(self, _steps, index, real, generated):
            self.append((index, real[0].shape == generated[0].shape))

    shown, random_state = Shown(), torch.get_rng_state()
    error = train.validate(state, clips, shown, StopRequest())
    assert torch.equal(random_state, torch.get_rng_state())
    assert state.generator.training
    assert shown == [(0, True), (1, True)]
    errors = []
    for mel, wav in map(clips.whole, range(2)):
        wav_hat = state.generator(mel.unsqueeze(0))[0].detach()
        errors.append(float((state.mel_for_loss(wav_hat) - state.mel_for_loss(wav)).abs().mean()))
    assert error == pytest.approx(np.mean(errors), rel=1e-5)


def test_validation_does_not_change_training(run, tmp_path):
    run(4, "--validation_interval", 1)
    run(4, "--validation_interval", 100, folder=tmp_path / "without")
    assert equal_but_meta(contents(run.folder, 4), contents(tmp_path / "without", 4))


class Instant(concurrent.futures.Executor):
    """Measures the duration of clips at once, in place of another process."""

    def submit(self, _, wavs, h):
        future = concurrent.futures.Future()
        future.set_result({"seconds": np.mean([len(wav) / h.sampling_rate for wav, _ in wavs])})
        return future


def test_metrics_of_validation_clips_are_printed_and_logged(run, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "ProcessPoolExecutor", lambda *_, **__: Instant())
    run(3, "--validation_interval", 1, "--eval_metrics")
    shown = re.findall(r"Steps : (\d), Validation metrics : seconds (.*)", capsys.readouterr().out)
    assert [steps for steps, _ in shown] == ["1", "2", "3"]
    mean = 0.4 + 0.05 * 5.5  # seconds, of the corpus' two validation clips
    events = logged(run).Scalars("validation/seconds")
    assert [event.step for event in events] == [1, 2, 3]
    for value in (*(float(mean) for _, mean in shown), *(event.value for event in events)):
        assert value == pytest.approx(mean, abs=0.012)  # clips are cut to whole frames


def test_metrics_come_from_another_process_which_outlives_a_failed_measurement(tmp_path, capsys):
    """While a validation is measured, the next one is skipped."""
    metrics, wav = BackgroundMetrics(toy_config(tmp_path)), torch.zeros(1, 22050)
    two_channels = torch.zeros(1, 2, 22050)
    metrics.submit(1, [(wav, two_channels)])
    metrics.submit(2, [(wav, wav)])
    assert metrics.finished(patience=PATIENCE) is None
    assert "Steps : 1, no validation metrics : ValueError" in capsys.readouterr().out
    metrics.submit(3, [(wav, wav)])
    steps, means = metrics.finished(patience=PATIENCE)
    assert (steps, means["mel_l1"]) == (3, 0)
    metrics.close()


def test_a_killed_metrics_process_is_one_line_and_training_continues(run, monkeypatch, capsys):
    """A segmentation fault in a broken cache of numba kills it in this way."""
    submit = BackgroundMetrics.submit

    def submit_and_kill(self, steps, pairs):
        submit(self, steps, pairs)
        if steps == 1:
            (pid,) = self.pool._processes
            os.kill(pid, signal.SIGKILL)
            concurrent.futures.wait([self.future], timeout=PATIENCE)

    monkeypatch.setattr(BackgroundMetrics, "submit", submit_and_kill)
    assert run(4, "--validation_interval", 1, "--stdout_interval", 1, "--eval_metrics") == 0
    output, errors = capsys.readouterr()
    (line,) = [line for line in output.splitlines() if "no validation metrics" in line]
    assert line.startswith("Steps : 1, no validation metrics : BrokenProcessPool")
    assert line.endswith("training goes on without metrics")
    assert "Traceback" not in errors
    assert paired_steps(run.folder) == [4]


def test_a_validation_clip_too_long_for_the_memory_ends_the_run_saved(run, monkeypatch):
    forward = Generator.forward

    def scarce(self, mel):
        if not self.training:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, mel)

    monkeypatch.setattr(Generator, "forward", scarce)
    with pytest.raises(UserError, match=r"/clip[56]\.wav: 1 s, out of memory in validation"):
        run(9, "--validation_interval", 2)
    assert paired_steps(run.folder) == [2]


# --------------------------------------------------------------------------------------------- data


def test_fine_tuning(run, corpus, tmp_path, capsys):
    """The mels are written by meldataset.py. One has an extra frame, as Tacotron 2's mels have."""
    mels = tmp_path / "ft_dataset"
    flags = ("--config", run.config, "--input_wavs_dir", corpus / "wavs", "--output_dir", mels)
    run_main(meldataset, *flags)
    mel = np.load(mels / "clip0.npy")
    np.save(mels / "clip0.npy", np.pad(mel, ((0, 0), (0, 1)), mode="edge")[None])
    fine_tuning = ("--fine_tuning", "True", "--input_mels_dir", mels)
    assert run(1, *fine_tuning) == 0
    random_weights = "no checkpoint, so fine-tuning starts from random weights"
    assert f"{run.folder}: {random_weights}; to start from a" in capsys.readouterr().out
    assert run(3, *fine_tuning, "--validation_interval", 1) == 0
    assert random_weights not in capsys.readouterr().out
    np.save(mels / "clip0.npy", mel.T)
    with pytest.raises(UserError, match=r"clip0\.npy: .*transposed"):
        run(8, *fine_tuning)


@pytest.mark.parametrize(
    ("flag", "others"), [("--input_wavs_dir", ()), ("--input_mels_dir", ("--fine_tuning", "True"))]
)
def test_a_missing_folder_is_named_with_its_flag(run, tmp_path, flag, others):
    with pytest.raises(UserError, match=rf"{tmp_path}/nowhere: no such folder; .*{flag}$"):
        run(1, flag, tmp_path / "nowhere", *others)
    assert not run.folder.exists()


def test_whole_paths_as_ids_need_no_folder(run, corpus, tmp_path):
    clips = sorted((corpus / "wavs").glob("*.wav"))
    (tmp_path / "list.txt").write_text("".join(f"{clip}\n" for clip in clips))
    lists = ("--input_training_file", "--input_validation_file")
    flags = (word for flag in lists for word in (flag, tmp_path / "list.txt"))
    assert run(1, "--input_wavs_dir", tmp_path / "nowhere", *flags) == 0


@pytest.mark.parametrize("clip", ["clip3", "clip6"])
def test_a_file_that_is_no_audio_is_found_at_the_start(run, corpus, tmp_path, clip):
    """A training clip is found by its header. A validation clip is read whole."""
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


def test_without_validation_clips_a_run_says_so(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    run(1, "--input_validation_file", tmp_path / "empty.txt", "--validation_interval", 1)
    printed = capsys.readouterr().out
    assert f"{tmp_path}/empty.txt: no clips, so no validation\n" in printed
    assert printed.endswith(f"1 steps are done, saved in {run.folder}\n")


# ------------------------------------------------------------------------------------- stop signals


def hang_in_the_second_epoch() -> None:
    """Lets each clip of the second epoch take WAITS seconds."""
    load = meldataset.MelDataset.__getitem__

    def hanging(self, key):
        if key[0] == 1:
            time.sleep(WAITS)
        return load(self, key)

    meldataset.MelDataset.__getitem__ = hanging


def hang_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hang_in_the_second_epoch()


@pytest.fixture
def start(run, tmp_path):
    """Starts an endless trainer; it does not outlive the test."""
    started = []

    def start(prepare, **changes):
        write_config(run.config, **changes)
        flags = ("--checkpoint_path", run.folder, "--stdout_interval", 1)
        started.append(kill.start([*run.arguments, *flags], tmp_path / "log", prepare))
        wait_for("Steps : 2,", tmp_path / "log", started[0])
        return started[0]

    yield start
    for process in started:
        if process.is_alive():
            for pid in (*workers_of(process), process.pid):
                os.kill(pid, signal.SIGKILL)


def workers_of(process) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


@pytest.mark.parametrize(
    ("num_workers", "prepare", "ignored", "number"),
    [
        (0, hang_under_nohup, signal.SIGHUP, signal.SIGTERM),
        (2, hang_in_the_second_epoch, None, signal.SIGUSR1),
    ],
)
def test_a_signal_while_waiting_for_data_saves_and_stops(
    start, run, tmp_path, num_workers, prepare, ignored, number
):
    """Data workers may receive the signal, too, from a scheduler. They end with the trainer."""
    process = start(prepare, num_workers=num_workers)
    if ignored is not None:
        os.kill(process.pid, ignored)
        time.sleep(0.5)
        assert process.is_alive()
    workers = workers_of(process)
    for pid in (*workers, process.pid):
        os.kill(pid, number)
    process.join(AT_ONCE)
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 128 + number, output
    assert paired_steps(run.folder) == [2]
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 2, saved in {run.folder}\n" in output
    assert "Traceback" not in output
    assert len(workers) == num_workers
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_each_stop_signal_stops_at_the_end_of_an_update(run, monkeypatch, number):
    step = train.training_step

    def interrupted(state, mel, wav):
        if state.steps == 1:
            signal.raise_signal(number)
        return step(state, mel, wav)

    monkeypatch.setattr(train, "training_step", interrupted)
    assert run(9) == 128 + number
    assert paired_steps(run.folder) == [1, 2]


def test_a_signal_in_validation_stops_after_the_clip(run, corpus):
    h = load_config(run.config)
    state, stop = build_state(h, CPU), StopRequest()
    clips = meldataset.MelDataset(h, corpus / "validation.txt", corpus / "wavs")

    class Watcher(list):
        def clip(self, _steps, index, **_):
            self.append(index)
            signal.raise_signal(signal.SIGINT)

    watcher = Watcher()
    with pytest.raises(Stopped) as stopped:
        train.validate(state, clips, watcher, stop)
    assert (watcher, stopped.value.status) == ([0], 130)
    assert state.generator.training


def test_a_second_signal_ends_the_process_unless_it_is_the_same_request():
    """torchrun passes on a signal that a scheduler has sent to all processes."""
    code = (
        "import distributed, signal, time\n"
        "stop = distributed.StopRequest()\n"
        "for _ in range(2): signal.raise_signal(signal.SIGTERM)\n"
        "print(stop.status, flush=True)\n"
        "stop.received -= distributed.SAME_REQUEST\n"
        "signal.raise_signal(signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("143\n", -signal.SIGTERM)


# ------------------------------------------------------------------------------------- data workers


def test_a_killed_worker_is_one_line_and_loses_nothing(start, run, tmp_path):
    """The system kills a worker if memory runs out."""
    process = start(hang_in_the_second_epoch, num_workers=2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    process.join(PATIENCE)
    assert process.exitcode == 1
    output = (tmp_path / "log").read_text()
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in ("killed", "memory", "/dev/shm", "num_workers"))
    assert paired_steps(run.folder) == [2]


def may_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="may not mount file systems")
def test_too_little_shared_memory_is_one_line(run):
    """/dev/shm is smaller than the workers' batches, or cannot be written at all."""
    code = (
        "import subprocess, sys, train; from utils import command_line\n"
        "def run(options):\n"
        "    command = ['mount', '-t', 'tmpfs', '-o', options, 'shm', '/dev/shm']\n"
        "    subprocess.run(command, check=True)\n"
        "    try: command_line(train.main)\n"
        "    except SystemExit as end: print('status', end.code, flush=True)\n"
        "run('size=64k'); run('ro')"
    )
    write_config(run.config, num_workers=1)
    flags = [*run.arguments, "--checkpoint_path", run.folder]
    command = ["unshare", "-rm", sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5 * PATIENCE)
    assert done.stdout.count("status 1\n") == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.replace("\0", "").splitlines()  # torch ends its own line with it
    full, unwritable = [line for line in lines if line.startswith("error: ")]
    for line in (full, unwritable):
        assert all(word in line for word in ("memory", "/dev/shm", "num_workers"))
    assert "Read-only file system" in unwritable


def test_a_long_tmpdir_and_unwritable_output_do_not_stop_a_run(run, tmp_path):
    """The TMPDIR is that of a cluster's job. Standard output goes to a file on a full disk."""
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    write_config(run.config, num_workers=1)
    flags = ("--checkpoint_path", run.folder, "--training_steps", 3, "--checkpoint_interval", 2)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "train.py", *map(str, (*run.arguments, *flags))],
            env=os.environ | {"TMPDIR": str(folder)},
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=3 * PATIENCE,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert paired_steps(run.folder) == [2, 3]


def test_too_few_open_files_are_one_line_that_names_the_limit(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    try:
        with pytest.raises(UserError, match=r"the limit of open files is 40: .*`ulimit -n 1024`"):
            run(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "RANK=1 is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: expected a number, as torchrun sets it"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "RANK=2: expected less than WORLD_SIZE=2",
        ),
    ],
)
def test_left_over_variables_of_torchrun_are_named(run, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        run(1)


def failing(error: Exception):
    """Batches; getting the next one raises an error."""
    raise error
    yield


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"),
        FileNotFoundError(2, "No such file or directory", "torch_geometric"),
        KeyError("bug"),
    ],
)
def test_a_bug_is_not_reported_as_a_lack_of_memory(error):
    with pytest.raises(type(error)):
        next_batch(failing(error), StopRequest(), None)


def test_the_error_of_a_worker_is_shown_without_its_traceback():
    text = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "meldataset.py", line 1, in load\nenv.UserError: a.wav: is empty\n'
    )
    with pytest.raises(UserError, match=r"^a\.wav: is empty$"):
        next_batch(failing(UserError(text)), StopRequest(), None)
