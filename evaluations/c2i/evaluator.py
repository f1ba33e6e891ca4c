"""Measure samples against a reference batch: the published Inception Score, FID, sFID, precision and recall.

    python3 evaluations/c2i/evaluator.py REFERENCE.npz SAMPLES.npz [MORE.npz ...]

The network is the published Inception, in torch, downloaded on first use; --network NETWORK.pt2 measures in the features
of one's own. The figures are printed, and left beside each samples file: the lines in SAMPLES.txt, everything in
SAMPLES.metrics.json. README.md beside this file says what the figures mean and which may be compared.
"""

import argparse
import json
import os
import platform
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from evaluations.c2i import checks, metrics, reference_cache, report
from evaluations.c2i.download import inception_path
from evaluations.c2i.features import Extracted, Eye, Network, extract
from evaluations.c2i.inception import BACKENDS, InceptionNetwork
from evaluations.c2i.manifold import NEIGHBOURS, Manifold, precision_recall
from evaluations.c2i.metrics import SPLIT, Moments
from utils import cli
from utils.cli import InputError
from utils.distributed import world
from utils.files import sha256
from utils.samples import Samples

FORMAT = 2  # of metrics.json
STATISTICS = {
    "pool": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
}  # in a file, as ADM's reference batches have them


def npz(text: str) -> Path:
    """argparse type: the name of an .npz file, because the figures' files take theirs from it."""
    path = Path(text)
    if path.suffix != ".npz":
        raise argparse.ArgumentTypeError(f"expected a file that ends in .npz, got {text}")
    return path


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("reference", type=npz, help="what the samples are compared with: an .npz with arr_0 (uint8, NHWC); statistics in it "
        "(mu, sigma, mu_s, sigma_s) serve FID and sFID, as published")  # fmt: skip
    add("samples", type=npz, nargs="+", help="of the same form and size, labels in arr_1")
    add("--network", type=Path, help="an exported network (.pt2) instead of Inception; train_classifier.sh makes one")
    add("--inception", type=Path, help="classify_image_graph_def.pb; default: here, or downloaded once")
    add("--backend", choices=BACKENDS, default="torch", help="what runs Inception; tensorflow runs the graph itself")
    add("--batch-size", type=cli.positive_int, help="default: one that suits the network and the device")
    add("--pr-images", type=cli.positive_int, default=50000,
        help="at most so many of each file, evenly spaced, enter precision and recall")  # fmt: skip
    add("--float16-distances", action="store_true",
        help="precision and recall with the published evaluator's rounding, bit for bit, instead of exact ones")  # fmt: skip
    add("--kid", action="store_true", help="also KID, over 100 subsets of 1,000 images")
    add("--force", action="store_true", help="measure what is refused otherwise: other sizes, images of one colour")
    args = parser.parse_args()
    if args.network and (args.inception or args.backend != "torch"):
        raise InputError("--network is another network than Inception: leave out --inception and --backend")
    return args


@dataclass
class File:
    """A samples file that is open and checked."""

    images: Samples
    given: dict[str, Moments]  # statistics that it brings along, of Inception's features
    remarks: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        with timed(self.seconds, "hash"):
            return sha256(self.images.path)

    def about(self, m: int) -> dict[str, Any]:
        """What this file is, for the record."""
        labels = self.images.labels
        return {
            "file": self.images.path.name, "sha256": self.sha256, "images": len(self.images),
            "precision_recall_images": m, "statistics": "given" if self.given else "computed",
        } | ({} if labels is None else {"labels": metrics.class_counts(labels)})  # fmt: skip


def given_statistics(path: Path, network: Eye) -> dict[str, Moments]:
    """Statistics of Inception's features that a file holds; none for another network. InputError for what they cannot be."""
    if not network.spatial_dimensions:
        return {}
    sizes = {"pool": network.dimensions, "spatial": network.spatial_dimensions}
    try:
        with np.load(path) as file:
            if "mu" not in file:
                return {}
            found = {part: Moments.given(*(file[key] for key in keys)) for part, keys in STATISTICS.items()}
    except KeyError as error:
        raise InputError(f"{path} holds mu, but not all of sigma, mu_s and sigma_s ({error})") from None
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds statistics that cannot be used: {error}") from None
    for part, moments in found.items():
        if moments.dimensions != sizes[part]:
            raise InputError(
                f"{path} holds {STATISTICS[part][0]} of {moments.dimensions} values, expected {sizes[part]}"
            )
    return found


