"""The Inception graph on this machine: found, or downloaded once into the user's cache folder and checked.

`classify_image_graph_def.pb` is 95.7 MB. No hash of it is published; its layout is checked instead, and the hash of the
file that passed is recorded beside it, so that damage shows later.
"""

import os
import socket
from http.client import HTTPException
from pathlib import Path

import torch.hub

from evaluations.c2i.inception import read_inception
from utils.cli import InputError
from utils.download import DownloadRecord, check, reason, record_of
from utils.files import check_folder, file_lock

URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"
NAME = "classify_image_graph_def.pb"
ELSEWHERE = f"get {NAME} on a machine that is online ({URL}) and give --inception PATH"
SILENCE = 60.0  # seconds in which nothing comes, after which a download ends
SOURCE = {"repo": URL.removesuffix(f"/{NAME}"), "file": NAME, "revision": "jul-2021"}


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
    if record_of(path) is None or not path.is_file():
        check_folder(path.parent, f"set XDG_CACHE_HOME, or {ELSEWHERE}")
        with file_lock(path, wait=True):
            if not path.is_file():
                _download(url, path)
            elif record_of(path) is None:  # a copy that somebody put there
                read_inception(path)
                DownloadRecord.take(path, **SOURCE).write(DownloadRecord.path_of(path))
    return check(path)


def _download(url: str, path: Path) -> None:
    part = path.with_name(f".{NAME}.part")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        torch.hub.download_url_to_file(url, str(part))
        read_inception(part)
        DownloadRecord.take(part, **SOURCE).write(DownloadRecord.path_of(path))
        part.replace(path)
    except InputError as error:
        raise InputError(
            f"what {url} sent is not the graph, or not all of it ({error}): try again, or {ELSEWHERE}"
        ) from None
    except (OSError, HTTPException) as error:
        raise InputError(f"{NAME} was not fetched ({reason(error)}): try again, or {ELSEWHERE}") from None
    finally:
        socket.setdefaulttimeout(before)
        for path in part.parent.glob(f"{part.name}*"):  # its own, and what a killed command left
            path.unlink(missing_ok=True)
