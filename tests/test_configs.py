"""Every shipped config, at toy width, is trained for one step and synthesizes."""

import pytest
import torch

from checkpoint import build_state
from env import load_config
from inference import synthesize, to_inference
from models import Generator
from tests.conftest import ALL_CONFIGS
from tools.toy import ROOT, toy_config
from train import training_step

# Each stage has channels at this width. Everything else is as shipped.
WIDTH = {"upsample_initial_channel": 64, "batch_size": 1}


@pytest.fixture(params=ALL_CONFIGS, ids=lambda path: path.stem)
def h(request, tmp_path):
    """A shipped config at toy width, with short segments."""
    full = load_config(request.param)
    name = str(request.param.relative_to(ROOT))
    return toy_config(tmp_path, name, segment_size=4 * full.hop_size, **WIDTH)


def wide_generator(h) -> Generator:
    """Returns a generator in float64 whose whole receptive field matters.

    The phase of frame-rate generators accumulates rounding errors, which are small in float64.
    """
    generator = to_inference(Generator(h), "cpu", "fp32").double()
    with torch.no_grad():
        for conv in generator.resblocks.modules():
            if isinstance(conv, torch.nn.Conv1d):
                conv.weight *= 2
    return generator


def test_one_training_step(h):
    state = build_state(h, torch.device("cpu"), "fp32")
    frames = h.segment_size // h.hop_size
    before = [p.detach().clone() for p in state.generator.parameters()]
    mel, wav = torch.randn(1, h.num_mels, frames) - 5, 0.1 * torch.randn(1, 1, h.segment_size)
    losses = training_step(state, mel, wav)
    assert all(torch.isfinite(loss) for loss in losses.values())
    after = state.generator.parameters()
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_chunks_make_the_whole(h):
    generator = wide_generator(h)
    mel = torch.rand(h.num_mels, 50) * 12 - 11
    whole = synthesize(generator, mel)
    assert whole.shape == (50 * h.hop_size - h.lead,)
    assert whole.std() > 0
    pieces = synthesize(generator, mel, chunk_frames=7)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-7 * float(whole.abs().max()))
