"""A table and pictures of scripts/experiments/tokenizers.sh: RUN/report.md, from what its stages left in RUN.

python -m scripts.experiments.tokenizers_report runs/tokenizers
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmark.harness import card
from utils import cli, draw, records
from utils.distributed import best_device
from utils.files import atomic_path
from utils.samples import Samples

VARIANTS = ("plain", "plain-longer", "perceptual", "adversarial", "both")
COLUMNS = 12  # images in a picture


def row(run: Path, name: str) -> str:
    """A tokenizer's figures; its stages are done."""
    found = records.read_json(run / f"{name}.json")
    metrics = records.read_json(run / f"{name}.metrics.json")["metrics"]
    seconds = int((run / "done" / f"{name}-train").read_text().split("\n")[0])
    return (
        f"| {name} | {seconds} | {found['psnr']:.2f} | {found['ssim']:.4f} | {found['codebook_usage']:.1%} "
        f"| {found['perplexity']:.0f} | {metrics['fid']:.3f} |"
    )


def compare(run: Path, data: str, variants: Sequence[str]) -> None:
    """RUN/DATA.png: test images, and what became of them, a row a variant."""
    reference = Samples(run / f"{data}-{variants[0]}-reference.npz")
    step = max(1, len(reference) // COLUMNS)
    files = [reference, *(Samples(run / f"{data}-{variant}.npz") for variant in variants)]
    rows = [np.concatenate(list(file.batches(256)))[::step][:COLUMNS] for file in files]
    draw.save_image(run / f"{data}.png", draw.image_grid(np.concatenate(rows), len(rows[0]), ["images", *variants], 2))


def report(run: Path) -> str:
    """The table of every tokenizer that was measured; draws a picture of each set."""
    found: dict[str, list[str]] = {}
    for variant in VARIANTS:
        for mark in sorted((run / "done").glob(f"*-{variant}-evaluate")):
            found.setdefault(mark.name.removesuffix(f"-{variant}-evaluate"), []).append(variant)
    if not found:
        raise cli.InputError(
            f"{run} holds no finished tokenizer: run scripts/experiments/tokenizers.sh with this RUN first"
        )
    machine = card(best_device())
    lines = [
        "# Tokenizers", "",
        f"{time.strftime('%Y-%m-%d')}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}.", "",
        "| tokenizer | seconds of training | PSNR | SSIM | codes in use | perplexity | FD (classifier) |",
        "|---|---|---|---|---|---|---|",
        *(row(run, f"{data}-{variant}") for data, variants in found.items() for variant in variants), "",
        "FD compares the reconstructions of the test images with those images, in the features of a classifier that no "
        "tokenizer was trained with. The perceptual loss uses another one, with another seed.", "",
    ]  # fmt: skip
    for data, variants in found.items():
        compare(run, data, variants)
        lines += [f"## {data}", "", f"![A row a tokenizer]({data}.png)", ""]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2:
        cli.fail(f"expected the folder of an experiment, got {' '.join(sys.argv[1:]) or 'nothing'}")
    run = Path(sys.argv[1])
    text = report(run)
    with atomic_path(run / "report.md") as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
