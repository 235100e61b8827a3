"""Objective metrics of a pair of waveforms, [N] at h.sampling_rate.

    from evaluation.metrics import evaluate_pair
    values = evaluate_pair(wav, wav_hat, h)    # {"mel_l1": 0.31, ..., "pesq_wb": None, ...}

METRICS, below, says what each number is. Their libraries are those of requirements-dev.txt and
requirements-nodeps.txt, imported where they are used: a metric without its library is left out.
"""

import functools
import io
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import librosa
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from env import Config
from meldataset import LogMelSpectrogram
from utils import use_own_numba_cache

SIDES = ("reference", "generated")
SILENT_PEAK = 2**-15  # less than the smallest step of 16-bit audio
PESQ_RATE, STOI_RATE = 16000, 10000  # Hz, at which they are defined
PESQ_SECONDS = 20  # beyond 50 utterances, which takes more, pesq 0.0.4 crashes the process
MCD_ORDER = 24  # Kominek, Schultz, Black 2008
F0_RANGE = (65, 500)  # Hz, of speech
F0_PERIODS = 4  # of the lowest pitch in a frame of pYIN
OPINION_RATE = 16000  # Hz, which DistillMOS hears
OPINION_SAMPLES, OPINION_HOP = 122880, 16000  # of its window, and between two at most
SEED = 0  # of the bootstrap, and of the noise that pystoi adds


class Pitch(NamedTuple):
    """What pYIN hears, in frames [N // hop_size + 1]."""

    f0: np.ndarray  # Hz, NaN where unvoiced
    voiced: np.ndarray  # bool
    periodicity: np.ndarray  # the probability that the frame is voiced, 0 to 1


class Pair:
    """A reference and a generated waveform, and what several metrics need of them, computed once.

    Both are [N] at h.sampling_rate, on any device; the longer one is cut to the length of the
    other.

    Raises:
        ValueError: a waveform of another shape.
    """

    def __init__(self, reference: torch.Tensor, generated: torch.Tensor, h: Config):
        use_own_numba_cache()  # for librosa and mel_cepstral_distance
        for wav in (reference, generated):
            if wav.dim() != 1:
                raise ValueError(f"waveform of shape {list(wav.shape)}: expected [N]")
        samples = min(len(reference), len(generated))
        self.wavs = tuple(wav[:samples].detach().float().cpu() for wav in (reference, generated))
        self.h = h

    @cached_property
    def log_mel(self) -> LogMelSpectrogram:
        """What the mel loss sees a waveform by."""
        return LogMelSpectrogram(self.h, self.h.fmax_for_loss)

    @cached_property
    def mels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-mels [num_mels, T] that the mel loss sees."""
        return tuple(self.log_mel(wav.unsqueeze(0))[0] for wav in self.wavs)

    @cached_property
    def pitches(self) -> tuple[Pitch, Pitch]:
        """The fundamental frequencies: librosa's pYIN."""
        return tuple(
            Pitch(
                *librosa.pyin(
                    wav.numpy(),
                    fmin=F0_RANGE[0],
                    fmax=F0_RANGE[1],
                    sr=self.h.sampling_rate,
                    frame_length=math.ceil(F0_PERIODS * self.h.sampling_rate / F0_RANGE[0]),
                    hop_length=self.h.hop_size,
                )
            )
            for wav in self.wavs
        )

    def at(self, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Both waveforms, resampled with soxr."""
        resample = partial(
            librosa.resample,
            orig_sr=self.h.sampling_rate,
            target_sr=sampling_rate,
            res_type="soxr_hq",
        )
        return tuple(resample(wav.numpy()) for wav in self.wavs)

    def check_sound(self, *names: str) -> None:
        """Raises ValueError where the "reference" or "generated", of `names`, has no sound."""
        for name, wav in zip(SIDES, self.wavs, strict=True):
            if name in names and not SILENT_PEAK <= wav.abs().max() < math.inf:
                raise ValueError(f"the {name} waveform is silent or not finite")


def _mel_l1(pair: Pair) -> float:
    mel, mel_hat = pair.mels
    return F.l1_loss(mel_hat, mel).item()


def _mr_stft(pair: Pair) -> float:
    from auraloss.freq import MultiResolutionSTFTLoss

    pair.check_sound("reference")  # by whose energy spectral convergence divides
    wav, wav_hat = (wav.reshape(1, 1, -1) for wav in pair.wavs)
    return MultiResolutionSTFTLoss()(wav_hat, wav).item()


def _ltas(pair: Pair) -> float:
    spectrum, spectrum_hat = (pair.log_mel.of_bins(wav[None]).mean(2) for wav in pair.wavs)
    return 20 / math.log(10) * F.l1_loss(spectrum_hat, spectrum).item()


def _mcd(pair: Pair) -> float:
    from mel_cepstral_distance import compare_mel_spectrograms

    bels = [mel.T.double().numpy() * (2 / math.log(10)) for mel in pair.mels]
    num_mels = pair.h.num_mels
    # Row 0 of the package is coefficient 1: its default, s=1, would leave out the tilt of the
    # spectrum. The level, coefficient 0, it never computes.
    distance, _ = compare_mel_spectrograms(*bels, s=0, D=min(MCD_ORDER, num_mels), aligning="pad")
    # From sums over bands in bel to a root mean square over bands in dB (Parseval). That equals
    # the usual 10 sqrt(2) / ln(10) times a distance of coefficients of the natural log spectrum.
    return 10 * math.sqrt(2) / num_mels * distance


def _pesq_wb(pair: Pair) -> float:
    import pesq

    pair.check_sound("reference", "generated")
    seconds = len(pair.wavs[0]) / pair.h.sampling_rate
    if seconds > PESQ_SECONDS:
        raise ValueError(f"{seconds:.1f} s are more than the {PESQ_SECONDS} s that pesq can take")
    try:
        return pesq.pesq(PESQ_RATE, *pair.at(PESQ_RATE), mode="wb")
    except pesq.PesqError as error:
        raise ValueError(error.args[0].decode()) from None


def _stoi(pair: Pair, extended: bool = False) -> float:
    import pystoi

    pair.check_sound("reference")
    with warnings.catch_warnings(), _seeded():
        # pystoi warns, and returns 1e-5, which would count as a value.
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return pystoi.stoi(*pair.at(STOI_RATE), STOI_RATE, extended=extended)
        except RuntimeWarning:
            raise ValueError("STOI needs at least 0.4 s that are not silent") from None


@contextmanager
def _seeded() -> Iterator[None]:
    """NumPy's global random numbers are the same each time inside, and as before afterwards."""
    state = np.random.get_state()
    np.random.seed(SEED)
    try:
        yield
    finally:
        np.random.set_state(state)


def _f0_rmse(pair: Pair) -> float:
    pitch, pitch_hat = pair.pitches
    both = pitch.voiced & pitch_hat.voiced
    if not both.any():
        raise ValueError("no frame is voiced in both files")
    cents = 1200 * np.log2(pitch_hat.f0[both] / pitch.f0[both])
    return _root_mean_square(cents)


def _vuv_f1(pair: Pair) -> float:
    voiced, voiced_hat = (pitch.voiced for pitch in pair.pitches)
    if not (voiced | voiced_hat).any():
        raise ValueError("no frame is voiced in either file")
    return 2 * np.sum(voiced & voiced_hat) / (np.sum(voiced) + np.sum(voiced_hat))


def _periodicity_rmse(pair: Pair) -> float:
    periodicity, periodicity_hat = (pitch.periodicity for pitch in pair.pitches)
    return _root_mean_square(periodicity_hat - periodicity)


def _root_mean_square(values: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(values)))


