"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), tiled; exact, and as published.

A set of items covers the balls around them that reach to their k-th nearest other item. Precision is the share of samples
that reference balls cover, recall the share of reference items that the samples' balls cover; <= counts.

Exact ones are as from differences in float64, at the cost of products in float32: those bound each distance from both
sides, and only the pairs that the bounds leave open are looked at again.

N, M items, D features; distances are squared.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.features import full_float32
from utils.log import progress

NEIGHBOURS = 3  # as published
SPARE = 4  # nearest items that are kept beyond k + 1, so that the bounds rarely leave a radius open
TILE = {"cpu": 2048, "cuda": 8192}  # items a side of a tile of bounds
FLOAT16_TILE = 10_000  # items a side of a published tile: it is in float16 as a whole, or in float32
PAIRS = {"cpu": 2**17, "cuda": 2**24}  # values of pairs in float64 at a time; a CPU's cache holds its number
STRIP = 256  # rows of a published tile that are made at a time
HUGE = 1e30  # a norm with which bounds in float32 might overflow

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
        with full_float32():  # the bounds' errors are those of float32, not of TF32
            self.radii_N = (_float16_radii if float16 else _exact_radii)(self.items_ND, k)

    def __len__(self) -> int:
        return len(self.items_ND)


def precision_recall(reference: Manifold, samples: Manifold) -> tuple[float, float]:
    """Precision and recall of samples, both from one pass over the distances between the two sets."""
    covered = _float16_covered if reference.float16 else _exact_covered
    with full_float32():
        covered_N, covered_M = covered(reference, samples)
    return covered_M.double().mean().item(), covered_N.double().mean().item()


def _tiles(n: int, m: int, side: int, symmetric: bool = False) -> Iterator[Pair]:
    """Slices of a matrix (n, m), with a bar; of a symmetric one those on and above the diagonal."""
    with progress(total=n, desc="precision and recall", unit=" images", delay=3) as bar:
        for top in range(0, n, side):
            rows = slice(top, min(top + side, n))
            for left in range(top if symmetric else 0, m, side):
                yield rows, slice(left, min(left + side, m))
            bar.update(rows.stop - top)


