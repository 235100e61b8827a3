"""Damaged and senseless files: the right result, or one line that names the file, and soon.

Cases follow from fixed seeds. `python tools/stress/fuzz.py 10000` tries that many of each kind.
"""

import copy
import dataclasses
import functools
import io
import json
import pickle
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import load_mel, load_wav, write_npy
from checkpoint import (
    COUNT_NAMES,
    build_state,
    load_checkpoint,
    load_optimizer,
    load_weights,
    warm_start,
)
from env import Config, UserError, load_config
from inference import load_generator, synthesize
from meldataset import LogMelSpectrogram, read_clips
from models import Discriminators, Generator
from tools.toy import speech_like, toy_values
from train import count_update, set_learning_rate

# Tests run few cases; tools/stress/fuzz.py loads a profile with more before it imports this.
settings.register_profile("tests", max_examples=25, derandomize=True, database=None, deadline=None)
if settings.get_current_profile_name() == "default":
    settings.load_profile("tests")

LARGEST_GROWTH = 400 * 2**20  # bytes of memory that a case may take
LONGEST = 20  # seconds

RATE = 22050
CONFIGS = ("config_v2.json", "configs/hifigan_v2.json", "configs/istft_v2.json")

_folder = tempfile.TemporaryDirectory(prefix="fuzz")
FOLDER = Path(_folder.name)
OUTCOMES = Counter()  # cases, by (kind, outcome)


