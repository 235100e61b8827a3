"""Objective metrics of a generated waveform, most of them against its recording.

    from evaluation.metrics import evaluate_pair
    values = evaluate_pair(wav, wav_hat, h)    # {"distill_mos": 4.2, "mel_l1": 0.31, ...}

METRICS, at the end of the file, defines each number. Libraries are imported where they are used.
A metric whose library is missing is left out.
"""

import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import librosa
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from env import Config
from evaluation.opinion import OPINION_RATE, distill_mos, plcmos, seeded_numpy
from meldataset import LogMelSpectrogram, hifigan_recipe
from utils import use_own_numba_cache

SIDES = ("reference", "generated")
SILENT_PEAK = 2**-15  # one step of 16-bit audio
NEPER = 20 / math.log(10)  # dB
PESQ_RATE, STOI_RATE = 16000, 10000  # Hz, given by their definitions
PESQ_SECONDS = 20  # pesq 0.0.4 crashes at 50 utterances, for which longer files are needed
MCD_ORDER = 24  # Kominek, Schultz, Black 2008
F0_RANGE = (65, 500)  # Hz, of speech
F0_PERIODS = 4  # periods of the lowest F0 in a frame of pYIN
HIGH_BAND = (8000, 12000)  # Hz; PESQ, DistillMOS and PLCMOS ignore it
HIGH_BAND_MELS = 12  # as many as BigVGAN's mel of 100 bands up to 12 kHz has in HIGH_BAND


class F0Track(NamedTuple):
    """The result of pYIN; each array is [N // hop_size + 1]."""

    f0: np.ndarray  # Hz, NaN where unvoiced
    voiced: np.ndarray  # bool
    periodicity: np.ndarray  # probability that the frame is voiced, 0 to 1