def _distill_mos(pair: Pair) -> float:
    model = _opinion_model()
    pair.check_sound("generated")
    wav = torch.from_numpy(pair.at(OPINION_RATE)[1])
    # It would take all windows of a long file at once, and much memory. It sets their level itself.
    rest = max(0, len(wav) - OPINION_SAMPLES)
    starts = np.linspace(0, rest, 1 + math.ceil(rest / OPINION_HOP)).astype(int)
    windows = (wav[start : start + OPINION_SAMPLES] for start in starts)
    return float(np.mean([model(window[None]).item() for window in windows]))


@functools.cache
def _opinion_model() -> torch.nn.Module:
    with _stand_in("torchaudio"):
        from distillmos import ConvTransformerSQAModel
    # It says where its weights lie, and draws random ones before.
    with redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=()):
        return ConvTransformerSQAModel().eval()


@contextmanager
def _stand_in(name: str) -> Iterator[None]:
    """An empty module `name`, for the import of a package that uses it in its command line only.

    The one that is installed, if any, may be of another torch, and then would not load.
    """
    is_loaded = name in sys.modules
    sys.modules.setdefault(name, types.ModuleType(name))
    try:
        yield
    finally:
        if not is_loaded:
            del sys.modules[name]


@dataclass(frozen=True)
class Metric:
    """A number for a pair, and what a reader must know of it.

    `function` raises ImportError where the library is missing, and any other error where the pair
    has no such number.
    """

    name: str
    unit: str
    better: str  # "higher" or "lower"
    library: str  # as pip knows it
    description: str
    function: Callable[[Pair], float]
    needs_reference: bool = True  # or hears the generated waveform alone
    requirements: str = "-r requirements-dev.txt"  # the words after "pip install" that bring it


