"""What a run stands on: its configuration, its device, its seed and its processes.

    h = load_config("config_v1.json")        # a frozen, checked Config, called h everywhere

HiFi-GAN's and y-chan's JSON files load as they are.
"""

import difflib
import json
import math
import sys
import types
import typing
from collections import Counter
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

# HiFi-GAN's files hold these; nothing here needs them.
IGNORED_KEYS = {"num_gpus", "num_freq", "dist_config"}

POSITIVE_KEYS = (
    *("upsample_initial_channel", "discriminator_channel_mult", "batch_size", "learning_rate"),
    *("segment_size", "num_mels", "n_fft", "hop_size", "win_size", "sampling_rate"),
)
LIST_KEYS = (
    *("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes"),
    *("resblock_dilation_sizes", "n_ffts_for_loss", "num_mels_for_loss"),
)

# Far above what anyone trains, and low enough that a slip of the keyboard does not fill the memory.
LARGEST = {
    "upsample_initial_channel": 2**14,
    "resblock_num": 2**8,
    "resblock_kernel_size": 2**10,
    "gen_istft_n_fft": 2**12,
    "discriminator_channel_mult": 2**6,
    "segment_size": 2**24,
    "num_mels": 2**10,
    "n_fft": 2**16,
    "sampling_rate": 2**20,
    "batch_size": 2**16,
    "num_workers": 2**10,
}
LARGEST_ITEM, LONGEST_LIST = 2**16, 16
SMALLEST_SEGMENT = 6  # samples; of fewer, MPD's period of 11 has too little to reflect

LONGEST_LINE = 1500  # characters of an error


class UserError(Exception):
    """An error that the user can mend: one line that says what, where and what to do."""

    exit_status = 1

    def __str__(self) -> str:
        # An error from a data worker arrives with the worker's traceback before it.
        return one_line(super().__str__().rsplit("\nenv.UserError: ", 1)[-1])


class UsageError(UserError):
    """A UserError in the command line or the config."""

    exit_status = 2


def one_line(text: object) -> str:
    """`text` as one line that is safe to print, whatever names of files it holds.

    What no terminal should be given, as escape sequences and bytes that are no UTF-8, is shown as
    Python writes it; of what is very long, the middle is left out.
    """
    text = " ".join(line.strip() for line in str(text).expandtabs(1).splitlines())
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE * 2 // 3]} ... {text[-LONGEST_LINE // 3 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One model and the way it is trained, under HiFi-GAN's names.

    `resblock_num` and `resblock_kernel_size` with flat dilations select MISR;
    `resblock_kernel_sizes` with nested dilations select HiFi-GAN's MRF.

    Raises UsageError where an invariant is broken.
    """

    # Generator
    resblock: str  # "1" or "2"
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    upsample_initial_channel: int
    resblock_dilation_sizes: tuple[int, ...] | tuple[tuple[int, ...], ...]
    resblock_num: int | None = None  # MISR: the number N of input convolutions
    resblock_kernel_size: int | None = None  # MISR: of the one shared block
    misr_merge: str = "mean"  # MISR: "mean" or "conv"
    resblock_kernel_sizes: tuple[int, ...] | None = None  # MRF: one for each block
    gen_istft_n_fft: int | None = None  # iSTFT head: bins and
    gen_istft_hop_size: int | None = None  # rate of its inverse STFT, in samples

    # Discriminators and losses
    discriminator_channel_mult: float = 1.0
    lambda_mel: float = 45.0
    lambda_feature: float = 2.0
    n_ffts_for_loss: tuple[int, ...] | None = None  # a mel loss of several resolutions; None: h's
    num_mels_for_loss: tuple[int, ...] | None = None  # one for each

    # Audio; sizes in samples, frequencies in Hz
    segment_size: int
    num_mels: int
    n_fft: int
    hop_size: int
    win_size: int
    sampling_rate: int
    fmin: float
    fmax: float | None  # None: half of sampling_rate
    fmax_for_loss: float | None

    # Training
    batch_size: int  # of all processes together
    learning_rate: float
    adam_b1: float
    adam_b2: float
    lr_decay: float  # each epoch
    seed: int
    num_workers: int  # of each process

    def __post_init__(self):
        for key, holds, expected in _invariants(self):
            if not holds:
                value = json.dumps(getattr(self, key))
                raise UsageError(f"{key} = {value}: expected {expected}")

    @property
    def uses_misr(self) -> bool:
        """True for MISR, False for HiFi-GAN's MRF."""
        return self.resblock_kernel_sizes is None

    @property
    def uses_istft(self) -> bool:
        """True where an inverse STFT makes the last samples, as in iSTFTNet."""
        return self.gen_istft_n_fft is not None


