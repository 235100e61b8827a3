"""Configs that load, configs that are refused in one line, and names of devices."""

import dataclasses
import json

import pytest
import torch

import distributed
import train
from distributed import computes_in_bfloat16, select_device
from env import UserError, load_config, one_line
from tests.conftest import ALL_CONFIGS
from tools.toy import ROOT, run_main, toy_values, write_config
from utils import command_line

# config_v1.json of jik876/hifi-gan, unchanged.
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

OPTIONAL_KEYS = {"misr_merge", "discriminator_channel_mult"}

# (key, value, what is expected), for a shipped config at toy size
BROKEN_MISR = [
    # Types
    *((key, value, "an integer") for key in ("batch_size",) for value in ("16", 16.0, True)),
    ("resblock", 1, "a string"),
    ("fmin", True, "a number"),
    ("fmax", "8000", "a number or null"),
    ("learning_rate", float("nan"), "a number"),
    ("lambda_mel", float("inf"), "a number"),
    ("lambda_mel", 10**400, "a number"),
    ("discriminator_train_start_steps", 0.5, "an integer or null"),
    ("upsample_rates", 256, "a list, each an integer"),
    ("upsample_rates", [8, 8, 2, 2.0], "a list, each an integer"),
    ("resblock_dilation_sizes", [1, [3, 5]], "a list, each an integer or a list, each a list"),
    # Ranges
    *((key, 0, "more than 0") for key in ("upsample_initial_channel", "batch_size", "hop_size")),
    *((key, 0, "more than 0") for key in ("discriminator_channel_mult", "refiner_channels")),
    *((key, 0, "more than 0") for key in ("segment_size", "num_mels", "win_size", "lr_decay")),
    *((key, -1, "more than 0") for key in ("learning_rate", "n_fft", "sampling_rate")),
    *((key, -1, "0 or more") for key in ("lambda_mel", "lambda_feature", "num_workers", "seed")),
    *((key, -1, "0 or more") for key in ("lambda_f0", "lambda_aperiodicity", "adam_b2", "fmin")),
    ("discriminator_train_start_steps", -1, "0 or more, or null"),
    ("griffin_lim_steps", -1, "0 or more, or null"),
    ("adam_b1", 1, "less than 1"),
    ("lr_decay", 1.01, "at most 1"),
    *(("mel_blur", value, "0 to 1") for value in (-0.1, 1.1)),
    ("optimizer", "adam", '"adamw" or "muon"'),
    # Audio
    ("win_size", 1025, "at most n_fft, 1024"),
    ("n_fft", 1025, "hop_size, 256, plus an even number"),
    ("segment_size", 2049, "a multiple of hop_size, 256"),
    ("fmin", 11025, "less than sampling_rate / 2, 11025"),
    ("fmax", 0, "more than fmin, 0"),
    ("fmax", 11026, "at most sampling_rate / 2, 11025"),
    ("fmax_for_loss", 11026, "at most sampling_rate / 2, 11025"),
    ("num_mels", 1025, "at most n_fft, 1024"),
    ("mel_scale", "mel", '"slaney" or "htk"'),
    ("mel_norm", "htk", '"slaney" or null'),
    ("mel_power", 3, "1 or 2"),
    ("mel_log_base", 2, "null (natural logarithm) or 10"),
    ("mel_floor", 0, "more than 0"),
    ("stft_epsilon", -1, "0 or more"),
    ("mel_center", 1, "true or false"),
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
    ("lookahead_frames", 2, "no such key without griffin_lim_steps"),
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
    ("gen_istft_n_fft", 15, "a positive even number"),
    ("gen_istft_hop_size", 9, "1 to half of gen_istft_n_fft, 8"),
    ("gen_istft_hop_size", 0, "1 to half of gen_istft_n_fft, 8"),
    ("upsample_rates", [8, 4], "product, times gen_istft_hop_size, (128 here) is hop_size, 256"),
]
BROKEN_FRAME_RATE = [
    ("upsample_rates", [2, 2], "rates of 1 beside griffin_lim_steps"),
    ("lookahead_frames", 0, "1 to 7, or null"),
    ("lookahead_frames", 8, "1 to 7, or null"),
]
BROKEN = [("config_v2.json", *row) for row in BROKEN_MISR]
BROKEN += [("configs/istft_v2.json", *row) for row in BROKEN_ISTFT]
BROKEN += [("configs/hifigan_v1.json", *row) for row in BROKEN_MRF]
BROKEN += [("configs/frame_v2.json", *row) for row in BROKEN_FRAME_RATE]

