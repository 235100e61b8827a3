"""Files in and out, checkpoints and the command line: nothing is lost, and errors name the file."""

import argparse
import os
import pickle
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from audio import write_npy, write_wav
from checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_matching,
    load_optimizer,
    load_weights,
    paired_steps,
)
from env import UserError
from tools.toy import ROOT, save_checkpoint
from utils import Job, boolean, command_line, plan_outputs, positive, process_files, replacing


def write_files(folder: Path, *names: str) -> None:
    """Makes files, and the folders they lie in, that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@contextmanager
def full_disk(size: int = 1000):
    """Lets no file grow past `size` bytes: writing fails half way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- Waveforms


@pytest.mark.parametrize(
    "value, pcm",
    [
        (0.0, 0),
        (1.0, 32767),
        (-1.0, -32767),
        (0.4 / 32767, 0),
        (0.6 / 32767, 1),
        (-0.6 / 32767, -1),
        (1.0001, 32767),
        (-1.0001, -32767),
        (2.5, 32767),
        (-2.5, -32767),
        (1e6, 32767),
        (-1e6, -32767),
    ],
)
def test_a_sample_is_clamped_and_rounded(tmp_path, value, pcm):
    write_wav(tmp_path / "a.wav", [torch.tensor([value])], sampling_rate=22050)
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert samples.tolist() == [pcm]


def test_a_wav_is_mono_pcm_16_within_half_a_step(tmp_path):
    wav = torch.rand(4000) * 2 - 1
    write_wav(tmp_path / "a.wav", [wav], sampling_rate=24000)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)
    assert (info.samplerate, info.frames) == (24000, 4000)
    pcm, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.abs(pcm - 32767 * wav.double().numpy()).max() <= 0.501


# --- Whole files or none


def test_replacing_writes_the_file_and_its_folders(tmp_path):
    path = tmp_path / "new" / "folders" / "file"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_old_contents_survive_an_exception_half_way(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    saved = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("new")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(saved)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("place", ["a_file/out.wav", "a_file/deeper/out.wav", "a_folder"])
def test_an_unwritable_place_is_named(tmp_path, place):
    write_files(tmp_path, "a_file", "a_folder/inside")
    path = tmp_path / place
    with pytest.raises(UserError) as error, replacing(path) as temporary:
        temporary.write_text("new")
    assert str(error.value).startswith(f"{path}: cannot be written")
    assert sorted(os.listdir(tmp_path)) == ["a_file", "a_folder"]


WRITERS = {
    "write_wav": lambda path: write_wav(path, [torch.zeros(10_000)], sampling_rate=22050),
    "write_npy": lambda path: write_npy(path, np.zeros(10_000)),
    "save_checkpoint": lambda path: save_checkpoint(path, {"generator": torch.zeros(10_000)}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, writer):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError) as error, full_disk():
        WRITERS[writer](path)
    assert str(error.value).startswith(f"{path}: cannot be written")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# --- Which files to make


def planned(tmp_path: Path, output_dir: str = "out") -> dict[str, str]:
    """The plan for the folder `in` as {input: output}, relative to `tmp_path`."""
    jobs = plan_outputs(tmp_path / "in", (".wav", ".flac"), tmp_path / output_dir, "_new.wav")
    return {str(i.relative_to(tmp_path)): str(o.relative_to(tmp_path)) for i, o in jobs}


def test_the_structure_of_a_folder_is_kept(tmp_path):
    write_files(tmp_path / "in", "a.wav", "b.c.flac", "sub/a.wav", "sub/deeper/D.WAV")
    assert planned(tmp_path) == {
        "in/a.wav": "out/a_new.wav",
        "in/b.c.flac": "out/b.c_new.wav",
        "in/sub/a.wav": "out/sub/a_new.wav",
        "in/sub/deeper/D.WAV": "out/sub/deeper/D_new.wav",
    }


def test_one_file_is_enough(tmp_path):
    write_files(tmp_path, "sub/a.wav", "sub/b.wav")
    jobs = plan_outputs(tmp_path / "sub/a.wav", (".wav",), tmp_path / "out", "_new.wav")
    assert jobs == [(tmp_path / "sub/a.wav", tmp_path / "out/a_new.wav")]


def test_other_files_are_counted_and_passed_over(tmp_path, capsys):
    write_files(tmp_path / "in", "a.wav", "notes.txt", "sub/README", "wav")
    assert list(planned(tmp_path)) == ["in/a.wav"]
    assert "3 files passed over" in capsys.readouterr().out


def test_two_inputs_with_one_output_are_an_error(tmp_path):
    write_files(tmp_path / "in", "0.wav", "sub/a.flac", "sub/a.wav")
    with pytest.raises(UserError) as error:
        planned(tmp_path)
    for name in ("in/sub/a.flac", "in/sub/a.wav", "out/sub/a_new.wav"):
        assert str(tmp_path / name) in str(error.value)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    "output_dir, earlier_output",
    [
        ("in/out", "in/out/a_new.wav"),  # inside the inputs: what it holds is no input
        ("out", "out/a_new.wav"),
        (".", "a_new.wav"),  # around the inputs: they are inputs all the same
    ],
)
def test_outputs_are_not_read_again(tmp_path, output_dir, earlier_output):
    write_files(tmp_path, "in/a.wav", earlier_output)
    assert planned(tmp_path, output_dir) == {"in/a.wav": earlier_output}


