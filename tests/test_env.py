"""Configs that load, configs that are refused in one line, and devices."""

import dataclasses
import json
import subprocess
import sys

import librosa
import pytest
import torch

import distributed
from distributed import computes_in_bfloat16, select_device
from env import UserError, load_config
from tests.conftest import ALL_CONFIGS
from tools.toy import ROOT, toy_values, write_config

# config_v1.json of jik876/hifi-gan, as it is there.
HIFIGAN_V1 = """{
    "resblock": "1", "num_gpus": 0, "batch_size": 16, "learning_rate": 0.0002,
    "adam_b1": 0.8, "adam_b2": 0.99, "lr_decay": 0.999, "seed": 1234,
    "upsample_rates": [8,8,2,2], "upsample_kernel_sizes": [16,16,4,4],
    "upsample_initial_channel": 512, "resblock_kernel_sizes": [3,7,11],
    "resblock_dilation_sizes": [[1,3,5], [1,3,5], [1,3,5]],
    "segment_size": 8192, "num_mels": 80, "num_freq": 1025, "n_fft": 1024, "hop_size": 256,
    "win_size": 1024, "sampling_rate": 22050, "fmin": 0, "fmax": 8000, "fmax_for_loss": null,
    "num_workers": 4,
    "dist_config": {
        "dist_backend": "nccl", "dist_url": "tcp://localhost:54321", "world_size": 1
    }
}"""

OPTIONAL_KEYS = {"misr_merge", "lambda_mel", "lambda_feature", "discriminator_channel_mult"}