NOT_JSON = {
    "empty": b"",
    "UTF-16": json.dumps(toy_values()).encode("utf-16"),
    "cut": b'{"resblock": "1",',
    "list": b"[1]",
    "null": b"null",
    "binary": b"\x80\x02\xff\x00",
    "deep": b"[" * 100_000,
}


def refusal(path) -> str:
    """Returns the one line with which load_config refuses the file `path`."""
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message


# ---------------------------------------------------------------------------------- good configs


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_are_frozen(path, capsys):
    h = load_config(path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        h.seed = 1
    assert hash(h) == hash(load_config(path))  # lists would have no hash
    assert h.uses_misr == ("resblock_num" in json.loads(path.read_text()))
    assert capsys.readouterr() == ("", "")


def test_hifigans_own_json_loads_as_mrf(tmp_path):
    path = tmp_path / "config_v1.json"
    path.write_text(HIFIGAN_V1)
    h = load_config(path, say=pytest.fail)
    assert h == load_config(ROOT / "configs/hifigan_v1.json")
    assert not h.uses_misr


def test_a_misr_config_without_misr_merge_uses_mean_and_says_so(tmp_path):
    path = write_config(tmp_path / "y-chan.json", misr_merge=None, num_gpus=0)
    ours, said = write_config(tmp_path / "ours.json"), []
    assert load_config(path, said.append) == load_config(ours, pytest.fail)
    assert load_config(path).misr_merge == "mean"
    assert said == [f'{path}: no misr_merge, so "mean" is used; y-chan\'s port uses "conv"']


def test_inference_ignores_unknown_keys_and_names_them_once(tmp_path):
    """The copy of LJ_V2's config in a public repository has such keys."""
    unknown = {"resblock_initial_channel": 64, "fmax_loss": 11025}
    path, said = write_config(tmp_path / "a\nb.json", **unknown), []
    h = load_config(path, said.append, ignore_unknown=True)
    assert h == load_config(write_config(tmp_path / "ours.json"))
    text = path.read_text().replace('"fmax_for_loss": null, ', "")
    (tmp_path / "theirs.json").write_text(text)
    assert load_config(tmp_path / "theirs.json", ignore_unknown=True) == h
    names = "resblock_initial_channel, fmax_loss"
    assert said == [f"{tmp_path}/a b.json: unknown keys ignored: {names}"]
    assert load_config(path, ignore_unknown=True) == h
    with pytest.raises(UserError, match="resblock_initial_channel = 64: unknown key"):
        load_config(path)


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = write_config(tmp_path / "config.json")
    h = load_config(path)
    path.write_bytes(path.read_text().encode("utf-8-sig"))
    assert load_config(path) == h


# ----------------------------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
    ("config", "key", "value", "expected"),
    BROKEN,
    ids=[f"{key}={str(value)[:20]}" for _, key, value, _ in BROKEN],
)
def test_broken_values_are_refused(tmp_path, config, key, value, expected):
    message = refusal(write_config(tmp_path / "broken.json", config, **{key: value}))
    assert f": {key} = {json.dumps(value)}"[:100] in message
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
        ("Learning_rate", "; did you mean learning_rate?"),
        ("resblock_kernal_size", "; did you mean resblock_kernel_size?"),
        ("dropout", ""),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(tmp_path, key, hint):
    path = write_config(tmp_path / "broken.json", **{key: 0.5})
    assert refusal(path) == f"{path}: {key} = 0.5: unknown key{hint}"


