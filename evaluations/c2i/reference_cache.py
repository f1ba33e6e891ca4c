"""Reference batches in a network's features, kept in the user's cache folder: a reference is measured once.

An entry goes by the hashes of both files and by what computed it; the folder may be deleted at any time.
"""

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np

from evaluations.c2i.download import cache_folder
from evaluations.c2i.features import Extracted, FeatureNetwork
from evaluations.c2i.metrics import Moments
from utils.files import atomic_path

FORMAT = 1
ENTRIES = 8  # the latest used ones stay


def entry_path(network: FeatureNetwork, reference_sha256: str) -> Path:
    """Where the features of a reference are, if they are there."""
    key = (FORMAT, reference_sha256, network.sha256, network.backend, network.device.type)
    return cache_folder() / "references" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"


def load(path: Path, network: FeatureNetwork) -> tuple[Extracted, Moments] | None:
    """What store() wrote; None if nothing is there or it cannot be read."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        moments = {}
        for name in ("pool", "spatial"):
            parts = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
            moments[name] = Moments.from_arrays(parts, network.device) if parts or name == "pool" else None
        logits_N0 = np.empty((len(arrays["features"]), 0), np.float32)
        extracted = Extracted(
            arrays["features"], logits_N0, moments["spatial"], arrays["digests"], int(arrays["constant"])
        )
        os.utime(path)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
        return None
    return extracted, moments["pool"]


def store(path: Path, extracted: Extracted, pool: Moments) -> None:
    """Write an entry; the folder keeps the latest used ones. A folder that cannot be written to is left alone."""
    arrays = {"features": extracted.features_ND, "digests": extracted.digests_N, "constant": extracted.constant}
    for name, moments in (("pool", pool), ("spatial", extracted.spatial)):
        if moments is not None:
            arrays |= {f"{name}.{key}": value for key, value in moments.arrays().items()}
    try:
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays)
        for old in sorted(path.parent.glob("*.npz"), key=lambda entry: entry.stat().st_mtime)[:-ENTRIES]:
            old.unlink(missing_ok=True)
    except OSError:
        return
