"""Batches of crops for tokenizer training: from RAM where the whole set fits, else read by worker processes.

The place of an image that cannot be read is taken by the next one that can, so the plan of a run stays the same.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import tee

import numpy as np
import torch
from torch import Tensor

from dataset.images import CropBatch, CropRequest, ImageFolder, read_crops, readable_crops, skipped_text
from dataset.sampler import Selection
from utils.cli import InputError, note

CACHE_BYTES = 1_000_000_000


def mirrored(images_BHWC: Tensor, views_B: np.ndarray) -> Tensor:
    """The images, those of view 1 mirrored in place."""
    mirror_B = torch.from_numpy(views_B == 1)
    images_BHWC[mirror_B] = images_BHWC[mirror_B].flip(2)
    return images_BHWC


class ReadBatches:
    """Reads each batch when it is due."""

    def __init__(self, folder: ImageFolder, size: int, workers: int) -> None:
        self.folder, self.size, self.workers = folder, size, workers
        self._mentioned: set[int] = set()

    def __call__(
        self, selections: Iterable[Selection], places: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Iterator[Tensor]:
        """Selections (indices, views: 1 is mirrored) -> uint8 (B, size, size, 3).

        places: of random crops (B, 3), by images' numbers; None: centre crops.
        """
        selections, ahead = tee(selections)
        requests = (CropRequest(s.indices, (self.size,), places and places(s.indices)) for s in ahead)
        batches = read_crops(self.folder, requests, workers=self.workers)
        for selection, batch in zip(selections, batches, strict=True):
            yield mirrored(torch.from_numpy(self._complete(batch, selection.indices)), selection.views)

    def _complete(self, batch: CropBatch, indices: np.ndarray) -> np.ndarray:
        """The crops of a batch, with others in the places of the images that cannot be read."""
        if not batch.skipped:
            return batch.crops[0]
        if new := [row for row in batch.skipped if row["image"] not in self._mentioned]:
            note(f"{skipped_text(new, len(self.folder))}; the next ones take their places")
            self._mentioned |= {row["image"] for row in new}
        crops = dict(zip(batch.images.tolist(), batch.crops[0], strict=True))
        return np.stack([crops[i] if i in crops else self._next(i) for i in indices.tolist()])

    def _next(self, image: int) -> np.ndarray:
        for i in (*range(image + 1, len(self.folder)), *range(image)):
            if isinstance(crops := self.folder.crops(i, (self.size,)), list):
                return crops[0]
        raise InputError(f"none of the {len(self.folder)} images of {self.folder.root} can be read")


class CachedBatches:
    """Decodes every image once and keeps it."""

    def __init__(self, folder: ImageFolder, size: int, show: bool) -> None:
        crops, numbers = readable_crops(folder, size, show)
        self.images = torch.from_numpy(crops)
        self.rows = torch.from_numpy(np.searchsorted(numbers, np.arange(len(folder))) % len(numbers))

    def __call__(self, selections: Iterable[Selection]) -> Iterator[Tensor]:
        """Selections (indices, views: 1 is mirrored) -> uint8 (B, size, size, 3)."""
        for selection in selections:
            yield mirrored(self.images[self.rows[torch.from_numpy(selection.indices)]], selection.views)


def batches_of(
    folder: ImageFolder, size: int, workers: int, show: bool, random_crop: bool = False
) -> ReadBatches | CachedBatches:
    """What turns selections into batches: a cache if the crops are always the same and take at most a gigabyte."""
    cached = not random_crop and len(folder) * size * size * 3 <= CACHE_BYTES
    return CachedBatches(folder, size, show) if cached else ReadBatches(folder, size, workers)
