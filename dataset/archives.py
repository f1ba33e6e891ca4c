"""Unpack a .zip or .tar of images, once, into a folder of its own. Nothing in it is trusted.

A member that would lie outside the folder refuses the whole archive. Links, devices and pipes are left out.
"""

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from utils.cli import InputError, note
from utils.files import atomic_folder, file_lock
from utils.log import progress
from utils.records import Record

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SPARE = 1 << 30  # bytes that stay free on the disk


class UnpackRecord(Record):
    """FOLDER.json: which archive a folder was unpacked from."""

    archive: str
    bytes: int
    members: int


def is_archive(path: Path) -> bool:
    """Whether a path is a file that unpack takes, by its name."""
    return path.name.lower().endswith(ARCHIVES) and path.is_file()


def unpack(archive: Path, folder: Path) -> Path:
    """The folder, with the archive's files in it; done once. Raises InputError for an archive that is damaged, encrypted,
    unsafe, too large for the disk, or another one than the folder was unpacked from."""
    size, record_path = archive.stat().st_size, folder.with_name(f"{folder.name}.json")
    record = UnpackRecord.read_if_present(record_path)
    if record and folder.is_dir():
        if record.bytes != size:
            raise InputError(
                f"{folder} was unpacked from another archive ({record.archive}): delete it, or give another --run"
            )
        return folder
    with file_lock(folder):
        try:
            with atomic_folder(folder) as unfinished:
                count = _write(archive, unfinished, shutil.disk_usage(unfinished).free - SPARE)
                shutil.rmtree(folder, ignore_errors=True)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # damaged bytes fail in any way; the OSErrors of a decompressor have no number
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputError(
                f"{archive} is damaged, encrypted or no archive ({' '.join(str(error).split())[:120]}): copy it again, or "
                "unpack it by hand"
            ) from None
        UnpackRecord(archive=archive.name, bytes=size, members=count).write(record_path)
    return folder


def _write(archive: Path, folder: Path, room: int) -> int:
    """Write the members; returns their number. room: bytes that they may take."""
    written = count = left_out = 0
    with progress(desc=f"unpacking {archive.name}", unit=" files") as bar:
        for name, size, opened in _members(archive):
            target = folder / _inside(archive, name)
            if opened is None:
                left_out += 1
                continue
            written, count = written + size, count + 1
            if written > room:
                raise InputError(
                    f"{archive} unfolds to more than {written / 1e9:.1f} GB, and there is room for "
                    f"{max(0, room) / 1e9:.1f} GB: make room, or give another --run"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, open(target, "wb") as file:  # no more bytes than the header says
                shutil.copyfileobj(source, file, 1 << 20)
            bar.update()
    if left_out:
        note(f"{archive}: left out {left_out} links, devices or pipes")
    if not count:
        raise InputError(f"{archive} holds no files")
    return count


def _inside(archive: Path, name: str) -> Path:
    """A member's path below the folder. Raises InputError for one that leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    windows_drive = len(path.parts) > 0 and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or windows_drive or "\0" in name or not path.parts:
        raise InputError(f"{archive} is refused: it holds {name[:100]!r}, which would be written outside its folder")
    return Path(*path.parts)


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]] | None]]:
    """Name and size in bytes of each member that is no folder, and what opens it: None for a link, device or pipe."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where none is recorded
                if not info.is_dir():
                    yield info.filename, info.file_size, partial(file.open, info) if kind in (0, stat.S_IFREG) else None
    else:
        with tarfile.open(archive, "r|*", errorlevel=1) as file:
            for info in file:
                if not info.isdir():
                    yield info.name, info.size, partial(file.extractfile, info) if info.isreg() else None
