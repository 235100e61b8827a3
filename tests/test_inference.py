"""From wavs and mels to speech, by the scripts themselves and from Python, with toy weights."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
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
from inference import load_generator, synthesize, synthesize_batch
from meldataset import SILENT_LOG_MEL, LogMelSpectrogram
from models import Generator
from tests.conftest import new_checkpoint, new_generator, random_mel
from tools.toy import ROOT, run_main, save_checkpoint, speech_like, write_config

RATE = 22050
HOP = 256
CLIPS = {"a": 0.3, "b": 0.21, "sub/c": 0.25}  # seconds
MRF_CONFIG = "configs/hifigan_v2.json"


def write_wav_file(path: Path, wav: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    container = "OGG" if subtype == "OPUS" else None  # None: as the name says
    soundfile.write(path, wav, rate, subtype=subtype, format=container)
    return path


def read_pcm(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0].astype(int)


def mel_of(path: Path, h: Config) -> torch.Tensor:
    """The mel [num_mels, T] that inference.py takes of a file."""
    mel = inference.read_wav_mel(path, h, LogMelSpectrogram(h, h.fmax))
    return mel.part(0, mel.frames)


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A g_ file of a toy MISR generator, with its config.json."""
    return new_checkpoint(tmp_path_factory.mktemp("cp"))


def write_clips(folder: Path, clips: dict[str, float]) -> Path:
    """Writes speech-like wavs of so many seconds."""
    for seed, (name, seconds) in enumerate(clips.items()):
        wav = speech_like(seconds, RATE, seed=seed)
        write_wav_file(folder / f"{name}.wav", wav, subtype="PCM_16")
    return folder


@pytest.fixture(scope="module")
def wavs(tmp_path_factory) -> Path:
    """A folder with CLIPS, one of them in a folder of its own."""
    return write_clips(tmp_path_factory.mktemp("wavs"), CLIPS)


def vocode(checkpoint: Path, inputs: Path, output_dir: Path, *flags) -> int:
    """Runs inference.py; returns its status."""
    return run_main(
        inference,
        *("--input_wavs_dir", inputs, "--output_dir", output_dir),
        *("--checkpoint_file", checkpoint, "--device", "cpu", *flags),
    )


def vocode_mels(checkpoint: Path, inputs: Path, output_dir: Path, *flags) -> int:
    """Runs inference_e2e.py; returns its status."""
    return run_main(
        inference_e2e,
        *("--input_mels_dir", inputs, "--output_dir", output_dir),
        *("--checkpoint_file", checkpoint, "--device", "cpu", *flags),
    )


def write_mels(checkpoint: Path, inputs: Path, output_dir: Path) -> int:
    """Runs meldataset.py; returns its status."""
    return run_main(
        meldataset,
        *("--config", checkpoint.with_name("config.json")),
        *("--input_wavs_dir", inputs, "--output_dir", output_dir),
    )


# --- The scripts


def test_each_wav_of_a_folder_is_vocoded(checkpoint, wavs, tmp_path, capsys):
    assert vocode(checkpoint, wavs, tmp_path / "out") == 0
    assert files_in(tmp_path / "out") == [f"{name}_generated.wav" for name in CLIPS]
    for name, seconds in CLIPS.items():
        info = soundfile.info(tmp_path / f"out/{name}_generated.wav")
        assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)
        assert info.samplerate == RATE
        assert info.frames == int(seconds * RATE) // HOP * HOP
    assert "3 files written" in capsys.readouterr().out


