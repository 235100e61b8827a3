"""Hostile files run no code, write nowhere else, and are named in one line."""

import io
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch

import evaluate
import export_onnx
import inference
import inference_e2e
import meldataset
import train
from env import load_config
from models import Generator
from tools.toy import ROOT, corpus_arguments, run_main, save_checkpoint, speech_like, write_config
from utils import command_line


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def exit_of(main: Callable[[], int | None]) -> int:
    """Returns the status of a script, whose errors are printed as for a user."""
    with pytest.raises(SystemExit) as end:
        command_line(main)
    return end.value.code or 0


def one_line_of(capsys) -> str:
    """Returns the only line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    return line


def tree(folder: Path) -> dict[str, bytes | str]:
    """Returns the contents of files and the targets of links in `folder` and its subfolders."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A toy g_ file with its config.json."""
    folder = tmp_path_factory.mktemp("cp")
    generator = Generator(load_config(write_config(folder / "config.json")))
    save_checkpoint(folder / "g_00000001", {"generator": generator.state_dict()})
    return folder / "g_00000001"


@pytest.fixture(scope="module")
def clip() -> bytes:
    """A wav file."""
    file = io.BytesIO()
    soundfile.write(file, speech_like(0.05), 22050, format="WAV", subtype="PCM_16")
    return file.getvalue()


def vocode(checkpoint: Path, inputs: Path, output_dir: Path, module=inference) -> int:
    kind = "wavs" if module is inference else "mels"
    return run_main(
        module,
        *(f"--input_{kind}_dir", inputs, "--output_dir", output_dir),
        *("--checkpoint_file", checkpoint, "--device", "cpu"),
    )


# ------------------------------------------------------------------------------------------ pickles


def train_on(corpus: Path, folder: Path, *flags) -> int:
    config = write_config(folder / "toy.json")
    return run_main(
        train,
        *(*corpus_arguments(corpus), "--config", config, "--training_steps", 1),
        *("--checkpoint_path", folder / "run", *flags),
    )


def resume(folder: Path, corpus: Path) -> int:
    (folder / "run").mkdir()
    for name in ("g_00000001", "do_00000001"):
        (folder / "run" / name).write_bytes((folder / "trap").read_bytes())
    return train_on(corpus, folder)


