"""What a run stands on: its configuration, and the errors that a user can mend.

    h = load_config("config_v1.json")        # a frozen, checked Config, called h everywhere

HiFi-GAN's and y-chan's JSON files load as they are.
"""

import difflib
import json
import math
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

# HiFi-GAN's files hold these; nothing here needs them.
IGNORED_KEYS = {"num_gpus", "num_freq", "dist_config"}

POSITIVE_KEYS = (
    *("upsample_initial_channel", "discriminator_channel_mult", "batch_size", "learning_rate"),
    *("segment_size", "num_mels", "n_fft", "hop_size", "win_size", "sampling_rate"),
    "refiner_channels",
)
SMALLEST_SEGMENT = 6  # samples; of fewer, MPD's period of 11 has too little to reflect

LONGEST_LINE = 1500  # characters of an error


class UserError(Exception):
    """An error that the user can mend: one line that says what, where and what to do."""

    exit_status = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


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
    griffin_lim_steps: int | None = None  # a generator at the mel's own rate: steps of its iSTFT
    lookahead_frames: int | None = None  # frame rate: frames that it looks ahead; None: symmetric
    refiner_channels: int = 32  # of its refiner, whose units are as `resblock` says

    # Discriminators and losses
    discriminator_channel_mult: float = 1.0
    lambda_mel: float = 45.0
    lambda_feature: float = 2.0
    lambda_f0: float = 100.0
    lambda_aperiodicity: float = 100.0
    discriminator_train_start_steps: int | None = (
        0  # the update at which discriminators come in; None: none do
    )
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
    optimizer: str = "adamw"  # of the generator: "adamw" or "muon"
    batch_size: int  # of all processes together
    learning_rate: float
    adam_b1: float
    adam_b2: float
    lr_decay: float  # each epoch
    seed: int
    num_workers: int  # of each process

    def __post_init__(self):
        for holds, key, expected in _checks(self):
            if not holds:
                value = json.dumps(getattr(self, key))
                raise UsageError(f"{key} = {value}: expected {expected}")

    @property
    def uses_misr(self) -> bool:
        """True for MISR, False for HiFi-GAN's MRF."""
        return self.resblock_kernel_sizes is None

    @property
    def uses_discriminators(self) -> bool:
        """True where the generator learns against discriminators, at once or later."""
        return self.discriminator_train_start_steps is not None

    @property
    def is_frame_rate(self) -> bool:
        """True for a generator at the mel's own rate, whose iSTFT is the mel's STFT inverted."""
        return self.griffin_lim_steps is not None

    @property
    def uses_istft(self) -> bool:
        """True where an inverse STFT makes the last samples, as in iSTFTNet."""
        return self.gen_istft_n_fft is not None


