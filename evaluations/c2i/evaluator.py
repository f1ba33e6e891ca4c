"""Measure samples against a reference batch, in the features of a network of your choice.

    python3 evaluations/c2i/evaluator.py REFERENCE.npz SAMPLES.npz [MORE.npz ...] --network NETWORK.pt2

Prints Inception Score, FID, precision, recall and, where there are labels, class accuracy, under the network's name, and
leaves them beside each samples file: the lines in SAMPLES.txt, everything in SAMPLES.metrics.json. README.md beside this
file says what the figures mean and which may be compared.
"""

import argparse
import os
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from evaluations.c2i import metrics
from evaluations.c2i.features import Network, extract
from evaluations.c2i.metrics import NEIGHBOURS, SPLIT, Manifold, Moments
from utils import cli
from utils.cli import InputError
from utils.distributed import world
from utils.files import atomic_path, sha256, write_json
from utils.samples import Samples

PER_DIMENSION = 10  # images a feature dimension, below which a covariance is too rough to go unmentioned
LABELS = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "precision": "Precision",
    "recall": "Recall",
    "class_accuracy": "Class accuracy",
}


def npz(text: str) -> Path:
    """argparse type: the name of an .npz file, because the figures' files take theirs from it."""
    path = Path(text)
    if path.suffix != ".npz":
        raise argparse.ArgumentTypeError(f"expected a file that ends in .npz, got {text}")
    return path


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("reference", type=npz, help="what the samples are compared with: an .npz with arr_0 (uint8, NHWC)")
    add("samples", type=npz, nargs="+", help="of the same form and size; labels in arr_1, if any, give class accuracy")
    add("--network", type=Path, required=True, help="an exported network (.pt2); train_classifier.sh makes one")
    add("--batch-size", type=cli.positive_int, default=256)
    add("--pr-images", type=cli.positive_int, default=50000,
        help="at most so many of each file, evenly spaced, enter precision and recall")  # fmt: skip
    return parser.parse_args()


@dataclass(frozen=True)
class Inputs:
    """Everything the command line names, opened and checked."""

    reference: Samples
    samples: list[Samples]
    network: Network
    sha256: dict[Path, str]

    @classmethod
    def open(cls, args: Namespace, device: torch.device) -> "Inputs":
        """Raises InputError for whatever would stop the work later."""
        reference, samples = Samples(args.reference), [Samples(path) for path in args.samples]
        network = Network.load(args.network, device)
        for file in (reference, *samples):
            check_fit(file, reference)
            network.check_size(file)
        for folder in {file.path.parent for file in samples}:
            if not os.access(folder, os.W_OK):
                raise InputError(f"{folder} cannot be written to, but figures go beside their samples: copy them")
        if args.pr_images <= NEIGHBOURS:
            raise InputError(f"--pr-images: expected at least {NEIGHBOURS + 1}, got {args.pr_images}")
        return cls(reference, samples, network, {file.path: sha256(file.path) for file in (reference, *samples)})


def check_fit(file: Samples, reference: Samples) -> None:
    """InputError for images of another size than the reference's, and for too few."""
    n, height, width, _ = file.shape
    _, wanted_height, wanted_width, _ = reference.shape
    if (height, width) != (wanted_height, wanted_width):
        raise InputError(
            f"{file.path} holds images of {height}x{width}, {reference.path} of {wanted_height}x{wanted_width}: "
            "compare images of one size"
        )
    if n <= NEIGHBOURS:
        raise InputError(f"{file.path} holds {n} images; expected at least {NEIGHBOURS + 1}, better thousands")


def remarks(inputs: Inputs) -> list[str]:
    """What makes figures of these files less than they seem."""
    found = []
    enough = PER_DIMENSION * inputs.network.dimensions
    for file in (inputs.reference, *inputs.samples):
        if len(file) < enough:
            found.append(
                f"{file.path} holds {len(file)} images, fewer than {PER_DIMENSION} for each of the "
                f"{inputs.network.dimensions} features: FID is biased upwards, compare it at equal numbers only"
            )
    for file in inputs.samples:
        if inputs.sha256[file.path] == inputs.sha256[inputs.reference.path]:
            found.append(f"{file.path} is the reference, byte for byte")
        if len(file) > SPLIT and file.labels is not None and (np.diff(file.labels) >= 0).all():
            found.append(
                f"{file.path} is sorted by class, so its Inception Score, by splits of {SPLIT} in order as published, "
                "is too low: see inception_score_shuffled in its metrics.json"
            )
    return found


