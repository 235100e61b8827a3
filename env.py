"""The configuration of a run, and the errors that a user can fix.

    h = load_config("config_v1.json")    # a frozen, checked Config, called h everywhere

JSON files of HiFi-GAN, of y-chan's port and of iSTFTNet's ports load as they are.
"""

import difflib
import json
import math
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

IGNORED_KEYS = {"num_gpus", "num_freq", "dist_config"}  # of HiFi-GAN's files; not used here
MIN_SEGMENT = 6  # samples; MPD's period of 11 cannot reflect-pad fewer
MAX_LOOKAHEAD = 7  # frames
MAX_MESSAGE = 1500  # characters of an error


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where and what to do."""

    exit_status = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(UserError):
    """A UserError in the command line or the config."""

    exit_status = 2


def one_line(text: object) -> str:
    """Returns `text` as one printable line, whatever file names it contains.

    Control characters, and bytes that are not UTF-8, are escaped as in Python. The middle of a very
    long text is left out.
    """
    text = " ".join(line.strip() for line in str(text).expandtabs(1).splitlines())
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE * 2 // 3]} ... {text[-MAX_MESSAGE // 3 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One model and its training, under HiFi-GAN's names.

    `resblock_num`, `resblock_kernel_size` and flat dilations select MISR. `resblock_kernel_sizes`
    and nested dilations select HiFi-GAN's MRF.

    Raises:
        UsageError: a value contradicts the others or is out of range.
    """

    # Generator
    resblock: str  # "1" or "2"
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    upsample_initial_channel: int
    resblock_dilation_sizes: tuple[int, ...] | tuple[tuple[int, ...], ...]
    resblock_num: int | None = None  # MISR: the number N of input convolutions
    resblock_kernel_size: int | None = None  # MISR: of the shared block
    misr_merge: str = "mean"  # MISR: "mean" or "conv"
    resblock_kernel_sizes: tuple[int, ...] | None = None  # MRF: one per block
    gen_istft_n_fft: int | None = None  # iSTFT head, in samples
    gen_istft_hop_size: int | None = None  # iSTFT head, in samples
    griffin_lim_steps: int | None = None  # frame-rate generators only
    lookahead_frames: int | None = None  # frame rate: 1 to 7; None: symmetric convolutions
    refiner_channels: int = 32  # frame rate

    # Discriminators and losses
    discriminator_channel_mult: float = 1.0
    lambda_mel: float = 45.0
    lambda_feature: float = 2.0
    lambda_f0: float = 100.0  # frame rate
    lambda_aperiodicity: float = 100.0  # frame rate
    discriminator_train_start_steps: int | None = 0  # None: no discriminators
    n_ffts_for_loss: tuple[int, ...] | None = None  # resolutions of the mel loss; None: n_fft
    num_mels_for_loss: tuple[int, ...] | None = None  # one per resolution

    # Audio; sizes in samples, frequencies in Hz
    segment_size: int
    num_mels: int
    n_fft: int
    hop_size: int
    win_size: int
    sampling_rate: int
    fmin: float
    fmax: float | None  # None: half of sampling_rate
    fmax_for_loss: float | None  # None: half of sampling_rate
    # The recipe of the generator's mel; the defaults are HiFi-GAN's
    mel_scale: str = "slaney"  # or "htk"
    mel_norm: str | None = "slaney"  # triangles of equal area; None: of equal height
    mel_power: float = 1.0  # of the STFT magnitudes: 1 or 2
    mel_log_base: float | None = None  # None: natural logarithm; or 10
    mel_floor: float = 1e-5  # of the mel before the logarithm
    stft_epsilon: float = 1e-9  # added to the squared STFT magnitudes
    mel_center: bool = False  # True: frame t is centred on sample t * hop_size

    # Training
    mel_blur: float = 0.0  # share of training mels that are blurred as predicted mels are
    optimizer: str = "adamw"  # of the generator: "adamw" or "muon"
    batch_size: int  # of all processes together
    learning_rate: float
    adam_b1: float
    adam_b2: float
    lr_decay: float  # per epoch
    seed: int
    num_workers: int  # of each process

    def __post_init__(self):
        for is_valid, key, expected in _checks(self):
            if not is_valid:
                value = json.dumps(getattr(self, key))
                raise UsageError(f"{key} = {value}: expected {expected}")

    @property
    def uses_misr(self) -> bool:
        """True for MISR, False for HiFi-GAN's MRF."""
        return self.resblock_kernel_sizes is None

    @property
    def uses_discriminators(self) -> bool:
        """True if discriminators are trained, from the first update or later."""
        return self.discriminator_train_start_steps is not None

    @property
    def is_frame_rate(self) -> bool:
        """True for a generator whose layers all run at the mel's frame rate."""
        return self.griffin_lim_steps is not None

    @property
    def uses_istft(self) -> bool:
        """True for a generator with iSTFTNet's head."""
        return self.gen_istft_n_fft is not None

    @property
    def log_amplitude_scale(self) -> float:
        """The factor that turns the mel into natural logarithms of amplitudes."""
        return math.log(self.mel_log_base or math.e) / self.mel_power

    @property
    def silent_log_mel(self) -> float:
        """The lowest value of the mel, which is that of silence."""
        return math.log(self.mel_floor) / math.log(self.mel_log_base or math.e)

    @property
    def lead(self) -> int:
        """The number of samples of the generator's output before the first of the waveform.

        The generator's frames are centred on the middle of a hop. Frames that are centred on the
        start of a hop are the same frames of a waveform that starts half a hop earlier.
        """
        return self.hop_size // 2 if self.mel_center else 0