def test_the_config_gives_the_sampling_rate(wavs, tmp_path):
    checkpoint = new_checkpoint(tmp_path / "cp", sampling_rate=16000, fmax=8000)
    assert vocode(checkpoint, wavs / "a.wav", tmp_path) == 0
    info = soundfile.info(tmp_path / "a_generated.wav")
    assert info.samplerate == 16000
    assert info.frames == math.ceil(int(0.3 * RATE) * 16000 / RATE) // HOP * HOP


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_written_wav_holds_what_the_generator_says(checkpoint, wavs, tmp_path, precision):
    assert vocode(checkpoint, wavs / "a.wav", tmp_path, "--precision", precision) == 0
    generator, h = load_generator(checkpoint, precision=precision)
    wav = synthesize(generator, mel_of(wavs / "a.wav", h))
    expected = np.rint(32767 * wav.double().numpy())
    assert expected.std() > 100  # of 32767: no silence
    assert np.abs(read_pcm(tmp_path / "a_generated.wav") - expected).max() <= 1


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_who_asks_for_bfloat16_is_told_where_the_processor_has_none(
    checkpoint, wavs, tmp_path, monkeypatch, capsys, has_bfloat16
):
    monkeypatch.setattr(utils, "computes_in_bfloat16", lambda _: has_bfloat16)
    for precision in ("fp32", "bf16"):
        assert vocode(checkpoint, wavs / "a.wav", tmp_path, "--precision", precision) == 0
        said = "this processor has no bfloat16" in capsys.readouterr().err
        assert said == (precision == "bf16" and not has_bfloat16)


def test_mels_of_wavs_give_what_the_wavs_give(checkpoint, wavs, tmp_path):
    assert write_mels(checkpoint, wavs, tmp_path / "mels") == 0
    assert files_in(tmp_path / "mels") == [f"{name}.npy" for name in CLIPS]
    assert vocode(checkpoint, wavs, tmp_path / "a") == 0
    assert vocode_mels(checkpoint, tmp_path / "mels", tmp_path / "b") == 0
    assert files_in(tmp_path / "b") == [f"{name}_generated_e2e.wav" for name in CLIPS]
    for name in CLIPS:
        from_wav = read_pcm(tmp_path / f"a/{name}_generated.wav")
        np.testing.assert_array_equal(
            read_pcm(tmp_path / f"b/{name}_generated_e2e.wav"), from_wav, strict=True
        )


def test_mels_of_another_recipe_are_said_once_and_vocoded(checkpoint, wavs, tmp_path, capsys):
    assert write_mels(checkpoint, wavs, tmp_path / "mels") == 0
    mels = sorted((tmp_path / "mels").rglob("*.npy"))
    for path in mels:
        np.save(path, np.load(path) / np.log(10))
    mels[0].write_bytes(b"damaged")
    capsys.readouterr()
    assert vocode_mels(checkpoint, tmp_path / "mels", tmp_path / "out") == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "expected natural logarithms" in line)
    assert line.startswith(f"{mels[1]}: values from -")
    assert len(files_in(tmp_path / "out")) == len(mels) - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda mel: mel[None],
        lambda mel: mel.astype(np.float16),
        lambda mel: mel.astype(np.float64),
        np.asfortranarray,
    ],
    ids=["[1, num_mels, T]", "float16", "float64", "Fortran order"],
)
def test_a_mel_may_be_saved_in_other_ways(checkpoint, tmp_path, change):
    mel = np.random.default_rng(0).uniform(-11, 1, (80, 12)).astype(np.float16)
    mel = mel.astype(np.float32)
    np.save(tmp_path / "plain.npy", mel)
    np.save(tmp_path / "other.npy", change(mel))
    for name in ("plain", "other"):
        assert vocode_mels(checkpoint, tmp_path / f"{name}.npy", tmp_path) == 0
    plain, other = (read_pcm(tmp_path / f"{name}_generated_e2e.wav") for name in ("plain", "other"))
    np.testing.assert_array_equal(other, plain, strict=True)


def garbage(path: Path) -> None:
    path.write_bytes(b"RIFF" + np.random.default_rng(0).bytes(500))


def text(path: Path) -> None:
    path.write_text("no sound\n" * 50)


def truncated_header(path: Path) -> None:
    write_wav_file(path, np.zeros(2000))
    path.write_bytes(path.read_bytes()[:30])


def wav_of(values: np.ndarray) -> Callable[[Path], Path]:
    return lambda path: write_wav_file(path, values)


