"""Writes a generator as one ONNX file, checked against PyTorch.

    python export_onnx.py --checkpoint_file cp_misrnet/g_00500000 --output misrnet.onnx

The file maps `mel` [B, num_mels, T] to `wav` [B, 1, T * hop_size], B and T free; its metadata hold
the sampling rate and the mel's recipe. Needs the packages onnx, onnxscript and onnxruntime.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from env import Config, UserError
from inference import load_generator
from meldataset import SILENT_LOG_MEL
from models import Generator
from utils import command_line, command_parser, replacing

if TYPE_CHECKING:
    import onnx

# What one has to know to make the right mel, and to play the result.
METADATA_KEYS = ("sampling_rate", "hop_size", "num_mels", "n_fft", "win_size", "fmin", "fmax")
MEL_RECIPE = "natural log of at least 1e-5 of Slaney mel bands of STFT magnitudes, as HiFi-GAN"

CHECKED_SHAPES = ((1, 1), (1, 2), (1, 33), (2, 100), (1, 333))  # B, T
LARGEST_DIFFERENCE = 1e-4  # of the output's peak


def to_onnx(generator: Generator, h: Config) -> "onnx.ModelProto":
    """The ONNX form of `generator`, with free batch and length."""
    mel = torch.zeros(2, h.num_mels, 9)
    # The exporter speaks of packages that no vocoder needs, and of its own dependencies.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            generator,
            (mel,),
            dynamo=True,
            dynamic_shapes={"mel": {0: "B", 2: "T"}},
            input_names=["mel"],
            output_names=["wav"],
            verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # lines of this source code, with their paths
    for key in METADATA_KEYS:
        model.metadata_props.add(key=key, value=json.dumps(getattr(h, key)))
    model.metadata_props.add(key="mel", value=MEL_RECIPE)
    return model


def largest_difference(model: bytes, generator: Generator) -> float:
    """The largest difference between ONNX Runtime's samples and PyTorch's, relative to the peak.

    Of mels of several lengths, random between silence and loud speech.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    differences = []
    for B, T in CHECKED_SHAPES:
        mel = torch.rand(B, generator.conv_pre.in_channels, T, generator=random)
        mel = SILENT_LOG_MEL * mel + 2 * (1 - mel)
        with torch.inference_mode():
            expected = generator(mel)
        (wav,) = session.run(["wav"], {"mel": mel.numpy()})
        difference = (torch.from_numpy(wav) - expected).abs().max() / expected.abs().max()
        differences.append(float(difference))
    return max(differences)


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
    a = parser.parse_args()
    generator, h = load_generator(a.checkpoint_file)
    try:
        model = to_onnx(generator, h).SerializeToString()
        difference = largest_difference(model, generator)
    except ImportError as error:
        missing = error.name or error
        raise UserError(f"{missing} is missing: pip install onnx onnxscript onnxruntime") from None
    shapes = ", ".join(f"{B} x {T}" for B, T in CHECKED_SHAPES)
    print(f"largest difference from PyTorch: {difference:.1e} of the peak ({shapes} frames)")
    if not difference <= LARGEST_DIFFERENCE:  # NaN neither
        raise UserError(
            f"{a.output}: not written, for the difference is above {LARGEST_DIFFERENCE:g}"
        )
    with replacing(a.output) as temporary:
        temporary.write_bytes(model)
    print(f"{a.output}: {len(model) / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main)
