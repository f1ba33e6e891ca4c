"""Files over HTTP: fetched once by one process, recorded beside them, and checked at each use.

    PRETRAINED_MODELS/user/repo/file        a file of the Hugging Face Hub; PRETRAINED_MODELS is `pretrained_models/`
                                            unless the environment says otherwise
    PRETRAINED_MODELS/user/repo/file.json   its record: repository, file, revision (a commit), sha256, bytes, mtime_ns

hf_hub_download transfers them, with its retries, timeouts and progress bar.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath

from utils.cli import InputError
from utils.files import check_folder, file_lock, sha256
from utils.records import Record, read_json

ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w.-]+))?/(?P<file>[^@]+)")
DEFAULT_FOLDER = Path(__file__).parent.parent / "pretrained_models"


def weights_folder() -> Path:
    """Where weights are kept: the environment's PRETRAINED_MODELS, or `pretrained_models/` of this repository."""
    return Path(os.environ.get("PRETRAINED_MODELS") or DEFAULT_FOLDER)


def parse_address(text: str) -> tuple[str, str, str | None]:
    """Repository, file and revision of `hf://user/repo[@revision]/file`. Raises InputError for anything else."""
    match = ADDRESS.fullmatch(text)
    if not match or ".." in PurePosixPath(text[5:]).parts:
        raise InputError(
            f"{text} is no address of a file; expected hf://user/repo/file or hf://user/repo@revision/file"
        )
    return match["repo"], match["file"], match["revision"]


class DownloadRecord(Record):
    """What came when a file was downloaded. mtime_ns: of the file when its sha256 was last taken."""

    repo: str
    file: str
    revision: str
    sha256: str
    bytes: int
    mtime_ns: int = 0

    @staticmethod
    def path_of(path: Path) -> Path:
        return path.with_name(f"{path.name}.json")

    @classmethod
    def take(cls, path: Path, **source: str) -> "DownloadRecord":
        """The record of a file that is there; source: repo, file and revision."""
        status = path.stat()
        return cls(sha256=sha256(path), bytes=status.st_size, mtime_ns=status.st_mtime_ns, **source)


def record_of(path: Path) -> DownloadRecord | None:
    """What was recorded of a file when it was downloaded; None for one that was put there by hand.

    A JSON file of another kind is no record. Raises InputError for a damaged one.
    """
    note = DownloadRecord.path_of(path)
    if not note.is_file():
        return None
    try:
        content = read_json(note)
        needed = {name for name, field in DownloadRecord.model_fields.items() if field.is_required()}
        is_record = isinstance(content, dict) and needed <= content.keys()
        return DownloadRecord.read(note) if is_record else None
    except InputError:
        raise InputError(f"{note} is damaged: delete it and {path}; the file is then fetched again") from None


def check(path: Path) -> Path:
    """The path of a file that is what its record says, or that has none. Raises InputError for one that has changed.

    It is read only if its size or its time is not the recorded one.
    """
    record, status = record_of(path), path.stat()
    if record is None or (status.st_size, status.st_mtime_ns) == (record.bytes, record.mtime_ns):
        return path
    if status.st_size != record.bytes or sha256(path) != record.sha256:
        raise InputError(
            f"{path} is not the file that was downloaded (sha256 {record.sha256[:12]}..., {record.bytes} bytes): "
            f"delete it and {path.name}.json; it is then fetched again"
        )
    with suppress(OSError):  # a folder that cannot be written to: it is read again next time
        record.model_copy(update={"mtime_ns": status.st_mtime_ns}).write(DownloadRecord.path_of(path))
    return path


def recorded_sha256(path: Path) -> str:
    """The sha256 of a file that `check` has passed: its record's, or taken now."""
    record = record_of(path)
    return record.sha256 if record else sha256(path)


def hub_file(repo: str, file: str, revision: str | None = None) -> Path:
    """A file of the Hub on this machine: the one that is there, checked, or fetched from `revision` (default: main).

    A file of another revision than the one asked for is replaced. Raises InputError, with what to do by hand, where the
    file cannot be had or is not what was recorded.
    """
    path = weights_folder() / repo / file
    if not _is_there(path, revision):
        check_folder(path.parent, "set PRETRAINED_MODELS to another folder")
        with file_lock(path, wait=True):
            if not _is_there(path, revision):
                _fetch_from_hub(repo, file, revision, path)
    return check(path)


def _is_there(path: Path, revision: str | None) -> bool:
    """Whether a file need not be fetched. A revision is known by its commit, or the start of it."""
    if not path.is_file() or revision is None:
        return path.is_file()
    record = record_of(path)
    return record is not None and record.revision.startswith(revision)


def _fetch_from_hub(repo: str, file: str, revision: str | None, path: Path) -> None:
    """Fetch a file beside its place, compare it with the sha256 that the Hub lists, record it, then give it its name."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.constants import ENDPOINT

    by_hand = f"fetch {ENDPOINT}/{repo}/resolve/{revision or 'main'}/{file} by hand and put it at {path}"
    folder = path.with_name(f".{path.name}.part")
    try:
        listed = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
        if not listed.commit_hash or not listed.etag:
            raise InputError(f"{file} was not fetched (what answered at {ENDPOINT} is not the Hub): {by_hand}")
        old = record_of(path) if path.is_file() else None
        if old and old.sha256 == listed.etag:  # another revision with the same file
            old.model_copy(update={"revision": listed.commit_hash}).write(DownloadRecord.path_of(path))
            return
        part = Path(hf_hub_download(repo, file, revision=listed.commit_hash, local_dir=folder))
        record = DownloadRecord.take(part, repo=repo, file=file, revision=listed.commit_hash)
        if re.fullmatch("[0-9a-f]{64}", listed.etag) and record.sha256 != listed.etag:
            raise InputError(f"the downloaded {file} is not what the Hub lists (sha256): try again, or {by_hand}")
        record.write(DownloadRecord.path_of(path))
        part.replace(path)
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(f"{repo} asks for a licence to be accepted: do so at {ENDPOINT}/{repo}, and log in") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"there is no {repo} on the Hub, or it is private: check the name, or log in") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"there is no revision {revision} of {repo}: give a branch, a tag or a commit") from None
    except errors.EntryNotFoundError:
        raise InputError(f"there is no file {file} in {repo} at {revision or 'main'}: check the name") from None
    except Exception as error:  # offline, behind a proxy, a server in trouble: the HTTP client has its own errors
        raise InputError(f"{file} was not fetched ({reason(error)}): try again, or {by_hand}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reason(error: Exception) -> str:
    """An error's name and the start of its text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {re.split(r'[.:] ', text)[0][:100]}"