# (key, value, what was expected), for the toy size of config_v2.json and of configs/hifigan_v1.json
BROKEN_MISR = [
    # Types
    ("batch_size", "16", "an integer"),
    ("batch_size", 16.0, "an integer"),
    ("batch_size", True, "an integer"),
    ("optimizer", "adam", '"adamw" or "muon"'),
    ("seed", 2**63, "an integer"),
    ("lambda_mel", 10**400, "a number"),
    ("resblock", 1, "a string"),
    ("fmin", True, "a number"),
    ("fmax", "8000", "a number or null"),
    ("fmin", float("nan"), "a number"),
    ("learning_rate", float("nan"), "a number"),
    ("learning_rate", float("inf"), "a number"),
    ("lambda_mel", float("inf"), "a number"),
    ("upsample_rates", 256, "a list, each an integer"),
    ("upsample_rates", [8, 8, 2, 2.0], "a list, each an integer"),
    ("resblock_dilation_sizes", [1, [3, 5]], "a list"),
    # Ranges
    ("upsample_initial_channel", 0, "more than 0"),
    ("discriminator_channel_mult", 0, "more than 0"),
    ("batch_size", 0, "more than 0"),
    ("learning_rate", -1, "more than 0"),
    ("segment_size", 0, "more than 0"),
    ("num_mels", 0, "more than 0"),
    ("n_fft", -1024, "more than 0"),
    ("hop_size", 0, "more than 0"),
    ("win_size", 0, "more than 0"),
    ("sampling_rate", 0, "more than 0"),
    ("lambda_mel", -1, "0 or more"),
    ("lambda_feature", -2, "0 or more"),
    ("discriminator_train_start_steps", -1, "0 or more"),
    ("discriminator_train_start_steps", 0.5, "an integer"),
    ("num_workers", -1, "0 or more"),
    ("seed", -1, "0 or more"),
    ("adam_b1", 1, "less than 1"),
    ("adam_b2", -0.1, "0 or more"),
    ("lr_decay", 0, "more than 0"),
    ("lr_decay", 1.01, "at most 1"),
    # Audio
    ("win_size", 1025, "at most n_fft, 1024"),
    ("n_fft", 1025, "hop_size, 256, plus an even number"),
    ("segment_size", 2049, "a multiple of hop_size, 256"),
    ("fmin", -1, "0 or more"),
    ("fmax", 0, "more than fmin, 0"),
    ("fmax", 11026, "at most sampling_rate / 2, 11025"),
    ("fmax_for_loss", 11026, "at most sampling_rate / 2, 11025"),
    ("n_ffts_for_loss", [], "one or more multiples of 8"),
    ("n_ffts_for_loss", [32], "at least 64 each"),
    ("n_ffts_for_loss", [1022], "one or more multiples of 8"),
    ("num_mels_for_loss", [80], "one number of bands for each of the 0 n_ffts_for_loss"),
    # Upsampling
    ("upsample_rates", [], "one or more positive rates"),
    ("upsample_rates", [8, 8, -2, -2], "one or more positive rates"),
    ("upsample_rates", [8, 8, 2, 4], "product (512 here) is hop_size, 256"),
    ("upsample_kernel_sizes", [16, 16, 4], "one kernel size for each of the 4 upsample_rates"),
    ("upsample_kernel_sizes", [16, 16, 4, 5], "plus 0 or an even number"),
    ("upsample_kernel_sizes", [16, 6, 4, 4], "plus 0 or an even number"),
    ("upsample_initial_channel", 15, "at least 16"),
    # MISR
    ("resblock", "3", '"1" or "2"'),
    ("resblock_num", 0, "one or more"),
    ("resblock_kernel_size", 10, "an odd size"),
    ("resblock_dilation_sizes", [], "a flat list"),
    ("resblock_dilation_sizes", [1, 0], "positive dilations"),
    ("resblock_dilation_sizes", [[1, 3, 5]], "a flat list"),
    ("misr_merge", "max", '"mean" or "conv"'),
]
BROKEN_MRF = [
    ("resblock_num", 3, "resblock_kernel_sizes (MRF)"),
    ("resblock_kernel_size", 11, "resblock_kernel_sizes (MRF)"),
    ("resblock_kernel_sizes", [], "one or more odd sizes"),
    ("resblock_kernel_sizes", [3, 7, 10], "one or more odd sizes"),
    ("resblock_dilation_sizes", [1, 3, 5], "a list of positive dilations for each of the 3"),
    ("resblock_dilation_sizes", [[1], [1]], "a list of positive dilations for each of the 3"),
    ("resblock_dilation_sizes", [[1], [1], [0]], "a list of positive dilations"),
]
BROKEN_ISTFT = [
    ("gen_istft_n_fft", None, "both gen_istft_n_fft and gen_istft_hop_size, or neither"),
    ("gen_istft_hop_size", None, "both gen_istft_n_fft and gen_istft_hop_size, or neither"),
    ("gen_istft_n_fft", 15, "a positive even number"),
    ("gen_istft_n_fft", 0, "a positive even number"),
    ("gen_istft_hop_size", 9, "1 to half of gen_istft_n_fft, 8"),
    ("gen_istft_hop_size", 0, "1 to half of gen_istft_n_fft, 8"),
    ("upsample_rates", [8, 4], "product, times gen_istft_hop_size, (128 here) is hop_size, 256"),
]
BROKEN = [("config_v2.json", *row) for row in BROKEN_MISR]
BROKEN += [("configs/istft_v2.json", *row) for row in BROKEN_ISTFT]
BROKEN += [("configs/hifigan_v1.json", *row) for row in BROKEN_MRF]

NOT_JSON = {
    "empty": b"",
    "UTF-16": json.dumps(toy_values()).encode("utf-16"),
    "twice": json.dumps(toy_values()).encode()[:-1] + b', "seed": 5}',
    "cut": b'{"resblock": "1",',
    "list": b"[1]",
    "null": b"null",
    "binary": b"\x80\x02\xff\x00",
    "deep": b"[" * 100_000,
}


