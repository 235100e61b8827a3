"""Feeds damaged files to the loaders: each is loaded correctly or refused in one line.

    OMP_NUM_THREADS=1 python tools/stress/fuzz.py 10000 --only wav

Prints a table of the numbers of loaded and refused files. Case i of a kind is always the same file.
The first failing file is kept and named. tests/test_fuzz.py runs a few cases of each kind.
"""

import argparse
import copy
import functools
import io
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
from audio import load_mel, load_wav
from env import Config, UserError, load_config
from inference import load_generator, synthesize
from meldataset import LogMelSpectrogram, read_clips
from models import Discriminators, Generator
from tools.toy import speech_like, toy_values
from utils import command_line, positive

RATE = 22050
CONFIGS = ("config_v2.json", "configs/hifigan_v2.json", "configs/istft_v2.json")
MAX_SECONDS = 20  # of CPU time for one case

# -------------------------------------------------------------------------------------- the files


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Returns `raw` with some bytes changed, mostly near its ends, or shortened, or lengthened."""
    way = draw.choice(("change", "change", "cut", "add"))
    if way == "cut":
        return raw[: draw.randrange(len(raw))]
    if way == "add":
        return raw + draw.randbytes(draw.randint(1, 50))
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 8)):
        near = draw.randrange(min(200, len(raw)))
        position = draw.choice((near, -1 - near, draw.randrange(len(raw))))
        changed[position] = draw.randrange(256)
    return bytes(changed)


NUMBERS = (-1, 0, 0.5, 1, 2, 3, 4, 7, 8, 16, 80, 255, 256, 1023, 1024, 8000, 22050, float("nan"))
OTHERS = (None, True, "", "text", [], {}, [[]], {"a": 1})


def any_value(draw: random.Random) -> object:
    """Returns a JSON value, as a typing error may give."""
    numbers = [draw.choice(NUMBERS) for _ in range(draw.randint(1, 5))]
    return draw.choice((numbers[0], numbers[0], numbers, [numbers], draw.choice(OTHERS)))


def config_with_another_value(draw: random.Random) -> bytes:
    """Returns a toy config with one value replaced."""
    values = toy_values(draw.choice(CONFIGS))
    return json.dumps(values | {draw.choice(sorted(values)): any_value(draw)}).encode()


def damaged_config(draw: random.Random) -> bytes:
    """Returns a toy config with damaged bytes."""
    return damaged(json.dumps(toy_values(draw.choice(CONFIGS))).encode(), draw)


CLIPS = ("a.wav", "b.flac", "sub/c.ogg", "é.wav")
LINES = ("a|x", "b", "sub/c|y", "é", "../wavs/a", "sub/../b.flac", "", "b.flac", "\ufeff")
ODD = "ab|/.\0\n\r\t \x1b\x85\u2028\u202eé-~"


def file_list(draw: random.Random) -> bytes:
    """Returns a file list, most of its lines valid."""
    lines = [draw.choice(LINES) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.3:
        lines.append("".join(draw.choices(ODD, k=draw.randint(1, 20))))
    raw = "\n".join(lines).encode()
    return damaged(raw, draw) if raw and draw.random() < 0.2 else raw


@functools.cache
def sound(kind: str) -> bytes:
    """Returns a file of a tenth of a second."""
    file = io.BytesIO()
    subtype = {"WAV": "PCM_16", "RF64": "FLOAT"}.get(kind)
    soundfile.write(file, speech_like(0.1), RATE, format=kind, subtype=subtype)
    return file.getvalue()


def wav_with_another_header(draw: random.Random) -> bytes:
    """Returns a wav with one 32-bit field of its header replaced, such as a size or the rate."""
    raw, offset = bytearray(sound("WAV")), draw.choice((4, 16, 24, 28, 40))
    value = draw.choice((0, 1, 255, 999, 2**31 - 1, 2**31, 2**32 - 1))
    raw[offset : offset + 4] = value.to_bytes(4, "little")
    return bytes(raw)


@functools.cache
def mel() -> bytes:
    """Returns a .npy file [80, 9]."""
    file = io.BytesIO()
    np.save(file, np.linspace(-11, 1, 80 * 9, dtype=np.float32).reshape(80, 9))
    return file.getvalue()


TYPES = ("<f4", ">f4", "<f2", "<f8", "<i4", "|u1", "|O", "<U4", "|S4", "<c8", "|V4", "|b1", "<M8")
SHAPES = ((80, 9), (1, 80, 9), (9, 80), (80, 0), (80,), (), (80, -9), (10**12, 10**12), (80, 10**9))


def mel_with_another_header(draw: random.Random) -> bytes:
    """Returns the data of a mel after a header with another type, order or shape."""
    shape = draw.choice(SHAPES[:2]) if draw.random() < 0.5 else draw.choice(SHAPES)
    dtype, order = draw.choice(TYPES), draw.choice((False, False, True, "C"))
    header = repr({"descr": dtype, "fortran_order": order, "shape": shape}).ljust(118) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + mel()[128:]


@functools.cache
def weights() -> dict:
    """Returns a toy generator's weights."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(toy_values()))
        file.flush()
        torch.manual_seed(0)
        return Generator(load_config(file.name)).state_dict()


