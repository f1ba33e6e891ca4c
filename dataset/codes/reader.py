"""Reads codes: one folder of either layout, and several folders of the same images as one."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from dataset.codes.manifest import Manifest, Place, load_array, read_manifest, short, what_is_there
from utils.cli import InputError
from utils.log import progress

READERS = 4  # threads that read one file an image: twice as fast from a disk, no faster from RAM
MANY = 512  # files, below which handing them to threads takes longer


class Codes:
    """Codes, opened: `len`, `views`, `tokens`, `manifest` (the first there is, or None), and batches by image index.

    Images that could not be read have no codes and no index; labels are those of the images that have one.
    roots: one folder or several of the same images, whose views are counted on: first those of the first folder.
    Raises InputError for a missing folder (naming the sizes that are there), missing or truncated files, and folders
    that are not of the same images, labels, grid, codebook, tokenizer and classes.
    """

    def __init__(self, roots: str | Path | Sequence[str | Path], dataset: str, image_size: int) -> None:
        roots = [roots] if isinstance(roots, str | Path) else list(roots)
        if not roots:
            raise InputError("expected a folder of codes, got none")
        self.folders = [open_folder(Place(Path(root), dataset, image_size)) for root in roots]
        for i, folder in enumerate(self.folders):
            for other in self.folders[:i]:
                _refuse_a_mismatch(other, folder)
        self.images, self.tokens = self.folders[0].images, self.folders[0].tokens
        self.views = sum(folder.views for folder in self.folders)
        self.manifest = next((folder.manifest for folder in self.folders if folder.manifest), None)
        self._ends = np.array(list(accumulate(folder.views for folder in self.folders)))

    def __len__(self) -> int:
        return self.images

    @property
    def labels(self) -> np.ndarray:
        """Labels (images,) int64."""
        return self.folders[0].labels

    @property
    def hint(self) -> str:
        """How to make a slow folder fast, one line; empty where nothing is slow."""
        slow = next((folder.place.root for folder in self.folders if isinstance(folder, PerImage)), None)
        if slow is None:
            return ""
        return (
            f"{slow} has one file an image, which is slow to read; pack it once: "
            f"python -m dataset.codes pack {slow} {slow}-packed"
        )

    def batch(self, indices: np.ndarray, views: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes (B, tokens) int64 of these images, one view each (the first by default), and labels (B,) int64."""
        indices = np.asarray(indices, np.int64)
        views = np.zeros_like(indices) if views is None else np.asarray(views, np.int64)
        if len(indices) != len(views):
            raise ValueError(f"{len(indices)} images, {len(views)} views: expected a view for each image")
        _check_range("image", indices, self.images)
        _check_range("view", views, self.views)
        if len(self.folders) == 1:
            codes = self.folders[0].gather(indices, views)
        else:
            codes = np.empty((len(indices), self.tokens), np.int64)
            which = np.searchsorted(self._ends, views, side="right")
            for number, folder in enumerate(self.folders):
                here = np.flatnonzero(which == number)
                first = self._ends[number] - folder.views
                codes[here] = folder.gather(indices[here], views[here] - first)
        return codes, self.folders[0].labels_of(indices)


