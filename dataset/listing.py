"""What lies in a folder of images: the image files in torchvision's order, their classes, and what is left out and why.

No image is opened. Links are followed. A folder that was entered before is not entered again, so loops of links end. A
table (.csv, .tsv) of files and labels stands for a folder, in all stages: read_table says its form.
"""
# A Path for each of a million files takes most of the time, so os.path it is.
# ruff: noqa: PTH112, PTH113, PTH116, PTH118, PTH119, PTH120, PTH122, PTH202

import csv
import importlib
import importlib.util
import io
import os
import stat
from array import array
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import features
from pydantic import AfterValidator

from utils.cli import InputError
from utils.log import progress

SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tif", ".tiff", ".jp2", ".tga", ".qoi", ".heic", ".heif",
))  # fmt: skip
CODECS = {".webp": "webp", ".avif": "avif", ".jp2": "jpg_2000"}  # suffixes that some builds of Pillow do not read
LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin"))  # and .anything
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
ONE_CLASS = "all"  # the class of a folder without class folders
TABLES = (".csv", ".tsv")
FILE_COLUMNS = ("file", "filename", "file_name", "filepath", "path", "image", "image_path", "img")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")
LARGEST_TABLE = 1 << 30  # bytes


def shown(name: str) -> str:
    """A file's name as text that can be printed and stored: one line, what is no UTF-8 replaced."""
    return " ".join(os.fsencode(name).decode("utf-8", "replace").split())


@cache
def missing_reader(suffix: str) -> str:
    """What has to be installed to read images of this suffix; empty for nothing."""
    if suffix in (".heic", ".heif"):
        if importlib.util.find_spec("pillow_heif") is None:
            return "pip install pillow-heif"
        importlib.import_module("pillow_heif").register_heif_opener()
    elif suffix in CODECS and not features.check(CODECS[suffix]):
        return f"a Pillow with {CODECS[suffix]}"
    return ""


def is_table(path: str | Path) -> bool:
    """Whether a path is a file that is read as a table of images."""
    return str(path).lower().endswith(TABLES) and os.path.isfile(path)


def _existing_images(path: Path) -> Path:
    try:
        if path.is_dir() or is_table(path):
            return path
    except (OSError, ValueError):  # a name too long, a NUL byte
        pass
    raise ValueError(f"there is no folder {path}, nor a {' or '.join(TABLES)} of that name")


ImagesPath = Annotated[Path, AfterValidator(_existing_images)]  # the type of a setting: a folder or a table of images


def read_table(path: str | Path) -> list[tuple[str, str]]:
    """(file, label) of each row of a table of images.

    Columns are separated by commas, semicolons or tabs. A first row with a name of FILE_COLUMNS says which ones are meant,
    and may say a label's by LABEL_COLUMNS; without it they are the first two. Without labels all images are of one class.
    Raises InputError for a table of another form.
    """
    if os.path.getsize(path) > LARGEST_TABLE:
        raise InputError(f"{path} has {os.path.getsize(path)} bytes, too many for a table of images: give a folder")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    first = text.partition("\n")[0]
    try:
        rows = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count)) if any(row)
        ]
    except csv.Error as error:
        raise InputError(f"{path} is no table of files and labels ({error})") from None
    if not rows:
        raise InputError(f"{path} is empty; expected a row an image: its file, its label")
    heads = [cell.strip().lower() for cell in rows[0]]
    files = [i for i, head in enumerate(heads) if head in FILE_COLUMNS]
    labels = [i for i, head in enumerate(heads) if head in LABEL_COLUMNS]
    if files:
        rows = rows[1:]
    elif labels or len(heads) > 2:
        raise InputError(
            f"{path} has the columns {shown(', '.join(heads))[:200]}; expected one called {' or '.join(FILE_COLUMNS)}"
        )
    if files and not labels and len(heads) > 1:
        raise InputError(
            f"{path} has the columns {shown(', '.join(heads))[:200]}; expected one called {' or '.join(LABEL_COLUMNS)}"
        )
    file_at, label_at = (files or [0])[0], (labels or [1])[0]
    cells = [(row[file_at : file_at + 1], row[label_at : label_at + 1]) for row in rows]
    return [("".join(file).strip(), " ".join("".join(label).split()) or ONE_CLASS) for file, label in cells]


