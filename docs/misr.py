"""Draws misr.png, the README's diagram: MRF, MISR, and how the inputs of MISR become one batch.

python docs/misr.py
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

INK, SHADE = "#24292f", "#d9dee4"
BLOCKS = ("#4c9bd6", "#e8923a", "#57ab6e")  # one colour, one set of weights
SHARED = "#8d6cc2"


def box(ax: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """Draws a box around (x, y), 0.62 high."""
    style = "round,pad=0,rounding_size=0.12"
    corner = (x - width / 2, y - 0.31)
    ax.add_patch(FancyBboxPatch(corner, width, 0.62, boxstyle=style, fc=color, ec="none"))
    ink = INK if color == SHADE else "white"
    ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=9.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws an arrow from `start` to `end`."""
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def title(ax: Axes, x: float, text: str, subtitle: str) -> None:
    """Writes a heading with a line below it."""
    ax.text(x, 4.75, text, ha="center", fontsize=12, weight="bold", color=INK)
    ax.text(x, 4.33, subtitle, ha="center", fontsize=9, color=INK)


def mrf(ax: Axes) -> None:
    """Draws MRF: three blocks, each with its own weights."""
    title(ax, 2.6, "MRF (HiFi-GAN)", "three blocks, three sets of weights")
    box(ax, 0.5, 2.6, 0.7, "x", SHADE)
    for y, kernel, color in zip((3.5, 2.6, 1.7), (3, 7, 11), BLOCKS, strict=True):
        arrow(ax, (0.85, 2.6), (1.55, y))
        box(ax, 2.6, y, 2.1, f"block, kernel {kernel}", color)
        arrow(ax, (3.65, y), (4.35, 2.6))
    box(ax, 4.75, 2.6, 0.8, "mean", SHADE)


def misr(ax: Axes) -> None:
    """Draws MISR: three 1x1 convolutions and one shared block."""
    title(ax, 9.3, "MISR (MISRNet)", "three 1x1 convolutions, one shared block")
    box(ax, 6.3, 2.6, 0.7, "x", SHADE)
    for y, color in zip((3.5, 2.6, 1.7), BLOCKS, strict=True):
        arrow(ax, (6.65, 2.6), (7.2, y))
        box(ax, 7.6, y, 0.8, "1x1", color)
        arrow(ax, (8.0, y), (8.65, 2.6 + (y - 2.6) * 0.25))
        arrow(ax, (10.75, 2.6 + (y - 2.6) * 0.25), (11.45, 2.6))
    box(ax, 9.7, 2.6, 2.1, "block, kernel 11", SHARED)
    box(ax, 11.85, 2.6, 0.8, "mean", SHADE)


def tensor(ax: Axes, x: float, colors: tuple[str, ...], shape: str, gap: float) -> None:
    """Draws slabs of C channels, `gap` apart, and their shape below."""
    height = 0.3
    for i, color in enumerate(colors):
        y = 0.5 + ((len(colors) - 1) / 2 - i) * (height + gap)
        ax.add_patch(plt.Rectangle((x - 0.7, y - height / 2), 1.4, height, fc=color, ec="white"))
    ax.text(x, -0.45, shape, ha="center", fontsize=9, family="monospace", color=INK)


def reshape(ax: Axes) -> None:
    """Draws the tensors on the way through MISR."""
    stations = (
        (0.9, (SHADE,), "[B, C, T]", 0.0),
        (3.9, BLOCKS, "[B, N*C, T]", 0.0),
        (6.9, BLOCKS, "[B*N, C, T]", 0.12),
        (9.4, (SHARED,) * 3, "[B*N, C, T]", 0.12),
        (11.9, (SHADE,), "[B, C, T]", 0.0),
    )
    for station in stations:
        tensor(ax, *station)
    steps = ("one 1x1\nconvolution", "reshape", "block,\nonce", "mean\nover N")
    for (left, *_), (right, *_), text in zip(stations, stations[1:], steps, strict=False):
        arrow(ax, (left + 0.8, 0.5), (right - 0.8, 0.5))
        ax.text((left + right) / 2, 0.62, text, ha="center", va="bottom", fontsize=8.5, color=INK)


def main() -> None:
    """Writes the diagram beside this file."""
    matplotlib.use("agg")
    figure, ax = plt.subplots(figsize=(10, 4.7))
    mrf(ax)
    misr(ax)
    reshape(ax)
    ax.set(xlim=(-0.1, 12.8), ylim=(-0.7, 5.2), aspect="equal")
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
