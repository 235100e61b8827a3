"""Spectrograms for TensorBoard, the app and the listening page."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from env import Config
from meldataset import band_edges, hifigan_recipe

LOG_MEL_RANGE = (-11.5, 2.0)  # silence to loud speech; one range makes spectrograms comparable
MARKED_HZ = (500, 1000, 2000, 4000, 8000, 16000)
COLOR_MAP = "magma"


def marked_bands(h: Config, fmax: float | None) -> dict[int, float]:
    """Returns the positions of MARKED_HZ on the axis of a mel up to `fmax` Hz, by frequency.

    Band i spans i to i + 1 on this axis.
    """
    top = h.sampling_rate / 2 if fmax is None else fmax
    edges = band_edges(hifigan_recipe(h), top)  # band i has its peak at edge i + 1
    positions = np.arange(h.num_mels + 2) - 0.5
    marks = [hertz for hertz in MARKED_HZ if h.fmin < hertz < top]
    return dict(zip(marks, np.interp(marks, edges, positions).tolist(), strict=True))


def plot_spectrogram(wav: np.ndarray, mel: np.ndarray, h: Config, fmax: float | None) -> Figure:
    """Returns a figure of a waveform's envelope, [N], above its log-mel, [num_mels, T]."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(1, 3))

    hops = np.reshape(wav[: len(wav) // h.hop_size * h.hop_size], (-1, h.hop_size))
    seconds = (np.arange(len(hops)) + 0.5) * h.hop_size / h.sampling_rate
    top.fill_between(seconds, hops.min(axis=1), hops.max(axis=1), linewidth=0)
    top.set_ylabel("amplitude")

    low, high = LOG_MEL_RANGE
    extent = (0, mel.shape[1] * h.hop_size / h.sampling_rate, 0, mel.shape[0])
    scale = {"vmin": low, "vmax": high, "cmap": COLOR_MAP}
    axes = {"aspect": "auto", "origin": "lower", "interpolation": "none", "extent": extent}
    image = bottom.imshow(mel, **axes, **scale)
    marks = marked_bands(h, fmax)
    bottom.set_yticks(list(marks.values()), [str(hertz) for hertz in marks])
    bottom.set(xlabel="time (s)", ylabel="Hz")
    figure.colorbar(image, ax=bottom, label="log magnitude")
    return figure


def save_bare_spectrogram(mel: np.ndarray, path: str | Path) -> None:
    """Writes a log-mel [num_mels, T] as a PNG of T x num_mels pixels, one byte each."""
    low, high = LOG_MEL_RANGE
    levels = ((mel - low) / (high - low)).clip(0, 1) * 255
    image = Image.fromarray(levels.round().astype(np.uint8)[::-1])
    image.putpalette(colormaps[COLOR_MAP](np.arange(256), bytes=True)[:, :3].tobytes())
    image.save(path, format="png", optimize=True)
