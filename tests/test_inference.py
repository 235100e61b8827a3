"""From wavs and mels to speech, by the scripts themselves and from Python, with toy weights."""

import math
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import inference
import inference_e2e
import meldataset
from env import Config, UserError, load_config
from inference import load_generator, synthesize
from meldataset import LogMelSpectrogram, wav_mel
from models import Generator
from tests.conftest import run_main, speech_like, write_config
from utils import save_checkpoint

RATE = 22050
HOP = 256
CLIPS = {"a": 0.3, "b": 0.21, "sub/c": 0.25}  # seconds
MRF_CONFIG = "configs/hifigan_v2.json"


def new_weights(folder: Path, config: str = "config_v2.json", **changes) -> dict:
    """Writes a toy config.json into `folder`; returns weights for it.

    They are twice as large as fresh ones, which hardly let anything of the mel through.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    h = load_config(write_config(folder / "config.json", config, **changes))
    weights = Generator(h).state_dict()
    gains = {key: 2 * value for key, value in weights.items() if key.endswith("original0")}
    return weights | gains


def new_checkpoint(folder: Path, config: str = "config_v2.json", **changes) -> Path:
    """Writes a toy config.json and weights for it into `folder`; returns the g_ file."""
    save_checkpoint(folder / "g_00000001", {"generator": new_weights(folder, config, **changes)})
    return folder / "g_00000001"


def old_keys(weights: dict) -> dict:
    """Generator weights under the names that HiFi-GAN's own files have."""
    names = {"original0": "weight_g", "original1": "weight_v"}
    renamed = {}
    for key, value in weights.items():
        layer, _, name = key.partition(".parametrizations.weight.")
        renamed[f"{layer}.{names[name]}" if name else key] = value
    assert renamed.keys() != weights.keys()
    return renamed


def write_wav_file(path: Path, wav: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, subtype=subtype)
    return path


def read_pcm(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


def mel_of(path: Path, h: Config) -> torch.Tensor:
    return wav_mel(path, LogMelSpectrogram(h, h.fmax), h)[:, :]


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A g_ file of a toy MISR generator, with its config.json."""
    return new_checkpoint(tmp_path_factory.mktemp("cp"))


@pytest.fixture(scope="module")
def wavs(tmp_path_factory) -> Path:
    """A folder with CLIPS, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("wavs")
    for seed, (name, seconds) in enumerate(CLIPS.items()):
        wav = speech_like(seconds, RATE, seed=seed)
        write_wav_file(folder / f"{name}.wav", wav, subtype="PCM_16")
    return folder


def vocode(checkpoint: Path, inputs: Path, output_dir: Path) -> int:
    """Runs inference.py; returns its status."""
    return run_main(
        inference,
        *("--input_wavs_dir", inputs, "--output_dir", output_dir),
        *("--checkpoint_file", checkpoint, "--device", "cpu"),
    )


def vocode_mels(checkpoint: Path, inputs: Path, output_dir: Path) -> int:
    """Runs inference_e2e.py; returns its status."""
    return run_main(
        inference_e2e,
        *("--input_mels_dir", inputs, "--output_dir", output_dir),
        *("--checkpoint_file", checkpoint, "--device", "cpu"),
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


def test_a_written_wav_holds_what_the_generator_says(checkpoint, wavs, tmp_path):
    assert vocode(checkpoint, wavs / "a.wav", tmp_path) == 0
    generator, h = load_generator(checkpoint)
    wav = synthesize(generator, mel_of(wavs / "a.wav", h))
    expected = np.rint(32767 * wav.double().numpy())
    assert expected.std() > 100  # of 32767: no silence
    assert np.abs(read_pcm(tmp_path / "a_generated.wav") - expected).max() <= 1


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


@pytest.mark.parametrize(
    "change",
    [lambda mel: mel[None], lambda mel: mel.astype(np.float64), np.asfortranarray],
    ids=["[1, num_mels, T]", "float64", "Fortran order"],
)
def test_a_mel_may_be_saved_in_other_ways(checkpoint, tmp_path, change):
    mel = np.random.default_rng(0).uniform(-11, 1, (80, 12)).astype(np.float32)
    np.save(tmp_path / "plain.npy", mel)
    np.save(tmp_path / "other.npy", change(mel))
    for name in ("plain", "other"):
        assert vocode_mels(checkpoint, tmp_path / f"{name}.npy", tmp_path) == 0
    plain, other = (read_pcm(tmp_path / f"{name}_generated_e2e.wav") for name in ("plain", "other"))
    np.testing.assert_array_equal(other, plain, strict=True)


def garbage(path: Path) -> None:
    path.write_bytes(b"RIFF" + np.random.default_rng(0).bytes(500))


def empty(path: Path) -> None:
    path.touch()


def no_samples(path: Path) -> None:
    write_wav_file(path, np.zeros(0))


def too_short(path: Path) -> None:
    write_wav_file(path, np.zeros(HOP - 1))


def not_a_number(path: Path) -> None:
    write_wav_file(path, np.full(2000, np.nan))


@pytest.mark.parametrize("make", [garbage, empty, no_samples, too_short, not_a_number])
def test_a_bad_wav_is_named_and_the_others_are_done(checkpoint, wavs, tmp_path, make, capsys):
    make(tmp_path / "bad.wav")
    (tmp_path / "notes.txt").write_text("no audio")
    for name in ("a", "z"):
        (tmp_path / f"{name}.wav").write_bytes((wavs / "a.wav").read_bytes())
    assert vocode(checkpoint, tmp_path, tmp_path / "out") == 1
    assert files_in(tmp_path / "out") == ["a_generated.wav", "z_generated.wav"]
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"skipped: {tmp_path / 'bad.wav'}: ")
    assert "1 files passed over" in printed.out
    assert "2 files written, 1 skipped" in printed.out


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((12, 80), np.float32),
        np.zeros((2, 80, 12), np.float32),
        np.zeros((80, 0), np.float32),
        np.full((80, 12), np.nan, np.float32),
        np.array([{"a": 1}]),  # a pickle
    ],
    ids=["transposed", "two", "no frames", "NaN", "pickled"],
)
def test_a_bad_mel_is_named_and_the_others_are_done(checkpoint, tmp_path, bad, capsys):
    np.save(tmp_path / "bad.npy", bad)
    np.save(tmp_path / "good.npy", np.zeros((80, 12), np.float32))
    assert vocode_mels(checkpoint, tmp_path, tmp_path / "out") == 1
    assert files_in(tmp_path / "out") == ["good_generated_e2e.wav"]
    assert capsys.readouterr().err.startswith(f"skipped: {tmp_path / 'bad.npy'}: ")


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


