"""Files appear whole or not at all, one process at a time makes them, and where they go is checked before the work."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from utils.cli import InputError, note

HOST = re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"
LONGEST_WAIT = 12 * 3600  # seconds for what another process makes
PART = re.compile(r"\..+\.(?P<host>[\w-]+)-(?P<pid>\d+)\.part(\..+)?")


@contextmanager
def atomic_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path in the same folder (made if missing); rename it to `path` when the block succeeds.

    The temporary name keeps the suffix of `path`, so that writers that look at it behave. On an error it is removed; for
    what a killed process left, see remove_remains. sync: wait until the bytes are on the disk, some milliseconds a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{HOST}-{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):  # a write tells no name
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`, which must be missing or empty; it takes that name when the block succeeds."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_remains(folder: Path, path: Path | None = None) -> None:
    """Remove temporary files in a folder (of `path` alone, if given) whose process on this machine has ended."""
    start = f".{path.stem}." if path else "."
    with suppress(OSError):
        names = [entry.name for entry in os.scandir(folder) if entry.name.startswith(start) and ".part" in entry.name]
        for name in names:
            match = PART.fullmatch(name)
            if match and match["host"] == HOST and not _alive(int(match["pid"])):
                with suppress(OSError):
                    (folder / name).unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_output(path: str | Path, suffixes: Collection[str] = ()) -> Path:
    """The path, if a file can be written there: a known suffix, and a folder that exists or can be made.

    Nothing is written. Raises InputError otherwise, so that it is found before the work.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; expected the name of a file to write")
        check_folder(path.parent)
        path.is_file()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)[:200]} cannot be written ({getattr(error, 'strerror', '') or error})") from None
    return path


def check_folder(folder: str | Path, advice: str = "give another path") -> Path:
    """The folder, if it exists and can be written to, or can be made. Raises InputError otherwise; makes nothing."""
    folder = Path(folder)
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
        if not nearest.is_dir():
            kind = "a link to nothing (an unmounted disk?)" if nearest.is_symlink() else "no folder"
            raise InputError(f"{folder} cannot be made: {nearest} is {kind}; {advice}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{folder} cannot be written to: {nearest} is read-only; {advice}")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(folder)[:200]} cannot be used ({getattr(error, 'strerror', '') or error})") from None
    return folder


def check_space(folder: str | Path, needed: int, reclaimed: int = 0) -> None:
    """Raise InputError if `needed` bytes do not fit on the disk of a folder, which may not exist yet.

    reclaimed: bytes already there that belong to the same result.
    """
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
    free = shutil.disk_usage(nearest).free
    if needed > free + reclaimed:
        raise InputError(
            f"{folder} needs {needed / 1e6:,.2f} MB and its disk has {free / 1e6:,.2f} MB free: "
            "make room or give another folder"
        )


def hold(path: Path, of: str, advice: str = "wait for it, or give another folder", wait: bool = False) -> TextIO:
    """Take the lock file `path`, for as long as the returned file is open and this process lives.

    of: what is locked, for the message. Raises InputError, which says who holds it, if another process does; wait: only if it
    still does after LONGEST_WAIT. On a file system without locks nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start, said = time.monotonic(), False
    while True:
        file = open(path, "a+")  # noqa: SIM115 (held by the caller)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            file.close()
            if not wait or time.monotonic() - start > LONGEST_WAIT:
                raise InputError(f"{of} is in use by {holder}: {advice}") from None
            if not said:
                note(f"{of} is being made by {holder}: waiting for it")
                said = True
            time.sleep(0.2)
            continue
        except OSError:  # a file system without locks
            pass
        try:
            removed = os.fstat(file.fileno()).st_ino != path.stat().st_ino
        except OSError as error:
            removed = isinstance(error, FileNotFoundError)
        if removed:  # by its last holder, meanwhile
            file.close()
            continue
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        return file


@contextmanager
def file_lock(
    path: str | Path, advice: str = "wait for it, or give another name", wait: bool = False
) -> Iterator[None]:
    """Hold `path` (an output file or folder) against other commands that would write it, and remove what a killed one left
    of it. Waits, or raises InputError, as hold does."""
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    file = hold(lock, str(path), advice, wait)
    remove_remains(path.parent, path)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink(missing_ok=True)
        file.close()


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes; of a folder, that of its files' names and digests, in order."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
