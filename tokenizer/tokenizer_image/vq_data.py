"""Batches of crops for tokenizer training: from RAM where the whole set fits, else read by worker processes."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.images import ImageFolder, load_image, load_images
from dataset.sampler import Selection

CACHE_BYTES = 1_000_000_000


class Crops(Dataset):
    """(image, mirrored) -> uint8 (size, size, 3), the centre of image i of the folder."""

    def __init__(self, folder: ImageFolder, size: int) -> None:
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        image, mirrored = key
        crop = load_image(self.folder.paths[image], self.size)
        return torch.from_numpy(np.array(crop[:, ::-1] if mirrored else crop))


class ReadBatches:
    """Reads each batch when it is due."""

    def __init__(self, crops: Crops, workers: int) -> None:
        self.crops, self.workers = crops, workers

    def __call__(self, selections: Iterable[Selection]) -> Iterator[Tensor]:
        """Selections (indices, views: 1 is mirrored) -> uint8 (B, size, size, 3)."""
        keys = (list(zip(s.indices.tolist(), s.views.tolist(), strict=True)) for s in selections)
        pin = torch.cuda.is_available()
        return iter(DataLoader(self.crops, batch_sampler=keys, num_workers=self.workers, pin_memory=pin))


class CachedBatches:
    """Decodes every image once and keeps it."""

    def __init__(self, crops: Crops, show: bool) -> None:
        self.images = torch.empty((len(crops), crops.size, crops.size, 3), dtype=torch.uint8)
        done = 0
        for batch in load_images(crops.folder.paths, crops.size, show=show):
            self.images[done : done + len(batch)] = torch.from_numpy(batch)
            done += len(batch)

    def __call__(self, selections: Iterable[Selection]) -> Iterator[Tensor]:
        """Selections (indices, views: 1 is mirrored) -> uint8 (B, size, size, 3)."""
        for selection in selections:
            images_BHWC = self.images[torch.from_numpy(selection.indices)]
            mirrored = torch.from_numpy(selection.views == 1)
            images_BHWC[mirrored] = images_BHWC[mirrored].flip(2)
            yield images_BHWC


def batches_of(folder: ImageFolder, size: int, workers: int, show: bool) -> ReadBatches | CachedBatches:
    """What turns selections into batches: a cache if the crops take at most a gigabyte."""
    crops = Crops(folder, size)
    cached = len(folder) * size * size * 3 <= CACHE_BYTES
    return CachedBatches(crops, show) if cached else ReadBatches(crops, workers)
