"""What a folder of codes holds and whether it is sound, streamed: a few hundred megabytes of RAM for any size."""

from dataclasses import dataclass, field
from math import isqrt

import numpy as np

from dataset.codes.manifest import Manifest, shard_digest
from dataset.codes.reader import Folder
from utils.log import progress

CODES_AT_ONCE = 1 << 22


@dataclass
class Survey:
    """The counts of a folder, and what is wrong with it, a line each."""

    folder: Folder
    codebook_size: int
    ids: np.ndarray  # (codebook_size,) int64, occurrences
    low: int
    high: int
    images_of: np.ndarray  # (classes,) int64, images a class
    duplicates: int  # images whose first view has the codes of an earlier image's
    problems: list[str] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the ids: how many a uniform use would take."""
        share = self.ids[self.ids > 0] / max(1, self.ids.sum())
        return float(np.exp(-(share * np.log(share)).sum()))

    def lines(self) -> list[str]:
        """What to print, a fact a line."""
        f, m = self.folder, self.folder.manifest
        side = isqrt(f.tokens)
        grid = f" ({side} x {side})" if side**2 == f.tokens else ""
        where = f"{m.shards} shards of {m.shard_size} images" if f.layout == "packed" else "one file an image"
        used, counts = int((self.ids > 0).sum()), self.images_of[self.images_of > 0]
        rows = {
            "codes": f.place.codes,
            "layout": f"{f.layout}, {f.dtype}, {where}{'' if m else ', no manifest'}",
            "images": f.images,
            "views": f"{f.views}{f' ({_view_mode(m)})' if m else ''}",
            "tokens": f"{f.tokens}{grid} a view",
            "ids": f"{self.low} to {self.high}, codebook {self.codebook_size}",
            "usage": f"{used} ids ({used / self.codebook_size:.1%} of the codebook), perplexity {self.perplexity:.1f}",
            "classes": f"{len(counts)}, images a class: min {counts.min()}, median {np.median(counts):g}, max {counts.max()}",
            "empty": self._empty(),
            "duplicates": f"{self.duplicates} images ({self.duplicates / f.images:.2%}) have the codes of an earlier one",
            "tokenizer": f"{m.vq_model or 'unknown'}, sha256 {m.tokenizer_sha256[:12] or 'unknown'}"
            if m
            else "unknown",
        }
        if m and m.skipped:
            first = "; ".join(f"{row['image']} {row['path']} ({row['reason']})" for row in m.skipped[:3])
            rows["skipped"] = f"{len(m.skipped)} images: {first}{'; ...' if len(m.skipped) > 3 else ''}"
        elif f.layout == "per-image" and f.names[-1] != f"{f.images - 1}.npy":
            rows["numbering"] = f"{f.names[0]} to {f.names[-1]}, with gaps"
        return [f"{name:<11} {value}" for name, value in rows.items()]

    def _empty(self) -> str:
        empty = np.flatnonzero(self.images_of == 0)
        names = self.folder.manifest.classes if self.folder.manifest else []
        listed = ", ".join(names[i] if i < len(names) else f"class {i}" for i in empty[:5])
        return (
            f"{len(empty)} classes without images: {listed}{', ...' if len(empty) > 5 else ''}"
            if len(empty)
            else "none"
        )


def survey(folder: Folder, codebook_size: int, show: bool = True) -> Survey:
    """Read every code and label once. Raises InputError for a file that cannot be read."""
    ids = np.zeros(codebook_size, np.int64)
    low, high, outside, first_outside = np.iinfo(np.int64).max, np.iinfo(np.int64).min, 0, None
    hashes = np.empty(folder.images, np.uint64)
    weights = np.random.default_rng(0).integers(1 << 63, size=folder.tokens, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)
    step = max(1, CODES_AT_ONCE // (folder.views * folder.tokens))
    with progress(total=folder.images, unit=" images", desc="checking", show=show) as bar:
        for start in range(0, folder.images, step):
            codes_NVL = folder.read(range(start, min(start + step, folder.images))).astype(np.int64)
            n = len(codes_NVL)
            low, high = min(low, int(codes_NVL.min())), max(high, int(codes_NVL.max()))
            if low < 0 or high >= codebook_size:
                wrong_NVL = (codes_NVL < 0) | (codes_NVL >= codebook_size)
                outside += int(wrong_NVL.sum())
                if first_outside is None and wrong_NVL.any():
                    first_outside = start + int(wrong_NVL.any((1, 2)).argmax())
                ids += np.bincount(codes_NVL[~wrong_NVL], minlength=codebook_size)
            else:
                ids += np.bincount(codes_NVL.reshape(-1), minlength=codebook_size)
            # A sum with odd random weights modulo 2**64: equal for equal codes, and next to never else.
            hashes[start : start + n] = (codes_NVL[:, 0].astype(np.uint64) * weights).sum(1, dtype=np.uint64)
            bar.update(n)
    problems = []
    if first_outside is not None:
        problems.append(
            f"{outside} codes are outside the codebook of {codebook_size} (they span {low} to {high}), "
            f"the first in {folder.file_of(first_outside)}, image {folder.numbers[first_outside]}"
        )
    problems += _altered(folder)
    images_of, wrong_labels = _count_labels(folder)
    duplicates = folder.images - len(np.unique(hashes))
    return Survey(folder, codebook_size, ids, low, high, images_of, duplicates, problems + wrong_labels)


def _altered(folder: Folder) -> list[str]:
    """The shards whose bytes are not those that the manifest has a hash of."""
    m, place = folder.manifest, folder.place
    found = []
    for shard, sha256 in enumerate(m.shards_sha256 if m else ()):
        rows = range(m.starts[shard], m.starts[shard + 1])
        numbers = folder.numbers[rows.start : rows.stop] if m.layout == "per-image" else [shard]
        if shard_digest(place, m.layout, numbers) != sha256:
            what = f"{place.files(numbers[0], m.layout)[0].name} or its labels"
            if m.layout == "per-image":
                what = f"one of {len(numbers)} images from {what} on"
            found.append(f"{place.codes}: {what} was changed after it was written: its sha256 is not the manifest's")
    return found


def _count_labels(folder: Folder) -> tuple[np.ndarray, list[str]]:
    """Images a class, and what is wrong with the labels."""
    labels, classes = folder.labels, len(folder.manifest.classes) if folder.manifest else 0
    wrong = np.flatnonzero((labels < 0) | (labels >= classes if classes else False))
    problems = []
    if len(wrong):
        expected = f"0 to {classes - 1}" if classes else "0 or more"
        problems.append(
            f"{len(wrong)} labels are out of range (expected {expected}), the first in {folder.place.labels}: "
            f"image {folder.numbers[wrong[0]]} has label {labels[wrong[0]]}"
        )
    return np.bincount(np.delete(labels, wrong), minlength=max(classes, 1)), problems


def _view_mode(manifest: Manifest) -> str:
    return manifest.view_mode + (f", crops of {manifest.crop_range:g}" if manifest.crop_range else "")