def test_a_folder_may_be_its_own_output(tmp_path):
    write_files(tmp_path, "in/a.wav")
    assert planned(tmp_path, output_dir="in") == {"in/a.wav": "in/a_new.wav"}


@pytest.mark.parametrize("files", [(), ("in/notes.txt",), ("in/out/a_new.wav",)])
def test_nothing_to_do_is_an_error(tmp_path, files):
    (tmp_path / "in").mkdir()
    write_files(tmp_path, *files)
    with pytest.raises(UserError, match=r"in: no files with an extension of \.wav, \.flac"):
        planned(tmp_path, output_dir="in/out")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        planned(tmp_path)
    assert str(error.value) == f"{tmp_path / 'in'}: no such file or folder"


@pytest.mark.parametrize("bad, status", [((), 0), (("b",), 1), (("a", "b", "c"), 1)])
def test_a_bad_file_is_named_and_the_others_are_done(bad, status, capsys):
    done = []

    def process(batch: list[Job]) -> Iterator[UserError]:
        for job in batch:
            if job.source.name in bad:
                yield UserError(f"{job.source}: broken")
            else:
                done.append(job)

    jobs = [Job(Path("in", name), Path("out", name)) for name in "abc"]
    assert process_files([jobs[:2], jobs[2:]], process) == status
    assert done == [job for job in jobs if job.source.name not in bad]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"skipped: in/{name}: broken" for name in bad]
    assert f"{3 - len(bad)} files written" in printed.out
    assert (f"{len(bad)} skipped" in printed.out) == bool(bad)


# --- Checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    contents = {
        "generator": {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).double()},
        "steps": 5000,
        "rates": [1e-4, 2.5],
        "name": "toy",
    }
    save_checkpoint(tmp_path / "g", contents)
    loaded = load_checkpoint(tmp_path / "g")
    weights = loaded.pop("generator")
    assert loaded == {key: contents[key] for key in ("steps", "rates", "name")}
    assert weights.keys() == contents["generator"].keys()
    for key, value in contents["generator"].items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=0)


def missing(path: Path) -> None:
    pass


def a_folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.touch()


