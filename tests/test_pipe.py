"""inference_e2e.py in a pipe: samples are written while frames arrive."""

import io
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch

from audio import load_wav
from env import UserError
from inference import Streamer, load_generator, synthesize
from inference_e2e import checked, read_frames, vocode_pipe
from meldataset import LogMelSpectrogram
from tests.conftest import new_checkpoint, random_mel
from tools.toy import ROOT, speech_like

HEADER = 44  # bytes
FRAMES = 60
RECORDING = ROOT / "pretrained/samples/index_files/0001-0.flac"
LATENCY = "latency: 13 frames, 151 ms"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A toy generator that depends on all of its receptive field."""
    return new_checkpoint(tmp_path_factory.mktemp("cp"))


@pytest.fixture
def pipe(checkpoint):
    """The command, waiting for frames; it is killed if a test would wait for ever."""
    command = [sys.executable, "inference_e2e.py", "--checkpoint_file", str(checkpoint)]
    command += ["--input_mels_dir", "-", "--device", "cpu"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, cwd=ROOT, env=buffered, **streams) as process:
        watchdog = threading.Timer(240, process.kill)
        watchdog.start()
        yield process
        watchdog.cancel()
        process.kill()


def as_bytes(mel: torch.Tensor) -> bytes:
    """Returns a mel [num_mels, T] as frames of little-endian float32."""
    return mel.T.numpy().astype("<f4").tobytes()


def speech_mel(h) -> torch.Tensor:
    wav = load_wav(RECORDING, h.sampling_rate)[: h.sampling_rate]
    return LogMelSpectrogram(h, h.fmax)(wav[None])[0]


def assert_whole(sound: bytes, checkpoint, mel: torch.Tensor) -> None:
    """Compares a wav with `synthesize` of `mel`."""
    generator, h = load_generator(checkpoint)
    expected = synthesize(generator, mel).clamp(-1, 1).numpy() * 32767
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert rate == h.sampling_rate
    assert samples.shape == expected.shape
    assert expected.std() > 1000
    # Rounded to integers, from samples that are equal to 1e-5.
    np.testing.assert_allclose(samples, expected, rtol=0, atol=0.5 + 1e-5 * 32767)


def test_samples_are_written_before_the_last_frame_is_read(pipe, checkpoint):
    """Standard output is the wav alone; the latency is printed on standard error."""
    mel = random_mel(FRAMES)
    generator, _ = load_generator(checkpoint)
    streamer = Streamer(generator)
    first_final = streamer.latency + 1
    assert first_final < FRAMES - 10
    samples = len(streamer.feed(mel[:, :first_final]))
    assert samples >= generator.hop_size
    for frame in range(first_final):
        pipe.stdin.write(as_bytes(mel[:, frame : frame + 1]))
        pipe.stdin.flush()
    size = HEADER + 2 * samples
    sound = b""
    while len(sound) < size:  # not by pipe.stdout, which would take bytes from `communicate`
        piece = os.read(pipe.stdout.fileno(), size)
        assert piece
        sound += piece
    assert pipe.poll() is None
    rest, messages = pipe.communicate(as_bytes(mel[:, first_final:]))
    assert pipe.returncode == 0
    assert messages.decode().splitlines() == [LATENCY]
    assert_whole(sound + rest, checkpoint, mel)


def test_an_end_within_a_frame_is_an_error_after_the_sound(pipe, checkpoint):
    mel = random_mel(FRAMES)
    sound, messages = pipe.communicate(as_bytes(mel) + b"\0" * 7)
    assert_whole(sound, checkpoint, mel)
    assert pipe.returncode == 1
    expected = (
        "error: standard input: 60 frames and 7 bytes; expected frames of 80 float32 values, "
        "320 bytes each"
    )
    assert messages.decode().splitlines() == [LATENCY, expected]


def test_it_ends_silently_if_its_output_is_closed(pipe):
    pipe.stdout.close()
    pipe.stdout = None
    _, messages = pipe.communicate(as_bytes(random_mel(FRAMES)))
    assert pipe.returncode == 128 + signal.SIGPIPE
    assert messages.decode().splitlines() == [LATENCY]


def npy(mel: torch.Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, mel.numpy())
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message", "frames"),
    [
        (b"", "0 frames and 0 bytes; expected frames of 80 float32 values", 0),
        (as_bytes(torch.tensor([[0.0, np.nan]]).expand(80, 2)), "a value of nan after frame 1", 1),
        (speech_like(1).astype(">f4").tobytes(), "expected log-mels in float32, little-endian", 0),
        (np.full((9, 80), -5.1).tobytes(), "after frame 0; expected log-mels in float32", 0),
        (npy(torch.zeros(80, 5)), "a .npy file; expected raw float32 frames", 0),
    ],
    ids=["nothing", "NaN", "big-endian", "float64", "npy"],
)
def test_other_data_is_refused_after_the_sound_of_the_frames_before_it(
    checkpoint, data, message, frames
):
    (generator, h), sound = load_generator(checkpoint), io.BytesIO()
    with pytest.raises(UserError, match=message):
        vocode_pipe(Streamer(generator), read_frames(io.BytesIO(data), 80, max_frames=9), sound)
    assert len(sound.getvalue()) == 2 * frames * h.hop_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_bytes, None),
        (lambda mel: as_bytes(mel / np.log(10)), "expected natural logarithms"),
        (lambda mel: as_bytes(mel.reshape(-1, 80).T), "send mel.T, not mel [num_mels, T]"),
    ],
    ids=["good", "log10", "transposed"],
)
def test_the_first_frames_are_checked_and_a_warning_is_printed_once(
    checkpoint, capsys, change, message
):
    generator, h = load_generator(checkpoint)
    frames = read_frames(io.BytesIO(change(speech_mel(h))), 80, max_frames=9)
    frames = checked(frames, LogMelSpectrogram(h, h.fmax))
    vocode_pipe(Streamer(generator), frames, io.BytesIO())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (message is not None)
    assert all(line.startswith("standard input: ") and message in line for line in lines)
