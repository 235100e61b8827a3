"""Builds the page that vocodes recordings in the browser: a folder for any static host.

    pip install -r requirements.txt onnx
    python demo/browser/build.py --serve

The page needs no server code and no network. The folder holds the page, ONNX Runtime for
WebAssembly from the npm registry, a clip, and each vocoder as a graph from mel to spectra. Griffin-
Lim runs in JavaScript, where a Fourier transform is several times as fast as in a graph.
"""

import argparse
import http.server
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts
from demo.server import HOST, port
from env import Config, UserError
from export_onnx import trace
from harmonic import EPSILON, GRIFFIN_LIM_MOMENTUM, MIN_WINDOW_SUM, PHASE_SOFTNESS
from inference import load_generator
from meldataset import mel_filterbank
from models import Generator
from onnx_stream import Clock, HarmonicStream, State, StreamGenerator
from utils import command_line, command_parser, say

ROOT = Path(__file__).parents[2]
PAGE_TYPES = (".html", ".css", ".js")
MODELS = {"frame_v3": "the fast one", "frame_v2": "the better one"}  # the first is the default
CLIP = ROOT / "pretrained/samples/index_files/0001-0.flac"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
FRAMES = 32  # in a piece; docs/onnx.md has the speed of others


class SpectrumStream(HarmonicStream):
    """A HarmonicStream that stops before Griffin-Lim."""

    def griffin_lim(
        self,
        spectrum: torch.Tensor,
        magnitude: torch.Tensor,
        delay: int,
        state: State,
        clock: Clock,
    ) -> torch.Tensor:
        """Returns real part, imaginary part and magnitude of each bin, [n, 3, bins]."""
        stft = self.head.stft
        bins = stft.bins.tolist()
        position = [bins.index(k) for k in range(stft.n_fft // 2 + 1)]
        # Positions of bins above n_fft / 2 hold the conjugates of those below.
        k1, k2 = torch.arange(stft.rows), torch.arange(stft.groups)
        k = (k1 + stft.n_fft // stft.groups * k2[:, None]).flatten()[position]
        sign = torch.where(2 * k > stft.n_fft, -1.0, 1.0)
        signs = torch.stack([torch.ones_like(sign), sign, torch.ones_like(sign)])
        spectra = torch.cat([spectrum, magnitude], dim=1)[0][:, position]
        return (spectra * signs[:, :, None]).permute(2, 0, 1)


class SpectrumGenerator(StreamGenerator):
    """A StreamGenerator with spectra [frames, 1, 3, bins] in place of the waveform."""

    def harmonic_stream(self, head) -> SpectrumStream:
        return SpectrumStream(head)


def checkpoint(name: str) -> Path:
    """Returns the shipped weights of a model."""
    return next(ROOT.glob(f"pretrained/{name}_universal/g_*"))


def export(generator: Generator, h: Config, path: Path) -> dict:
    """Writes the graph of a frame-rate generator; returns what the page needs to know about it."""
    stream = SpectrumGenerator(generator, h, FRAMES)
    names = stream.state_names
    model = trace(
        stream,
        (torch.zeros(1, h.num_mels, FRAMES), *stream.initial_state),
        input_names=["mel", *names],
        output_names=["spectra", *(f"next.{name}" for name in names)],
    )
    path.write_bytes(model.SerializeToString())
    margin = generator.head.stft.margins[0]
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "frames": FRAMES,
        "delay": (stream.latency_samples - margin) // h.hop_size - stream.head.lookahead,
        "state": {
            name: {"shape": [*tensor.shape], "type": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in zip(names, stream.initial_state, strict=True)
        },
        "mel": mel_recipe(h),
        "griffin_lim": {
            "n_fft": h.n_fft,
            "hop_size": h.hop_size,
            "steps": stream.head.steps,
            "lookahead": stream.head.lookahead,
            "momentum": GRIFFIN_LIM_MOMENTUM,
            "softness": PHASE_SOFTNESS,
            "epsilon": EPSILON,
            "min_window_sum": MIN_WINDOW_SUM,
        },
    }


def mel_recipe(h: Config) -> dict:
    """Returns the settings of the mel, with each band as its first bin and its weights."""
    bands = []
    for weights in mel_filterbank(h, h.fmax):
        bins = weights.nonzero()[:, 0]
        first, last = int(bins[0]), int(bins[-1])
        bands.append([first, [float(f"{weight:.9g}") for weight in weights[first : last + 1]]])
    keys = ("sampling_rate", "n_fft", "hop_size", "win_size", "num_mels", "mel_floor")
    return {key: getattr(h, key) for key in (*keys, "stft_epsilon")} | {"bands": bands}


def fetch_runtime(folder: Path) -> None:
    """Puts ONNX Runtime for WebAssembly into `folder`, if it is not there.

    Raises:
        UserError: npm is missing, or does not get the package.
    """
    if all((folder / name).is_file() for name in RUNTIME_FILES):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        pack = ["npm", "pack", "--silent", RUNTIME, "--pack-destination", temporary]
        try:
            subprocess.run(pack, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError("npm is missing: install Node.js, which contains it") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"npm cannot get {RUNTIME}: {reason}") from None
        with tarfile.open(next(Path(temporary).glob("*.tgz"))) as package:
            for name in RUNTIME_FILES:
                with package.extractfile(f"package/dist/{name}") as source:
                    (folder / name).write_bytes(source.read())


def build(output: Path) -> None:
    """Writes the page and all that it loads into the folder `output`."""
    runtime = output / RUNTIME.replace("@", "-")
    fetch_runtime(runtime)
    for path in Path(__file__).parent.iterdir():
        if path.suffix in PAGE_TYPES:
            shutil.copy(path, output)
    shutil.copy(CLIP, output / "clip.flac")
    models = {
        name: {"note": note} | export(*load_generator(checkpoint(name)), output / f"{name}.onnx")
        for name, note in MODELS.items()
    }
    size = sum((runtime / name).stat().st_size for name in RUNTIME_FILES)
    about = {"runtime": runtime.name, "bytes": size, "models": models}
    (output / "models.json").write_text(json.dumps(about))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with the headers that isolate a page, so that it may use threads."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_) -> None:
        """Prints nothing."""


def server(folder: Path, number: int) -> http.server.ThreadingHTTPServer:
    """Returns a server of `folder` on a port of this machine; 0 is any free one.

    Raises:
        UserError: the port is in use.
    """
    try:
        return http.server.ThreadingHTTPServer((HOST, number), partial(Handler, directory=folder))
    except OSError as error:
        raise UserError(f"port {number}: {error.strerror}; pass another --port") from None


def parse_arguments() -> argparse.Namespace:
    """Returns the flags."""
    parser = command_parser(
        "Builds the page that vocodes recordings in the browser: a folder for any static host.",
        example="python demo/browser/build.py --serve",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path(__file__).parent / "site",
        help="folder to write",
    )
    parser.add_argument("--serve", action="store_true", help="serve the folder on this machine")
    parser.add_argument("--port", metavar="N", type=port, default=8766, help="port of --serve")
    return parser.parse_args()


def main() -> None:
    """Builds the page, and serves it until it is interrupted."""
    a = parse_arguments()
    try:
        build(a.output)
    except ImportError as error:
        raise UserError(f"{error.name or error} is missing: pip install onnx") from None
    say(f"{a.output}: built; put it on a static host")
    if a.serve:
        with server(a.output, a.port) as serving:
            say(f"http://{HOST}:{serving.server_port}")
            serving.serve_forever()


if __name__ == "__main__":
    command_line(main)
