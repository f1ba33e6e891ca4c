"""What lies on the disk: packed shards, which training reads, and one file an image, from which they are packed."""

import hashlib
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np

from dataset.codes.manifest import Manifest, Place, load_array, read_manifest
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
        _check_sizes(place, manifest)
        self.images, self.views, self.tokens = len(manifest.numbers), manifest.views, manifest.tokens
        self.numbers = source.numbers if source else manifest.numbers
        if not self.images or len(self.numbers) != self.images:
            raise InputError(f"{place.manifest} is of no codes, or of other images than its source has")
        shards, labels = [], []
        for number in range(manifest.shards):
            codes, of = place.files(number, "packed")
            shards.append(load_array(codes, mmap=True))
            labels.append(load_array(of))
            expected = (int(np.diff(manifest.starts)[number]), self.views, self.tokens)
            if shards[-1].shape != expected or shards[-1].dtype != manifest.dtype or labels[-1].shape != expected[:1]:
                raise InputError(
                    f"{codes} has shape {shards[-1].shape}, {shards[-1].dtype}, and labels of shape {labels[-1].shape}; "
                    f"expected {expected}, {manifest.dtype}: extract the codes again"
                )
        # (n * views, tokens) each, as plain arrays: a memmap takes 25 times as long to index.
        self._rows = [np.asarray(shard).reshape(-1, self.tokens) for shard in shards]
        self.labels = np.concatenate(labels).astype(np.int64, copy=False)

    def gather(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Codes (B, tokens) int64 of these images and views."""
        shards = self._shard_of(indices)
        rows = (indices - self.manifest.starts[shards]) * self.views + views
        codes = np.empty((len(indices), self.tokens), np.int64)
        table = self._rows
        for out, shard, row in zip(codes, shards.tolist(), rows.tolist(), strict=True):
            out[:] = table[shard][row]
        return codes

    def read(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, views, tokens) and labels (n,) of consecutive images, mapped anew: what was read before leaves RAM."""
        parts = []
        for shard in range(self._shard_of(rows.start), self._shard_of(rows.stop - 1) + 1) if rows else ():
            first = int(self.manifest.starts[shard])
            mapped = load_array(self.place.files(shard, "packed")[0], mmap=True)
            parts.append(mapped[max(rows.start - first, 0) : rows.stop - first])
        empty = np.empty((0, self.views, self.tokens), self.manifest.dtype)
        return np.concatenate(parts or [empty]), self.labels[rows.start : rows.stop]

    def first_above(self, limit: int) -> tuple[int, int] | None:
        """The first image (row) with a code above limit, and that code; None if there is none.

        Looks only through shards whose manifest does not say that they have none.
        """
        known = dict(enumerate(self.manifest.shards_max))
        suspect = [shard for shard in range(len(self._rows)) if known.get(shard, limit + 1) > limit]
        show = sum(self._rows[shard].nbytes for shard in suspect) > 1 << 30
        for shard in progress(suspect, desc="checking codes", unit=" shards", show=show):
            rows = self._rows[shard]
            if rows.size and rows.max() > limit:
                row = int((rows > limit).any(1).argmax())
                return int(self.manifest.starts[shard]) + row // self.views, int(rows[row].max())
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
        if manifest and (
            self.images != manifest.images - len(manifest.skipped) or (self.numbers != manifest.numbers).any()
        ):
            raise InputError(
                f"{place.codes} holds {self.images} of {manifest.images - len(manifest.skipped)} images, or others than "
                "its manifest says: extract the codes again"
            )
        for folder, files in ((place.codes, codes), (place.labels, labels)):  # most damage is seen without reading all
            for name in [name for name in names if files[name][0] != files[names[0]][0]][:1]:
                load_array(folder / name)
        first = load_array(place.codes / names[0])
        if first.ndim != 3 or len(first) != 1 or not first.size:
            raise InputError(
                f"{place.codes / names[0]} has shape {first.shape}; expected (1, views, tokens), with one view "
                f"(1, 1, {first.size}): reshape the codes"
            )
        if manifest is None and first.shape[1] == first.shape[2] > 1:
            raise InputError(
                f"{place.codes / names[0]} has shape {first.shape}; expected (1, views, tokens): a grid of codes must be "
                f"flattened to (1, 1, {first.size})"
            )
        self.views, self.tokens = first.shape[1:]
        listed = "".join(f"{name} {codes[name]} {labels[name]}\n" for name in names)
        self.state = hashlib.sha256(listed.encode()).hexdigest()[:16]

    def gaps(self) -> str:
        """In words, how many numbers below the last one have no file, where no manifest says why; "" if all have one."""
        missing = int(self.numbers[-1]) + 1 - self.images
        if self.manifest or not missing:
            return ""
        first = int((self.numbers != np.arange(self.images)).argmax())
        return f" ({missing:,} of 0.npy to {self.numbers[-1]}.npy are missing, the first is {first}.npy)"

    def read(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, views, tokens) int64 and labels (n,) int64 of consecutive images."""
        codes, labels = np.empty((len(rows), self.views, self.tokens), np.int64), np.empty(len(rows), np.int64)

        outs = ((codes, _header((1, self.views, self.tokens))), (labels, _header((1,))))

        def fill(row: int) -> None:
            for path, (out, header) in zip(self.place.files(self.numbers[row], "per-image"), outs, strict=True):
                array = _load_plain(path, header, out[:1])
                if array.shape != out[:1].shape:
                    raise InputError(
                        f"{path} has shape {array.shape}, expected {out[:1].shape}: extract the codes again"
                    )
                out[row - rows.start] = array[0]

        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(fill, rows):
                pass
        return codes, labels

    def file_of(self, row: int) -> Path:
        """The file that an image's codes are in."""
        return self.place.files(self.numbers[row], "per-image")[0]


Folder = Packed | PerImage


def open_folder(place: Place) -> Folder:
    """The codes of one place. Raises InputError for codes that are unfinished, incomplete or not those of their manifest."""
    manifest = read_manifest(place.manifest)
    if manifest is None and place.unfinished.is_file():
        raise InputError(
            f"the extraction into {place.codes} is unfinished: run the same command (extract_codes_c2i.sh, or "
            "python -m dataset.codes) again to complete it"
        )
    if manifest and manifest.part:
        raise InputError(
            f"{place.codes} holds part {manifest.part} of the codes: python -m dataset.codes merge puts all parts together"
        )
    packed = manifest is not None and manifest.layout == "packed"
    return Packed(place, manifest) if packed else PerImage(place, manifest)


def _check_sizes(place: Place, manifest: Manifest) -> None:
    """Raise InputError for a manifest of more codes than its first and last shard hold, before anything is made of it."""
    for number in {0, manifest.shards - 1}:
        path = place.files(number, "packed")[0]
        images = len(manifest.rows(number)) - len(manifest.gaps(number))
        needed = images * manifest.views * manifest.tokens * manifest.dtype.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size < needed:
            load_array(path, mmap=True)
            raise InputError(f"{path} has {size} bytes, but {place.manifest} says {needed}: extract the codes again")


def _header(shape: tuple[int, ...]) -> bytes:
    """What an .npy file of int64 of this shape begins with."""
    content = BytesIO()
    np.save(content, np.zeros(shape, np.int64))
    return content.getvalue()[: -8 * math.prod(shape)]


def _load_plain(path: Path, header: bytes, like: np.ndarray) -> np.ndarray:
    """load_array, five times as fast where the file begins with this header."""
    with suppress(OSError), open(path, "rb", buffering=0) as file:
        content = file.read()
        if content.startswith(header) and len(content) == len(header) + like.nbytes:
            return np.frombuffer(content, np.int64, offset=len(header)).reshape(like.shape)
    return load_array(path)


def _listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each `{i}.npy` of a folder; other files are passed over."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        rows = [(e.name, e.stat()) for e in entries if re.fullmatch(r"(0|[1-9][0-9]{0,17})\.npy", e.name)]
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in rows}
