"""How figures are printed: the published evaluator's lines, a table of several files, a chart of a CFG sweep."""

import re
from pathlib import Path
from typing import Any

from utils.draw import plain_label
from utils.files import atomic_path
from utils.records import Record

LABELS = {
    "inception_score": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall",
    "kid": "KID", "class_accuracy": "Class accuracy",
}  # fmt: skip
PUBLISHED = "Inception"  # figures of this network are called as papers call them
CFG = re.compile(r"(?<![a-z])cfg-(\d+(?:\.\d+)?)")


def figure_lines(figures: dict[str, float], network: str) -> list[str]:
    """A line a figure, in the published evaluator's form and order; other networks stand in the label."""
    known = {key: label for key, label in LABELS.items() if key in figures}
    if network == PUBLISHED:
        return [f"{label}: {figures[key]}" for key, label in known.items()]
    return [f"{label}({network}): {figures[key]:.4f}" for key, label in known.items()]


def table(rows: list[tuple[str, int, dict[str, float]]], network: str) -> str:
    """A line a file: its name, number of images and figures."""
    known = {key: label for key, label in LABELS.items() if any(key in figures for _, _, figures in rows)}
    widths = {key: max(len(label), 9) for key, label in known.items()}
    lines = ["  ".join([" images", *(label.rjust(widths[key]) for key, label in known.items()), "file"])]
    for name, images, figures in rows:
        cells = [(f"{figures[key]:.4f}" if key in figures else "-").rjust(width) for key, width in widths.items()]
        lines.append("  ".join([str(images).rjust(7), *cells, name]))
    return "\n".join([f"In the features of {network}:", *lines])


class MetricsRecord(Record):
    """SAMPLES.metrics.json: the figures, all that they depend on, and how they came about."""

    metrics: dict[str, float]
    format: int
    network: dict[str, Any]
    reference: dict[str, Any]
    samples: dict[str, Any]
    neighbours: int
    split: int
    float16_distances: bool
    kid: bool
    device: str
    versions: dict[str, str]
    warnings: list[str]
    seconds: dict[str, float]


def output_paths(samples: Path) -> tuple[Path, Path]:
    """Where the lines and the record of a samples file, or of a folder of images, go: beside it."""
    name = samples.name if samples.is_dir() else samples.stem
    return samples.with_name(f"{name}.txt"), samples.with_name(f"{name}.metrics.json")


def write(samples: Path, lines: list[str], record: MetricsRecord) -> None:
    """The lines into SAMPLES.txt and the record into SAMPLES.metrics.json."""
    text, metrics = output_paths(samples)
    with atomic_path(text) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    record.write(metrics)


def sweeps(rows: list[tuple[Path, dict[str, float]]]) -> dict[Path, dict[float, dict[str, float]]]:
    """Files that differ in the CFG scale of their names only, if there are several: chart's path -> scale -> figures."""
    found: dict[Path, dict[float, dict[str, float]]] = {}
    for path, figures in rows:
        if match := CFG.search(path.stem):
            name = CFG.sub("cfg-sweep", path.stem, count=1)
            found.setdefault(path.with_name(f"{name}.png"), {})[float(match[1])] = figures
    return {path: dict(sorted(scales.items())) for path, scales in found.items() if len(scales) > 1}


def draw_sweep(path: Path, scales: dict[float, dict[str, float]], network: str) -> None:
    """FID and Inception Score over the CFG scale, and FID over Inception Score with the scale at each point."""
    from matplotlib.figure import Figure  # here, as most calls draw nothing

    xs, fids = list(scales), [figures["fid"] for figures in scales.values()]
    scores = [figures["inception_score"] for figures in scales.values()]
    panels = (
        ("CFG scale", xs, "FID", fids), ("CFG scale", xs, "Inception Score", scores), ("Inception Score", scores, "FID", fids),
    )  # fmt: skip
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    for axes, (x_label, x, y_label, y) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y, marker="o")
        axes.set(xlabel=x_label, ylabel=y_label)
    for scale, x, y in zip(xs, scores, fids, strict=True):
        axes.annotate(f"{scale:g}", (x, y), xytext=(5, 4), textcoords="offset points")
    axes.set_title("CFG scale at each point")
    best = min(scales, key=lambda scale: scales[scale]["fid"])
    figure.suptitle(f"In the features of {plain_label(network)}; lowest FID {scales[best]['fid']:.2f} at {best:g}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
