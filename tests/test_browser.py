"""demo/browser: the page that vocodes in WebAssembly, as a person uses it and beside Python."""

import base64
import http.server
import io
import shutil
import threading
from functools import partial

import numpy as np
import pytest
import soundfile
import torch

from audio import load_wav
from demo.browser import build
from env import UserError
from export_onnx import MAX_LOG_MEL_DIFFERENCE
from harmonic import EPSILON, GRIFFIN_LIM_MOMENTUM, MIN_WINDOW_SUM, PHASE_SOFTNESS
from inference import Streamer, load_generator
from meldataset import LogMelSpectrogram
from tests.browser import needs_browser, open_browser
from tools.toy import speech_like

RATE, HOP, N_FFT = 22050, 256, 1024
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A static host that knows nothing of the page."""

    def log_message(self, *_) -> None:
        """Prints nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built page, in a folder of a larger site."""
    needs_browser()
    pytest.importorskip("onnx", reason="needs onnx")
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("host") / "some/folder"
    try:
        build.fetch_runtime(folder / build.RUNTIME.replace("@", "-"))
    except UserError as error:
        pytest.skip(str(error))
    build.build(folder)
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Serves the page below the root of a plain host."""
    handler = partial(QuietHandler, directory=site.parents[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/some/folder/"
        serving.shutdown()


@pytest.fixture(scope="module")
def browser(site):
    with open_browser(*MICROPHONE) as opened:
        yield opened


@pytest.fixture
def page(browser, address):
    """The page, ready, on the screen of a small phone. It must have no error and no other host."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page, errors, requests = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    wait_for(page, "Ready")
    yield page
    context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith((address, "blob:"))] == []


def wait_for(page, text: str) -> None:
    page.wait_for_selector(f"#status:text('{text}')", timeout=120_000)


@pytest.fixture(scope="module")
def vocoder():
    """The generator of frame_v3 and its mel."""
    generator, h = load_generator(build.checkpoint("frame_v3"))
    return generator, LogMelSpectrogram(h, h.fmax)


def encode(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def run(page, script: str, *arrays: np.ndarray) -> np.ndarray:
    """Runs the body of an async function of Float32Arrays x; returns its Float32Array."""
    encoded = page.evaluate(
        """async ([script, texts]) => {
            const bytes = text => Uint8Array.from(atob(text), x => x.charCodeAt(0));
            const x = texts.map(text => new Float32Array(bytes(text).buffer));
            const models = (await (await fetch("models.json")).json()).models;
            const load = name => import(new URL(name, location));
            const run = Object.getPrototypeOf(async () => {}).constructor;
            const found = await run("x", "about", "load", script)(x, models.frame_v3, load);
            const chunks = [], view = new Uint8Array(new Float32Array(found).buffer);
            for (let i = 0; i < view.length; i += 8192)
                chunks.push(String.fromCharCode(...view.subarray(i, i + 8192)));
            return btoa(chunks.join(""));
        }""",
        [script, [encode(array) for array in arrays]],
    )
    return np.frombuffer(base64.b64decode(encoded), "<f4")


def wav_of_page(page) -> np.ndarray:
    """Returns the samples that the page offers to download."""
    text = page.evaluate(
        """async () => {
            const response = await fetch(document.querySelector("#download").href);
            const reader = new FileReader();
            reader.readAsDataURL(await response.blob());
            await new Promise(resolve => { reader.onload = resolve; });
            return reader.result.split(",")[1];
        }"""
    )
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(text)))
    assert rate == RATE
    return samples


# ---------------------------------------------------------------------------------- beside Python


@pytest.mark.parametrize("samples", [95_488, 256, 400, 1000])
def test_the_mel_equals_pythons(page, vocoder, samples):
    wav = load_wav(build.CLIP, RATE)[-samples:]
    script = """
        const { LogMel } = await load("mel.js");
        const mel = new LogMel(about.mel), T = mel.frames(x[0].length);
        const first = Math.floor(T / 3);
        return [...mel.compute(x[0], 0, first), ...mel.compute(x[0], first, T)];"""
    # Near the floor, float32 rounds the mel by more than that.
    h = vocoder[1].h
    expected = LogMelSpectrogram(h, h.fmax).double()(wav.double()[None])[0].T
    mel = run(page, script, wav.numpy()).reshape(expected.shape)
    np.testing.assert_allclose(mel, expected, atol=1e-4)


def griffin_lim(spectra: np.ndarray, magnitude: np.ndarray, steps: int, lookahead: int):
    """Griffin-Lim with a bounded look-ahead in the plainest form, [T, bins] to [T * HOP]."""
    window = torch.hann_window(N_FFT, dtype=torch.float64).numpy()

    def scaled(x: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        floor = PHASE_SOFTNESS * magnitude**2 + EPSILON**2
        return x * magnitude / np.sqrt(floor + (1 - PHASE_SOFTNESS) * np.abs(x) ** 2)

    def to_wav(frames: np.ndarray) -> np.ndarray:
        wav, total = np.zeros((2, (len(frames) - 1) * HOP + N_FFT))
        for t, frame in enumerate(frames):
            wav[t * HOP : t * HOP + N_FFT] += window * np.fft.irfft(frame)
            total[t * HOP : t * HOP + N_FFT] += window**2
        return wav / np.maximum(total, MIN_WINDOW_SUM)

    phase = scaled(spectra, magnitude)
    previous, settled = phase.copy(), phase[:0]
    for t in range(len(phase)):
        stop = min(t + lookahead + 1, len(phase))
        for _ in range(steps):
            pending = scaled(phase[t:stop], magnitude[t:stop])
            wav = to_wav(np.concatenate([settled, pending]))
            for i in range(t, stop):
                spectrum = np.fft.rfft(window * wav[i * HOP : i * HOP + N_FFT])
                phase[i] = previous[i] + (1 + GRIFFIN_LIM_MOMENTUM) * (spectrum - previous[i])
                previous[i] = spectrum
        settled = np.concatenate([settled, scaled(phase[t : t + 1], magnitude[t : t + 1])])
    margin = (N_FFT - HOP) // 2
    return to_wav(settled)[margin : margin + len(phase) * HOP]


@pytest.mark.parametrize("frames", [1, 3, 12])
def test_griffin_lim_equals_its_plain_form(page, frames):
    random = np.random.default_rng(0)
    parts = random.standard_normal((3, frames, N_FFT // 2 + 1)).astype(np.float32)
    script = """
        const { GriffinLim } = await load("griffin_lim.js");
        const { LogMel } = await load("mel.js");
        const griffinLim = new GriffinLim(about.griffin_lim, new LogMel(about.mel).window);
        const bins = about.mel.n_fft / 2 + 1, samples = [];
        for (let i = 0; i < x[0].length; i += bins)
            samples.push(...griffinLim.feed(...x.map(part => part.subarray(i, i + bins))));
        return [...samples, ...griffinLim.flush()];"""
    parts[2] = np.abs(parts[2])
    wav = run(page, script, *parts)
    re, im, magnitude = parts.astype(np.float64)
    expected = griffin_lim(re + 1j * im, magnitude, steps=4, lookahead=3)
    np.testing.assert_allclose(wav, expected, atol=1e-6)


def assert_same_speech(vocoder, wav: np.ndarray, expected: np.ndarray) -> None:
    """Griffin-Lim magnifies rounding, so that the mels are compared, as export_onnx.py does."""
    assert len(wav) == len(expected)
    mels = [vocoder[1](torch.tensor(each, dtype=torch.float32)[None]) for each in (wav, expected)]
    assert float((mels[0] - mels[1]).abs().mean()) < MAX_LOG_MEL_DIFFERENCE
    assert np.sqrt(np.mean((wav - expected) ** 2)) < 0.1 * np.sqrt(np.mean(expected**2))


def stream(vocoder, mel: torch.Tensor) -> np.ndarray:
    """Returns Python's samples of a mel [num_mels, T]."""
    streamer = Streamer(vocoder[0])
    return torch.cat([streamer.feed(mel), streamer.flush()]).clamp(-1, 1).numpy()


# ------------------------------------------------------------------------------ as a person uses it


def test_the_example_by_keyboard(page, vocoder):
    page.focus("#example")
    page.keyboard.press("Enter")
    wait_for(page, "The example: 4.3 s vocoded in")
    wav = load_wav(build.CLIP, RATE)
    assert_same_speech(vocoder, wav_of_page(page), stream(vocoder, vocoder[1](wav[None])[0]))
    assert float(page.inner_text("#speed")[:-1]) > 0
    assert int(page.inner_text("#first").removesuffix(" ms")) > 0
    assert page.inner_text("#size") == "0.8 MB"
    assert [line.split()[0] for line in page.inner_text("#times").splitlines()] == [
        "mel",
        "network",
        "Griffin-Lim",
        "rest",
    ]
    for track in ("original", "copy"):
        drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.every(x => x)"
        assert page.evaluate(f"({drawn})(document.querySelector('#{track}'))"), track
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_recording_and_copy_play_from_the_same_position(page):
    page.click("#example")
    wait_for(page, "vocoded in")
    slider = page.get_by_label("Position in the copy")
    page.wait_for_selector("#play-copy[aria-pressed=false]")  # it plays to its end first
    slider.focus()
    page.keyboard.press("Home")
    assert float(slider.input_value()) == 0
    page.click("#play-original")
    page.wait_for_function("document.querySelector('.mel input').value > 0.5")
    page.click("#play-copy")
    page.wait_for_selector("#play-copy[aria-pressed=true]")
    assert page.get_attribute("#play-original", "aria-pressed") == "false"
    assert 0.5 < float(slider.input_value()) < 4


def test_sound_begins_before_the_whole_is_computed(page, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.tile(speech_like(5.0), 8), RATE)
    page.set_input_files("#file", tmp_path / "long.wav")
    page.wait_for_function("document.querySelector('#first').textContent.endsWith('ms')")
    assert page.inner_text("#status") == "long.wav: vocoding"
    page.click("#example")  # ends the work on the other
    wait_for(page, "The example: 4.3 s vocoded in")


def test_a_mel_and_the_other_model(page, vocoder, tmp_path):
    mel = vocoder[1](load_wav(build.CLIP, RATE)[None])[0, :, :101]
    for name, array in (("c.npy", mel.double()[None]), ("f.npy", mel.T.contiguous().T)):
        np.save(tmp_path / name, array.numpy())
        page.set_input_files("#file", tmp_path / name)
        wait_for(page, f"{name}: 1.2 s vocoded in")
        assert_same_speech(vocoder, wav_of_page(page), stream(vocoder, mel))
    assert page.is_disabled("#play-original")
    before = wav_of_page(page)
    page.check("[value=frame_v2]")
    wait_for(page, "Loading")
    wait_for(page, "f.npy: 1.2 s vocoded in")
    assert page.inner_text("#kind") == "frame_v2"
    assert np.abs(wav_of_page(page) - before).max() > 0.01


def test_the_microphone(page):
    page.click("#record")
    page.wait_for_selector("#record:text('Stop (1 s)')")
    page.click("#record")
    wait_for(page, "The recording: ")
    wait_for(page, "vocoded in")
    assert np.abs(wav_of_page(page)).max() > 0.01
    assert page.inner_text("#record") == "Record"


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("a.npy", np.zeros((80, 0)), "shape [80, 0]; expected [80, T] or [1, 80, T]"),
        ("a.npy", np.zeros((9, 100)), "shape [9, 100]; expected [80, T] or [1, 80, T]"),
        (
            "a.npy",
            np.zeros((100, 80)),
            "shape [100, 80]; expected [80, T] or [1, 80, T]; "
            "it looks transposed: swap its last two axes",
        ),
        ("a.npy", np.zeros((80, 9), int), "values of type <i8; expected float32 or float64"),
        ("a.npy", np.full((80, 9), np.nan), "holds values that are NaN or infinite"),
        ("a.npy", b"text", "not a .npy file"),
        (
            "a.wav",
            b"text",
            "cannot be decoded; expected audio that this browser plays, or a mel as .npy",
        ),
        ("a.wav", np.zeros(99), "99 samples; expected at least 256"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(page, tmp_path, name, contents, reason):
    path = tmp_path / name
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif path.suffix == ".npy":
        np.save(path, contents)
    else:
        soundfile.write(path, contents, RATE)
    page.set_input_files("#file", path)
    page.wait_for_selector("#status.error")
    assert page.inner_text("#status") == f"{name}: {reason}"


# ---------------------------------------------------------------------------------- build and serve


def test_the_server_isolates_the_page(site, browser):
    with build.server(site, 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{serving.server_port}/")
        wait_for(page, "Ready")
        assert page.evaluate("crossOriginIsolated")
        page.close()
        with pytest.raises(UserError, match="in use; pass another --port"):
            build.server(site, serving.server_port)
        serving.shutdown()


def test_without_npm_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is missing"):
        build.fetch_runtime(tmp_path)
