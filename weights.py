"""The names of weights, in the files of the whole family: HiFi-GAN's, y-chan's, and wrapped ones.

to_native_names(weights, module)    # whoever wrote them, as module.load_state_dict takes them
to_hifigan_names(module)          # as HiFi-GAN's scripts, and every tool of the family, load them
"""

import math
import os
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from env import Config, UserError

CONTAINERS = ("generator", "state_dict", "model")  # that a generator's weights are kept in

# HiFi-GAN's files have those of the old weight_norm and spectral_norm, whose weight_v differ.
WEIGHT_NORM_NAMES = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
# Of weight_v, where a file has none. HiFi-GAN's trained generators have about 0.1, from which a
# first step of AdamW at 0.0002 took the mel error of a MISR from 0.39 to 0.90; from 0.4, to 0.44.
DIRECTION_RMS = 0.4
SPECTRAL_NORM_NAMES = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
# What wraps a module, or holds it, puts its own name before those of the weights.
PREFIXES = ("module.", "_orig_mod.", "generator.", "model_g.")
# y-chan/hifi-gan-misrnet keeps MISR's parts apart.
Y_CHANS_NAMES = (
    (r"expand_convs\.(\d+)\.", r"resblocks.\1.input_conv."),
    (r"reduce_convs\.(\d+)\.", r"resblocks.\1.output_conv."),
    (r"resblocks\.(\d+)\.convs", r"resblocks.\1.resblock.convs"),
)


def is_y_chans(weights: dict[str, torch.Tensor]) -> bool:
    """True for weights of y-chan's port, which merges by `conv`."""
    return any("expand_convs." in key for key in weights)


