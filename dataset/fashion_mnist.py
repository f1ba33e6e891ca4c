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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils import cli
from utils.cli import InputError
from utils.files import atomic_folder, check_folder, file_lock
from utils.log import progress
from utils.settings import ExistingFolder, PositiveInt, Settings, setting

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
SPLITS = {"train": ("train", 60000), "test": ("t10k", 10000)}  # our name: the files' prefix, images
FILES = tuple(f"{prefix}-{kind}-ubyte.gz" for prefix, _ in SPLITS.values() for kind in ("images-idx3", "labels-idx1"))
PAD = 2  # 28 px become 32


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: magic (0, 0, 8, dimensions), big-endian sizes, data. InputError for another."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is truncated or not gzip ({error}): get it again") from None
    header = bytes((0, 0, 8, len(shape))) + np.array(shape, ">i4").tobytes()
    if not data.startswith(header) or len(data) != len(header) + np.prod(shape):
        raise InputError(
            f"{path} is not an IDX file of bytes, or is cut short: expected {shape}; this is not Fashion-MNIST"
        )
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32) uint8, padded with black, and labels (N,) of a split from the IDX files in a folder."""
    prefix, n = SPLITS[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (n, 28, 28))
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (n,))
    return np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD))), labels


def has_files(folder: Path) -> bool:
    """Whether the four IDX files are there."""
    return all((folder / name).is_file() for name in FILES)


def from_apt(package: str, installed: Path, folder: Path) -> Path:
    """What Debian's package would install there, fetched by apt into a folder; missing where that does not work."""

    def call(*command: str) -> bool:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.returncode == 0

    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        fetch = ("apt-get", "download", "-q", package)
        if not call(*fetch) and os.geteuid() == 0 and call("apt-get", "update", "-q"):
            call(*fetch)
        for file in folder.glob(f"{package}_*.deb"):
            call("dpkg-deb", "-x", str(file), str(folder))
    return folder / installed.relative_to("/")


def from_torchvision(folder: Path) -> Path:
    """torchvision's download; missing, with the reason on stderr, where that does not work."""
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        print(f"torchvision's download failed: {error}", file=sys.stderr)
    return folder / "FashionMNIST" / "raw"


@contextmanager
def files(source: Path | None) -> Iterator[Path]:
    """A folder with the four IDX files: `source` if given, the installed package, or what can be had."""
    wanted = f"{', '.join(FILES[:-1])} and {FILES[-1]}"
    if source and not has_files(source):
        raise InputError(f"--source {source} lacks some of {wanted}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = source or INSTALLED
        if not has_files(folder):
            print("getting Fashion-MNIST: from apt", flush=True)
            folder = from_apt(PACKAGE, INSTALLED, Path(temporary))
        if not has_files(folder):
            print("getting Fashion-MNIST: from torchvision", flush=True)
            folder = from_torchvision(Path(temporary))
        if not has_files(folder):
            raise InputError(
                f"Fashion-MNIST cannot be had here: install Debian's package {PACKAGE}, or give --source a folder with {wanted}"
            )
        yield folder


def write_split(out: Path, split: str, images: np.ndarray, labels: np.ndarray, limit: int | None) -> None:
    """OUT/SPLIT/CLASS/00000.png, at most `limit` images a class; the split appears when it is whole."""
    numbers = [np.flatnonzero(labels == label)[:limit] for label in range(len(CLASSES))]
    total = sum(map(len, numbers))
    with (
        atomic_folder(out / split) as unfinished,
        progress(total=total, desc=f"writing {split}", unit=" images") as bar,
    ):
        for name, chosen in zip(CLASSES, numbers, strict=True):
            (unfinished / name).mkdir()
            for i in chosen:
                image = Image.fromarray(images[i]).convert("RGB")
                image.save(unfinished / name / f"{i:05d}.png", compress_level=1)
                bar.update()


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
