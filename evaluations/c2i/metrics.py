"""The figures, from features and logits, in float64: Fréchet distance, Inception Score, precision and recall, accuracy.

N, M items, D features, C classes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from utils import streams
from utils.log import progress

EPS = float(np.finfo(np.float64).eps)
NEIGHBOURS = 3  # of precision and recall, as published
SPLIT = 5000  # items a split of the Inception Score, as published
BLOCK = 2**22  # distances in memory at a time


class Moments:
    """Mean and covariance of features that arrive in batches; exact in any order up to float64 rounding.

    Batches are merged by Chan, Golub and LeVeque's update (1983), so nothing cancels.
    """

    def __init__(self, dimensions: int) -> None:
        self.n = 0
        self.mean_D = np.zeros(dimensions)
        self.scatter_DD = np.zeros((dimensions, dimensions))

    def add(self, features_ND: np.ndarray) -> None:
        """Take in a batch (n, D) of any float dtype."""
        features_ND = np.asarray(features_ND, np.float64)
        n = len(features_ND)
        if n == 0:
            return
        mean_D = features_ND.mean(axis=0)
        centred_ND = features_ND - mean_D
        step_D = mean_D - self.mean_D
        total = self.n + n
        self.scatter_DD += centred_ND.T @ centred_ND + np.outer(step_D, step_D) * (self.n * n / total)
        self.mean_D += step_D * (n / total)
        self.n = total

    @property
    def covariance_DD(self) -> np.ndarray:
        """The covariance with N - 1, as np.cov gives it. Raises ValueError for fewer than two items."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 items, got {self.n}")
        return self.scatter_DD / (self.n - 1)


def moments_of(features_ND: np.ndarray, rows: int = 8192) -> Moments:
    """The moments of an array (N, D), some rows at a time."""
    moments = Moments(features_ND.shape[1])
    for start in range(0, len(features_ND), rows):
        moments.add(features_ND[start : start + rows])
    return moments


def frechet_distance(first: Moments, second: Moments) -> float:
    """Fréchet distance of two normal distributions, |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)).

    The covariances may be rank-deficient. With S = R R', tr sqrt(S1 S2) is the sum of the singular values of R1' R2: no
    square root of a matrix, and no square roots of rounding noise. What rounding takes below zero is cut off.
    """
    root1, root2 = _root(first.covariance_DD), _root(second.covariance_DD)
    difference_D = first.mean_D - second.mean_D
    trace_root = torch.linalg.svdvals(root1.T @ root2).sum()
    traces = root1.square().sum() + root2.square().sum()
    return max(0.0, float(difference_D @ difference_D) + (traces - 2 * trace_root).item())


def _root(sigma_DD: np.ndarray) -> Tensor:
    """R (D, rank) with R R' = sigma, from its eigenvectors without those of rounding noise."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(sigma_DD))
    kept = values > len(sigma_DD) * EPS * values.max()
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(logits_NC: np.ndarray, split_size: int = SPLIT, shuffle_seed: int | None = None) -> float:
    """exp(mean KL(p(y|x) || p(y))) of each split, averaged over the splits (arXiv 1606.03498).

    As published: consecutive splits in the order of the items, the last one shorter and weighted the same, so the
    score depends on the order. With `shuffle_seed` the items are shuffled first and it does not.
    """
    n = len(logits_NC)
    order = np.arange(n) if shuffle_seed is None else streams.permutation(n, shuffle_seed, streams.ORDER)
    scores = []
    for start in range(0, n, split_size):
        log_p_NC = log_softmax(np.asarray(logits_NC[order[start : start + split_size]], np.float64), axis=1)
        log_marginal_C = logsumexp(log_p_NC, axis=0) - np.log(len(log_p_NC))
        divergence_N = (np.exp(log_p_NC) * (log_p_NC - log_marginal_C)).sum(axis=1)
        scores.append(np.exp(divergence_N.mean()))
    return float(np.mean(scores))


def class_accuracy(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of items whose largest logit is that of their label."""
    return float((logits_NC.argmax(axis=1) == labels_N).mean())


class Manifold:
    """Where a set of items (N, D) lies: in the balls around them that reach to their k-th nearest other item.

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), as the published evaluator computes it: element k of the sorted distances
    to the whole set, the item itself included, so copies shrink a ball. Raises ValueError for fewer than k + 1 items.
    """

    def __init__(self, items_ND: np.ndarray, k: int = NEIGHBOURS, device: torch.device | str = "cpu") -> None:
        if len(items_ND) <= k:
            raise ValueError(f"{k} neighbours need at least {k + 1} items, got {len(items_ND)}")
        self.items_ND = torch.from_numpy(np.asarray(items_ND)).to(device).double()
        self.norms_N = self.items_ND.square().sum(dim=1)
        nearest = [
            distances.topk(k + 1, dim=1, largest=False).values[:, k]
            for distances in self._distances(self.items_ND, self.norms_N)
        ]
        self.radii_N = torch.cat(nearest)  # squared

    def coverage(self, items_MD: np.ndarray) -> float:
        """Share of these items that lie in (<=) a ball.

        Equal within rounding counts as equal: each distance is lessened by the error that norms of its items' size can
        cause in it and in the radius.
        """
        items_MD = torch.from_numpy(np.asarray(items_MD)).to(self.items_ND)
        less = 1 - 8 * (items_MD.shape[1] + 2) * EPS
        distances = self._distances(items_MD, items_MD.square().sum(dim=1), less)
        return torch.cat([(some <= self.radii_N).any(dim=1) for some in distances]).double().mean().item()

    def _distances(self, items_MD: Tensor, norms_M: Tensor, scale: float = 1.0) -> Iterator[Tensor]:
        """Squared distances (some, N) of items to this set's, by rows: scale (|a|^2 + |b|^2) - 2 a b."""
        rows = max(1, BLOCK // len(self.items_ND))
        with progress(total=len(items_MD), desc="precision and recall", unit=" images", delay=3) as bar:
            for some_MD, some_norms_M in zip(items_MD.split(rows), norms_M.split(rows), strict=True):
                sums = scale * (some_norms_M[:, None] + self.norms_N)
                yield sums.addmm_(some_MD, self.items_ND.T, alpha=-2)
                bar.update(len(some_MD))