def load_config(path: str | Path) -> Config:
    """Reads a JSON config of this repository, of HiFi-GAN or of y-chan's port.

    Raises:
        UsageError: unreadable file, unknown or missing key, wrong type or broken invariant; the
            message names the file, the key, the value and what was expected.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_without_twins)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a readable JSON config ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object of keys and values")
    values = {key: value for key, value in values.items() if key not in IGNORED_KEYS}
    try:
        h = Config(**_typed(values))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return h


def _without_twins(pairs: list[tuple]) -> dict:
    """A JSON object; json itself would take the last of two values in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"given twice: {', '.join(twice)}")
    return values


def _typed(values: dict) -> dict:
    """JSON `values` as Config's field types; names the first key that is unknown or amiss."""
    known = {field.name: field for field in fields(Config)}
    kinds = typing.get_type_hints(Config)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"{key} = {json.dumps(values[key])}: unknown key{hint}")
    for key, field in known.items():
        if key not in values and field.default is MISSING:
            raise UsageError(f"{key} is missing: expected {_kind_name(kinds[key])}")
    typed = {}
    for key, value in values.items():
        try:
            typed[key] = _convert(value, kinds[key])
        except TypeError:
            expected = _kind_name(kinds[key])
            raise UsageError(f"{key} = {json.dumps(value)}: expected {expected}") from None
    return typed


def _convert(value, kind):
    """The JSON `value` as `kind`; raises TypeError where it is none."""
    if isinstance(kind, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _convert(value, option)
            except TypeError:
                pass
    elif typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(item, typing.get_args(kind)[0]) for item in value)
    elif kind is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # NaN is not
            return float(value)
    elif kind is int:
        if type(value) is int and abs(value) < 2**63:
            return value
    elif type(value) is kind:
        return value
    raise TypeError


