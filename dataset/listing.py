"""What lies in a folder of images: the image files in torchvision's order, their classes, and what is left out and why.

No image is opened. Links are followed. A folder that was entered before is not entered again, so loops of links end. A
table (.csv, .tsv) of files and labels stands for a folder, in all stages: read_table says its form.
"""
# A Path for each of a million files takes most of the time, so os.path it is.
# ruff: noqa: PTH112, PTH113, PTH116, PTH118, PTH119, PTH120, PTH122

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
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    first_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=first_line.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise InputError(f"{path} is no table of files and labels ({error})") from None
    if not rows:
        raise InputError(f"{path} is empty; expected a row an image: its file, its label")
    heads = [cell.strip().lower() for cell in rows[0]]
    files = [i for i, head in enumerate(heads) if head in FILE_COLUMNS]
    labels = [i for i, head in enumerate(heads) if head in LABEL_COLUMNS]
    no_file, no_label = not files and (labels or len(heads) > 2), files and not labels and len(heads) > 1
    if no_file or no_label:
        raise InputError(
            f"{path} has the columns {shown(', '.join(heads))[:200]}; expected one called "
            f"{' or '.join(FILE_COLUMNS if no_file else LABEL_COLUMNS)}"
        )
    file_at, label_at = (files or [0])[0], (labels or [1])[0]
    cells = [(row[file_at : file_at + 1], row[label_at : label_at + 1]) for row in rows[bool(files) :]]
    return [("".join(file).strip(), " ".join("".join(label).split()) or ONE_CLASS) for file, label in cells]


