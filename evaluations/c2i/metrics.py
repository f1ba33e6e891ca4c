"""The figures, from features and logits, in float64: Fréchet distance, Inception Score, KID, accuracy.

N, M items, D features, C classes. Precision and recall are in manifold.py.
"""

from collections.abc import Mapping

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import lapack
from torch import Tensor

from utils import streams

EPS = float(np.finfo(np.float64).eps)
SPLIT = 5000  # items a split of the Inception Score, as published
CHUNK = 1024  # rows in float64 at a time
KID_SUBSETS, KID_SIZE = 100, 1000


class Moments:
    """Mean and covariance of features that arrive in batches; exact in any order up to float64 rounding.

    Batches are merged by Chan, Golub and LeVeque's update (1983), so nothing cancels. Up to D items are kept as they are:
    they are a root of their covariance, of fewer rows than it has. On a GPU the products are made there.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        self.n, self.dimensions, self.device = 0, dimensions, torch.device(device)
        self._mean_D = np.zeros(dimensions)
        self._scatter_DD: np.ndarray | None = None  # of the items that are no longer kept
        self._merged, self._kept = 0, []

    @classmethod
    def given(cls, mean_D: np.ndarray, covariance_DD: np.ndarray) -> "Moments":
        """Moments known from elsewhere. Raises ValueError for shapes that do not fit, NaN or infinity."""
        mean_D, covariance_DD = np.array(mean_D, np.float64), np.array(covariance_DD, np.float64)
        if mean_D.ndim != 1 or covariance_DD.shape != 2 * mean_D.shape:
            raise ValueError(f"a mean of shape {mean_D.shape} and a covariance of shape {covariance_DD.shape}")
        if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
            raise ValueError("NaN or infinity in a mean or covariance")
        moments = cls(len(mean_D))
        moments.n = moments._merged = 2  # n - 1 = 1: the scatter is the covariance
        moments._mean_D, moments._scatter_DD = mean_D, (covariance_DD + covariance_DD.T) / 2
        return moments

    def add(self, features_ND: np.ndarray) -> None:
        """Take in a batch (n, D) of any float dtype."""
        if len(features_ND) == 0:
            return
        self._kept.append(np.array(features_ND))
        self.n += len(features_ND)
        if self.n - self._merged > self.dimensions:
            self._merge()

    def _merge(self) -> None:
        """Turn the kept items into sums."""
        if not self._kept:
            return
        kept_ND = np.concatenate(self._kept).astype(np.float64)
        mean_D = kept_ND.mean(axis=0)
        scatter_DD = self._gram(kept_ND - mean_D)
        if self._scatter_DD is not None:
            step_D, n, total = mean_D - self._mean_D, len(kept_ND), self._merged + len(kept_ND)
            scatter_DD += self._scatter_DD + np.outer(step_D, step_D) * (self._merged * n / total)
            mean_D = self._mean_D + step_D * (n / total)
        self._mean_D, self._scatter_DD, self._merged, self._kept = mean_D, scatter_DD, self.n, []

    def _gram(self, x_ND: np.ndarray) -> np.ndarray:
        if self.device.type == "cpu":
            return x_ND.T @ x_ND
        x = torch.from_numpy(x_ND).to(self.device)
        return (x.T @ x).cpu().numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to be stored; see from_arrays."""
        if self._scatter_DD is None and self._kept:
            return {"kept": np.concatenate(self._kept)}
        self._merge()
        return {"n": np.array(self.n), "mean": self._mean_D, "scatter": self._scatter_DD}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> "Moments":
        """What arrays() gave."""
        if "kept" in arrays:
            moments = cls(arrays["kept"].shape[1], device)
            moments.add(arrays["kept"])
            return moments
        moments = cls(len(arrays["mean"]), device)
        moments.n = moments._merged = int(arrays["n"])
        moments._mean_D, moments._scatter_DD = arrays["mean"], arrays["scatter"]
        return moments

    @property
    def mean_D(self) -> np.ndarray:
        if self._scatter_DD is None and self._kept:
            return np.concatenate(self._kept).mean(axis=0, dtype=np.float64)
        self._merge()
        return self._mean_D

    @property
    def root_ND(self) -> np.ndarray | None:
        """A with A' A the covariance and a row for each item, while no more than D items came; else None."""
        if self._scatter_DD is not None or self.n < 2:
            return None
        return (np.concatenate(self._kept).astype(np.float64) - self.mean_D) / np.sqrt(self.n - 1)

    @property
    def covariance_DD(self) -> np.ndarray:
        """The covariance with N - 1, as np.cov gives it. Raises ValueError for fewer than two items."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 items, got {self.n}")
        root_ND = self.root_ND
        if root_ND is not None:
            return self._gram(root_ND)
        self._merge()
        return self._scatter_DD / (self.n - 1)


def moments_of(features_ND: np.ndarray, device: torch.device | str = "cpu", rows: int = 4096) -> Moments:
    """The moments of an array (N, D), some rows at a time."""
    moments = Moments(features_ND.shape[1], device)
    for start in range(0, len(features_ND), rows):
        moments.add(features_ND[start : start + rows])
    return moments


def frechet_distance(first: Moments, second: Moments) -> float:
    """Fréchet distance of two normal distributions, |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)).

    The covariances may be rank-deficient. What rounding takes below zero is cut off.
    """
    difference_D = first.mean_D - second.mean_D
    sigma1_DD, sigma2_DD = first.covariance_DD, second.covariance_DD
    traces = np.trace(sigma1_DD) + np.trace(sigma2_DD)
    trace_root = _trace_root(sigma1_DD, first.root_ND, sigma2_DD, second.root_ND)
    return max(0.0, float(difference_D @ difference_D + traces - 2 * trace_root))


def _trace_root(
    sigma1_DD: np.ndarray, root1_ND: np.ndarray | None, sigma2_DD: np.ndarray, root2_ND: np.ndarray | None
) -> float:
    """tr sqrt(S1 S2), without a square root of a matrix.

    With S1 = A' A it is the sum of the square roots of the eigenvalues of A S2 A', and with S2 = B' B the sum of the
    singular values of A B'. A is the items where they are few, else S1's Cholesky factor, and where there is none,
    for want of rank, its eigenvectors without those of rounding noise: square roots of noise would add up.
    """
    if root1_ND is None and root2_ND is None:
        for sigma_DD, other_DD in ((sigma1_DD, sigma2_DD), (sigma2_DD, sigma1_DD)):
            factor_DD = _cholesky(sigma_DD)
            if factor_DD is not None:
                product_DD, _ = lapack.dsygst(other_DD.T, factor_DD, itype=2, lower=1)  # L' S L, its lower triangle
                return _sum_of_roots(product_DD)
        root1_ND, root2_ND = _eigen_root(sigma1_DD), _eigen_root(sigma2_DD)
    if root1_ND is not None and root2_ND is not None:
        return float(np.linalg.svd(root1_ND @ root2_ND.T, compute_uv=False).sum())
    root_ND, other_DD = (root1_ND, sigma2_DD) if root1_ND is not None else (root2_ND, sigma1_DD)
    return _sum_of_roots(root_ND @ other_DD @ root_ND.T)


def _sum_of_roots(product: np.ndarray) -> float:
    """Sum of the square roots of the eigenvalues of a symmetric matrix, of which the lower triangle is read."""
    values = scipy.linalg.eigvalsh(product, lower=True, driver="ev", check_finite=False)
    return float(np.sqrt(values.clip(min=0)).sum())


def _cholesky(sigma_DD: np.ndarray) -> np.ndarray | None:
    """L with L L' = sigma; None where sigma is, within rounding, not of full rank."""
    try:
        factor_DD = scipy.linalg.cholesky(sigma_DD.T, lower=True, check_finite=False)  # LAPACK's order of memory
    except scipy.linalg.LinAlgError:
        return None
    pivots_D = np.square(np.diagonal(factor_DD))
    return factor_DD if pivots_D.min() > len(sigma_DD) * EPS * pivots_D.max() else None


