"""Writes a generator as one ONNX file, checked against PyTorch.

    python export_onnx.py --checkpoint_file cp_misrnet/g_00500000 --output misrnet.onnx

The file maps `mel` [B, num_mels, T] to `wav` [B, 1, T * hop_size], B and T free; its metadata hold
the sampling rate, the mel's recipe, and what sherpa-onnx asks of a vocoder. docs/onnx.md says how
to stream with it. Needs the packages onnx, onnxscript and onnxruntime.
"""

import argparse
import copy
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from env import Config, UserError
from heads import HarmonicSTFT
from inference import load_generator
from meldataset import SILENT_LOG_MEL
from models import MISR, Generator
from utils import command_line, command_parser, replacing

if TYPE_CHECKING:
    import onnx

# What one has to know to make the right mel, and to play the result.
METADATA_KEYS = ("sampling_rate", "hop_size", "num_mels", "n_fft", "win_size", "fmin", "fmax")
MEL_RECIPE = "natural log of at least 1e-5 of Slaney mel bands of STFT magnitudes, as HiFi-GAN"

# The key by which sherpa-onnx knows a vocoder that takes a log-mel and gives a waveform.
MODEL_TYPE = "hifigan"

CHECKED_SHAPES = ((1, 1), (1, 2), (1, 33), (2, 100), (1, 333))  # B, T
LARGEST_DIFFERENCE = 1e-4  # of the output's peak
LARGEST_OF_PULSES = 1e-2  # whose phase adds up what rounding does to their pitch


class PictureMISR(nn.Module):
    """A MISR [B, C, T] -> [B, C, T] as ONNX Runtime runs it fast: its N views as rows of a picture.

    ONNX Runtime has fast convolutions (channels in blocks, activations and sums inside) for
    pictures only. So the shared block runs on [B, C, N, T], by kernels of height 1. A kernel of
    height N makes the N rows of one, padded by N - 1 rows on both sides, of which each output row
    meets it in another of the kernel's rows; another merges them. A view a thread, at most.
    """

    def __init__(self, misr: MISR):
        super().__init__()
        N, C = misr.num_inputs, misr.input_conv.in_channels
        self.views = nn.Conv2d(C, C, (N, 1), padding=(N - 1, 0), bias=False)
        self.views.weight = _parameter(
            misr.input_conv.weight.reshape(N, C, C).flip(0).permute(1, 2, 0)[..., None]
        )
        self.bias = _parameter(misr.input_conv.bias.reshape(N, C).T[..., None])
        self.resblock = copy.deepcopy(misr.resblock)
        for name, convs in self.resblock.named_children():
            setattr(self.resblock, name, nn.ModuleList(map(_as_picture, convs)))
        self.merge = None
        if misr.output_conv is not None:
            self.merge = nn.Conv2d(C, C, (N, 1))
            self.merge.weight = _parameter(
                misr.output_conv.weight.reshape(C, N, C).transpose(1, 2)[..., None]
            )
            self.merge.bias = misr.output_conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.resblock(self.views(x.unsqueeze(2)) + self.bias)
        return y.mean(2) if self.merge is None else self.merge(y).squeeze(2)


def _parameter(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().contiguous())


def _as_picture(conv: nn.Conv1d) -> nn.Conv2d:
    """`conv` for [B, C, H, T], on each of the H rows."""
    (kernel_size,), (padding,), (dilation,) = conv.kernel_size, conv.padding, conv.dilation
    picture = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (1, kernel_size),
        padding=(0, padding),
        dilation=(1, dilation),
    )
    picture.weight, picture.bias = _parameter(conv.weight.unsqueeze(2)), conv.bias
    return picture


def with_pictures(generator: Generator) -> Generator:
    """A copy of `generator` whose MISRs run as `PictureMISR`s: the same samples, to rounding."""
    generator = copy.deepcopy(generator)
    for i, block in enumerate(generator.resblocks):
        if isinstance(block, MISR):
            generator.resblocks[i] = PictureMISR(block)
    return generator


def has_pulses(generator: Generator) -> bool:
    """True for `frame_v2` and its like, whose samples depend on all of the mel before."""
    return isinstance(generator.istft, HarmonicSTFT)


@torch.no_grad()
def in_half_precision(generator: Generator) -> Generator:
    """A copy of `generator` whose weights, but for biases, are rounded to what fp16 holds."""
    generator = copy.deepcopy(generator)
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.half())
    return generator


def store_halves(model: "onnx.ModelProto") -> None:
    """Stores as fp16 the weights of `model` that fp16 holds exactly; it computes in fp32 still.

    Each is cast when the file is loaded, once.
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
    """The ONNX form of `generator`, with free batch and length."""
    mel = torch.zeros(2, h.num_mels, 9)
    # The exporter speaks of packages that no vocoder needs, and of its own dependencies.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            with_pictures(generator),
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
    if not has_pulses(generator):  # they would begin anew in each chunk
        receptive_field = json.dumps(generator.receptive_field)
        model.metadata_props.add(key="receptive_field", value=receptive_field)
    model.metadata_props.add(key="mel", value=MEL_RECIPE)
    model.metadata_props.add(key="model_type", value=MODEL_TYPE)
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
    shapes = ", ".join(f"{B} x {T}" for B, T in CHECKED_SHAPES)
    print(f"largest difference from PyTorch: {difference:.1e} of the peak ({shapes} frames)")
    allowed = LARGEST_OF_PULSES if has_pulses(generator) else LARGEST_DIFFERENCE
    if not difference <= allowed:  # NaN neither
        raise UserError(f"{a.output}: not written, for the difference is above {allowed:g}")
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
    with replacing(a.output) as temporary:  # so that a folder that cannot be written is said first
        try:
            model = exported(generator, h, a)
        except ImportError as error:
            missing = error.name or error
            install = "pip install onnx onnxscript onnxruntime"
            raise UserError(f"{missing} is missing: {install}") from None
        temporary.write_bytes(model)
    print(f"{a.output}: {len(model) / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main)
