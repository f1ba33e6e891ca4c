"""What codes are and where they lie: the manifest, the paths, and the sets of codes that a folder holds."""

import errno
import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from utils import settings
from utils.cli import InputError
from utils.records import Record
from utils.settings import Count, PositiveInt

SHARD_SIZE = 8192
FORMAT = 2  # 1 had neither hashes nor skipped images, nor paths_sha256 and precision
RESULTS = ("format", "skipped", "shards_sha256", "shards_max")  # fields that say how it went
UNKNOWN = ("paths_sha256", "convolutions", "images_id", "source_id")  # empty where it was not recorded
LAYOUTS = ("packed", "per-image")


def printable(name: Any) -> Any:
    """A name with `?` signs for bytes that are no UTF-8, which file systems allow and JSON does not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(name, str) else name


Name = Annotated[str, BeforeValidator(printable)]


class SkippedImage(TypedDict):
    """An image that could not be read."""

    image: Count
    path: Name
    reason: Name


class Manifest(Record):
    """What the codes are: of which images, by which tokenizer, in which form.

    images counts all, also the skipped ones, which keep their numbers and have no codes. part: "2/4" for the second of four
    parts of the shards, "" for all. shards_sha256: shard_digest of each, "" outside the part; empty in an unfinished manifest
    and in one of format 1. shards_max: the largest code of each, -1 for none; empty where it was not recorded.
    """

    dataset: Name
    image_size: PositiveInt
    images: PositiveInt
    views: PositiveInt
    tokens: PositiveInt
    codebook_size: PositiveInt
    layout: Literal["packed", "per-image"] = "packed"
    shard_size: PositiveInt = SHARD_SIZE
    view_mode: str = "single"
    crop_range: float | None = None
    vq_model: str = ""
    tokenizer_sha256: str = ""  # checkpoint.identity of the tokenizer's weights or, in older ones, its file's sha256
    classes: list[Name] = []
    precision: str = "fp32"
    paths_sha256: str = ""
    convolutions: str = ""  # fp32, or tf32: what they are on most GPUs at precision fp32
    background: str = "white"
    exif_orientation: bool = False
    part: str = Field("", pattern=r"^([1-9]\d{0,5}/[1-9]\d{0,5})?$")
    images_id: str = ""
    source_id: str = ""  # of a packed copy: the state of the files it was made of
    skipped: list[SkippedImage] = []
    shards_sha256: list[str] = []
    shards_max: list[int] = []
    format: int = FORMAT

    def changed(self, **values: Any) -> "Manifest":
        """This manifest with other values."""
        return Manifest(**{**self.plain(), **values})

    def differences(self, other: "Manifest") -> list[str]:
        """`views 2, now 10` for each setting that is another in `other`; what was not recorded agrees with anything."""
        mine, its = (
            {key: value for key, value in m.plain().items() if key not in RESULTS and (value or key not in UNKNOWN)}
            for m in (self, other)
        )
        return settings.differences(mine, its)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned dtype that holds the codebook; int64 in the published layout."""
        return np.dtype(np.int64) if self.layout == "per-image" else np.min_scalar_type(self.codebook_size - 1)

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    @property
    def own_shards(self) -> range:
        """The shards of this part, or all."""
        number, parts = map(int, (self.part or "1/1").split("/"))
        return range(self.shards * (number - 1) // parts, self.shards * number // parts)

    def rows(self, shard: int) -> range:
        """The images of a shard, with those that were skipped."""
        return range(shard * self.shard_size, min(self.images, (shard + 1) * self.shard_size))

    def gaps(self, shard: int) -> list[SkippedImage]:
        """The skipped images of a shard."""
        return [row for row in self.skipped if row["image"] in self.rows(shard)]

    @property
    def own_images(self) -> range:
        """The images of this part, or all, with those that were skipped."""
        return range(self.own_shards.start * self.shard_size, min(self.images, self.own_shards.stop * self.shard_size))

    @cached_property
    def numbers(self) -> np.ndarray:
        """The images that have codes, (n,) int64, sorted: row r of all codes is of image numbers[r]."""
        own = self.own_images
        return np.setdiff1d(np.arange(own.start, own.stop), [row["image"] for row in self.skipped])

    @cached_property
    def starts(self) -> np.ndarray:
        """The row of `numbers` at which each shard begins, and their count: (shards + 1,) int64."""
        return np.searchsorted(self.numbers, np.arange(self.shards + 1) * self.shard_size)


class Place:
    """Where the codes of one data set and size lie: paths under a root. Raises InputError for a name with a slash."""

    def __init__(self, root: str | Path, dataset: str, image_size: int) -> None:
        if "/" in dataset:
            raise InputError(f"the data set is called {dataset!r}; expected a name without /: it becomes part of paths")
        self.root, self.dataset, self.image_size = Path(root), dataset, image_size
        self.name = f"{dataset}{image_size}"
        self.codes, self.labels = self.root / f"{self.name}_codes", self.root / f"{self.name}_labels"
        self.manifest = self.root / f"{self.name}.json"
        self.packed = self.root / f"{self.name}_packed"  # the folder of a published folder's packed copy
        self.unfinished = self.root / f"{self.name}.unfinished.json"  # the manifest of work under way, and
        self.records = self.root / f"{self.name}.unfinished"  # `{shard}.json` for each shard that it has finished

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


def read_manifest(path: Path) -> Manifest | None:
    """A manifest file; None if there is none. Raises InputError for one that is damaged or of another format."""
    manifest = Manifest.read_if_present(path)
    if manifest and manifest.format not in range(1, FORMAT + 1):
        raise InputError(f"{path} has format {manifest.format}; this version reads format 1 to {FORMAT}")
    return manifest


def load_array(path: Path, mmap: bool = False) -> np.ndarray:
    """The whole numbers of an .npy file. Raises InputError for one that is missing, damaged, or holds something else."""
    try:
        array = np.load(path, mmap_mode="r" if mmap else None)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: extract the codes again to restore it") from None
    except OSError as error:
        more = "; raise `ulimit -n`, or pack the codes into larger shards" if error.errno == errno.EMFILE else ""
        raise InputError(f"{path} cannot be read ({error.strerror or error}){more}") from None
    except (ValueError, EOFError, MemoryError, SyntaxError, TokenError) as error:  # the last two: numpy's header parser
        if "objects" in str(error) or "Object arrays" in str(error):
            raise InputError(f"{path} holds Python objects; expected whole numbers: extract the codes again") from None
        raise InputError(f"{path} is truncated or damaged ({error}): delete it and extract the codes again") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = getattr(array, "dtype", "an archive of arrays")
        unusual = int(np.sum(~np.isfinite(array))) if getattr(kind, "kind", "") == "f" else 0
        more = f", {unusual} of its values not finite" if unusual else ""
        raise InputError(f"{path} holds {kind}{more}; expected whole numbers: extract the codes again")
    return array


def find_place(root: str | Path, dataset: str | None = None, image_size: int | None = None) -> Place:
    """The one set of codes under root of this data set and size, None for any; root may be the folder of codes itself.

    Raises InputError for none or several, naming the sets it holds.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; expected the one that extract_codes_c2i.sh wrote to")
    folders = sorted(root.glob("*_codes")) or [path for path in [root.absolute()] if path.name.endswith("_codes")]
    if dataset is not None and image_size is not None:
        wanted = Place(root, dataset, image_size).name
        found = [Place(path.parent, dataset, image_size) for path in folders if path.name == f"{wanted}_codes"]
    else:
        known = [place for place in map(_place_of, folders) if place]
        found = [p for p in known if dataset in (None, p.dataset) and image_size in (None, p.image_size)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = " or ".join(f"--dataset {p.dataset} --image-size {p.image_size}" for p in found[:9])
        raise InputError(f"{root} holds several sets of codes: choose one by {listed}")
    names = [path.name.removesuffix("_codes") for path in folders]
    advice = "give the --image-size (and --dataset) that the codes were extracted with" if names else "check the path"
    listed = ", ".join(names[:9]) + (", ..." if len(names) > 9 else "")
    asked = f"{dataset or '{dataset}'}{image_size or '{size}'}_codes"
    raise InputError(f"{root} has no {asked}: there is {listed or 'nothing'}; {advice}")


def _place_of(folder: Path) -> Place | None:
    """The place of a folder `{dataset}{size}_codes`. A manifest says where the data set's name ends and the size begins;
    without one, the size is the name's last digits."""
    name = folder.name.removesuffix("_codes")
    manifest = read_manifest(folder.with_name(f"{name}.json"))
    if manifest and f"{manifest.dataset}{manifest.image_size}" == name:
        return Place(folder.parent, manifest.dataset, manifest.image_size)
    match = re.fullmatch(r"(.*[^0-9])([0-9]{1,9})", name)
    return Place(folder.parent, match[1], int(match[2])) if match else None