METRICS = (
    Metric(
        "distill_mos",
        unit="MOS",
        better="higher",
        library="distillmos",
        description="DistillMOS (Stahl, Gamper 2025) at 16 kHz: the mean opinion of listeners, 1 "
        "to 5, as a network predicts it from the generated speech alone, without the recording. "
        "A prediction, no listening test; of these numbers it ranks vocoders most as listeners do.",
        function=_distill_mos,
        needs_reference=False,
        requirements="--no-deps -r requirements-nodeps.txt",
    ),
    Metric(
        "mel_l1",
        unit="Np",
        better="lower",
        library="torch",
        description="Mean absolute difference of log-mels (natural logarithm of magnitudes, up to "
        "the config's fmax_for_loss): the error that validation shows, there of clips brought to "
        "a peak of 0.95.",
        function=_mel_l1,
    ),
    Metric(
        "mr_stft",
        unit="none",
        better="lower",
        library="auraloss",
        description="Multi-resolution STFT: relative error of magnitudes (spectral convergence) "
        "plus mean absolute difference of their natural logarithms, mean over FFTs of 512, 1024 "
        "and 2048 samples with hops of 50, 120 and 240 (Yamamoto et al. 2020).",
        function=_mr_stft,
    ),
    Metric(
        "ltas",
        unit="dB",
        better="lower",
        library="torch",
        description="Long-term average spectrum: log magnitudes of the config's bins, each "
        "averaged over the clip; mean absolute difference. What stays while speech moves: a "
        "colour, a comb, the tones of an upsampling.",
        function=_ltas,
    ),
    Metric(
        "mcd",
        unit="dB",
        better="lower",
        library="mel-cepstral-distance",
        description=f"Mel-cepstral distance: root mean square over the mel scale of the difference "
        f"of spectra smoothed to coefficients 1 to {MCD_ORDER}, mean over frames. From the same "
        "log-mels as mel_l1, frame by frame, without time warping.",
        function=_mcd,
    ),
    Metric(
        "pesq_wb",
        unit="MOS-LQO",
        better="higher",
        library="pesq",
        description=f"Wide-band PESQ (ITU-T P.862.2) at 16 kHz: predicted opinion, 1.0 to 4.64. "
        f"For files of 0.25 to {PESQ_SECONDS} s.",
        function=_pesq_wb,
    ),
    Metric(
        "stoi",
        unit="correlation",
        better="higher",
        library="pystoi",
        description="Short-time objective intelligibility (Taal et al. 2011) at 10 kHz: "
        "correlation of the envelopes of third-octave bands, up to 1.",
        function=_stoi,
    ),
    Metric(
        "estoi",
        unit="correlation",
        better="higher",
        library="pystoi",
        description="Extended STOI (Jensen, Taal 2016) at 10 kHz: spectra and envelopes "
        "normalised, which makes it the stricter one; up to 1.",
        function=partial(_stoi, extended=True),
    ),
    Metric(
        "f0_rmse",
        unit="cents",
        better="lower",
        library="librosa",
        description=f"Root mean square error of the fundamental frequency, over frames voiced in "
        f"both files. pYIN, {F0_RANGE[0]} to {F0_RANGE[1]} Hz in steps of 10 cents, a frame each "
        "hop_size.",
        function=_f0_rmse,
    ),
    Metric(
        "vuv_f1",
        unit="0 to 1",
        better="higher",
        library="librosa",
        description="F1 score of the decision that a frame is voiced (pYIN, as above): the "
        "harmonic mean of precision and recall.",
        function=_vuv_f1,
    ),
    Metric(
        "periodicity_rmse",
        unit="probability",
        better="lower",
        library="librosa",
        description="Root mean square error of the probability that a frame is voiced (pYIN, as "
        "above), over all frames; after Morrison et al. 2022.",
        function=_periodicity_rmse,
    ),
)


@dataclass
class Measurement:
    """What came of a pair, by the names of metrics."""

    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # for each value that is None
    missing: dict[str, str] = field(default_factory=dict)  # what could not be imported


@torch.no_grad()
def measure(pair: Pair, metrics: Iterable[Metric] = METRICS) -> Measurement:
    """The metrics of `pair`; what fails has a reason, never a made-up value."""
    measurement = Measurement()
    for metric in metrics:
        try:
            value = float(metric.function(pair))
            if not math.isfinite(value):
                raise ValueError(f"it came to {value}")
            measurement.values[metric.name] = value
        except ImportError as error:
            measurement.missing[metric.name] = str(error)
        except Exception as error:  # the libraries fail in a dozen ways
            measurement.values[metric.name] = None
            measurement.reasons[metric.name] = " ".join(str(error).split()) or repr(error)
    return measurement


def evaluate_pair(
    reference: torch.Tensor, generated: torch.Tensor, h: Config
) -> dict[str, float | None]:
    """The metrics of waveforms [N] at h.sampling_rate, by name; the longer one is cut.

    None where a pair has no such number, as PESQ of silence. Metrics whose library is missing are
    left out, and named on standard error, once.

    Raises:
        ValueError: a waveform of another shape.
    """
    measurement = measure(Pair(reference, generated, h))
    for name, reason in measurement.missing.items():
        name_missing(name, reason)
    return measurement.values


@functools.cache  # once a process
def name_missing(name: str, reason: str) -> None:
    """Says on standard error that a metric is left out."""
    (metric,) = (metric for metric in METRICS if metric.name == name)
    tqdm.write(
        f"{name}: left out, it needs {metric.library} ({reason}); "
        f"pip install {metric.requirements}",
        file=sys.stderr,
    )