def test_stereo_is_mixed_to_mono(checkpoint, tmp_path):
    left, right = speech_like(0.3, seed=1), speech_like(0.3, seed=2)
    write_wav_file(tmp_path / "in/stereo.wav", np.stack([left, right], axis=1))
    write_wav_file(tmp_path / "in/mono.wav", (left + right) / 2)
    assert vocode(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    stereo, mono = (read_pcm(tmp_path / f"out/{name}_generated.wav") for name in ("stereo", "mono"))
    np.testing.assert_array_equal(stereo, mono, strict=True)


def test_stereo_at_44100_hz_sounds_as_mono_at_22050(checkpoint, tmp_path):
    tones = {
        rate: 0.5 * np.sin(2 * np.pi * 440 * np.arange(0.4 * rate) / rate) for rate in (RATE, 44100)
    }
    write_wav_file(tmp_path / "low.wav", tones[RATE])
    high = np.stack([tones[44100]] * 2, axis=1)
    path = write_wav_file(tmp_path / "high.wav", high, rate=44100, subtype="PCM_24")
    assert vocode(checkpoint, path, tmp_path) == 0
    info = soundfile.info(tmp_path / "high_generated.wav")
    assert (info.samplerate, info.channels) == (RATE, 1)
    assert info.frames == len(tones[RATE]) // HOP * HOP
    read_mel = partial(mel_of, h=load_config(checkpoint.with_name("config.json")))
    low, high = (read_mel(tmp_path / f"{name}.wav")[:, 4:-4] for name in ("low", "high"))
    loud = low > math.log(0.1)
    assert loud.any(dim=0).all()
    torch.testing.assert_close(high[loud], low[loud], rtol=0, atol=0.01)


# --- What a user can get wrong with a checkpoint


def do_file(folder: Path) -> str:
    path = new_checkpoint(folder).rename(folder / "do_00000001")
    save_checkpoint(path, {"mpd": {}, "msd": {}, "optim_g": {}, "optim_d": {}, "steps": 1})
    return "do_00000001"


def no_such_file(folder: Path) -> str:
    new_checkpoint(folder).unlink()
    return "g_00000001"


def truncated(folder: Path) -> str:
    path = new_checkpoint(folder)
    path.write_bytes(path.read_bytes()[:-2000])
    return "g_00000001"


def no_config(folder: Path) -> str:
    new_checkpoint(folder)
    (folder / "config.json").unlink()
    return "config.json"


def damaged_config(folder: Path) -> str:
    new_checkpoint(folder)
    (folder / "config.json").write_text('{"resblock": "1",')
    return "config.json"


def wider_config(folder: Path) -> str:
    new_checkpoint(folder)
    write_config(folder / "config.json", upsample_initial_channel=32)
    return "g_00000001"


def mrf_config(folder: Path) -> str:
    new_checkpoint(folder)
    write_config(folder / "config.json", MRF_CONFIG)
    return "g_00000001"


def no_weights(folder: Path) -> str:
    save_checkpoint(new_checkpoint(folder), {"generator": [1, 2, 3]})
    return "g_00000001"


@pytest.mark.parametrize(
    "make",
    [
        *(do_file, no_such_file, truncated, no_weights),
        *(no_config, damaged_config, wider_config, mrf_config),
    ],
)
@pytest.mark.parametrize("script", [vocode, vocode_mels])
def test_an_unusable_checkpoint_is_named(script, make, wavs, tmp_path):
    named = tmp_path / "cp" / make(tmp_path / "cp")
    prefix = "do" if make is do_file else "g"
    with pytest.raises(UserError) as error:
        script(tmp_path / "cp" / f"{prefix}_00000001", wavs, tmp_path / "out")
    assert str(error.value).startswith(f"{named}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_do_file_s_error_points_at_the_g_file(tmp_path):
    do_file(tmp_path)
    with pytest.raises(UserError, match="g_"):
        load_generator(tmp_path / "do_00000001")


def test_a_misfit_s_error_names_the_layer(tmp_path):
    wider_config(tmp_path)
    with pytest.raises(UserError, match=r"does not fit the config: .*conv_pre"):
        load_generator(tmp_path / "g_00000001")


@pytest.mark.parametrize("script", [vocode, vocode_mels])
def test_a_missing_folder_is_named(script, checkpoint, tmp_path):
    with pytest.raises(UserError, match="none: no such file or folder"):
        script(checkpoint, tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- From Python


@pytest.mark.parametrize(
    "config, changes",
    [
        ("config_v2.json", {}),
        ("config_v2.json", {"misr_merge": "conv"}),
        (MRF_CONFIG, {}),
        ("configs/hifigan_v3.json", {}),
    ],
    ids=["MISR", "MISR conv", "MRF", "MRF resblock 2"],
)
def test_a_loaded_generator_is_the_trained_one(tmp_path, config, changes):
    weights = new_weights(tmp_path, config, **changes)
    save_checkpoint(tmp_path / "g_00000001", {"generator": weights})
    loaded, h = load_generator(tmp_path / "g_00000001", device="cpu")
    trained = Generator(h)
    trained.load_state_dict(weights)
    mel = torch.rand(h.num_mels, 9) * 12 - 11
    wav = synthesize(loaded, mel)
    assert wav.shape == (9 * h.hop_size,)
    assert wav.device.type == "cpu"
    assert not wav.requires_grad
    assert wav.abs().max() <= 1
    assert wav.std() > 0.01  # no silence
    with torch.no_grad():
        torch.testing.assert_close(wav, trained(mel[None])[0, 0], rtol=0, atol=1e-5)


def test_a_loaded_generator_is_stripped_and_in_eval_mode(checkpoint):
    generator, h = load_generator(checkpoint)
    assert h == load_config(checkpoint.with_name("config.json"))
    assert not generator.training
    assert not any("parametrizations" in name for name in generator.state_dict())


@pytest.mark.parametrize("config", [MRF_CONFIG, "config_v2.json"])
def test_old_key_names_give_the_same_speech(tmp_path, config):
    weights = new_weights(tmp_path, config)
    save_checkpoint(tmp_path / "g_new", {"generator": weights})
    save_checkpoint(tmp_path / "g_old", {"generator": old_keys(weights)})
    mel = torch.rand(80, 9) * 12 - 11
    new, old = (
        synthesize(load_generator(tmp_path / f"g_{each}")[0], mel) for each in ("new", "old")
    )
    assert torch.equal(new, old)
    assert new.std() > 0.01


def test_the_level_is_never_changed(checkpoint, tmp_path):
    read_mel = partial(mel_of, h=load_config(checkpoint.with_name("config.json")))
    wav = speech_like(0.5)
    mel = read_mel(write_wav_file(tmp_path / "a.wav", wav))
    softer = read_mel(write_wav_file(tmp_path / "softer.wav", 0.1 * wav))
    loud = mel > math.log(0.05)  # far above the mel's floors
    assert loud.float().mean() > 0.1
    shift = torch.full_like(mel[loud], math.log(0.1))
    torch.testing.assert_close(softer[loud] - mel[loud], shift, rtol=0, atol=1e-4)