class _Bounds:
    """Bounds of the distances between two sets, from products in float32 (float64 where that might overflow).

    A product of two items is off by at most D u |a| |b| (u: the unit roundoff), all the rest by a few u (|a|^2 + |b|^2).
    """

    def __init__(self, first_ND: Tensor, second_MD: Tensor) -> None:
        norms = [
            torch.cat([some.double().square().sum(dim=1) for some in items.split(1024)])
            for items in (first_ND, second_MD)
        ]
        dtype = torch.float32 if max(side.max() for side in norms) < HUGE else torch.float64
        self.norms_N, self.norms_M = (side.to(dtype) for side in norms)
        self.first_ND, self.second_MD = first_ND.to(dtype), second_MD.to(dtype)
        self.unit = torch.finfo(dtype).eps / 2
        self.off = (first_ND.shape[1] + 16) * self.unit

    def __call__(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The distances of a tile, and by how much they may be off."""
        sums = self.norms_N[rows, None] + self.norms_M[columns]
        return torch.addmm(sums, self.first_ND[rows], self.second_MD[columns].T, alpha=-2), sums.mul_(self.off)

    def lower(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """What the distances of a tile are at least."""
        sums = (self.norms_N[rows][:, None] + self.norms_M[columns]).mul_(1 - self.off)
        return sums.addmm_(self.first_ND[rows], self.second_MD[columns].T, alpha=-2)

    def rounded(self, radii: Tensor) -> tuple[Tensor, Tensor]:
        """Radii in the bounds' dtype, rounded down and up."""
        near = radii.to(self.norms_N.dtype)
        return near * (1 - 4 * self.unit), near * (1 + 4 * self.unit)


def _distances(first_ND: Tensor, second_MD: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Distances of the pairs (i, j) from differences in float64."""
    size = max(1, PAIRS[first_ND.device.type] // first_ND.shape[1])
    found = [
        (first_ND[some_i].double() - second_MD[some_j].double()).square_().sum(dim=1)
        for some_i, some_j in zip(i.split(size), j.split(size), strict=True)
    ]
    return torch.cat(found)


def _exact_radii(items_ND: Tensor, k: int) -> Tensor:
    n, device = len(items_ND), items_ND.device
    bounds, kept = _Bounds(items_ND, items_ND), min(n, k + 1 + SPARE)
    lower = torch.full((n, kept), torch.inf, device=device, dtype=bounds.norms_N.dtype)
    nearest = torch.zeros((n, kept), dtype=torch.int64, device=device)

    def keep(rows: slice, columns: slice, found: Tensor) -> None:
        values, index = found.topk(min(kept, found.shape[1]), dim=1, largest=False)
        values, index = torch.cat([lower[rows], values], 1), torch.cat([nearest[rows], index + columns.start], 1)
        lower[rows], chosen = values.topk(kept, dim=1, largest=False)
        nearest[rows] = index.gather(1, chosen)

    for rows, columns in _tiles(n, n, TILE[device.type], symmetric=True):
        found = bounds.lower(rows, columns)
        keep(rows, columns, found)
        if rows != columns:
            keep(columns, rows, found.T.contiguous())
    all_N = torch.arange(n, device=device)
    distances = _distances(items_ND, items_ND, all_N.repeat_interleave(kept), nearest.flatten()).view(n, kept)
    radii_N = distances.sort(dim=1).values[:, k]
    open_N = all_N[lower.amax(dim=1) < radii_N] if kept < n else all_N[:0]  # one that was not kept might be nearer
    for some in open_N.split(64):
        close = bounds.lower(some, slice(0, n)) <= bounds.rounded(radii_N[some])[1][:, None]
        i, j = close.nonzero(as_tuple=True)
        others = torch.full(close.shape, torch.inf, device=device, dtype=torch.float64)
        others[i, j] = _distances(items_ND, items_ND, some[i], j)
        radii_N[some] = others.topk(k + 1, dim=1, largest=False).values.amax(dim=1)
    return radii_N


def _exact_covered(reference: Manifold, samples: Manifold) -> tuple[Tensor, Tensor]:
    """Which items of each set the other one's balls cover. Equal within rounding of float64 counts as equal."""
    first_ND, second_MD = reference.items_ND, samples.items_ND
    bounds = _Bounds(first_ND, second_MD)
    less = 1 - 8 * (first_ND.shape[1] + 2) * torch.finfo(torch.float64).eps
    (low_N, high_N), (low_M, high_M) = bounds.rounded(reference.radii_N), bounds.rounded(samples.radii_N)
    covered_N, covered_M = (
        torch.zeros(len(side), dtype=torch.bool, device=first_ND.device) for side in (reference, samples)
    )

    for rows, columns in _tiles(len(reference), len(samples), TILE[first_ND.device.type]):
        found, off = bounds(rows, columns)
        upper = found + off
        covered_M[columns] |= (upper <= low_N[rows, None]).any(dim=0)
        covered_N[rows] |= (upper <= low_M[columns]).any(dim=1)
        lower = found.sub_(off)
        open_M, open_N = (~covered_M[columns]).nonzero()[:, 0], (~covered_N[rows]).nonzero()[:, 0]
        i, j = (lower[:, open_M] <= high_N[rows, None]).nonzero(as_tuple=True)
        i, j = i + rows.start, open_M[j] + columns.start
        inside = _distances(first_ND, second_MD, i, j) * less <= reference.radii_N[i]
        covered_M[j[inside]] = True
        i, j = (lower[open_N] <= high_M[columns]).nonzero(as_tuple=True)
        i, j = open_N[i] + rows.start, j + columns.start
        inside = _distances(first_ND, second_MD, i, j) * less <= samples.radii_N[j]
        covered_N[i[inside]] = True
    return covered_N, covered_M


def _float16_radii(items_ND: Tensor, k: int) -> Tensor:
    smallest = torch.full((len(items_ND), k + 1), torch.inf, device=items_ND.device)
    for rows, _, distances in _float16_tiles(items_ND, items_ND):
        found = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values
        smallest[rows] = torch.cat([smallest[rows], found], dim=1).topk(k + 1, dim=1, largest=False).values
    return smallest.amax(dim=1).double()


def _float16_covered(reference: Manifold, samples: Manifold) -> tuple[Tensor, Tensor]:
    covered_N, covered_M = (torch.zeros(len(side), dtype=torch.bool, device=side.radii_N.device)
                            for side in (reference, samples))  # fmt: skip
    for rows, columns, distances in _float16_tiles(reference.items_ND, samples.items_ND):
        covered_M[columns] |= (distances <= reference.radii_N[rows, None]).any(dim=0)
        covered_N[rows] |= (distances <= samples.radii_N[columns]).any(dim=1)
    return covered_N, covered_M


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
