"""demo/app.py: the comparison of vocoders, and the page in a browser where gradio is installed."""

import socket
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from demo import app
from env import UserError
from inference import synthesize
from meldataset import LogMelSpectrogram
from models import Generator
from tests.browser import needs_browser, open_browser
from tools.toy import run_main, save_checkpoint, speech_like, toy_config, write_config

RATE = 22050
CPU = torch.device("cpu")


def ignore(fraction: float, desc: str = "") -> None:
    """Takes the progress."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Two toy generators, in folders of their own."""
    paths = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp("checkpoints") / name
        folder.mkdir()
        write_config(folder / "config.json")
        torch.manual_seed(len(paths))
        generator = Generator(toy_config(folder))
        paths.append(folder / "g_00000001")
        save_checkpoint(paths[-1], {"generator": generator.state_dict()})
    return paths


@pytest.fixture(scope="module")
def vocoders(checkpoints) -> dict[str, app.Vocoder]:
    return app.load_vocoders(checkpoints, CPU)


@pytest.fixture
def clip(tmp_path) -> Path:
    soundfile.write(tmp_path / "clip.wav", speech_like(1.0), RATE)
    return tmp_path / "clip.wav"


def compare(vocoders, file, names=None, level=0.0, precision="fp32") -> dict[str, tuple]:
    """Returns what `app.compare` yields, by name: samples, plot and speed."""
    names = [*vocoders] if names is None else names
    file = None if file is None else str(file)
    found = app.compare(vocoders, file, names, level, precision, ignore)
    return {name: (soundfile.read(path)[0], *rest) for name, path, *rest in found}


