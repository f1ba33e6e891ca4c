"""Files of the Hugging Face Hub: fetched once, what came is recorded beside it, and checked at each use.

PRETRAINED_MODELS/user/repo/file        the file; PRETRAINED_MODELS is `pretrained_models/` unless the environment says
PRETRAINED_MODELS/user/repo/file.json   its record: repository, file, revision (a commit), sha256, bytes
"""

import http.client
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from utils.cli import InputError
from utils.fetch import alone, fetch
from utils.files import sha256, write_json

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


def local_path(repo: str, file: str) -> Path:
    """Where a file of the Hub is kept."""
    return weights_folder() / repo / file


def record_of(path: Path) -> dict[str, Any]:
    """What was recorded of a file when it was downloaded; nothing of one that was put there by hand."""
    note = path.with_name(f"{path.name}.json")
    if not note.is_file():
        return {}
    try:
        record = json.loads(note.read_text())
        return {key: record[key] for key in ("repo", "file", "revision", "sha256", "bytes")}
    except ValueError:
        raise InputError(f"{note} is damaged: delete it and {path}; the file is then fetched again") from None
    except (KeyError, TypeError):  # somebody else's
        return {}


def check(path: Path) -> Path:
    """The path of a file that is what its record says, or that has none. Raises InputError for one that has changed."""
    record = record_of(path)
    if record and (path.stat().st_size != record["bytes"] or sha256(path) != record["sha256"]):
        raise InputError(
            f"{path} is not the file that was downloaded (sha256 {record['sha256'][:12]}..., {record['bytes']} bytes): "
            f"delete it and {path.name}.json; it is then fetched again"
        )
    return path


def hub_file(repo: str, file: str, revision: str | None = None) -> Path:
    """A file of the Hub on this machine: the one that is there, checked, or fetched from `revision` (default: main).

    A file of another revision than the one asked for is replaced. Raises InputError, with what to do by hand, where the
    file cannot be had or is not what was recorded.
    """
    path = local_path(repo, file)
    if _is_there(path, revision):
        return check(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f".{path.name}.lock")):
            if not _is_there(path, revision):
                _download(repo, file, revision, path)
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot be written to ({error}): set PRETRAINED_MODELS to another folder"
        ) from None
    return check(path)


def _is_there(path: Path, revision: str | None) -> bool:
    """Whether a file need not be fetched. A revision is known by its commit, or the start of it."""
    return path.is_file() and (revision is None or record_of(path).get("revision", "").startswith(revision))


def _download(repo: str, file: str, revision: str | None, path: Path) -> None:
    """Fetch, compare with what the Hub lists, write the record, and only then give the file its name."""
    from huggingface_hub import get_token, hf_hub_url  # here, as most calls find their file

    listed = _listed(repo, file, revision, path)
    note, old = path.with_name(f"{path.name}.json"), record_of(path) if path.is_file() else {}
    if old and old["sha256"] == listed.etag:  # another revision with the same file
        write_json(note, {**old, "revision": listed.commit_hash})
        return
    by_hand = _by_hand(repo, file, revision, path)
    part = path.with_name(f".{path.name}.{listed.etag[:12]}.part")
    try:
        fetch(hf_hub_url(repo, file, revision=listed.commit_hash), part, path.name, get_token())
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"{path.name} was not fetched ({_reason(error)}): try again, it goes on; or {by_hand}"
        ) from None
    came = {"sha256": sha256(part), "bytes": part.stat().st_size}
    is_hash = re.fullmatch("[0-9a-f]{64}", listed.etag)
    if (is_hash and came["sha256"] != listed.etag) or listed.size not in (None, came["bytes"]):
        part.unlink()
        raise InputError(
            f"what came as {path.name} is not what the Hub lists (sha256 or size): try again, or {by_hand}"
        )
    write_json(note, {"repo": repo, "file": file, "revision": listed.commit_hash, **came})
    part.replace(path)


def _listed(repo: str, file: str, revision: str | None, path: Path) -> Any:
    """The Hub's metadata of a file: commit_hash, etag (the sha256 of large files) and size. Raises InputError."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    where = f"{repo} at {revision or 'main'}"
    try:
        listed = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    except errors.GatedRepoError:
        raise InputError(
            f"{repo} asks for a licence to be accepted: do so at {_endpoint()}/{repo}, and log in"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"there is no {repo} on the Hub, or it is private: check the name, or log in") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"there is no revision {revision} of {repo}: give a branch, a tag or a commit") from None
    except errors.EntryNotFoundError:
        raise InputError(f"there is no file {file} in {where}: check the name") from None
    except Exception as error:  # offline, behind a proxy, a server in trouble: the HTTP client has its own errors
        by_hand = _by_hand(repo, file, revision, path)
        raise InputError(f"{path.name} was not fetched ({_reason(error)}): {by_hand}") from None
    if not listed.commit_hash or not listed.etag:
        by_hand = _by_hand(repo, file, revision, path)
        raise InputError(f"{path.name} was not fetched (what answered at {_endpoint()} is not the Hub): {by_hand}")
    return listed


def _by_hand(repo: str, file: str, revision: str | None, path: Path) -> str:
    return f"fetch {_endpoint()}/{repo}/resolve/{revision or 'main'}/{file} by hand and put it at {path}"


def _endpoint() -> str:
    from huggingface_hub.constants import ENDPOINT

    return ENDPOINT


def _reason(error: Exception) -> str:
    """An error's name and the start of its text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {re.split(r'[.:] ', text)[0][:100]}"