def attempt(kind: str, path: Path, run: Callable):
    """What `run()` returns, or None where it refuses `path` in one line; counts the outcome."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result, outcome = run(), "taken"
        except UserError as error:
            result, outcome = None, "refused in one line"
            assert str(path) in str(error)
            assert str(error).isprintable()  # a line feed is not
            assert len(str(error)) < 10_000
    shown = [each for each in warned if not issubclass(each.category, DeprecationWarning)]
    assert shown == []  # each would be another line
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < LARGEST_GROWTH
    assert time.monotonic() - start < LONGEST
    OUTCOMES[kind, outcome] += 1
    return result


def damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """`raw` with some bytes changed, mostly near its ends, or cut short, or longer."""
    size = len(raw)
    near_ends = st.integers(0, min(200, size - 1)) | st.integers(max(0, size - 200), size - 1)
    changes = st.tuples(near_ends | st.integers(0, size - 1), st.integers(0, 255))

    def change(changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(raw)
        for position, byte in changes:
            changed[position] = byte
        return bytes(changed)

    return (
        st.lists(changes, min_size=1, max_size=8).map(change)
        | st.integers(0, size - 1).map(lambda stop: raw[:stop])
        | st.binary(min_size=1, max_size=50).map(lambda more: raw + more)
    )


def write(name: str, raw: bytes) -> Path:
    (FOLDER / name).write_bytes(raw)
    return FOLDER / name


# --- Configs

floats = st.floats(allow_subnormal=False)  # which the scripts flush to zero on CPUs
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=20,
)
EDGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 255, 256, 1023, 1024, 2**20, 10**6, 10**9, 10**12, 2**63)
numbers = (
    st.sampled_from([*EDGES, *(-n for n in EDGES), 10**400, 1e-300, 1e300, 0.5])
    | st.integers()
    | floats
)
lists = st.lists(numbers | st.lists(numbers, max_size=4), max_size=6)
many = st.tuples(st.sampled_from([1, 2, 10]), st.sampled_from([17, 1000, 5000])).map(
    lambda value_times: [value_times[0]] * value_times[1]
)


@functools.cache
def keys() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def works(h: Config) -> bool:
    """Runs everything that `h` describes, where it is small; True where the shapes are right."""
    with torch.device("meta"):
        size = sum(p.numel() for part in (Generator, Discriminators) for p in part(h).parameters())
    if size > 10**6 or h.segment_size > 2**14 or h.hop_size > 2**12 or h.batch_size > 16:
        return True
    wav = torch.zeros(h.batch_size, h.segment_size)
    mel = LogMelSpectrogram(h, h.fmax)(wav)
    with torch.no_grad():
        wav_hat = Generator(h)(mel)
        Discriminators(h)(wav_hat)
    return wav_hat.shape == (h.batch_size, 1, h.segment_size)


def check_config(kind: str, raw: bytes) -> None:
    path = write("config.json", raw)
    h = attempt(kind, path, lambda: load_config(path))
    assert h is None or works(h)


@pytest.mark.filterwarnings("ignore:Empty filters", "ignore:Length of IIR")
@given(config=st.sampled_from(CONFIGS), key=st.data(), value=anything | numbers | lists | many)
def test_configs_with_one_value_replaced(config, key, value):
    values = toy_values(config) | {key.draw(st.sampled_from(keys())): value}
    check_config("config, one value replaced", json.dumps(values).encode())


@given(anything)
def test_configs_of_any_json(value):
    check_config("config, any JSON", json.dumps(value).encode())


@given(st.data())
def test_configs_of_damaged_bytes(data):
    raw = json.dumps(toy_values(data.draw(st.sampled_from(CONFIGS)))).encode()
    check_config("config, damaged bytes", data.draw(damaged(raw)))


@given(st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "latin-1", "cp037"]), st.text(max_size=9))
def test_configs_in_other_encodings(encoding, text):
    contents = json.dumps(toy_values(misr_merge=text), ensure_ascii=False)
    check_config("config, other encoding", contents.encode(encoding, "replace"))


def with_raw(value: str) -> bytes:
    """A good config, with `value` as it is under one more key, in front of a known one."""
    return (json.dumps(toy_values())[:-1] + f', "seed": {value}}}').encode()


NESTED = [opening * depth for depth in (10, 900, 950, 990, 10**5) for opening in ("[", '{"a":')]


@pytest.mark.parametrize("text", [*NESTED, "NaN", "-Infinity", "1e999", "9" * 4000, "9" * 5000])
def test_json_that_python_alone_takes_or_cannot_show(text):
    closing = {"[": "]", "{": "}"}.get(text[0], "")
    nested = text + "1" + closing * text.count(text[0]) if closing else text
    raw = with_raw(nested).replace(b'"seed": 1234, ', b"")
    assert raw != with_raw(nested)
    check_config("config, deep or not finite", raw)


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(with_raw("5"))
    with pytest.raises(UserError, match="given twice: seed"):
        load_config(tmp_path / "config.json")


GIANTS = [
    *((key, 10**9) for key in keys() if isinstance(toy_values().get(key), int | float)),
    ("resblock_num", 10**6),
    ("upsample_initial_channel", 2**62),
    ("discriminator_channel_mult", 1e308),
    ("resblock_kernel_size", 10**9 + 1),
    ("resblock_dilation_sizes", [1] * 10**6),
    ("resblock_dilation_sizes", [10**9]),
    ("upsample_rates", [10] * 5000),
    ("upsample_kernel_sizes", [10**9 + 16, 16, 4, 4]),
]


@pytest.mark.parametrize("key, value", GIANTS, ids=[f"{k}={str(v)[:20]}" for k, v in GIANTS])
def test_giants_are_refused_by_name(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(toy_values() | {key: value}))
    if key in ("seed", "learning_rate"):
        load_config(tmp_path / "config.json")
        return
    with pytest.raises(UserError, match=f"config.json: .*{key[:3]}") as error:
        load_config(tmp_path / "config.json")
    assert error.value.exit_status == 2
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_segments_too_short_for_the_discriminators_are_refused(tmp_path, samples):
    audio = {"segment_size": samples, "hop_size": samples, "n_fft": 8 + samples, "win_size": 8}
    rates = {"upsample_rates": [samples], "upsample_kernel_sizes": [samples + 2]}
    (tmp_path / "config.json").write_text(json.dumps(toy_values() | audio | rates))
    with pytest.raises(UserError, match=f"segment_size = {samples}: expected at least 6"):
        load_config(tmp_path / "config.json")


# --- File lists


@functools.cache
def wavs_dir() -> Path:
    (FOLDER / "wavs/sub").mkdir(parents=True)
    for name in ("a.wav", "b.flac", "sub/c.ogg", "é.wav"):
        (FOLDER / "wavs" / name).touch()
    return FOLDER / "wavs"


odd_text = st.text(st.sampled_from("ab|/.\0\n\r\t \x1b\x85\u2028\u202eé-~"), max_size=30)
good_lines = st.sampled_from(["a|x", "b", "sub/c|y", "é", "../wavs/a", "sub/../b.flac", ""])


@given(
    st.binary(max_size=80)
    | odd_text.map(str.encode)
    | st.lists(good_lines | odd_text, max_size=6).map("\n".join).map(str.encode)
    | st.sampled_from([b"a" * 10**6, b"a|" + b"x" * 10**6, b"a/" * 10**5, b"\xed\xa0\x80"])
)
def test_file_lists(raw):
    path, folder = write("list.txt", raw), wavs_dir()
    clips = attempt("file list", path, lambda: read_clips(path, folder))
    assert clips is None or all((folder / clip).is_file() for clip in clips)


# --- Sounds


@functools.cache
def sound(kind: str) -> bytes:
    file = io.BytesIO()
    subtype = {"WAV": "PCM_16", "RF64": "FLOAT"}.get(kind)
    soundfile.write(file, speech_like(0.1), RATE, format=kind, subtype=subtype)
    return file.getvalue()


def check_sound(kind: str, raw: bytes) -> torch.Tensor | None:
    path = write("a.wav", raw)
    wav = attempt(kind, path, lambda: load_wav(path, RATE, min_samples=256))
    if wav is not None:
        assert wav.ndim == 1 and len(wav) >= 256
        assert wav.dtype == torch.float32
        assert wav.abs().max() <= 1
    return wav


@pytest.mark.parametrize("kind", ["WAV", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64"])
def test_damaged_sounds(kind):
    @given(damaged(sound(kind)))
    def check(raw):
        check_sound(f"{kind} file, damaged", raw)

    check()


# Offsets of 32-bit fields in a canonical wav: RIFF size, fmt size, rate, byte rate, data size.
@pytest.mark.parametrize("offset", [4, 16, 24, 28, 40])
@pytest.mark.parametrize("value", [0, 1, 255, 999, 2**31 - 1, 2**31, 2**32 - 1])
def test_lying_wav_headers(offset, value):
    raw = bytearray(sound("WAV"))
    raw[offset : offset + 4] = value.to_bytes(4, "little")
    wav = check_sound("WAV header that lies", bytes(raw))
    if offset in (4, 40) and value == 2**32 - 1:
        assert len(wav) == len(speech_like(0.1))  # 4 GB claimed; as streaming programs write it


def test_a_flac_that_claims_2_to_the_36_samples_is_no_danger():
    raw = bytearray(sound("FLAC"))
    raw[21] |= 0x0F
    raw[22:26] = b"\xff" * 4
    check_sound("FLAC header that lies", bytes(raw))


def test_too_low_a_rate_is_named_not_resampled(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(22050), 1)  # would be 2 GB
    with pytest.raises(UserError, match=r"a\.wav: sampled at 1 Hz; expected at least 1000"):
        load_wav(tmp_path / "a.wav", RATE)


# --- Mels


@functools.cache
def npy() -> bytes:
    write_npy(FOLDER / "a.npy", np.linspace(-11, 1, 80 * 9, dtype=np.float32).reshape(80, 9))
    return (FOLDER / "a.npy").read_bytes()


def check_mel(kind: str, raw: bytes) -> None:
    path = write("a.npy", raw)
    mel = attempt(kind, path, lambda: load_mel(path, 80))
    if mel is not None:
        assert mel.dtype == torch.float32
        assert mel.shape[0] == 80
        assert mel.isfinite().all()


@given(damaged(npy()))
def test_damaged_mels(raw):
    check_mel("npy, damaged", raw)


def npy_with(header: str) -> bytes:
    """A version 1.0 .npy file with that header, and with the data of a good one."""
    padded = header.encode("latin-1", "replace").ljust(118) + b"\n"
    size = len(padded).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + size + padded + npy()[128:]


TYPES = ["<f4", ">f4", "<f2", "<f8", "<i4", "|u1", "|O", "<U4", "|S4", "<c8", "|V4", "|b1", "<M8"]
descriptions = st.sampled_from(TYPES) | st.text(max_size=6)
shapes = st.lists(st.sampled_from([0, 1, 9, 80, 81, -1, 10**6, 10**12, 2**63]), max_size=4)
CODE = (
    "__import__('os').system('false')",
    "[" * 3000,
    "-" * 9000 + "1",
    "(" + "1," * 4000 + ")",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (80, 9)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (80, 9), 'more': 1}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 10000000000)}",
    "\0",
    "",
)


@given(descriptions, st.booleans() | anything, shapes.map(tuple) | anything)
def test_mels_with_other_headers(dtype, order, shape):
    header = {"descr": dtype, "fortran_order": order, "shape": shape}
    check_mel("npy, other header", npy_with(repr(header)[:60_000]))


@pytest.mark.parametrize("header", CODE, ids=range(len(CODE)))
def test_mels_with_code_for_a_header(header):
    check_mel("npy, code for a header", npy_with(header))


# --- Checkpoints


@functools.cache
def weights(config: str = CONFIGS[0]) -> dict:
    (FOLDER / "config.json").write_text(json.dumps(toy_values(config)))
    torch.manual_seed(0)
    return Generator(load_config(FOLDER / "config.json")).state_dict()


@functools.cache
def checkpoint(form: str) -> bytes:
    file = io.BytesIO()
    if form == "pickle":
        pickle.dump({"generator": weights()}, file)
    else:
        is_zip = form == "zip"
        torch.save({"generator": weights()}, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def check_checkpoint(kind: str, raw: bytes, config: str = CONFIGS[0]) -> Generator | None:
    path = write("g_00000001", raw)
    (FOLDER / "config.json").write_text(json.dumps(toy_values(config)))
    loaded = attempt(kind, path, lambda: load_generator(path))
    if loaded is None:
        return None
    generator, h = loaded
    assert synthesize(generator, torch.zeros(h.num_mels, 2)).shape == (2 * h.hop_size,)
    return generator


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_damaged_checkpoints(form):
    assert (check_checkpoint("checkpoint, sound", checkpoint(form)) is None) == (form == "pickle")

    @given(damaged(checkpoint(form)))
    def check(raw):
        check_checkpoint(f"checkpoint, {form}, damaged", raw)

    check()


STRANGERS = (
    *(None, 0, 10**12, -1.5, "text", [], [1], {}, {"a": 1}, (), True, float("nan")),
    *(torch.zeros(()), torch.zeros(3), torch.zeros(1).expand(10**6, 10**6), torch.zeros(0)),
)
ALIKE = {
    "NaN": lambda x: x * float("nan"),
    "infinite": lambda x: x / 0,
    "half": lambda x: x.half(),
    "double": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "integers": lambda x: x.int(),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x + 1j,
    "transposed": lambda x: x.transpose(0, -1),
    "flat": lambda x: x.flatten(),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "bytes": lambda x: x.to(torch.uint8),
    "parameter": torch.nn.Parameter,
    "expanded": lambda x: x.flatten()[:1].expand(10**9),
}
strangers = st.sampled_from(STRANGERS)


def replaced(contents: dict, data: st.DataObject) -> dict:
    """`contents`, with one value somewhere in it replaced, lost or added."""
    contents = copy.deepcopy(contents)
    inner = contents
    while True:
        key = data.draw(st.sampled_from(sorted(inner, key=str)))
        is_deeper = isinstance(inner[key], dict) and inner[key]
        if not is_deeper or data.draw(st.integers(0, 3)) == 0:
            break
        inner = inner[key]
    way = data.draw(st.sampled_from(["stranger", "alike", "lost", "added", "renamed"]))
    if way == "alike" and torch.is_tensor(inner[key]):
        inner[key] = ALIKE[data.draw(st.sampled_from(sorted(ALIKE)))](inner[key])
    elif way in ("lost", "renamed"):
        value = inner.pop(key)
        if way == "renamed":
            inner[data.draw(st.sampled_from([0, "", "weight_g", "x.y", None]))] = value
    else:
        place = data.draw(st.sampled_from([7, "b"])) if way == "added" else key
        inner[place] = data.draw(strangers)
    return contents


def packed(contents: object) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@given(st.data())
def test_checkpoints_with_one_thing_amiss(data):
    raw = packed(replaced({"generator": weights()}, data))
    check_checkpoint("checkpoint, one thing amiss", raw)


TAKEN = {"NaN", "infinite", "half", "double", "bfloat16", "parameter", "transposed", "flat"}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("kind", ALIKE)
def test_biases_of_other_kinds(kind):
    """A bias has one dimension, so a transposed or flat one is the same."""
    changed = copy.copy(weights())  # with the metadata that torch gives it
    changed["conv_pre.bias"] = ALIKE[kind](changed["conv_pre.bias"])
    generator = check_checkpoint("checkpoint, bias of another kind", packed({"generator": changed}))
    assert (generator is not None) == (kind in TAKEN)
    assert generator is None or generator.conv_pre.bias.dtype == torch.float32


@pytest.mark.parametrize("stranger", STRANGERS, ids=range(len(STRANGERS)))
def test_a_warm_start_from_weights_that_are_none(stranger):
    state, _ = training()
    path = write("g_00000001", packed({"generator": {"conv_pre.bias": stranger}}))
    took = attempt("warm start, strangers", path, lambda: warm_start(state, [path]) is None)
    assert (took is not None) == torch.is_tensor(stranger)


@given(st.sampled_from(STRANGERS), st.booleans())
def test_checkpoints_of_something_else(stranger, is_inside):
    contents = {"generator": stranger} if is_inside else stranger
    assert check_checkpoint("checkpoint, something else", packed(contents)) is None


@pytest.mark.parametrize("config", CONFIGS[1:])
def test_the_config_of_another_model(config):
    raw = checkpoint("zip")
    assert check_checkpoint("checkpoint, config of another", raw, config=config) is None


@given(st.data())
def test_the_config_beside_a_checkpoint(data):
    """With a value replaced, weights that no longer fit are refused before memory is taken."""
    path = write("g_00000001", checkpoint("zip"))
    key = data.draw(st.sampled_from(keys()))
    values = toy_values() | {key: data.draw(numbers | lists)}
    (FOLDER / "config.json").write_text(json.dumps(values))
    loaded = attempt("config beside a checkpoint", FOLDER, lambda: load_generator(path))
    if loaded is not None:
        generator, h = loaded
        assert synthesize(generator, torch.zeros(h.num_mels, 2)).shape == (2 * h.hop_size,)


# --- What else training keeps


@functools.cache
def training() -> tuple:
    """A toy state after an update, and what its do_ file holds."""
    (FOLDER / "config.json").write_text(json.dumps(toy_values()))
    state = build_state(load_config(FOLDER / "config.json"), torch.device("cpu"))
    wav_hat = state.generator(torch.zeros(2, 80, 8))
    sum(score.sum() for score in state.discriminators(wav_hat)[0]).backward()
    state.optim_g.step(), state.optim_d.step()
    return state, {
        "mpd": state.discriminators.mpd.state_dict(),
        "msd": state.discriminators.msd.state_dict(),
        "optim_g": state.optim_g.state_dict(),
        "optim_d": state.optim_d.state_dict(),
        **{"steps": 1, "epoch": 0, "epoch_step": 1},
    }


def load_moments(**changes) -> bool:
    """Loads the moments of a toy generator, of which one parameter's are changed."""
    state, contents = training()
    optim_g = copy.deepcopy(contents["optim_g"])
    for name, change in changes.items():
        optim_g["state"][0][name] = change(optim_g["state"][0][name])
    path = write("do_00000001", packed({"optim_g": optim_g}))

    def load() -> bool:
        load_optimizer(state.optim_g, load_checkpoint(path)["optim_g"], path)
        state.optim_g.step()
        return True

    return attempt("moments of another kind", path, load) or False


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("kind", ALIKE)
def test_moments_of_other_kinds(name, kind):
    is_taken = load_moments(**{name: ALIKE[kind]})
    if kind in ("integers", "booleans", "complex", "sparse", "meta", "bytes", "expanded"):
        assert not is_taken
    if kind in ("double", "parameter"):
        assert is_taken