class Listing:
    """The images under a folder, or in a table: `paths`, class numbers `labels`, `classes`, and what else there is.

    nested: images below a folder of their class's folder. repeated: how many are the same file as another one, by links.
    left_out: names by reason. Raises InputError for a folder that is missing, has no images, has a class without images,
    or holds the folders of several splits.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.left_out: dict[str, list[str]] = {}
        self.nested: list[str] = []
        self._files = array("Q")  # a number for each file found, the same for the same file
        if is_table(root):
            self.base = os.path.dirname(self.root) or "."
            self._take_rows(read_table(root))
        elif os.path.isdir(root):
            self.base = self.root
            first = os.environ.get("RANK", "0") == "0"
            with progress(
                desc=f"looking for images in {shown(root)}", unit=" entries", delay=5, show=first
            ) as self._bar:
                self._take_folder()
            del self._bar
        else:
            raise InputError(f"there is no folder {root}; expected a folder of images: one folder a class, or flat")
        self.repeated = len(self._files) - len(np.unique(np.frombuffer(self._files, np.uint64)))
        del self._files

    def _take_folder(self) -> None:
        root = self.root
        top, folders = self._entries(root)
        folders = sorted(folders, key=os.path.basename)
        inside = {folder: self._below(folder) for folder in folders}
        self._refuse_splits([folder for folder in folders if inside[folder]], inside)
        if any(inside.values()):
            self._take_classes(inside, top)
        elif top:
            self.classes, self.paths, self.labels = [ONE_CLASS], sorted(top), [0] * len(top)
            for folder in folders:
                self._leave_out("folders without images", folder)
        else:
            more = f" and {len(folders)} folders without images" if folders else ""
            raise InputError(
                f"no images in {root}: expected one folder of images a class, or images; "
                f"it holds {self.left_out_text() or 'nothing'}{more}"
            )

    def _take_rows(self, rows: list[tuple[str, str]]) -> None:
        """The files of a table, from its own folder. A label without a file declares a class."""
        kept: list[tuple[str, str]] = []
        for file, label in dict.fromkeys(rows):
            path = os.path.join(self.base, file)
            suffix = os.path.splitext(file)[1].lower()
            try:
                status = os.stat(path) if file else None
            except (OSError, ValueError):
                self._leave_out("files that are not there", path)
                continue
            if status is None:
                continue
            if not stat.S_ISREG(status.st_mode):
                self._leave_out("folders, pipes or devices", path)
            elif reason := _refused(suffix):
                self._leave_out(reason, path)
            else:
                kept.append((label, path))
                self._files.append((status.st_ino ^ (status.st_dev << 44)) & (2**64 - 1))
        if not kept:
            raise InputError(f"no images in {self.root}: it names {self.left_out_text() or 'nothing'}")
        self.classes = sorted({label for label, _ in kept} | {label for file, label in rows if not file})
        number = {name: i for i, name in enumerate(self.classes)}
        kept.sort()
        self.paths = [path for _, path in kept]
        self.labels = [number[label] for label, _ in kept]

    def name(self, path: str) -> str:
        """A path as it is called in the root, or in the table."""
        start = self.base.rstrip("/") + "/"
        return path.removeprefix(start) if path.startswith(start) else os.path.relpath(path, self.base)

    def left_out_text(self) -> str:
        """Counts and an example of each reason; empty for nothing."""
        parts = sorted(self.left_out.items(), key=lambda item: -len(item[1]))
        texts = [f"{len(names)} {reason} ({shown(names[0])})" for reason, names in parts[:6]]
        more = sum(len(names) for _, names in parts[6:])
        return ", ".join(texts + ([f"{more} more"] if more else []))

    def _leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(self.name(path))

    def _take_classes(self, inside: dict[str, list[str]], top: list[str]) -> None:
        empty = [shown(self.name(folder)) for folder in inside if not inside[folder]]
        if empty:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            has = self.left_out_text()
            raise InputError(
                f"no images in class folder {', '.join(empty[:3])}{more} of {self.root}: add some or delete the folder"
                f"{f'; left out are {has}' if has else ''}"
            )
        for path in top:
            self._leave_out("images beside the class folders, in no class", path)
        self.classes = [self.name(folder) for folder in inside]
        self.paths = [path for paths in inside.values() for path in paths]
        self.labels = [label for label, paths in enumerate(inside.values()) for _ in paths]
        self.nested = [path for folder, paths in inside.items() for path in paths if os.path.dirname(path) != folder]

    def _refuse_splits(self, folders: list[str], inside: dict[str, list[str]]) -> None:
        """Classes that are called train and val are no classes."""
        splits = [folder for folder in folders if os.path.basename(folder).lower() in SPLITS]
        trains = [folder for folder in splits if os.path.basename(folder).lower().startswith("train")]
        only = folders == splits and all(os.path.dirname(path) != f for f in splits for path in inside[f])
        if splits and ((trains and len(splits) > 1) or only):
            names = " and ".join(f"{os.path.basename(folder)}/" for folder in splits)
            raise InputError(
                f"{self.root} holds {names}, parts of a data set and no classes: give {(trains or splits)[0]}"
            )

    def _below(self, folder: str) -> list[str]:
        """The images in a folder and the folders below it, as torchvision orders them."""
        root = os.path.realpath(self.root)
        entered = {_identity(path) for path in (root, *map(str, Path(root).parents))}
        folders, found = [folder], []
        while folders:
            path = folders.pop()
            try:
                identity = _identity(path)
            except OSError:
                self._leave_out("folders that cannot be opened", path)
                continue
            if identity in entered:
                self._leave_out("links to folders that are read already or hold this one", path)
                continue
            entered.add(identity)
            files, below = self._entries(path)
            found.append((path, sorted(files)))
            folders += sorted(below, reverse=True)
        return [file for _, files in sorted(found) for file in files]

    def _entries(self, folder: str) -> tuple[list[str], list[str]]:
        """The images and the folders in a folder."""
        files, folders = [], []
        try:
            with os.scandir(folder) as entries:
                device = os.stat(folder).st_dev
                for entry in sorted(entries, key=lambda entry: entry.name):
                    self._bar.update()
                    kind, identity = _kind(entry, device)
                    suffix = os.path.splitext(entry.name)[1].lower()
                    if entry.name.startswith(".") or entry.name.lower() in LITTER:
                        self._leave_out("hidden or system files", entry.path)
                    elif kind == "folder":
                        folders.append(entry.path)
                    elif kind != "file":
                        self._leave_out(kind, entry.path)
                    elif reason := _refused(suffix):
                        self._leave_out(reason, entry.path)
                    else:
                        files.append(entry.path)
                        self._files.append(identity)
        except OSError:
            self._leave_out("folders that cannot be opened", folder)
        return files, folders


def _refused(suffix: str) -> str:
    """Why a file of this suffix is no image that can be read; empty for one that may be."""
    if suffix not in SUFFIXES:
        return f"{suffix[:16] or 'suffixless'} files"
    return f"{suffix} files that need {missing_reader(suffix)}" if missing_reader(suffix) else ""


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _kind(entry: os.DirEntry, device: int) -> tuple[str, int]:
    """`folder`, `file` or why an entry is neither, and a number of the file. Only links are looked at closely."""
    try:
        if not entry.is_symlink():
            inode, is_folder, is_file = entry.inode(), entry.is_dir(), entry.is_file()
        else:
            status = entry.stat()
            device, inode = status.st_dev, status.st_ino
            is_folder, is_file = stat.S_ISDIR(status.st_mode), stat.S_ISREG(status.st_mode)
    except OSError:
        return "links that lead nowhere", 0
    kind = "folder" if is_folder else "file" if is_file else "pipes, sockets or devices"
    return kind, (inode ^ (device << 44)) & (2**64 - 1)
