"""The samples contract: `.npz` files with `arr_0` (uint8, NHWC) and `arr_1` (int64 labels), streamed both ways."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from utils.cli import InputError
from utils.files import atomic_path


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
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged or not an .npz file: write or download it again ({reason})") from None


class Samples:
    """A samples file, opened: `shape` (N, H, W, C), `labels` (N,) int64 or None, and `batches(n)`.

    Raises InputError for a missing or damaged file, a missing arr_0, or images that are not uint8 NHWC.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"there is no samples file {path}; expected an .npz with arr_0 (uint8, NHWC)")
        with _reading(self.path), zipfile.ZipFile(self.path) as archive, np.load(self.path) as file:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                raise InputError(f"{path} holds {', '.join(names) or 'nothing'}; expected arr_0 (uint8, NHWC images)")
            with archive.open("arr_0.npy") as member:
                self.shape, self._fortran, dtype = self._header(member)
            self.labels = np.asarray(file["arr_1"]).astype(np.int64) if "arr_1" in file else None
        if len(self.shape) != 4 or self.shape[-1] != 3 or dtype != np.uint8:
            raise InputError(f"{path}: arr_0 is {dtype} of shape {self.shape}; expected uint8 of shape (N, H, W, 3)")
        if self.labels is not None and self.labels.shape != self.shape[:1]:
            raise InputError(f"{path}: {self.shape[0]} images but labels of shape {self.labels.shape}")

    @staticmethod
    def _header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = npy.read_magic(member)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read(member)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3), n = size but for the last; read from the file as they are asked for."""
        if self._fortran:  # rare: written by other software
            with _reading(self.path), np.load(self.path) as file:
                images = file["arr_0"]
            yield from (images[start : start + size] for start in range(0, len(self), size))
            return
        image_bytes = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            self._header(member)
            for start in range(0, len(self), size):
                n = min(size, len(self) - start)
                with _reading(self.path):
                    data = member.read(n * image_bytes)
                if len(data) != n * image_bytes:
                    raise InputError(f"{self.path} ends after {start + len(data) // image_bytes} of {len(self)} images")
                yield np.frombuffer(data, np.uint8).reshape(n, *self.shape[1:])