class Features:
    """A file in the network's features, and what is computed of it once; `seconds` is how long its phases took."""

    def __init__(self, file: Samples, network: Network, args: Namespace) -> None:
        self.file, self.device, self.seconds = file, network.device, {}
        with timed(self.seconds, "features"):
            self.all_ND, self.logits_NC = extract(network, file, args.batch_size)
        n, m = len(file), min(len(file), args.pr_images)
        self.spaced_MD = self.all_ND[np.arange(m) * n // m]  # for precision and recall

    @cached_property
    def moments(self) -> Moments:
        return metrics.moments_of(self.all_ND)

    @cached_property
    def manifold(self) -> Manifold:
        return Manifold(self.spaced_MD, device=self.device)

    def class_accuracy(self) -> float | None:
        """None without labels, or with labels that are no classes of the network."""
        labels = self.file.labels
        if labels is None or labels.min() < 0 or labels.max() >= self.logits_NC.shape[1]:
            return None
        return metrics.class_accuracy(self.logits_NC, labels)

    def about(self, inputs: Inputs) -> dict[str, Any]:
        """What this file is, for the record."""
        return {
            "file": self.file.path.name, "sha256": inputs.sha256[self.file.path], "images": len(self.file),
            "precision_recall_images": len(self.spaced_MD),
        }  # fmt: skip


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long a block takes."""
    start = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - start, 3)


def compare(reference: Features, samples: Features) -> dict[str, float]:
    """All figures of the samples; how long each took is added to their `seconds`."""
    seconds, found = samples.seconds, {}
    with timed(seconds, "inception_score"):
        found["inception_score"] = metrics.inception_score(samples.logits_NC, SPLIT)
        found["inception_score_shuffled"] = metrics.inception_score(samples.logits_NC, SPLIT, shuffle_seed=0)
    with timed(seconds, "fid"):
        found["fid"] = metrics.frechet_distance(reference.moments, samples.moments)
    with timed(seconds, "precision_recall"):
        found["precision"] = reference.manifold.coverage(samples.spaced_MD)
        found["recall"] = samples.manifold.coverage(reference.spaced_MD)
    accuracy = samples.class_accuracy()
    return found if accuracy is None else found | {"class_accuracy": accuracy}


def record(inputs: Inputs, reference: Features, samples: Features, found: dict[str, float]) -> dict[str, Any]:
    """The figures and all that they depend on, as plain data."""
    network = inputs.network
    return {
        "metrics": found,
        "network": {
            "name": network.name, "file": network.path.name, "sha256": network.sha256,
            "dimensions": network.dimensions, "classes": network.classes,
        },
        "reference": reference.about(inputs),
        "samples": samples.about(inputs),
        "neighbours": NEIGHBOURS,
        "split": SPLIT,
        "device": str(network.device),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "seconds": {"reference_features": reference.seconds["features"], **samples.seconds},
    }  # fmt: skip


def published_lines(found: dict[str, float], name: str) -> list[str]:
    """Lines in the published evaluator's form, with the network's name in each label."""
    return [f"{label}({name}): {found[key]:.4f}" for key, label in LABELS.items() if key in found]


def table(rows: list[tuple[Samples, dict[str, float]]], name: str) -> str:
    """A line a file."""
    widths = {key: max(len(label), 9) for key, label in LABELS.items()}
    lines = ["  ".join([" images", *(label.rjust(widths[key]) for key, label in LABELS.items()), "file"])]
    for file, found in rows:
        cells = [(f"{found[key]:.4f}" if key in found else "-").rjust(width) for key, width in widths.items()]
        lines.append("  ".join([str(len(file)).rjust(7), *cells, file.path.name]))
    return "\n".join([f"In the features of {name}:", *lines])


def report(path: Path, lines: list[str], content: dict[str, Any]) -> None:
    """Print a file's lines, and write them and the record beside it."""
    print("\n".join([f"{path}:", *lines]), flush=True)
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    write_json(path.with_suffix(".metrics.json"), content)


def main() -> None:
    args = parse()
    with world() as here:
        inputs = Inputs.open(args, here.device)
        for remark in remarks(inputs):
            print(f"warning: {remark}", file=sys.stderr, flush=True)
        reference, name, rows = Features(inputs.reference, inputs.network, args), inputs.network.name, []
        for file in inputs.samples:
            samples = Features(file, inputs.network, args)
            found = compare(reference, samples)
            rows.append((file, found))
            report(file.path, published_lines(found, name), record(inputs, reference, samples, found))
    if len(rows) > 1:
        print(table(rows, name))


if __name__ == "__main__":
    cli.run(main)