READERS = {
    "inference.py": lambda folder, _: vocode(folder / "trap", folder, folder / "out"),
    "inference_e2e.py": lambda folder, _: vocode(
        folder / "trap", folder, folder / "out", module=inference_e2e
    ),
    "export_onnx.py": lambda folder, _: run_main(
        export_onnx, "--checkpoint_file", folder / "trap", "--output", folder / "a.onnx"
    ),
    "train.py, resume": resume,
    "train.py --warm_start": lambda folder, corpus: train_on(
        corpus, folder, "--warm_start", folder / "trap"
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_in_a_checkpoint_is_run(reader, corpus, tmp_path, capsys):
    """tests/test_audio.py has pickled mels."""
    torch.save({"generator": {"conv_pre.bias": Trap(tmp_path / "marker")}}, tmp_path / "trap")
    torch.load(tmp_path / "trap", weights_only=False)
    (tmp_path / "marker").unlink()  # the trap works
    write_config(tmp_path / "config.json")
    assert exit_of(lambda: READERS[reader](tmp_path, corpus)) == 1
    assert str(tmp_path) in one_line_of(capsys)
    assert not (tmp_path / "marker").exists()


# -------------------------------------------------------------------------------------------- names

NAMES = {
    "line feed": b"a\nskipped: b",
    "escape": b"\x1b[2J\x1b[31mred",
    "option": b"--output_dir=elsewhere",
    "no UTF-8": b"caf\xe9",
    "shell": b"$(touch elsewhere);%s{}{0}",
}
names = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def make(folder: Path, name: bytes, contents: bytes) -> Path:
    """Writes a file of that name in `folder`, which may be new."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / os.fsdecode(name)
    path.write_bytes(contents)
    return path


@names
def test_odd_names_are_vocoded_and_stay_in_their_folder(name, checkpoint, clip, tmp_path, capsys):
    make(tmp_path / "in" / "sub", name + b".wav", clip)
    make(tmp_path / "in", name + b".txt", b"")
    before = tree(tmp_path)
    stem = os.fsdecode(name)
    assert exit_of(lambda: vocode(checkpoint, tmp_path / "in", tmp_path / "out")) == 0
    assert exit_of(partial(write_mels, checkpoint, tmp_path / "in", tmp_path / "mels")) == 0
    read = partial(vocode, checkpoint, tmp_path / "mels", tmp_path / "out", module=inference_e2e)
    assert exit_of(read) == 0
    assert capsys.readouterr().err == ""
    assert tree(tmp_path).keys() - before.keys() == {
        str(tmp_path / "out/sub" / f"{stem}_generated.wav"),
        str(tmp_path / "mels/sub" / f"{stem}.npy"),
        str(tmp_path / "out/sub" / f"{stem}_generated_e2e.wav"),
    }


def write_mels(checkpoint: Path, inputs: Path, output_dir: Path) -> int:
    config = checkpoint.with_name("config.json")
    flags = ("--config", config, "--input_wavs_dir", inputs, "--output_dir", output_dir)
    return run_main(meldataset, *flags)


@names
def test_bad_files_of_odd_names_are_named_in_one_line_each(name, checkpoint, tmp_path, capsys):
    for extension in (b".wav", b".npy"):
        make(tmp_path / "in", name + extension, b"no such thing")
    assert exit_of(lambda: vocode(checkpoint, tmp_path / "in", tmp_path / "out")) == 1
    assert "cannot be read as audio" in one_line_of(capsys)
    read = partial(vocode, checkpoint, tmp_path / "in", tmp_path / "out", module=inference_e2e)
    assert exit_of(read) == 1
    assert "not a readable .npy array" in one_line_of(capsys)
    folder = make(tmp_path / os.fsdecode(name), b"g_00000001", b"nothing")
    assert exit_of(lambda: vocode(folder, tmp_path / "in", tmp_path / "out")) == 1
    assert "g_00000001: not a readable checkpoint" in one_line_of(capsys)
    config = make(tmp_path, name + b".json", b"{}")
    flags = ("--config", config, "--input_wavs_dir", tmp_path, "--output_dir", tmp_path)
    assert exit_of(lambda: run_main(meldataset, *flags)) == 2
    assert "resblock is missing" in one_line_of(capsys)


def test_odd_names_do_not_break_the_tables_of_evaluate(tmp_path, capsys):
    name = NAMES["line feed"] + NAMES["escape"] + NAMES["no UTF-8"]
    for folder in ("reference", "generated"):
        make(tmp_path / folder, name + b".wav", b"no such thing")
        make(tmp_path / folder, name + folder.encode() + b".wav", b"")
    folders = [tmp_path / "reference", tmp_path / "generated"]
    flags = ("--reference_dir", folders[0], "--generated_dir", folders[1], "--workers", 1)
    assert exit_of(lambda: run_main(evaluate, *flags)) == 1
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "it/s" not in line]
    assert all(line.isprintable() for line in lines)
    (skipped,) = (line for line in lines if line.startswith("skipped: "))
    assert "cannot be read as audio" in skipped


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000], ids=["name", "path"])
def test_names_too_long_for_the_system_are_named_in_one_line(name, checkpoint, tmp_path, capsys):
    config = checkpoint.with_name("config.json")
    for run in (
        lambda: vocode(checkpoint, name, tmp_path / "out"),
        lambda: vocode(name, tmp_path, tmp_path / "out"),
        lambda: run_main(export_onnx, "--checkpoint_file", name),
        lambda: run_main(evaluate, "--reference_dir", name, "--generated_dir", tmp_path),
        lambda: run_main(
            meldataset, "--config", config, "--input_wavs_dir", name, "--output_dir", tmp_path
        ),
    ):
        assert exit_of(run) == 1
        assert one_line_of(capsys).startswith("error: a")


def test_a_name_too_long_for_its_output_is_skipped(checkpoint, clip, tmp_path, capsys):
    make(tmp_path / "in", b"a" * 250 + b".wav", clip)
    make(tmp_path / "in", b"b.wav", clip)
    assert exit_of(lambda: vocode(checkpoint, tmp_path / "in", tmp_path / "out")) == 1
    assert "too long" in one_line_of(capsys)
    assert os.listdir(tmp_path / "out") == ["b_generated.wav"]


# -------------------------------------------------------------------------------------------- paths


def test_ids_may_lie_anywhere_and_nothing_is_written_there(corpus, tmp_path):
    names = ["../wavs/clip0", f"{corpus}/wavs/clip1", "sub/../clip2.wav", "./clip3"]
    make(tmp_path, b"list.txt", "\n".join(names).encode())
    (corpus / "wavs/sub").mkdir()
    before = tree(tmp_path), tree(corpus)
    flags = ("--input_training_file", tmp_path / "list.txt")
    assert train_on(corpus, tmp_path, *flags) == 0
    new = tree(tmp_path).keys() - before[0].keys() - {str(tmp_path / "toy.json")}
    assert new and all(path.startswith(f"{tmp_path}/run/") for path in new)
    assert tree(corpus) == before[1]
    (corpus / "wavs/sub").rmdir()  # all tests share the corpus


def test_links_in_the_inputs_are_read_and_never_written_through(checkpoint, clip, tmp_path, capsys):
    elsewhere = make(tmp_path / "elsewhere/deep", b"x.wav", clip).parent
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file.wav").symlink_to(elsewhere / "x.wav")
    (tmp_path / "in/folder").symlink_to(elsewhere)
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/dangling.wav").symlink_to(tmp_path / "nothing.wav")
    before = tree(tmp_path)
    assert exit_of(partial(vocode, checkpoint, tmp_path / "in", tmp_path / "out")) == 1
    line = one_line_of(capsys)
    assert line.startswith(f"skipped: {tmp_path}/in/dangling.wav: cannot be read as audio")
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    assert after.keys() - before.keys() == {
        str(tmp_path / "out/file_generated.wav"),
        str(tmp_path / "out/folder/x_generated.wav"),
    }


def test_an_output_beside_its_input_is_not_written_through_a_link(
    checkpoint, clip, tmp_path, capsys
):
    elsewhere = make(tmp_path / "elsewhere", b"x.wav", clip).parent
    (tmp_path / "in").mkdir()
    (tmp_path / "in/folder").symlink_to(elsewhere)
    assert exit_of(partial(vocode, checkpoint, tmp_path / "in", tmp_path / "in")) == 1
    assert "in/folder: a link that leads out of" in one_line_of(capsys)
    assert os.listdir(elsewhere) == ["x.wav"]


def test_a_link_in_place_of_an_output_is_replaced_not_followed(checkpoint, clip, tmp_path):
    make(tmp_path / "in", b"a.wav", clip)
    precious = make(tmp_path / "elsewhere", b"precious.wav", b"precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a_generated.wav").symlink_to(precious)
    assert exit_of(lambda: vocode(checkpoint, tmp_path / "in", tmp_path / "out")) == 0
    assert not (tmp_path / "out/a_generated.wav").is_symlink()
    assert soundfile.info(tmp_path / "out/a_generated.wav").frames > 0
    assert tree(precious.parent) == {str(precious): b"precious"}


@pytest.mark.parametrize(("depth", "write"), [("sub", vocode), ("sub/deeper", write_mels)])
def test_links_that_lead_out_of_the_output_folder_are_refused(
    checkpoint, clip, tmp_path, depth, write, capsys
):
    make(tmp_path / "in" / depth, b"a.wav", clip)
    make(tmp_path / "in", b"a.wav", clip)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    assert exit_of(lambda: write(checkpoint, tmp_path / "in", tmp_path / "out")) == 1
    assert f"{tmp_path / 'out' / depth}: a link that leads out of" in one_line_of(capsys)
    assert os.listdir(tmp_path / "elsewhere") == []
    assert os.listdir(tmp_path / "out") == ["sub"]


# ------------------------------------------------------------------------------------------- memory


def limited(script: str, *arguments, gigabytes: float) -> subprocess.CompletedProcess:
    """Runs a script in a process with limited memory."""
    size = int(gigabytes * 2**30)
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        capture_output=True,
        text=True,
    )


def test_a_model_too_large_for_the_memory_is_one_line(corpus, tmp_path):
    config = write_config(tmp_path / "toy.json", upsample_initial_channel=2**17)
    flags = (*corpus_arguments(corpus), "--config", config, "--checkpoint_path", tmp_path / "run")
    run = limited("train.py", *flags, gigabytes=6)
    assert run.stderr == "error: out of memory; use a smaller model, batch or file\n"
    assert run.returncode == 1


def test_a_sound_too_large_for_the_memory_is_one_line(checkpoint, tmp_path):
    with open(tmp_path / "a.au", "wb") as file:  # 3 GB, all of them one hole on the disk
        file.write(struct.pack(">4s5I", b".snd", 24, 2**32 - 1, 2, 22050, 1))
        file.truncate(3 * 2**30)
    flags = ("--input_wavs_dir", tmp_path / "a.au", "--output_dir", tmp_path / "out")
    run = limited("inference.py", *flags, "--checkpoint_file", checkpoint, gigabytes=6)
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"skipped: {tmp_path / 'a.au'}: cannot be read as audio (Unable to all")
    assert run.returncode == 1
