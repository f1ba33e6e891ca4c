"""Unpack a .zip or .tar of images, once, into a folder of its own. Nothing in it is trusted.

A member that would lie outside the folder refuses the whole archive. Links, devices and pipes are left out.
"""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from utils.cli import InputError, note
from utils.files import file_lock
from utils.log import progress
from utils.records import Record

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SPARE = 1 << 30  # bytes that stay free on the disk
MOST_MEMBERS = 10_000_000


class UnpackRecord(Record):
    """FOLDER.json: which archive a folder was unpacked from."""

    archive: str
    bytes: int
    members: int


class Member(NamedTuple):
    """A regular file in an archive: its name, its size in bytes and what opens it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether a path is a file that unpack takes, by its name."""
    return path.name.lower().endswith(ARCHIVES) and path.is_file()


def unpack(archive: Path, folder: Path) -> Path:
    """The folder, with the archive's files in it; done once. Raises InputError for an archive that is damaged, encrypted,
    unsafe, too large for the disk, or another one than the folder was unpacked from."""
    size = archive.stat().st_size
    record = UnpackRecord.read_if_present(folder.with_name(f"{folder.name}.json"))
    if record and folder.is_dir():
        if record.bytes != size:
            raise InputError(
                f"{folder} was unpacked from another archive ({record.archive}): delete it, or give another --run"
            )
        return folder
    part = folder.with_name(f".{folder.name}.part")
    with file_lock(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            with _errors_of(archive):
                count = _write(archive, part, shutil.disk_usage(part).free - SPARE)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        UnpackRecord(archive=archive.name, bytes=size, members=count).write(folder.with_name(f"{folder.name}.json"))
    return folder


def _write(archive: Path, folder: Path, room: int) -> int:
    """Write the members; returns their number. room: bytes that they may take."""
    written = count = 0
    with progress(desc=f"unpacking {archive.name}", unit=" files") as bar:
        for member in _members(archive):
            target = folder / _inside(archive, member.name)
            written, count = written + member.size, count + 1
            if written > room or count > MOST_MEMBERS:
                raise InputError(
                    f"{archive} unfolds to more than {written / 1e9:.1f} GB in {count:,} files, and there is room for "
                    f"{max(0, room) / 1e9:.1f} GB: make room, or give another --run"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, open(target, "wb") as file:
                shutil.copyfileobj(_Limited(source, member.size), file, 1 << 20)
            bar.update()
    if not count:
        raise InputError(f"{archive} holds no files")
    return count


class _Limited:
    """A file of at most so many bytes: a header may say less than there is."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, size

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data


def _inside(archive: Path, name: str) -> Path:
    """A member's path below the folder. Raises InputError for one that leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    windows_drive = len(path.parts) > 0 and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or windows_drive or "\0" in name or not path.parts:
        raise InputError(f"{archive} is refused: it holds {name[:100]!r}, which would be written outside its folder")
    return Path(*path.parts)


def _members(archive: Path) -> Iterator[Member]:
    """The regular files of an archive; what else it holds is counted and said."""
    left_out = 0
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                mode = info.external_attr >> 16
                _inside(archive, info.filename or "/")
                if info.is_dir():
                    continue
                if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
                    left_out += 1
                    continue
                yield Member(info.filename, info.file_size, lambda info=info: file.open(info))
    else:
        with tarfile.open(archive, "r|*", errorlevel=1) as file:
            for info in file:
                if info.isdir():
                    continue
                _inside(archive, info.name)
                if not info.isreg():
                    left_out += 1
                    continue
                yield Member(info.name, info.size, lambda info=info: file.extractfile(info))
    if left_out:
        note(f"{archive}: left out {left_out} links, devices or pipes")


@contextmanager
def _errors_of(archive: Path) -> Iterator[None]:
    """Turn what a damaged or encrypted archive raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        UnicodeError,
        ValueError,
    ) as error:
        raise InputError(
            f"{archive} is damaged or no archive ({' '.join(str(error).split())[:120]}): copy it again"
        ) from None
    except RuntimeError as error:
        raise InputError(
            f"{archive} cannot be unpacked ({error}): an encrypted one has to be unpacked by hand"
        ) from None
    except OSError as error:
        if error.errno is not None:  # not a decompressor's
            raise
        raise InputError(f"{archive} is damaged ({error}): copy it again") from None
