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


@pytest.fixture(scope="module")
def page(browser, address):
    """The page on the screen of a small phone. It must cause no error and ask no other host."""
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


@pytest.fixture(scope="module")
def scripts(browser, address):
    """A document that can import the scripts of the page, without the page."""
    page = browser.new_page()
    page.goto(f"{address}models.json")
    yield page
    page.close()


def play_example(page, focus_and_press: bool = False) -> None:
    page.evaluate("document.querySelector('#status').textContent = ''")
    if focus_and_press:
        page.focus("#example")
        page.keyboard.press("Enter")
    else:
        page.click("#example")
    wait_for(page, "The example: 4.3 s vocoded in")


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
            const { models, runtime } = await (await fetch("models.json")).json();
            const load = name => import(new URL(name, location));
            const run = Object.getPrototypeOf(async () => {}).constructor;
            const names = ["x", "about", "runtime", "load"];
            const found = await run(...names, script)(x, models.frame_v3, runtime, load);
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
def test_the_mel_equals_pythons(scripts, vocoder, samples):
    wav = load_wav(build.CLIP, RATE)[-samples:]
    script = """
        const { LogMel } = await load("mel.js");
        const mel = new LogMel(about.mel), T = mel.frames(x[0].length);
        const first = Math.floor(T / 3);
        return [...mel.compute(x[0], 0, first), ...mel.compute(x[0], first, T)];"""
    # In float64, because float32 rounds the mel by more than that near the floor.
    h = vocoder[1].h
    log_mel = LogMelSpectrogram(h, h.fmax).double()
    log_mel.window = torch.hann_window(h.win_size, dtype=torch.float64)
    expected = log_mel(wav.double()[None])[0].T
    mel = run(scripts, script, wav.numpy()).reshape(expected.shape)
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
def test_griffin_lim_equals_its_plain_form(scripts, frames):
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
    wav = run(scripts, script, *parts)
    re, im, magnitude = parts.astype(np.float64)
    expected = griffin_lim(re + 1j * im, magnitude, steps=4, lookahead=3)
    np.testing.assert_allclose(wav, expected, atol=1e-6)


def test_samples_without_griffin_lim_equal_pythons(scripts, vocoder):
    """Griffin-Lim would magnify rounding; it is compared above, and by its sensitivity below."""
    mel = vocoder[1](load_wav(build.CLIP, RATE)[None])[0, :, :101]
    script = """
        const ort = await load(`${runtime}/ort.wasm.min.mjs`);
        const { Vocoder } = await load("vocoder.js");
        about.griffin_lim.steps = 0;
        const vocoder = await Vocoder.load(ort, about, location), samples = [];
        const framesOf = (first, stop) => x[0].subarray(80 * first, 80 * stop);
        const seconds = { mel: 0, network: 0, griffinLim: 0 };
        for await (const piece of vocoder.stream(framesOf, x[0].length / 80, seconds))
            samples.push(...piece);
        return samples;"""
    wav = run(scripts, script, mel.T.numpy())
    expected = stream(vocoder, mel, steps=0)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(wav, expected, atol=1e-3)


def stream(vocoder, mel: torch.Tensor, steps: int | None = None) -> np.ndarray:
    """Returns Python's samples of a mel [num_mels, T]."""
    streamer = Streamer(vocoder[0])
    if steps is not None:
        streamer.head.griffin_lim.steps = steps
    return torch.cat([streamer.feed(mel), streamer.flush()]).clamp(-1, 1).numpy()


def decibels(wav: np.ndarray, expected: np.ndarray) -> float:
    """Returns the ratio of signal to difference."""
    return 10 * np.log10(np.sum(expected**2) / np.sum((wav - expected) ** 2))


def assert_equal_speech(vocoder, wav: np.ndarray, mel: torch.Tensor) -> None:
    """The page differs from Python by as much as Python does when the mel changes by 1e-6."""
    expected, changed = stream(vocoder, mel), stream(vocoder, mel * (1 + 1e-6))
    assert len(wav) == len(expected)
    assert decibels(wav, expected) > min(decibels(changed, expected), 60) - 6


