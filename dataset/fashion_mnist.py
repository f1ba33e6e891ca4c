"""Fashion-MNIST (arXiv 1708.07747) as an ImageFolder of 32 px RGB images: 60,000 to train on, 10,000 to test with.

    python -m dataset.fashion_mnist images

The files come from Debian's package `dataset-fashion-mnist` where it is installed, else from that package by apt (it
is unpacked in a temporary folder, nothing is installed), else from torchvision's download.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils import cli
from utils.cli import InputError
from utils.files import check_folder, file_lock
from utils.log import progress
from utils.settings import ExistingFolder, PositiveInt, Settings, setting

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
SPLITS = {"train": ("train", 60000), "test": ("t10k", 10000)}  # our name: the files' prefix, images
WANTED = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files"
PAD = 2  # 28 px become 32


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: magic (0, 0, 8, dimensions), big-endian sizes, data. InputError for anything else."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is truncated or not gzip ({error}): get it again") from None
    dimensions = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = tuple(np.frombuffer(data, ">i4", dimensions, 4)) if len(data) >= 4 + 4 * dimensions else ()
    body = np.frombuffer(data, np.uint8, offset=min(len(data), 4 + 4 * dimensions))
    if not shape or body.size != np.prod(shape, dtype=np.int64):
        raise InputError(f"{path} is not an IDX file of bytes, or is cut short: get it again")
    return body.reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32) uint8, padded with black, and labels (N,) of a split from the IDX files in a folder."""
    prefix, wanted = SPLITS[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    if images.shape != (wanted, 28, 28) or labels.shape != (wanted,):
        raise InputError(
            f"{folder}: {split} has images of {images.shape} and labels of {labels.shape}, "
            f"expected {(wanted, 28, 28)} and {(wanted,)}: this is not Fashion-MNIST"
        )
    return np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD))), labels


def has_files(folder: Path) -> bool:
    """Whether the four IDX files are there."""
    kinds = ("images-idx3", "labels-idx1")
    return all((folder / f"{prefix}-{kind}-ubyte.gz").is_file() for prefix, _ in SPLITS.values() for kind in kinds)


def unpacked(package: str, folder: Path) -> Path | None:
    """The folder, with the files of Debian's package, fetched by apt; None where that does not work."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None

    def call(*command: str) -> bool:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.returncode == 0

    fetch = ("apt-get", "download", "-q", package)
    if not call(*fetch) and not (os.geteuid() == 0 and call("apt-get", "update", "-q") and call(*fetch)):
        return None
    for file in folder.glob(f"{package}_*.deb"):
        call("dpkg-deb", "-x", str(file), str(folder))
    return folder


def from_apt(folder: Path) -> Path | None:
    """The files of Debian's package; None where it cannot be had."""
    found = unpacked(PACKAGE, folder)
    return found and found / INSTALLED.relative_to("/")


def from_torchvision(folder: Path) -> Path | None:
    """torchvision's download; None, with its reason on stderr, where that does not work."""
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        print(f"torchvision's download failed: {error}", file=sys.stderr)
    return folder / "FashionMNIST" / "raw"


@contextmanager
def files(source: Path | None, getters: tuple[Callable, ...] = (from_apt, from_torchvision)) -> Iterator[Path]:
    """A folder with the four IDX files: `source` if given, the installed package, or what the first getter brings."""
    if source or has_files(INSTALLED):
        if source and not has_files(source):
            raise InputError(f"--source {source} lacks some of {WANTED}")
        yield source or INSTALLED
        return
    with tempfile.TemporaryDirectory() as temporary:
        for getter in getters:
            print(f"getting Fashion-MNIST: {getter.__name__.replace('_', ' ')}", flush=True)
            folder = getter(Path(temporary))
            if folder and has_files(folder):
                yield folder
                return
        raise InputError(
            f"Fashion-MNIST cannot be had here: install Debian's package {PACKAGE}, or give --source a folder with {WANTED}"
        )


def write_split(out: Path, split: str, images: np.ndarray, labels: np.ndarray, limit: int | None) -> None:
    """OUT/SPLIT/CLASS/00000.png, at most `limit` images a class; the split appears when it is whole."""
    unfinished = out / f".{split}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    numbers = [np.flatnonzero(labels == label)[:limit] for label in range(len(CLASSES))]
    with progress(total=sum(map(len, numbers)), desc=f"writing {split}", unit=" images") as bar:
        for name, chosen in zip(CLASSES, numbers, strict=True):
            folder = unfinished / name
            folder.mkdir(parents=True)
            for i in chosen:
                Image.fromarray(images[i]).convert("RGB").save(folder / f"{i:05d}.png", compress_level=1)
                bar.update()
    unfinished.rename(out / split)


class FashionMnistSettings(Settings):
    """The settings of this command; see --help."""

    out: Path = setting(help="folder to write train/ and test/ to", positional=True)
    source: ExistingFolder | None = setting(None, "folder with the four .gz files, where they are at hand")
    limit: PositiveInt | None = setting(None, "images a class and split; default: all")


def main() -> None:
    s = FashionMnistSettings.from_command_line(__doc__)
    check_folder(s.out)
    with file_lock(s.out):
        missing = [split for split in SPLITS if not (s.out / split).is_dir()]
        if not missing:
            print(f"{s.out} has {' and '.join(SPLITS)} already")
            return
        with files(s.source) as folder:
            for split in missing:
                images, labels = read_split(folder, split)
                write_split(s.out, split, images, labels, s.limit)
                print(f"wrote {s.out / split}")


if __name__ == "__main__":
    cli.run(main)