def random_bytes(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def text(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<title>404. Not found.</title>\n")


def truncated(path: Path) -> None:
    save_checkpoint(path, {"generator": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_dictionary(path: Path) -> None:
    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    "make", [missing, a_folder, empty, random_bytes, text, truncated, no_dictionary]
)
def test_an_unusable_checkpoint_is_named(tmp_path, make):
    path = tmp_path / "g_00000001"
    make(path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


class Touch:
    """Unpickles into a new file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def zipped(contents, path: Path) -> None:
    torch.save(contents, path)


def legacy(contents, path: Path) -> None:
    torch.save(contents, path, _use_new_zipfile_serialization=False)


def pickled(contents, path: Path) -> None:
    path.write_bytes(pickle.dumps(contents, protocol=2))


@pytest.mark.parametrize("save", [zipped, legacy, pickled])
def test_code_in_a_checkpoint_is_not_run(tmp_path, save):
    path, trace = tmp_path / "g_00000001", tmp_path / "trace"
    save({"generator": Touch(trace)}, path)
    if save is pickled:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    trace.unlink()  # so the code is there, and works
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: not a readable checkpoint")
    assert not trace.exists()


def layers(a: int, b: int) -> nn.Module:
    """Two normalised convolutions, `0` and `1`, of a and b channels."""
    return nn.Sequential(weight_norm(nn.Conv1d(1, a, 3)), weight_norm(nn.Conv1d(1, b, 3)))


def test_weights_are_taken_whole():
    source, target = layers(2, 3), layers(2, 3)
    load_weights(target, source.state_dict(), "g_00000001")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


@pytest.mark.parametrize(
    "weights, difference",
    [
        (layers(2, 4).state_dict(), "1.bias"),
        ({k: v for k, v in layers(2, 3).state_dict().items() if k != "0.bias"}, "0.bias"),
        (layers(2, 3).state_dict() | {"2.bias": torch.zeros(1)}, "2.bias"),
        (layers(2, 3).state_dict() | {"0.bias": "text"}, "0.bias"),
        ([1, 2], "list"),
        (None, "None"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, difference):
    with pytest.raises(UserError) as error:
        load_weights(layers(2, 3), weights, "cp/g_00000001")
    message = str(error.value)
    assert message.startswith("cp/g_00000001: does not fit the config: ")
    assert difference in message
    assert "\n" not in message


def trained(learning_rate: float, shapes=((2, 3), (4,))) -> torch.optim.Optimizer:
    """An optimizer after two updates of parameters of these shapes."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.8, 0.99))
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer


def test_an_optimizer_gets_the_moments_and_keeps_its_rate():
    source, target = trained(0.1), trained(0.001)
    load_optimizer(target, source.state_dict(), "do_00000002")
    assert target.param_groups[0]["lr"] == 0.001
    pairs = zip(source.param_groups[0]["params"], target.param_groups[0]["params"], strict=True)
    for theirs, ours in pairs:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(target.state[ours][name], source.state[theirs][name])


def without(key: str) -> dict:
    return {k: v for k, v in trained(0.1).state_dict().items() if k != key}


@pytest.mark.parametrize(
    "saved",
    [
        trained(0.1, shapes=((2, 3),)).state_dict(),
        trained(0.1, shapes=((2, 3), (4,), (1,))).state_dict(),
        trained(0.1, shapes=((4,), (2, 3))).state_dict(),
        without("param_groups"),
        without("state"),
        {"state": None, "param_groups": trained(0.1).state_dict()["param_groups"]},
        {"state": {}, "param_groups": []},
        [],
        None,
    ],
    ids=["fewer", "more", "swapped", "no groups", "no state", "null", "no group", "list", "none"],
)
def test_moments_that_do_not_fit_are_named(saved):
    with pytest.raises(UserError) as error:
        load_optimizer(trained(0.001), saved, "cp/do_00000002")
    assert str(error.value).startswith("cp/do_00000002: its optimizer does not fit the config")


def test_matching_layers_are_taken_and_the_rest_is_named():
    target, source = layers(2, 3), layers(2, 4)  # layer 1 differs
    before = {key: value.clone() for key, value in target.state_dict().items()}
    weights = source.state_dict() | {"2.bias": torch.zeros(1)}
    assert load_matching(target, weights) == (["0"], ["1", "2"])
    for key, value in target.state_dict().items():
        assert torch.equal(value, weights[key] if key.startswith("0.") else before[key])


def test_a_layer_is_taken_whole_or_not_at_all():
    target, weights = layers(2, 3), layers(2, 3).state_dict()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    weights["1.bias"] = torch.zeros(7)  # its weight would match
    assert load_matching(target, weights) == (["0"], ["1"])
    for key, value in target.state_dict().items():
        assert torch.equal(value, weights[key] if key.startswith("0.") else before[key])


# --- Which checkpoints there are

JUNK = (
    *("g_", "g_5", "g_0000005", "g_0000000x", "g_00000005.tmp", "xg_00000005", ".g_00000005.a.tmp"),
    *("config.json", "logs", "do_latest", "G_00000005", "g_-0000005", "g_00000005 (1)"),
)


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    steps = (99_999_999, 100_000_000, 5, 20_000)
    write_files(tmp_path, *(checkpoint_path("", "g", each).name for each in steps), *JUNK)
    write_files(tmp_path, "do_00000007", "do_00020000", "do_00000005", "do_100000000")
    assert checkpoint_steps(tmp_path, "g") == [5, 20_000, 99_999_999, 100_000_000]
    assert checkpoint_steps(tmp_path, "do") == [5, 7, 20_000, 100_000_000]
    assert paired_steps(tmp_path) == [5, 20_000, 100_000_000]


def test_no_folder_holds_no_checkpoints(tmp_path):
    assert checkpoint_steps(tmp_path / "none", "g") == []
    assert paired_steps(tmp_path / "none") == []


def test_a_checkpoint_has_hifigan_s_name():
    assert checkpoint_path("cp", "g", 5000) == Path("cp/g_00005000")


# --- The command line


@pytest.mark.parametrize(
    "parse, word, value",
    [
        (boolean, "True", True),
        (boolean, "false", False),
        (boolean, "FALSE", False),
        (positive, "1", 1),
        (positive, "0012", 12),
    ],
)
def test_words_of_the_command_line(parse, word, value):
    assert parse(word) is value


@pytest.mark.parametrize(
    "parse, word",
    [
        *((boolean, word) for word in ("", "yes", "0", "1", "None", "True ")),
        *((positive, word) for word in ("", "0", "-1", "+1", "1.5", "1e3", "two", "1_0", "²")),
    ],
)
def test_other_words_are_refused(parse, word):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(word)
    assert repr(word) in str(error.value)


@pytest.mark.parametrize("status", [0, 1, None])
def test_a_script_exits_with_its_status(status):
    with pytest.raises(SystemExit) as end:
        command_line(lambda: status)
    assert end.value.code == status


class BrokenClips(torch.utils.data.Dataset):
    """Fails as a data worker does that meets a broken clip."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise UserError("clip.wav: broken\n  at\tframe: 7")


def in_this_process():
    BrokenClips()[0]


def in_a_worker():
    next(iter(torch.utils.data.DataLoader(BrokenClips(), num_workers=1)))


@pytest.mark.parametrize("main", [in_this_process, in_a_worker])
def test_an_error_of_the_user_is_one_line(main, capsys):
    with pytest.raises(SystemExit) as end:
        command_line(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: clip.wav: broken at frame: 7\n"


def test_any_other_error_keeps_its_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command_line(main)


SPAWN = """
from concurrent.futures import ProcessPoolExecutor
import multiprocessing, os, time
from utils import end_with_parent
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    command = [sys.executable, tmp_path / "spawn.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        stat_file = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert is_alive(stat_file)
        parent.kill()
    deadline = time.monotonic() + 30
    while is_alive(stat_file):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(stat_file: Path) -> bool:
    """False for a process that is gone, or dead and not yet asked how it ended."""
    try:
        return stat_file.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
