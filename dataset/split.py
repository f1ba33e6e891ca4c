"""Split off a test set: two tables of the same classes, by a hash of the images' names.

Which images are held out depends on their names and classes alone, not on their order, on what else is in other classes or
on a seed. So the same folder gives the same split anywhere.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.files import atomic_path


def held_out(names: Sequence[str], labels: np.ndarray, share: float, most: int) -> np.ndarray:
    """Which images are held out, (N,) bool: this share of each class, at least one of two, about `most` in all.

    Of a class the images with the smallest hash of their names are taken. A class of one image keeps it.
    """
    share = min(share, most / len(names))
    chosen = np.zeros(len(names), bool)
    hashes = [hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        n = min(len(members) - 1, max(1, round(share * len(members))))
        chosen[sorted(members, key=hashes.__getitem__)[:n]] = True
    return chosen


def write_table(path: Path, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> None:
    """A table of files and labels that dataset.listing reads; a class without images has a row without a file."""
    missing = sorted(set(range(len(classes))) - set(labels))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label"))
        writer.writerows((name, classes[label]) for name, label in zip(names, labels, strict=True))
        writer.writerows(("", classes[label]) for label in missing)
