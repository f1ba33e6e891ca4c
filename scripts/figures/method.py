"""Draw the method: patches of codes as positions, one distribution for the codes of the next patch, and the schedule.

    python -m scripts.figures.method [assets/method.png]

The share of the cost is computed by the schedule that trains.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from autoregressive.train.schedule import Level, patch_levels, relative_cost
from utils import cli
from utils.draw import SUFFIXES
from utils.files import atomic_path, check_output
from utils.settings import Settings, setting

WIDTH, HEIGHT, DPI = 10.0, 5.3, 160  # inches; everything below is placed in inches from the lower left corner
INK, SOFT, FAINT, MODEL, EDGE = "#24292f", "#59636e", "#dde2e8", "#dbe6f4", "#4a74ab"
LEVELS = ("#94bbe0", "#6b97c9", "#4a74ab")  # coarse to fine
EPOCHS, SIDE = 300, 16  # of the schedule: epochs, and codes along a side of an image

# A landscape of 4x4 codes: sky with a sun, mountains, meadow, water.
COLOURS = """
    #93b9df #a8c8e6 #f5cf7a #b9d4eb
    #bcd6ea #8d9fb5 #e2b3a1 #a5b4c2
    #8fb37c #6f9a69 #a5c08a #5f8a60
    #4d7f98 #6396aa #3f6d86 #79aaba
