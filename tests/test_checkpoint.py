"""Saving and resuming: exactly, from damaged and foreign files, warm starts, the lock."""

import copy
import errno
import fcntl
import itertools
import math
import os
import re
import shutil

import pytest
import torch
from torch import nn

import train
from checkpoint import (
    build_state,
    checkpoint_path,
    checkpoint_steps,
    load_optimizer,
    locked,
    look_alikes,
    paired_steps,
    resume,
    save,
    warm_start,
)
from env import UserError, load_config
from inference import load_generator
from meldataset import MelDataset
from models import Generator
from muon import Muon
from tests.conftest import new_checkpoint
from tests.runs import Run, contents, equal_but_meta
from tools.toy import save_checkpoint, toy_config, write_config
from weights import load_matching, to_hifigan_names

CPU = torch.device("cpu")


@pytest.fixture
def run(corpus, tmp_path) -> Run:
    return Run(corpus, tmp_path)


# ----------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_exact(run, tmp_path, optimizer):
    """6 steps equal 3 and 3 more, with an epoch's end between; data workers change nothing."""
    write_config(run.config, optimizer=optimizer)
    assert run(6, folder=tmp_path / "straight") == 0
    write_config(run.config, optimizer=optimizer, num_workers=1)
    assert run(3) == 0
    write_config(run.config, optimizer=optimizer)
    assert run(6) == 0
    assert equal_but_meta(contents(run.folder, 6), contents(tmp_path / "straight", 6))


