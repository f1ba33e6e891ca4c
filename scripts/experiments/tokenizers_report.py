"""A table of scripts/experiments/tokenizers.sh: RUN/report.md, from what its stages left in RUN.

python -m scripts.experiments.tokenizers_report runs/tokenizers
"""

import sys
import time
from pathlib import Path

import torch

from scripts.benchmark.harness import card
from utils import cli, records
from utils.files import atomic_path

HEAD = (
    "| tokenizer | seconds of training | PSNR | SSIM | codes in use | perplexity | FD (classifier) |\n"
    "|---|---|---|---|---|---|---|"
)


def row(run: Path, name: str) -> str:
    """A tokenizer's figures; its stages are done."""
    found = records.read_json(run / f"{name}.json")
    metrics = records.read_json(run / f"{name}.metrics.json")["metrics"]
    seconds = int((run / "done" / f"{name}-train").read_text().split("\n")[0])
    return (
        f"| {name} | {seconds} | {found['psnr']:.2f} | {found['ssim']:.4f} | {found['codebook_usage']:.1%} "
        f"| {found['perplexity']:.0f} | {metrics['fid']:.3f} |"
    )


def report(run: Path) -> str:
    """The table and pictures of every tokenizer that was measured."""
    names = sorted(path.name.removesuffix("-evaluate") for path in (run / "done").glob("*-evaluate"))
    if not names:
        raise cli.InputError(
            f"{run} holds no finished tokenizer: run scripts/experiments/tokenizers.sh with this RUN first"
        )
    machine = card(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [
        "# Tokenizers", "",
        f"{time.strftime('%Y-%m-%d')}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}.", "",
        HEAD, *(row(run, name) for name in names), "",
        "FD compares the reconstructions of the test images with those images, in the features of a classifier that no "
        "tokenizer was trained with. The perceptual loss uses another one, with another seed.", "",
    ]  # fmt: skip
    for name in names:
        lines += [f"## {name}", "", f"![{name}]({name}.png)", ""]
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
