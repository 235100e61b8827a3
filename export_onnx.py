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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from env import Config, UserError
from harmonic import HarmonicNoiseHead
from inference import load_generator
from meldataset import MEL_KEYS, SILENT_LOG_MEL, LogMelSpectrogram
from models import Generator
from onnx_graph import GraphGenerator
from onnx_stream import StreamGenerator
from utils import atomic_write, command_line, command_parser

if TYPE_CHECKING:
    import onnx

OPSET = 18

METADATA_KEYS = MEL_KEYS
MEL_RECIPE = "logarithm of mel bands of an STFT, with the settings in the other entries"
MODEL_TYPE = "hifigan"  # by which sherpa-onnx recognises a vocoder from log-mel to waveform

# The largest differences that the check of a file allows.
CHECKED_SHAPES = ((1, 1), (1, 2), (1, 33), (2, 100), (1, 333))  # B, T
MAX_DIFFERENCE = 1e-4  # of the peak of the waveform
# The phase of frame-rate generators sums up the rounding of F0, and Griffin-Lim magnifies it. Random
# mels are the worst case: after 100 frames their samples no longer tell rounding from mistakes, but
# their log-mels do. The mean difference of these is at most 0.0004 from rounding, and 0.15 when the
# noise is another one.
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


def store_halves(model: "onnx.ModelProto") -> None:
    """Stores the weights of `model` that fp16 holds exactly as fp16; it computes in fp32 still.

    Each is cast once, when the file is loaded.
    """
    from onnx import TensorProto, helper, numpy_helper

    for tensor in model.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim < 2 or weight.dtype != "float32" or (weight != weight.astype("f2")).any():
            continue
        name, half = tensor.name, f"{tensor.name}.half"
        tensor.CopyFrom(numpy_helper.from_array(weight.astype("f2"), half))
        cast = helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT)
        model.graph.node.insert(0, cast)


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
    return onnx.load_from_string(contents.getvalue())


def describe_mel(model: "onnx.ModelProto", h: Config) -> None:
    """Adds metadata about the mel that `model` takes and the waveform that it returns."""
    about = {key: json.dumps(getattr(h, key)) for key in METADATA_KEYS}
    add_metadata(model, **about, mel=MEL_RECIPE, model_type=MODEL_TYPE)


def add_metadata(model: "onnx.ModelProto", **entries: str) -> None:
    """Adds entries to the metadata of `model`."""
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def checked_shapes(generator: Generator) -> tuple[tuple[int, int], ...]:
    """(B, T) of the mels by which an exported generator is compared with PyTorch's."""
    return FRAME_RATE_SHAPES if is_frame_rate(generator) else CHECKED_SHAPES


def waveforms(
    model: bytes, generator: Generator, shapes: tuple[tuple[int, int], ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """ONNX Runtime's and PyTorch's, [B, 1, N], of mels random between silence and loud speech."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    for B, T in shapes:
        mel = torch.rand(B, generator.conv_pre.in_channels, T, generator=random)
        mel = SILENT_LOG_MEL * mel + 2 * (1 - mel)
        with torch.inference_mode():
            expected = generator(mel)
        (wav,) = session.run(["wav"], {"mel": mel.numpy()})
        yield torch.from_numpy(wav), expected


def largest_difference(model: bytes, generator: Generator) -> float:
    """The largest difference between ONNX Runtime's samples and PyTorch's, relative to the peak."""
    return max(
        float((wav - expected).abs().max() / expected.abs().max())
        for wav, expected in waveforms(model, generator, checked_shapes(generator))
    )


def log_mel_difference(model: bytes, generator: Generator, h: Config) -> float:
    """The mean difference between the log-mels of ONNX Runtime's waveforms and PyTorch's, in Np.

    The largest over mels of all lengths, long ones too.
    """
    log_mel = LogMelSpectrogram(h, h.fmax)
    return max(
        float((log_mel(wav[:, 0]) - log_mel(expected[:, 0])).abs().mean())
        for wav, expected in waveforms(model, generator, CHECKED_SHAPES)
    )


def exported(generator: Generator, h: Config, a: argparse.Namespace) -> bytes:
    """The file's contents, in the precision of `a`; prints how far they are from `generator`.

    Raises:
        UserError: ONNX Runtime's samples are not PyTorch's.
    """
    rounded = in_half_precision(generator) if a.precision == "fp16" else generator
    model = to_onnx(rounded, h)
    if a.precision == "fp16":
        store_halves(model)
    contents = model.SerializeToString()
    difference = largest_difference(contents, rounded)
    shapes = ", ".join(f"{B} x {T}" for B, T in checked_shapes(generator))
    print(f"largest difference from PyTorch: {difference:.1e} of the peak ({shapes} frames)")
    allowed = MAX_FRAME_RATE_DIFFERENCE if is_frame_rate(generator) else MAX_DIFFERENCE
    if not difference <= allowed:  # NaN neither
        raise UserError(f"{a.output}: not written, for the difference is above {allowed:g}")
    if is_frame_rate(generator):
        difference = log_mel_difference(contents, rounded, h)
        print(f"mean difference of log-mels, of long mels too: {difference:.1e}")
        if not difference <= MAX_LOG_MEL_DIFFERENCE:
            raise UserError(f"{a.output}: not written, for that is above {MAX_LOG_MEL_DIFFERENCE:g}")
    if a.precision == "fp16":
        by_rounding = largest_difference(contents, generator)
        print(f"largest difference from fp32 weights: {by_rounding:.1e} of the peak")
    return contents


def main() -> None:
    """Exports, checks, and only then writes."""
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
        help="of the weights: fp16 halves the file; it computes in fp32 all the same",
    )
    a = parser.parse_args()
    generator, h = load_generator(a.checkpoint_file)
    with atomic_write(
        a.output
    ) as temporary:  # so that a folder that cannot be written is said first
        try:
            model = exported(generator, h, a)
        except ImportError as error:
            missing = error.name or error
            install = "pip install onnx onnxruntime"
            raise UserError(f"{missing} is missing: {install}") from None
        temporary.write_bytes(model)
    print(f"{a.output}: {len(model) / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main)