def to_native_names(weights: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """`weights` as `module.load_state_dict` takes them.

    They may have the names of HiFi-GAN, of y-chan's port or of this repository's earlier files, be
    wrapped, in half precision, and with weight norm or without: each layer gets the form that it
    has in `module`.
    """
    weights = {key: at_least_fp32(value) for key, value in weights.items()}
    while prefix := next((p for p in PREFIXES if any(k.startswith(p) for k in weights)), None):
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if is_y_chans(weights):
        for pattern, name in Y_CHANS_NAMES:
            weights = {re.sub(f"^{pattern}", name, key): value for key, value in weights.items()}
    renamed = {}
    for key, value in weights.items():
        layer, _, name = key.rpartition(".")
        is_spectral = f"{layer}.weight_orig" in weights
        names = SPECTRAL_NORM_NAMES if is_spectral else WEIGHT_NORM_NAMES
        renamed[f"{layer}.{names.get(name, name)}"] = value
    own = module.state_dict()
    for key in list(own):
        if key.endswith(".weight"):
            _fold(renamed, key)
        else:
            _unfold(renamed, key)
    return renamed


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fold(weights: dict[str, torch.Tensor], key: str) -> None:
    """Makes the weight `key` of a layer's gain and direction, where `weights` holds those."""
    gain, direction = (f"{key[: -len('weight')]}{name}" for name in WEIGHT_NORM_NAMES.values())
    if gain in weights and direction in weights:
        v = weights.pop(direction)
        weights[key] = v * (weights.pop(gain) / torch.norm_except_dim(v, 2, 0))


def _unfold(weights: dict[str, torch.Tensor], key: str) -> None:
    """Makes the gain `key`, and the direction, of a layer's weight, where `weights` holds that."""
    layer, name = key.partition(".parametrizations.")[0], key.rpartition(".")[2]
    weight = weights.get(f"{layer}.weight")
    if name == "original0" and weight is not None:
        direction = f"{layer}.{WEIGHT_NORM_NAMES['weight_v']}"
        weights[key], weights[direction] = gain_and_direction(weights.pop(f"{layer}.weight"))


def gain_and_direction(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight_g and weight_v of a layer's weight.

    Any length of weight_v gives the same weight, but AdamW's steps are of one size, so that in a
    short one they are long: a first update could undo what was learnt. A power of two is exact.
    """
    rms = float(weight.float().square().mean().sqrt())
    rms = min(1e20, max(1e-20, rms))  # what is not finite stays so, and is named where it is used
    direction = weight * 2.0 ** round(math.log2(DIRECTION_RMS / rms))
    return torch.norm_except_dim(weight, 2, 0), direction


def to_hifigan_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of `module` under HiFi-GAN's names, with weight norm, for every tool to load."""
    pairs = (*WEIGHT_NORM_NAMES.items(), *SPECTRAL_NORM_NAMES.items())
    old_names, named = {new: old for old, new in pairs}, {}
    for key, value in module.state_dict().items():
        layer, _, name = key.partition(".parametrizations.")
        if name:
            named[f"{layer}.{old_names[f'parametrizations.{name}']}"] = value
        elif key.endswith(".weight"):  # weight norm was removed
            named[f"{key}_g"], named[f"{key}_v"] = gain_and_direction(value)
        else:
            named[key] = value
    return named


def mrf_as_misr(weights: dict[str, torch.Tensor], h: Config) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of an MRF generator under the names of `h`'s MISR, and a note of what was taken.

    The shared block of a stage is the one of the MRF's blocks whose kernels have its size. Weights
    of a MISR generator are given back as they are.
    """
    blocks = {int(m[1]) for key in weights if (m := re.search(r"resblocks\.(\d+)\.convs", key))}
    if not blocks or is_y_chans(weights):
        return weights, ""
    stages = {int(m[1]) for key in weights if (m := re.search(r"ups\.(\d+)\.", key))}
    count = len(blocks) // len(stages)  # of a stage
    renamed, taken = {k: v for k, v in weights.items() if "resblocks." not in k}, []
    for block in sorted(blocks):
        name = f"resblocks.{block}."
        part = {key: value for key, value in weights.items() if name in key}
        kernel_size = max(value.shape[-1] for value in part.values() if value.dim() == 3)
        stage = block // count
        if kernel_size == h.resblock_kernel_size and stage < len(h.upsample_rates):
            shared = f"resblocks.{stage}.resblock."
            renamed |= {key.replace(name, shared): value for key, value in part.items()}
            taken.append(str(block))
    return renamed, f", the shared blocks from its resblocks {', '.join(taken) or '(none fits)'}"


# ------------------------------------------------------------------------------------------- files


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint into CPU memory; pickled code in it is never run.

    Raises:
        UserError: missing or damaged file, or one that holds Python objects.
    """
    if os.path.isdir(path):
        newest = max((each.name for each in Path(path).glob("g_*")), default="g_00005000")
        raise UserError(f"{path}: a folder; name a file in it, such as {newest}")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other versions, which load or do not
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in a dozen ways
        if foreign := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise UserError(
                f"{path}: holds Python objects ({foreign[1]}), which are never loaded; save the "
                "weights alone"
            ) from None
        is_archive = "PytorchStreamReader" in str(error)  # whose words are few and to the point
        reason = str(error) if is_archive else "not written by PyTorch, or damaged"
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: not a checkpoint of this family, which hold a dictionary")
    return contents


def generator_weights(contents: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """The generator's weights in a checkpoint of this family: alone, or in the usual containers.

    Raises:
        UserError: there are none.
    """
    weights = contents
    while inner := next((weights[c] for c in CONTAINERS if isinstance(weights.get(c), dict)), None):
        weights = inner
    weights = {key: value for key, value in weights.items() if torch.is_tensor(value)}
    if not any("conv_pre." in key for key in weights):
        hint = "; take the g_* file beside it" if "optim_g" in contents else ""
        raise UserError(f"{path}: holds no generator{hint}")
    return weights


def load_weights(module: nn.Module, weights: dict, path: str | Path) -> None:
    """Gives `module` all of `weights`, whoever wrote them to `path`.

    Raises:
        UserError: they are not this module's; the message names the first difference.
    """
    try:
        module.load_state_dict(to_native_names(weights, module))
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = (str(error).splitlines()[1:] or [str(error)])[0].strip()
        raise UserError(f"{path}: does not fit the config: {detail}") from None


def load_matching(module: nn.Module, weights: dict) -> tuple[list[str], list[str]]:
    """Gives `module` the layers of `weights` all of whose tensors match in name and shape.

    Returns:
        The names of the layers taken, and of all others of either side.
    """
    own = module.state_dict()
    layers = {
        key: re.sub(r"\.(bias|weight|parametrizations\..*)$", "", key) for key in own | weights
    }
    left = {
        layer
        for key, layer in layers.items()
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    }
    module.load_state_dict(own | {k: v for k, v in weights.items() if layers[k] not in left})
    return sorted(set(layers.values()) - left), sorted(left)
