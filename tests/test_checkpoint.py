"""Files of a run that are not what they should be: named in one line, and nothing else happens."""

import copy

import pytest
import torch
from torch import nn

from checkpoint import (
    build_state,
    checkpoint_path,
    checkpoint_steps,
    load_optimizer,
    paired_steps,
    resume,
    save,
    warm_start,
)
from env import UserError
from inference import load_generator
from muon import Muon
from tests.conftest import new_checkpoint
from tools.toy import toy_config
from weights import load_matching

CPU = torch.device("cpu")


def adamw(*shapes: tuple[int, ...]) -> torch.optim.AdamW:
    """The optimizer of parameters of these shapes, after a step."""
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(params)
    sum(param.square().sum() for param in params).backward()
    optimizer.step()
    return optimizer


SAVED = adamw((2, 3), (4,)).state_dict()


def wrong(*path, value) -> dict:
    """SAVED, with the value at this path replaced."""
    saved = copy.deepcopy(SAVED)
    place = saved
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return saved


MISFITS = {
    "fewer": adamw((2, 3)).state_dict(),
    "in another order": adamw((4,), (2, 3)).state_dict(),
    "a list": [],
    "none": None,
    "no groups": wrong("param_groups", value=[]),
    "no state": wrong("state", value=None),
    "no first moment": wrong("state", 0, value={"step": torch.tensor(1.0)}),
    "a text for a count": wrong("state", 0, "step", value="x"),
    "a negative count": wrong("state", 0, "step", value=-1),
    "a first moment of another shape": wrong("state", 0, "exp_avg", value=torch.zeros(3)),
    "a second moment of another shape": wrong("state", 0, "exp_avg_sq", value=torch.zeros(3)),
}


@pytest.mark.parametrize("saved", MISFITS.values(), ids=MISFITS)
def test_moments_that_do_not_fit_are_named(saved):
    with pytest.raises(UserError, match=r"^do: its optimizer does not fit the config .*$"):
        load_optimizer(adamw((2, 3), (4,)), saved, "do")


def test_moments_of_another_optimizer_are_named():
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
    with pytest.raises(UserError, match=r"^do: its optimizer does not fit the config"):
        load_optimizer(Muon([weight, bias], 0.001, (0.8, 0.99)), SAVED, "do")


def test_moments_that_fit_are_taken():
    optimizer = adamw((2, 3), (4,))
    load_optimizer(optimizer, wrong("state", 0, "exp_avg", value=torch.full((2, 3), 7.0)), "do")
    assert optimizer.state_dict()["state"][0]["exp_avg"].unique().tolist() == [7]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config and the folder of a run that was saved at its start."""
    folder = tmp_path_factory.mktemp("run")
    h = toy_config(folder)
    save(build_state(h, CPU), folder / "cp", keep=1)
    return h, folder / "cp"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"mpd": None}, "does not fit the config"),
        ({"mpd": []}, "does not fit the config"),
        ("optim_d", "holds no optim_d"),
        ({"steps": "1"}, "steps = '1'; expected a count"),
        ({"epoch": None}, "epoch = None; expected a count"),
        ({"epoch_step": -1}, "epoch_step = -1; expected a count"),
        ({"steps": 1.5}, "steps = 1.5; expected a count"),
    ],
    ids=str,
)
def test_a_do_file_with_one_thing_amiss_is_named(run, change, said):
    h, folder = run
    path = checkpoint_path(folder, "do", 0)
    whole = torch.load(path)
    try:
        left = {k: v for k, v in whole.items() if k != change}
        torch.save(left if isinstance(change, str) else whole | change, path)
        with pytest.raises(UserError, match=f"^{path}: {said}.*$"):
            resume(build_state(h, CPU), folder)
    finally:
        torch.save(whole, path)


def test_contents_of_another_kind_are_named(tmp_path):
    path = new_checkpoint(tmp_path)
    weights, key = torch.load(path)["generator"], "conv_pre.bias"
    surplus = {"generator": weights | {"other.bias": weights[key]}}
    for contents, said in (
        (torch.zeros(3), "not a checkpoint of this family"),
        (surplus, r"does not fit the config: Unexpected key\(s\)"),
        ({"generator": weights | {key: weights[key].to_sparse()}}, "does not fit the config"),
        ({"generator": weights | {key: weights[key].to("meta")}}, "does not fit the config"),
    ):
        torch.save(contents, path)
        with pytest.raises(UserError, match=f"^{path}: {said}.*$"):
            load_generator(path)
    expected = f"^{tmp_path}: a folder; name a file in it, such as {path.name}$"
    with pytest.raises(UserError, match=expected):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    "contents", [{"generator": None}, {"generator": {"conv_pre.bias": torch.zeros(3)}}], ids=str
)
def test_a_warm_start_from_what_is_no_weights_is_one_line(contents, tmp_path):
    torch.save(contents, tmp_path / "x")
    with pytest.raises(UserError, match=f"^{tmp_path / 'x'}: .*$"):
        warm_start(build_state(toy_config(tmp_path), CPU), [tmp_path / "x"])


def test_a_layer_is_taken_whole_or_not_at_all():
    ours, theirs = (nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(1, 3, 3)) for _ in range(2))
    before = ours[1].weight.detach().clone()
    weights = theirs.state_dict() | {"1.bias": torch.zeros(7)}
    assert load_matching(ours, weights) == (["0"], ["1"])
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(ours[1].weight, before)


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    junk = ("g_5", "g_0000000x", "g_00000005.tmp", "xg_00000005", ".g_00000005.a.tmp")
    files = ("g_99999999", "g_100000000", "g_00000005", "do_00000005", "do_100000000")
    for name in (*junk, "g_00000005 (1)", *files):
        (tmp_path / name).touch()
    assert checkpoint_steps(tmp_path, "g") == [5, 99_999_999, 100_000_000]
    assert paired_steps(tmp_path) == [5, 100_000_000]
    assert checkpoint_steps(tmp_path / "none", "g") == []
