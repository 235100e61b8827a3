"""tools/ablate.py at toy size."""

import math
import re

import pytest
import torch

from checkpoint import State
from env import UserError
from meldataset import MelDataset
from tools import ablate
from tools.toy import ROOT, TOY, corpus_arguments, run_main


def test_each_variant_is_a_row_of_the_table(corpus, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "COMMON", ablate.COMMON | TOY)
    flags = corpus_arguments(corpus)[:6]
    run_main(ablate, *flags, "--variants", "misr", "n_2", "--seeds", 7, "--updates", 1)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [re.match(r"\| (\w+) ", row)[1] for row in rows] == ["misr", "n_2"]
    for row in rows:
        assert len(re.findall(r"\d\.\d{3}", row)) == 3  # of the seed, the mean, seconds
    assert rows[0] != rows[1]


@pytest.fixture
def update(corpus, monkeypatch):
    """A function that builds a variant's state at toy size and updates it once."""
    monkeypatch.setattr(ablate, "COMMON", ablate.COMMON | TOY)
    monkeypatch.setattr(ablate, "WARM_UP", 1)

    def update(name: str, adversarial: bool) -> tuple[State, dict[str, torch.Tensor]]:
        """Returns the state after it and the generator's parameters before it."""
        h = ablate.make_config(ablate.VARIANTS[name], 1, batch_size=2, adversarial=adversarial)
        state = ablate.make_state(ablate.VARIANTS[name], h)
        before = {name: p.detach().clone() for name, p in state.generator.named_parameters()}
        clips = MelDataset(h, corpus / "training.txt", corpus / "wavs")
        ablate.train_updates(state, clips, updates=1)
        return state, before

    return update


def test_twice_the_learning_rate_doubles_the_first_step_of_the_shared_block(update):
    """Adam's first step is the learning rate for any gradient."""
    state, before = update("twice_rate", adversarial=False)
    for name, after in state.generator.named_parameters():
        rate = 0.001 if ".resblock." in name else 0.0005
        assert float((after.detach() - before[name]).abs().max()) == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("adversarial", [False, True])
def test_discriminators_are_updated_in_adversarial_comparisons_only(update, adversarial):
    state, _ = update("misr", adversarial)
    assert bool(state.optim_d.state) == adversarial


@pytest.mark.parametrize(
    ("name", "noise"), [("misr", 0.5), ("half_noise", 0.25), ("twice_noise", 1.0)]
)
def test_the_noise_of_a_variant_is_as_declared(name, noise):
    conv = new_input_conv(name)
    identities = torch.eye(conv.in_channels).repeat(3, 1).unsqueeze(-1)
    std = float((conv.weight.detach() - identities).std()) * conv.in_channels**0.5
    assert std == pytest.approx(noise, rel=0.05)


def test_the_default_initialisation_is_pytorch_s():
    conv = new_input_conv("default_init")
    largest = conv.in_channels**-0.5
    assert float(conv.weight.detach().std()) == pytest.approx(largest / math.sqrt(3), rel=0.05)
    assert 0 < float(conv.bias.detach().abs().max()) <= largest


def new_input_conv(name: str) -> torch.nn.Conv1d:
    """The first input convolution of a variant."""
    h = ablate.make_config(ablate.VARIANTS[name], 1, batch_size=4, adversarial=False)
    return ablate.make_state(ablate.VARIANTS[name], h).generator.resblocks[0].input_conv


def test_too_few_clips_are_an_error(corpus):
    flags = corpus_arguments(corpus)[:6]
    with pytest.raises(UserError, match="expected 9 training clips"):
        run_main(ablate, *flags, "--batch_size", 9, "--updates", 1)


def test_rows_of_the_results_are_variants_and_have_their_parameters():
    rows = r"^\| (\w+)[^|]* \| [\d,]+(?: adversarial)? \| ([\d,]+) \|"
    text = (ROOT / "docs/ablations.md").read_text()
    found = [row for row in re.findall(rows, text, re.MULTILINE) if row[0] in ablate.VARIANTS]
    assert len(found) >= 14
    for name, count in set(found):
        h = ablate.make_config(ablate.VARIANTS[name], 1, batch_size=4, adversarial=False)
        generator = ablate.make_state(ablate.VARIANTS[name], h).generator
        generator.remove_weight_norm()
        assert f"{sum(p.numel() for p in generator.parameters()):,}" == count, name
