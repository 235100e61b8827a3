"""The inference scripts on files, and the functions of inference.py, with toy weights."""

import json
import math
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import inference
import inference_e2e
import meldataset
import utils
from env import Config, UserError, load_config
from inference import load_generator, stream, synthesize, synthesize_batch
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram
from models import Generator
from tests.conftest import new_checkpoint, new_generator, random_mel
from tools.toy import ROOT, run_main, save_checkpoint, speech_like, write_config

RATE, HOP = 22050, 256
CLIPS = {"a": 0.3, "b": 0.21, "sub/c": 0.25}  # seconds
MRF_CONFIG = "configs/hifigan_v2.json"
GENERATORS = {
    "MISR": ("config_v2.json", {}),
    "MISR conv": ("config_v2.json", {"misr_merge": "conv"}),
    "MRF": (MRF_CONFIG, {}),
    "MRF resblock 2": ("configs/hifigan_v3.json", {}),
    "iSTFT": ("configs/istft_v2.json", {}),
}


def write_clips(folder: Path, clips: dict[str, float]) -> Path:
    """Writes speech-like wavs of so many seconds."""
    for seed, (name, seconds) in enumerate(clips.items()):
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, speech_like(seconds, RATE, seed=seed), RATE, subtype="PCM_16")
    return folder


def read_pcm(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0].astype(int)


