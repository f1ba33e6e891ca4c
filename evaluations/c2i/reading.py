"""Image files to arrays, by threads and in order."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from utils.log import progress


def read_batches(
    paths: Sequence[str], read: Callable[[str], np.ndarray], batch_size: int = 512, show: bool = True
) -> Iterator[np.ndarray]:
    """Stacks of what `read` makes of each path, in their order; two batches in memory at most."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(total=len(paths), desc="reading", unit=" images", show=show) as bar,
    ):
        for start in range(0, len(paths), batch_size):
            batch = np.stack(list(pool.map(read, paths[start : start + batch_size])))
            yield batch
            bar.update(len(batch))
