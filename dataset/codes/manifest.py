"""What codes are and where they lie: the manifest, the paths, and the folders that a path holds."""

import errno
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import InputError

SHARD_SIZE = 8192
FORMAT = 2  # 1 had neither hashes nor skipped images, nor said of which paths and at which precision
RESULTS = ("format", "skipped", "shards_sha256")  # fields that say how it went, not what was to be done
LAYOUTS = ("packed", "per-image")


@dataclass(frozen=True)
class Manifest:
    """What the codes are: of which images, by which tokenizer, in which form.

    images counts all, also those in skipped (rows of `image`, `path`, `reason`), which keep their numbers and have no codes.
    shards_sha256: shard_digest of each; empty in an unfinished manifest and in one of format 1.
    """

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
    precision: str = "fp32"
    paths_sha256: str = ""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    shards_sha256: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned dtype that holds the codebook; int64 in the published layout."""
        return np.dtype(np.int64) if self.layout == "per-image" else np.min_scalar_type(self.codebook_size - 1)

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of a shard, with those that were skipped."""
        return range(shard * self.shard_size, min(self.images, (shard + 1) * self.shard_size))

    @cached_property
    def numbers(self) -> np.ndarray:
        """The images that have codes, (n,) int64, sorted: row r of all codes is of image numbers[r]."""
        return np.setdiff1d(np.arange(self.images), [row["image"] for row in self.skipped])

    @cached_property
    def starts(self) -> np.ndarray:
        """The row of `numbers` at which each shard begins, and their count: (shards + 1,) int64."""
        return np.searchsorted(self.numbers, np.arange(self.shards + 1) * self.shard_size)


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
        """The manifest of an extraction or a repacking under way."""
        return self.root / f"{self.name}.unfinished.json"

    @property
    def records(self) -> Path:
        """The folder of `{shard}.json`, one for each shard that such a run has finished."""
        return self.root / f"{self.name}.unfinished"

    def files(self, number: int, layout: str) -> tuple[Path, Path]:
        """The codes and the labels of a shard, or of an image in the layout of one file an image."""
        name = f"{number}.npy" if layout == "per-image" else f"{number:05d}.npy"
        return self.codes / name, self.labels / name


def shard_digest(place: Place, layout: str, numbers: Iterable[int]) -> str:
    """sha256 (hex) of the bytes of these files (shards or images), the codes of each before its labels.

    Raises OSError for one that cannot be read.
    """
    digest = hashlib.sha256()
    for number in numbers:
        for path in place.files(number, layout):
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """A manifest file. Raises InputError for one that is damaged or of another format."""
    try:
        values = json.loads(path.read_text())
        if values.get("format") not in range(1, FORMAT + 1):
            raise InputError(f"{path} has format {values.get('format')}; this version reads format 1 to {FORMAT}")
        return Manifest(**values)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a manifest of codes ({error}): extract the codes again") from None


def load_array(path: Path, mmap: bool = False) -> np.ndarray:
    """The array of an .npy file. Raises InputError for one that is missing, truncated or damaged."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: extract the codes again to restore it") from None
    except OSError as error:
        more = "; raise `ulimit -n`, or pack the codes into larger shards" if error.errno == errno.EMFILE else ""
        raise InputError(f"{path} cannot be read ({error.strerror or error}){more}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): delete it and extract the codes again") from None


def differences(old: Manifest, new: Manifest) -> list[str]:
    """`field old, now new` for each setting that differs; paths of which nothing is known agree with any."""
    before, after = asdict(old), asdict(new)
    keys = [key for key in before if key not in RESULTS and before[key] != after[key]]
    if not (old.paths_sha256 and new.paths_sha256):
        keys = [key for key in keys if key != "paths_sha256"]
    return [f"{key} {short(before[key])}, now {short(after[key])}" for key in keys]


def short(value: object) -> str:
    """A value in at most 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def places(root: Path) -> list[Place]:
    """The codes that a folder holds. Dataset and size are the manifest's; without one, the size is the name's last digits."""
    found = []
    for folder in sorted(root.glob("*_codes")):
        name = folder.name.removesuffix("_codes")
        manifest = root / f"{name}.json"
        if manifest.is_file():
            m = read_manifest(manifest)
            found.append(Place(root, m.dataset, m.image_size))
        elif match := re.fullmatch(r"(.*\D)(\d+)", name):
            found.append(Place(root, match[1], int(match[2])))
    return found


def find_place(root: Path, dataset: str | None = None, image_size: int | None = None) -> Place:
    """The one place under root of this dataset and size, None for any. Raises InputError for none or several."""
    if dataset is not None and image_size is not None:
        place = Place(root, dataset, image_size)
        if not place.codes.is_dir():
            raise InputError(what_is_there(place))
        return place
    there = places(root)
    fitting = [p for p in there if dataset in (None, p.dataset) and image_size in (None, p.image_size)]
    if len(fitting) == 1:
        return fitting[0]
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; expected one that holds {{dataset}}{{size}}_codes")
    listed = ", ".join(f"--dataset {p.dataset} --image-size {p.image_size}" for p in fitting or there)
    if fitting:
        raise InputError(f"{root} holds several sets of codes: choose one by {listed}")
    wanted = f"{dataset or '{dataset}'}{image_size or '{size}'}_codes"
    raise InputError(f"{root} has no {wanted}: there is {listed or 'nothing'}")


def what_is_there(place: Place) -> str:
    """Why the codes of a place are not there, and what is."""
    if not place.root.is_dir():
        return f"there is no folder {place.root}; give --code-path the folder that extract_codes_c2i.sh wrote"
    there = sorted(path.name.removesuffix("_codes") for path in place.root.glob("*_codes"))
    return (
        f"{place.root} has no {place.name}_codes: there is {', '.join(there) or 'nothing'}. "
        "Give the --image-size (and --dataset) that the codes were extracted with, or extract them at this size"
    )