def load_config(path: str | Path, say: Callable[[str], object] | None = None) -> Config:
    """Reads a JSON config of this repository, of HiFi-GAN or of y-chan's port.

    `say` is called with a line for the user where a MISR config does not say its `misr_merge`.

    Raises:
        UsageError: unreadable file, unknown or missing key, wrong type or broken invariant; the
            message names the file, the key, the value and what was expected.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_without_twins)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config; there is config_v1.json, for instance") from None
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
    if say and h.uses_misr and "misr_merge" not in values:
        say(f'{path}: no misr_merge, so "mean"; y-chan\'s port merges by "conv"')
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
            raise UsageError(f"{key} is missing: expected {KINDS[kinds[key]][0]}")
    for key, value in values.items():
        expected, is_such = KINDS[kinds[key]]
        if not is_such(value):
            raise UsageError(f"{key} = {json.dumps(value)}: expected {expected}")
    return {key: _frozen(value, kinds[key]) for key, value in values.items()}


def _frozen(value, kind):
    """Lists as tuples, at any depth; an integer for a number as a float."""
    if isinstance(value, list):
        return tuple(_frozen(item, None) for item in value)
    return float(value) if kind in (float, float | None) and value is not None else value


def _is_int(value) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN is not


def _is_list(value) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_list_of_lists(value) -> bool:
    return isinstance(value, list) and all(map(_is_list, value))


# The types of Config's fields: in the words of a JSON file, and whether a JSON value is such.
KINDS = {
    str: ("a string", lambda value: isinstance(value, str)),
    int: ("an integer", _is_int),
    int | None: ("an integer or null", lambda value: value is None or _is_int(value)),
    float: ("a number", _is_number),
    float | None: ("a number or null", lambda value: value is None or _is_number(value)),
    tuple[int, ...]: ("a list, each an integer", _is_list),
    tuple[int, ...] | None: (
        "a list, each an integer, or null",
        lambda value: value is None or _is_list(value),
    ),
    tuple[int, ...] | tuple[tuple[int, ...], ...]: (
        "a list, each an integer, or a list of such lists",
        lambda value: _is_list(value) or _is_list_of_lists(value),
    ),
}


def _are_odd(sizes: tuple[int, ...]) -> bool:
    return len(sizes) > 0 and all(size > 0 and size % 2 == 1 for size in sizes)


def _are_dilations(values: tuple) -> bool:
    return len(values) > 0 and all(isinstance(value, int) and value > 0 for value in values)


def _checks(h: Config) -> Iterator[tuple[bool, str, str]]:
    """(whether it holds, the key, what was expected), each relying on those before it."""
    for key in POSITIVE_KEYS:
        yield getattr(h, key) > 0, key, "more than 0"
    for key in ("lambda_mel", "lambda_feature", "num_workers", "seed"):
        yield getattr(h, key) >= 0, key, "0 or more"
    yield (
        (h.discriminator_train_start_steps or 0) >= 0,
        "discriminator_train_start_steps",
        "0 or more, or null",
    )
    for key in ("adam_b1", "adam_b2"):
        yield 0 <= getattr(h, key) < 1, key, "0 or more and less than 1"
    yield 0 < h.lr_decay <= 1, "lr_decay", "more than 0 and at most 1"
    yield h.optimizer in ("adamw", "muon"), "optimizer", '"adamw" or "muon"'
    yield h.win_size <= h.n_fft, "win_size", f"at most n_fft, {h.n_fft}"
    overlap = h.n_fft - h.hop_size
    expected = f"hop_size, {h.hop_size}, plus an even number"
    yield overlap >= 0 and overlap % 2 == 0, "n_fft", expected
    expected = f"a multiple of hop_size, {h.hop_size}"
    yield h.segment_size % h.hop_size == 0, "segment_size", expected
    yield h.segment_size >= SMALLEST_SEGMENT, "segment_size", f"at least {SMALLEST_SEGMENT}"
    nyquist = h.sampling_rate / 2
    expected = f"0 or more and less than sampling_rate / 2, {nyquist:g}"
    yield 0 <= h.fmin < nyquist, "fmin", expected
    expected = f"null or more than fmin, {h.fmin:g}, and at most sampling_rate / 2, {nyquist:g}"
    for key in ("fmax", "fmax_for_loss"):
        fmax = getattr(h, key)
        yield fmax is None or h.fmin < fmax <= nyquist, key, expected
    yield h.num_mels <= h.n_fft, "num_mels", f"at most n_fft, {h.n_fft}"
    for fmax in (h.fmax, h.fmax_for_loss):
        empty = _empty_bands(h, h.num_mels, h.n_fft, fmax)
        expected = f"fewer, or n_fft above {h.n_fft}, where {empty} bands hold no bin of the STFT"
        yield empty == 0, "num_mels", expected
    n_ffts, bands = h.n_ffts_for_loss or (), h.num_mels_for_loss or ()
    expected = "null or a list of one or more multiples of 8, at least 64 each"
    yield all(n >= 64 and n % 8 == 0 for n in n_ffts), "n_ffts_for_loss", expected
    yield h.n_ffts_for_loss != (), "n_ffts_for_loss", expected
    expected = f"one number of bands for each of the {len(n_ffts)} n_ffts_for_loss"
    yield len(bands) == len(n_ffts), "num_mels_for_loss", expected
    expected = "positive numbers, each at most a quarter of its n_fft"
    fits = all(0 < m <= n // 4 for m, n in zip(bands, n_ffts, strict=True))
    yield fits, "num_mels_for_loss", expected
    for num_mels, n_fft in zip(bands, n_ffts, strict=True):
        empty = _empty_bands(h, num_mels, n_fft, h.fmax_for_loss)
        expected = f"fewer than {num_mels} for n_fft {n_fft}, where {empty} bands hold no bin"
        yield empty == 0, "num_mels_for_loss", expected
    yield from _generator_checks(h)


def _empty_bands(h: Config, num_mels: int, n_fft: int, fmax: float | None) -> int:
    """How many of a mel's bands lie between two bins of the STFT, and would always be silent."""
    top = h.sampling_rate / 2 if fmax is None else fmax
    edges = [hz * n_fft / h.sampling_rate for hz in band_edges(num_mels, h.fmin, top)]
    return sum(math.floor(a) + 1 >= b for a, b in zip(edges, edges[2:], strict=False))