GOOD_SOUNDS = {  # path: rate, channels, how it is stored
    "8-bit.wav": (8000, 1, "PCM_U8"),
    "16-bit.WAV": (16000, 2, "PCM_16"),
    "studio/24-bit.wav": (96000, 6, "PCM_24"),
    "studio/32-bit.wav": (44100, 1, "PCM_32"),
    "studio/float.wav": (48000, 2, "FLOAT"),
    "studio/double.aiff": (RATE, 1, "DOUBLE"),
    "web/some/where/a.flac": (96000, 2, "PCM_24"),
    "web/some/where/b.ogg": (44100, 2, "VORBIS"),
    "web/c.opus": (48000, 1, "OPUS"),
    "web/d.mp3": (44100, 1, "MPEG_LAYER_III"),
}
BAD_SOUNDS = {
    "garbage.wav": (garbage, "cannot be read as audio"),
    "text.wav": (text, "cannot be read as audio"),
    "web/no bytes.mp3": (Path.touch, "cannot be read as audio"),
    "web/truncated header.wav": (truncated_header, "cannot be read as audio"),
    "studio/no samples.wav": (wav_of(np.zeros(0)), "0 samples"),
    "studio/one sample.wav": (wav_of(np.zeros(1)), f"1 samples at {RATE} Hz; expected at least"),
    "studio/too short.wav": (wav_of(np.zeros(HOP - 1)), f"{HOP - 1} samples"),
    "NaN.wav": (wav_of(np.full(2000, np.nan)), "NaN"),
}


def test_all_good_sounds_of_a_folder_are_vocoded_and_each_bad_one_is_named(
    checkpoint, tmp_path, capsys
):
    folder = tmp_path / "in"
    for name, (rate, channels, subtype) in GOOD_SOUNDS.items():
        wav = np.repeat(speech_like(0.2, rate)[:, None], channels, axis=1)
        write_wav_file(folder / name, wav, rate, subtype)
    for name, (make, _) in BAD_SOUNDS.items():
        make(folder / name)
    text(folder / "web/notes.txt")
    assert vocode(checkpoint, folder, tmp_path / "out") == 1
    stems = [Path(name).with_suffix("") for name in GOOD_SOUNDS]
    assert files_in(tmp_path / "out") == sorted(f"{stem}_generated.wav" for stem in stems)
    for stem in stems:
        pcm = read_pcm(tmp_path / "out" / f"{stem}_generated.wav")
        assert len(pcm) == int(0.2 * RATE) // HOP * HOP
        assert pcm.std() > 100
    printed = capsys.readouterr()
    lines = sorted(printed.err.splitlines())
    for line, (name, (_, reason)) in zip(lines, sorted(BAD_SOUNDS.items()), strict=True):
        assert line.startswith(f"skipped: {folder / name}: ")
        assert reason in line
    assert "1 files passed over" in printed.out
    written = f"{len(GOOD_SOUNDS)} files written to {tmp_path / 'out'}, {len(BAD_SOUNDS)} skipped"
    assert written in printed.out


@pytest.mark.parametrize("output_dir", ["in/out", "in"])
def test_what_a_run_has_written_into_its_inputs_is_not_vocoded_by_the_next(
    checkpoint, tmp_path, output_dir, capsys
):
    write_clips(tmp_path / "in", CLIPS)
    for _ in range(2):
        assert vocode(checkpoint, tmp_path / "in", tmp_path / output_dir) == 0
        assert capsys.readouterr().out == f"{len(CLIPS)} files written to {tmp_path / output_dir}\n"
    written = [path for path in files_in(tmp_path / "in") if path.endswith("_generated.wav")]
    assert len(written) == len(CLIPS)


def test_two_inputs_with_one_output_are_an_error_before_anything_is_written(checkpoint, tmp_path):
    write_clips(tmp_path / "in", {"0": 0.2, "a": 0.2})
    write_wav_file(tmp_path / "in/a.flac", speech_like(0.2), subtype="PCM_16")
    with pytest.raises(UserError, match=r"a\.flac and .*a\.wav would both be written to .*a_gen"):
        vocode(checkpoint, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def zipped_mel(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), mel=np.zeros((80, 12), np.float32))
    path.with_suffix(".npz").rename(path)


