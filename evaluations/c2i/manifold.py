"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), tiled; exact, and as published.

A set of items covers the balls around them that reach to their k-th nearest other item. Precision is the share of samples
that reference balls cover, recall the share of reference items that the samples' balls cover; <= counts.

N, M items, D features; distances are squared.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.features import full_float32
from utils.log import progress

NEIGHBOURS = 3  # as published
TILE = {"cpu": 2048, "cuda": 8192}  # items a side of a tile
FLOAT16_TILE = 10_000  # items a side of a published tile: it is in float16 as a whole, or in float32
ROUNDING = 1e-13  # of |a|^2 + |b|^2: what products in float64 may add to a distance


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
        self.radii_N = _radii(self, k)


def precision_recall(reference: Manifold, samples: Manifold) -> tuple[float, float]:
    """Precision and recall of samples, both from one pass over the distances between the two sets.

    Distances that are equal within rounding count as equal.
    """
    covered_N, covered_M = (torch.zeros_like(side.radii_N, dtype=torch.bool) for side in (reference, samples))
    for rows, columns, distances, error in _distances(reference, samples):
        distances -= error
        covered_M[columns] |= (distances <= reference.radii_N[rows, None]).any(dim=0)
        covered_N[rows] |= (distances <= samples.radii_N[columns]).any(dim=1)
    return covered_M.double().mean().item(), covered_N.double().mean().item()


def _radii(items: Manifold, k: int) -> Tensor:
    nearest = torch.full((len(items.items_ND), k + 1), torch.inf, dtype=torch.float64, device=items.items_ND.device)

    def keep(part: slice, distances: Tensor) -> None:
        closest = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values.double()
        nearest[part] = torch.cat([nearest[part], closest], dim=1).topk(k + 1, dim=1, largest=False).values

    for rows, columns, distances, error in _distances(items, items):
        distances.masked_fill_(distances <= error, 0)  # copies
        keep(rows, distances)
        if not items.float16 and rows != columns:
            keep(columns, distances.T.contiguous())
    return nearest.amax(dim=1)


def _distances(first: Manifold, second: Manifold) -> Iterator[tuple[slice, slice, Tensor, Tensor | float]]:
    """Tiles of the distances between two sets: rows, columns, distances, and by how much each may be too large.

    Of a set to itself, exact tiles are those on and above the diagonal, which is 1.8 times as fast as all of them.
    """
    side = FLOAT16_TILE if first.float16 else TILE[first.items_ND.device.type]
    # Small norms cancel little; no outlier moves a median.
    centre_D = 0 if first.float16 else first.items_ND.median(dim=0).values.double()
    n, m = len(first.items_ND), len(second.items_ND)
    with progress(total=n, desc="precision and recall", unit=" images", delay=3) as bar:
        for top in range(0, n, side):
            rows = slice(top, min(top + side, n))
            for left in range(top if first is second and not first.float16 else 0, m, side):
                columns = slice(left, min(left + side, m))
                a_ND, b_MD = first.items_ND[rows], second.items_ND[columns]
                if first.float16:
                    yield rows, columns, _published_distances(a_ND, b_MD), 0.0
                else:
                    yield rows, columns, *_exact_distances(a_ND.double() - centre_D, b_MD.double() - centre_D)
            bar.update(rows.stop - top)


def _exact_distances(a_ND: Tensor, b_MD: Tensor) -> tuple[Tensor, Tensor]:
    """The distances in float64, and what rounding may add to each."""
    sums_NM = a_ND.square().sum(dim=1)[:, None] + b_MD.square().sum(dim=1)
    return torch.addmm(sums_NM, a_ND, b_MD.T, alpha=-2).clamp_(min=0), sums_NM.mul_(ROUNDING)


@full_float32()
def _published_distances(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Distances as TensorFlow's CPU kernels round them: float16, or all of them in float32 where one is not finite.

    Features, squares, sums of squares, and each of the steps |a|^2 - 2 a b + |b|^2 are rounded to float16; a b is summed
    in float32 first. The result is float32, in which comparisons are exact.
    """
    half_ND, half_MD = a_ND.half(), b_MD.half()
    products_NM = (half_ND.float() @ half_MD.float().T).half()
    distances_NM = ((_float16_norms(half_ND)[:, None] - 2 * products_NM) + _float16_norms(half_MD)).clamp_(min=0)
    if distances_NM.isfinite().all():
        return distances_NM.float()
    a_ND, b_MD = a_ND.float(), b_MD.float()
    norms_N, norms_M = (items.square().sum(dim=1) for items in (a_ND, b_MD))
    return ((norms_N[:, None] - 2 * (a_ND @ b_MD.T)) + norms_M).clamp_(min=0)


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
