"""What lies on the disk: packed shards, which training reads, and one file an image, from which they are packed."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np

from dataset.codes.manifest import Manifest, Place, load_array, read_manifest, shard_digest
from utils.cli import InputError
from utils.log import progress

READERS = 4  # threads that read one file an image


class Packed:
    """A set of codes in packed shards, memory-mapped.

    images: how many have codes; numbers (images,): which ones; labels (images,) int64. source: what these are a packed
    copy of, None if they are no copy; origin: the place of it, or of these.
    """

    layout = "packed"

    def __init__(self, place: Place, manifest: Manifest, source: "PerImage | None" = None) -> None:
        self.place, self.manifest, self.source = place, manifest, source
        self.origin = source.place if source else place
        self.views, self.tokens = manifest.views, manifest.tokens
        # (n * views, tokens) of each shard, as plain arrays: a memmap takes 25 times as long to index.
        self._shards: dict[int, np.ndarray] = {}
        all_labels = []
        for number in manifest.own_shards:
            codes, labels = place.files(number, "packed")
            shard_NVL, labels_N = load_array(codes, mmap=True), load_array(labels)
            expected = (len(manifest.rows(number)) - len(manifest.gaps(number)), self.views, self.tokens)
            if shard_NVL.shape != expected or shard_NVL.dtype != manifest.dtype or labels_N.shape != expected[:1]:
                raise InputError(
                    f"{codes} has shape {shard_NVL.shape}, {shard_NVL.dtype}, and labels of shape {labels_N.shape}; "
                    f"expected {expected}, {manifest.dtype}: extract the codes again"
                )
            self._shards[number] = np.asarray(shard_NVL).reshape(-1, self.tokens)
            all_labels.append(labels_N)
        self.labels = np.concatenate(all_labels).astype(np.int64, copy=False)
        self.images, self.numbers = len(self.labels), source.numbers if source else manifest.numbers

    def gather(self, indices: np.ndarray, views: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """Write the codes of these images and views into the rows `at` of out (B, tokens)."""
        shards = self._shard_of(indices)
        rows = (indices - self.manifest.starts[shards]) * self.views + views
        table = self._shards
        for i, shard, row in zip(at.tolist(), shards.tolist(), rows.tolist(), strict=True):
            out[i] = table[shard][row]

    def read(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, views, tokens) and labels (n,) of consecutive images, mapped anew: what was read before leaves RAM."""
        parts, starts = [np.empty((0, self.views, self.tokens), self.manifest.dtype)], self.manifest.starts
        for number in self._shards:
            first, stop = max(rows.start, starts[number]), min(rows.stop, starts[number + 1])
            if first < stop:
                mapped = load_array(self.place.files(number, "packed")[0], mmap=True)
                parts.append(mapped[first - starts[number] : stop - starts[number]])
        return np.concatenate(parts), self.labels[rows.start : rows.stop]

    def first_above(self, limit: int) -> tuple[int, int] | None:
        """The first image (row) with a code above limit, and that code; None if there is none.

        Looks only through shards whose manifest does not say that they have none.
        """
        known = dict(enumerate(self.manifest.shards_max))
        suspect = [number for number in self._shards if known.get(number, limit + 1) > limit]
        for number in progress(suspect, desc="checking codes", unit=" shards", delay=5):
            rows = self._shards[number]
            if rows.size and rows.max() > limit:
                row = int((rows > limit).any(1).argmax())
                return int(self.manifest.starts[number]) + row // self.views, int(rows[row].max())
        return None

    def file_of(self, row: int) -> Path:
        """The file that an image's codes are in."""
        return self.place.files(self._shard_of(row), "packed")[0]

    def _shard_of(self, rows: np.ndarray | int) -> np.ndarray | int:
        return np.searchsorted(self.manifest.starts, rows, side="right") - 1


