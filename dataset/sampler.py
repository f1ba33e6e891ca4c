"""Which images make up step s of an epoch, which view of each, and whose label is dropped: functions of (seed, epoch)
and position, the same for any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from utils import streams


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
    for step in range(first_step, images // global_batch):
        indices = order[step * global_batch : (step + 1) * global_batch][part]
        view = (streams.uniform(seed, streams.VIEW, epoch, indices) * views).astype(np.int64)
        dropped = streams.uniform(seed, streams.LABEL_DROP, epoch, indices) < label_drop
        yield Selection(indices, view, dropped)
