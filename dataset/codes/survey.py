"""What a folder of codes holds and whether it is sound, streamed: a few hundred megabytes of RAM for any size."""

from dataclasses import dataclass
from math import isqrt

import numpy as np

from dataset.codes.folders import Folder, alteration
from utils.cli import InputError
from utils.log import progress

CODES_AT_ONCE = 1 << 22
LARGEST_CODEBOOK = 1 << 26  # whose use is counted


@dataclass
class Survey:
    """The counts of a folder, and what is wrong with it, a line each."""

    folder: Folder
    codebook_size: int
    ids: np.ndarray  # (codebook_size,) int64, occurrences
    low: int
    high: int
    labels: np.ndarray  # (images,) int64
    duplicates: int  # images whose first view has the codes of an earlier image's
    problems: list[str]

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
        where = (
            f"{m.dtype}, {m.shards} shards of {m.shard_size} images" if f.layout == "packed" else "one file an image"
        )
        crops = f", crops of {m.crop_range:g}" if m and m.crop_range else ""
        used, (classes, counts) = int((self.ids > 0).sum()), np.unique(self.labels, return_counts=True)
        empty = np.setdiff1d(np.arange(len(m.classes) if m else 0), classes)
        named = ", ".join(class_name(f, i) for i in empty[:5]) + (", ..." if len(empty) > 5 else "")
        rows = {
            "codes": f.place.codes,
            "layout": f"{f.layout}, {where}{'' if m else ', no manifest'}",
            "images": f.images,
            "views": f"{f.views}{f' ({m.view_mode}{crops})' if m else ''}",
            "tokens": f"{f.tokens}{grid} a view",
            "ids": f"{self.low} to {self.high}, codebook {self.codebook_size}",
            "usage": f"{used} ids ({used / self.codebook_size:.1%} of the codebook), perplexity {self.perplexity:.1f}",
            "classes": f"{len(counts)}, images a class: min {counts.min()}, median {np.median(counts):g}, max {counts.max()}",
            "empty": f"{len(empty)} classes without images: {named}" if len(empty) else "none",
            "duplicates": f"{self.duplicates} images ({self.duplicates / f.images:.2%}) have the codes of an earlier one",
            "tokenizer": "unknown",
        }
        if m:
            rows["tokenizer"] = f"{m.vq_model or 'unknown'}, {m.tokenizer_sha256[:16] or 'unknown weights'}"
        if m and m.skipped:
            first = "; ".join(f"{row['image']} {row['path']} ({row['reason']})" for row in m.skipped[:3])
            rows["skipped"] = f"{len(m.skipped)} images: {first}{'; ...' if len(m.skipped) > 3 else ''}"
        elif f.numbers[-1] != f.images - 1:
            rows["numbering"] = f"{f.numbers[0]} to {f.numbers[-1]}, with gaps"
        return [f"{name:<11} {value}" for name, value in rows.items()]


def class_name(folder: Folder, label: int) -> str:
    """The name of a class; its number where the manifest has none."""
    names = folder.manifest.classes if folder.manifest else []
    return names[label] if label < len(names) else f"class {label}"


def survey(folder: Folder, codebook_size: int, show: bool = True) -> Survey:
    """Read every code and label once. Raises InputError for a file that cannot be read."""
    if codebook_size > LARGEST_CODEBOOK:
        raise InputError(f"a codebook of {codebook_size} in {folder.place.codes}; expected at most {LARGEST_CODEBOOK}")
    ids = np.zeros(codebook_size, np.int64)
    lows, highs, outside, first_outside = [], [], 0, None
    hashes, labels = np.empty(folder.images, np.uint64), np.empty(folder.images, np.int64)
    # A sum with odd random weights modulo 2**64: equal for equal codes, and next to never else.
    weights = np.random.default_rng(0).integers(1 << 64, size=folder.tokens, dtype=np.uint64) | np.uint64(1)
    step = max(1, CODES_AT_ONCE // (folder.views * folder.tokens))
    with progress(total=folder.images, unit=" images", desc="checking", show=show) as bar:
        for start in range(0, folder.images, step):
            rows = range(start, min(start + step, folder.images))
            codes_NVL, labels[rows.start : rows.stop] = folder.read(rows)
            codes_NVL = codes_NVL.astype(np.int64)
            lows.append(int(codes_NVL.min()))
            highs.append(int(codes_NVL.max()))
            good = codes_NVL.reshape(-1)
            if lows[-1] < 0 or highs[-1] >= codebook_size:
                wrong_NVL = (codes_NVL < 0) | (codes_NVL >= codebook_size)
                outside += int(wrong_NVL.sum())
                first_outside = start + int(wrong_NVL.any((1, 2)).argmax()) if first_outside is None else first_outside
                good = codes_NVL[~wrong_NVL]
            ids += np.bincount(good, minlength=codebook_size)
            hashes[rows.start : rows.stop] = (codes_NVL[:, 0].astype(np.uint64) * weights).sum(1, dtype=np.uint64)
            bar.update(len(rows))
    low, high, different = min(lows), max(highs), len(np.unique(hashes))
    problems = []
    if first_outside is not None:
        problems.append(
            f"{outside} codes are outside the codebook of {codebook_size} (they span {low} to {high}), "
            f"the first in {folder.file_of(first_outside)}, image {folder.numbers[first_outside]}"
        )
    if low == high and codebook_size > 1:
        problems.append(
            f"all codes are {low}, as a tokenizer whose weights are not finite makes them: extract them again"
        )
    elif different == 1 < folder.images:
        problems.append(f"all {folder.images} images have the same codes: look at the images, and extract them again")
    classes = len(folder.manifest.classes) if folder.manifest else 0
    wrong = np.flatnonzero((labels < 0) | (labels >= (classes or np.inf)))
    if len(wrong):
        problems.append(
            f"{len(wrong)} labels are out of range (expected {f'0 to {classes - 1}' if classes else '0 or more'}), the first "
            f"in {folder.place.labels}: image {folder.numbers[wrong[0]]} has label {labels[wrong[0]]}"
        )
    shards = len(folder.manifest.shards_sha256) if folder.manifest else 0
    problems += filter(None, (alteration(folder, shard) for shard in range(shards)))
    return Survey(folder, codebook_size, ids, low, high, labels, folder.images - different, problems)