def mel_of(path: Path, h: Config) -> torch.Tensor:
    """Returns the mel [num_mels, T] that inference.py computes of a file."""
    mel = inference.read_wav_mel(path, h, LogMelSpectrogram(h, h.fmax))
    return mel.part(0, mel.frames)


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A g_ file of a toy MISR generator, with its config.json."""
    return new_checkpoint(tmp_path_factory.mktemp("cp"))


@pytest.fixture(scope="module")
def wavs(tmp_path_factory) -> Path:
    """A folder with CLIPS, one of them in a subfolder."""
    return write_clips(tmp_path_factory.mktemp("wavs"), CLIPS)


@pytest.fixture(scope="module")
def mels(checkpoint, wavs, tmp_path_factory) -> Path:
    """A folder with the mels of CLIPS, written by meldataset.py."""
    folder, config = tmp_path_factory.mktemp("mels"), checkpoint.with_name("config.json")
    flags = ("--config", config, "--input_wavs_dir", wavs, "--output_dir", folder)
    assert run_main(meldataset, *flags) == 0
    return folder


def vocode(checkpoint: Path, inputs: Path, output_dir: Path, *flags) -> int:
    """Runs inference.py; returns its status."""
    flags = ("--checkpoint_file", checkpoint, "--output_dir", output_dir, "--device", "cpu", *flags)
    return run_main(inference, "--input_wavs_dir", inputs, *flags)


def vocode_mels(checkpoint: Path, inputs: Path, output_dir: Path, *flags) -> int:
    """Runs inference_e2e.py; returns its status."""
    flags = ("--checkpoint_file", checkpoint, "--output_dir", output_dir, "--device", "cpu", *flags)
    return run_main(inference_e2e, "--input_mels_dir", inputs, *flags)


def record_shapes(monkeypatch, owner: type, method: str) -> list[torch.Size]:
    """Returns a list that fills with the shape of each tensor passed to a method."""
    original, shapes = getattr(owner, method), []
    monkeypatch.setattr(
        owner, method, lambda self, x, *more: shapes.append(x.shape) or original(self, x, *more)
    )
    return shapes


# ------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("script", [vocode, vocode_mels])
def test_each_file_of_a_folder_is_vocoded_and_a_bad_one_is_skipped(
    script, checkpoint, wavs, mels, tmp_path, capsys
):
    source, extension, ending = {
        vocode: (wavs, "wav", "generated"),
        vocode_mels: (mels, "npy", "generated_e2e"),
    }[script]
    folder, output = tmp_path / "in", tmp_path / "out"
    for name in CLIPS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{extension}").symlink_to(source / f"{name}.{extension}")
    bad = folder / f"sub/bad.{extension}"
    bad.write_text("neither audio nor an array\n")
    assert script(checkpoint, folder, output) == 1
    assert files_in(output) == [f"{name}_{ending}.wav" for name in CLIPS]
    for name, seconds in CLIPS.items():
        info = soundfile.info(output / f"{name}_{ending}.wav")
        assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)
        assert (info.samplerate, info.frames) == (RATE, int(seconds * RATE) // HOP * HOP)
    printed = capsys.readouterr()
    assert f"3 files written to {output}, 1 skipped" in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith(f"skipped: {bad}: ")


def test_wavs_and_their_mels_give_the_same_samples(checkpoint, wavs, mels, tmp_path):
    assert vocode(checkpoint, wavs, tmp_path) == 0
    assert vocode_mels(checkpoint, mels, tmp_path) == 0
    for name in CLIPS:
        paths = [tmp_path / f"{name}_{ending}.wav" for ending in ("generated", "generated_e2e")]
        np.testing.assert_array_equal(*map(read_pcm, paths))


def test_the_sampling_rate_is_the_configs(wavs, tmp_path):
    checkpoint = new_checkpoint(tmp_path / "cp", sampling_rate=16000, fmax=8000)
    assert vocode(checkpoint, wavs / "a.wav", tmp_path) == 0
    info = soundfile.info(tmp_path / "a_generated.wav")
    assert info.samplerate == 16000
    assert info.frames == math.ceil(int(0.3 * RATE) * 16000 / RATE) // HOP * HOP


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_written_wav_holds_the_samples_of_synthesize(checkpoint, wavs, tmp_path, precision):
    assert vocode(checkpoint, wavs / "a.wav", tmp_path, "--precision", precision) == 0
    generator, h = load_generator(checkpoint, precision=precision)
    wav = synthesize(generator, mel_of(wavs / "a.wav", h))
    expected = np.rint(32767 * wav.double().numpy())
    assert expected.std() > 100  # of 32767
    assert np.abs(read_pcm(tmp_path / "a_generated.wav") - expected).max() <= 1


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bf16_is_warned_about_where_the_processor_lacks_it(
    checkpoint, wavs, tmp_path, monkeypatch, capsys, has_bfloat16
):
    monkeypatch.setattr(utils, "computes_in_bfloat16", lambda _: has_bfloat16)
    for precision in ("fp32", "bf16"):
        assert vocode(checkpoint, wavs / "a.wav", tmp_path, "--precision", precision) == 0
        is_warned = "this processor has no bfloat16" in capsys.readouterr().err
        assert is_warned == (precision == "bf16" and not has_bfloat16)


def test_mels_with_other_settings_are_vocoded_with_one_warning(checkpoint, mels, tmp_path, capsys):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.load(mels / f"{name}.npy") / np.log(10))
    assert vocode_mels(checkpoint, tmp_path, tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "expected natural logarithms" in line)
    assert line.startswith(f"{tmp_path / 'a.npy'}: values from -")
    assert line.endswith("(2 of 2 mels look wrong)")
    assert len(files_in(tmp_path / "out")) == 2


def test_one_frame_is_enough(checkpoint, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(1.0)[:HOP], RATE)
    assert vocode(checkpoint, tmp_path / "a.wav", tmp_path / "out") == 0
    assert len(read_pcm(tmp_path / "out/a_generated.wav")) == HOP


def test_the_level_of_a_wav_is_kept(checkpoint, tmp_path):
    h, wav = load_config(checkpoint.with_name("config.json")), speech_like(0.5)
    for name, gain in (("a", 1), ("softer", 0.1)):
        soundfile.write(tmp_path / f"{name}.wav", gain * wav, RATE, subtype="FLOAT")
    mel, softer = (mel_of(tmp_path / f"{name}.wav", h) for name in ("a", "softer"))
    loud = mel > math.log(0.05)  # far above the floor of the mels
    assert loud.float().mean() > 0.1
    shift = torch.full_like(mel[loud], math.log(0.1))
    torch.testing.assert_close(softer[loud] - mel[loud], shift, rtol=0, atol=1e-4)


def test_too_little_memory_is_one_line(checkpoint, wavs, tmp_path, monkeypatch):
    def run_out(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")

    monkeypatch.setattr(Generator, "features", run_out)
    with pytest.raises(UserError, match="out of memory; try a smaller --chunk_frames"):
        vocode(checkpoint, wavs, tmp_path / "out")
    assert files_in(tmp_path / "out") == []


def test_a_terminated_run_leaves_no_temporary_file(checkpoint, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.tile(speech_like(1.0), 600), RATE)
    flags = ("--checkpoint_file", checkpoint, "--input_wavs_dir", tmp_path / "long.wav")
    output = tmp_path / "out"
    command = [sys.executable, "inference.py", *flags, "--output_dir", output, "--chunk_frames", 8]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(output.glob("*.tmp")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143
    assert list(output.iterdir()) == []


# ------------------------------------------------------------------------------ chunks and batches


@pytest.mark.parametrize("script", [vocode, vocode_mels])
def test_chunks_give_the_same_samples(script, checkpoint, wavs, mels, tmp_path, monkeypatch):
    inputs = {vocode: wavs, vocode_mels: mels}[script]
    assert script(checkpoint, inputs, tmp_path / "whole", "--chunk_frames", 0) == 0
    shapes = record_shapes(monkeypatch, Generator, "features")
    assert script(checkpoint, inputs, tmp_path / "chunks", "--chunk_frames", 16) == 0
    # Two chunks of each clip, each with 13 frames of context at most on one side.
    assert len(shapes) == 2 * len(CLIPS)
    assert all(B == 1 and T < 16 + 13 for B, _, T in shapes)
    names = files_in(tmp_path / "whole")
    assert files_in(tmp_path / "chunks") == names
    for name in names:
        whole, chunks = (read_pcm(tmp_path / way / name) for way in ("whole", "chunks"))
        assert whole.std() > 100
        np.testing.assert_allclose(chunks, whole, rtol=0, atol=1)


def test_the_mel_of_a_long_wav_is_computed_in_chunks(checkpoint, tmp_path, monkeypatch):
    write_clips(tmp_path, {"long": 3.0})
    shapes = record_shapes(monkeypatch, LogMelSpectrogram, "forward")
    assert vocode(checkpoint, tmp_path / "long.wav", tmp_path, "--chunk_frames", 64) == 0
    assert len(shapes) == math.ceil(3.0 * RATE // HOP / 64)
    context = 2 * (13 + 4)  # the receptive field, and frames that the ends of an STFT change
    assert max(length for _, length in shapes) <= (64 + context) * HOP


BATCHED = {"a": 0.6, "b": 0.3, "d": 0.4, "sub/c": 0.5}  # seconds: 51, 25, 34 and 43 frames


@pytest.mark.parametrize(
    ("chunk_frames", "calls", "padded"),
    [
        (1024, [(2, 34), (2, 51)], {"b", "sub/c"}),
        (43, [(2, 34), (1, 43), (1, 43 + 8), (1, 13 + 8)], {"b"}),
    ],
    ids=["shorter than a chunk", "one longer than a chunk"],
)
def test_a_batch_changes_only_the_ends_of_its_shorter_files(
    checkpoint, tmp_path, monkeypatch, chunk_frames, calls, padded
):
    write_clips(tmp_path / "in", BATCHED)
    (tmp_path / "in/bad.wav").write_text("no audio\n" * 50)
    flags = ("--chunk_frames", chunk_frames)
    assert vocode(checkpoint, tmp_path / "in", tmp_path / "alone", *flags) == 1
    shapes = record_shapes(monkeypatch, Generator, "features")
    flags += ("--batch_size", 3)
    assert vocode(checkpoint, tmp_path / "in", tmp_path / "together", *flags) == 1
    assert [(B, T) for B, _, T in shapes] == calls
    assert files_in(tmp_path / "together") == [f"{name}_generated.wav" for name in BATCHED]
    _, after = load_generator(checkpoint)[0].receptive_field
    for name in BATCHED:
        paths = [tmp_path / way / f"{name}_generated.wav" for way in ("alone", "together")]
        alone, together = map(read_pcm, paths)
        difference = np.abs(together - alone)
        assert difference[: -after * HOP].max() <= 1
        assert difference.max() > 100 if name in padded else difference.max() <= 1


def test_in_a_batch_silence_follows_shorter_mels(checkpoint):
    generator, mels = load_generator(checkpoint)[0], [random_mel(frames) for frames in (5, 40, 20)]
    for mel, wav in zip(mels, synthesize_batch(generator, mels), strict=True):
        frames = mel.shape[1]
        followed = torch.cat([mel, torch.full((80, 40 - frames), SILENT_LOG_MEL)], dim=1)
        expected = synthesize(generator, followed)[: frames * HOP]
        torch.testing.assert_close(wav, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- unusable weights


UNUSABLE = {
    "a do_* file": (
        lambda g, _: save_checkpoint(g, {"mpd": {}, "msd": {}, "optim_g": {}, "steps": 1}),
        "g_00000001: holds no generator; take the g_* file beside it",
    ),
    "no weights": (
        lambda g, _: save_checkpoint(g, {"generator": [1, 2, 3]}),
        "g_00000001: holds no generator",
    ),
    "no file": (lambda g, _: g.unlink(), "g_00000001: no such checkpoint file"),
    "truncated": (
        lambda g, _: g.write_bytes(g.read_bytes()[:-2000]),
        "g_00000001: not a readable checkpoint",
    ),
    "no config": (lambda _, config: config.unlink(), "g_00000001: no config.json beside it"),
    "damaged config": (
        lambda _, config: config.write_text('{"resblock": "1",'),
        "config.json: not a readable JSON config",
    ),
    "wider config": (
        lambda _, config: write_config(config, upsample_initial_channel=32),
        "g_00000001: does not fit the config: size mismatch for conv_pre",
    ),
    "MRF's config": (
        lambda _, config: write_config(config, MRF_CONFIG),
        "g_00000001: does not fit the config: Missing key(s)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_checkpoint_is_named_in_one_line(damage, message, wavs, tmp_path):
    checkpoint = new_checkpoint(tmp_path / "cp")
    damage(checkpoint, checkpoint.with_name("config.json"))
    with pytest.raises(UserError) as error:
        vocode(checkpoint, wavs, tmp_path / "out")
    assert str(error.value).startswith(str(tmp_path / "cp" / message))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize(("config", "changes"), GENERATORS.values(), ids=GENERATORS)
def test_a_loaded_generator_is_the_trained_one_without_weight_norm(tmp_path, config, changes):
    trained = new_generator(tmp_path, config, **changes)
    loaded, h = load_generator(new_checkpoint(tmp_path, config, **changes))
    assert h == load_config(tmp_path / "config.json")
    assert not loaded.training
    assert not any("parametrizations" in name for name in loaded.state_dict())
    mel = random_mel(9)
    wav = synthesize(loaded, mel)
    assert wav.shape == (9 * h.hop_size,)
    assert not wav.requires_grad
    assert wav.std() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(wav, trained(mel[None])[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        *GENERATORS.values(),
        ("configs/frame_v2.json", {"griffin_lim_steps": 2}),
        ("configs/frame_v3.json", {"griffin_lim_steps": 2, "lookahead_frames": 3}),
    ],
)
def test_pieces_of_any_size_equal_the_whole(tmp_path, config, changes):
    """In float64, because phases add up the rounding of F0."""
    generator = load_generator(new_checkpoint(tmp_path, config, **changes))[0].double()
    mel = random_mel(24)
    whole = synthesize(generator, mel)
    for chunk_frames in (1, 7, 25):
        pieces = list(stream(generator, mel, chunk_frames))
        sizes = [min(chunk_frames, 24 - i) for i in range(0, 24, chunk_frames)]
        assert [len(piece) for piece in pieces] == [HOP * size for size in sizes]
        difference = (torch.cat(pieces) - whole).abs().max()
        assert float(difference / whole.abs().max()) < 1e-6


def test_mels_of_several_forms_give_the_same_samples(checkpoint):
    generator, _ = load_generator(checkpoint)
    mel = random_mel(5).half().float()
    expected = synthesize(generator, mel)
    for form in (mel[None], mel.double(), mel.half(), mel.numpy(), mel.flip(1).numpy()[:, ::-1]):
        torch.testing.assert_close(synthesize(generator, form), expected)


@pytest.mark.parametrize(
    ("mel", "error", "message"),
    [
        ("mel", TypeError, "a mel of type str: expected a tensor"),
        (torch.zeros(80, 5) > 0, TypeError, "a mel of torch.bool: expected real numbers"),
        (torch.zeros(5, 80), ValueError, r"shape \[5, 80\]: expected \[80, T\] or \[1, 80, T\]"),
        (torch.zeros(2, 80, 5), ValueError, r"shape \[2, 80, 5\]: expected"),
        (torch.zeros(80, 0), ValueError, r"shape \[80, 0\]: expected one frame or more"),
        (torch.full((80, 5), math.nan), ValueError, "NaN or infinity"),
        (torch.full((80, 5), 1e39, dtype=torch.float64), ValueError, "NaN or infinity"),
    ],
)
def test_other_mels_are_refused(checkpoint, mel, error, message):
    generator, _ = load_generator(checkpoint)
    with pytest.raises(error, match=message):
        synthesize(generator, mel)


def test_a_negative_number_of_frames_is_refused(checkpoint):
    with pytest.raises(ValueError, match="chunk_frames = -1: expected 0 or more"):
        stream(load_generator(checkpoint)[0], random_mel(5), chunk_frames=-1)


@pytest.mark.parametrize("name", ["MISR conv", "iSTFT"])
def test_bf16_is_close_to_fp32_and_the_waveform_is_in_fp32(tmp_path, name):
    config, changes = GENERATORS[name]
    checkpoint, mel = new_checkpoint(tmp_path, config, **changes), random_mel(50)
    wav = synthesize(load_generator(checkpoint)[0], mel)
    generator, _ = load_generator(checkpoint, precision="bf16")
    dtypes = {name.split(".")[0]: p.dtype for name, p in generator.named_parameters()}
    in_bf16 = dict.fromkeys(("conv_pre", "ups", "resblocks"), torch.bfloat16)
    assert dtypes == in_bf16 | {"conv_post": torch.float32}
    bf16_wav = synthesize(generator, mel)
    assert bf16_wav.dtype == torch.float32
    assert bf16_wav.ne(bf16_wav.bfloat16()).float().mean() > 0.9
    snr = 10 * float((wav.var() / (bf16_wav - wav).var()).log10())
    assert 20 < snr < 50


def through_pickle(generator: Generator) -> Generator:
    return pickle.loads(pickle.dumps(generator))


def through_trace(generator: Generator) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is old, and follows one path
        return torch.jit.trace(generator, random_mel(20)[None])


@pytest.mark.parametrize("convert", [through_pickle, through_trace])
@pytest.mark.parametrize("config", ["config_v2.json", "configs/istft_v2.json"])
def test_a_loaded_generator_can_be_pickled_and_traced(tmp_path, config, convert):
    generator, _ = load_generator(new_checkpoint(tmp_path, config))
    mels = torch.stack([random_mel(30), random_mel(30)])
    with torch.no_grad():
        torch.testing.assert_close(convert(generator)(mels), generator(mels), rtol=0, atol=1e-6)


HOST = """
import json, os, signal, sys
import numpy as np
import torch
from inference import load_generator, synthesize

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

generator, _ = load_generator(sys.argv[1])
state = {"threads": torch.get_num_threads()}
state["denormals"] = bool(torch.full((1,), 1e-310, dtype=torch.float64) * 2 > 0)
array = np.ones(20_000_000)
full = resident()
del array
state["freed"] = full - resident()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if len(synthesize(generator, torch.zeros(80, 100))) == 25600 else 1)
state["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(state))
"""


def test_loading_a_generator_does_not_change_the_calling_process(tmp_path):
    """It can also still fork: a child would wait for threads that it does not have."""
    checkpoint = new_checkpoint(tmp_path, upsample_initial_channel=128)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HOST, checkpoint],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        check=True,
    )
    state = json.loads(ran.stdout.splitlines()[-1])
    assert state.pop("freed") > 150  # of 160 MB
    assert state == {"threads": 2, "denormals": True, "child": 0}
