"""Writes a generator as one ONNX file, after comparing its samples with PyTorch's.

    python export_onnx.py --checkpoint_file cp_misrnet/g_00500000 --output misrnet.onnx

The file maps `mel` [B, num_mels, T] to `wav` [B, 1, T * hop_size], with free B and T. Its metadata
contain the sampling rate, the recipe of the mel, and what sherpa-onnx asks of a vocoder. Needs the
packages onnx and onnxruntime. docs/onnx.md describes streams.
"""

import argparse
import copy
import io
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from env import Config, UserError
from harmonic import HarmonicNoiseHead
from inference import load_generator
from meldataset import MEL_KEYS, SILENT_LOG_MEL, LogMelSpectrogram
from models import Generator
from onnx_graph import GraphGenerator
from onnx_storage import compact
from onnx_stream import StreamGenerator
from streaming import Streamer
from utils import atomic_write, command_line, command_parser, positive

if TYPE_CHECKING:
    import onnx

OPSET = 18

METADATA_KEYS = MEL_KEYS
MEL_RECIPE = "logarithm of mel bands of an STFT, with the settings in the other entries"
MODEL_TYPE = "hifigan"  # by which sherpa-onnx recognises a vocoder from log-mel to waveform

# The largest differences that the check of a file allows.
CHECKED_SHAPES = ((1, 1), (1, 2), (1, 33), (2, 100), (1, 333))  # B, T
MAX_DIFFERENCE = 1e-4  # of the peak of the waveform
# The phase of frame-rate generators sums up the rounding of F0, and Griffin-Lim magnifies it. Of
# random mels, the samples after a second do not tell rounding from mistakes, but the log-mels do:
# their mean difference is at most 0.0004 from rounding, and 0.15 when the noise is another one.
FRAME_RATE_SHAPES = ((1, 1), (1, 2), (1, 33), (2, 20))
MAX_FRAME_RATE_DIFFERENCE = 1e-2
MAX_LOG_MEL_DIFFERENCE = 2e-3


def is_frame_rate(generator: Generator) -> bool:
    """Returns whether the samples of `generator` depend on the phase, and so on the whole mel."""
    return isinstance(generator.head, HarmonicNoiseHead)


@torch.no_grad()
def in_half_precision(generator: Generator) -> Generator:
    """Returns a copy of `generator` with its weights, but for biases, rounded to fp16."""
    generator = copy.deepcopy(generator)
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.half())
    return generator


def to_onnx(generator: Generator, h: Config) -> "onnx.ModelProto":
    """Returns `generator` in ONNX, with free batch and length."""
    mel = torch.zeros(2, h.num_mels, 9)
    model = trace(
        GraphGenerator(generator),
        (mel,),
        input_names=["mel"],
        output_names=["wav"],
        dynamic_axes={"mel": {0: "B", 2: "T"}, "wav": {0: "B", 2: "N"}},
    )
    if not is_frame_rate(generator):  # its pulses would begin anew in each chunk
        add_metadata(model, receptive_field=json.dumps(generator.receptive_field))
    describe_mel(model, h)
    return model


def to_stream_onnx(generator: Generator, h: Config, frames: int) -> "onnx.ModelProto":
    """Returns `generator` in ONNX for pieces of `frames` frames, with explicit state."""
    stream = StreamGenerator(generator, h, frames)
    names = stream.state_names
    model = trace(
        stream,
        (torch.zeros(1, h.num_mels, frames), *stream.initial_state),
        input_names=["mel", *names],
        output_names=["wav", *(f"next.{name}" for name in names)],
    )
    state = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in zip(names, stream.initial_state, strict=True)
    }
    latency = str(stream.latency_samples)
    add_metadata(model, frames=str(frames), latency_samples=latency, state=json.dumps(state))
    describe_mel(model, h)
    return model


def trace(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **names) -> "onnx.ModelProto":
    """Returns the ONNX form of `module`.

    By TorchScript, which takes seconds: torch.export reasons for minutes about the lengths of the
    parts of a waveform.
    """
    import onnx

    contents = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            inputs,
            contents,
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,  # ONNX Runtime does it, and the file stays small
            **names,
        )
    model = onnx.load_from_string(contents.getvalue())
    compact(model)
    return model


def describe_mel(model: "onnx.ModelProto", h: Config) -> None:
    """Adds metadata about the mel that `model` takes and the waveform that it returns."""
    about = {key: json.dumps(getattr(h, key)) for key in METADATA_KEYS}
    add_metadata(model, **about, mel=MEL_RECIPE, model_type=MODEL_TYPE)


def add_metadata(model: "onnx.ModelProto", **entries: str) -> None:
    """Adds entries to the metadata of `model`."""
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def random_mel(num_mels: int, batch: int, frames: int) -> torch.Tensor:
    """Returns mels [B, num_mels, T], random between silence and loud speech."""
    random = torch.Generator().manual_seed(frames)
    return SILENT_LOG_MEL + (2 - SILENT_LOG_MEL) * torch.rand(
        batch, num_mels, frames, generator=random
    )