# ------------------------------------------------------------------------------------ JSON files


def load_config(
    path: str | Path,
    say: Callable[[str], object] | None = None,
    ignore_unknown: bool = False,
) -> Config:
    """Reads a JSON config of this repository, of HiFi-GAN or of a port of it.

    `say` gets one line per note: a MISR config without `misr_merge`; keys that were ignored.

    Args:
        ignore_unknown: for inference; unknown keys are ignored, and fmax_for_loss may be missing.

    Raises:
        UsageError: unreadable file, unknown or missing key, wrong type or invalid value; the
            message names the file, the key, the value and what was expected.
    """
    values = _read_json(path)
    unknown = [key for key in values if key not in {field.name for field in fields(Config)}]
    if ignore_unknown:
        known = {key: value for key, value in values.items() if key not in unknown}
        values = {"fmax_for_loss": None} | known  # some files call it fmax_loss
    if ignore_unknown and unknown and say:
        say(one_line(f"{path}: unknown keys ignored: {', '.join(unknown)}"))
    try:
        h = Config(**_typed(values))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if say and h.uses_misr and "misr_merge" not in values:
        say(f'{path}: no misr_merge, so "mean" is used; y-chan\'s port uses "conv"')
    return h


def _read_json(path: str | Path) -> dict:
    """Returns the keys and values of a JSON file, without HiFi-GAN's unused keys."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows writes a byte order mark
        values = json.loads(text, object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config; try config_v1.json") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a readable JSON config ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object of keys and values")
    return {key: value for key, value in values.items() if key not in IGNORED_KEYS}


def _unique_keys(pairs: list[tuple]) -> dict:
    """Returns a JSON object. Raises ValueError for a key given twice; json keeps the last."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}")
    return dict(pairs)


def _typed(values: dict) -> dict:
    """Converts JSON `values` to the types of Config's fields.

    Raises:
        UsageError: unknown or missing key, or wrong type.
    """
    known, kinds = {field.name: field for field in fields(Config)}, typing.get_type_hints(Config)
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"{key} = {json.dumps(value)}: unknown key{hint}")
        if not _has_type(value, kinds[key]):
            expected = _in_words(kinds[key])
            raise UsageError(f"{key} = {json.dumps(value)}: expected {expected}")
    for key, field in known.items():
        if key not in values and field.default is MISSING:
            raise UsageError(f"{key} is missing: expected {_in_words(kinds[key])}")
    return {key: _frozen(value) for key, value in values.items()}