def npy_of(values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, values)


BAD_MELS = {
    "transposed": (npy_of(np.zeros((12, 80))), "it looks transposed: swap its last two axes"),
    "bands": (npy_of(np.zeros((100, 12))), "shape [100, 12]; expected [80, T] or [1, 80, T]"),
    "two": (npy_of(np.zeros((2, 80, 12))), "shape [2, 80, 12]"),
    "no frames": (npy_of(np.zeros((80, 0))), "shape [80, 0]"),
    "0-d": (npy_of(np.float32(1)), "shape []"),
    "NaN": (npy_of(np.full((80, 12), np.nan)), "NaN"),
    "objects": (npy_of(np.full((80, 12), None)), "not a readable .npy array"),
    "no bytes": (Path.touch, "not a readable .npy array"),
    "renamed .npz": (zipped_mel, "not a readable .npy array"),
}


def test_good_mels_of_a_folder_are_vocoded_and_each_bad_one_is_named(checkpoint, tmp_path, capsys):
    for name, (make, _) in BAD_MELS.items():
        make(tmp_path / f"{name}.npy")
    for name in ("a", "z"):
        np.save(tmp_path / f"{name}.npy", np.zeros((80, 12), np.float32))
    assert vocode_mels(checkpoint, tmp_path, tmp_path / "out") == 1
    assert files_in(tmp_path / "out") == ["a_generated_e2e.wav", "z_generated_e2e.wav"]
    lines = sorted(capsys.readouterr().err.splitlines())
    for line, (name, (_, reason)) in zip(lines, sorted(BAD_MELS.items()), strict=True):
        assert line.startswith(f"skipped: {tmp_path / name}.npy: ")
        assert reason in line


