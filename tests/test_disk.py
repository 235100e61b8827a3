"""A disk that is full or gone, a file that vanishes, a config that changes: one line, no loss."""

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import onnx
import pytest
import soundfile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile

import export_onnx
import inference
import inference_e2e
import meldataset
import train
from checkpoint import CHANGEABLE_KEYS, checkpoint_path, paired_steps
from env import Config
from tests.test_utils import full_disk
from tools.stress.kill import start
from tools.toy import corpus_arguments, run_main, speech_like, toy_values, write_config
from utils import command_line
from weights import load_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, in depth, but for logs."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if "logs" not in p.parts}


@pytest.fixture
def outcome(capsys) -> Callable[..., tuple[int, list[str]]]:
    """Runs a script in this process; returns its exit status and its lines on standard error."""

    def outcome(module, *arguments) -> tuple[int, list[str]]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command_line(lambda: run_main(module, *arguments))
        return end.value.code, capsys.readouterr().err.splitlines()

    return outcome


class Run:
    """train.py on a copy of the toy corpus; every step is saved and logged."""

    def __init__(self, outcome, corpus: Path, tmp_path: Path):
        self.outcome = outcome
        self.corpus = shutil.copytree(corpus, tmp_path / "corpus")
        self.folder, self.config = tmp_path / "cp", write_config(tmp_path / "config.json")
        self.arguments = [*corpus_arguments(self.corpus), "--config", str(self.config)]
        for flag in ("checkpoint_interval", "summary_interval", "stdout_interval"):
            self.arguments += [f"--{flag}", "1"]

    def __call__(self, steps: int, *flags) -> tuple[int, list[str]]:
        flags = ("--checkpoint_path", self.folder, "--training_steps", steps, *flags)
        return self.outcome(train, *self.arguments, *flags)


@pytest.fixture
def run(outcome, corpus, tmp_path) -> Run:
    return Run(outcome, corpus, tmp_path)


# --- A full disk


def test_a_checkpoint_on_a_full_disk(run):
    """Whatever does not fit any more, what was there stays, and all can be done again."""
    assert run(2) == (0, [])
    sizes = {p: checkpoint_path(run.folder, p, 2).stat().st_size for p in ("g", "do")}
    before = contents(run.folder) | {".lock": None}
    for size, name in (
        *((0, "config.json"), (500, "config.json"), (1500, "do_00000003")),
        *((sizes["g"] + 100, "do_00000003"), (sizes["do"] - 100, "do_00000003")),
    ):
        with full_disk(size):
            status, (line,) = run(4)
        assert status == 1
        assert line.startswith(f"error: {run.folder / name}: cannot be written (")
        assert line.endswith(("(File too large)", "(is the disk full?)"))
        assert contents(run.folder) | {".lock": None} == before
    assert run(4) == (0, [])
    assert paired_steps(run.folder) == [2, 3, 4]


def full_logs(monkeypatch, writes: int) -> None:
    """Lets so many writes of event files succeed, and fails those that follow."""
    numbers = itertools.count()
    for name in ("write", "append"):
        write = getattr(gfile.LocalFileSystem, name)

        def limited(*arguments, write=write):
            if next(numbers) >= writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(*arguments)

        monkeypatch.setattr(gfile.LocalFileSystem, name, limited)


@pytest.mark.parametrize("writes", [0, 2, 13])
def test_logs_on_a_full_disk(run, monkeypatch, writes):
    """The run ends when it hears of it, by the next save at the latest, and loses no step."""
    full_logs(monkeypatch, writes)
    line = f"error: {run.folder / 'logs'}: cannot be written (No space left on device)"
    assert run(100, "--checkpoint_interval", 3, "--validation_interval", 2) == (1, [line])
    steps = paired_steps(run.folder)
    assert steps == [] if writes == 0 else 1 <= steps[-1] <= 6
    monkeypatch.undo()
    assert run(7) == (0, [])


def fail_the_twelfth_write_of_logs() -> None:
    full_logs(pytest.MonkeyPatch(), 12)


def test_no_traceback_follows_from_the_thread_that_logs(run, tmp_path):
    """It is another's that the interpreter would print, in a process of its own."""
    flags = (*run.arguments, "--checkpoint_path", run.folder, "--training_steps", "100")
    process = start(flags, tmp_path / "log", fail_the_twelfth_write_of_logs)
    process.join(60)
    assert process.exitcode == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == f"error: {run.folder / 'logs'}: cannot be written (No space left on device)"
    assert all(line.startswith("Steps : ") for line in lines[4:-1])  # 4 of what is about to run
    assert paired_steps(run.folder)


def test_logs_that_are_a_file(run):
    run.folder.mkdir()
    (run.folder / "logs").write_text("mine")
    line = f"error: {run.folder / 'logs'}: cannot be written (File exists)"
    assert run(2) == (1, [line])
    assert (run.folder / "logs").read_text() == "mine"