def packed(contents: object, is_zip: bool = True) -> bytes:
    """Returns what torch.save writes."""
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


@functools.cache
def checkpoint(is_zip: bool) -> bytes:
    """Returns a toy g_* file, in the present format or that of PyTorch before 1.6."""
    return packed({"generator": weights()}, is_zip)


CHANGES = {
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "parameter": torch.nn.Parameter,
    "cut": lambda x: x[:-1],
    "longer": lambda x: torch.cat([x, x]),
    "one dimension more": lambda x: x[None],
}


def checkpoint_with_another_tensor(draw: random.Random) -> bytes:
    """Returns a toy g_* file with a tensor changed, removed, renamed or added."""
    changed = copy.copy(weights())  # with the metadata that torch gives it
    key = draw.choice(sorted(changed))
    way = draw.choice((*CHANGES, "removed", "renamed", "added"))
    if way in CHANGES:
        changed[key] = CHANGES[way](changed[key])
    else:
        value = changed[key] if way == "added" else changed.pop(key)
        if way != "removed":
            changed["other." + key] = value
    return packed({"generator": changed})


# -------------------------------------------------------------------- the checks of loaded files


def check_config(path: Path) -> None:
    """Loads a config; generator, mel and discriminators must fit each other."""
    h: Config = load_config(path)
    with torch.device("meta"):
        size = sum(p.numel() for part in (Generator, Discriminators) for p in part(h).parameters())
    if size > 10**6 or h.segment_size > 2**14 or h.hop_size > 2**12 or h.batch_size > 16:
        return
    wav = torch.zeros(h.batch_size, h.segment_size)
    try:
        log_mel = LogMelSpectrogram(h, h.fmax)
    except UserError as error:  # its message does not contain the path
        raise UserError(f"{path}: {error}") from None
    with torch.no_grad():
        wav_hat = Generator(h)(log_mel(wav))
        Discriminators(h)(wav_hat)
    assert wav_hat.shape == (h.batch_size, 1, h.segment_size)