def band_edges(num_mels: int, fmin: float, fmax: float) -> list[float]:
    """Hz between which the bands of a mel lie: of band i the ends are [i] and [i + 2]."""
    low, high = _mel_of_hz(fmin), _mel_of_hz(fmax)
    return [_hz_of_mel(low + (high - low) * i / (num_mels + 1)) for i in range(num_mels + 2)]


def _mel_of_hz(hz: float) -> float:
    """Slaney's mel scale: linear up to 1 kHz, then logarithmic."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def _hz_of_mel(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)


def _generator_checks(h: Config) -> Iterator[tuple[bool, str, str]]:
    """As _checks, of the generator's shape."""
    rates, kernels = h.upsample_rates, h.upsample_kernel_sizes
    yield min(rates, default=0) > 0, "upsample_rates", "a list of one or more positive rates"
    n_fft, hop_size = h.gen_istft_n_fft, h.gen_istft_hop_size
    expected = "both gen_istft_n_fft and gen_istft_hop_size, or neither"
    yield n_fft is not None or hop_size is None, "gen_istft_n_fft", expected
    yield hop_size is not None or n_fft is None, "gen_istft_hop_size", expected
    if h.uses_istft:
        yield n_fft > 0 and n_fft % 2 == 0, "gen_istft_n_fft", "a positive even number"
        holds = 0 < hop_size <= n_fft // 2 and hop_size < h.hop_size
        expected = f"1 to half of gen_istft_n_fft, {n_fft // 2}, and less than {h.hop_size}"
        yield holds, "gen_istft_hop_size", expected
    if h.is_frame_rate:
        yield h.griffin_lim_steps >= 0, "griffin_lim_steps", "0 or more"
        yield not h.uses_istft, "griffin_lim_steps", "no such key beside gen_istft_n_fft"
        expected = "rates of 1 beside griffin_lim_steps, one for each block"
        yield max(rates) == 1, "upsample_rates", expected
    else:
        product = math.prod(rates) * (hop_size or 1)
        times = ", times gen_istft_hop_size," if h.uses_istft else ""
        expected = f"rates whose product{times} ({product} here) is hop_size, {h.hop_size}"
        yield product == h.hop_size, "upsample_rates", expected
    expected = f"one kernel size for each of the {len(rates)} upsample_rates"
    yield len(kernels) == len(rates), "upsample_kernel_sizes", expected
    gaps = [kernel - rate for kernel, rate in zip(kernels, rates, strict=True)]
    expected = f"each its rate of {json.dumps(rates)} plus 0 or an even number"
    yield all(gap >= 0 and gap % 2 == 0 for gap in gaps), "upsample_kernel_sizes", expected
    expected = f"at least {2 ** len(rates)}: it is halved in each of {len(rates)} stages"
    holds = h.is_frame_rate or h.upsample_initial_channel >= 2 ** len(rates)
    yield holds, "upsample_initial_channel", expected
    yield h.resblock in ("1", "2"), "resblock", '"1" or "2"'
    yield from _misr_checks(h) if h.uses_misr else _mrf_checks(h)


def _misr_checks(h: Config) -> Iterator[tuple[bool, str, str]]:
    expected = "one or more for MISR (MRF has resblock_kernel_sizes instead)"
    yield (h.resblock_num or 0) > 0, "resblock_num", expected
    yield _are_odd((h.resblock_kernel_size or 0,)), "resblock_kernel_size", "an odd size for MISR"
    expected = "a flat list of positive dilations for MISR"
    yield _are_dilations(h.resblock_dilation_sizes), "resblock_dilation_sizes", expected
    yield h.misr_merge in ("mean", "conv"), "misr_merge", '"mean" or "conv"'


def _mrf_checks(h: Config) -> Iterator[tuple[bool, str, str]]:
    kernels, dilations = h.resblock_kernel_sizes, h.resblock_dilation_sizes
    for key in ("resblock_num", "resblock_kernel_size"):
        expected = "no such key beside resblock_kernel_sizes (MRF)"
        yield getattr(h, key) is None, key, expected
    yield _are_odd(kernels), "resblock_kernel_sizes", "one or more odd sizes"
    holds = len(dilations) == len(kernels) and all(
        isinstance(each, tuple) and _are_dilations(each) for each in dilations
    )
    expected = f"a list of positive dilations for each of the {len(kernels)} resblock_kernel_sizes"
    yield holds, "resblock_dilation_sizes", expected