class Listing:
    """The images under a folder, or in a table: `paths`, their `names` in it, `labels` (N,) int64, `classes`, and what else
    there is.

    left_out: names by reason. nested: names of images below a folder of their class's folder. repeated: how many are the
    same file as another one, by links. Raises InputError for a folder that is missing, has no images, has a class without
    images, or holds the folders of several splits.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.left_out: dict[str, list[str]] = {}
        self._files = array("Q")  # a number for each file found, the same for the same file
        table = is_table(root)
        if not table and not os.path.isdir(root):
            raise InputError(f"there is no folder {root}; expected a folder of images: one folder a class, or flat")
        self._base = (os.path.dirname(self.root) or ".") if table else self.root
        inside = self._table() if table else self._tree()
        self.classes = [shown(name) for name in inside]
        self.paths = [path for paths in inside.values() for path in paths]
        self.names = [self._name(path) for path in self.paths]
        self.labels = np.repeat(np.arange(len(inside)), [len(paths) for paths in inside.values()])
        self.nested = [] if table else [name for name in self.names if name.count("/") > 1]
        self.repeated = len(self._files) - len(np.unique(np.frombuffer(self._files, np.uint64)))
        del self._files

    def left_out_text(self) -> str:
        """Counts and an example of each reason; empty for nothing."""
        parts = sorted(self.left_out.items(), key=lambda item: -len(item[1]))
        texts = [f"{len(names)} {reason} ({shown(names[0])})" for reason, names in parts[:6]]
        more = sum(len(names) for _, names in parts[6:])
        return ", ".join(texts + ([f"{more} more"] if more else []))

    def _name(self, path: str) -> str:
        """A path as it is called in the root, or in the table."""
        start = self._base.rstrip("/") + "/"
        return path.removeprefix(start) if path.startswith(start) else os.path.relpath(path, self._base)

    def _leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(self._name(path))

    def _table(self) -> dict[str, list[str]]:
        """The files of each class of a table, from its own folder. A label without a file declares a class."""
        rows = read_table(self.root)
        inside: dict[str, list[str]] = {label: [] for file, label in rows if not file}
        for file, label in dict.fromkeys(row for row in rows if row[0]):
            path = os.path.join(self._base, file)
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                self._leave_out("files that are not there", path)
                continue
            if not stat.S_ISREG(status.st_mode):
                self._leave_out("folders, pipes or devices", path)
            elif reason := _refused(file):
                self._leave_out(reason, path)
            else:
                inside.setdefault(label, []).append(path)
                self._files.append(_number(status.st_dev, status.st_ino))
        if not any(inside.values()):
            raise InputError(f"no images in {self.root}: it names {self.left_out_text() or 'nothing'}")
        return {label: sorted(inside[label]) for label in sorted(inside)}

    def _tree(self) -> dict[str, list[str]]:
        """The files of each class folder; all images are of one class where there are no class folders."""
        first = os.environ.get("RANK", "0") == "0"
        text = f"looking for images in {shown(self.root)}"
        with progress(desc=text, unit=" entries", delay=5, show=first) as self._bar:
            top, folders = self._entries(self.root)
            inside = {os.path.basename(folder): self._below(folder) for folder in folders}
        del self._bar
        _refuse_splits(self.root, {name: paths for name, paths in inside.items() if paths})
        if any(inside.values()):
            if empty := [shown(name) for name, paths in inside.items() if not paths]:
                more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
                has = f"; left out are {self.left_out_text()}" if self.left_out else ""
                raise InputError(
                    f"no images in class folder {', '.join(empty[:3])}{more} of {self.root}: add some or delete the "
                    f"folder{has}"
                )
            for path in top:
                self._leave_out("images beside the class folders, in no class", path)
            return inside
        if not top:
            more = f" and {len(folders)} folders without images" if folders else ""
            raise InputError(
                f"no images in {self.root}: expected one folder of images a class, or images; "
                f"it holds {self.left_out_text() or 'nothing'}{more}"
            )
        for folder in folders:
            self._leave_out("folders without images", folder)
        return {ONE_CLASS: top}

    def _below(self, folder: str) -> list[str]:
        """The images in a folder and the folders below it, as torchvision orders them."""
        root = os.path.realpath(self.root)
        entered = {root, *map(str, Path(root).parents)}
        folders, found = [folder], []
        while folders:
            path = folders.pop()
            real = os.path.realpath(path)
            if real in entered:
                self._leave_out("links to folders that are read already or hold this one", path)
                continue
            entered.add(real)
            files, below = self._entries(path)
            found.append((path, files))
            folders += reversed(below)
        return [file for _, files in sorted(found) for file in files]

    def _entries(self, folder: str) -> tuple[list[str], list[str]]:
        """The images and the folders in a folder, sorted."""
        files, folders = [], []
        try:
            with os.scandir(folder) as entries:
                device = os.stat(folder).st_dev
                for entry in sorted(entries, key=lambda entry: entry.name):
                    self._bar.update()
                    kind, number = _kind(entry, device)
                    if entry.name.startswith(".") or entry.name.lower() in LITTER:
                        self._leave_out("hidden or system files", entry.path)
                    elif kind == "folder":
                        folders.append(entry.path)
                    elif reason := _refused(entry.name) if kind == "file" else kind:
                        self._leave_out(reason, entry.path)
                    else:
                        files.append(entry.path)
                        self._files.append(number)
        except OSError:
            self._leave_out("folders that cannot be opened", folder)
        return files, folders


def _refuse_splits(root: str, inside: dict[str, list[str]]) -> None:
    """Classes that are called train and val are no classes. inside: the images of each folder that has some."""
    splits = [name for name in inside if name.lower() in SPLITS]
    trains = [name for name in splits if name.lower().startswith("train")]
    only = len(splits) == len(inside) and all(
        os.path.dirname(path) != os.path.join(root, name) for name, paths in inside.items() for path in paths
    )
    if splits and ((trains and len(splits) > 1) or only):
        names = " and ".join(f"{name}/" for name in splits)
        raise InputError(
            f"{root} holds {names}, parts of a data set and no classes: give {os.path.join(root, (trains or splits)[0])}"
        )


def _refused(name: str) -> str:
    """Why a file of this name is no image that can be read; empty for one that may be."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in SUFFIXES:
        return f"{suffix[:16] or 'suffixless'} files"
    return f"{suffix} files that need {missing_reader(suffix)}" if missing_reader(suffix) else ""


def _kind(entry: os.DirEntry, device: int) -> tuple[str, int]:
    """`folder`, `file` or why an entry is neither, and the number of the file. Only links are looked at closely."""
    try:
        status = entry.stat() if entry.is_symlink() else None
        kind = "folder" if entry.is_dir() else "file" if entry.is_file() else "pipes, sockets or devices"
    except OSError:
        return "links that lead nowhere", 0
    return kind, _number(status.st_dev, status.st_ino) if status else _number(device, entry.inode())


def _number(device: int, inode: int) -> int:
    """64 bits that are the same for the same file."""
    return (inode ^ (device << 44)) & (2**64 - 1)