@dataclass
class Inputs:
    """Everything the command line names, opened and checked."""

    reference: File
    samples: list[File]
    network: Eye

    @classmethod
    def open(cls, args: Namespace, device: torch.device) -> "Inputs":
        """Raises InputError for whatever would stop the work later."""
        reference, *files = (Samples(path) for path in (args.reference, *args.samples))
        fits = [checks.check_fit(file, reference, args.force) for file in (reference, *files)]
        for folder in {file.path.parent for file in files}:
            if not os.access(folder, os.W_OK):
                raise InputError(f"{folder} cannot be written to, but figures go beside their samples: copy them")
        if args.pr_images <= NEIGHBOURS:
            raise InputError(f"--pr-images: expected at least {NEIGHBOURS + 1}, got {args.pr_images}")
        network = load_network(args, device)
        for file in (reference, *files):
            network.check_size(file)
        opened = [File(file, given_statistics(file.path, network), fit)
                  for file, fit in zip((reference, *files), fits, strict=True)]  # fmt: skip
        for file in opened:
            file.remarks += checks.few_images(file.images, network, bool(file.given))
        opened[0].remarks += checks.validation_reference(reference, bool(opened[0].given))
        return cls(opened[0], opened[1:], network)


def load_network(args: Namespace, device: torch.device) -> Eye:
    if args.network:
        return Network.load(args.network, device)
    return InceptionNetwork(inception_path(args.inception), device, args.backend)


class Features:
    """A file in the network's features, and what is computed of it once."""

    def __init__(self, file: File, extracted: Extracted, pool: Moments | None, args: Namespace, network: Eye) -> None:
        self.file, self.extracted, self.device = file, extracted, network.device
        self.float16, self._pool = args.float16_distances, pool
        n, m = len(extracted.features_ND), min(len(extracted.features_ND), args.pr_images)
        spaced = np.arange(m) * n // m if m < n else slice(None)  # all of them are no copy
        self.spaced_MD = extracted.features_ND[spaced]  # for precision and recall

    @cached_property
    def pool(self) -> Moments:
        return self.file.given.get("pool") or self._pool or metrics.moments_of(self.extracted.features_ND, self.device)

    @property
    def spatial(self) -> Moments | None:
        return self.file.given.get("spatial") or self.extracted.spatial

    @cached_property
    def manifold(self) -> Manifold:
        return Manifold(self.spaced_MD, device=self.device, float16=self.float16)

    def class_accuracy(self) -> float | None:
        """None without labels, with labels that are no classes of the network, and for Inception, which has its own."""
        labels, logits_NC = self.file.images.labels, self.extracted.logits_NC
        if self.extracted.spatial or labels is None or labels.min() < 0 or labels.max() >= logits_NC.shape[1]:
            return None
        return metrics.class_accuracy(logits_NC, labels)


