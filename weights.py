"""Converts names and forms of weights between this repository and HiFi-GAN's family of programs.

    to_native_names(weights, module)    # from any program to names that `module` loads
    to_hifigan_names(module)            # to HiFi-GAN's names, which the whole family loads

Also reads checkpoints, and finds a generator's weights in them.
"""

import math
import os
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from env import Config, UserError

# Keys under which programs save a generator's weights.
CONTAINERS = ("generator", "state_dict", "model", "model_state_dict", "net_g", "ema")
# Prefixes of weights' names, added by the wrappers and parents of a module.
PREFIXES = ("module.", "_orig_mod.", "generator.", "model_g.", "net_g.")
MAX_NAMED_KEYS = 8  # in an error

# HiFi-GAN's files come from the old weight_norm and spectral_norm; both have a weight_v.
WEIGHT_NORM_NAMES = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
SPECTRAL_NORM_NAMES = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
# The RMS of the weight_v that is computed for a file without weight norm. HiFi-GAN's trained
# generators have about 0.1. With 0.1, the first step of AdamW at a learning rate of 0.0002 raised
# the mel error of a MISR from 0.39 to 0.90; with 0.4, to 0.44.
DIRECTION_RMS = 0.4
# y-chan/hifi-gan-misrnet stores the parts of a MISR separately.
Y_CHANS_NAMES = (
    (r"expand_convs\.(\d+)\.", r"resblocks.\1.input_conv."),
    (r"reduce_convs\.(\d+)\.", r"resblocks.\1.output_conv."),
    (r"resblocks\.(\d+)\.convs", r"resblocks.\1.resblock.convs"),
)


def is_y_chans(weights: dict[str, torch.Tensor]) -> bool:
    """Returns whether weights come from y-chan's port, whose merge is "conv"."""
    return any("expand_convs." in key for key in weights)