@pytest.mark.parametrize("contents", NOT_JSON.values(), ids=NOT_JSON)
def test_files_that_are_not_a_json_object_are_refused(tmp_path, contents):
    path = tmp_path / "broken.json"
    path.write_bytes(contents)
    assert "JSON" in refusal(path)


def test_a_key_that_is_given_twice_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(toy_values())[:-1] + ', "seed": 5}')
    assert "given twice: seed" in refusal(path)


@pytest.mark.parametrize("samples", [1, 5])
def test_segments_too_short_for_the_discriminators_are_refused(tmp_path, samples):
    audio = {"segment_size": samples, "hop_size": samples, "n_fft": 8 + samples, "win_size": 8}
    path = write_config(tmp_path / "broken.json", **audio)
    assert f"segment_size = {samples}: expected at least 6" in refusal(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no such config" in refusal(tmp_path / "nowhere.json")
    assert "directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segment_size": 2000}, "segment_size = 2000: expected a multiple of hop_size, 256"),
        ({"num_mels": 300}, "num_mels = 300: 7 bands from 0 to 8000 Hz contain no bin of the"),
    ],
)
def test_train_refuses_a_config_in_one_line_before_it_writes_a_file(
    tmp_path, monkeypatch, capsys, changes, said
):
    config = write_config(tmp_path / "broken.json", **changes)
    monkeypatch.chdir(tmp_path)  # where there are no data
    with pytest.raises(SystemExit) as end:
        command_line(lambda: run_main(train, "--config", config, "--device", "cpu"))
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert (end.value.code, printed.out) == (2, "")
    assert line.startswith("error: ") and said in line
    assert list(tmp_path.iterdir()) == [config]


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: broken\n  at\tline 3\n", "a: broken at line 3"),
        ("two  spaces.wav: ", "two  spaces.wav:"),
        ("\x1b]0;title\x07\x9b2J", "\\x1b]0;title\\x07\\x9b2J"),
        ("\udce9\u202e\u2028ß☃", "\\udce9\\u202e ß☃"),
        ("", ""),
    ],
)
def test_an_error_is_one_printable_line(text, line):
    assert one_line(text) == line
    assert str(UserError(text)) == line


def test_the_middle_of_a_very_long_error_is_left_out():
    line = str(UserError("a.txt: " + 10**7 * "x" + ": broken"))
    assert len(line) < 2000
    assert line.startswith("a.txt: xx") and line.endswith("xx: broken")


# --------------------------------------------------------------------------------------- devices


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that pretends that this machine has some number of GPUs."""

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
def test_device_names_are_resolved(gpus, monkeypatch, name, count, local_rank, device):
    gpus(count)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert select_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("cuda", 0, "this machine has 0 CUDA devices; try --device cpu"),
        ("cuda:2", 2, "this machine has 2 CUDA devices"),
        ("cuda:-1", 2, "expected auto, cpu, cuda or cuda:<index>"),
        ("meta", 2, "expected auto, cpu, cuda or cuda:<index>"),
        ("", 2, "expected auto, cpu, cuda or cuda:<index>"),
    ],
)
def test_missing_devices_are_refused(gpus, name, count, said):
    gpus(count)
    with pytest.raises(UserError) as error:
        select_device(name)
    assert str(error.value).startswith(f"--device {name}: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("flags", "has_bfloat16"), [("avx2 fma", False), ("avx512_bf16 fma", True), (None, True)]
)
def test_bfloat16_support_is_read_from_the_cpu_flags(monkeypatch, tmp_path, flags, has_bfloat16):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(distributed, "CPU_INFO", tmp_path / "cpuinfo")
    assert computes_in_bfloat16.__wrapped__(torch.device("cpu")) == has_bfloat16
