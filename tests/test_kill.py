"""A trainer that is killed resumes from a whole pair, and arrives where an undisturbed one does."""

import os
import signal

import pytest
import torch

import utils
from checkpoint import checkpoint_path, checkpoint_steps, paired_steps
from env import UserError
from tests.runs import Run
from tools.stress.kill import Kill, kill_over_and_over
from tools.toy import write_config
from utils import atomic_write, remove_temporary_files
from weights import load_checkpoint

# In each trainer's first save, except for the last two; the first os.replace is config.json's.
CHOSEN = [
    Kill(call="torch.save", count=2, moment="in"),  # half of `g_*` is written
    Kill(call="os.replace", count=2, moment="before"),  # both are written, none is in place
    Kill(call="os.replace", count=2, moment="after"),  # `do_*` is in place
    Kill(signal.SIGTERM, delay=0.3, training=True, slow=True),
    Kill(signal.SIGHUP, delay=0.3, training=True),
]


def test_kills_change_nothing(tmp_path):
    kill_over_and_over(tmp_path, CHOSEN)


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """This matters after a power cut, not after a kill."""
    calls, path = [], tmp_path / "file"
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda h: calls.append(os.fstat(h).st_ino) or fsync(h))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert calls == [path.stat().st_ino, "replace"]


@pytest.fixture
def run(corpus, tmp_path) -> Run:
    return Run(corpus, tmp_path)


def damage(path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def dying_replace(name: str):
    """os.replace of a process that dies when it would give a file this name."""
    replace = os.replace

    def dying(source, target):
        if os.path.basename(target) == name:
            raise SystemExit("killed")
        replace(source, target)

    return dying


def test_a_new_do_never_pairs_with_the_g_of_an_earlier_attempt(run, monkeypatch):
    """The run has gone back, because a `do_*` is damaged, and takes another course."""
    run(3)
    older = load_checkpoint(checkpoint_path(run.folder, "g", 3))
    damage(checkpoint_path(run.folder, "do", 3))
    write_config(run.config, learning_rate=0.01)
    monkeypatch.setattr(os, "replace", dying_replace("g_00000003"))
    with pytest.raises(SystemExit, match="killed"):
        run(3)
    assert paired_steps(run.folder) == [1, 2]
    monkeypatch.undo()
    run(3)
    newer = load_checkpoint(checkpoint_path(run.folder, "g", 3))
    key = "conv_pre.bias"
    assert not torch.equal(newer["generator"][key], older["generator"][key])


def test_a_save_that_fails_halfway_loses_no_older_file(run, monkeypatch):
    """Nothing is renamed or removed before both files are written."""
    run(3)
    kept = checkpoint_path(run.folder, "g", 3).read_bytes()
    damage(checkpoint_path(run.folder, "do", 3))
    save = torch.save

    def full(contents, path):
        if "optim_g" in contents:
            raise OSError(28, "No space left on device")
        save(contents, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"do_00000003: cannot be written \(No space left"):
        run(3)
    assert checkpoint_path(run.folder, "g", 3).read_bytes() == kept
    assert not list(run.folder.glob(".*.tmp"))


def test_only_the_newest_pairs_are_kept(run):
    """A `do_*` without its `g_*` is not counted, nor is a damaged, newer file."""
    run(1)
    run(3, "--checkpoint_interval", 3)
    checkpoint_path(run.folder, "do", 2).touch()  # left by a kill between the two files
    checkpoint_path(run.folder, "do", 99).touch()
    run(4, "--checkpoint_interval", 1, "--keep_checkpoints", 3)
    assert paired_steps(run.folder) == [1, 3, 4]
    run(5, "--checkpoint_interval", 1, "--keep_checkpoints", 2)
    assert checkpoint_steps(run.folder, "do") == [4, 5, 99]
    assert checkpoint_steps(run.folder, "g") == [1, 3, 4, 5]


def test_only_temporary_files_of_a_run_are_removed(tmp_path):
    own = ".g_00000007.a1b2c3_4.tmp", ".do_100000000.abcdefgh.tmp", ".config.json.abcdefgh.tmp"
    others = (
        *(".g_00000007.onnx.abcdefgh.tmp", ".g_speaker_generated.wav.abcdefgh.tmp", ".lock"),
        *("g_00000007", ".do_it.abcdefgh.tmp", ".results.json.abcdefgh.tmp", ".config.json"),
    )
    for name in (*own, *others):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_what_a_kill_leaves_of_the_config_is_removed(run, monkeypatch):
    monkeypatch.setattr(os, "replace", dying_replace("config.json"))
    monkeypatch.setattr(utils.Path, "unlink", lambda *_, **__: None)  # a killed process cleans not
    with pytest.raises(SystemExit, match="killed"):
        run(1)
    monkeypatch.undo()
    assert list(run.folder.glob(".config.json.*.tmp"))
    run(1)
    assert not list(run.folder.glob(".*.tmp"))