class Packed:
    """A folder of packed shards, memory-mapped."""

    layout = "packed"

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place, self.manifest = place, manifest
        self.numbers, self.views, self.tokens = manifest.numbers, manifest.views, manifest.tokens
        self.images = len(self.numbers)
        if min(self.images, manifest.views, manifest.tokens, manifest.shard_size) < 1:
            raise InputError(f"{place.manifest} is of no codes: it has images, views, tokens or a shard size below 1")
        shards, labels = [], []
        for number in range(manifest.shards):
            shards.append(load_array(place.codes / f"{number:05d}.npy", mmap=True))
            labels.append(load_array(place.labels / f"{number:05d}.npy"))
            expected = (int(np.diff(manifest.starts)[number]), manifest.views, manifest.tokens)
            if shards[-1].shape != expected or labels[-1].shape != expected[:1]:
                raise InputError(
                    f"{place.codes}: shard {number:05d} has shape {shards[-1].shape} and {len(labels[-1])} labels, "
                    f"expected {expected}"
                )
            _require_whole(place.codes / f"{number:05d}.npy", shards[-1])
            _require_whole(place.labels / f"{number:05d}.npy", labels[-1])
        # (n * views, tokens) each, as plain arrays: a memmap takes 25 times as long to index.
        self._rows = [np.asarray(shard).reshape(-1, self.tokens) for shard in shards]
        self.labels = np.concatenate(labels).astype(np.int64, copy=False)
        self.dtype = shards[0].dtype

    def gather(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Codes (B, tokens) int64 of these images and views."""
        shards = self._shard_of(indices)
        rows = (indices - self.manifest.starts[shards]) * self.views + views
        codes = np.empty((len(indices), self.tokens), np.int64)
        table = self._rows
        for out, shard, row in zip(codes, shards.tolist(), rows.tolist(), strict=True):
            out[:] = table[shard][row]
        return codes

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        return self.labels[indices]

    def read(self, rows: range) -> np.ndarray:
        """Codes (n, views, tokens) of consecutive images, mapped anew: what was read before leaves this process's RAM."""
        if not rows:
            return np.empty((0, self.views, self.tokens), self.dtype)
        parts = []
        for shard in range(self._shard_of(rows[0]), self._shard_of(rows[-1]) + 1):
            first = int(self.manifest.starts[shard])
            mapped = load_array(self.place.files(shard, "packed")[0], mmap=True)
            parts.append(mapped[max(rows.start - first, 0) : rows.stop - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def file_of(self, row: int) -> Path:
        """The file that an image's codes are in."""
        return self.place.files(self._shard_of(row), "packed")[0]

    def _shard_of(self, rows: np.ndarray | int) -> np.ndarray | int:
        return np.searchsorted(self.manifest.starts, rows, side="right") - 1


class PerImage:
    """A folder of one file an image, as published; the manifest is optional."""

    layout = "per-image"

    def __init__(self, place: Place, manifest: Manifest | None) -> None:
        self.place, self.manifest = place, manifest
        codes, labels = _sizes(place.codes), _sizes(place.labels)
        if not codes:
            raise InputError(
                f"{place.codes} holds no codes: expected 0.npy, 1.npy, ... or packed shards and a manifest"
            )
        for name in sorted(codes.keys() ^ labels.keys())[:1]:
            folder = place.labels if name in codes else place.codes
            raise InputError(f"{folder / name} is missing: extract the codes again to restore it")
        self.names = sorted(codes, key=lambda name: int(name[:-4]))
        self.images = len(codes)
        self.numbers = np.array([int(name[:-4]) for name in self.names])
        if manifest and not np.array_equal(self.numbers, manifest.numbers):
            held = f"holds {len(codes)} of {len(manifest.numbers)} images"
            raise InputError(f"{place.codes} {held}, or others than its manifest says: extract the codes again")
        for folder, sizes in ((place.codes, codes), (place.labels, labels)):
            for name in self.names:  # all files of a folder have one shape, so one size
                if sizes[name] != sizes[self.names[0]]:
                    load_array(folder / name)
                    raise InputError(f"{folder / name} has another size than {self.names[0]}: extract the codes again")
        self._codes, self._labels = _Files(place.codes, self.names), _Files(place.labels, self.names)
        shape = self._codes.shape
        if len(shape) != 3 or shape[0] != 1 or 0 in shape:
            raise InputError(f"{self.file_of(0)} has shape {shape}; expected (1, views, tokens)")
        if self._labels.shape != (1,):
            raise InputError(f"{place.labels / self.names[0]} has shape {self._labels.shape}; expected (1,)")
        self.views, self.tokens = shape[1:]
        self.dtype = self._codes.dtype

    def gather(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Codes (B, tokens) int64 of these images and views."""
        codes = np.empty((len(indices), self.tokens), np.int64)
        for out, image, view in zip(codes, indices.tolist(), views.tolist(), strict=True):
            out[:] = self._codes.read(image)[0, view]
        return codes

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels (images,) int64: reads every label file, once."""
        parts = [range(i, min(i + 8192, self.images)) for i in range(0, self.images, 8192)]
        show = len(parts) > 10 and os.environ.get("RANK", "0") == "0"
        return np.concatenate([self.labels_of(part) for part in progress(parts, desc="reading labels", show=show)])

    def labels_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        if "labels" in vars(self):
            return self.labels[indices]
        return self._labels.read_all(indices).astype(np.int64, copy=False)

    def read(self, rows: range) -> np.ndarray:
        """Codes (n, views, tokens) of consecutive images."""
        return self._codes.read_all(rows)

    def file_of(self, row: int) -> Path:
        """The file that an image's codes are in."""
        return self.place.codes / self.names[row]


Folder = Packed | PerImage


def open_folder(place: Place) -> Folder:
    """The codes of one place. Raises InputError as Codes does."""
    if not place.codes.is_dir():
        raise InputError(what_is_there(place))
    manifest = read_manifest(place.manifest) if place.manifest.is_file() else None
    if manifest is None and place.unfinished.is_file():
        raise InputError(
            f"the extraction into {place.codes} is unfinished: run the same command (extract_codes_c2i.sh, or "
            "python -m dataset.codes) again to complete it"
        )
    if manifest is not None and manifest.layout == "packed":
        return Packed(place, manifest)
    return PerImage(place, manifest)


class _Files:
    """The arrays of a folder's `{i}.npy`, all of one shape and type: a header that equals the first is not parsed."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = str(folder), names
        first = load_array(folder / names[0])
        _require_whole(folder / names[0], first)
        self.shape, self.dtype = first.shape, first.dtype
        content = (folder / names[0]).read_bytes()
        plain = first.flags.c_contiguous and first.nbytes > 0
        self._header = content[: len(content) - first.nbytes] if plain else None
        self._length = len(content)

    def read(self, number: int) -> np.ndarray:
        """The array of a file; raises InputError if it is damaged or another kind of array."""
        path = f"{self.folder}/{self.names[number]}"
        if self._header:
            content = _bytes(path)
            if len(content) == self._length and content.startswith(self._header):
                return np.frombuffer(content, self.dtype, offset=len(self._header)).reshape(self.shape)
        array = load_array(Path(path))
        if array.shape != self.shape or array.dtype != self.dtype:
            raise InputError(
                f"{path} is {array.dtype} of shape {array.shape}, {self.names[0]} is {self.dtype} of shape {self.shape}: "
                "extract the codes again"
            )
        return array

    def read_all(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The arrays of many files, (n, ...) without their first dimension of 1, by threads where there are many."""
        arrays = np.empty((len(numbers), *self.shape[1:]), self.dtype)

        def fill(part: range) -> None:
            for row in part:
                arrays[row] = self.read(numbers[row])[0]

        each = max(MANY, -(-len(numbers) // READERS))
        parts = [range(start, min(start + each, len(numbers))) for start in range(0, len(numbers), each)]
        if len(parts) < 2:
            list(map(fill, parts))
            return arrays
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, parts))
        return arrays


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): extract the codes again to restore it") from None


def _require_whole(path: Path, array: np.ndarray) -> None:
    """Raise InputError for an array that is not of integers."""
    if array.dtype.kind in "iu":
        return
    unusual = int(np.sum(~np.isfinite(array))) if array.dtype.kind == "f" else 0
    more = f", {unusual} of its values not finite" if unusual else ""
    raise InputError(f"{path} holds {array.dtype}{more}; expected whole numbers: extract the codes again")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each `{i}.npy` of a folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if re.fullmatch(r"\d+\.npy", entry.name)}


def _check_range(what: str, values: np.ndarray, limit: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= limit):
        raise IndexError(f"{what} {values.min() if values.min() < 0 else values.max()}: there are 0 to {limit - 1}")


def _refuse_a_mismatch(one: Folder, other: Folder) -> None:
    """Raise InputError unless both folders are codes of the same images by the same tokenizer."""
    where = f"{one.place.codes} and {other.place.codes}"
    if one.place.codes.resolve() == other.place.codes.resolve():
        raise InputError(f"{one.place.root} is given twice: its views would count double")
    unlike = _unlike(one, other)
    if unlike:
        raise InputError(f"{where} are not of the same images and tokenizer: {'; '.join(unlike)}")
    different = np.flatnonzero(one.labels != other.labels)
    if len(different):
        i = different[0]
        raise InputError(
            f"{where} are not of the same images: {len(different)} labels differ, the first of image {i}: "
            f"{one.labels[i]} and {other.labels[i]}"
        )


def _unlike(one: Folder, other: Folder) -> list[str]:
    """`what: this and that` for each number and name that must agree; what a manifest leaves out agrees with anything."""
    pairs = [("images", one.images, other.images), ("tokens an image", one.tokens, other.tokens)]
    a, b = one.manifest, other.manifest
    if a and b:
        pairs.append(("codebook size", a.codebook_size, b.codebook_size))
        pairs.append(("skipped images", *([row["image"] for row in m.skipped] for m in (a, b))))
        known = ("tokenizer_sha256", "classes", "paths_sha256")
        rows = [(key.replace("_", " "), getattr(a, key), getattr(b, key)) for key in known]
        pairs += [row for row in rows if row[1] and row[2]]
    return [f"{what} {short(mine)} and {short(theirs)}" for what, mine, theirs in pairs if mine != theirs]
