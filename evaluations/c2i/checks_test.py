"""Remarks on files whose figures would mislead."""

import json

import numpy as np
import pytest

from evaluations.c2i import checks
from evaluations.c2i.features import Extracted
from utils import samples
from utils.samples import Samples


class Sizes:
    """As much of a network as is asked for."""

    def __init__(self, dimensions: int, spatial_dimensions: int) -> None:
        self.dimensions, self.spatial_dimensions = dimensions, spatial_dimensions


class File:
    """As much of a samples file as is looked at."""

    path = "x.npz"

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images


INCEPTION, OWN = Sizes(2048, 2023), Sizes(96, 0)


@pytest.mark.parametrize(
    ("images", "network", "words"),
    [
        (10_000, INCEPTION, None),
        (9_999, INCEPTION, "x.npz holds 9999 images, fewer than 10,000: FID is biased upwards"),
        (2_049, INCEPTION, "fewer than 10,000"),
        (2_048, INCEPTION, "no more than the 2048 features: their covariance is rank-deficient"),
        (960, OWN, None),
        (959, OWN, "fewer than 10 for each of the 96 features"),
        (96, OWN, "rank-deficient"),
    ],
)
def test_few_images(images, network, words):
    found = checks.few_images(File(images), network, own_statistics=False)
    assert (words is None and not found) or words in found[0]
    assert not checks.few_images(File(images), network, own_statistics=True)


def write(path, n=8, labels=None):
    images = np.random.default_rng(0).integers(0, 256, (n, 2, 2, 3), np.uint8)
    samples.write(path, [images], images.shape, np.zeros(n) if labels is None else labels)
    return Samples(path)


@pytest.mark.parametrize(
    ("name", "is_said"),
    [
        ("val_256", True), ("imagenet-validation", True), ("test", True), ("VAL256", True), ("latest", False),
        ("interval", False), ("VIRTUAL_imagenet256_labeled", False), ("train", False),
    ],
)  # fmt: skip
def test_a_validation_reference_by_its_name(tmp_path, name, is_said):
    file = write(tmp_path / f"{name}.npz")
    found = checks.validation_reference(file, own_statistics=False)
    assert bool(found) == is_said and all("right for rFID" in line for line in found)
    assert not checks.validation_reference(file, own_statistics=True)


@pytest.mark.parametrize(
    ("source", "is_said"),
    [("imagenet/val", True), ("val/images", True), ("imagenet/train", False), ("test/train", False)],
)
def test_a_validation_reference_by_its_record(tmp_path, source, is_said):
    file = write(tmp_path / "reference.npz")
    (tmp_path / "reference.json").write_text(json.dumps({"data_path": source}))
    assert bool(checks.validation_reference(file, own_statistics=False)) == is_said
    (tmp_path / "reference.json").write_text("[]")
    assert not checks.validation_reference(file, own_statistics=False)


def test_a_validation_reference_by_its_labels(tmp_path):
    labels = np.arange(50_000) % 1000
    assert checks.validation_reference(write(tmp_path / "a.npz", 50_000, labels), own_statistics=False)
    labels[0] = 1
    assert not checks.validation_reference(write(tmp_path / "b.npz", 50_000, labels), own_statistics=False)


def extracted(*digests: bytes, constant: int = 0) -> Extracted:
    return Extracted(np.zeros(0), np.zeros(0), {}, np.array(digests, "V16"), constant)


def test_same_images():
    reference, wanted = File(3), extracted(b"a", b"b", b"c")
    assert not checks.same_images(File(2), extracted(b"x", b"y"), reference, wanted)
    found = checks.same_images(File(4), extracted(b"x", b"x", b"c", b"x", constant=3), reference, wanted)
    assert [line.split(" of x.npz")[0] for line in found] == [
        "1 of the 4 images", "2 of the 4 images", "3 of the 4 images",
    ]  # fmt: skip


def test_order_of_samples():
    figures = {"inception_score": 41.0, "inception_score_shuffled": 42.0}
    assert "41.0000; shuffled first it is 42.0000" in checks.order_of_samples(File(5001), figures)[0]
    assert not checks.order_of_samples(File(5000), figures)
    assert not checks.order_of_samples(File(5001), figures | {"inception_score": 41.9})