def _has_type(value: object, kind: type | types.UnionType) -> bool:
    """Returns whether a JSON value has the annotated type `kind` of a field."""
    if isinstance(kind, types.UnionType):
        return any(_has_type(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, list) and all(_has_type(each, item) for each in value)
    if kind is float:  # NaN and numbers beyond a float's range are refused
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def _in_words(kind: type | types.UnionType) -> str:
    """Names a field's type in the words of a JSON file."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_in_words(each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list, each " + _in_words(typing.get_args(kind)[0])
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return (words | {type(None): "null"})[kind]


def _frozen(value: object) -> object:
    """Converts lists to tuples, at any depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------- checks

Checks = Iterator[tuple[bool, str, str]]  # (is_valid, key, what is expected)


def _checks(h: Config) -> Checks:
    """Yields the checks of all values. A check may rely on those before it."""
    yield from _range_checks(h)
    yield from _audio_checks(h)
    yield from _loss_checks(h)
    yield from _generator_checks(h)
    yield from _misr_checks(h) if h.uses_misr else _mrf_checks(h)


def _range_checks(h: Config) -> Checks:
    for key in (
        *("upsample_initial_channel", "discriminator_channel_mult", "batch_size", "learning_rate"),
        *("segment_size", "num_mels", "n_fft", "hop_size", "win_size", "sampling_rate"),
        "refiner_channels",
    ):
        yield getattr(h, key) > 0, key, "more than 0"
    for key in (
        *("lambda_mel", "lambda_feature", "lambda_f0", "lambda_aperiodicity"),
        *("num_workers", "seed"),
    ):
        yield getattr(h, key) >= 0, key, "0 or more"
    yield 0 <= h.mel_blur <= 1, "mel_blur", "0 to 1"
    for key in ("discriminator_train_start_steps", "griffin_lim_steps"):
        yield (getattr(h, key) or 0) >= 0, key, "0 or more, or null"
    for key in ("adam_b1", "adam_b2"):
        yield 0 <= getattr(h, key) < 1, key, "0 or more and less than 1"
    yield 0 < h.lr_decay <= 1, "lr_decay", "more than 0 and at most 1"
    yield h.optimizer in ("adamw", "muon"), "optimizer", '"adamw" or "muon"'


def _audio_checks(h: Config) -> Checks:
    yield h.win_size <= h.n_fft, "win_size", f"at most n_fft, {h.n_fft}"
    overlap = h.n_fft - h.hop_size
    expected = f"hop_size, {h.hop_size}, plus an even number"
    yield overlap >= 0 and overlap % 2 == 0, "n_fft", expected
    expected = f"a multiple of hop_size, {h.hop_size}"
    yield h.segment_size % h.hop_size == 0, "segment_size", expected
    yield h.segment_size >= MIN_SEGMENT, "segment_size", f"at least {MIN_SEGMENT}"
    nyquist = h.sampling_rate / 2
    expected = f"0 or more and less than sampling_rate / 2, {nyquist:g}"
    yield 0 <= h.fmin < nyquist, "fmin", expected
    expected = f"null or more than fmin, {h.fmin:g}, and at most sampling_rate / 2, {nyquist:g}"
    for key in ("fmax", "fmax_for_loss"):
        fmax = getattr(h, key)
        yield fmax is None or h.fmin < fmax <= nyquist, key, expected
    yield h.num_mels <= h.n_fft, "num_mels", f"at most n_fft, {h.n_fft}"
    yield h.mel_scale in ("slaney", "htk"), "mel_scale", '"slaney" or "htk"'
    yield h.mel_norm in ("slaney", None), "mel_norm", '"slaney" or null'
    yield h.mel_power in (1, 2), "mel_power", "1 or 2"
    yield h.mel_log_base in (None, 10), "mel_log_base", "null (natural logarithm) or 10"
    yield h.mel_floor > 0, "mel_floor", "more than 0"
    yield h.stft_epsilon >= 0, "stft_epsilon", "0 or more"


def _loss_checks(h: Config) -> Checks:
    n_ffts, num_mels = h.n_ffts_for_loss, h.num_mels_for_loss
    expected = "null or a list of one or more multiples of 8, at least 64 each"
    is_valid = n_ffts is None or (n_ffts and all(n >= 64 and n % 8 == 0 for n in n_ffts))
    yield is_valid, "n_ffts_for_loss", expected
    n_ffts, num_mels = n_ffts or (), num_mels or ()
    expected = f"one number of bands for each of the {len(n_ffts)} n_ffts_for_loss"
    yield len(num_mels) == len(n_ffts), "num_mels_for_loss", expected
    is_valid = all(0 < m <= n // 4 for m, n in zip(num_mels, n_ffts, strict=True))
    yield is_valid, "num_mels_for_loss", "positive numbers, each at most a quarter of its n_fft"


def _generator_checks(h: Config) -> Checks:
    rates, kernels = h.upsample_rates, h.upsample_kernel_sizes
    yield min(rates, default=0) > 0, "upsample_rates", "a list of one or more positive rates"
    expected = "both gen_istft_n_fft and gen_istft_hop_size, or neither"
    n_fft, hop_size = h.gen_istft_n_fft, h.gen_istft_hop_size
    yield (n_fft is None) == (hop_size is None), "gen_istft_n_fft", expected
    yield from _frame_rate_checks(h) if h.is_frame_rate else _upsampling_checks(h)
    expected = f"one kernel size for each of the {len(rates)} upsample_rates"
    yield len(kernels) == len(rates), "upsample_kernel_sizes", expected
    gaps = [kernel - rate for kernel, rate in zip(kernels, rates, strict=True)]
    expected = f"each its rate of {json.dumps(rates)} plus 0 or an even number"
    yield all(gap >= 0 and gap % 2 == 0 for gap in gaps), "upsample_kernel_sizes", expected
    yield h.resblock in ("1", "2"), "resblock", '"1" or "2"'


def _frame_rate_checks(h: Config) -> Checks:
    yield not h.uses_istft, "griffin_lim_steps", "no such key beside gen_istft_n_fft"
    expected = "rates of 1 beside griffin_lim_steps, one for each block"
    yield max(h.upsample_rates) == 1, "upsample_rates", expected
    is_valid = h.lookahead_frames is None or 1 <= h.lookahead_frames <= MAX_LOOKAHEAD
    yield is_valid, "lookahead_frames", f"1 to {MAX_LOOKAHEAD}, or null"


def _upsampling_checks(h: Config) -> Checks:
    expected = "no such key without griffin_lim_steps (frame-rate generators)"
    yield h.lookahead_frames is None, "lookahead_frames", expected
    n_fft, hop_size, stages = h.gen_istft_n_fft, h.gen_istft_hop_size, len(h.upsample_rates)
    if h.uses_istft:
        yield n_fft > 0 and n_fft % 2 == 0, "gen_istft_n_fft", "a positive even number"
        is_valid = 0 < hop_size <= n_fft // 2 and hop_size < h.hop_size
        expected = f"1 to half of gen_istft_n_fft, {n_fft // 2}, and less than {h.hop_size}"
        yield is_valid, "gen_istft_hop_size", expected
    product = math.prod(h.upsample_rates) * (hop_size or 1)
    times = ", times gen_istft_hop_size," if h.uses_istft else ""
    expected = f"rates whose product{times} ({product} here) is hop_size, {h.hop_size}"
    yield product == h.hop_size, "upsample_rates", expected
    expected = f"at least {2**stages}: it is halved in each of {stages} stages"
    yield h.upsample_initial_channel >= 2**stages, "upsample_initial_channel", expected


def _misr_checks(h: Config) -> Checks:
    expected = "one or more for MISR (MRF has resblock_kernel_sizes instead)"
    yield (h.resblock_num or 0) > 0, "resblock_num", expected
    yield _are_odd((h.resblock_kernel_size or 0,)), "resblock_kernel_size", "an odd size for MISR"
    expected = "a flat list of positive dilations for MISR"
    yield _are_dilations(h.resblock_dilation_sizes), "resblock_dilation_sizes", expected
    yield h.misr_merge in ("mean", "conv"), "misr_merge", '"mean" or "conv"'


def _mrf_checks(h: Config) -> Checks:
    kernels, dilations = h.resblock_kernel_sizes, h.resblock_dilation_sizes
    for key in ("resblock_num", "resblock_kernel_size"):
        expected = "no such key beside resblock_kernel_sizes (MRF)"
        yield getattr(h, key) is None, key, expected
    yield _are_odd(kernels), "resblock_kernel_sizes", "one or more odd sizes"
    is_valid = len(dilations) == len(kernels) and all(map(_are_dilations, dilations))
    expected = f"a list of positive dilations for each of the {len(kernels)} resblock_kernel_sizes"
    yield is_valid, "resblock_dilation_sizes", expected


def _are_odd(sizes: tuple[int, ...]) -> bool:
    return len(sizes) > 0 and all(size > 0 and size % 2 == 1 for size in sizes)


def _are_dilations(values: object) -> bool:
    is_list = isinstance(values, tuple) and len(values) > 0
    return is_list and all(isinstance(value, int) and value > 0 for value in values)
