"""Pictures of speech: what TensorBoard, evaluate.py and the listening page show."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from env import Config
from evaluation.metrics import SIDES, Pair
from meldataset import band_edges

PICTURED_LOG_MELS = (-11.5, 2.0)  # one scale, so that pictures compare: silence to loud speech
PICTURED_DIFFERENCE = 3.0  # of log-mels, either way
PICTURED_HZ = (500, 1000, 2000, 4000, 8000, 16000)  # marked on the axis
COLOURS = "magma"


def band_of(hertz: float, h: Config, fmax: float | None) -> float:
    """Where a frequency lies on the axis of a mel up to `fmax`: band i reaches from i to i + 1."""
    fmax = h.sampling_rate / 2 if fmax is None else fmax
    corners = band_edges(h.num_mels, h.fmin, fmax)  # band i has its top at number i + 1
    return float(np.interp(hertz, corners, np.arange(h.num_mels + 2) - 0.5))


def marked_bands(h: Config, fmax: float | None) -> dict[int, float]:
    """Of PICTURED_HZ, those that the mel reaches, and where they lie on its axis."""
    top = h.sampling_rate / 2 if fmax is None else fmax
    return {hertz: band_of(hertz, h, fmax) for hertz in PICTURED_HZ if h.fmin < hertz < top}


def draw_mel(axes: Axes, mel: np.ndarray, h: Config, fmax: float | None, **colours) -> None:
    """A log-mel [num_mels, T], or a difference of two, over seconds and Hz."""
    low, high = PICTURED_LOG_MELS
    seconds = mel.shape[1] * h.hop_size / h.sampling_rate
    image = axes.imshow(
        mel,
        aspect="auto",
        origin="lower",
        interpolation="none",
        extent=(0, seconds, 0, mel.shape[0]),
        **{"vmin": low, "vmax": high, "cmap": COLOURS} | colours,
    )
    marks = marked_bands(h, fmax)
    axes.set_yticks(list(marks.values()), [str(hertz) for hertz in marks])
    axes.set_ylabel("Hz")
    axes.figure.colorbar(image, ax=axes, label="log magnitude")


def draw_envelope(axes: Axes, wav: np.ndarray, h: Config, **style) -> None:
    """The lowest and the highest sample of each hop of a waveform [N]."""
    hops = np.reshape(wav[: len(wav) // h.hop_size * h.hop_size], (-1, h.hop_size))
    seconds = (np.arange(len(hops)) + 0.5) * h.hop_size / h.sampling_rate
    axes.fill_between(seconds, hops.min(axis=1), hops.max(axis=1), linewidth=0, **style)
    axes.set_ylabel("amplitude")


def plot_spectrogram(wav: np.ndarray, mel: np.ndarray, h: Config, fmax: float | None) -> Figure:
    """A waveform's envelope, [N], and below it its log-mel up to `fmax`, [num_mels, T]."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(1, 3))
    draw_envelope(top, wav, h)
    draw_mel(bottom, mel, h, fmax)
    bottom.set_xlabel("time (s)")
    return figure


def plot_pair(pair: Pair) -> Figure:
    """Both envelopes and log-mels, the generated one less the reference, and both pitches."""
    h, fmax = pair.h, pair.h.fmax_for_loss
    figure = Figure(figsize=(10, 11), layout="constrained")
    *others, pitch_axes = figure.subplots(5, sharex=True)
    for side, wav in zip(SIDES, pair.wavs, strict=True):
        draw_envelope(others[0], wav.numpy(), h, alpha=0.6, label=side)
    others[0].legend(loc="upper right")
    mel, mel_hat = (mel.numpy() for mel in pair.mels)
    draw_mel(others[1], mel, h, fmax)
    draw_mel(others[2], mel_hat, h, fmax)
    either_way = {"cmap": "RdBu_r", "vmin": -PICTURED_DIFFERENCE, "vmax": PICTURED_DIFFERENCE}
    draw_mel(others[3], mel_hat - mel, h, fmax, **either_way)
    titles = ("waveform", *SIDES, "generated - reference")
    for axes, title in zip(others, titles, strict=True):
        axes.set_title(title)
    draw_pitches(pitch_axes, pair)
    return figure


def draw_pitches(axes: Axes, pair: Pair) -> None:
    """The fundamental frequencies of both waveforms."""
    try:
        pitches = pair.pitches
    except Exception:  # three metrics have said why
        pitches = ()
    for label, pitch in zip(SIDES, pitches, strict=False):
        seconds = np.arange(len(pitch.f0)) * pair.h.hop_size / pair.h.sampling_rate
        axes.plot(seconds, pitch.f0, label=label)
    axes.set(title="fundamental frequency", xlabel="time (s)", ylabel="Hz")
    axes.legend(*axes.get_legend_handles_labels(), loc="upper right")


def save_bare_spectrogram(mel: np.ndarray, path: str | Path) -> None:
    """A log-mel [num_mels, T] as a PNG of T x num_mels pixels, a byte each, without axes."""
    low, high = PICTURED_LOG_MELS
    levels = ((mel - low) / (high - low)).clip(0, 1) * 255
    image = Image.fromarray(levels.round().astype(np.uint8)[::-1])
    image.putpalette(colormaps[COLOURS](np.arange(256), bytes=True)[:, :3].tobytes())
    image.save(path, format="png", optimize=True)