@pytest.mark.parametrize("step, is_taken", [(7, True), (-1, False), ("x", False), (None, False)])
def test_steps_of_other_kinds(step, is_taken):
    assert load_moments(step=lambda _: step) == is_taken


@pytest.mark.parametrize("stranger", STRANGERS, ids=range(len(STRANGERS)))
@pytest.mark.parametrize("place", ["whole", "state", "moments", "param_groups", "group", "params"])
def test_optimizers_that_are_none_are_refused(stranger, place):
    state, contents = training()
    optim = copy.deepcopy(contents["optim_g"])
    if place == "whole":
        optim = stranger
    elif place == "moments":
        optim["state"][0] = stranger
    elif place == "group":
        optim["param_groups"] = [stranger]
    elif place == "params":
        optim["param_groups"][0]["params"] = stranger
    else:
        optim[place] = stranger
    path = write("do_00000001", packed({"optim_g": optim}))
    restored = attempt(
        "optimizer of another kind",
        path,
        lambda: load_optimizer(state.optim_g, load_checkpoint(path)["optim_g"], path) is None,
    )
    assert restored is None or (place == "state" and isinstance(stranger, dict))


@pytest.mark.parametrize("name", COUNT_NAMES)
@pytest.mark.parametrize("count", [-1, 1.5, "1", None, True, [], torch.zeros(()), 2**62, 10**30])
def test_counts_that_are_none_are_refused(name, count):
    path = write("do_00000001", packed({name: count}))
    with pytest.raises(UserError, match=f"{name} = .*: expected an integer of 0 or more"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@given(st.data())
def test_training_files_with_one_thing_amiss(data):
    """What is taken can be trained with."""
    state, contents = training()
    path = write("do_00000001", packed(replaced(contents, data)))

    def restore() -> bool:
        loaded = load_checkpoint(path)
        missing = contents.keys() - loaded.keys()
        if missing:
            raise UserError(f"{path}: holds no {missing}")
        load_weights(state.discriminators.mpd, loaded["mpd"], path)
        load_weights(state.discriminators.msd, loaded["msd"], path)
        load_optimizer(state.optim_g, loaded["optim_g"], path)
        load_optimizer(state.optim_d, loaded["optim_d"], path)
        state.steps, state.epoch, state.epoch_step = (loaded[name] for name in COUNT_NAMES)
        return True

    if attempt("do_ file, one thing amiss", path, restore):
        set_learning_rate(state)
        state.optim_g.step(), state.optim_d.step()
        count_update(state, {"loss": torch.zeros(())}, steps_per_epoch=2)