class OnnxVocoder:
    """Runs a file of this script in ONNX Runtime: mel [B, num_mels, T] -> wav [B, 1, N]."""

    def __init__(self, model: bytes):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.about = self.session.get_modelmeta().custom_metadata_map

    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        if "state" in self.about:
            return torch.stack([self.stream(each) for each in mel.numpy()])
        return torch.from_numpy(self.session.run(["wav"], {"mel": mel.numpy()})[0])

    def stream(self, mel: np.ndarray) -> torch.Tensor:
        """Returns the waveform [1, N] of a mel [num_mels, T], computed piece by piece."""
        frames, hop_size, latency = (
            int(self.about[key]) for key in ("frames", "hop_size", "latency_samples")
        )
        specification = json.loads(self.about["state"])
        state = {name: np.zeros(**each) for name, each in specification.items()}
        samples = mel.shape[1] * hop_size
        pieces = -(-(samples + latency) // (frames * hop_size))
        padded = np.pad(mel, ((0, 0), (0, pieces * frames - mel.shape[1])))
        wavs = []
        for first in range(0, pieces * frames, frames):
            if first + frames >= mel.shape[1]:
                state["length"][:] = mel.shape[1]
            piece = padded[None, :, first : first + frames]
            wav, *tensors = self.session.run(None, {"mel": piece, **state})
            state = dict(zip(state, tensors, strict=True))
            wavs.append(wav[0, 0])
        return torch.from_numpy(np.concatenate(wavs)[None, latency : latency + samples])


def synthesize_all(generator: Generator, mel: torch.Tensor, frames: int | None) -> torch.Tensor:
    """Returns PyTorch's waveform [B, 1, N] of mel [B, num_mels, T], of Streamer with `frames`."""
    if frames is None:
        with torch.inference_mode():
            return generator(mel)
    streamer = Streamer(generator)
    return torch.stack([torch.cat([streamer.feed(each), streamer.flush()])[None] for each in mel])


class Check:
    """Compares a file in ONNX Runtime with a generator in PyTorch."""

    def __init__(self, model: bytes, generator: Generator, h: Config, frames: int | None):
        vocoder = OnnxVocoder(model)
        self.is_frame_rate, log_mel = is_frame_rate(generator), LogMelSpectrogram(h, h.fmax)
        sample_shapes = FRAME_RATE_SHAPES if self.is_frame_rate else CHECKED_SHAPES
        differences, log_mel_differences = [], []
        for shape in sorted({*sample_shapes, *CHECKED_SHAPES}):
            B, T = shape
            mel = random_mel(h.num_mels, B if frames is None else 1, T)
            wav, expected = vocoder(mel), synthesize_all(generator, mel, frames)
            if shape in sample_shapes:
                differences.append(float((wav - expected).abs().max() / expected.abs().max()))
            ours, theirs = log_mel(wav[:, 0]), log_mel(expected[:, 0])
            log_mel_differences.append(float((ours - theirs).abs().mean()))
        self.difference, self.log_mel_difference = max(differences), max(log_mel_differences)
        self.shapes = ", ".join(f"{B} x {T}" for B, T in sample_shapes)

    def raise_if_different(self, path: Path) -> None:
        """Prints the differences; raises UserError if one is larger than rounding makes it."""
        print(
            f"largest difference from PyTorch: {self.difference:.1e} of the peak "
            f"({self.shapes} frames)"
        )
        allowed = MAX_FRAME_RATE_DIFFERENCE if self.is_frame_rate else MAX_DIFFERENCE
        if not self.difference <= allowed:  # NaN neither
            raise UserError(f"{path}: not written, because the difference is above {allowed:g}")
        if not self.is_frame_rate:
            return
        print(f"mean difference of log-mels, up to 333 frames: {self.log_mel_difference:.1e}")
        if not self.log_mel_difference <= MAX_LOG_MEL_DIFFERENCE:
            raise UserError(
                f"{path}: not written, because that is above {MAX_LOG_MEL_DIFFERENCE:g}"
            )


def exported(generator: Generator, h: Config, a: argparse.Namespace) -> bytes:
    """Returns the contents of the file; prints how far its samples are from those of `generator`.

    Raises:
        UserError: ONNX Runtime's samples are not PyTorch's.
    """
    rounded = in_half_precision(generator) if a.precision == "fp16" else generator
    model = to_stream_onnx(rounded, h, a.stream) if a.stream else to_onnx(rounded, h)
    contents = model.SerializeToString()
    Check(contents, rounded, h, a.stream).raise_if_different(a.output)
    if a.precision == "fp16":
        by_rounding = Check(contents, generator, h, a.stream).difference
        print(f"largest difference from fp32 weights: {by_rounding:.1e} of the peak")
    return contents


def parse_arguments() -> argparse.Namespace:
    """Returns the flags."""
    parser = command_parser(
        "Writes a generator as one ONNX file, mel [B, num_mels, T] to wav [B, 1, T * hop_size],\n"
        "after comparing ONNX Runtime's output with PyTorch's.",
        example="python export_onnx.py --checkpoint_file cp_misrnet/g_00500000 "
        "--output misrnet.onnx",
    )
    parser.add_argument(
        "--checkpoint_file",
        metavar="FILE",
        required=True,
        help="the generator, g_*, with its config.json beside it",
    )
    parser.add_argument(
        "--output", metavar="FILE", default="misrnet.onnx", type=Path, help="file to write"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16"),
        help="of the weights; fp16 halves the file, and computes in fp32 all the same",
    )
    parser.add_argument(
        "--stream",
        metavar="FRAMES",
        type=positive,
        help="write a graph for pieces of so many frames, with explicit state",
    )
    return parser.parse_args()


def main() -> None:
    """Exports a generator, checks the file, and only then writes it."""
    a = parse_arguments()
    generator, h = load_generator(a.checkpoint_file)
    with atomic_write(a.output) as temporary:  # first, so that a bad folder is named at once
        try:
            model = exported(generator, h, a)
        except ImportError as error:
            missing = error.name or error
            raise UserError(f"{missing} is missing: pip install onnx onnxruntime") from None
        temporary.write_bytes(model)
    print(f"{a.output}: {len(model) / 1e6:.2f} MB")


if __name__ == "__main__":
    command_line(main)
