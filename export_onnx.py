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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from env import Config, UserError
from harmonic import HarmonicNoiseHead
from inference import load_generator
from meldataset import MEL_KEYS, SILENT_LOG_MEL, LogMelSpectrogram
from models import MISR, Generator, block_padding
from utils import atomic_write, command_line, command_parser

if TYPE_CHECKING:
    import onnx

# What one has to know to make the right mel, and to play the result.
METADATA_KEYS = MEL_KEYS
MEL_RECIPE = "the logarithm of mel bands of an STFT, by the keys above; HiFi-GAN's by default"

SET_OF_CHANNELS = 64  # in ONNX Runtime's convolutions
LAST = 2**63 - 1  # in ONNX, the end of any slice

# The key by which sherpa-onnx knows a vocoder that takes a log-mel and gives a waveform.
MODEL_TYPE = "hifigan"

CHECKED_SHAPES = ((1, 1), (1, 2), (1, 33), (2, 100), (1, 333))  # B, T
LARGEST_DIFFERENCE = 1e-4  # of the output's peak
# The phase of pulses adds up what rounding does to their pitch, and consistency steps enlarge that:
# of mels so random as these, the samples of long ones tell rounding from mistakes no more. Their
# log-mels do, the mean of whose differences is 0.0004 at most by rounding, 0.15 by another noise.
CHECKED_OF_PULSES = ((1, 1), (1, 2), (1, 33), (2, 20))
LARGEST_OF_PULSES = 1e-2
LARGEST_OF_LOG_MELS = 2e-3


class Conv2dMISR(nn.Module):
    """A MISR [B, C, T] -> [B, C, T] as ONNX Runtime runs it fast: as rows of a picture.

    ONNX Runtime has fast convolutions (channels in blocks, activations and sums inside) for
    pictures only, and shares out among its threads rows and sets of 64 channels. So the shared
    block runs on [B, C, rows, T'], by kernels of height 1: a row is a view of the input, or, of one
    set of channels, a view of the first or of the second half of the time; else, of the three views
    of two threads, one would wait for the other. The halves overlap by what the block reaches, and
    each has one end of the whole, where the block pads as it does there.

    A kernel of height N makes the N views of a row, padded by N - 1 rows on both sides, of which
    each view meets it in another of the kernel's rows; another kernel merges them.
    """

    def __init__(self, misr: MISR):
        super().__init__()
        N, C = misr.num_inputs, misr.input_conv.in_channels
        self.num_inputs, self.reach = N, block_padding(misr)[0]
        self.is_halved = C <= SET_OF_CHANNELS
        self.views = nn.Conv2d(C, C, (N, 1), padding=(N - 1, 0), bias=False)
        self.views.weight = _parameter(
            misr.input_conv.weight.reshape(N, C, C).flip(0).permute(1, 2, 0)[..., None]
        )
        bias = misr.input_conv.bias.reshape(N, C).T[..., None]
        self.bias = _parameter(bias.repeat(1, 2, 1) if self.is_halved else bias)
        self.resblock = copy.deepcopy(misr.resblock)
        for name, convs in self.resblock.named_children():
            setattr(self.resblock, name, nn.ModuleList(map(_as_picture, convs)))
        self.merge = None
        if misr.output_conv is not None:
            self.merge = nn.Conv2d(C, C, (N, 1), stride=(N, 1))
            self.merge.weight = _parameter(
                misr.output_conv.weight.reshape(C, N, C).transpose(1, 2)[..., None]
            )
            self.merge.bias = misr.output_conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.unsqueeze(2)
        if self.is_halved:
            rows = halves(rows, self.reach, self.num_inputs - 1)
        y = self.resblock(self.views(rows) + self.bias)
        y = self.merge(y) if self.merge else y.unflatten(2, (-1, self.num_inputs)).mean(3)
        return (whole(y, x) if self.is_halved else y).squeeze(2)


# To the exporter, operators of their own: it would reason for minutes about lengths of their parts.