def _kind_name(kind) -> str:
    """`kind` in the words of a JSON file."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_kind_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_kind_name(typing.get_args(kind)[0])}"
    names = {int: "an integer", float: "a number", str: "a string", types.NoneType: "null"}
    return names[kind]


def _invariants(h: Config):
    """Yields (key, holds, expected); each check may rely on those before it."""
    for key in POSITIVE_KEYS:
        yield key, getattr(h, key) > 0, "more than 0"
    for key in ("lambda_mel", "lambda_feature", "num_workers"):
        yield key, getattr(h, key) >= 0, "0 or more"
    for key, largest in LARGEST.items():
        yield key, (getattr(h, key) or 0) <= largest, f"at most {largest}"
    for key in LIST_KEYS:
        expected = f"at most {LONGEST_LIST} items of at most {LARGEST_ITEM} each"
        yield key, _is_small(getattr(h, key)), expected
    for key in ("adam_b1", "adam_b2"):
        yield key, 0 <= getattr(h, key) < 1, "0 or more and less than 1"
    yield "lr_decay", 0 < h.lr_decay <= 1, "more than 0 and at most 1"
    yield "seed", 0 <= h.seed < 2**63, "0 or more and less than 2^63"
    yield from _audio_invariants(h)
    yield from _upsampling_invariants(h)
    yield from _misr_invariants(h) if h.uses_misr else _mrf_invariants(h)


def _audio_invariants(h: Config):
    nyquist = h.sampling_rate / 2
    yield "win_size", h.win_size <= h.n_fft, f"at most n_fft, {h.n_fft}"
    padding = h.n_fft - h.hop_size
    yield "n_fft", padding >= 0 and padding % 2 == 0, f"hop_size, {h.hop_size}, plus an even number"
    yield (
        "segment_size",
        h.segment_size % h.hop_size == 0,
        f"a multiple of hop_size, {h.hop_size}",
    )
    yield "segment_size", h.segment_size >= SMALLEST_SEGMENT, f"at least {SMALLEST_SEGMENT}"
    yield "fmin", 0 <= h.fmin < nyquist, f"0 or more and less than sampling_rate / 2, {nyquist:g}"
    for key in ("fmax", "fmax_for_loss"):
        fmax = getattr(h, key)
        expected = f"null or more than fmin, {h.fmin:g}, and at most sampling_rate / 2, {nyquist:g}"
        yield key, fmax is None or h.fmin < fmax <= nyquist, expected
    yield from _loss_invariants(h)


def _loss_invariants(h: Config):
    n_ffts, num_mels = h.n_ffts_for_loss or (), h.num_mels_for_loss or ()
    expected = "null or a list of one or more multiples of 8, at least 64 each"
    fits = h.n_ffts_for_loss is None or (n_ffts and all(n >= 64 and n % 8 == 0 for n in n_ffts))
    yield "n_ffts_for_loss", fits, expected
    expected = f"one number of bands for each of the {len(n_ffts)} n_ffts_for_loss"
    yield "num_mels_for_loss", len(num_mels) == len(n_ffts), expected
    expected = "positive numbers, each at most a quarter of its n_fft"
    fits = all(0 < m <= n // 4 for m, n in zip(num_mels, n_ffts, strict=True))
    yield "num_mels_for_loss", fits, expected


def _upsampling_invariants(h: Config):
    rates, kernels = h.upsample_rates, h.upsample_kernel_sizes
    yield "upsample_rates", rates and min(rates) > 0, "a list of one or more positive rates"
    yield from _istft_invariants(h)
    product = math.prod(rates) * (h.gen_istft_hop_size or 1)
    times = ", times gen_istft_hop_size," if h.uses_istft else ""
    expected = f"rates whose product{times} ({product} here) is hop_size, {h.hop_size}"
    yield "upsample_rates", product == h.hop_size, expected
    expected = f"one kernel size for each of the {len(rates)} upsample_rates"
    yield "upsample_kernel_sizes", len(kernels) == len(rates), expected
    gaps = [kernel - rate for kernel, rate in zip(kernels, rates, strict=True)]
    expected = f"each its rate of {json.dumps(rates)} plus 0 or an even number"
    yield "upsample_kernel_sizes", all(gap >= 0 and gap % 2 == 0 for gap in gaps), expected
    last = h.upsample_initial_channel >> len(rates)
    expected = f"at least {2 ** len(rates)}: it is halved in each of {len(rates)} stages"
    yield "upsample_initial_channel", last > 0, expected
    yield "resblock", h.resblock in ("1", "2"), '"1" or "2"'


def _istft_invariants(h: Config):
    n_fft, hop_size = h.gen_istft_n_fft, h.gen_istft_hop_size
    missing = "gen_istft_n_fft" if n_fft is None else "gen_istft_hop_size"
    both = "both gen_istft_n_fft and gen_istft_hop_size, or neither"
    yield missing, (n_fft is None) == (hop_size is None), both
    if h.uses_istft:
        yield "gen_istft_n_fft", n_fft > 0 and n_fft % 2 == 0, "a positive even number"
        expected = (
            f"1 to half of gen_istft_n_fft, {n_fft // 2}, and less than hop_size, {h.hop_size}"
        )
        holds = 0 < hop_size <= n_fft // 2 and hop_size < h.hop_size
        yield "gen_istft_hop_size", holds, expected


def _misr_invariants(h: Config):
    kernel, dilations = h.resblock_kernel_size, h.resblock_dilation_sizes
    fusion = "one or more for MISR (MRF has resblock_kernel_sizes instead)"
    yield "resblock_num", h.resblock_num is not None and h.resblock_num > 0, fusion
    yield "resblock_kernel_size", kernel is not None and _is_odd(kernel), "an odd size for MISR"
    yield (
        "resblock_dilation_sizes",
        _are_dilations(dilations),
        "a flat list of positive dilations for MISR",
    )
    yield "misr_merge", h.misr_merge in ("mean", "conv"), '"mean" or "conv"'


def _mrf_invariants(h: Config):
    kernels, dilations = h.resblock_kernel_sizes, h.resblock_dilation_sizes
    for key in ("resblock_num", "resblock_kernel_size"):
        yield key, getattr(h, key) is None, "no such key beside resblock_kernel_sizes (MRF)"
    yield (
        "resblock_kernel_sizes",
        len(kernels) > 0 and all(_is_odd(kernel) for kernel in kernels),
        "one or more odd sizes",
    )
    yield (
        "resblock_dilation_sizes",
        len(dilations) == len(kernels)
        and all(isinstance(each, tuple) and _are_dilations(each) for each in dilations),
        f"a list of positive dilations for each of the {len(kernels)} resblock_kernel_sizes",
    )


def _is_small(value: int | tuple | None) -> bool:
    """True for lists, of lists perhaps, that are short and hold no giant; and for None."""
    if isinstance(value, tuple):
        return len(value) <= LONGEST_LIST and all(map(_is_small, value))
    return (value or 0) <= LARGEST_ITEM


def _is_odd(size: int) -> bool:
    return size > 0 and size % 2 == 1


def _are_dilations(values: tuple) -> bool:
    return len(values) > 0 and all(isinstance(value, int) and value > 0 for value in values)
