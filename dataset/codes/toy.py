"""For tests and benchmarks: small random codes in a folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.codes import Manifest, Place, Writer
from dataset.codes.writer import ShardRecord

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
    skipped: Sequence[int] = (),
    **more: object,
) -> tuple[np.ndarray, np.ndarray]:
    """Write random (or these) codes (images, views, tokens) of data set `toy` and labels (images,); returns both.

    seed: of the codes; the labels are the same for all. skipped: images to leave out. more: fields of the manifest.
    """
    fields = {
        "dataset": "toy", "image_size": size, "images": images, "views": views, "tokens": tokens,
        "codebook_size": codebook, "layout": layout, "shard_size": shard_size, "classes": CLASSES,
    }  # fmt: skip
    manifest = Manifest(**{**fields, **more})
    writer = Writer(Place(root, "toy", size), manifest)
    writer.start()
    if codes is None:
        codes = np.random.default_rng(seed).integers(codebook, size=(images, views, tokens))
    if labels is None:
        labels = np.random.default_rng(0).integers(3, size=images)
    for shard in manifest.own_shards:
        rows = [i for i in manifest.rows(shard) if i not in skipped]
        gaps = [{"image": i, "path": f"a/{i}.png", "reason": "broken"} for i in manifest.rows(shard) if i in skipped]
        writer.write(shard, codes[rows], labels[rows], gaps)
    writer.finish()
    return codes, labels


def unfinish(root: Path, name: str = "toy32") -> None:
    """Turn finished codes into those of a run that was killed just before the end."""
    manifest = Manifest.read(root / f"{name}.json")
    (root / f"{name}.json").unlink()
    for shard, (sha256, largest) in enumerate(zip(manifest.shards_sha256, manifest.shards_max, strict=True)):
        record = ShardRecord(sha256=sha256, skipped=manifest.gaps(shard), max=largest)
        record.write(root / f"{name}.unfinished" / f"{shard:05d}.json")
    manifest.changed(shards_sha256=[], shards_max=[]).write(root / f"{name}.unfinished.json")


def files(root: Path) -> dict[str, bytes]:
    """Every file under a folder: path from it -> content."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