def test_every_vocoder_gives_sound_plot_and_speed(vocoders, clip):
    assert list(vocoders) == ["one/g_00000001", "two/g_00000001", "Griffin-Lim"]
    results = compare(vocoders, clip)
    assert list(results) == ["input", *vocoders]
    samples = len(speech_like(1.0)) // 256 * 256
    for name in vocoders:
        wav, figure, speed = results[name]
        assert len(wav) == samples and np.abs(wav).max() > 0, name
        assert figure.axes[1].images[0].get_array().shape == (80, samples // 256)
        assert speed.endswith("times real time")
    assert len({results[name][0].tobytes() for name in vocoders}) == 3
    np.testing.assert_allclose(results["input"][0], speech_like(1.0), atol=1e-4)


def test_only_chosen_vocoders_are_run(vocoders, clip):
    assert list(compare(vocoders, clip, ["two/g_00000001"])) == ["input", "two/g_00000001"]


def test_a_long_recording_is_processed_in_chunks_with_equal_samples(vocoders, monkeypatch):
    monkeypatch.setattr(app, "CHUNK_FRAMES", 7)
    vocoder, wav, fractions = vocoders["one/g_00000001"], torch.from_numpy(speech_like(1.0)), []
    wav_hat = vocoder.resynthesize(wav, "fp32", fractions.append)
    expected = synthesize(vocoder.load("fp32")[0], vocoder.log_mel(wav[None])[0])
    torch.testing.assert_close(wav_hat, expected, atol=1e-5, rtol=0)
    assert fractions == [first / 86 for first in range(0, 86, 7)]


def test_the_slider_sets_the_level(vocoders, clip):
    quiet = compare(vocoders, clip, level=-20)["input"][0]
    np.testing.assert_allclose(quiet, 0.1 * speech_like(1.0), atol=1e-4)


def test_the_precision_is_used(vocoders, clip):
    name = "one/g_00000001"
    fp32, bf16 = (
        compare(vocoders, clip, [name], precision=each)[name][0] for each in ("fp32", "bf16")
    )
    assert 0 < np.abs(fp32 - bf16).max() < 0.05


def test_griffin_lim_has_the_magnitudes_of_the_mel_without_delay(tmp_path):
    h = toy_config(tmp_path)
    log_mel = LogMelSpectrogram(h, h.fmax)
    wav = torch.from_numpy(speech_like(1.0))
    mel = log_mel(wav[None])[0]

    wav_hat = app.griffin_lim(mel, h)
    assert len(wav_hat) == mel.shape[1] * h.hop_size

    def error(shift: int) -> float:
        moved = torch.roll(wav_hat, shift)
        return F.l1_loss(log_mel(moved[None])[0], mel).item()

    assert error(0) < 0.2
    assert error(0) < min(error(-64), error(64))


@pytest.mark.parametrize(
    ("contents", "names", "message"),
    [
        (None, None, "record or upload some first"),
        (b"no sound", None, r"clip.wav: cannot be read as audio"),
        (np.zeros(100), None, "100 samples at 22050 Hz; expected at least 256"),
        (speech_like(0.5), [], "choose one or more"),
    ],
)
def test_an_unusable_input_is_one_line(vocoders, tmp_path, contents, names, message):
    path = tmp_path / "clip.wav"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        soundfile.write(path, contents, RATE)
    with pytest.raises(UserError, match=message) as caught:
        compare(vocoders, None if contents is None else path, names)
    assert len(str(caught.value).splitlines()) == 1


def test_no_file_is_left(vocoders, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(app.tempfile, "tempdir", str(tmp_path))
    compare(vocoders, clip)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.wav"]


def test_missing_gradio_is_one_line(checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-app\.txt"):
        run_main(app, "--checkpoint_file", checkpoints[0])


def test_an_unusable_temporary_folder_is_one_line(monkeypatch):
    monkeypatch.setattr(app.tempfile, "tempdir", "/nonexistent")
    with pytest.raises(UserError, match=r"no temporary folder .* set TMPDIR") as caught:
        run_main(app)
    assert len(str(caught.value).splitlines()) == 1


def test_a_port_above_65535_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(app, "--port", 99999)
    assert stopped.value.code == 2
    assert "expected a port from 0 to 65535, not 99999" in capsys.readouterr().err


def test_a_bad_checkpoint_is_named_before_the_page_is_served(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", sys.modules["json"])
    with pytest.raises(UserError, match="g_00000001"):
        run_main(app, "--checkpoint_file", tmp_path / "g_00000001")


# --- the page


@pytest.fixture(scope="module")
def address(vocoders):
    """Serves the page as main does, on a free port and with a proxy that does not answer."""
    gradio = pytest.importorskip("gradio", reason="needs gradio")
    served, lines = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradio.Blocks, "block_thread", lambda page: served.append(page))
        patch.setattr(app, "speed_up_cpu", lambda: None)  # it changes the whole process
        patch.setattr(app, "load_vocoders", lambda *_: vocoders)
        patch.setattr(app, "say", lines.append)
        for name in ("HTTP_PROXY", "http_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # main sets them; they are restored afterwards
        with app.gradio_environment("127.0.0.1"):
            app.serve(Namespace(host="127.0.0.1", port=0, device="cpu", checkpoint_file=[]))
            yield lines[0].split()[1]
            served[0].close()


@pytest.fixture
def tab(address):
    needs_browser()
    with open_browser() as browser:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("text=Compare")
        yield page


def upload(tab, path: Path) -> None:
    tab.set_input_files("input[type=file]", path)
    tab.wait_for_timeout(1500)
    tab.click("button:has-text('Compare')")


def test_an_uploaded_clip_is_vocoded_and_shown(tab, clip):
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    upload(tab, clip)
    for name in ("input", "one/g_00000001", "two/g_00000001", "Griffin-Lim"):
        tab.wait_for_selector(f"h3:has-text('{name}')", timeout=120_000)
    assert tab.locator("text=times real time").count() == 3
    tab.wait_for_function("document.querySelectorAll('img').length >= 4", timeout=30_000)
    outside = [
        url for url in requests if not url.startswith(("http://127.0.0.1", "data:", "blob:"))
    ]
    assert outside == []


def test_a_bad_upload_is_one_line_on_the_page(tab, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(b"RIFF no sound at all")
    upload(tab, path)
    tab.wait_for_selector("text=cannot be read as audio", timeout=60_000)
    assert "Traceback" not in tab.inner_text("body")


def test_a_port_in_use_is_one_line(address, vocoders, monkeypatch):
    monkeypatch.setattr(app, "load_vocoders", lambda *_: vocoders)
    monkeypatch.setattr(app, "speed_up_cpu", lambda: None)
    port = address.rstrip("/").rpartition(":")[2]
    with pytest.raises(UserError, match=f"127.0.0.1:{port}: ") as caught:
        run_main(app, "--port", port, "--device", "cpu")
    assert len(str(caught.value).splitlines()) == 1


def test_the_page_is_served_on_the_loopback_only(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    others = {facts[4][0] for facts in socket.getaddrinfo(socket.gethostname(), port)}
    for other in others - {"127.0.0.1", "127.0.1.1", "::1"}:
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=5)