def test_logs_are_whole_up_to_the_checkpoint(run, monkeypatch):
    """What a killed run has logged up to its last save does not wait in memory."""
    append = gfile.LocalFileSystem.append

    def slow(*arguments):
        time.sleep(0.02)  # a slow disk
        append(*arguments)

    monkeypatch.setattr(gfile.LocalFileSystem, "append", slow)
    seen = []

    def looking(*arguments, **flags):
        events = EventAccumulator(str(run.folder / "logs"))
        events.Reload()
        tags = events.Tags()["scalars"]
        seen.append({tag: [event.step for event in events.Scalars(tag)] for tag in tags})
        save(*arguments, **flags)

    save = train.save
    monkeypatch.setattr(train, "save", looking)
    assert run(2) == (0, [])
    first, second = seen
    assert len(first) >= 8
    assert all(steps == [1] for steps in first.values())
    assert all(steps == [1, 2] for steps in second.values())


@pytest.fixture
def speech(exported, tmp_path) -> Path:
    """A folder with wavs/ and mels/ of 3 clips, the second one long."""
    for i, seconds in enumerate((0.3, 2.0, 0.3)):
        path = tmp_path / f"wavs/{i}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, speech_like(seconds), 22050, subtype="PCM_16")
    flags = ("--config", exported / "config.json", "--input_wavs_dir", tmp_path / "wavs")
    assert run_main(meldataset, *flags, "--output_dir", tmp_path / "mels") == 0
    return tmp_path


VOCODERS = {
    inference: ("--input_wavs_dir", "wavs", ""),
    inference_e2e: ("--input_mels_dir", "mels", "_e2e"),
}


@pytest.mark.parametrize("script", VOCODERS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("flags", "size", "written"),
    [((), 20, []), ((), 30_000, ["0"]), (("--chunk_frames", 16), 80_000, ["0"])],
)
def test_speech_on_a_full_disk(outcome, exported, speech, script, flags, size, written):
    """The run ends: no third file is tried, and nothing of the second is left."""
    flag, kind, ending = VOCODERS[script]
    flags = (*flags, flag, speech / kind, "--output_dir", speech / "out", "--device", "cpu")
    with full_disk(size):
        status, (line,) = outcome(script, *flags, "--checkpoint_file", exported / "g_00500000")
    failed = speech / f"out/{len(written)}_generated{ending}.wav"
    assert (status, line) == (1, f"error: {failed}: cannot be written (File too large)")
    assert os.listdir(speech / "out") == [f"{name}_generated{ending}.wav" for name in written]
    for path in (speech / "out").iterdir():
        assert soundfile.info(path).frames == int(0.3 * 22050) // 256 * 256


def test_mels_on_a_full_disk(outcome, exported, speech):
    flags = ("--config", exported / "config.json", "--input_wavs_dir", speech / "wavs/0.wav")
    with full_disk(5000):
        status, (line,) = outcome(meldataset, *flags, "--output_dir", speech / "out")
    failed = f"{speech / 'out/0.npy'}: cannot be written (File too large)"
    assert (status, line.split(": ", 1)[1]) == (1, failed)
    assert os.listdir(speech / "out") == []


def test_an_export_on_a_full_disk(outcome, exported, tmp_path, monkeypatch):
    model = onnx.load(exported / "misrnet.onnx")
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_: model)
    flags = ("--checkpoint_file", exported / "g_00500000", "--output", tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_text("old")
    with full_disk(50_000):
        status, lines = outcome(export_onnx, *flags)
    assert (status, lines) == (
        1,
        [f"error: {tmp_path / 'a.onnx'}: cannot be written (File too large)"],
    )
    assert contents(tmp_path) == {"a.onnx": b"old"}


# --- Places that are none


@pytest.mark.parametrize("place", ["file", "file/cp", "file/deeper/cp"])
def test_a_checkpoint_path_that_is_no_folder(run, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    run.folder = tmp_path / place
    status, (line,) = run(2)
    assert status == 1
    assert line.startswith(f"error: {run.folder}: cannot be written (")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/deeper"])
@pytest.mark.parametrize("script", VOCODERS, ids=lambda script: script.__name__)
def test_an_output_dir_that_is_no_folder(outcome, exported, speech, script, place):
    (speech / "file").write_text("mine")
    flag, kind, _ = VOCODERS[script]
    flags = (flag, speech / kind, "--output_dir", speech / place, "--device", "cpu")
    status, (line,) = outcome(script, *flags, "--checkpoint_file", exported / "g_00500000")
    assert status == 1
    assert line.startswith(f"error: {speech / place}/0_generated") and "cannot be written" in line
    assert (speech / "file").read_text() == "mine"


def test_a_name_may_be_as_long_as_the_file_system_allows(outcome, exported, speech):
    name = "ä" * 100 + "x" * (255 - 200 - len("_generated.wav"))
    (speech / "wavs/0.wav").rename(speech / f"wavs/{name}.wav")
    flags = ("--input_wavs_dir", speech / "wavs", "--output_dir", speech / "out")
    flags += ("--checkpoint_file", exported / "g_00500000", "--device", "cpu")
    assert outcome(inference, *flags) == (0, [])
    assert (speech / f"out/{name}_generated.wav").exists()


# --- What vanishes while a run goes on


def after_step(monkeypatch, steps: int, act: Callable[[], None]) -> None:
    """Calls `act` once the trainer has made so many steps."""
    numbers, training_step = itertools.count(1), train.training_step

    def step(*arguments):
        losses = training_step(*arguments)
        if next(numbers) == steps:
            act()
        return losses

    monkeypatch.setattr(train, "training_step", step)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_vanished_clip(run, monkeypatch, num_workers):
    write_config(run.config, num_workers=num_workers)
    after_step(monkeypatch, 2, lambda: shutil.rmtree(run.corpus / "wavs"))
    status, (line,) = run(100)
    assert status == 1
    assert line.startswith(f"error: {run.corpus / 'wavs/clip'}")
    assert "cannot be read as audio" in line
    assert 2 <= paired_steps(run.folder)[-1] <= 4  # workers have read ahead


def test_a_vanished_mel(run, monkeypatch, tmp_path):
    mels = ("--config", run.config, "--input_wavs_dir", run.corpus / "wavs")
    assert run_main(meldataset, *mels, "--output_dir", tmp_path / "mels") == 0
    after_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "mels"))
    flags = ("--fine_tuning", "True", "--input_mels_dir", tmp_path / "mels")
    status, (line,) = run(100, *flags)
    assert status == 1
    assert line.startswith(f"error: {tmp_path / 'mels/clip'}")
    assert paired_steps(run.folder)[-1] == 2


