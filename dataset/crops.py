"""One image file: its pixels as RGB, ADM's crops of them, and the views that codes are extracted from.

Pixels are uint8 (H, W, 3) RGB arrays; what they become for the tokenizer is utils/pixels.py.
"""

import errno
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils.cli import InputError

MOST_PIXELS = 178_956_970  # of an image; Pillow, too, takes more for an attack
# What the operating system says of a file that is not there or not ours, not of a machine in trouble.
OF_THE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW,
)  # fmt: skip
VIEWS = {"single": 1, "flip": 2, "ten-crop": 10}  # views an image, by the name of what makes them


class Unreadable(ValueError):
    """Why a file is no image that can be used: the same words for the same bytes, wherever the file lies."""


def decode(path: str | Path, background: str = "white", turn: bool = False) -> Image.Image:
    """An image file as RGB, as torchvision's ImageFolder loads it, but for what would come out wrong: transparent pixels lie
    on the background, and 16-bit grey is scaled to 8 bits. turn: apply the EXIF orientation.

    Raises Unreadable for a file that is no image, is damaged, has 32-bit pixels or cannot be opened, and InputError where
    the machine is at fault: then the same file may be readable later.
    """
    try:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image) if turn and orientation(image) != 1 else image
            return to_rgb(turned, image.format, background)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # a decoder fails on damaged bytes in any way; Pillow's own OSErrors have no number
        if isinstance(error, OSError) and error.errno not in (None, *OF_THE_FILE):
            raise InputError(
                f"{path} cannot be read ({error.strerror}): run the same command again, or put an empty file in its place"
            ) from None
        raise Unreadable(reason(error)) from None


def to_rgb(image: Image.Image, format: str | None, background: str) -> Image.Image:
    """An image of any mode as RGB. Raises Unreadable for 32-bit pixels: they have no known range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        pixels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise Unreadable("32-bit pixels, which have no known range: save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image; 1 is upright, or unknown."""
    if "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata
        return 1


def reason(error: Exception) -> str:
    """Why a file cannot be read, without what differs from run to run."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = re.sub(r"<([\w.]+) object at 0x\w+>", r"\1", " ".join(str(error).split()))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


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
                halves.append(_half(halves[-1]))
        image = _scaled(halves[level], size)
        crops.append(_cut(image, (image.height - size) // 2, (image.width - size) // 2, size))
    return crops


def random_crop(image: Image.Image, size: int, place: Sequence[float]) -> np.ndarray:
    """A square of an image that shows 80 to 100 % of its shorter side, anywhere in it: uint8 (size, size, 3).

    As in ADM's training, scaled like center_crops. place: three numbers in [0, 1), for the scale, the row and the column.
    """
    shorter = size + int(place[0] * (math.ceil(size / 0.8) - size + 1))
    while min(image.size) >= 2 * shorter:
        image = _half(image)
    image = _scaled(image, shorter)
    top, left = (int(at * (side - size + 1)) for at, side in zip(place[1:], (image.height, image.width), strict=True))
    return _cut(image, top, left, size)


def _half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)


def _cut(image: Image.Image, top: int, left: int, size: int) -> np.ndarray:
    return np.array(image.crop((left, top, left + size, top + size)))


def _scaled(image: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise Unreadable(f"{image.width} x {image.height} pixels would be scaled to {width} x {height}")
    return image.resize((width, height), Image.Resampling.BICUBIC)


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