def refusal(path) -> str:
    """The one line with which load_config refuses the file `path`."""
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_are_frozen(path, capsys):
    h = load_config(path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        h.seed = 1
    assert hash(h) == hash(load_config(path))  # a list among its values would have no hash
    assert h.uses_misr == ("resblock_num" in json.loads(path.read_text()))
    assert capsys.readouterr() == ("", "")


def test_hifigans_own_json_loads_as_mrf(tmp_path, capsys):
    path = tmp_path / "config_v1.json"
    path.write_text(HIFIGAN_V1)
    h = load_config(path)
    assert h == load_config(ROOT / "configs/hifigan_v1.json")
    assert not h.uses_misr
    assert capsys.readouterr().err == ""


def test_y_chans_json_loads_as_mean_and_its_reader_is_told(tmp_path, capsys):
    extras = {"num_gpus": 0, "num_freq": 1025, "dist_config": {"world_size": 1}}
    path = write_config(tmp_path / "y-chan.json", misr_merge=None, **extras)
    said = []
    assert load_config(path, said.append) == load_config(write_config(tmp_path / "ours.json"))
    assert load_config(path).misr_merge == "mean"
    assert said == [f'{path}: no misr_merge, so "mean"; y-chan\'s port merges by "conv"']
    load_config(tmp_path / "ours.json", said.append)
    assert len(said) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("config", "key", "value", "expected"),
    BROKEN,
    ids=[f"{key}={json.dumps(value)}" for _, key, value, _ in BROKEN],
)
def test_broken_values_are_refused(tmp_path, config, key, value, expected):
    message = refusal(write_config(tmp_path / "broken.json", config, **{key: value}))
    assert f": {key} = {json.dumps(value)}" in message
    assert expected in message.split("expected ", 1)[1]


@pytest.mark.parametrize("key", sorted(set(toy_values()) - OPTIONAL_KEYS))
def test_missing_keys_are_refused(tmp_path, key):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({k: v for k, v in toy_values().items() if k != key}))
    message = refusal(path)
    assert f": {key} " in message
    assert ": expected " in message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("upsample_rate", "; did you mean upsample_rates?"),
        ("Learning_rate", "; did you mean learning_rate?"),
        ("resblock_kernal_size", "; did you mean resblock_kernel_size?"),
        ("dropout", ""),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(tmp_path, key, hint):
    path = write_config(tmp_path / "broken.json", **{key: 0.5})
    assert refusal(path) == f"{path}: {key} = 0.5: unknown key{hint}"


