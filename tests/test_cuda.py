"""Tests that need a GPU: the same updates as on the CPU, resuming across devices, out of memory.

Skipped without a GPU. Alone: python -m pytest -m requires_cuda
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from checkpoint import State, build_state, paired_steps
from distill import Distillation
from inference import synthesize, to_inference
from models import Generator
from tests.runs import contents
from tools.toy import ROOT, corpus_arguments, run_main, toy_config, write_config

pytestmark = [
    pytest.mark.requires_cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CONFIGS = ("config_v2.json", "configs/istft_v2.json")


@pytest.fixture(autouse=True)
def _exact():
    """Disables TF32 and algorithms that are not deterministic."""
    backend = torch.backends.cudnn
    names = ("allow_tf32", "deterministic", "benchmark")
    before = [getattr(backend, name) for name in names]
    backend.allow_tf32, backend.deterministic, backend.benchmark = False, True, False
    yield
    for name, value in zip(names, before, strict=True):
        setattr(backend, name, value)


def batch(h, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mel = torch.randn(h.batch_size, h.num_mels, h.segment_size // h.hop_size)
    wav = 0.1 * torch.randn(h.batch_size, 1, h.segment_size)
    return mel.to(device), wav.to(device)


def gradients(state: State) -> torch.Tensor:
    """Returns the gradients of the last update, as one vector on the CPU."""
    modules = (state.generator, state.discriminators)
    return torch.cat([p.grad.flatten().cpu() for m in modules for p in m.parameters()])


@pytest.mark.parametrize("config", CONFIGS)
def test_an_update_is_that_of_the_cpu(tmp_path, config):
    h = toy_config(tmp_path, config)
    states = [build_state(h, device) for device in (CPU, CUDA)]
    for a, b in zip(*(state.generator.parameters() for state in states), strict=True):
        assert torch.equal(a, b.cpu())
    expected, found = (train.update(state, *batch(h, state.device)) for state in states)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.device == CUDA
        assert float(loss) == pytest.approx(float(expected[name]), rel=1e-3)
    ours, theirs = map(gradients, states)
    assert float((ours - theirs).norm() / ours.norm()) < 0.01


@pytest.mark.parametrize("config", CONFIGS)
def test_an_update_in_bf16_is_near_that_of_the_cpu(tmp_path, config):
    """The losses, weights and moments stay in float32."""
    h = toy_config(tmp_path, config)
    exact, state = build_state(h, CPU), build_state(h, CUDA, "bf16")
    convolved = []
    conv = state.discriminators.mpd.discriminators[0]
    conv.register_forward_hook(lambda _, __, y: convolved.append(y[0].dtype))
    expected = train.update(exact, *batch(h, CPU))
    for name, loss in train.update(state, *batch(h, CUDA)).items():
        assert loss.dtype == torch.float32
        # Rounding is larger in the log-mel of an untrained generator, which is quiet.
        tolerance = 0.02 if name in ("disc_loss_total", "gen_loss_feature") else 0.2
        assert float(loss) == pytest.approx(float(expected[name]), rel=tolerance)
    assert set(convolved) == {torch.bfloat16}
    for optimizer in (state.optim_g, state.optim_d):
        assert {moments["exp_avg"].dtype for moments in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("configs/hifigan_v1.json", "config_v1.json"),
        ("configs/frame_v2.json", "configs/frame_v3.json"),
    ],
)
def test_an_update_of_a_distillation_is_that_of_the_cpu(tmp_path, teacher, student):
    """The update follows a warm start, so that it includes the mel loss of the whole generator."""
    teacher_h, h = toy_config(tmp_path, teacher), toy_config(tmp_path, student)
    losses = []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        teacher, state = Generator(teacher_h).to(device), build_state(h, device)
        losses.append(
            Distillation(state, teacher, None, is_warm=True).update(state, *batch(h, device))
        )
    expected, found = losses
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.device == CUDA
        assert float(loss) == pytest.approx(float(expected[name]), rel=1e-3)


@pytest.fixture
def run(corpus, tmp_path):
    """Trains to a step; its data comes from a worker through pinned memory."""
    config = write_config(tmp_path / "config.json", num_workers=1)

    def run(folder: Path, steps: int, device: str, *flags) -> None:
        arguments = (*corpus_arguments(corpus), "--config", config, "--checkpoint_path", folder)
        flags = ("--device", device, "--training_steps", steps, *flags)
        assert run_main(train, *arguments, *flags) == 0

    return run


def weights(folder: Path, steps: int) -> np.ndarray:
    g, do = contents(folder, steps).values()
    tensors = [*g["generator"].values(), *do["mpd"].values(), *do["msd"].values()]
    assert {tensor.device for tensor in tensors} == {CPU}
    return torch.cat([tensor.flatten() for tensor in tensors]).numpy()


def test_a_run_goes_from_cpu_to_gpu_and_back(run, tmp_path):
    """The run equals one on the CPU, except for rounding, which Adam can turn into whole steps."""
    run(tmp_path / "straight", 6, "cpu")
    for steps, device in ((2, "cpu"), (4, "cuda"), (6, "cpu")):
        run(tmp_path / "wandering", steps, device)
    assert paired_steps(tmp_path / "wandering") == [2, 4, 6]
    difference = np.abs(weights(tmp_path / "wandering", 6) - weights(tmp_path / "straight", 6))
    learning_rate = 2e-4
    assert difference.max() <= 2 * learning_rate * 6
    assert np.mean(difference < learning_rate / 10) > 0.9  # of unrelated steps, few are so near


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run(run, tmp_path, capsys, precision):
    """The run includes validation, TensorBoard and printed lines."""
    flags = ("--summary_interval", 1, "--validation_interval", 2, "--stdout_interval", 1)
    run(tmp_path / "cp", 3, "cuda", "--precision", precision, *flags)
    shown = capsys.readouterr().out
    assert f"\ncuda:0, {precision}, 1 process(es)" in shown
    assert "Steps : 2, Validation Mel-Spec. Error : " in shown
    assert paired_steps(tmp_path / "cp") == [3]


@pytest.mark.parametrize("config", CONFIGS)
def test_chunks_are_the_whole(tmp_path, config):
    """They also equal the CPU's. The weights are such that the whole receptive field matters."""
    torch.manual_seed(0)
    generator = to_inference(Generator(toy_config(tmp_path, config)), CPU, "fp32")
    with torch.no_grad():
        for conv in generator.modules():
            if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d):
                conv.weight *= 1.5
    mel = torch.randn(80, 150)
    expected = synthesize(generator, mel)
    generator.to(CUDA)
    whole = synthesize(generator, mel.to(CUDA))
    scale = float(expected.abs().max())
    torch.testing.assert_close(whole.cpu(), expected, rtol=0, atol=1e-4 * scale)
    for chunk_frames in (7, 64):
        chunked = synthesize(generator, mel.to(CUDA), chunk_frames=chunk_frames)
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-5 * scale)