class Touch:
    """Unpickles into a new file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_mel_is_not_run(checkpoint, tmp_path, capsys):
    mel, trace = tmp_path / "in/bad.npy", tmp_path / "trace"
    mel.parent.mkdir()
    mel.write_bytes(pickle.dumps(Touch(trace)))
    np.load(mel, allow_pickle=True)
    trace.unlink()  # so the code is there, and works
    assert vocode_mels(checkpoint, mel, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"skipped: {mel}: not a readable .npy array")
    assert not trace.exists()


def test_one_frame_is_enough(checkpoint, tmp_path):
    write_wav_file(tmp_path / "a.wav", speech_like(1.0)[:HOP])
    assert vocode(checkpoint, tmp_path / "a.wav", tmp_path / "out") == 0
    assert len(read_pcm(tmp_path / "out/a_generated.wav")) == HOP


# --- Chunks and batches


@pytest.fixture(scope="module")
def mels(checkpoint, wavs, tmp_path_factory) -> Path:
    """A folder with the mels of CLIPS."""
    folder = tmp_path_factory.mktemp("mels")
    assert write_mels(checkpoint, wavs, folder) == 0
    return folder


def spy_on(monkeypatch, owner: type, seen: list) -> None:
    """Notes the shape of what each call of `owner.forward` is given."""
    forward = owner.forward
    monkeypatch.setattr(
        owner, "forward", lambda self, x, *more: seen.append(x.shape) or forward(self, x, *more)
    )


@pytest.mark.parametrize("script", [vocode, vocode_mels])
def test_chunks_write_the_same_samples(script, checkpoint, wavs, mels, tmp_path, monkeypatch):
    inputs, shapes = {vocode: wavs, vocode_mels: mels}[script], []
    assert script(checkpoint, inputs, tmp_path / "whole", "--chunk_frames", 0) == 0
    spy_on(monkeypatch, Generator, shapes)
    assert script(checkpoint, inputs, tmp_path / "chunks", "--chunk_frames", 16) == 0
    # None fits in one chunk: the first hears itself, the last what the receptive field reaches too.
    assert {B for B, _, _ in shapes} == {1}
    assert len(shapes) == 2 * len(CLIPS)
    assert max(frames for _, _, frames in shapes) < 16 + 13 + 13
    names = files_in(tmp_path / "whole")
    assert files_in(tmp_path / "chunks") == names
    for name in names:
        whole, chunks = (read_pcm(tmp_path / way / name) for way in ("whole", "chunks"))
        assert whole.std() > 100
        np.testing.assert_allclose(chunks, whole, rtol=0, atol=1)


def test_the_mel_of_a_long_wav_is_never_computed_whole(checkpoint, tmp_path, monkeypatch):
    write_clips(tmp_path, {"long": 3.0})
    shapes = []
    spy_on(monkeypatch, LogMelSpectrogram, shapes)
    assert vocode(checkpoint, tmp_path / "long.wav", tmp_path, "--chunk_frames", 64) == 0
    frames = int(3.0 * RATE) // HOP
    assert len(shapes) == math.ceil(frames / 64)
    around_a_chunk = 2 * (13 + 4)  # the receptive field, and frames that an STFT's edge would bend
    assert max(length for _, length in shapes) <= (64 + around_a_chunk) * HOP < frames * HOP / 2


BATCHED = {"a": 0.6, "b": 0.3, "d": 0.4, "sub/c": 0.5}  # seconds: 51, 25, 34 and 43 frames


@pytest.mark.parametrize(
    "chunk_frames, calls, bent",
    [
        (1024, [(2, 34), (2, 51)], {"b", "sub/c"}),
        (43, [(2, 34), (1, 43), (1, 43), (1, 26 + 8)], {"b"}),
    ],
    ids=["shorter than a chunk", "one longer than a chunk"],
)
def test_a_batch_of_files_sounds_as_each_alone_but_for_the_ends(
    checkpoint, tmp_path, monkeypatch, capsys, chunk_frames, calls, bent
):
    write_clips(tmp_path / "in", BATCHED)
    garbage(tmp_path / "in/bad.wav")
    shapes, flags = [], ("--chunk_frames", chunk_frames)
    assert vocode(checkpoint, tmp_path / "in", tmp_path / "alone", *flags) == 1
    capsys.readouterr()
    spy_on(monkeypatch, Generator, shapes)
    flags += ("--batch_size", 3)
    assert vocode(checkpoint, tmp_path / "in", tmp_path / "together", *flags) == 1
    assert [(B, T) for B, _, T in shapes] == calls
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped: {tmp_path / 'in/bad.wav'}: ")
    assert files_in(tmp_path / "together") == [f"{name}_generated.wav" for name in BATCHED]
    _, after = load_generator(checkpoint)[0].receptive_field
    for name in BATCHED:
        paths = [tmp_path / way / f"{name}_generated.wav" for way in ("alone", "together")]
        alone, together = map(read_pcm, paths)
        difference = np.abs(together - alone)
        assert difference[: -after * HOP].max() <= 1
        # At their ends, those shorter than another of their batch hear silence follow.
        assert difference.max() > 100 if name in bent else difference.max() <= 1


# --- What a user can get wrong with a checkpoint


def do_file(folder: Path) -> str:
    contents = {"mpd": {}, "msd": {}, "optim_g": {}, "optim_d": {}, "steps": 1}
    save_checkpoint(new_checkpoint(folder), contents)
    return "g_00000001: holds no generator; take the g_* file beside it"


def no_such_file(folder: Path) -> str:
    new_checkpoint(folder).unlink()
    return "g_00000001: no such checkpoint file"


def truncated(folder: Path) -> str:
    path = new_checkpoint(folder)
    path.write_bytes(path.read_bytes()[:-2000])
    return "g_00000001: not a readable checkpoint"


def no_config(folder: Path) -> str:
    new_checkpoint(folder)
    (folder / "config.json").unlink()
    return "g_00000001: no config.json beside it"


def damaged_config(folder: Path) -> str:
    new_checkpoint(folder)
    (folder / "config.json").write_text('{"resblock": "1",')
    return "config.json: not a readable JSON config"


def wider_config(folder: Path) -> str:
    new_checkpoint(folder)
    write_config(folder / "config.json", upsample_initial_channel=32)
    return "g_00000001: does not fit the config: size mismatch for conv_pre"


def mrf_config(folder: Path) -> str:
    new_checkpoint(folder)
    write_config(folder / "config.json", MRF_CONFIG)
    return "g_00000001: does not fit the config: Missing key(s)"


def no_weights(folder: Path) -> str:
    save_checkpoint(new_checkpoint(folder), {"generator": [1, 2, 3]})
    return "g_00000001: holds no generator"


@pytest.mark.parametrize(
    "make",
    [
        *(do_file, no_such_file, truncated, no_weights),
        *(no_config, damaged_config, wider_config, mrf_config),
    ],
)
def test_an_unusable_checkpoint_is_named(make, wavs, tmp_path):
    said = make(tmp_path / "cp")
    with pytest.raises(UserError) as error:
        vocode(tmp_path / "cp/g_00000001", wavs, tmp_path / "out")
    assert str(error.value).startswith(str(tmp_path / "cp" / said))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "write, read",
    [
        (torch.save, partial(torch.load, weights_only=False)),
        (
            lambda contents, path: path.write_bytes(pickle.dumps(contents, protocol=2)),
            lambda path: pickle.loads(path.read_bytes()),
        ),
    ],
    ids=["torch", "pickle"],
)
def test_code_in_a_checkpoint_is_not_run(tmp_path, write, read):
    checkpoint, trace = new_checkpoint(tmp_path), tmp_path / "trace"
    write({"generator": Touch(trace)}, checkpoint)
    read(checkpoint)
    trace.unlink()  # so the code is there, and works
    with pytest.raises(UserError) as error:
        load_generator(checkpoint)
    assert str(error.value).startswith(f"{checkpoint}: ")
    assert not trace.exists()


def test_a_missing_folder_is_named(checkpoint, tmp_path):
    with pytest.raises(UserError, match="none: no such file or folder"):
        vocode(checkpoint, tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- From Python


GENERATORS = {
    "MISR": ("config_v2.json", {}),
    "MISR conv": ("config_v2.json", {"misr_merge": "conv"}),
    "MRF": (MRF_CONFIG, {}),
    "MRF resblock 2": ("configs/hifigan_v3.json", {}),
    "iSTFT": ("configs/istft_v2.json", {}),
}
generators = pytest.mark.parametrize("config, changes", GENERATORS.values(), ids=GENERATORS)


@generators
def test_a_loaded_generator_is_the_trained_one_stripped(tmp_path, config, changes):
    trained = new_generator(tmp_path, config, **changes)
    loaded, h = load_generator(new_checkpoint(tmp_path, config, **changes))
    assert h == load_config(tmp_path / "config.json")
    assert not loaded.training
    assert not any("parametrizations" in name for name in loaded.state_dict())
    mel = random_mel(9)
    wav = synthesize(loaded, mel)
    assert wav.shape == (9 * h.hop_size,)
    assert not wav.requires_grad
    assert wav.std() > 0.01  # no silence
    with torch.no_grad():
        torch.testing.assert_close(wav, trained(mel[None])[0, 0], rtol=0, atol=1e-5)


def through_a_pickle(generator: Generator) -> Generator:
    return pickle.loads(pickle.dumps(generator))


def through_a_file(generator: Generator) -> Generator:
    file = io.BytesIO()
    torch.save(generator, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_trace(generator: Generator) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is old, and that it follows one path
        return torch.jit.trace(generator, random_mel(20)[None])


@pytest.mark.parametrize("through", [through_a_pickle, through_a_file, through_a_trace])
@pytest.mark.parametrize("config", ["config_v2.json", "configs/istft_v2.json"])
def test_a_loaded_generator_can_be_sent_elsewhere(tmp_path, config, through):
    generator, _ = load_generator(new_checkpoint(tmp_path, config))
    mels = torch.stack([random_mel(30), random_mel(30)])
    with torch.no_grad():
        torch.testing.assert_close(through(generator)(mels), generator(mels), rtol=0, atol=1e-6)


HOST = """
import json, os, signal, sys
import numpy as np
import torch
from inference import load_generator, synthesize

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