# ------------------------------------------------------------------------------ as a person uses it


def test_the_example_by_keyboard(page, site, vocoder):
    play_example(page, focus_and_press=True)
    mel = vocoder[1](load_wav(build.CLIP, RATE)[None])[0]
    # Chromium's decoder rounds, and F0 sums up the difference in the phase: mels are compared.
    errors = [
        float((vocoder[1](torch.tensor(wav)[None].float())[0] - mel).abs().mean())
        for wav in (wav_of_page(page), stream(vocoder, mel))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert float(page.inner_text("#speed")[:-1]) > 0
    assert int(page.inner_text("#first").removesuffix(" ms")) > 0
    size = (site / "frame_v3.onnx").stat().st_size
    assert page.inner_text("#size") == f"{size / 1e6:.1f} MB"
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
    play_example(page)
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
    wait_for(page, "long.wav: vocoding")
    status = page.wait_for_function(
        "document.querySelector('#first').textContent.endsWith('ms') &&"
        "document.querySelector('#status').textContent"
    )
    assert status.json_value() == "long.wav: vocoding"
    play_example(page)  # ends the work on the other


def test_the_microphone(page):
    page.click("#record")
    page.wait_for_selector("#record:text('Stop (1 s)')")
    page.click("#record")
    wait_for(page, "The recording: ")
    wait_for(page, "vocoded in")
    assert np.abs(wav_of_page(page)).max() > 0.01
    assert page.inner_text("#record") == "Record"


EXPECTED = "expected [80, T] or [1, 80, T]"
BAD_FILES = [
    ("a.npy", np.zeros((80, 0)), f"shape [80, 0]; {EXPECTED}"),
    ("b.npy", np.zeros((9, 100)), f"shape [9, 100]; {EXPECTED}"),
    (
        "c.npy",
        np.zeros((100, 80)),
        f"shape [100, 80]; {EXPECTED}; it looks transposed: swap its last two axes",
    ),
    ("d.npy", np.zeros((80, 9), "i4"), "values of type <i4; expected float32 or float64"),
    ("e.npy", np.full((80, 9), np.nan), "holds values that are NaN or infinite"),
    ("f.npy", b"text", "not a .npy file"),
    (
        "g.wav",
        b"text",
        "cannot be decoded; expected audio that this browser plays, or a mel as .npy",
    ),
    ("h.wav", np.zeros(99), "99 samples; expected at least 256"),
]


def test_a_file_that_cannot_be_used_is_one_line(page, tmp_path):
    for name, contents, reason in BAD_FILES:
        path = tmp_path / name
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        elif path.suffix == ".npy":
            np.save(path, contents)
        else:
            soundfile.write(path, contents, RATE)
        page.set_input_files("#file", path)
        page.wait_for_selector(f"#status.error:text('{name}')")
        assert page.inner_text("#status") == f"{name}: {reason}"


def test_a_mel_and_the_other_model(page, vocoder, tmp_path):
    mel = vocoder[1](load_wav(build.CLIP, RATE)[None])[0]
    for name, array in (("c.npy", mel.double()[None]), ("f.npy", mel.T.contiguous().T)):
        np.save(tmp_path / name, array.numpy())
        page.set_input_files("#file", tmp_path / name)
        wait_for(page, f"{name}: 4.3 s vocoded in")
        assert_equal_speech(vocoder, wav_of_page(page), mel)
    assert page.is_disabled("#play-original")
    before = wav_of_page(page)
    page.check("[value=frame_v2]")
    wait_for(page, "Loading")
    wait_for(page, "f.npy: 4.3 s vocoded in")
    assert page.inner_text("#kind") == "frame_v2"
    assert np.abs(wav_of_page(page) - before).max() > 0.01


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