def start(code: str, *arguments) -> subprocess.CompletedProcess:
    """Runs `code` and then train.py in a new process."""
    code = f"import sys, torch, train, utils; {code}; utils.command_line(train.main)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU alone")
def test_each_gpu_gets_a_process(corpus, tmp_path):
    count = torch.cuda.device_count()
    config = write_config(tmp_path / "config.json", batch_size=count)
    flags = (*corpus_arguments(corpus), "--config", config, "--checkpoint_path", tmp_path / "cp")
    many = tmp_path / "many.txt"
    many.write_text("clip0\n" * 2 * count)
    flags += ("--input_training_file", many, "--device", "auto", "--training_steps", 3)
    done = start("sys.argv[0] = 'train.py'", *flags)
    assert done.returncode == 0, done.stderr
    assert f", {count} process(es), batch {count} of" in done.stdout
    assert paired_steps(tmp_path / "cp") == [3]


def test_out_of_memory_is_one_line(corpus, tmp_path):
    config = write_config(tmp_path / "config.json", upsample_initial_channel=512)
    flags = (*corpus_arguments(corpus), "--config", config, "--checkpoint_path", tmp_path / "cp")
    done = start("torch.cuda.set_per_process_memory_fraction(0.0001)", *flags, "--device", "cuda:0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line
