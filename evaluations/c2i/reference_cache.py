"""Reference batches in a network's features, kept in the user's cache folder: a reference is measured once.

An entry goes by the hashes of both files and by what computed it; the folder may be deleted at any time.
"""

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from evaluations.c2i.download import cache_folder
from evaluations.c2i.features import Extracted, FeatureNetwork
from evaluations.c2i.metrics import Moments
from utils.files import atomic_path

FORMAT = 1
ENTRIES = 8  # the latest used ones stay
TENSORS = ("mean", "scatter")  # of Moments


def entry_path(network: FeatureNetwork, reference_sha256: str) -> Path:
    """Where the features of a reference are, if they are there."""
    key = (FORMAT, reference_sha256, network.sha256, network.backend, network.device.type)
    return cache_folder() / "references" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"


def load(path: Path) -> Extracted | None:
    """What store() wrote, without logits; None if nothing is there or it cannot be read."""
    try:
        with np.load(path) as file:
            moments = {
                part: Moments(int(file[f"{part}.n"]), *(torch.from_numpy(file[f"{part}.{key}"]) for key in TENSORS))
                for part in ("pool", "spatial")
                if f"{part}.n" in file
            }
            features_ND, digests_N, constant = file["features"], file["digests"], int(file["constant"])
        os.utime(path)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
        return None
    return Extracted(features_ND, np.empty((len(features_ND), 0), np.float32), moments, digests_N, constant)


def store(path: Path, extracted: Extracted) -> None:
    """Write an entry; the folder keeps the latest used ones. A folder that cannot be written to is left alone."""
    arrays = {"features": extracted.features_ND, "digests": extracted.digests_N, "constant": extracted.constant}
    for part, moments in extracted.moments.items():
        values = moments.mean_D.cpu().numpy(), moments.scatter_DD.cpu().numpy()
        arrays |= {f"{part}.n": moments.n} | {
            f"{part}.{key}": value for key, value in zip(TENSORS, values, strict=True)
        }
    try:
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays)
        for old in sorted(path.parent.glob("*.npz"), key=lambda entry: entry.stat().st_mtime)[:-ENTRIES]:
            old.unlink(missing_ok=True)
    except OSError:
        return
