"""An app to try vocoders: speak or upload, and hear and see what each makes of it.

    pip install -r requirements.txt -r requirements-app.txt
    python app.py --checkpoint_file cp_misrnet/g_00500000 hifigan/generator_v1

It listens on this machine alone, unless --host says otherwise. Checkpoints of the whole family
will do, each with its config.json beside it; Griffin-Lim, which has learnt nothing, is the floor.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import librosa
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
from audio import load_wav, write_wav
from distributed import select_device, speed_up_cpu
from env import Config, UserError, load_config
from evaluation.plots import plot_spectrogram
from inference import Streamer, load_generator
from meldataset import LogMelSpectrogram, mel_filterbank, mel_of_stretch
from utils import (
    command_line,
    command_parser,
    is_out_of_memory,
    natural,
    say,
    use_own_numba_cache,
)

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody

HERE = Path(__file__).parent
SHIPPED = sorted(HERE.glob("pretrained/*/g_*"))
GRIFFIN_LIM, ITERATIONS = "Griffin-Lim", 32
CHUNK_FRAMES = 1024  # a long recording takes no more memory
KEPT_SECONDS = 3600  # of sounds in the temporary folder
LEVELS = (-30, 10)  # dB
PICTURED_SECONDS = 30  # at most


class Vocoder:
    """A checkpoint, or without one Griffin-Lim: mels to waveforms by a config's recipe."""

    def __init__(self, checkpoint: Path | None, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        # Kept once loaded, in each precision that was asked for.
        self.load = functools.cache(functools.partial(load_generator, checkpoint, device))
        self.h = self.load("fp32")[1] if checkpoint else load_config(HERE / "config_v1.json")
        self.log_mel = LogMelSpectrogram(self.h, self.h.fmax)

    def speak(self, wav: torch.Tensor, precision: str, progress: Callable) -> torch.Tensor:
        """Vocodes a waveform [N] at h.sampling_rate; tells `progress` the fraction that is done."""
        if self.checkpoint is None:
            return griffin_lim(self.log_mel(wav[None])[0], self.h)
        streamer, frames = Streamer(self.load(precision)[0]), len(wav) // self.h.hop_size
        pieces = []
        for first in range(0, frames, CHUNK_FRAMES):
            mel = mel_of_stretch(self.log_mel, wav, first, first + CHUNK_FRAMES)
            pieces.append(streamer.feed(mel).cpu())
            progress(first / frames)
        return torch.cat([*pieces, streamer.flush().cpu()]).clamp(-1, 1)


def griffin_lim(mel: torch.Tensor, h: Config) -> torch.Tensor:
    """Log-mel [num_mels, T] -> [T * hop_size]: phases that fit, to a pseudo-inverse's magnitudes.

    Source: Griffin, Lim, "Signal estimation from modified short-time Fourier transform", 1984.
    """
    filterbank = mel_filterbank(h, h.fmax).numpy()
    magnitude = np.maximum(0, np.linalg.pinv(filterbank) @ mel.exp().numpy())
    sizes = {"n_fft": h.n_fft, "hop_length": h.hop_size, "win_length": h.win_size}
    use_own_numba_cache()
    wav = librosa.griffinlim(magnitude, n_iter=ITERATIONS, center=False, random_state=0, **sizes)
    padding = (h.n_fft - h.hop_size) // 2  # as LogMelSpectrogram's
    return torch.from_numpy(wav[padding:][: mel.shape[1] * h.hop_size]).clamp(-1, 1)


def load_vocoders(checkpoints: list[Path], device: torch.device) -> dict[str, Vocoder]:
    """The vocoders by name, Griffin-Lim last; raises UserError as `load_generator` does."""
    vocoders = {}
    for path in checkpoints:
        name = "/".join(path.absolute().parts[-2:])
        vocoders[str(path) if name in vocoders else name] = Vocoder(path, device)
    return vocoders | {GRIFFIN_LIM: Vocoder(None, device)}


def show(wav: torch.Tensor, h: Config, path: Path) -> tuple:
    """A waveform [N] as a file (of samples, gradio would change the level) and as a picture."""
    write_wav(path, wav, h.sampling_rate)
    wav = wav[: PICTURED_SECONDS * h.sampling_rate]
    mel = LogMelSpectrogram(h, fmax=None)(wav[None])[0]
    return str(path), plot_spectrogram(wav.numpy(), mel.numpy(), h, fmax=None)


def vocode(
    vocoders: dict[str, Vocoder],
    file: str | None,
    names: list[str],
    level: float,
    precision: str,
    progress: Callable,
) -> Iterator[tuple[str, str, object, str]]:
    """Yields, of what was heard and of each vocoder named: name, wav file, picture, and speed.

    Raises:
        UserError: no file, or one that cannot be used; no vocoder.
    """
    if file is None:
        raise UserError("record or upload speech first")
    if not names:
        raise UserError("choose a vocoder")
    with tempfile.TemporaryDirectory(prefix="misrnet_app_") as folder:  # gradio copies its files
        for i, name in enumerate(name for name in vocoders if name in names):
            vocoder, h = vocoders[name], vocoders[name].h
            wav = load_wav(file, h.sampling_rate, min_samples=h.hop_size)
            wav = (wav * 10 ** (level / 20)).clamp(-1, 1)
            if i == 0:
                yield "what was given", *show(wav, h, Path(folder, "given.wav")), ""
            begin = time.monotonic()
            wav_hat = vocoder.speak(wav, precision, functools.partial(progress, desc=name))
            seconds, sound = time.monotonic() - begin, len(wav_hat) / h.sampling_rate
            speed = f"{sound:.1f} s in {seconds:.2f} s: {sound / seconds:.1f} times real time"
            yield name, *show(wav_hat, h, Path(folder, f"{i}.wav")), speed


@contextmanager
def in_one_line() -> Iterator[None]:
    """What the user can mend is shown as the one line that it is."""
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
    """The app, a gradio.Blocks, which `launch` serves."""
    import gradio as gr

    with gr.Blocks(title="MISRNet", delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.Markdown("# MISRNet\nSpeak or upload; each vocoder speaks it again from its mel.")
        with gr.Row():
            file = gr.Audio(label="speech", sources=["upload", "microphone"], type="filepath")
            with gr.Column():
                names = gr.CheckboxGroup([*vocoders], value=[*vocoders], label="vocoders")
                level = gr.Slider(*LEVELS, value=0, step=1, label="level of the input (dB)")
                precision = gr.Radio(["fp32", "bf16"], value="fp32", label="precision")
                button = gr.Button("Vocode", variant="primary")
        slots = []
        for _ in range(1 + len(vocoders)):
            with gr.Column(visible=False) as group:
                title, sound = gr.Markdown(), gr.Audio(interactive=False, buttons=["download"])
                slots.append((group, title, sound, gr.Plot()))

        def on_click(*choices, progress=gr.Progress()):  # noqa: B008
            yield {group: gr.Column(visible=False) for group, *_ in slots}
            free = iter(slots)
            with in_one_line():
                for name, path, figure, speed in vocode(vocoders, *choices, progress):
                    group, title, sound, plot = next(free)
                    yield {
                        group: gr.Column(visible=True),
                        title: f"### {name}\n{speed}",
                        sound: gr.Audio(path, label=name),
                        plot: gr.Plot(figure, label=f"the first {PICTURED_SECONDS} s"),
                    }

        parts = [part for slot in slots for part in slot]
        button.click(on_click, [file, names, level, precision], parts)
    return app


def main() -> None:
    """Serves the app until Ctrl-C."""
    parser = command_parser(
        "Serves a page, on this machine alone, to record or upload speech and hear what vocoders\n"
        "make of it.",
        example="python app.py --checkpoint_file cp_misrnet/g_00500000 hifigan/generator_v1",
    )
    parser.add_argument(
        "--checkpoint_file",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=SHIPPED,
        help="generators, g_*, each with its config.json beside it (default: those in pretrained/)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in"
    )
    parser.add_argument("--port", type=natural, default=7860, metavar="N", help="port")
    serve(parser.parse_args())


def serve(a: argparse.Namespace) -> None:
    """Loads and serves.

    Raises:
        UserError: gradio is missing, a checkpoint cannot be used, or the port is taken.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; pip install -r requirements-app.txt") from None
    device = select_device(a.device)
    if device.type == "cpu":
        speed_up_cpu()
    app = build(load_vocoders(a.checkpoint_file, device))
    try:
        app.launch(server_name=a.host, server_port=a.port, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"{a.host}:{a.port}: {error}") from None
    say(f"open http://{a.host}:{a.port} in a browser; Ctrl-C ends")
    app.block_thread()


if __name__ == "__main__":
    command_line(main)