class Pair:
    """A reference and a generated waveform with the features that several metrics share.

    Both are [N] at h.sampling_rate, on any device. The longer one is cut to the shorter.

    Raises:
        ValueError: a waveform has another shape.
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
        """The transform of the mel loss."""
        return LogMelSpectrogram(hifigan_recipe(self.h), self.h.fmax_for_loss)

    @cached_property
    def mels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-mels [num_mels, T] of the mel loss."""
        return tuple(self.log_mel(wav.unsqueeze(0))[0] for wav in self.wavs)

    @cached_property
    def spectra(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log magnitudes of each bin, averaged over the clip, [n_fft // 2 + 1]."""
        return tuple(self.log_mel.of_bins(wav.unsqueeze(0))[0].mean(dim=1) for wav in self.wavs)

    @cached_property
    def f0_tracks(self) -> tuple[F0Track, F0Track]:
        """F0 by librosa's pYIN, one frame each hop."""
        h = self.h
        settings = {
            "fmin": F0_RANGE[0],
            "fmax": F0_RANGE[1],
            "sr": h.sampling_rate,
            "frame_length": math.ceil(F0_PERIODS * h.sampling_rate / F0_RANGE[0]),
            "hop_length": h.hop_size,
        }
        return tuple(F0Track(*librosa.pyin(wav.numpy(), **settings)) for wav in self.wavs)

    def at(self, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns both waveforms at `sampling_rate` Hz, resampled with soxr."""
        rates = {"orig_sr": self.h.sampling_rate, "target_sr": sampling_rate}
        return tuple(
            librosa.resample(wav.numpy(), **rates, res_type="soxr_hq") for wav in self.wavs
        )

    def check_sound(self, *sides: str) -> None:
        """Raises ValueError if a waveform of `sides`, a part of SIDES, is silent or not finite."""
        for side, wav in zip(SIDES, self.wavs, strict=True):
            if side in sides and not SILENT_PEAK <= wav.abs().max() < math.inf:
                raise ValueError(f"the {side} waveform is silent or not finite")


# --------------------------------------------------------------- one function for each metric


def _opinion(pair: Pair, predict: Callable[[np.ndarray], float]) -> float:
    pair.check_sound("generated")
    return predict(pair.at(OPINION_RATE)[1])


def _mel_l1(pair: Pair) -> float:
    mel, mel_hat = pair.mels
    return F.l1_loss(mel_hat, mel).item()


def _high_mel_l1(pair: Pair) -> float:
    low, high = HIGH_BAND
    h = replace(pair.h, num_mels=HIGH_BAND_MELS, fmin=low, fmax=high, fmax_for_loss=high)
    log_mel = LogMelSpectrogram(hifigan_recipe(h), fmax=high)
    mel, mel_hat = (log_mel(wav.unsqueeze(0)) for wav in pair.wavs)
    return F.l1_loss(mel_hat, mel).item()


def _mr_stft(pair: Pair) -> float:
    from auraloss.freq import MultiResolutionSTFTLoss

    pair.check_sound("reference")  # spectral convergence divides by its energy
    wav, wav_hat = (wav.reshape(1, 1, -1) for wav in pair.wavs)
    return MultiResolutionSTFTLoss()(wav_hat, wav).item()


def _ltas(pair: Pair) -> float:
    spectrum, spectrum_hat = pair.spectra
    return NEPER * F.l1_loss(spectrum_hat, spectrum).item()


def _high_ltas(pair: Pair) -> float:
    bins = torch.linspace(0, pair.h.sampling_rate / 2, len(pair.spectra[0]))
    is_high = (HIGH_BAND[0] <= bins) & (bins <= HIGH_BAND[1])
    spectrum, spectrum_hat = (spectrum[is_high] for spectrum in pair.spectra)
    return NEPER * F.l1_loss(spectrum_hat, spectrum).item()


def _mcd(pair: Pair) -> float:
    from mel_cepstral_distance import compare_mel_spectrograms

    bels = [mel.T.double().numpy() * (2 / math.log(10)) for mel in pair.mels]
    num_mels = pair.h.num_mels
    # The package never computes coefficient 0, the level. Its row 0 is coefficient 1, the tilt of
    # the spectrum, which its default s=1 leaves out.
    distance, _ = compare_mel_spectrograms(*bels, s=0, D=min(MCD_ORDER, num_mels), aligning="pad")
    # From sums over bands in bel to a root mean square over bands in dB (Parseval). This equals
    # the usual 10 sqrt(2) / ln(10) times the distance of cepstra of the natural logarithm.
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
    with warnings.catch_warnings(), seeded_numpy():  # pystoi adds noise
        # pystoi warns and returns 1e-5, which would count as a value.
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return pystoi.stoi(*pair.at(STOI_RATE), STOI_RATE, extended=extended)
        except RuntimeWarning:
            raise ValueError("STOI needs at least 0.4 s that are not silent") from None


def _f0_rmse(pair: Pair) -> float:
    track, track_hat = pair.f0_tracks
    both = track.voiced & track_hat.voiced
    if not both.any():
        raise ValueError("no frame is voiced in both files")
    return _root_mean_square(1200 * np.log2(track_hat.f0[both] / track.f0[both]))


def _vuv_f1(pair: Pair) -> float:
    voiced, voiced_hat = (track.voiced for track in pair.f0_tracks)
    if not (voiced | voiced_hat).any():
        raise ValueError("no frame is voiced in either file")
    return 2 * np.sum(voiced & voiced_hat) / (np.sum(voiced) + np.sum(voiced_hat))


def _periodicity_rmse(pair: Pair) -> float:
    periodicity, periodicity_hat = (track.periodicity for track in pair.f0_tracks)
    return _root_mean_square(periodicity_hat - periodicity)


def _root_mean_square(values: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(values)))


# ------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Metric:
    """The definition of a metric.

    `function` raises ImportError if the library is missing, and any other error if the metric is
    not defined for the pair.
    """

    name: str
    label: str  # for readers of the listening page
    unit: str
    better: str  # "higher" or "lower"
    library: str  # its name on PyPI
    description: str
    function: Callable[[Pair], float]
    needs_reference: bool = True
    lowest_sampling_rate: int = 0  # Hz
    install: str = ""  # the command that installs what is missing; "": pip install <library>


NODEPS = "pip install --no-deps -r requirements-nodeps.txt"
METRICS = (
    Metric(
        "distill_mos",
        label="DistillMOS",
        unit="MOS",
        better="higher",
        library="distillmos",
        description="DistillMOS (Stahl, Gamper 2025) at 16 kHz: a network predicts the mean "
        "opinion of listeners, 1 to 5, from the generated speech alone. Of these metrics it agrees "
        "best with listeners on the order of vocoders.",
        function=partial(_opinion, predict=distill_mos),
        needs_reference=False,
        install=NODEPS,
    ),
    Metric(
        "plcmos",
        label="PLCMOS",
        unit="MOS",
        better="higher",
        library="speechmos",
        description="PLCMOS v2 (Diener et al. 2023) at 16 kHz: a second network that predicts the "
        "mean opinion of listeners, 1 to 5, from the generated speech alone. It was trained on "
        "packet loss concealment and is sensitive to gaps and artefacts.",
        function=partial(_opinion, predict=plcmos),
        needs_reference=False,
        install="pip install speechmos onnxruntime",
    ),
    Metric(
        "mel_l1",
        label="mel L1",
        unit="Np",
        better="lower",
        library="torch",
        description="Mean absolute difference of log-mels (natural logarithm of magnitudes, up to "
        "the config's fmax_for_loss). Validation computes the same error, there on clips "
        "normalised to a peak of 0.95.",
        function=_mel_l1,
    ),
    Metric(
        "mel_l1_8_12khz",
        label="mel L1, 8 to 12 kHz",
        unit="Np",
        better="lower",
        library="torch",
        description=f"Mean absolute difference of log-mels of {HIGH_BAND_MELS} bands from 8 to "
        "12 kHz, with the config's FFT. Only for sampling rates of 24 kHz or more.",
        function=_high_mel_l1,
        lowest_sampling_rate=2 * HIGH_BAND[1],
    ),
    Metric(
        "mr_stft",
        label="multi-resolution STFT",
        unit="none",
        better="lower",
        library="auraloss",
        description="Multi-resolution STFT (Yamamoto et al. 2020): relative error of magnitudes "
        "(spectral convergence) plus mean absolute difference of their natural logarithms. Mean "
        "over FFTs of 512, 1024 and 2048 samples with hops of 50, 120 and 240.",
        function=_mr_stft,
    ),
    Metric(
        "ltas",
        label="long-term spectrum",
        unit="dB",
        better="lower",
        library="torch",
        description="Long-term average spectrum: log magnitudes of the config's bins, each "
        "averaged over the clip; mean absolute difference. It shows constant faults: a coloured "
        "spectrum, a comb filter, tones of the upsampling.",
        function=_ltas,
    ),
    Metric(
        "ltas_8_12khz",
        label="long-term spectrum, 8 to 12 kHz",
        unit="dB",
        better="lower",
        library="torch",
        description="As ltas, over the bins from 8 to 12 kHz. Only for sampling rates of 24 kHz or "
        "more.",
        function=_high_ltas,
        lowest_sampling_rate=2 * HIGH_BAND[1],
    ),
    Metric(
        "mcd",
        label="mel-cepstral distance",
        unit="dB",
        better="lower",
        library="mel-cepstral-distance",
        description=f"Mel-cepstral distance: root mean square over the mel scale of the difference "
        f"of spectra smoothed to coefficients 1 to {MCD_ORDER}, mean over frames. It uses the "
        "log-mels of mel_l1, frame by frame, without time warping.",
        function=_mcd,
    ),
    Metric(
        "pesq_wb",
        label="PESQ-WB",
        unit="MOS-LQO",
        better="higher",
        library="pesq",
        description=f"Wide-band PESQ (ITU-T P.862.2) at 16 kHz: predicted opinion, 1.0 to 4.64. "
        f"For files of 0.25 to {PESQ_SECONDS} s.",
        function=_pesq_wb,
    ),
    Metric(
        "stoi",
        label="STOI",
        unit="correlation",
        better="higher",
        library="pystoi",
        description="Short-time objective intelligibility (Taal et al. 2011) at 10 kHz: "
        "correlation of the envelopes of third-octave bands, up to 1.",
        function=_stoi,
    ),
    Metric(
        "estoi",
        label="ESTOI",
        unit="correlation",
        better="higher",
        library="pystoi",
        description="Extended STOI (Jensen, Taal 2016) at 10 kHz: a stricter STOI, of normalised "
        "spectra and envelopes, up to 1.",
        function=partial(_stoi, extended=True),
    ),
    Metric(
        "f0_rmse",
        label="F0 error",
        unit="cents",
        better="lower",
        library="librosa",
        description=f"Root mean square error of F0 over the frames that are voiced in both files. "
        f"F0 by pYIN, {F0_RANGE[0]} to {F0_RANGE[1]} Hz in steps of 10 cents, one frame each "
        "hop_size.",
        function=_f0_rmse,
    ),
    Metric(
        "vuv_f1",
        label="voicing F1",
        unit="0 to 1",
        better="higher",
        library="librosa",
        description="F1 score of the voicing decision of each frame (pYIN, as above): the harmonic "
        "mean of precision and recall.",
        function=_vuv_f1,
    ),
    Metric(
        "periodicity_rmse",
        label="periodicity error",
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
    """The metrics of a pair, by name."""

    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why a value is None
    missing: dict[str, str] = field(default_factory=dict)  # import errors


@torch.no_grad()
def measure(pair: Pair, metrics: Iterable[Metric] = METRICS) -> Measurement:
    """Returns the metrics of `pair`. A metric that fails is None and has a reason.

    Metrics for higher sampling rates are left out.
    """
    measurement = Measurement()
    for metric in metrics:
        if pair.h.sampling_rate < metric.lowest_sampling_rate:
            continue
        try:
            value = float(metric.function(pair))
            if not math.isfinite(value):
                raise ValueError(f"its value is {value}")
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
    """Returns the metrics of waveforms [N] at h.sampling_rate, by name. The longer one is cut.

    A metric that is not defined for the pair, such as PESQ of silence, is None. Metrics whose
    library is missing are left out and named once on standard error.

    Raises:
        ValueError: a waveform has another shape.
    """
    measurement = measure(Pair(reference, generated, h))
    for name, reason in measurement.missing.items():
        say_missing(name, reason)
    return measurement.values


@functools.cache  # once in a process
def say_missing(name: str, reason: str) -> None:
    """Prints on standard error that a metric is left out, and the command that installs it."""
    (metric,) = (metric for metric in METRICS if metric.name == name)
    command = metric.install or f"pip install {metric.library}"
    tqdm.write(f"{name}: left out, {metric.library} is missing ({reason}): {command}", sys.stderr)
