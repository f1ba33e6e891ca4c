"""Inputs that make figures wrong or misleading: refused, or named in a remark."""

import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from evaluations.c2i.features import Extracted, FeatureNetwork, one_colour
from evaluations.c2i.manifold import NEIGHBOURS
from evaluations.c2i.metrics import SPLIT
from utils.cli import InputError
from utils.records import Record
from utils.samples import Samples

PER_DIMENSION = 10  # images a feature dimension, below which a covariance is too rough to go unmentioned
ENOUGH = 10_000  # images in Inception's features, likewise
LOOKED_AT = 64  # images of a file, before any work
ORDER_MATTERS = 0.01  # of the Inception Score
VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|test)(?![a-z])")


def refuse_unless(force: bool, message: str) -> list[str]:
    """InputError, or with --force a remark."""
    if not force:
        raise InputError(f"{message}; --force measures all the same")
    return [message]


def check_fit(file: Samples, reference: Samples, force: bool) -> list[str]:
    """Remarks. InputError for too few images and, without --force, for images of another size or of no content."""
    n, height, width, _ = file.shape
    _, wanted_height, wanted_width, _ = reference.shape
    if n <= NEIGHBOURS:
        raise InputError(f"{file.path} holds {n} images; expected at least {NEIGHBOURS + 1}, better thousands")
    found = []
    if (height, width) != (wanted_height, wanted_width):
        found += refuse_unless(
            force,
            f"{file.path} holds images of {height}x{width}, {reference.path} of {wanted_height}x{wanted_width}: "
            "compare images of one size"
            + (" (python -m evaluations.c2i.reference FOLDER OUT.npz crops them)" if file.path.is_dir() else ""),
        )
    first = next(file.batches(min(n, LOOKED_AT)))
    if one_colour(first).all():
        found += refuse_unless(force, f"the first {len(first)} images of {file.path} are of one colour each")
    return found


def few_images(file: Samples, network: FeatureNetwork, own_statistics: bool) -> list[str]:
    """Remarks on numbers of images that are too small for the network's features."""
    n, dimensions = len(file), network.dimensions
    enough = ENOUGH if network.spatial_dimensions else PER_DIMENSION * dimensions
    if own_statistics or n >= enough:
        return []
    if n <= dimensions:
        return [
            f"{file.path} holds {n} images, no more than the {dimensions} features: their covariance is rank-deficient, "
            "FID is then mostly what is missing of it; compare it at exactly equal numbers, if at all"
        ]
    wanted = f"{enough:,}" if network.spatial_dimensions else f"{PER_DIMENSION} for each of the {dimensions} features"
    return [
        f"{file.path} holds {n} images, fewer than {wanted}: FID is biased upwards, compare it at equal numbers only"
    ]


def statistics_only(reference: Samples, with_spatial: bool) -> list[str]:
    """A remark on what cannot be measured against a reference without images."""
    if len(reference):
        return []
    missing = "precision, recall and KID" if with_spatial else "sFID, precision, recall and KID"
    return [
        f"{reference.path} holds statistics and no images: {missing} cannot be measured; FID is right only if the statistics "
        "are of this Inception's features, as ADM's are"
    ]


class SourceRecord(Record):
    """What a reference's record says of where its images come from."""

    data_path: str = ""


def validation_reference(reference: Samples, own_statistics: bool) -> list[str]:
    """A remark if the reference seems to hold validation images, which rFID is measured against, FID of samples not."""
    names = [reference.path.stem]
    with suppress(InputError):  # a batch from elsewhere has no record, or another one
        names += Path(SourceRecord.read(reference.path.with_suffix(".json")).data_path).parts[-2:]
    by_name = any(VALIDATION.search(name.lower()) for name in names) and not any("train" in name for name in names)
    if not own_statistics and (by_name or _is_imagenet_validation(reference.labels)):
        return [
            f"{reference.path} seems to hold validation images: that is right for rFID, of reconstructions; FID of samples "
            "is published against the statistics of training images"
        ]
    return []


def _is_imagenet_validation(labels_N: np.ndarray | None) -> bool:
    """50 images of each of 1,000 classes."""
    return labels_N is not None and len(labels_N) == 50_000 and bool((np.bincount(labels_N.clip(0)) == 50).all())


def same_images(file: Samples, found: Extracted, reference: Samples, wanted: Extracted) -> list[str]:
    """Remarks on copies: of reference images, of each other, and images of one colour."""
    counts = {
        f"images of {reference.path}, pixel for pixel": np.isin(found.digests_N, wanted.digests_N).sum(),
        "copies of others in it": len(file) - len(np.unique(found.digests_N)),
        "of one colour": found.constant,
    }
    return [f"{n} of the {len(file)} images of {file.path} are {what}" for what, n in counts.items() if n]


def order_of_samples(file: Samples, figures: dict[str, float]) -> list[str]:
    """A remark if the published Inception Score depends on the order of the images."""
    published, shuffled = figures["inception_score"], figures["inception_score_shuffled"]
    if len(file) <= SPLIT or abs(published - shuffled) <= ORDER_MATTERS * shuffled:
        return []
    return [
        f"the Inception Score of {file.path}, by splits of {SPLIT} in order as published, is {published:.4f}; shuffled first "
        f"it is {shuffled:.4f}: the images are not in random order"
    ]
