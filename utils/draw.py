"""Pictures: grids of images with labelled rows, and line charts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.cli import InputError
from utils.files import atomic_path

LONGEST_LABEL = 100  # characters
MOST_PIXELS = 1 << 29  # of a picture: 1.5 GB
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of pictures that are written


def label_text(name: str) -> str:
    """A name from a file or a path as a label: one short line, without bytes that are no UTF-8."""
    line = " ".join(name.encode("utf-8", "replace").decode("utf-8", "replace").split())
    return line if len(line) <= LONGEST_LABEL else line[: LONGEST_LABEL - 3] + "..."


def image_grid(images: np.ndarray, columns: int, row_names: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """uint8 images (N, H, W, 3), row by row, enlarged `scale` times; `row_names` stand under the rows.

    Raises InputError for a picture of more than half a gigapixel.
    """
    n, height, width, _ = images.shape
    rows, gap = -(-n // columns), 2
    font = ImageFont.load_default(size=max(10, min(16, height * scale // 4)))
    line = sum(font.getmetrics()) + gap if row_names else 0
    cell_h, cell_w = height * scale + gap + line, width * scale + gap
    names = [label_text(name) for name in row_names[:rows]]
    page_w = max([columns * cell_w + gap, *(int(font.getlength(name)) + 3 * gap for name in names)])
    page_h = rows * cell_h + gap
    if page_w * page_h > MOST_PIXELS:
        raise InputError(
            f"a picture of {page_w} x {page_h} pixels is too large: give a smaller --scale or fewer images"
        )
    page = Image.new("RGB", (page_w, page_h), "white")
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(tile, (gap + column * cell_w, gap + row * cell_h))
    for row, name in enumerate(names):
        draw.text((2 * gap, (row + 1) * cell_h - line), name, fill="black", font=font)
    return page


def save_image(path: str | Path, image: Image.Image) -> None:
    """Write a picture atomically. Raises InputError for one that is too large for its format."""
    with atomic_path(path) as temporary:
        try:
            image.save(temporary)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise InputError(
                f"{path}: {image.width} x {image.height} pixels cannot be written in this format ({error}): give a name that "
                "ends in .png, or draw fewer or smaller images"
            ) from None


def plain_label(name: str) -> str:
    """A label for matplotlib, which takes what is between dollar signs for a formula."""
    return label_text(name).replace("$", r"\$")


def curves(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    boundaries: Mapping[float, str] = MappingProxyType({}),
    rings: tuple[Sequence[float], Sequence[float]] = ((), ()),
    y_most: float | None = None,
) -> None:
    """Write a line chart: label -> (xs, ys). Boundaries are vertical lines at x with a word to their right.

    rings: points (xs, ys) to mark. y_most: where the chart ends above; by default nothing is cut off.
    """
    from matplotlib.figure import Figure  # here, so that stages that draw no chart don't pay for it

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, (xs, ys) in series.items():
        axes.plot(xs, ys, label=plain_label(label), linewidth=1.6, marker="o" if len(xs) < 30 else None, markersize=4)
    axes.scatter(*rings, s=90, facecolors="none", edgecolors="black", zorder=3)
    for x, word in boundaries.items():
        axes.axvline(x, color="grey", linewidth=1, linestyle=":")
        axes.annotate(word, (x, 0), xycoords=("data", "axes fraction"), xytext=(4, 5), textcoords="offset points")
    axes.set(xlabel=x_label, ylabel=y_label, title=plain_label(title))
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)  # room for the boundaries' words
    if y_most is not None:
        least = min(y for _, ys in series.values() for y in ys)
        axes.set_ylim(least - 0.06 * (y_most - least), y_most)
    if len(series) > 1:
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