def check_list(path: Path) -> None:
    """Loads a file list; every file must exist."""
    wavs_dir = path.parent / "wavs"
    for name in CLIPS:
        (wavs_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (wavs_dir / name).touch()
    assert all((wavs_dir / clip.decode()).is_file() for clip in read_clips(path, wavs_dir))


def check_wav(path: Path) -> None:
    """Loads a wav; it must be mono, float32 and within full scale."""
    wav = load_wav(path, RATE, min_samples=256)
    assert wav.ndim == 1 and len(wav) >= 256
    assert wav.dtype == torch.float32
    assert wav.abs().max() <= 1


def check_mel(path: Path) -> None:
    """Loads a mel; it must be finite and have 80 bands."""
    mel = load_mel(path, 80)
    assert mel.dtype == torch.float32
    assert mel.shape[0] == 80
    assert mel.isfinite().all()


def check_checkpoint(path: Path) -> None:
    """Loads a generator; it must synthesise."""
    path.with_name("config.json").write_text(json.dumps(toy_values()))
    generator, h = load_generator(path)
    assert all(p.dtype == torch.float32 for p in generator.parameters())
    assert synthesize(generator, torch.zeros(h.num_mels, 2)).shape == (2 * h.hop_size,)


# --------------------------------------------------------------------------------------- the runs


class Kind(NamedTuple):
    """A kind of file."""

    name: str  # of the file
    make: Callable[[random.Random], bytes]
    check: Callable[[Path], None]  # loads it; raises UserError to refuse it


SOUNDS = ("WAV", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64")
KINDS = {
    "config, one value replaced": Kind("config.json", config_with_another_value, check_config),
    "config, damaged": Kind("config.json", damaged_config, check_config),
    "file list": Kind("list.txt", file_list, check_list),
    **{
        f"{kind} file, damaged": Kind(
            "a.wav", lambda draw, kind=kind: damaged(sound(kind), draw), check_wav
        )
        for kind in SOUNDS
    },
    "WAV, wrong header": Kind("a.wav", wav_with_another_header, check_wav),
    "npy, damaged": Kind("a.npy", lambda draw: damaged(mel(), draw), check_mel),
    "npy, another header": Kind("a.npy", mel_with_another_header, check_mel),
    "checkpoint, damaged": Kind(
        "g_00000001", lambda draw: damaged(checkpoint(is_zip=True), draw), check_checkpoint
    ),
    "old checkpoint, damaged": Kind(
        "g_00000001", lambda draw: damaged(checkpoint(is_zip=False), draw), check_checkpoint
    ),
    "checkpoint, another tensor": Kind(
        "g_00000001", checkpoint_with_another_tensor, check_checkpoint
    ),
}


def is_loaded(kind: Kind, path: Path) -> bool:
    """Returns True if the file is loaded correctly, False if it is refused in one line.

    Raises:
        Exception: neither, or it takes too long.
    """
    start = time.process_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            kind.check(path)
            loaded = True
        except UserError as error:
            loaded, line = False, str(error)
            assert line.startswith(str(path)), line
            assert line.isprintable() and len(line) < 5000, line  # a line feed is not printable
    shown = [each for each in warned if not issubclass(each.category, DeprecationWarning)]
    assert shown == []  # a warning would be another line
    assert time.process_time() - start < MAX_SECONDS
    return loaded


def try_cases(name: str, cases: int) -> tuple[int, int]:
    """Runs `cases` files of a kind; returns the numbers of loaded and of refused files.

    Raises:
        AssertionError: a file is neither; the message names its copy.
    """
    kind, loaded = KINDS[name], 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(cases):
            path = Path(folder) / kind.name
            path.write_bytes(kind.make(random.Random(f"{name} {i}")))
            try:
                loaded += is_loaded(kind, path)
            except Exception as error:
                kept = Path(tempfile.mkdtemp(prefix="fuzz_")) / path.name
                kept.write_bytes(path.read_bytes())
                raise AssertionError(f"{name}, case {i}, left in {kept}: {error!r}") from error
    return loaded, cases - loaded


def main() -> None:
    """Runs many cases of each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=positive, help="of each kind")
    parser.add_argument("--only", default="", metavar="WORD", help="in the name of a kind")
    a = parser.parse_args()
    print("| kind of file | loaded | refused in one line |\n|---|---|---|")
    for name in KINDS:
        if a.only.lower() in name.lower():
            print(f"| {name} | {' | '.join(map(str, try_cases(name, a.cases)))} |", flush=True)


if __name__ == "__main__":
    command_line(main)
