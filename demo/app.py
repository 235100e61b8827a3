"""Serves a page to record or upload speech and to compare vocoders on it.

    pip install -r requirements.txt -r requirements-app.txt
    python demo/app.py --checkpoint_file cp_misrnet/g_00500000 hifigan/generator_v1

Each vocoder resynthesises the speech from its mel; the page shows sound, spectrogram and speed.
Checkpoints of the whole HiFi-GAN family work, each with its config.json beside it. Griffin-Lim is
added as a baseline without training. The page is served on this machine only; --host changes
that.
"""

import argparse
import functools
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from audio import load_wav, write_wav
from demo.server import port
from distributed import select_device, speed_up_cpu
from env import Config, UserError, load_config
from evaluation.plots import plot_spectrogram
from inference import Streamer, load_generator
from meldataset import LogMelSpectrogram, hifigan_recipe, mel_filterbank, mel_of_stretch
from utils import command_line, command_parser, is_out_of_memory, say, use_own_numba_cache

ROOT = Path(__file__).parents[1]
PRETRAINED = sorted(ROOT.glob("pretrained/*/g_*"))
GRIFFIN_LIM = "Griffin-Lim"
GRIFFIN_LIM_STEPS, MOMENTUM = 32, 0.99
CHUNK_FRAMES = 1024  # bounds the memory that a long recording takes
DELETE_AFTER_SECONDS = 3600  # for sounds in the temporary folder
LEVELS = (-30, 10)  # dB
PLOTTED_SECONDS = 30  # the start of a clip that is plotted


class Vocoder:
    """A generator, or Griffin-Lim if `checkpoint` is None, with the mel of its config."""

    def __init__(self, checkpoint: Path | None, device: torch.device):
        self.checkpoint = checkpoint
        # The cache holds one generator per precision.
        self.load = functools.cache(functools.partial(load_generator, checkpoint, device))
        self.h = self.load("fp32")[1] if checkpoint else load_config(ROOT / "config_v1.json")
        self.log_mel = LogMelSpectrogram(self.h, self.h.fmax)

    def resynthesize(
        self, wav: torch.Tensor, precision: str, progress: Callable[[float], object]
    ) -> torch.Tensor:
        """Takes a waveform [N] at h.sampling_rate; returns [N // hop_size * hop_size] in [-1, 1].

        Calls `progress` with the fraction that is done.
        """
        if self.checkpoint is None:
            return griffin_lim(self.log_mel(wav[None])[0], self.h)
        streamer, frames = Streamer(self.load(precision)[0]), self.log_mel.frames(len(wav))
        pieces = []
        for first in range(0, frames, CHUNK_FRAMES):
            mel = mel_of_stretch(self.log_mel, wav, first, first + CHUNK_FRAMES)
            pieces.append(streamer.feed(mel).cpu())
            progress(first / frames)
        return torch.cat([*pieces, streamer.flush().cpu()]).clamp(-1, 1)


def griffin_lim(mel: torch.Tensor, h: Config) -> torch.Tensor:
    """Returns the waveform [T * hop_size] of a log-mel [num_mels, T] by fast Griffin-Lim.

    The magnitudes are the filterbank's pseudo-inverse applied to the mel. librosa's function is not
    used because numba compiles it for half a minute at the first call.

    Source: Perraudin, Balazs, Sondergaard, "A fast Griffin-Lim algorithm", WASPAA 2013.
    """
    window = torch.hann_window(h.win_size)
    sizes = {"n_fft": h.n_fft, "hop_length": h.hop_size, "win_length": h.win_size, "window": window}
    magnitude = (torch.linalg.pinv(mel_filterbank(h, h.fmax)) @ mel.exp()).clamp(min=0)
    magnitude = F.pad(magnitude, (1, 1), mode="replicate")  # one frame more at each end, cut below
    noise = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    spectrum, previous = torch.polar(magnitude, 2 * torch.pi * noise), torch.zeros(())
    for _ in range(GRIFFIN_LIM_STEPS):
        consistent = torch.stft(torch.istft(spectrum, **sizes), **sizes, return_complex=True)
        phase = (consistent - MOMENTUM / (1 + MOMENTUM) * previous).angle()
        spectrum, previous = torch.polar(magnitude, phase), consistent
    # torch centres frame t at t * hop_size, LogMelSpectrogram half a hop later.
    return torch.istft(spectrum, **sizes)[h.hop_size // 2 :][: mel.shape[1] * h.hop_size].clamp(
        -1, 1
    )


def load_vocoders(checkpoints: list[Path], device: torch.device) -> dict[str, Vocoder]:
    """Returns the vocoders by name, Griffin-Lim last; raises UserError as `load_generator` does."""
    vocoders = {}
    for path in checkpoints:
        name = "/".join(path.absolute().parts[-2:])
        vocoders[str(path) if name in vocoders else name] = Vocoder(path, device)
    return vocoders | {GRIFFIN_LIM: Vocoder(None, device)}


def write_and_plot(wav: torch.Tensor, h: Config, path: Path) -> tuple:
    """Writes a waveform [N]; returns the path and a plot. Gradio would normalise samples."""
    write_wav(path, wav, h.sampling_rate)
    wav = wav[: PLOTTED_SECONDS * h.sampling_rate]
    mel = LogMelSpectrogram(hifigan_recipe(h), fmax=None)(wav[None])[0]
    return str(path), plot_spectrogram(wav.numpy(), mel.numpy(), h, fmax=None)


