"""A folder of images of one size, as the evaluator takes an .npz."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.crops import Unreadable
from dataset.images import ImageFolder, quiet_pillow
from utils.cli import InputError
from utils.samples import LARGEST_SIDE, Samples


class FolderSamples(Samples):
    """The images in the sorted order of their names; labels where there are several folders of them.

    Raises InputError for images of different sizes, and for one that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        quiet_pillow()
        self.path, self._folder, self.label_note = Path(path), ImageFolder(path), ""
        sizes = [self._size(name) for name in self._folder.paths]
        odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if odd is not None:
            raise InputError(
                f"{path} holds images of different sizes: {self._folder.names[0]} is {sizes[0][0]}x{sizes[0][1]}, "
                f"{self._folder.names[odd]} {sizes[odd][0]}x{sizes[odd][1]} (width x height); make a batch of one size by "
                "python -m evaluations.c2i.reference"
            )
        width, height = sizes[0]
        if max(width, height) > LARGEST_SIDE:
            raise InputError(f"{path} holds images of {width}x{height}; expected at most {LARGEST_SIDE} pixels a side")
        self.shape = (len(sizes), height, width, 3)
        self.labels = self._folder.labels if len(self._folder.classes) > 1 else None

    @staticmethod
    def _size(path: str | Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:
                return image.size
        except Exception as error:  # whatever a damaged file makes of Pillow
            raise InputError(f"{path} cannot be read as an image ({error}): replace or delete it") from None

    def statistics(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """None, as there are images only."""
        return {}

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3), n = size but for the last; read when they are asked for."""
        for start in range(0, len(self), size):
            yield np.stack([self._image(i) for i in range(start, min(start + size, len(self)))])

    def _image(self, i: int) -> np.ndarray:
        try:
            return np.asarray(self._folder.read(i))
        except Unreadable as error:
            raise InputError(
                f"{self._folder.paths[i]} cannot be read as an image ({error}): replace or delete it"
            ) from None
