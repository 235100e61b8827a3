"""inference_e2e.py in a pipe: frames in, sound out, while more frames are to come."""

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

from env import UserError
from inference import Streamer, load_generator, synthesize
from inference_e2e import speak
from tests.conftest import new_checkpoint, random_mel
from tools.toy import ROOT

HEADER = 44  # bytes
FRAMES = 60
NAN_LAST = np.array([*[0] * 159, np.nan], "<f4").tobytes()  # two frames


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A toy generator that listens to all of its receptive field."""
    return new_checkpoint(tmp_path_factory.mktemp("cp"))


@pytest.fixture
def pipe(checkpoint):
    """The command, waiting for frames; killed where a test would wait for ever."""
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


def as_frames(mel: torch.Tensor) -> bytes:
    """A mel [num_mels, T] as the pipe takes it."""
    return mel.T.numpy().astype("<f4").tobytes()


def assert_whole(sound: bytes, checkpoint, mel: torch.Tensor) -> None:
    """`sound` is a wav that holds what `synthesize` makes of `mel`."""
    generator, h = load_generator(checkpoint)
    expected = synthesize(generator, mel).clamp(-1, 1).numpy() * 32767
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert rate == h.sampling_rate
    assert samples.shape == expected.shape
    assert expected.std() > 1000  # no silence
    # Rounded, and 1e-5 off in one of the two.
    np.testing.assert_allclose(samples, expected, rtol=0, atol=0.5 + 1e-5 * 32767)


def test_it_speaks_before_the_last_frame_is_sent(pipe, checkpoint):
    mel = random_mel(FRAMES)
    generator, _ = load_generator(checkpoint)
    first_final = generator.receptive_field[1] + 1
    assert first_final < FRAMES - 10
    for frame in range(first_final):
        pipe.stdin.write(as_frames(mel[:, frame : frame + 1]))
        pipe.stdin.flush()
    sound = pipe.stdout.read(HEADER + 2 * generator.hop_size)  # all of the first frame
    assert len(sound) == HEADER + 2 * generator.hop_size
    assert pipe.poll() is None
    rest, messages = pipe.communicate(as_frames(mel[:, first_final:]))
    assert pipe.returncode == 0, messages
    assert_whole(sound + rest, checkpoint, mel)


def test_a_stream_cut_amid_a_frame_is_spoken_and_said(pipe, checkpoint):
    mel = random_mel(FRAMES)
    sound, messages = pipe.communicate(as_frames(mel) + b"\0" * 7)
    assert_whole(sound, checkpoint, mel)
    assert pipe.returncode == 1
    expected = (
        "error: standard input: 60 frames and 7 bytes; expected each of 80 float32, 320 bytes"
    )
    assert messages.decode().splitlines() == [expected]


@pytest.mark.parametrize(
    ("frames", "said", "spoken"),
    [
        (b"", "0 frames and 0 bytes; expected each of 80", 0),
        (NAN_LAST, "NaN or infinity after frame 1", 1),
    ],
    ids=["nothing", "NaN"],
)
def test_what_is_no_mel_is_refused_and_what_came_before_is_spoken(checkpoint, frames, said, spoken):
    (generator, h), sound = load_generator(checkpoint), io.BytesIO()
    with pytest.raises(UserError, match=said):
        speak(Streamer(generator), io.BytesIO(frames), sound, most_frames=9)
    assert len(sound.getvalue()) == 2 * spoken * h.hop_size


def test_it_ends_without_a_word_when_nobody_listens(pipe):
    pipe.stdout.close()
    pipe.stdout = None
    _, messages = pipe.communicate(as_frames(random_mel(FRAMES)))
    assert pipe.returncode == 128 + signal.SIGPIPE
    assert messages == b""


def test_messages_leave_the_sound_alone(checkpoint, tmp_path):
    """What is said while the config is read, of a file of y-chan's port, goes to standard error."""
    mel = random_mel(5)
    (tmp_path / "frames").write_bytes(as_frames(mel))
    program = (
        "import inference_e2e, utils\n"
        "start = inference_e2e.start\n"
        "inference_e2e.start = lambda a: (utils.say('a word'), print('another'), start(a))[2]\n"
        "utils.command_line(inference_e2e.main)"
    )
    flags = ["--input_mels_dir", "-", "--checkpoint_file", str(checkpoint), "--device", "cpu"]
    with open(tmp_path / "frames", "rb") as frames:
        done = subprocess.run(
            [sys.executable, "-c", program, *flags], cwd=ROOT, stdin=frames, capture_output=True
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.decode().split("\n") == ["a word", "another", ""]
    assert_whole(done.stdout, checkpoint, mel)