class PerImage:
    """One file an image, as published: codes (1, views, tokens) and labels (1,); the manifest is optional.

    state: a hash of all names, sizes and times of change, so that a packed copy knows what it was made of.
    """

    layout = "per-image"

    def __init__(self, place: Place, manifest: Manifest | None) -> None:
        self.place, self.manifest = place, manifest
        codes, labels = _listed(place.codes), _listed(place.labels)
        if not codes:
            raise InputError(
                f"{place.codes} holds no codes: expected 0.npy, 1.npy, ..., or packed shards and {place.manifest}"
            )
        for name in sorted(codes.keys() ^ labels.keys())[:1]:
            folder = place.labels if name in codes else place.codes
            raise InputError(f"{folder / name} is missing: extract the codes again to restore it")
        names = sorted(codes, key=lambda name: int(name[:-4]))
        self.numbers, self.images = np.array([int(name[:-4]) for name in names]), len(names)
        expected = len(manifest.own_images) - len(manifest.skipped) if manifest else self.images
        if self.images != expected or (manifest and (self.numbers != manifest.numbers).any()):
            raise InputError(
                f"{place.codes} holds {self.images} of {expected} images, or others than its manifest says: "
                "extract the codes again"
            )
        for folder, files in ((place.codes, codes), (place.labels, labels)):  # most damage is seen without reading all
            for name in [name for name in names if files[name][0] != files[names[0]][0]][:1]:
                load_array(folder / name)
        shape = load_array(place.codes / names[0]).shape
        size = int(np.prod(shape))
        grid = manifest is None and len(shape) == 3 and shape[1] == shape[2] > 1
        if len(shape) != 3 or shape[0] != 1 or not size or grid:
            raise InputError(
                f"{place.codes / names[0]} has shape {shape}; expected (1, views, tokens), with one view (1, 1, {size}): "
                f"reshape the codes; a grid must be flattened to (1, 1, {size})"
            )
        self.views, self.tokens = shape[1:]
        listed = "".join(f"{name} {codes[name]} {labels[name]}\n" for name in names)
        self.state = hashlib.sha256(listed.encode()).hexdigest()[:16]

    def read(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, views, tokens) int64 and labels (n,) int64 of consecutive images."""
        codes, labels = np.empty((len(rows), self.views, self.tokens), np.int64), np.empty(len(rows), np.int64)

        def fill(row: int) -> None:
            for path, out in zip(self.place.files(self.numbers[row], "per-image"), (codes, labels), strict=True):
                shape = (1, *out.shape[1:])
                array = _load_plain(path, shape)
                if array.shape != shape:
                    raise InputError(f"{path} has shape {array.shape}, expected {shape}: extract the codes again")
                out[row - rows.start] = array[0]

        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(fill, rows):
                pass
        return codes, labels

    def file_of(self, row: int) -> Path:
        """The file that an image's codes are in."""
        return self.place.files(self.numbers[row], "per-image")[0]


Folder = Packed | PerImage


def open_folder(place: Place, part: bool = False) -> Folder:
    """The codes of one place, which must be those of a --part where part is True, and may not be otherwise.

    Raises InputError for others, and for codes that are unfinished, incomplete or not those of their manifest.
    """
    manifest = read_manifest(place.manifest)
    if manifest is None and place.unfinished.is_file():
        raise InputError(
            f"the extraction into {place.codes} is unfinished: run the same command (extract_codes_c2i.sh, or "
            "python -m dataset.codes) again to complete it"
        )
    if part and not (manifest and manifest.part):
        raise InputError(f"{place.codes} is no part of codes: its extraction had no --part")
    if manifest and manifest.part and not part:
        raise InputError(
            f"{place.codes} holds part {manifest.part} of the codes: python -m dataset.codes merge puts all parts together"
        )
    packed = manifest is not None and manifest.layout == "packed"
    return Packed(place, manifest) if packed else PerImage(place, manifest)


def alteration(folder: Folder, shard: int) -> str:
    """In words, that the bytes of a shard are not those that the manifest has a hash of; empty where they are."""
    m, place = folder.manifest, folder.place
    numbers = [shard] if m.layout == "packed" else folder.numbers[m.starts[shard] : m.starts[shard + 1]]
    if shard_digest(place, m.layout, numbers) == m.shards_sha256[shard]:
        return ""
    name = place.files(numbers[0], m.layout)[0].name
    return f"{place.codes}: {name}, or another file of its shard, was changed after it was written: not the manifest's sha256"


@cache
def _header(shape: tuple[int, ...]) -> bytes:
    """What an .npy file of int64 of this shape begins with."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _load_plain(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """load_array, five times as fast for int64 of this shape."""
    header = _header(shape)
    with suppress(OSError, ValueError), open(path, "rb", buffering=0) as file:
        content = file.read()
        if content.startswith(header):
            return np.frombuffer(content, np.int64, offset=len(header)).reshape(shape)
    return load_array(path)


def _listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each `{i}.npy` of a folder; other files are passed over."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        rows = [(e.name, e.stat()) for e in entries if re.fullmatch(r"(0|[1-9][0-9]{0,17})\.npy", e.name)]
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in rows}
