"""The user's images as the stages read them: a training set and a test set of the same classes."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.archives import ARCHIVES, is_archive, unpack
from dataset.crops import reason
from dataset.images import ImageFolder, evenly_spaced
from dataset.listing import SUFFIXES, TABLES, is_table, shown
from dataset.split import held_out, write_table
from scripts.pipeline.settings import PipelineSettings
from utils.cli import InputError, counted, note
from utils.files import atomic_path

FEWEST = 16  # images, below which nothing can be learnt or measured
LOOKED_AT = 256  # headers
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")


class Images(NamedTuple):
    """Training and test images. Their paths are folders, or tables that are written before the first stage.

    content: what tells them from others. left_out: names by reason.
    """

    train: Path
    test: Path
    train_names: int
    test_names: int
    classes: list[str]
    side: int  # median of the shorter sides, in pixels
    some_paths: list[str]
    content: str
    left_out: Mapping[str, list[str]]
    write: Callable[[], None]  # makes the tables


def open_images(s: PipelineSettings, run: Path) -> Images:
    """Find, unpack and split the user's images. Raises InputError for what is no set of images, or too small."""
    root = _root(s.images, run)
    parts = _parts(root)
    folders = [s.image_folder(part) for part in parts or (root,)]
    for folder in folders:
        note(folder.summary())
    whole = folders[0]
    if len(whole) < FEWEST:
        raise InputError(f"{root} holds {counted(len(whole), 'image')}; expected at least {FEWEST}, better thousands")
    if parts:
        if odd := sorted(set(whole.classes) ^ set(folders[1].classes)):
            raise InputError(
                f"{parts[0]} and {parts[1]} have different classes: {', '.join(odd[:3])} in one of them only"
            )
        left_out = {
            f"{why} of {part.name}/": names
            for folder, part in zip(folders, parts, strict=True)
            for why, names in folder.left_out.items()
        }
        paths, counts, write = parts, map(len, folders), lambda: None
    else:
        if len(set(whole.classes)) < len(whole.classes):
            raise InputError(
                f"{root} has classes whose names differ only in blanks or unprintable letters: rename them"
            )
        chosen = held_out(whole.names, whole.labels, s.test_share, s.test_images)
        if not chosen.any():
            raise InputError(f"{root} has one image a class, so none can be held out: give more images")
        left_out = whole.left_out
        paths, counts = (run / "train.csv", run / "test.csv"), (int((~chosen).sum()), int(chosen.sum()))
        write = partial(_write_tables, whole, root, run, chosen)
    content = " ".join(folder.content_id() for folder in folders)
    some_paths = [whole.paths[i] for i in evenly_spaced(len(whole), 64)]
    return Images(*paths, *counts, whole.classes, _typical_side(whole), some_paths, content, left_out, write)


def _root(given: Path, run: Path) -> Path:
    """The folder or table that is meant: unpacked, and without a folder around it that holds nothing else."""
    path = given.expanduser().absolute()
    if is_table(path):
        return path
    if is_archive(path):
        path = unpack(path, run / "unpacked")
    elif not path.is_dir():
        kinds = f"a folder, a file that ends in {', '.join((*TABLES, *ARCHIVES))}"
        raise InputError(
            f"--images {given}: {'expected' if path.exists() else 'there is no such path; expected'} {kinds}"
        )
    while inner := _wrapped(path):
        note(f"{path} holds nothing but {inner.name}/: taking that")
        path = inner
    return path


def _wrapped(path: Path) -> Path | None:
    """The only folder in a folder, if it holds folders of images itself."""
    folders, images = _content(path)
    if images or len(folders) != 1:
        return None
    below, images = _content(folders[0])
    return folders[0] if below and not images else None


def _content(folder: Path) -> tuple[list[Path], bool]:
    """The folders in a folder, and whether images lie beside them."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    folders = [Path(entry.path) for entry in seen if entry.is_dir()]
    return folders, any(Path(entry.name).suffix.lower() in SUFFIXES for entry in seen if not entry.is_dir())


def _parts(root: Path) -> tuple[Path, Path] | None:
    """The folders of training and test images of a folder that has both."""
    if not root.is_dir():
        return None
    names = {entry.name.lower(): entry for entry in root.iterdir() if entry.is_dir()}
    train, test = ([names[name] for name in group if name in names] for group in (TRAIN, TEST))
    return (train[0], test[0]) if train and test else None


def _write_tables(whole: ImageFolder, root: Path, run: Path, chosen: np.ndarray) -> None:
    """RUN/train.csv and RUN/test.csv, whose files lie below RUN/source, a link to the images."""
    with atomic_path(run / "source", sync=False) as temporary:
        temporary.symlink_to(root if root.is_dir() else root.parent)
    for path, rows in ((run / "train.csv", np.flatnonzero(~chosen)), (run / "test.csv", np.flatnonzero(chosen))):
        names = [name if name.startswith("/") else f"source/{name}" for name in (whole.names[i] for i in rows)]
        write_table(path, names, whole.labels[rows].tolist(), whole.classes)


def _typical_side(folder: ImageFolder) -> int:
    """The median shorter side of some images, in pixels. Raises InputError where none of them can be read."""
    sides, broken = [], []
    for i in evenly_spaced(len(folder), LOOKED_AT):
        try:
            with Image.open(folder.paths[i]) as image:
                sides.append(min(image.size))
        except Exception as error:  # a decoder fails on damaged bytes in any way
            broken.append(f"{shown(folder.names[i])} ({reason(error)[:80]})")
    if not sides:
        raise InputError(f"none of {len(broken)} images of {folder.root} that were looked at can be read: {broken[0]}")
    return int(np.median(sides))
