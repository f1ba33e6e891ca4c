"""Randomness as a function of what it is for: the same keys give the same numbers on any process, in any order.

A counter-based generator: each key is absorbed by one round of SplitMix64's finaliser (Steele et al. 2014).
Keys broadcast like numpy arrays, so uniform(seed, EPOCH_ORDER, epoch, np.arange(n)) draws n numbers at once.
"""

import numpy as np

# What a stream is for; part of its key, so that no two uses of one seed share numbers.
ORDER, VIEW, LABEL_DROP, SAMPLE, LABEL, DROPOUT, AUGMENT, HELD_OUT, CROP = range(9)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def bits(*keys: int | np.ndarray) -> np.ndarray:
    """64 random bits (uint64) for each combination of the broadcast integer keys (each >= 0)."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN)
    return state


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """A float64 in [0, 1) with 53 random bits for each combination of the broadcast keys."""
    return (bits(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *keys: int) -> np.ndarray:
    """A random order of 0..n-1 (int64) for these scalar keys."""
    return np.argsort(bits(*keys, np.arange(n)), kind="stable")
