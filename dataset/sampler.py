"""Which images make up step s of an epoch, which view of each, and whose label is dropped: functions of (seed, epoch)
and position, the same for any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from utils import streams

STEPS_AT_ONCE = 64  # drawn together: the keys of a draw take longer to absorb than one step's numbers


class Selection(NamedTuple):
    """One process's part of a global batch, (B,) each."""

    indices: np.ndarray  # int64, images
    views: np.ndarray  # int64, view of each
    dropped: np.ndarray  # bool, train this one without its label


def epoch_batches(
    images: int,
    views: int,
    global_batch: int,
    *,
    seed: int,
    epoch: int,
    label_drop: float,
    first_step: int = 0,
    part: slice = slice(None),
) -> Iterator[Selection]:
    """The batches of an epoch from first_step on; `part` is this process's slice of each. The last, short batch is left out."""
    order = streams.permutation(images, seed, streams.ORDER, epoch)
    steps = images // global_batch
    order_SG = order[: steps * global_batch].reshape(steps, global_batch)
    for start in range(first_step, steps, STEPS_AT_ONCE):
        indices_SB = order_SG[start : start + STEPS_AT_ONCE, part]
        view_SB = (streams.uniform(seed, streams.VIEW, epoch, indices_SB) * views).astype(np.int64)
        dropped_SB = streams.uniform(seed, streams.LABEL_DROP, epoch, indices_SB) < label_drop
        yield from map(Selection, indices_SB, view_SB, dropped_SB)