def to_native_names(weights: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns `weights` under the names, and in the form, that `module.load_state_dict` takes.

    The names may be those of HiFi-GAN, of y-chan's port or of this repository's earlier files, with
    prefixes. Half precision becomes float32. Weight norm is added or removed as in `module`.
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
    for key in module.state_dict():
        if key.endswith(".weight"):
            _remove_weight_norm(renamed, key)
        elif key.endswith(".original0"):
            _add_weight_norm(renamed, key)
    return renamed


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Returns half precision as float32, and float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _remove_weight_norm(weights: dict[str, torch.Tensor], key: str) -> None:
    """Replaces the gain and direction of a layer in `weights`, if there, with its weight `key`."""
    gain, direction = (f"{key[: -len('weight')]}{name}" for name in WEIGHT_NORM_NAMES.values())
    if gain in weights and direction in weights:
        v = weights.pop(direction)
        weights[key] = v * (weights.pop(gain) / torch.norm_except_dim(v, 2, 0))


def _add_weight_norm(weights: dict[str, torch.Tensor], key: str) -> None:
    """Replaces the weight of a layer in `weights`, if there, with its gain `key` and direction."""
    layer = key.partition(".parametrizations.")[0]
    if f"{layer}.weight" in weights:
        direction = f"{layer}.{WEIGHT_NORM_NAMES['weight_v']}"
        weights[key], weights[direction] = gain_and_direction(weights.pop(f"{layer}.weight"))


def gain_and_direction(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight_g and weight_v of a layer's weight.

    The length of weight_v does not change the weight. But AdamW's steps have a fixed size, so that
    the first update would change the direction of a short weight_v too much. It is scaled by a
    power of two, which is exact.
    """
    rms = float(weight.float().square().mean().sqrt())
    rms = min(1e20, max(1e-20, rms))  # NaN and infinity stay in the weight, and are reported later
    direction = weight * 2.0 ** round(math.log2(DIRECTION_RMS / rms))
    return torch.norm_except_dim(weight, 2, 0), direction


def to_hifigan_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state of `module` under HiFi-GAN's names, with weight norm."""
    pairs = (*WEIGHT_NORM_NAMES.items(), *SPECTRAL_NORM_NAMES.items())
    old_names, renamed = {new: old for old, new in pairs}, {}
    for key, value in module.state_dict().items():
        layer, _, name = key.partition(".parametrizations.")
        if name:
            renamed[f"{layer}.{old_names[f'parametrizations.{name}']}"] = value
        elif key.endswith(".weight"):  # weight norm was removed
            renamed[f"{key}_g"], renamed[f"{key}_v"] = gain_and_direction(value)
        else:
            renamed[key] = value
    return renamed


def mrf_as_misr(weights: dict[str, torch.Tensor], h: Config) -> tuple[dict[str, torch.Tensor], str]:
    """Returns the weights of an MRF generator under the names of `h`'s MISR, and a note on them.

    The shared block of a stage gets the weights of the MRF's block with the same kernel size. The
    note names these blocks. Weights of a MISR generator are returned unchanged.
    """
    blocks = {int(m[1]) for key in weights if (m := re.search(r"resblocks\.(\d+)\.convs", key))}
    if not blocks or is_y_chans(weights):
        return weights, ""
    stages = {int(m[1]) for key in weights if (m := re.search(r"ups\.(\d+)\.", key))}
    blocks_per_stage = len(blocks) // len(stages)
    renamed, taken = {k: v for k, v in weights.items() if "resblocks." not in k}, []
    for block in sorted(blocks):
        name = f"resblocks.{block}."
        part = {key: value for key, value in weights.items() if name in key}
        kernel_size = max(value.shape[-1] for value in part.values() if value.dim() == 3)
        stage = block // blocks_per_stage
        if kernel_size == h.resblock_kernel_size and stage < len(h.upsample_rates):
            shared = f"resblocks.{stage}.resblock."
            renamed |= {key.replace(name, shared): value for key, value in part.items()}
            taken.append(str(block))
    return renamed, f", the shared blocks from its resblocks {', '.join(taken) or '(none fits)'}"


# ----------------------------------------------------------------------------------------- files


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint into CPU memory. Pickled code in it is never run.

    Raises:
        UserError: missing or damaged file, or one that contains Python objects.
    """
    if os.path.isdir(path):
        newest = max((each.name for each in Path(path).glob("g_*")), default="g_00005000")
        raise UserError(f"{path}: a folder; name a file in it, such as {newest}")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other versions
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises a dozen types
        if foreign := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise UserError(
                f"{path}: holds Python objects ({foreign[1]}), which are never loaded; save the "
                "weights alone"
            ) from None
        is_archive = "PytorchStreamReader" in str(error)  # its messages are short and clear
        reason = str(error) if is_archive else _kind_of_file(path)
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: not a checkpoint; expected a dictionary, as HiFi-GAN saves")
    return contents


def _kind_of_file(path: str | Path) -> str:
    """Says what a file is that torch.load cannot read."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; run `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return "a web page; download the file itself"
    if head.startswith((b"PK", b"\x1f\x8b")):
        return "an archive of another kind; name a g_* file out of it"
    if head[8:9] == b"{":
        return "of safetensors; write it by torch.save(safetensors.torch.load_file(...), ...)"
    return "not written by PyTorch, or damaged"


def generator_weights(contents: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the generator's weights in a checkpoint, without dictionaries and prefixes.

    Raises:
        UserError: there is no generator; the message names the keys that there are.
    """
    weights = contents
    while inner := next((weights[c] for c in CONTAINERS if isinstance(weights.get(c), dict)), None):
        weights = inner
    found = {key: value for key, value in weights.items() if torch.is_tensor(value)}
    if not any("conv_pre." in key for key in found):
        keys = ", ".join(map(str, list(weights)[:MAX_NAMED_KEYS])) or "none"
        hint = f"expected conv_pre.*, also under {', '.join(CONTAINERS)}; its keys are {keys}"
        if "optim_g" in contents:
            hint = "take the g_* file beside it"
        raise UserError(f"{path}: holds no generator; {hint}")
    prefix = next(key.partition("conv_pre.")[0] for key in found if "conv_pre." in key)
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def load_weights(module: nn.Module, weights: dict, path: str | Path) -> None:
    """Loads all of `weights`, from the file `path` of any program of the family, into `module`.

    Raises:
        UserError: they do not fit; the message names the first difference.
    """
    try:
        module.load_state_dict(to_native_names(weights, module))
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = (str(error).splitlines()[1:] or [str(error)])[0].strip()
        first, *others = detail.split('", "')
        detail = f'{first}" and {len(others)} more' if others else first
        raise UserError(f"{path}: does not fit the config: {detail}") from None


def load_matching(module: nn.Module, weights: dict) -> tuple[list[str], list[str]]:
    """Loads those layers of `weights` of which all tensors match `module` in name and shape.

    Returns:
        The names of the loaded layers, and the names of all other layers of both.
    """
    own = module.state_dict()
    layers = {
        key: re.sub(r"\.(bias|weight|parametrizations\..*)$", "", key) for key in own | weights
    }
    others = {
        layer
        for key, layer in layers.items()
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    }
    module.load_state_dict(own | {k: v for k, v in weights.items() if layers[k] not in others})
    return sorted(set(layers.values()) - others), sorted(others)
