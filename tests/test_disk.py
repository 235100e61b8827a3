"""Full disks, unusable paths, deleted files, changed configs: one line, and no step is lost."""

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile

import inference
import inference_e2e
import meldataset
import train
from checkpoint import CHANGEABLE_KEYS, checkpoint_path, paired_steps
from tests.test_utils import full_disk
from tools.stress.kill import start
from tools.toy import corpus_arguments, run_main, speech_like, toy_values, write_config
from utils import command_line
from weights import load_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files of a folder and its subfolders, except logs."""
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
    """Runs train.py on a copy of the toy corpus. Every step is saved and logged."""

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


# ---------------------------------------------------------------------------------- a full disk


def test_a_checkpoint_on_a_full_disk(run):
    """Whichever file does not fit, the old files stay, and the run can be resumed."""
    assert run(2) == (0, [])
    sizes = {p: checkpoint_path(run.folder, p, 2).stat().st_size for p in ("g", "do")}
    before = contents(run.folder) | {".lock": None}
    for size, name in (
        *((500, "config.json"), (1500, "do_00000003")),
        (sizes["do"] - 100, "do_00000003"),
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
    """Makes writes of event files fail after the first `writes`."""
    numbers = itertools.count()
    for name in ("write", "append"):
        write = getattr(gfile.LocalFileSystem, name)

        def limited(*arguments, write=write):
            if next(numbers) >= writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(*arguments)

        monkeypatch.setattr(gfile.LocalFileSystem, name, limited)


@pytest.mark.parametrize("writes", [0, 13])
def test_logs_on_a_full_disk(run, monkeypatch, writes):
    """The run ends at the next save at the latest, and loses no step."""
    full_logs(monkeypatch, writes)
    line = f"error: {run.folder / 'logs'}: cannot be written (No space left on device)"
    assert run(100, "--checkpoint_interval", 3, "--validation_interval", 2) == (1, [line])
    steps = paired_steps(run.folder)
    assert steps == [] if writes == 0 else 1 <= steps[-1] <= 6
    monkeypatch.undo()
    assert run(7) == (0, [])


def fail_the_twelfth_write_of_logs() -> None:
    full_logs(pytest.MonkeyPatch(), 12)


def test_the_thread_that_writes_logs_prints_no_traceback(run, tmp_path):
    """Python prints such tracebacks itself, so this needs a process."""
    flags = (*run.arguments, "--checkpoint_path", run.folder, "--training_steps", "100")
    process = start(flags, tmp_path / "log", fail_the_twelfth_write_of_logs)
    process.join(60)
    assert process.exitcode == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == f"error: {run.folder / 'logs'}: cannot be written (No space left on device)"
    assert all(line.startswith("Steps : ") for line in lines[4:-1])  # 4 describe the run
    assert paired_steps(run.folder)


def test_a_file_named_logs(run):
    run.folder.mkdir()
    (run.folder / "logs").write_text("mine")
    line = f"error: {run.folder / 'logs'}: cannot be written (File exists)"
    assert run(2) == (1, [line])
    assert (run.folder / "logs").read_text() == "mine"


def test_logs_are_on_disk_before_the_checkpoint(run, monkeypatch):
    """A killed run then loses no logs of the steps that it has saved."""
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
    """A folder with wavs/ and mels/ of 3 clips, of which the second is long."""
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
    [((), 20, []), (("--chunk_frames", 16), 30_000, ["0"])],
)
def test_vocoding_on_a_full_disk_ends_at_the_first_failure(
    outcome, exported, speech, script, flags, size, written
):
    """The third file is not tried, and nothing of the second is left."""
    flag, kind, ending = VOCODERS[script]
    flags = (*flags, flag, speech / kind, "--output_dir", speech / "out", "--device", "cpu")
    with full_disk(size):
        status, (line,) = outcome(script, *flags, "--checkpoint_file", exported / "g_00500000")
    failed = speech / f"out/{len(written)}_generated{ending}.wav"
    assert (status, line) == (1, f"error: {failed}: cannot be written (File too large)")
    assert os.listdir(speech / "out") == [f"{name}_generated{ending}.wav" for name in written]
    for path in (speech / "out").iterdir():
        assert soundfile.info(path).frames == int(0.3 * 22050) // 256 * 256


# ------------------------------------------------------------------------------ unusable paths


@pytest.mark.parametrize("place", ["file", "file/deeper/cp"])
def test_a_checkpoint_path_that_is_not_a_folder(run, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    run.folder = tmp_path / place
    status, (line,) = run(2)
    assert status == 1
    assert line.startswith(f"error: {run.folder}: cannot be written (")
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------- files deleted while a run goes on


def after_step(monkeypatch, steps: int, act: Callable[[], None]) -> None:
    """Calls `act` after so many training steps."""
    numbers, training_step = itertools.count(1), train.training_step

    def step(*arguments):
        losses = training_step(*arguments)
        if next(numbers) == steps:
            act()
        return losses

    monkeypatch.setattr(train, "training_step", step)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_deleted_clip(run, monkeypatch, num_workers):
    write_config(run.config, num_workers=num_workers)
    after_step(monkeypatch, 2, lambda: shutil.rmtree(run.corpus / "wavs"))
    status, (line,) = run(100)
    assert status == 1
    assert line.startswith(f"error: {run.corpus / 'wavs/clip'}")
    assert "cannot be read as audio" in line
    assert 2 <= paired_steps(run.folder)[-1] <= 4  # workers read ahead


def test_a_deleted_validation_clip_loses_no_step(run, monkeypatch):
    after_step(monkeypatch, 3, (run.corpus / "wavs/clip6.wav").unlink)
    flags = ("--checkpoint_interval", 100, "--validation_interval", 3)
    status, (line,) = run(100, *flags)
    assert status == 1
    assert line.startswith(f"error: {run.corpus / 'wavs/clip6.wav'}: cannot be read as audio")
    assert paired_steps(run.folder) == [3]
    monkeypatch.undo()
    status, (line,) = run(4)  # found at the start from now on
    assert (status, "clip6" in line, paired_steps(run.folder)) == (1, True, [3])


def test_a_deleted_list(run, monkeypatch):
    """A list is read only at the start, so the run continues."""
    after_step(monkeypatch, 1, (run.corpus / "training.txt").unlink)
    assert run(3) == (0, [])
    before = contents(run.folder)
    status, (line,) = run(4)
    assert status == 1
    assert line.startswith(f"error: {run.corpus / 'training.txt'}: cannot be read")
    assert contents(run.folder) == before


# ----------------------------------------------------------------- a config changed before a resume

CHANGES = {
    "segment_size": 4096,
    "batch_size": 3,
    "learning_rate": 0.001,
    "adam_b1": 0.5,
    "adam_b2": 0.9,
    "lr_decay": 0.5,
    "seed": 7,
    "num_workers": 1,
    "mel_blur": 0.5,
    "lambda_mel": 10,
    "lambda_feature": 1,
    "lambda_f0": 50,
    "lambda_aperiodicity": 50,
    "discriminator_train_start_steps": 2,
    "fmax_for_loss": 8000,
    "n_ffts_for_loss": [512, 1024],
    "num_mels_for_loss": [20, 40],
}


def test_keys_of_the_training_may_change(run):
    frame_rate_keys = {"griffin_lim_steps", "lambda_f0", "lambda_aperiodicity"}
    assert CHANGES.keys() <= CHANGEABLE_KEYS <= CHANGES.keys() | frame_rate_keys
    assert run(1) == (0, [])
    write_config(run.config, **CHANGES)
    assert run(3) == (0, [])
    assert json.loads((run.folder / "config.json").read_text()) == toy_values(**CHANGES)
    do = load_checkpoint(checkpoint_path(run.folder, "do", 3))
    group = do["optim_g"]["param_groups"][0]
    assert group["betas"] == (0.5, 0.9)
    assert group["lr"] == pytest.approx(0.001 * 0.5**2)  # step 3 was the third epoch's


UNSEEN = [  # changes that no shape of a tensor shows; older g_* files would be read with them
    *({"sampling_rate": 24000}, {"fmax": None}, {"win_size": 800}),
    *({"upsample_rates": [4, 16, 2, 2]}, {"resblock_dilation_sizes": [1, 3, 9]}),
]
UNFIT = [{"num_mels": 100}, {"misr_merge": "conv"}, {"discriminator_channel_mult": 0.5}]


def test_keys_of_the_model_and_the_mel_may_not_change(run):
    assert run(1) == (0, [])
    before = contents(run.folder)
    for changes in (*UNSEEN, *UNFIT):
        write_config(run.config, **changes)
        status, (line,) = run(3)
        assert status == 1
        assert any(line.startswith(f"error: {run.folder}/config.json: {key} = ") for key in changes)
        assert "expected the same model, mel and optimizer" in line
        assert contents(run.folder) == before