def compare(
    vocoders: dict[str, Vocoder],
    file: str | None,
    names: list[str],
    level: float,
    precision: str,
    progress: Callable,
) -> Iterator[tuple[str, str, object, str]]:
    """Yields (name, wav file, plot, speed), first of the input, then of each vocoder in `names`.

    Raises:
        UserError: no file, a file that cannot be used, or no vocoder.
    """
    if file is None:
        raise UserError("no speech: record or upload some first")
    if not names:
        raise UserError("no vocoder: choose one or more")
    with tempfile.TemporaryDirectory(prefix="misrnet_app_") as folder:  # gradio copies the files
        for i, name in enumerate(name for name in vocoders if name in names):
            vocoder, h = vocoders[name], vocoders[name].h
            wav = load_wav(file, h.sampling_rate, min_samples=h.hop_size)
            wav = (wav * 10 ** (level / 20)).clamp(-1, 1)
            if i == 0:
                yield "input", *write_and_plot(wav, h, Path(folder, "input.wav")), ""
            begin = time.monotonic()
            wav_hat = vocoder.resynthesize(
                wav, precision, progress=functools.partial(progress, desc=name)
            )
            seconds, audio_seconds = time.monotonic() - begin, len(wav_hat) / h.sampling_rate
            speed = (
                f"{audio_seconds:.1f} s of audio in {seconds:.2f} s: "
                f"{audio_seconds / seconds:.1f} times real time"
            )
            yield name, *write_and_plot(wav_hat, h, Path(folder, f"{i}.wav")), speed


@contextmanager
def errors_on_the_page() -> Iterator[None]:
    """Turns a UserError, or running out of memory, into one line on the page."""
    import gradio as gr

    try:
        yield
    except UserError as error:
        raise gr.Error(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise gr.Error("out of memory; try a shorter recording") from None


def build(vocoders: dict[str, Vocoder]):
    """Returns the page, a gradio.Blocks."""
    import gradio as gr

    with gr.Blocks(title="MISRNet", delete_cache=(DELETE_AFTER_SECONDS,) * 2) as page:
        gr.Markdown(
            "# MISRNet\nRecord or upload speech. Each vocoder resynthesises it from its mel."
        )
        with gr.Row():
            file = gr.Audio(label="speech", sources=["upload", "microphone"], type="filepath")
            with gr.Column():
                names = gr.CheckboxGroup([*vocoders], value=[*vocoders], label="vocoders")
                level = gr.Slider(*LEVELS, value=0, step=1, label="input level (dB)")
                precision = gr.Radio(["fp32", "bf16"], value="fp32", label="precision")
                button = gr.Button("Compare", variant="primary")
        slots = []
        for _ in range(1 + len(vocoders)):
            with gr.Column(visible=False) as group:
                title, sound = gr.Markdown(), gr.Audio(interactive=False, buttons=["download"])
                slots.append((group, title, sound, gr.Plot()))

        def on_click(*choices, progress=gr.Progress()):  # noqa: B008
            yield {group: gr.Column(visible=False) for group, *_ in slots}
            free = iter(slots)
            with errors_on_the_page():
                for name, path, figure, speed in compare(vocoders, *choices, progress):
                    group, title, sound, plot = next(free)
                    yield {
                        group: gr.Column(visible=True),
                        title: f"### {name}\n{speed}",
                        sound: gr.Audio(path, label=name),
                        plot: gr.Plot(figure, label=f"the first {PLOTTED_SECONDS} s"),
                    }

        parts = [part for slot in slots for part in slot]
        button.click(on_click, [file, names, level, precision], parts)
    return page


def main() -> None:
    """Serves the page until Ctrl-C."""
    parser = command_parser(
        "Serves a page, on this machine only, to record or upload speech and to compare vocoders "
        "on it.",
        example="python demo/app.py --checkpoint_file cp_misrnet/g_00500000 hifigan/generator_v1",
    )
    parser.add_argument(
        "--checkpoint_file",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=PRETRAINED,
        help="generators, g_*, each with its config.json beside it (default: those in pretrained/)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 admits other machines"
    )
    parser.add_argument(
        "--port", type=port, default=7860, metavar="N", help="port; 0 takes any free one"
    )
    a = parser.parse_args()
    use_own_numba_cache()
    with gradio_environment(a.host):
        serve(a)


@contextmanager
def gradio_environment(host: str) -> Iterator[None]:
    """Gives gradio a temporary folder of its own and lets it reach its own address directly.

    By default, gradio writes to <temporary folder>/gradio, which another user may own, and asks the
    proxy for its own address.

    Raises:
        UserError: no folder can be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="misrnet_app_")
    except OSError as error:
        raise UserError(
            f"no temporary folder can be made ({error}); set TMPDIR to a folder that can be written"
        ) from None
    direct = [*filter(None, [os.environ.get("no_proxy", os.environ.get("NO_PROXY"))])]
    direct = ",".join([*direct, "localhost", "127.0.0.1", host])
    with folder as name:
        os.environ |= {"GRADIO_TEMP_DIR": name, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ |= {"no_proxy": direct, "NO_PROXY": direct}
        yield


def serve(a: argparse.Namespace) -> None:
    """Loads the vocoders and serves the page.

    Raises:
        UserError: gradio is missing, a checkpoint cannot be used, or the port is in use.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; run: pip install -r requirements-app.txt") from None
    device = select_device(a.device)
    if device.type == "cpu":
        speed_up_cpu()
    page = build(load_vocoders(a.checkpoint_file, device))
    number = a.port
    try:
        if number == 0:
            with socket.create_server((a.host, 0)) as free:
                number = free.getsockname()[1]
        page.launch(server_name=a.host, server_port=number, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"{a.host}:{number}: {error}") from None
    say(f"open http://{a.host}:{number} in a browser; Ctrl-C ends")
    page.block_thread()


if __name__ == "__main__":
    command_line(main)