def _eigen_root(sigma_DD: np.ndarray) -> np.ndarray:
    """A (rank, D) with A' A = sigma."""
    values, vectors = np.linalg.eigh(sigma_DD)
    kept = values > len(sigma_DD) * EPS * values.max()
    return (vectors[:, kept] * np.sqrt(values[kept])).T


def inception_score(logits_NC: np.ndarray, split_size: int | None = SPLIT, shuffle_seed: int | None = None) -> float:
    """exp(mean KL(p(y|x) || p(y))) of each split, averaged over the splits (arXiv 1606.03498).

    As published: consecutive splits in the order of the items, the last one shorter and weighted the same, so the
    score depends on the order. With `shuffle_seed` the items are shuffled first, with `split_size` None there is one
    split of all: then it does not.
    """
    n = len(logits_NC)
    order = np.arange(n) if shuffle_seed is None else streams.permutation(n, shuffle_seed, streams.ORDER)
    size = split_size or n
    return float(np.mean([_score(logits_NC, order[start : start + size]) for start in range(0, n, size)]))


def _score(logits_NC: np.ndarray, chosen: np.ndarray) -> float:
    """One split: mean KL is the entropy of the mean probabilities less the mean entropy."""
    total_C, negative_entropy = torch.zeros(logits_NC.shape[1], dtype=torch.float64), 0.0
    for start in range(0, len(chosen), CHUNK):
        log_p_NC = torch.from_numpy(logits_NC[chosen[start : start + CHUNK]]).double().log_softmax(dim=1)
        p_NC = log_p_NC.exp()
        total_C += p_NC.sum(dim=0)
        negative_entropy += (
            torch.where(p_NC > 0, p_NC * log_p_NC, 0.0).sum().item()
        )  # 0 * -inf, where logits may be -inf
    marginal_C = total_C / len(chosen)
    return float(np.exp(negative_entropy / len(chosen) - torch.special.xlogy(marginal_C, marginal_C).sum().item()))