def test_a_vanished_validation_clip_loses_no_step(run, monkeypatch):
    after_step(monkeypatch, 3, (run.corpus / "wavs/clip6.wav").unlink)
    flags = ("--checkpoint_interval", 100, "--validation_interval", 3)
    status, (line,) = run(100, *flags)
    assert status == 1
    assert line.startswith(f"error: {run.corpus / 'wavs/clip6.wav'}: cannot be read as audio")
    assert paired_steps(run.folder) == [3]
    monkeypatch.undo()
    status, (line,) = run(4)  # said at the start from now on
    assert (status, "clip6" in line, paired_steps(run.folder)) == (1, True, [3])


def test_a_vanished_list(run, monkeypatch):
    """It is read once, at the start."""
    after_step(monkeypatch, 1, (run.corpus / "training.txt").unlink)
    assert run(3) == (0, [])
    before = contents(run.folder)
    status, (line,) = run(4)
    assert status == 1
    assert line.startswith(f"error: {run.corpus / 'training.txt'}: cannot be read")
    assert contents(run.folder) == before


# --- A config that changes from resume to resume

CHANGES = {
    "segment_size": 4096,
    "batch_size": 3,
    "learning_rate": 0.001,
    "adam_b1": 0.5,
    "adam_b2": 0.9,
    "lr_decay": 0.5,
    "seed": 7,
    "num_workers": 1,
    "lambda_mel": 10,
    "lambda_feature": 1,
    "lambda_f0": 50,
    "lambda_aperiodicity": 50,
    "discriminator_train_start_steps": 2,
    "fmax_for_loss": 8000,
    "n_ffts_for_loss": [512, 1024],
    "num_mels_for_loss": [20, 40],
}


def test_how_a_run_learns_may_change(run):
    of_frames = {"griffin_lim_steps"}  # test_train.py has it change
    assert CHANGES.keys() | of_frames == CHANGEABLE_KEYS <= {each.name for each in fields(Config)}
    assert run(1) == (0, [])
    write_config(run.config, **CHANGES)
    assert run(3) == (0, [])
    assert json.loads((run.folder / "config.json").read_text()) == toy_values(**CHANGES)
    do = load_checkpoint(checkpoint_path(run.folder, "do", 3))
    group = do["optim_g"]["param_groups"][0]
    assert group["betas"] == (0.5, 0.9)
    assert group["lr"] == pytest.approx(0.001 * 0.5**2)  # step 3 was the third epoch's


UNSEEN = [  # no shape tells these; older g_* files would be read with the new config
    *({"sampling_rate": 24000}, {"fmin": 50}, {"fmax": 7600}, {"fmax": None}, {"win_size": 800}),
    *({"n_fft": 2048}, {"hop_size": 128, "upsample_rates": [8, 4, 2, 2]}),
    *({"upsample_rates": [4, 16, 2, 2]}, {"resblock_dilation_sizes": [1, 3, 9]}),
]
UNFIT = [
    *({"upsample_initial_channel": 32}, {"num_mels": 100}, {"resblock_num": 2}),
    *({"resblock_kernel_size": 5}, {"misr_merge": "conv"}, {"discriminator_channel_mult": 0.5}),
]


def test_what_a_run_learns_may_not_change(run):
    assert run(1) == (0, [])
    before = contents(run.folder)
    for changes in (*UNSEEN, *UNFIT):
        write_config(run.config, **changes)
        status, (line,) = run(3)
        assert status == 1
        assert any(line.startswith(f"error: {run.folder}/config.json: {key} = ") for key in changes)
        assert "expected the same model, mel and optimizer" in line
        assert contents(run.folder) == before