def reference_features(inputs: Inputs, args: Namespace) -> Features:
    """The reference in the network's features: from the cache, or computed and put there."""
    file, network = inputs.reference, inputs.network
    entry = reference_cache.entry_path(network, file.sha256)
    with timed(file.seconds, "features"):
        found = reference_cache.load(entry, network)
        if found is None:
            extracted = extract(network, file.images, args.batch_size or network.batch_size, logits=False)
            found = extracted, metrics.moments_of(extracted.features_ND, network.device)
            reference_cache.store(entry, *found)
    return Features(file, *found, args, network)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long a block takes."""
    start = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - start, 3)


def compare(reference: Features, samples: Features, kid: bool) -> dict[str, float]:
    """All figures of the samples; how long each took is added to their file's `seconds`."""
    seconds, found, logits_NC = samples.file.seconds, {}, samples.extracted.logits_NC
    with timed(seconds, "inception_score"):
        found["inception_score"] = metrics.inception_score(logits_NC, SPLIT)
        found["inception_score_shuffled"] = metrics.inception_score(logits_NC, SPLIT, shuffle_seed=0)
        found["inception_score_one_split"] = metrics.inception_score(logits_NC, None)
    with timed(seconds, "fid"):
        found["fid"] = metrics.frechet_distance(reference.pool, samples.pool)
    if reference.spatial and samples.spatial:
        with timed(seconds, "sfid"):
            found["sfid"] = metrics.frechet_distance(reference.spatial, samples.spatial)
    with timed(seconds, "precision_recall"):
        found["precision"], found["recall"] = precision_recall(reference.manifold, samples.manifold)
    if kid:
        with timed(seconds, "kid"):
            features = reference.extracted.features_ND, samples.extracted.features_ND
            found["kid"], found["kid_deviation"] = metrics.kernel_distance(*features, device=samples.device)
    accuracy = samples.class_accuracy()
    return found if accuracy is None else found | {"class_accuracy": accuracy}


def settings_of(inputs: Inputs, file: File, args: Namespace) -> dict[str, Any]:
    """All that figures depend on, as plain data: where it is equal, they are."""
    network, reference = inputs.network, inputs.reference
    return {
        "format": FORMAT,
        "network": {
            "name": network.name, "backend": network.backend, "file": network.path.name, "sha256": network.sha256,
            "dimensions": network.dimensions, "classes": network.classes,
        },
        "reference": reference.about(min(len(reference.images), args.pr_images)),
        "samples": file.about(min(len(file.images), args.pr_images)),
        "neighbours": NEIGHBOURS,
        "split": SPLIT,
        "float16_distances": args.float16_distances,
        "kid": args.kid,
    }  # fmt: skip


def measured_before(path: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """The figures that a file's record holds, if they were measured with these settings."""
    try:
        content = json.loads(path.with_suffix(".metrics.json").read_text())
        figures = {key: float(value) for key, value in content["metrics"].items()}
        return figures if {key: content.get(key) for key in settings} == settings else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def measure(
    inputs: Inputs, reference: Features, file: File, args: Namespace, settings: dict[str, Any]
) -> dict[str, float]:
    """Figures of a file; its record is written, and what there is to say about them is said."""
    network = inputs.network
    with timed(file.seconds, "features"):
        extracted = extract(network, file.images, args.batch_size or network.batch_size)
    figures = compare(reference, Features(file, extracted, None, args, network), args.kid)
    found = checks.same_images(file.images, extracted, reference.file.images, reference.extracted)
    found += checks.order_of_samples(file.images, figures)
    say(found)
    content = {
        "metrics": figures, **settings,
        "device": str(network.device),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "warnings": inputs.reference.remarks + file.remarks + found,
        "seconds": {"reference_features": reference.file.seconds["features"], **file.seconds},
    }  # fmt: skip
    report.write(file.images.path, report.figure_lines(figures, network.name), content)
    return figures


def say(remarks: list[str]) -> None:
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr, flush=True)


def main() -> None:
    args = parse()
    with world() as here:
        inputs = Inputs.open(args, here.device)
        say([remark for file in (inputs.reference, *inputs.samples) for remark in file.remarks])
        reference, name, rows = None, inputs.network.name, []
        for file in inputs.samples:
            path, settings = file.images.path, settings_of(inputs, file, args)
            figures = measured_before(path, settings)
            print(f"{path}:{'' if figures is None else ' (measured before)'}", flush=True)
            if figures is None:
                reference = reference or reference_features(inputs, args)
                figures = measure(inputs, reference, file, args, settings)
            print("\n".join(report.figure_lines(figures, name)), flush=True)
            rows.append((path, len(file.images), figures))
    if len(rows) > 1:
        print(report.table([(path.name, n, figures) for path, n, figures in rows], name))
    for path, scales in report.sweeps([(path, figures) for path, _, figures in rows]).items():
        report.draw_sweep(path, scales, name)
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
