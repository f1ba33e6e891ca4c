"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), tiled; exact, and as published.

A set of items covers the balls around them that reach to their k-th nearest other item. Precision is the share of samples
that reference balls cover, recall the share of reference items that the samples' balls cover; <= counts.

N, M items, D features; distances are squared.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.features import full_float32
from utils.log import progress

NEIGHBOURS = 3  # as published
TILE = {"cpu": 2048, "cuda": 8192}  # items a side of a tile
FLOAT16_TILE = 10_000  # items a side of a published tile: it is in float16 as a whole, or in float32
STRIP = 256  # rows of a published tile that are made at a time
ROUNDING = 1e-13  # of |a|^2 + |b|^2: what products in float64 may add to a distance

Pair = tuple[slice, slice]


class Manifold:
    """Items (N, D) and the radii of their balls: element k of the sorted distances to the whole set.

    The item itself is among them, so copies shrink a ball. Raises ValueError for fewer than k + 1 items.
    With `float16` distances are those of the published evaluator on a CPU, bit for bit.
    """

    def __init__(
        self, items_ND: np.ndarray, k: int = NEIGHBOURS, device: torch.device | str = "cpu", float16: bool = False
    ) -> None:
        if len(items_ND) <= k:
            raise ValueError(f"{k} neighbours need at least {k + 1} items, got {len(items_ND)}")
        self.float16, self.items_ND = float16, torch.from_numpy(np.ascontiguousarray(items_ND)).to(device)
        if not float16:
            digests = [hashlib.blake2b(item + 0.0, digest_size=8).digest() for item in np.ascontiguousarray(items_ND)]
            self.ids_N = torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy()).to(device)
        with full_float32():
            self.radii_N = _radii(self, k)

    def __len__(self) -> int:
        return len(self.items_ND)


def precision_recall(reference: Manifold, samples: Manifold) -> tuple[float, float]:
    """Precision and recall of samples, both from one pass over the distances between the two sets.

    Distances that are equal within rounding count as equal.
    """
    covered_N, covered_M = (torch.zeros(len(side), dtype=torch.bool, device=side.radii_N.device)
                            for side in (reference, samples))  # fmt: skip
    with full_float32():
        for rows, columns, distances in _distances(reference, samples, ROUNDING):
            covered_M[columns] |= (distances <= reference.radii_N[rows, None]).any(dim=0)
            covered_N[rows] |= (distances <= samples.radii_N[columns]).any(dim=1)
    return covered_M.double().mean().item(), covered_N.double().mean().item()


def _radii(items: Manifold, k: int) -> Tensor:
    nearest = torch.full((len(items), k + 1), torch.inf, dtype=torch.float64, device=items.items_ND.device)

    def keep(part: slice, distances: Tensor) -> None:
        closest = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values.double()
        nearest[part] = torch.cat([nearest[part], closest], dim=1).topk(k + 1, dim=1, largest=False).values

    for rows, columns, distances in _distances(items, items):
        keep(rows, distances)
        if (
            not items.float16 and rows != columns
        ):  # exact tiles below the diagonal are those above it: 1.8 times as fast
            keep(columns, distances.T.contiguous())
    return nearest.amax(dim=1)


def _distances(first: Manifold, second: Manifold, less: float = 0.0) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of the distances between two sets; exact ones less a share of |a|^2 + |b|^2, except between copies.

    Of a set to itself, exact tiles are those on and above the diagonal.
    """
    if first.float16:
        yield from _float16_tiles(first.items_ND, second.items_ND)
        return
    centre_D = first.items_ND.median(dim=0).values.double()  # small norms cancel little; no outlier moves a median

    def centred(items: Manifold, part: slice) -> tuple[Tensor, Tensor]:
        values = items.items_ND[part].double() - centre_D
        return values, values.square().sum(dim=1)

    for rows, columns in _tiles(len(first), len(second), TILE[first.items_ND.device.type], first is second):
        (a, norms_a), (b, norms_b) = centred(first, rows), centred(second, columns)
        sums = norms_a[:, None] + norms_b
        distances = torch.addmm(sums, a, b.T, alpha=-2).clamp_(min=0).sub_(sums, alpha=less)
        yield rows, columns, distances.masked_fill_(first.ids_N[rows, None] == second.ids_N[columns], 0)


def _tiles(n: int, m: int, side: int, symmetric: bool = False) -> Iterator[Pair]:
    """Slices of a matrix (n, m), with a bar; of a symmetric one those on and above the diagonal."""
    with progress(total=n, desc="precision and recall", unit=" images", delay=3) as bar:
        for top in range(0, n, side):
            rows = slice(top, min(top + side, n))
            for left in range(top if symmetric else 0, m, side):
                yield rows, slice(left, min(left + side, m))
            bar.update(rows.stop - top)


def _float16_tiles(first_ND: Tensor, second_MD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Distances as TensorFlow's CPU kernels round them: float16, or a whole tile in float32 where one is not finite.

    Features, squares, sums of squares, and each of the steps |a|^2 - 2 a b + |b|^2 are rounded to float16; a b is summed
    in float32 first. Comparisons are in float32, where all of these are exact.
    """
    halves_ND, halves_MD = (items.half() for items in (first_ND, second_MD))
    norms_N, norms_M = _float16_norms(halves_ND), _float16_norms(halves_MD)

    def in_float16(rows: slice, columns: slice) -> Tensor:
        products = (halves_ND[rows].float() @ halves_MD[columns].float().T).half()
        return ((norms_N[rows, None] - 2 * products) + norms_M[columns]).clamp_(min=0)

    def in_float32(rows: slice, columns: slice) -> Tensor:
        a, b = first_ND[rows].float(), second_MD[columns].float()
        norms_a, norms_b = (items.square().sum(dim=1) for items in (a, b))
        return ((norms_a[:, None] - 2 * (a @ b.T)) + norms_b).clamp_(min=0)

    for rows, columns in _tiles(len(first_ND), len(second_MD), FLOAT16_TILE):
        strips = [slice(top, min(top + STRIP, rows.stop)) for top in range(rows.start, rows.stop, STRIP)]
        found = [in_float16(strip, columns) for strip in strips]
        finite = all(bool(part.isfinite().all()) for part in found)
        for i, strip in enumerate(strips):
            part, found[i] = found[i], None
            yield strip, columns, part.float() if finite else in_float32(strip, columns)


def _float16_norms(halves_ND: Tensor) -> Tensor:
    """|a|^2 summed in the order of TensorFlow's CPU kernel, in float16.

    More than 1024 values are halved. A part is walked in steps of 32 by 4 accumulators of 8 lanes, which are then added one
    to the next; the 8 lanes are summed in float32.
    """
    n, width = halves_ND.shape
    if width > 1024:
        return _float16_norms(halves_ND[:, : width // 2]) + _float16_norms(halves_ND[:, width // 2 :])
    padded = torch.nn.functional.pad(halves_ND * halves_ND, (0, -width % 32)).view(n, -1, 4, 8)
    sums = padded[:, 0]
    for step in range(1, padded.shape[1]):
        sums = sums + padded[:, step]
    lanes = ((sums[:, 0] + sums[:, 1]) + sums[:, 2]) + sums[:, 3]
    return lanes.float().sum(dim=1).half()
