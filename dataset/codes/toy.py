"""For tests and benchmarks: small random codes in a folder."""

from pathlib import Path

import numpy as np

from dataset.codes import Manifest, Place, Writer

CLASSES = ["a", "b", "c"]


def write_codes(
    root: Path,
    layout: str = "packed",
    *,
    images: int = 23,
    views: int = 2,
    tokens: int = 16,
    codebook: int = 512,
    shard_size: int = 10,
    size: int = 32,
    seed: int = 0,
    codes: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    **more: object,
) -> tuple[np.ndarray, np.ndarray]:
    """Write random (or these) codes (images, views, tokens) of data set `toy` and labels (images,); returns both.

    seed: of the codes; the labels are the same for all. more: fields of the manifest.
    """
    manifest = Manifest(
        "toy", size, images, views, tokens, codebook, layout, shard_size, **{"classes": CLASSES, **more}
    )
    writer = Writer(Place(root, "toy", size), manifest)
    writer.start()
    if codes is None:
        codes = np.random.default_rng(seed).integers(codebook, size=(images, views, tokens))
    if labels is None:
        labels = np.random.default_rng(0).integers(3, size=images)
    for shard in range(manifest.shards):
        rows = manifest.rows(shard)
        writer.write(shard, codes[rows.start : rows.stop], labels[rows.start : rows.stop])
    writer.finish()
    return codes, labels


def files(root: Path) -> dict[str, bytes]:
    """Every file under a folder: path from it -> content."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
