"""The comparisons behind the README's table of what learns; at length they are run by hand."""

import re

import pytest
import torch

from checkpoint import State
from env import UserError
from meldataset import MelDataset
from tools import learn
from tools.toy import ROOT, TOY, corpus_arguments, run_main


def test_the_script_prints_a_row_of_the_table_for_each_variant(corpus, monkeypatch, capsys):
    monkeypatch.setattr(learn, "COMMON", learn.COMMON | TOY)
    flags = corpus_arguments(corpus)[:6]
    run_main(learn, *flags, "--variants", "misr", "n_2", "--seeds", 1, 2, "--updates", 2)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [re.match(r"\| (\w+) ", row)[1] for row in rows] == ["misr", "n_2"]
    for row in rows:
        assert len(re.findall(r"\d\.\d{3}", row)) == 4  # two seeds, their mean, seconds
    assert rows[0] != rows[1]


@pytest.fixture
def update(corpus, monkeypatch):
    """A function that makes a variant's state, at toy size, and gives it one update."""
    monkeypatch.setattr(learn, "COMMON", learn.COMMON | TOY)
    monkeypatch.setattr(learn, "WARM_UP", 1)

    def update(name: str, adversarial: bool) -> tuple[State, dict[str, torch.Tensor]]:
        """The state after it, and the generator's parameters before it."""
        h = learn.make_config(learn.VARIANTS[name], seed=1, batch_size=2)
        state = learn.make_state(learn.VARIANTS[name], h)
        before = {name: p.detach().clone() for name, p in state.generator.named_parameters()}
        clips = MelDataset(h, corpus / "training.txt", corpus / "wavs")
        learn.learn(state, clips, updates=1, adversarial=adversarial)
        return state, before

    return update


def test_the_shared_block_of_twice_the_rate_takes_steps_of_twice_the_size(update):
    """Adam's first step is the learning rate, whatever the gradient, but for its epsilon."""
    state, before = update("twice_rate", adversarial=False)
    for name, after in state.generator.named_parameters():
        rate = 0.001 if ".resblock." in name else 0.0005
        assert float((after.detach() - before[name]).abs().max()) == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("adversarial", [False, True])
def test_discriminators_move_in_adversarial_comparisons_only(update, adversarial):
    state, _ = update("misr", adversarial)
    assert bool(state.optim_d.state) == adversarial


def test_the_noise_of_a_variant_is_what_it_says():
    def noise(name: str) -> float:
        state = learn.make_state(learn.VARIANTS[name], learn.make_config(learn.Variant(), 1, 4))
        conv = state.generator.resblocks[0].input_conv
        views = torch.eye(conv.in_channels).repeat(3, 1).unsqueeze(-1)
        return float((conv.weight.detach() - views).std()) * conv.in_channels**0.5

    assert noise("half_noise") == pytest.approx(0.25, rel=0.05)
    assert noise("misr") == pytest.approx(0.5, rel=0.05)
    assert noise("twice_noise") == pytest.approx(1.0, rel=0.05)


def test_the_commands_of_the_readme_are_understood(capsys):
    """Its rows are variants too, whose parameters are as it says."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python tools/learn\.py ?(.*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 4
    with pytest.raises(SystemExit):
        run_main(learn, "--help")
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {word for words in commands for word in words.split() if word[0] == "-"} <= flags
    rows = re.findall(r"^\| (\w+)[^|]* \| [\d,]+(?: adv\w+)? \| ([\d,]+) \|", readme, re.MULTILINE)
    assert {name for name, _ in rows} == set(learn.VARIANTS)
    for name, count in rows:
        generator = learn.make_state(
            learn.VARIANTS[name], learn.make_config(learn.VARIANTS[name], 1, 4)
        ).generator
        generator.remove_weight_norm()
        assert f"{sum(p.numel() for p in generator.parameters()):,}" == count


def test_too_few_clips_are_an_error_and_no_endless_wait(corpus):
    flags = corpus_arguments(corpus)[:6]
    with pytest.raises(UserError, match="expected 9 clips to train on"):
        run_main(learn, *flags, "--batch_size", 9, "--updates", 1)