def kernel_distance(
    first_ND: np.ndarray, second_MD: np.ndarray, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): unbiased squared MMD with the kernel (x y / D + 1)^3; mean and deviation over 100 subsets.

    Subsets of 1,000 of each, or all of the smaller set, drawn without replacement. Raises ValueError for fewer than 2.
    """
    size = min(KID_SIZE, len(first_ND), len(second_MD))
    if size < 2:
        raise ValueError(f"KID needs at least 2 items, got {size}")
    found = []
    for i in range(KID_SUBSETS):
        x, y = (
            torch.from_numpy(items[streams.permutation(len(items), seed, streams.ORDER, i, side)[:size]]).to(device)
            for side, items in enumerate((first_ND, second_MD))
        )
        found.append(_squared_mmd(x.double(), y.double()))
    return float(np.mean(found)), float(np.std(found))


def _squared_mmd(x_ND: Tensor, y_ND: Tensor) -> float:
    n, dimensions = x_ND.shape
    xx, yy, xy = ((a @ b.T / dimensions + 1) ** 3 for a, b in ((x_ND, x_ND), (y_ND, y_ND), (x_ND, y_ND)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return (within - 2 * xy.mean()).item()


def class_accuracy(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of items whose largest logit is that of their label."""
    return float((logits_NC.argmax(axis=1) == labels_N).mean())


def class_counts(labels_N: np.ndarray) -> dict[str, int]:
    """How many classes there are, and how many items the smallest and the largest of them have."""
    _, counts = np.unique(labels_N, return_counts=True)
    return {"classes": len(counts), "least": int(counts.min()), "most": int(counts.max())}
