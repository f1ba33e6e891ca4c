"""The codes contract: the one writer and reader of `CODE_PATH/{dataset}{size}_codes`, `..._labels` and their manifest.

Packed (ours): `00000.npy` of shape (n, views, tokens), unsigned, and labels (n,) int64 a shard; image i of the sorted
ImageFolder is row i % shard_size of shard i // shard_size; `CODE_PATH/{dataset}{size}.json`, written last, says the rest.
Per image (published): `{i}.npy` (1, views, tokens) int64 and `{i}.npy` (1,) int64 an image; the manifest is optional.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from utils.cli import InputError
from utils.files import atomic_path, write_json

SHARD_SIZE = 8192
FORMAT = 1
LAYOUTS = ("packed", "per-image")


@dataclass(frozen=True)
class Manifest:
    """What the codes are: of which images, by which tokenizer, in which form."""

    dataset: str
    image_size: int
    images: int
    views: int
    tokens: int
    codebook_size: int
    layout: str = "packed"
    shard_size: int = SHARD_SIZE
    view_mode: str = "single"
    crop_range: float | None = None
    vq_model: str = ""
    tokenizer_sha256: str = ""
    classes: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned dtype that holds the codebook; int64 in the published layout."""
        return np.dtype(np.int64) if self.layout == "per-image" else np.min_scalar_type(self.codebook_size - 1)

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min(self.images, (shard + 1) * self.shard_size))


@dataclass(frozen=True)
class Place:
    """Where the codes of one dataset and size lie."""

    root: Path
    dataset: str
    image_size: int

    @property
    def name(self) -> str:
        return f"{self.dataset}{self.image_size}"

    @property
    def codes(self) -> Path:
        return self.root / f"{self.name}_codes"

    @property
    def labels(self) -> Path:
        return self.root / f"{self.name}_labels"

    @property
    def manifest(self) -> Path:
        return self.root / f"{self.name}.json"

    @property
    def unfinished(self) -> Path:
        """The manifest of an extraction under way."""
        return self.root / f"{self.name}.unfinished.json"


class Writer:
    """Writes codes shard by shard, each atomically, from any number of processes; finish() comes last, once.

    Raises InputError if the place holds codes of other settings.
    """

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place, self.manifest = place, manifest
        for path in (place.manifest, place.unfinished):
            if path.is_file():
                different = _differences(_read_manifest(path), manifest)
                if different:
                    raise InputError(
                        f"{place.codes} holds codes of other settings ({'; '.join(different)}): "
                        "give another --code-path or delete that folder and its manifest"
                    )

    def start(self) -> None:
        """Record the settings, so that a later run can tell whether it continues this one."""
        write_json(self.place.unfinished, asdict(self.manifest))

    @property
    def finished(self) -> bool:
        """Whether the manifest and every file is there."""
        return self.place.manifest.is_file() and all(map(self.has, range(self.manifest.shards)))

    def has(self, shard: int) -> bool:
        """Whether a shard is complete."""
        if self.manifest.layout == "per-image":
            return all(self._paths(i)[1].is_file() for i in self.manifest.rows(shard))
        return all(path.is_file() for path in self._paths(shard))

    def write(self, shard: int, codes_NVL: np.ndarray, labels_N: np.ndarray) -> None:
        """Write the codes (n, views, tokens) and labels (n,) of a whole shard; its labels last."""
        m = self.manifest
        if codes_NVL.shape != (len(m.rows(shard)), m.views, m.tokens):
            raise ValueError(
                f"shard {shard}: expected {(len(m.rows(shard)), m.views, m.tokens)}, got {codes_NVL.shape}"
            )
        codes_NVL, labels_N = codes_NVL.astype(m.dtype), labels_N.astype(np.int64)
        if m.layout == "packed":
            self._save(shard, codes_NVL, labels_N)
            return
        for row, i in enumerate(m.rows(shard)):
            self._save(i, codes_NVL[row : row + 1], labels_N[row : row + 1])

    def finish(self) -> None:
        """Write the manifest: the codes are complete."""
        write_json(self.place.manifest, asdict(self.manifest))
        self.place.unfinished.unlink(missing_ok=True)

    def _paths(self, number: int) -> tuple[Path, Path]:
        name = f"{number}.npy" if self.manifest.layout == "per-image" else f"{number:05d}.npy"
        return self.place.codes / name, self.place.labels / name

    def _save(self, number: int, codes: np.ndarray, labels: np.ndarray) -> None:
        for path, array in zip(self._paths(number), (codes, labels), strict=True):
            with atomic_path(path) as temporary:
                np.save(temporary, array)


