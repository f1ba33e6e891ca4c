"""Files over HTTP, one process at a time; what a broken connection left is continued."""

import fcntl
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.log import progress

ATTEMPTS, TIMEOUT, CHUNK = 5, 30, 1 << 20


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a lock file: one process at a time, of those that ask for it."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(url: str, part: Path, name: str, token: str | None = None) -> None:
    """Append what `part` lacks of the file behind a URL, and sync it to disk; several attempts, as long as more comes.

    name: what the progress bar says. token: a bearer token for the first host, not for one that it redirects to.
    Raises OSError or HTTPException where it gets no further; what has come stays in `part`.
    """
    before = -1
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _append(url, part, name, token)
            break
        except (OSError, http.client.HTTPException):
            size = part.stat().st_size if part.is_file() else 0
            if attempt == ATTEMPTS or size <= before:  # no further than the last time
                raise
            before = size
    with open(part, "rb") as file:
        os.fsync(file.fileno())


def _append(url: str, part: Path, name: str, token: str | None) -> None:
    """One attempt. Raises OSError or HTTPException where the connection fails or ends early."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is missing
            return
        raise
    with response:
        if response.status != 206:  # the server sends it from the start
            start = 0
        rest = response.headers.get("Content-Length")
        total = start + int(rest) if rest else None
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            with progress(total=total, initial=start, desc=f"downloading {name}", unit="B", unit_scale=True) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            if total is not None and file.tell() != total:
                raise ConnectionError(f"it ended after {file.tell()} of {total} bytes")