@pytest.mark.parametrize("contents", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_object_is_refused(tmp_path, contents):
    path = tmp_path / "broken.json"
    path.write_bytes(contents)
    assert "JSON" in refusal(path)


def test_a_key_that_is_given_twice_is_named(tmp_path):
    (tmp_path / "broken.json").write_bytes(NOT_JSON["twice"])
    assert "given twice: seed" in refusal(tmp_path / "broken.json")


def test_a_byte_order_mark_as_windows_writes_is_no_matter(tmp_path):
    path = write_config(tmp_path / "config.json")
    h = load_config(path)
    path.write_bytes(path.read_text().encode("utf-8-sig"))
    assert load_config(path) == h


@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_segments_too_short_for_the_discriminators_are_refused(tmp_path, samples):
    audio = {"segment_size": samples, "hop_size": samples, "n_fft": 8 + samples, "win_size": 8}
    rates = {"upsample_rates": [samples], "upsample_kernel_sizes": [samples + 2]}
    path = write_config(tmp_path / "broken.json", **audio, **rates, num_mels=2)
    assert f"segment_size = {samples}: expected at least 6" in refusal(path)


# As it was met, and neighbours: (the config's changes, the key, how many bands are empty).
EMPTY_BANDS = [
    (
        {"sampling_rate": 44100, "n_fft": 512, "win_size": 512, "num_mels": 128, "fmax": None},
        "num_mels",
        11,
    ),
    ({"num_mels": 300}, "num_mels", None),
    ({"n_fft": 258, "win_size": 256}, "num_mels", None),
    ({"fmax": 500}, "num_mels", None),
    ({"fmax_for_loss": 500}, "num_mels", None),
    ({"fmin": 60, "fmax": 500}, "num_mels", None),
    (
        {"n_ffts_for_loss": [256], "num_mels_for_loss": [64], "fmax_for_loss": 3000},
        "num_mels_for_loss",
        None,
    ),
]


@pytest.mark.parametrize(("changes", "key", "count"), EMPTY_BANDS)
@pytest.mark.filterwarnings("ignore:Empty filters")
def test_bands_that_would_always_be_silent_are_refused(tmp_path, changes, key, count):
    """Counted by librosa's filterbank, which only warns; one band fewer than too many is fine."""
    values = toy_values(**changes)
    of_loss = key == "num_mels_for_loss"
    values |= {"num_mels": 64, "n_fft": 256} if of_loss else {}
    fmaxes = [values["fmax_for_loss"]] + ([] if of_loss else [values["fmax"]])

    def empty_bands(num_mels: int) -> int:
        recipe = {"sr": values["sampling_rate"], "n_fft": values["n_fft"], "n_mels": num_mels}
        banks = (librosa.filters.mel(**recipe, fmin=values["fmin"], fmax=fmax) for fmax in fmaxes)
        return max(int((bank.max(axis=1) == 0).sum()) for bank in banks)

    message = refusal(write_config(tmp_path / "broken.json", **changes))
    shown = json.dumps(changes[key] if of_loss else values["num_mels"])
    assert message.startswith(f"{tmp_path / 'broken.json'}: {key} = {shown}: expected fewer")
    found = empty_bands(values["num_mels"])
    assert f"{found} bands hold no bin" in message
    assert count in (None, found)
    most = next(n for n in range(values["num_mels"], 0, -1) if empty_bands(n) == 0)
    changes = changes | {key: [most] if of_loss else most}
    load_config(write_config(tmp_path / "fine.json", **changes))


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no such config" in refusal(tmp_path / "nowhere.json")
    assert "directory" in refusal(tmp_path)


def test_the_command_line_says_it_in_one_line_before_any_other_file_is_opened(tmp_path):
    config = write_config(tmp_path / "broken.json", segment_size=2000)
    command = [sys.executable, ROOT / "train.py", "--config", config]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)  # no data there
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line == f"error: {config}: segment_size = 2000: expected a multiple of hop_size, 256"
    assert list(tmp_path.iterdir()) == [config]


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch believe in a number of GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    return pretend


@pytest.mark.parametrize(
    ("name", "count", "local_rank", "device"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 2, 0, "cuda:0"),
        ("auto", 2, 1, "cuda:1"),
        ("cpu", 2, 0, "cpu"),
        ("cuda", 2, 1, "cuda:1"),
        ("cuda:1", 2, 0, "cuda:1"),
    ],
)
def test_devices_are_found(gpus, monkeypatch, name, count, local_rank, device):
    gpus(count)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert select_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("cuda", 0, "this machine has 0 CUDA devices; try --device cpu"),
        ("cuda:0", 0, "this machine has 0 CUDA devices; try --device cpu"),
        ("cuda:2", 2, "this machine has 2 CUDA devices"),
        ("cuda:-1", 2, "expected auto, cpu, cuda or cuda:<index>"),
        ("cuda:x", 2, "expected auto, cpu, cuda or cuda:<index>"),
        ("gpu", 2, "expected auto, cpu, cuda or cuda:<index>"),
        ("meta", 2, "expected auto, cpu, cuda or cuda:<index>"),
        ("", 2, "expected auto, cpu, cuda or cuda:<index>"),
    ],
)
def test_devices_that_are_not_here_are_refused(gpus, name, count, said):
    gpus(count)
    with pytest.raises(UserError) as error:
        select_device(name)
    assert str(error.value).startswith(f"--device {name}: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("flags", "has_bfloat16"), [("avx2 fma", False), ("avx512_bf16 fma", True), (None, True)]
)
def test_a_processor_s_bfloat16_is_seen(monkeypatch, tmp_path, flags, has_bfloat16):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(distributed, "CPU_INFO", tmp_path / "cpuinfo")
    assert computes_in_bfloat16.__wrapped__(torch.device("cpu")) == has_bfloat16