@torch.library.custom_op("misrnet::halves", mutates_args=())
def halves(x: torch.Tensor, reach: int, gap: int) -> torch.Tensor:
    """[B, C, 1, T] -> [B, C, 1 + gap + 1, T']: its halves, longer by `reach`, and rows of zeros.

    T' is T where that leaves no more.
    """
    T = x.shape[3]
    length = min(T, T - T // 2 + reach)
    first = nn.functional.pad(x[..., :length], (0, 0, 0, gap))
    return torch.cat((first, x[..., T - length :]), 2)


@halves.register_fake
def _(x: torch.Tensor, reach: int, gap: int) -> torch.Tensor:
    B, C, _, _ = x.shape
    return x.new_empty(B, C, gap + 2, torch.library.get_ctx().new_dynamic_size())


@torch.library.custom_op("misrnet::whole", mutates_args=())
def whole(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The halves [B, C, 2, T'], without what they have twice, as [B, C, 1, T], T as of `like`."""
    half = like.shape[2] // 2
    return torch.cat((y[:, :, :1, :half], y[:, :, 1:, half - like.shape[2] :]), 3)


@whole.register_fake
def _(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like).unsqueeze(2)


def translations() -> dict:
    """The two operators in ONNX, for the exporter."""
    from onnxscript import opset18 as op

    def onnx_halves(x, reach: int, gap: int):
        T = op.Shape(x, start=3)
        length = op.Min(T, T - T / 2 + reach)
        first = op.Slice(x, [0], length, [3])
        second = op.Slice(x, T - length, T, [3])
        return op.Concat(op.Pad(first, [0, gap], axes=[2]), second, axis=2)

    def onnx_whole(y, like):
        T = op.Shape(like, start=2)
        first = op.Slice(op.Slice(y, [0], [1], [2]), [0], T / 2, [3])
        second = op.Slice(op.Slice(y, [1], [2], [2]), T / 2 - T, [LAST], [3])
        return op.Concat(first, second, axis=3)

    ops = torch.ops.misrnet
    return {ops.halves.default: onnx_halves, ops.whole.default: onnx_whole}


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


def with_conv2d_misr(generator: Generator) -> Generator:
    """A copy of `generator` whose MISRs run as `Conv2dMISR`s: the same samples, to rounding."""
    generator = copy.deepcopy(generator)
    for i, block in enumerate(generator.resblocks):
        if isinstance(block, MISR):
            generator.resblocks[i] = Conv2dMISR(block)
    return generator


def has_pulses(generator: Generator) -> bool:
    """True for `frame_v2` and its like, whose samples depend on all of the mel before."""
    return isinstance(generator.head, HarmonicNoiseHead)


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
            with_conv2d_misr(generator),
            (mel,),
            dynamo=True,
            dynamic_shapes={"mel": {0: "B", 2: "T"}},
            input_names=["mel"],
            output_names=["wav"],
            custom_translation_table=translations(),
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


def checked_shapes(generator: Generator) -> tuple[tuple[int, int], ...]:
    """(B, T) of the mels by which an exported generator is compared with PyTorch's."""
    return CHECKED_OF_PULSES if has_pulses(generator) else CHECKED_SHAPES


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
    allowed = LARGEST_OF_PULSES if has_pulses(generator) else LARGEST_DIFFERENCE
    if not difference <= allowed:  # NaN neither
        raise UserError(f"{a.output}: not written, for the difference is above {allowed:g}")
    if has_pulses(generator):
        difference = log_mel_difference(contents, rounded, h)
        print(f"mean difference of log-mels, of long mels too: {difference:.1e}")
        if not difference <= LARGEST_OF_LOG_MELS:
            raise UserError(f"{a.output}: not written, for that is above {LARGEST_OF_LOG_MELS:g}")
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
            install = "pip install onnx onnxscript onnxruntime"
            raise UserError(f"{missing} is missing: {install}") from None
        temporary.write_bytes(model)
    print(f"{a.output}: {len(model) / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main)
