"""Draws frame_rate.png, the diagram in frame_rate.md: from the mel to the waveform.

python docs/frame_rate.py
"""

import itertools
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

INK = "#24292f"
DATA, NETWORK, SIGNAL = "#d9dee4", "#8d6cc2", "#3b86bf"  # tensors, learned layers, fixed DSP
TOP, OUTPUTS, BOTTOM, BELOW, PHASE = 4.2, 2.5, 0.9, -0.4, -1.25  # heights of the rows
COLUMNS = (1.2, 4.0, 7.0, 9.6)  # of the four outputs and of what each of them controls


def box(ax: Axes, x: float, y: float, text: str, color: str, width: float = 1.9) -> None:
    """Draws a box around (x, y), 0.66 high."""
    style = "round,pad=0,rounding_size=0.12"
    corner = (x - width / 2, y - 0.33)
    ax.add_patch(FancyBboxPatch(corner, width, 0.66, boxstyle=style, fc=color, ec="none"))
    ink = INK if color == DATA else "white"
    ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=9.5, linespacing=1.05)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws an arrow."""
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def network(ax: Axes) -> None:
    """Draws the top row, the layers, and the four outputs below it."""
    layers = ((1.2, "mel", DATA), (3.6, "conv_pre", NETWORK), (6.0, "MISR blocks", NETWORK))
    for x, text, color in (*layers, (8.4, "conv_post", NETWORK)):
        box(ax, x, TOP, text, color)
    for x in (1.2, 3.6, 6.0):
        arrow(ax, (x + 0.95, TOP), (x + 1.45, TOP))
    rail = (TOP + OUTPUTS) / 2
    ax.plot([8.4, 8.4], [TOP - 0.33, rail], color=INK, lw=1.1)
    ax.plot([COLUMNS[0], COLUMNS[-1]], [rail, rail], color=INK, lw=1.1)
    names = ("F0", "aperiodicity ap", "magnitude\ncorrection", "conditioning")
    for x, name in zip(COLUMNS, names, strict=True):
        arrow(ax, (x, rail), (x, OUTPUTS + 0.33))
        box(ax, x, OUTPUTS, name, DATA)
        arrow(ax, (x, OUTPUTS - 0.33), (x, BOTTOM + 0.33))


def synthesis(ax: Axes) -> None:
    """Draws the bottom row, from the source to the waveform, and its inputs below."""
    (pulses, mix, levels, refiner), inverse = COLUMNS, 12.4
    steps = (
        (pulses, "pulses", SIGNAL),
        (mix, "mix S", SIGNAL),
        (levels, "level matching", SIGNAL),
        (refiner, "refiner", NETWORK),
        (inverse, "inverse STFT,\nGriffin-Lim", SIGNAL),
        (14.8, "wav", DATA),
    )
    for x, text, color in steps:
        box(ax, x, BOTTOM, text, color)
    for (left, *_), (right, *_) in itertools.pairwise(steps):
        arrow(ax, (left + 0.95, BOTTOM), (right - 0.95, BOTTOM))
    box(ax, pulses, BELOW, "noise", SIGNAL)
    arrow(ax, (pulses + 0.95, BELOW), (mix - 0.95, BOTTOM - 0.2))
    box(ax, levels, BELOW, "mel", DATA)
    arrow(ax, (levels, BELOW + 0.33), (levels, BOTTOM - 0.33))
    arrow(ax, (levels + 0.95, BELOW), (refiner - 0.7, BOTTOM - 0.33))
    ax.plot([mix + 0.8] * 2, [BOTTOM - 0.33, PHASE], color=INK, lw=1.1)
    ax.plot([mix + 0.8, inverse], [PHASE, PHASE], color=INK, lw=1.1)
    arrow(ax, (inverse, PHASE), (inverse, BOTTOM - 0.33))
    ax.text(9.6, PHASE + 0.1, "phase of S", ha="center", va="bottom", fontsize=9.5, color=INK)
    equation = r"$S = \sqrt{1 - ap^2} \cdot pulses + ap \cdot noise$"
    ax.text(0.25, PHASE - 0.05, equation, va="center", fontsize=10, color=INK)


def legend(ax: Axes) -> None:
    """Explains the colours, at the top right."""
    names = ((DATA, "tensor"), (NETWORK, "learned"), (SIGNAL, "signal processing"))
    for i, (color, name) in enumerate(names):
        y = TOP + 0.1 - 0.5 * i
        ax.add_patch(plt.Rectangle((12.4, y - 0.12), 0.4, 0.24, fc=color, ec="none"))
        ax.text(12.95, y, name, va="center", fontsize=9.5, color=INK)


def main() -> None:
    """Writes the diagram beside this file."""
    matplotlib.use("agg")
    figure, ax = plt.subplots(figsize=(12, 4.7))
    network(ax)
    synthesis(ax)
    legend(ax)
    ax.set(xlim=(0.1, 15.9), ylim=(-1.7, 4.7), aspect="equal")
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