generator, _ = load_generator(sys.argv[1])
seen = {"threads": torch.get_num_threads()}
seen["denormals"] = bool(torch.full((1,), 1e-310, dtype=torch.float64) * 2 > 0)
array = np.ones(20_000_000)
full = resident()
del array
seen["given back"] = full - resident()
mel = torch.zeros(80, 100)
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if len(synthesize(generator, mel)) == 25600 else 1)
seen["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(seen))
"""


def test_loading_a_generator_does_not_change_the_process_that_loads_it(tmp_path):
    """Nor does it keep it from forking: a child would wait for threads that it does not have."""
    checkpoint = new_checkpoint(tmp_path, upsample_initial_channel=128)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HOST, checkpoint],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        check=True,
    )
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen.pop("given back") > 150  # MB of the 160 that were freed
    assert seen == {"threads": 2, "denormals": True, "child": 0}


def test_the_level_is_never_changed(checkpoint, tmp_path):
    read_mel = partial(mel_of, h=load_config(checkpoint.with_name("config.json")))
    wav = speech_like(0.5)
    mel = read_mel(write_wav_file(tmp_path / "a.wav", wav))
    softer = read_mel(write_wav_file(tmp_path / "softer.wav", 0.1 * wav))
    loud = mel > math.log(0.05)  # far above the mel's floors
    assert loud.float().mean() > 0.1
    shift = torch.full_like(mel[loud], math.log(0.1))
    torch.testing.assert_close(softer[loud] - mel[loud], shift, rtol=0, atol=1e-4)


def test_in_a_batch_a_mel_sounds_as_if_silence_followed_it(checkpoint):
    generator, mels = load_generator(checkpoint)[0], [random_mel(frames) for frames in (5, 40, 20)]
    for mel, wav in zip(mels, synthesize_batch(generator, mels), strict=True):
        frames = mel.shape[1]
        followed = torch.cat([mel, torch.full((80, 40 - frames), SILENT_LOG_MEL)], dim=1)
        expected = synthesize(generator, followed)[: frames * HOP]
        torch.testing.assert_close(wav, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config, changes", [GENERATORS["MISR conv"], GENERATORS["iSTFT"]], ids=["MISR conv", "iSTFT"]
)
def test_bf16_is_near_fp32_and_its_waveform_is_not_rounded(tmp_path, config, changes):
    checkpoint, mel = new_checkpoint(tmp_path, config, **changes), random_mel(50)
    wav = synthesize(load_generator(checkpoint)[0], mel)
    generator, _ = load_generator(checkpoint, precision="bf16")
    dtypes = {name.split(".")[0]: p.dtype for name, p in generator.named_parameters()}
    rounded = dict.fromkeys(("conv_pre", "ups", "resblocks"), torch.bfloat16)
    assert dtypes == rounded | {"conv_post": torch.float32}
    bf16_wav = synthesize(generator, mel)
    assert bf16_wav.dtype == torch.float32
    assert bf16_wav.ne(bf16_wav.bfloat16()).float().mean() > 0.9
    snr = 10 * float((wav.var() / (bf16_wav - wav).var()).log10())
    assert 20 < snr < 50


def test_too_little_memory_is_said_in_one_line(checkpoint, wavs, tmp_path, monkeypatch):
    def run_out(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")

    monkeypatch.setattr(Generator, "forward", run_out)
    with pytest.raises(UserError, match="out of memory; try a smaller --chunk_frames"):
        vocode(checkpoint, wavs, tmp_path / "out")
    assert files_in(tmp_path / "out") == []


def test_a_terminated_run_leaves_no_temporary_file(checkpoint, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(22050 * 600, np.float32), 22050)
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
