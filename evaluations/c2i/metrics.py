"""The figures, from features and logits, in float64: Fréchet distance, Inception Score, KID, accuracy.

N, M items, D features, C classes. Precision and recall are in manifold.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from utils import streams

SPLIT = 5000  # items a split of the Inception Score, as published
CHUNK = 1024  # rows in float64 at a time
KID_SUBSETS, KID_SIZE = 100, 1000


@dataclass
class Moments:
    """Mean and covariance of features (n, D) that arrive in batches; exact in any order up to float64 rounding.

    Batches are merged by Chan, Golub and LeVeque's update (1983), so nothing cancels.
    """

    n: int
    mean_D: Tensor  # float64
    scatter_DD: Tensor  # sum of outer products of what differs from the mean, float64

    @classmethod
    def empty(cls, dimensions: int, device: torch.device | str = "cpu") -> "Moments":
        """Moments of no items, to add to."""
        mean_D = torch.zeros(dimensions, dtype=torch.float64, device=device)
        return cls(0, mean_D, mean_D.new_zeros(dimensions, dimensions))

    @classmethod
    def given(cls, mean_D: np.ndarray, covariance_DD: np.ndarray) -> "Moments":
        """Moments known from elsewhere, float64."""
        return cls(2, torch.from_numpy(mean_D), torch.from_numpy((covariance_DD + covariance_DD.T) / 2))

    def add(self, features_ND: np.ndarray) -> None:
        """Take in a batch (n, D) of any float dtype."""
        if len(features_ND) == 0:
            return
        rows_ND = torch.from_numpy(np.ascontiguousarray(features_ND)).to(self.mean_D.device).double()
        n, total = len(rows_ND), self.n + len(rows_ND)
        step_D = rows_ND.mean(dim=0) - self.mean_D
        rows_ND = rows_ND - rows_ND.mean(dim=0)
        rows_ND = torch.cat([rows_ND, step_D[None] * (self.n * n / total) ** 0.5])  # between the batches' means
        self.scatter_DD.addmm_(rows_ND.T, rows_ND)
        self.mean_D += step_D * (n / total)
        self.n = total

    @property
    def covariance_DD(self) -> np.ndarray:
        """The covariance with N - 1, as np.cov gives it."""
        return self.scatter_DD.cpu().numpy() / (self.n - 1)


def moments_of(features_ND: np.ndarray, device: torch.device | str = "cpu") -> Moments:
    """The moments of an array (N, D), some rows at a time."""
    moments = Moments.empty(features_ND.shape[1], device)
    for start in range(0, len(features_ND), 4096):
        moments.add(features_ND[start : start + 4096])
    return moments


def frechet_distance(first: Moments, second: Moments) -> float:
    """Fréchet distance of two normal distributions, |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)).

    The covariances may be rank-deficient. What rounding takes below zero is cut off.
    """
    difference_D = first.mean_D.cpu().numpy() - second.mean_D.cpu().numpy()
    sigma1_DD, sigma2_DD = first.covariance_DD, second.covariance_DD
    traces = np.trace(sigma1_DD) + np.trace(sigma2_DD)
    return max(0.0, float(difference_D @ difference_D + traces - 2 * _trace_root(sigma1_DD, sigma2_DD)))


def _trace_root(sigma1_DD: np.ndarray, sigma2_DD: np.ndarray) -> float:
    """tr sqrt(S1 S2), without a square root of a matrix.

    With S1 = A' A it is the sum of the square roots of the eigenvalues of A S2 A', and with S2 = B' B the sum of the
    singular values of A B'. The first is faster by five times, but of full rank only if S2 is: square roots of rounding
    noise would add up.
    """
    root1_RD, root2_RD = _root(sigma1_DD), _root(sigma2_DD)
    if len(root1_RD) < len(sigma1_DD) and len(root2_RD) < len(sigma2_DD):
        return float(np.linalg.svd(root1_RD @ root2_RD.T, compute_uv=False).sum())
    (root_RD, other_DD), _ = sorted(((root1_RD, sigma2_DD), (root2_RD, sigma1_DD)), key=lambda pair: len(pair[0]))
    values = np.linalg.eigvalsh(root_RD @ other_DD @ root_RD.T)
    return float(np.sqrt(values.clip(min=0)).sum())


def _root(sigma_DD: np.ndarray) -> np.ndarray:
    """A (rank, D) with A' A = sigma, but for rounding noise: a Cholesky factor with pivots."""
    noise = len(sigma_DD) * np.finfo(np.float64).eps * sigma_DD.diagonal().max()
    factor_DD, order_D, rank, _ = dpstrf(sigma_DD, tol=noise)
    root_RD = np.empty((rank, len(sigma_DD)))
    root_RD[:, order_D - 1] = np.triu(factor_DD)[:rank]
    return root_RD


def inception_score(logits_NC: np.ndarray, split_size: int | None = SPLIT, shuffled: bool = False) -> float:
    """exp(mean KL(p(y|x) || p(y))) of each split, averaged over the splits (arXiv 1606.03498).

    As published: consecutive splits in the order of the items, the last one shorter and weighted the same, so the
    score depends on the order. With `shuffled` the items are shuffled first, with `split_size` None there is one
    split of all: then it does not.
    """
    n = len(logits_NC)
    order = streams.permutation(n, 0, streams.ORDER) if shuffled else np.arange(n)
    size = split_size or n
    return float(np.mean([_score(logits_NC, order[start : start + size]) for start in range(0, n, size)]))


def _score(logits_NC: np.ndarray, chosen: np.ndarray) -> float:
    """One split: mean KL is the entropy of the mean probabilities less the mean entropy."""
    total_C, entropy = torch.zeros(logits_NC.shape[1], dtype=torch.float64), 0.0
    for start in range(0, len(chosen), CHUNK):
        p_NC = torch.from_numpy(logits_NC[chosen[start : start + CHUNK]]).double().softmax(dim=1)
        total_C += p_NC.sum(dim=0)
        entropy += torch.special.entr(p_NC).sum().item()
    return float(np.exp(torch.special.entr(total_C / len(chosen)).sum().item() - entropy / len(chosen)))


def kernel_distance(
    first_ND: np.ndarray, second_MD: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): unbiased squared MMD with the kernel (x y / D + 1)^3; mean and deviation over 100 subsets.

    Subsets of 1,000 of each, or all of the smaller set, drawn without replacement.
    """
    size = min(KID_SIZE, len(first_ND), len(second_MD))
    found = []
    for i in range(KID_SUBSETS):
        x, y = (
            torch.from_numpy(items[streams.permutation(len(items), 0, streams.ORDER, i, side)[:size]]).to(device)
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