class Codes:
    """A folder of codes, opened: `len`, `views`, `tokens`, `manifest` (or None), and batches by image index.

    Raises InputError for a missing folder (naming the sizes that are there), missing or truncated files.
    """

    def __init__(self, root: str | Path, dataset: str, image_size: int) -> None:
        self.place = place = Place(Path(root), dataset, image_size)
        if not place.codes.is_dir():
            raise InputError(_what_is_there(place))
        self.manifest = _read_manifest(place.manifest) if place.manifest.is_file() else None
        if self.manifest is None and place.unfinished.is_file():
            raise InputError(
                f"the extraction into {place.codes} is unfinished: run extract_codes_c2i.sh again to complete it"
            )
        self._packed = self.manifest is not None and self.manifest.layout == "packed"
        self._open_packed() if self._packed else self._open_per_image()

    def __len__(self) -> int:
        return self.images

    def batch(self, indices: np.ndarray, views: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes (B, tokens) int64 of these images, one view each (the first by default), and labels (B,) int64."""
        views = np.zeros(len(indices), np.int64) if views is None else views
        codes = np.empty((len(indices), self.tokens), np.int64)
        if not self._packed:
            labels = np.empty(len(indices), np.int64)
            for row, (i, view) in enumerate(zip(indices, views, strict=True)):
                codes[row] = _load(self.place.codes / self._names[i])[0, view]
                labels[row] = _load(self.place.labels / self._names[i])[0]
            return codes, labels
        shards, rows = np.divmod(indices, self.manifest.shard_size)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            codes[here] = self._shards[shard][rows[here], views[here]]
        return codes, self._labels[indices]

    def _open_packed(self) -> None:
        m = self.manifest
        self.images, self.views, self.tokens = m.images, m.views, m.tokens
        self._shards = [_load(self.place.codes / f"{s:05d}.npy", mmap=True) for s in range(m.shards)]
        labels = [_load(self.place.labels / f"{s:05d}.npy") for s in range(m.shards)]
        for s, (codes, label) in enumerate(zip(self._shards, labels, strict=True)):
            expected = (len(m.rows(s)), m.views, m.tokens)
            if codes.shape != expected or label.shape != expected[:1]:
                raise InputError(
                    f"{self.place.codes}: shard {s:05d} has shape {codes.shape} and {len(label)} labels, expected {expected}"
                )
        self._labels = np.concatenate(labels)

    def _open_per_image(self) -> None:
        codes, labels = _sizes(self.place.codes), _sizes(self.place.labels)
        if not codes:
            raise InputError(
                f"{self.place.codes} holds no codes: expected 0.npy, 1.npy, ... or packed shards and a manifest"
            )
        for name in sorted(codes.keys() ^ labels.keys())[:1]:
            folder = self.place.labels if name in codes else self.place.codes
            raise InputError(f"{folder / name} is missing: extract the codes again to restore it")
        if self.manifest and len(codes) != self.manifest.images:
            raise InputError(
                f"{self.place.codes} holds {len(codes)} of {self.manifest.images} images: extract the codes again"
            )
        self._names = sorted(codes, key=lambda name: int(name[:-4]))
        self.images = len(codes)
        for folder, sizes in ((self.place.codes, codes), (self.place.labels, labels)):
            for name in self._names:  # all files of a folder have one shape, so one size
                if sizes[name] != sizes[self._names[0]]:
                    _load(folder / name)
                    raise InputError(f"{folder / name} has another size than {self._names[0]}: extract the codes again")
        first = _load(self.place.codes / self._names[0])
        if first.ndim != 3 or first.shape[0] != 1:
            raise InputError(
                f"{self.place.codes / self._names[0]} has shape {first.shape}; expected (1, views, tokens)"
            )
        self.views, self.tokens = first.shape[1:]


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each `{i}.npy` of a folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if re.fullmatch(r"\d+\.npy", entry.name)}


def _load(path: Path, mmap: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mmap else None)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: extract the codes again to restore it") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): delete it and extract the codes again") from None


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text())
        if values.get("format") != FORMAT:
            raise InputError(f"{path} has format {values.get('format')}; this version reads format {FORMAT}")
        return Manifest(**values)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a manifest of codes ({error}): extract the codes again") from None


def _differences(old: Manifest, new: Manifest) -> list[str]:
    before, after = asdict(old), asdict(new)
    return [f"{key} {_short(before[key])}, now {_short(after[key])}" for key in before if before[key] != after[key]]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _what_is_there(place: Place) -> str:
    if not place.root.is_dir():
        return f"there is no folder {place.root}; give --code-path the folder that extract_codes_c2i.sh wrote"
    there = sorted(path.name.removesuffix("_codes") for path in place.root.glob("*_codes"))
    return (
        f"{place.root} has no {place.name}_codes: there is {', '.join(there) or 'nothing'}. "
        "Give the --image-size (and --dataset) that the codes were extracted with, or extract them at this size"
    )