def test_a_checkpoint_records_its_origin_and_changes_are_printed(run, capsys):
    write_config(run.config, discriminator_train_start_steps=2)
    assert run(3) == 0
    meta = contents(run.folder, 3)["do"]["meta"]
    assert meta.keys() == {"version", "commit", "torch", "command", "config"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", meta["version"])
    assert meta["torch"] == torch.__version__
    assert meta["commit"]
    assert meta["command"].startswith("train.py --input_wavs_dir ")
    assert meta["command"].endswith("--training_steps 3 --checkpoint_interval 1")
    assert meta["config"] == run.config.read_text()
    write_config(run.config, lr_decay=0.5)  # without discriminator_train_start_steps
    assert run(4) == 0
    changed = "discriminator_train_start_steps 2 -> 0; lr_decay 0.999 -> 0.5"
    assert f"changed since then: {changed}\n" in capsys.readouterr().out
    assert run(5) == 0
    assert "changed since then" not in capsys.readouterr().out


def test_the_config_of_a_run_is_the_one_it_began_with(run, monkeypatch):
    text = run.config.read_bytes()

    def edited_meanwhile(*arguments):
        write_config(run.config, fmax=4000)
        return MelDataset(*arguments)

    monkeypatch.setattr(train, "MelDataset", edited_meanwhile)
    run(1)
    assert (run.folder / "config.json").read_bytes() == text


def test_a_corpus_may_become_smaller(run, tmp_path):
    """The epoch ends where the smaller corpus has no more steps."""
    (tmp_path / "short.txt").write_text("clip0\nclip1\n")
    run(1)
    run(2, "--input_training_file", tmp_path / "short.txt")
    assert [contents(run.folder, 2)["do"][key] for key in ("epoch", "epoch_step")] == [2, 0]


def test_a_folder_that_is_deleted_during_the_run_gets_its_config_again(run, monkeypatch):
    step = train.training_step

    def deleting(state, mel, wav):
        if state.steps == 1:
            shutil.rmtree(run.folder)
        return step(state, mel, wav)

    monkeypatch.setattr(train, "training_step", deleting)
    assert run(3, "--checkpoint_interval", 1, "--summary_interval", 100) == 0
    assert run.names() == ["do_00000002", "do_00000003", "g_00000002", "g_00000003"]
    assert (run.folder / "config.json").read_bytes() == run.config.read_bytes()
    load_generator(run.folder / "g_00000003")


def test_discriminators_may_leave_and_return(run, tmp_path, capsys):
    """A run without discriminators saves none; when they return, they start untrained."""
    run(1)
    write_config(run.config, discriminator_train_start_steps=None)
    assert run(2) == 0
    assert "M parameters, no discriminators\n" in capsys.readouterr().out
    do = contents(run.folder, 2)["do"]
    assert do["mpd"] == do["msd"] == do["optim_d"]["state"] == {}
    write_config(run.config)
    assert run(3) == 0
    assert "do_00000002: of a run without discriminators; they start" in capsys.readouterr().out
    assert contents(run.folder, 3)["do"]["mpd"]


def test_griffin_lim_steps_may_change_but_not_the_kind_of_the_generator(run):
    write_config(run.config, "configs/frame_v3.json", griffin_lim_steps=1)
    run(1)
    write_config(run.config, "configs/frame_v3.json", griffin_lim_steps=2)
    assert run(2) == 0
    write_config(run.config)
    with pytest.raises(UserError, match="a run with griffin_lim_steps, but now without: expected"):
        run(3)
    write_config(run.folder / "config.json", "configs/hifigan_v2.json")
    with pytest.raises(UserError, match="a run of an MRF, but now a MISR: expected the same model"):
        run(3)


def test_without_its_config_a_checkpoint_of_another_model_is_still_an_error(run):
    run(1)
    (run.folder / "config.json").unlink()
    write_config(run.config, upsample_initial_channel=32)
    with pytest.raises(UserError, match=r"g_00000001: does not fit the config: .*size mismatch"):
        run(2)


# -------------------------------------------------------------------------- damaged and other files


def test_a_damaged_checkpoint_is_named_and_skipped(run, capsys):
    run(2)
    for prefix, damage in itertools.product(("g", "do"), (b"", b"text", None)):
        file = checkpoint_path(run.folder, prefix, 2)
        whole = file.read_bytes()
        damaged = whole[:-2000] if damage is None else damage
        file.write_bytes(damaged)
        state = build_state(load_config(run.config), CPU)
        assert resume(state, run.folder)
        assert state.steps == 1
        assert f"skipped: {file}" in capsys.readouterr().out
        assert file.read_bytes() == damaged
        file.write_bytes(whole)


def test_if_nothing_can_be_resumed_nothing_is_overwritten(run):
    run(1)
    checkpoint_path(run.folder, "g", 1).write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint in it can be read"):
        run(2)
    checkpoint_path(run.folder, "do", 1).unlink()
    with pytest.raises(UserError, match="--warm_start"):
        run(2)
    assert run.names() == ["g_00000001"]


@pytest.mark.parametrize("damages_newest", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch, damages_newest):
    """The message names the last good checkpoint; a damaged one is not good."""
    run(2)
    if damages_newest:
        checkpoint_path(run.folder, "do", 2).write_bytes(b"damaged")
    calls, loss = itertools.count(1), train.generator_loss
    bad = lambda scores: loss(scores) * (math.nan if next(calls) == 1 else 1)  # noqa: E731
    monkeypatch.setattr(train, "generator_loss", bad)
    first, good = (2, "1") if damages_newest else (3, "2")
    with pytest.raises(UserError, match=rf"not finite at step {first}; .*g_0000000{good}$"):
        run(9, "--checkpoint_interval", 6, "--stdout_interval", 5)
    assert run.names() == ["do_00000001", "do_00000002", "g_00000001", "g_00000002"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    state = build_state(toy_config(tmp_path), CPU)
    with torch.no_grad():
        state.generator.conv_pre.bias[0] = float("inf")
    with pytest.raises(UserError, match=r"not finite at step 0; .*no checkpoint yet"):
        save(state, tmp_path, keep=3)
    assert not list(tmp_path.glob("g_*"))


def adamw(*shapes: tuple[int, ...]) -> torch.optim.AdamW:
    """The optimizer of parameters of these shapes, after a step."""
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(params)
    sum(param.square().sum() for param in params).backward()
    optimizer.step()
    return optimizer


SAVED = adamw((2, 3), (4,)).state_dict()


def wrong(*path, value) -> dict:
    """SAVED with the value at this path replaced."""
    saved = copy.deepcopy(SAVED)
    place = saved
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return saved


MISFITS = {
    "fewer": adamw((2, 3)).state_dict(),
    "in another order": adamw((4,), (2, 3)).state_dict(),
    "none": None,
    "no groups": wrong("param_groups", value=[]),
    "no first moment": wrong("state", 0, value={"step": torch.tensor(1.0)}),
    "a text for a count": wrong("state", 0, "step", value="x"),
    "a negative count": wrong("state", 0, "step", value=-1),
    "a second moment of another shape": wrong("state", 0, "exp_avg_sq", value=torch.zeros(3)),
}


@pytest.mark.parametrize("saved", MISFITS.values(), ids=MISFITS)
def test_moments_that_do_not_fit_are_an_error(saved):
    with pytest.raises(UserError, match=r"^do: its optimizer does not fit the config .*$"):
        load_optimizer(adamw((2, 3), (4,)), saved, "do")


def test_moments_of_another_optimizer_are_an_error():
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
    with pytest.raises(UserError, match=r"^do: its optimizer does not fit the config"):
        load_optimizer(Muon([weight, bias], 0.001, (0.8, 0.99)), SAVED, "do")


def test_moments_that_fit_are_loaded():
    optimizer = adamw((2, 3), (4,))
    load_optimizer(optimizer, wrong("state", 0, "exp_avg", value=torch.full((2, 3), 7.0)), "do")
    assert optimizer.state_dict()["state"][0]["exp_avg"].unique().tolist() == [7]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the config and the folder of a run that was saved at its start."""
    folder = tmp_path_factory.mktemp("run")
    h = toy_config(folder)
    state = build_state(h, CPU)
    state.meta["config"] = (folder / "toy.json").read_text()
    save(state, folder / "cp", keep=1)
    return h, folder / "cp"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mpd": None}, "does not fit the config"),
        ("optim_d", "contains no optim_d"),
        ({"steps": "1"}, "steps = '1'; expected a count"),
        ({"epoch_step": -1}, "epoch_step = -1; expected a count"),
        ({"steps": 1.5}, "steps = 1.5; expected a count"),
    ],
    ids=str,
)
def test_a_do_file_with_one_wrong_entry_is_an_error(saved, change, message):
    h, folder = saved
    path = checkpoint_path(folder, "do", 0)
    whole = torch.load(path)
    try:
        left = {k: v for k, v in whole.items() if k != change}
        torch.save(left if isinstance(change, str) else whole | change, path)
        with pytest.raises(UserError, match=f"^{path}: {message}.*$"):
            resume(build_state(h, CPU), folder)
    finally:
        torch.save(whole, path)


def test_a_file_with_other_contents_is_an_error(tmp_path):
    path = new_checkpoint(tmp_path)
    weights, key = torch.load(path)["generator"], "conv_pre.bias"
    surplus = {"generator": weights | {"other.bias": weights[key]}}
    for content, message in (
        (torch.zeros(3), "not a checkpoint"),
        (surplus, r"does not fit the config: Unexpected key\(s\)"),
        ({"generator": weights | {key: weights[key].to_sparse()}}, "does not fit the config"),
        ({"generator": weights | {key: weights[key].to("meta")}}, "does not fit the config"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=f"^{path}: {message}.*$"):
            load_generator(path)
    with pytest.raises(UserError, match=f"^{tmp_path}: a folder; .*{path.name}$"):
        load_generator(tmp_path)


def test_checkpoints_are_found_in_the_order_of_their_steps_and_look_alikes_are_named(
    run, tmp_path, capsys
):
    alike = ("g_00000005 (1)", "g_00000005.pth", "g_5", "do_00000005_copy", "g_0000000x")
    other = (
        "xg_00000005",
        ".g_00000005.a.tmp",
        "g_00000005.onnx",
        "g_5_generated.wav",
    )
    files = ("g_99999999", "g_100000000", "g_00000005", "do_00000005", "do_100000000")
    run.folder.mkdir()
    for name in (*alike, *other, *files):
        (run.folder / name).touch()
    assert checkpoint_steps(run.folder, "g") == [5, 99_999_999, 100_000_000]
    assert paired_steps(run.folder) == [5, 100_000_000]
    assert checkpoint_steps(tmp_path / "none", "g") == look_alikes(tmp_path / "none") == []
    for name in files:
        (run.folder / name).unlink()
    run(1)
    expected = f"{run.folder}: not used, {', '.join(sorted(alike))}: expected names such as g_"
    assert expected in capsys.readouterr().out


# -------------------------------------------------------------------------------------- warm starts


@pytest.mark.parametrize(
    ("theirs", "ours", "blocks", "own"),
    [
        ("configs/hifigan_v2.json", "config_v2.json", "2, 5, 8, 11", 3),
        ("configs/hifigan_v1.json", "configs/istft_v2.json", "2, 5", 1),
    ],
)
def test_a_misr_takes_what_fits_from_an_mrf(tmp_path, capsys, theirs, ours, blocks, own):
    """It takes outer layers, and blocks of its kernel size, also from an MRF of more stages."""
    torch.manual_seed(1)
    other = Generator(toy_config(tmp_path, theirs))
    path = tmp_path / "g_00000009"
    save_checkpoint(path, {"generator": to_hifigan_names(other)})
    state = build_state(toy_config(tmp_path, ours), CPU)
    warm_start(state, [path])
    for layer in ("conv_pre", "ups.1"):
        weights = (g.get_submodule(layer).weight for g in (state.generator, other))
        torch.testing.assert_close(*weights)
    last = blocks.count(",")
    shared = state.generator.resblocks[last].resblock.convs1[0].weight
    torch.testing.assert_close(shared, other.resblocks[3 * last + 2].convs1[0].weight)
    output = capsys.readouterr().out
    assert f"the shared blocks from its resblocks {blocks}; not taken: " in output
    assert "resblocks.0.input_conv" in output
    assert state.steps == 0


@pytest.mark.parametrize(("theirs", "ours"), [(None, 0), (0, None), (0, 0)])
def test_a_warm_start_may_be_with_or_without_discriminators(run, capsys, theirs, ours):
    write_config(run.config, discriminator_train_start_steps=theirs)
    run(1)
    write_config(run.config, discriminator_train_start_steps=ours)
    state = build_state(load_config(run.config), CPU)
    warm_start(state, [checkpoint_path(run.folder, p, 1) for p in ("g", "do")])
    output = capsys.readouterr().out
    assert re.search(r"g_00000001: generator: (\d+) of \1 layers taken", output)
    where = {(None, 0): "file", (0, None): "config"}.get((theirs, ours))
    reason = f"nothing taken, because the {where} has no discriminators"
    assert output.endswith(f"do_00000001: msd: {reason if where else '24 of 24 layers taken'}\n")


def test_warm_start_is_for_new_runs_only(run, capsys):
    run(1)
    run(2, "--warm_start", checkpoint_path(run.folder, "g", 1))
    assert "--warm_start not used" in capsys.readouterr().out
    assert contents(run.folder, 2)["do"]["steps"] == 2


@pytest.mark.parametrize(
    "contents", [{"generator": None}, {"generator": {"conv_pre.bias": torch.zeros(3)}}], ids=str
)
def test_a_warm_start_from_other_contents_is_one_line(contents, tmp_path):
    torch.save(contents, tmp_path / "x")
    with pytest.raises(UserError, match=f"^{tmp_path / 'x'}: .*$"):
        warm_start(build_state(toy_config(tmp_path), CPU), [tmp_path / "x"])


def test_if_no_layer_fits_the_cure_is_named(tmp_path):
    path = new_checkpoint(tmp_path / "other", upsample_initial_channel=32)
    with pytest.raises(UserError, match=r"no layer .* fits --config; use the config\.json beside"):
        warm_start(build_state(toy_config(tmp_path), CPU), [path])


def test_a_layer_is_taken_whole_or_not_at_all():
    ours, theirs = (nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(1, 3, 3)) for _ in range(2))
    before = ours[1].weight.detach().clone()
    weights = theirs.state_dict() | {"1.bias": torch.zeros(7)}
    assert load_matching(ours, weights) == (["0"], ["1"])
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(ours[1].weight, before)


# ----------------------------------------------------------------------------------------- the lock


def test_only_rank_0_of_a_run_locks(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(run.folder):
        assert not run.folder.exists()


def test_without_locks_a_run_continues_and_says_so(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert run(1) == 0
    assert f"{run.folder}: cannot be locked (No locks available)" in capsys.readouterr().out
