"""Images on disk: the sorted ImageFolder, ADM's centre crop, and the views that codes are extracted from.

Pixels are uint8 (H, W, 3) RGB arrays; what they become for the tokenizer is utils/pixels.py.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from utils.cli import InputError
from utils.log import progress

SMALL_FILE = 16384  # bytes; below, handing a file to a thread takes longer than reading it (3.6 times, at 1 KB)
VIEWS = {"single": 1, "flip": 2, "ten-crop": 10}  # views an image, by the name of what makes them


class ImageFolder:
    """A folder with one folder of images a class: `paths`, `labels` (N,) int64 and `classes`.

    Classes, and the images in them, are in torchvision's sorted order, so image i is the published image i.
    Raises InputError for a missing folder, one without class folders, or a class folder without images.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"there is no folder {root}; expected an ImageFolder: one folder of images a class")
        try:
            self.classes, numbers = find_classes(str(root))
        except FileNotFoundError:
            raise InputError(f"{root} has no class folders; expected one folder of images a class") from None
        samples = make_dataset(str(root), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        self.paths = [path for path, _ in samples]
        self.labels = np.array([label for _, label in samples], np.int64)
        counts = np.bincount(self.labels, minlength=len(self.classes))
        empty = [name for name, n in zip(self.classes, counts, strict=True) if n == 0]
        if empty:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            raise InputError(
                f"no images in class folder {', '.join(empty[:3])}{more} of {root}: "
                f"add some ({' '.join(IMG_EXTENSIONS)}) or delete the folder"
            )

    def __len__(self) -> int:
        return len(self.paths)


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB. Raises InputError for one that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or delete it") from None


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre of an image, its shorter side scaled to `size`: uint8 (size, size, 3).

    As in ADM (arXiv 2105.05233): halved by box filters while it is at least twice as large, then bicubic, which keeps
    large reductions free of aliasing.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top : top + size, left : left + size]


def ten_crops(crop: np.ndarray, size: int) -> np.ndarray:
    """Four corners and the centre of a square crop (c, c, 3), then those of its mirror image: (10, size, size, 3)."""
    end = len(crop) - size
    middle = round(end / 2)  # half to even, as torchvision's
    corners = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))
    return np.stack(
        [
            view[top : top + size, left : left + size]
            for view in (crop, crop[:, ::-1])
            for top, left in corners
        ]
    )  # fmt: skip


def load_image(path: str | Path, size: int) -> np.ndarray:
    """The centre crop of an image file: uint8 (size, size, 3). Raises InputError for one that cannot be read."""
    return center_crop(read_image(path), size)


def load_images(paths: Sequence[str], size: int, batch: int = 512, show: bool = True) -> Iterator[np.ndarray]:
    """Centre crops of image files in their order, uint8 (n, size, size, 3), n = batch but for the last; by threads where
    the files are large. Shows a progress bar."""
    large = Path(paths[len(paths) // 2]).stat().st_size > SMALL_FILE
    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(paths), desc="reading", unit=" images", show=show) as bar,
    ):
        run = pool.map if large else map
        for start in range(0, len(paths), batch):
            crops = np.stack(list(run(lambda path: load_image(path, size), paths[start : start + batch])))
            yield crops
            bar.update(len(crops))


def image_views(path: str | Path, size: int, mode: str, crop_range: float = 1.1) -> np.ndarray:
    """The views of an image file that become codes: uint8 (VIEWS[mode], size, size, 3).

    single: the centre crop. flip: and its mirror image. ten-crop: ten_crops of a centre crop of int(size * crop_range).
    """
    if mode == "ten-crop":
        return ten_crops(load_image(path, int(size * crop_range)), size)
    crop = load_image(path, size)
    return crop[None] if mode == "single" else np.stack((crop, crop[:, ::-1]))