"""
PICTURE = np.array([to_rgb(colour) for colour in COLOURS.split()]).reshape(4, 4, 3)
PATCHES = [PICTURE[r : r + 2, c : c + 2].reshape(4, 3) for r in (0, 2) for c in (0, 2)]
CODES = list(PICTURE.reshape(16, 1, 3))


def text(axes: Axes, x: float, y: float, words: str, size: float = 9, color: str = INK, **options) -> None:
    options = {"ha": "center", "va": "center", "linespacing": 1.25, **options}
    axes.text(x, y, words, fontsize=size, color=color, **options)


def arrow(axes: Axes, x: float, bottom: float, top: float) -> None:
    style = {"arrowstyle": "-|>", "color": SOFT, "linewidth": 0.8, "mutation_scale": 5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, top), (x, bottom), arrowprops=style)


def cells(axes: Axes, x: float, y: float, colours: np.ndarray, size: float) -> None:
    """A square of K codes around (x, y), in raster order; `size` is the side of the whole."""
    side, gap = round(len(colours) ** 0.5), 0.015
    cell = size / side
    for k, colour in enumerate(colours):
        row, column = divmod(k, side)
        corner = (x - size / 2 + column * cell + gap / 2, y + size / 2 - (row + 1) * cell + gap / 2)
        axes.add_patch(Rectangle(corner, cell - gap, cell - gap, facecolor=colour, edgecolor="none"))


def distribution(axes: Axes, x: float, y: float, colours: np.ndarray, width: float, height: float) -> None:
    """Bars on y around x: one in its colour for each code that is scored, grey ones for the rest of the codebook."""
    step = width / (2 * len(colours) + 1)
    for i in range(2 * len(colours) + 1):
        if i % 2:
            colour, share = colours[i // 2], (0.8, 0.65, 1.0, 0.85)[i // 2]
        else:
            colour, share = FAINT, (0.15, 0.3, 0.4)[i // 2 % 3]
        axes.add_patch(Rectangle((x - width / 2 + (i + 0.1) * step, y), 0.8 * step, share * height, facecolor=colour))
    axes.plot([x - width / 2, x + width / 2], [y, y], color=SOFT, linewidth=0.7)


def level(axes: Axes, patches: list[np.ndarray], left: float, pitch: float, token: float) -> None:
    """The sequence of one level: what goes in below the model, what comes out and is scored above it."""
    xs = [left + pitch * (i + 0.5) for i in range(len(patches))]
    width, style = pitch * len(patches), "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch((left, 3.34), width, 0.4, boxstyle=style, facecolor=MODEL, edgecolor=EDGE, linewidth=1)
    )
    text(axes, left + width / 2, 3.54, "GPT", 11, weight="bold", color=EDGE)
    for i, (x, scored) in enumerate(zip(xs, patches, strict=True)):
        inside = "none" if i == 0 else patches[i - 1].mean(axis=0)
        axes.add_patch(Rectangle((x - token / 2, 2.8), token, 0.3, facecolor=inside, edgecolor=SOFT, linewidth=0.7))
        arrow(axes, x, 3.12, 3.32)
        arrow(axes, x, 3.76, 3.93)
        distribution(axes, x, 3.97, scored, 0.8 * pitch, 0.36)
        cells(axes, x, 4.62, scored, min(0.36, 0.82 * pitch))


def coarse(axes: Axes) -> None:
    """Left: blocks of 2x2 codes, their means, and the sequence they make."""
    text(axes, 0.25, 5.08, "Coarse: a patch of codes is one position", 10.5, weight="bold", ha="left")
    left, pitch, token = 2.2, 0.93, 0.5
    level(axes, PATCHES, left, pitch, token)
    xs = [left + pitch * (i + 0.5) for i in range(4)]
    for x, word in zip(xs, ("class", "p1", "p2", "p3"), strict=True):
        text(axes, x, 2.945, word, 8.5)
    for x, patch in zip(xs[1:], PATCHES, strict=False):
        cells(axes, x, 2.36, patch, 0.36)
        arrow(axes, x, 2.57, 2.77)
    text(axes, 2.1, 4.62, "scored against the\n4 codes of the next patch", 8.5, SOFT, ha="right")
    text(axes, 2.1, 4.12, "one distribution", 8.5, SOFT, ha="right")
    text(axes, xs[0] + 0.12, 2.36, "mean of 4\nembeddings", 8.5, SOFT)
    label = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for i, patch in enumerate(PATCHES):
        x, y = 0.62 + 0.68 * (i % 2), 3.3 - 0.68 * (i // 2)
        cells(axes, x, y, patch, 0.64)
        text(axes, x, y, f"p{i + 1}", 8, bbox=label)
    text(axes, 0.96, 2.12, "codes of an image", 8.5, SOFT)


def fine(axes: Axes) -> None:
    """Right: the same model on single codes."""
    text(axes, 6.35, 5.08, "Fine: the same GPT on single codes", 10.5, weight="bold", ha="left")
    left, pitch = 6.35, 0.213
    level(axes, CODES, left, pitch, 0.16)
    middle = left + pitch * len(CODES) / 2
    text(axes, middle, 2.5, "the class and 15 codes: 16 positions in place of 4,\nthe same weights", 8.5, SOFT)


def schedule(axes: Axes, levels: list[Level]) -> None:
    """Below: epochs to the right, positions an image upwards, so that the area is what training costs."""
    left, width, bottom, height = 0.96, 6.3, 0.52, 0.92
    text(axes, 0.25, 1.72, f"Schedule for {SIDE}×{SIDE} codes: the area is the cost", 10.5, weight="bold", ha="left")

    def at(epoch: int) -> float:
        return left + width * epoch / EPOCHS

    axes.add_patch(Rectangle((left, bottom), width, height, facecolor="#f6f8fa", edgecolor=SOFT, linewidth=0.8, ls=":"))
    for level, colour in zip(levels, LEVELS, strict=True):
        positions = (SIDE // level.patch) ** 2
        top = height * positions / SIDE**2
        x, wide = at(level.start), at(level.stop) - at(level.start)
        axes.add_patch(Rectangle((x, bottom), wide, top, facecolor=colour, edgecolor="white", linewidth=0.8))
        name = f"{level.patch}×{level.patch} patches" if level.patch > 1 else "single codes"
        full = level.patch == 1
        middle = bottom + (top / 2 if full else 0.45)
        text(axes, x + wide / 2, middle, f"{name}\n{positions} positions", 8.5, "white" if full else INK)
    for epoch in (0, *(level.stop for level in levels)):
        axes.plot([at(epoch)] * 2, [bottom - 0.05, bottom], color=SOFT, linewidth=0.8)
        text(axes, at(epoch), bottom - 0.16, str(epoch), 8.5, SOFT)
    text(axes, left + width / 2, bottom - 0.36, "epoch", 8.5, SOFT)
    text(axes, left + width / 4, bottom + height - 0.1, "next-token training", 8, SOFT)
    text(axes, left - 0.12, bottom + height, str(SIDE**2), 8.5, SOFT, ha="right")
    text(axes, left - 0.12, bottom, "0", 8.5, SOFT, ha="right")
    text(axes, left - 0.5, bottom + height / 2, "positions\nan image", 8.5, SOFT, rotation=90)
    text(axes, 8.55, bottom + 0.62, f"{relative_cost(levels):.3f}", 20, EDGE, weight="bold")
    text(axes, 8.55, bottom + 0.2, "of the cost of\nnext-token training", 9, SOFT)


class MethodSettings(Settings):
    """The settings of this drawing; see --help."""

    out: Path = setting(Path("assets/method.png"), "the picture", positional=True)


def main() -> None:
    out = check_output(MethodSettings.from_command_line(__doc__).out, SUFFIXES)
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    coarse(axes)
    fine(axes)
    schedule(axes, patch_levels(EPOCHS, 3, 0.5))
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata={"Software": None})
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
