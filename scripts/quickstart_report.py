"""The quickstart's last step: RUN/report.md, with RUN/loss.png, from what the stages left in their folders.

python scripts/quickstart_report.py runs/quickstart
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from autoregressive.train.schedule import patch_stages, relative_cost
from scripts.benchmark.card import card
from utils import cli
from utils.files import atomic_path
from utils.log import read_metrics

STAGES = {
    "data": "Fashion-MNIST as an ImageFolder",
    "reference": "reference batch of training images",
    "test_images": "batch of test images",
    "classifier": "classifier, the eye of the evaluation",
    "tokenizer": "tokenizer",
    "reconstruct": "reconstructions of test images",
    "codes": "codes of the training images",
    "test_codes": "codes of the test images",
    "train": "GPT, by Next Patch Prediction",
    "sample": "samples",
    "grid": "samples.png",
    "evaluate": "evaluation",
}


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise cli.InputError(f"there is no {path}: run scripts/quickstart.sh with this RUN first")
    return json.loads(path.read_text())


def only(folder: Path, pattern: str) -> Path:
    """The last file of a pattern; runs are numbered, so that is the newest."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise cli.InputError(f"there is no {folder / pattern}: run scripts/quickstart.sh with this RUN first")
    return found[-1]


def figures_table(run: Path) -> list[str]:
    """Samples beside reconstructions and real test images, in the classifier's features."""
    samples = only(run / "samples", "*.metrics.json")
    rows = {"samples": samples, "tokenizer's reconstructions of test images": run / "reconstructions.metrics.json",
            "test images": run / "test.metrics.json"}  # fmt: skip
    found = {name: read_json(path) for name, path in rows.items()}
    network = found["samples"]["network"]["name"]
    lines = [
        f"| images | number | FID ({network}) | Inception Score | precision | recall | share in the class asked for |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, content in found.items():
        m, n = content["metrics"], content["samples"]["images"]
        lines.append(
            f"| {name} | {n:,} | {m['fid']:.2f} | {m['inception_score']:.2f} | {m['precision']:.3f} | {m['recall']:.3f} "
            f"| {m['class_accuracy']:.1%} |"
        )
    ratio = found["samples"]["metrics"]["fid"] / list(found.values())[1]["metrics"]["fid"]
    reference = found["samples"]["reference"]["images"]
    return [
        *lines, "",
        f"Against {reference:,} training images. These distances are measured in the features of the quickstart's own "
        f"classifier ({network}): they say nothing beside Inception's. FID of the samples over that of the "
        f"reconstructions, which no sampler of these codes can be expected to beat: {ratio:.1f}.",
    ]  # fmt: skip


def loss_at(rows: list[dict[str, Any]], key: str, patch: int, first: bool = False) -> str:
    values = [row[key] for row in rows if row["patch"] == patch and key in row]
    return f"{values[0 if first else -1]:.3f}" if values else ""


def schedule_table(args: dict[str, Any], rows: list[dict[str, Any]], tokens: int) -> list[str]:
    """A row a level: its epochs and losses."""
    stages = patch_stages(args["epochs"], args["patch_level"], args["epoch_rate"])
    lines = [
        "| patches | epochs | positions an image | loss on patches, first to last | validation, single codes (EMA) |",
        "|---|---|---|---|---|",
    ]
    for s in stages:
        lines.append(
            f"| {s.patch}x{s.patch} | {s.start} to {s.stop} | {tokens // s.patch**2} "
            f"| {loss_at(rows, 'loss', s.patch, first=True)} to {loss_at(rows, 'loss', s.patch)} "
            f"| {loss_at(rows, 'val_loss', s.patch)} ({loss_at(rows, 'val_loss_ema', s.patch)}) |"
        )
    return [
        *lines, "",
        f"Losses are in nats a code. The plan costs {relative_cost(stages):.3f} of next-token training for as many epochs.",
    ]  # fmt: skip


def time_table(run: Path) -> list[str]:
    seconds = {name: int((run / "done" / name).read_text()) for name in STAGES}
    rows = [f"| {STAGES[name]} | {n} |" for name, n in seconds.items()]
    return ["| stage | seconds |", "|---|---|", *rows, f"| all, after installation | {sum(seconds.values())} |"]


def main() -> None:
    if len(sys.argv) != 2:
        cli.fail(f"expected the folder of a quickstart, got {' '.join(sys.argv[1:]) or 'nothing'}")
    run = Path(sys.argv[1])
    gpt = only(run, "gpt/*/metrics.jsonl").parent
    args = read_json(gpt / "run.json")["args"]
    manifest = read_json(only(run, "codes/train/*.json"))
    psnr = read_json(run / "reconstructions.json")["psnr"]
    accuracy = read_json(run / "test.metrics.json")["metrics"]["class_accuracy"]
    machine = card(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shutil.copyfile(gpt / "loss.png", run / "loss.png")
    lines = [
        "# Quickstart report", "",
        f"{time.strftime('%Y-%m-%d')}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"Python {machine['python']}.", "",
        "![Samples, a row a class](samples.png)", "",
        "## Figures", "", *figures_table(run), "",
        f"The classifier is right about {accuracy:.1%} of the test images. Tokenizer: {manifest['vq_model']}, "
        f"{manifest['tokens']} codes of {manifest['codebook_size']} an image, PSNR {psnr:.1f} on test images.", "",
        "## Schedule and losses", "",
        f"{args['gpt_model']}, batch {args['global_batch_size']}, {manifest['images']:,} images.", "",
        *schedule_table(args, read_metrics(gpt), manifest["tokens"]), "",
        "![Losses](loss.png)", "",
        "## Time", "", *time_table(run), "",
    ]  # fmt: skip
    with atomic_path(run / "report.md") as temporary:
        temporary.write_text("\n".join(lines))
    print("\n".join(lines))
    print(f"wrote {run / 'report.md'}; look at {run / 'samples.png'} and {run / 'loss.png'}")


if __name__ == "__main__":
    cli.run(main)
