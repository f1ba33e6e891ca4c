"""Images on disk: the sorted ImageFolder, ADM's centre crop, and the views that codes are extracted from.

Pixels are uint8 (H, W, 3) RGB arrays; what they become for the tokenizer is utils/pixels.py.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from utils.cli import InputError
from utils.log import progress

SMALL_FILE = 16384  # bytes; below, handing a file to a thread takes longer than reading it (3.6 times, at 1 KB)
MOST_PIXELS = 178_956_970  # of an image; Pillow, too, takes more for an attack
# What the operating system says of a file that is not there or not ours, not of a machine in trouble.
OF_THE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW,
)  # fmt: skip
VIEWS = {"single": 1, "flip": 2, "ten-crop": 10}  # views an image, by the name of what makes them


class ImageFolder:
    """A folder with one folder of images a class: `paths`, their `names` in it, `labels` (N,) int64 and `classes`.

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
        self.names = [path[len(str(root)) + 1 :] for path in self.paths]
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


class Unreadable(ValueError):
    """Why a file is no image that can be used: the same words for the same bytes, wherever the file lies."""


def decode(path: str | Path) -> Image.Image:
    """An image file as RGB, as torchvision's ImageFolder loads it: converted by Pillow, EXIF's rotation not applied.

    Raises Unreadable for a file that is no image, is damaged or cannot be opened, and InputError where the machine is at
    fault: then the same file may be readable later.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise Unreadable("no image of a known format") from None
    except OSError as error:  # Pillow's own have no number
        if error.errno not in (None, *OF_THE_FILE):
            raise InputError(
                f"{path} cannot be read ({error.strerror}): run the same command again, or put an empty file in its place"
            ) from None
        raise Unreadable(error.strerror or reason(error)) from None
    except Exception as error:  # a decoder fails on damaged bytes in any way
        raise Unreadable(reason(error)) from None


def reason(error: Exception) -> str:
    """An error's kind and message without what differs from run to run."""
    message = re.sub(r"<([\w.]+) object at 0x\w+>", r"\1", " ".join(str(error).split()))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB. Raises InputError for one that cannot be read."""
    try:
        return decode(path)
    except Unreadable as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or delete it") from None


def center_crops(image: Image.Image, sizes: Sequence[int]) -> list[np.ndarray]:
    """The centre of an image at several sizes, its shorter side scaled to each: uint8 (size, size, 3).

    As in ADM (arXiv 2105.05233): halved by box filters while it is at least twice as large, then bicubic, which keeps
    large reductions free of aliasing. A half that several sizes need is made once. (A JPEG could be decoded at half its
    size at once, but its pixels would be others.) Raises Unreadable for an image too narrow to be scaled.
    """
    halves, crops = [image], []
    for size in sizes:
        level = 0
        while min(halves[level].size) >= 2 * size:
            level += 1
            if level == len(halves):
                half = halves[-1]
                halves.append(half.resize((half.width // 2, half.height // 2), Image.Resampling.BOX))
        crops.append(_scaled_crop(halves[level], size))
    return crops


def _scaled_crop(image: Image.Image, size: int) -> np.ndarray:
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise Unreadable(f"{image.width} x {image.height} pixels would be scaled to {width} x {height}")
    top, left = (height - size) // 2, (width - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size, top + size)))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """center_crops at one size."""
    return center_crops(image, [size])[0]


def cut_views(crops_NHWC: Tensor, size: int, mode: str) -> Tensor:
    """The views of centre crops that become codes: (N, VIEWS[mode], size, size, 3), on the crops' device.

    single: the crop itself. flip: and its mirror image. ten-crop: four corners and the centre of a crop larger than size,
    then those of its mirror image.
    """
    if mode == "single":
        return crops_NHWC[:, None]
    both = (crops_NHWC, crops_NHWC.flip(2))
    if mode == "flip":
        return torch.stack(both, 1)
    end = crops_NHWC.shape[1] - size
    middle = round(end / 2)  # half to even, as torchvision's
    corners = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))
    return torch.stack([crops[:, top : top + size, left : left + size] for crops in both for top, left in corners], 1)


def load_image(path: str | Path, size: int) -> np.ndarray:
    """The centre crop of an image file: uint8 (size, size, 3). Raises InputError for one that cannot be read."""
    return center_crop(read_image(path), size)


def are_large(paths: Sequence[str]) -> bool:
    """Whether threads read these files faster, judged by the one in the middle."""
    path = Path(paths[len(paths) // 2])
    return path.is_file() and path.stat().st_size > SMALL_FILE


def load_images(paths: Sequence[str], size: int, batch: int = 512, show: bool = True) -> Iterator[np.ndarray]:
    """Centre crops of image files in their order, uint8 (n, size, size, 3), n = batch but for the last; by threads where
    the files are large. Shows a progress bar."""
    large = are_large(paths)
    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(paths), desc="reading", unit=" images", show=show) as bar,
    ):
        run = pool.map if large else map
        for start in range(0, len(paths), batch):
            crops = np.stack(list(run(lambda path: load_image(path, size), paths[start : start + batch])))
            yield crops
            bar.update(len(crops))
