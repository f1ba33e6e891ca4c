"""The samples contract: `.npz` files with `arr_0` (uint8, NHWC) and `arr_1` (int64 labels), streamed both ways."""

import math
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from utils.cli import InputError
from utils.files import atomic_path
from utils.settings import LARGEST_SIDE

LARGEST_WHOLE = 4 << 30  # bytes of what is read in one piece
AT_ONCE = 1 << 28  # bytes of a batch
RATIO = 100  # no images are compressed to a hundredth
EXPECTED = "expected arr_0 (uint8 images of shape (N, H, W, 3)), labels in arr_1"


def write(
    path: str | Path, batches: Iterable[np.ndarray], shape: tuple[int, int, int, int], labels: np.ndarray
) -> None:
    """Write batches of uint8 images (n, H, W, 3), `shape` in all, and their labels; one batch in memory at a time."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        written = 0
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
            for batch in batches:
                if batch.dtype != np.uint8 or batch.shape[1:] != tuple(shape[1:]):
                    raise ValueError(f"expected uint8 images of {shape[1:]}, got {batch.dtype} of {batch.shape[1:]}")
                member.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0] or len(labels) != shape[0]:
            raise ValueError(f"expected {shape[0]} images and labels, got {written} and {len(labels)}")
        with archive.open("arr_1.npy", "w") as member:
            npy.write_array(member, np.asarray(labels, np.int64))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged archive raises into an InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged or not an .npz file: write or download it again ({reason})") from None


class Samples:
    """A samples file, opened: `shape` (N, H, W, 3), `labels` (N,) int64 or None, and `batches(n)`.

    label_note says why labels that the file holds are not used; "" otherwise. Raises InputError for a missing or damaged
    file, and for images that are not uint8 NHWC. Nothing is unpickled, and nothing is read before its size is checked.
    statistics_will_do: a file of statistics without images is one of 0 images.
    """

    def __init__(self, path: str | Path, statistics_will_do: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"there is no samples file {path}; expected an .npz with arr_0 (uint8, NHWC)")
        self._refuse_other_formats()
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            self.shape, self.labels, self.label_note = (0, 0, 0, 3), None, ""
            if "arr_0" not in names:
                if statistics_will_do and {"mu", "sigma"} <= set(names):
                    return
                raise InputError(f"{path} holds {_held(names)}; {EXPECTED}{_advice_for_names(names)}")
            with self._member(archive, "arr_0") as (_, self.shape, self._fortran, dtype):
                self._check_images(dtype)
            if "arr_1" in names:
                self.labels, self.label_note = self._labels(archive)

    def _refuse_other_formats(self) -> None:
        with open(self.path, "rb") as file:
            if file.read(6) == npy.MAGIC_PREFIX:
                raise InputError(f"{self.path} is an .npy file: write it again by np.savez(PATH, images, labels)")
        if zipfile.is_zipfile(self.path):
            with _reading(self.path), zipfile.ZipFile(self.path) as archive:
                if any(name.endswith("data.pkl") for name in archive.namelist()):
                    raise InputError(f"{self.path} is a file of torch.save: write its images by np.savez(PATH, images)")

    @contextmanager
    def _member(self, archive: zipfile.ZipFile, name: str) -> Iterator[tuple]:
        """An array's file behind its header, shape, whether in Fortran order, dtype. InputError for sizes that disagree."""
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            read = npy.read_array_header_1_0 if npy.read_magic(member) == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(member)
            if not dtype.hasobject:
                size = dtype.itemsize * math.prod(shape)
                if size != info.file_size - member.tell() or min(shape, default=0) < 0:
                    raise InputError(
                        f"{self.path} is damaged: {name} of shape {shape} takes {size} bytes, the file holds "
                        f"{info.file_size - member.tell()}; write or download it again"
                    )
                if size > 1 << 28 and size > RATIO * info.compress_size:
                    raise InputError(
                        f"{self.path} is refused: {info.compress_size} bytes in it unfold to {size} of {name}, as no images do"
                    )
            yield member, shape, fortran, dtype

    def _check_images(self, dtype: np.dtype) -> None:
        shape = self.shape
        kind = f"{self.path}: arr_0 is {dtype} of shape {shape}; expected uint8 of shape (N, H, W, 3)"
        if advice := _advice_for_images(shape, dtype):
            raise InputError(f"{kind}{advice}")
        if 0 in shape:
            raise InputError(f"{self.path} holds no images (arr_0 is of shape {shape}): sample again")
        if max(shape[1:]) > LARGEST_SIDE:
            raise InputError(f"{kind}, H and W at most {LARGEST_SIDE}")
        if self._fortran and math.prod(shape) > LARGEST_WHOLE:
            raise InputError(
                f"{self.path}: arr_0 is in Fortran order and too large to be read whole: write it by "
                "np.savez(PATH, np.ascontiguousarray(images), labels)"
            )

    def _labels(self, archive: zipfile.ZipFile) -> tuple[np.ndarray | None, str]:
        """The labels, or None and why they are not used."""
        n = len(self)
        with self._member(archive, "arr_1") as (member, shape, _, dtype):
            note = f"the labels of {self.path} are ignored: arr_1 is {dtype} of shape {shape}, expected int64 of shape ({n},)"
            if dtype.kind not in "iuf" or shape not in ((n,), (n, 1)):
                return None, note
            data = member.read()
        labels = np.frombuffer(data, dtype).reshape(n)
        if dtype.kind == "f" and not (np.isfinite(labels).all() and (labels == np.floor(labels)).all()):
            return None, note
        return labels.astype(np.int64), ""

    def __len__(self) -> int:
        return self.shape[0]

    def statistics(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """The arrays of these names and shapes, float64; those that the file does not hold are left out.

        Raises InputError for another shape, or for values that are no numbers.
        """
        found = {}
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            for name in (name for name in shapes if f"{name}.npy" in archive.namelist()):
                with self._member(archive, name) as (member, shape, fortran, dtype):
                    if shape != shapes[name] or dtype.kind not in "fiu":
                        raise InputError(
                            f"{self.path} holds {name} of {dtype} and shape {shape}, expected numbers of shape {shapes[name]}"
                        )
                    values = np.frombuffer(member.read(), dtype).reshape(shape, order="F" if fortran else "C")
                found[name] = values.astype(np.float64)
        return found

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3), read from the file as they are asked for; n = size but for the last, or where images are so large
        that so many take more than 256 MB."""
        if len(self) == 0:  # a file of statistics
            return
        image_bytes = math.prod(self.shape[1:])
        size = min(size, max(1, AT_ONCE // image_bytes))
        with zipfile.ZipFile(self.path) as archive, self._member(archive, "arr_0") as (member, *_):
            if self._fortran:  # rare: written by other software
                with _reading(self.path):
                    images = np.frombuffer(member.read(), np.uint8).reshape(self.shape, order="F")
                yield from (images[start : start + size] for start in range(0, len(self), size))
                return
            for start in range(0, len(self), size):
                n = min(size, len(self) - start)
                with _reading(self.path):
                    data = member.read(n * image_bytes)
                if len(data) != n * image_bytes:
                    raise InputError(f"{self.path} ends after {start + len(data) // image_bytes} of {len(self)} images")
                yield np.frombuffer(data, np.uint8).reshape(n, *self.shape[1:])


def _held(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:8])[:200] or "nothing"


def _advice_for_names(names: Collection[str]) -> str:
    """What to do with a file without arr_0."""
    if {"mu", "sigma"} <= set(names):
        return ": these are statistics without images, which serve as a reference for FID only"
    if len(names) == 0:
        return ""
    return ": write it again by np.savez(PATH, images, labels), unnamed"


def _advice_for_images(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """What makes uint8 NHWC images of an array; "" if it is one."""
    if dtype.hasobject:
        return ": write it again from images of one size"
    if dtype.kind == "f":
        return ": write (x * 255) of values in [0, 1], or (x + 1) * 127.5 of values in [-1, 1], rounded, as uint8"
    if len(shape) == 3:
        return ": one grey image a row? write np.stack([x] * 3, -1)"
    if len(shape) != 4:
        return ": write the images in this form"
    if shape[1] == 3 and shape[3] != 3:
        return ": write x.transpose(0, 2, 3, 1)"
    if shape[3] == 1:
        return ": write np.repeat(x, 3, -1), as these are grey"
    if shape[3] == 4:
        return ": write x[..., :3], without the fourth channel"
    if shape[3] != 3:
        return ": write the images in this form"
    return "" if dtype == np.uint8 else ": write x.astype(np.uint8), if its values are in 0..255"
