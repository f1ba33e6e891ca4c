"""The Inception graph on this machine: found, or downloaded once into the user's cache folder and checked.

`classify_image_graph_def.pb` is 95.7 MB. No hash of it is published; its layout is checked instead, and the hash of the
file that passed is kept beside it, so that damage shows later.
"""

import http.client
import os
from pathlib import Path

from evaluations.c2i.inception import read_inception
from utils.cli import InputError
from utils.fetch import alone, fetch
from utils.files import atomic_path, sha256

URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"
NAME = "classify_image_graph_def.pb"
ELSEWHERE = f"get {NAME} on a machine that is online ({URL}) and give --inception PATH"


def cache_folder() -> Path:
    """Where this user's downloads and reference features are: XDG_CACHE_HOME or ~/.cache, and the project's name."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-patch-prediction"


def inception_path(given: Path | None = None, url: str = URL) -> Path:
    """The graph's file: the given one, one in the working folder (where the published evaluator looks), or the cached
    one, downloaded where it is missing. Raises InputError if it cannot be had or has changed since it was checked."""
    if given is not None:
        return given
    if Path(NAME).is_file():
        return Path(NAME)
    path = cache_folder() / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f".{NAME}.lock")):
            if not path.is_file():
                _download(url, path)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written to ({error}): set XDG_CACHE_HOME, or {ELSEWHERE}") from None
    if sha256(path) != _noted(path):
        raise InputError(f"{path} is not the file that was downloaded and checked: delete it, it is then fetched again")
    return path


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _noted(path: Path) -> str:
    """The hash that was kept of a file that passed its check; a copy that somebody put there is checked now."""
    if not _note(path).is_file():
        read_inception(path)
        with atomic_path(_note(path)) as temporary:
            temporary.write_text(f"{sha256(path)}  {path.name}\n")
    return _note(path).read_text().split(maxsplit=1)[0]


def _download(url: str, path: Path) -> None:
    """Fetch, check, note the hash, and only then give the file its name. What a broken connection left is continued."""
    part = path.with_name(f"{path.name}.part")
    try:
        fetch(url, part, NAME)
    except (OSError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{NAME} could not be downloaded ({reason}): try again, or {ELSEWHERE}") from None
    try:
        read_inception(part)
    except InputError as error:
        part.unlink()
        raise InputError(f"what {url} sent is not the graph ({error}): {ELSEWHERE}") from None
    with atomic_path(_note(path)) as temporary:
        temporary.write_text(f"{sha256(part)}  {path.name}\n")
    part.replace(path)
