"""The graph's download: continued, checked, noted; and one line where it cannot be had."""

import http.server
import threading

import pytest

from evaluations.c2i import download
from evaluations.c2i.download import NAME, cache_folder, inception_path
from utils.cli import InputError
from utils.files import sha256

CONTENT = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache and working folder; what counts as the graph is CONTENT."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def check(path):
        if path.read_bytes() != CONTENT:
            raise InputError(f"{path} is not the Inception graph of 2015")

    monkeypatch.setattr(download, "read_inception", check)
    return tmp_path / "cache" / "next-patch-prediction"


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; `cuts` are how many bytes it sends before it hangs up, request by request."""

    cuts: list[int]
    requests: list[str | None]
    content = CONTENT
    ranges = True

    def do_GET(self):
        asked = self.headers.get("Range")
        self.requests.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        cut = self.cuts.pop(0) if self.cuts else len(self.content)
        self.wfile.write(self.content[start : start + cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Start a server with these attributes; gives its URL and the Range headers that it is asked for."""
    servers = []

    def start(**attributes):
        handler = type("Handler", (Server,), {"cuts": [], "requests": [], **attributes})
        server = http.server.HTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/{NAME}", handler.requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_downloaded_once(folder, serve):
    url, requests = serve()
    path = inception_path(url=url)
    assert path == cache_folder() / NAME == folder / NAME
    assert path.read_bytes() == CONTENT
    assert (folder / f"{NAME}.sha256").read_text() == f"{sha256(path)}  {NAME}\n"
    assert inception_path(url=url) == path
    assert requests == [None]
    assert {entry.name for entry in folder.iterdir()} == {NAME, f"{NAME}.sha256", f".{NAME}.lock"}


def test_a_broken_connection_is_continued(folder, serve):
    url, requests = serve(cuts=[1000, 50_000])
    assert inception_path(url=url).read_bytes() == CONTENT
    assert requests == [None, "bytes=1000-", "bytes=51000-"]


def test_an_interrupted_download_is_continued(folder, serve):
    folder.mkdir(parents=True)
    url, requests = serve()
    (folder / f"{NAME}.part").write_bytes(CONTENT[:700])
    assert inception_path(url=url).read_bytes() == CONTENT
    assert requests == ["bytes=700-"]


def test_a_complete_part(folder, serve):
    folder.mkdir(parents=True)
    url, _ = serve()
    (folder / f"{NAME}.part").write_bytes(CONTENT)
    assert inception_path(url=url).read_bytes() == CONTENT


def test_a_server_that_starts_again(folder, serve):
    """It knows no ranges."""
    url, requests = serve(cuts=[1000], ranges=False)
    assert inception_path(url=url).read_bytes() == CONTENT
    assert requests == [None, "bytes=1000-"]


def test_something_else_is_sent(folder, serve):
    url, _ = serve(content=b"<html>")
    with pytest.raises(
        InputError, match=rf"what {url} sent is not the graph .*: get {NAME} .* and give --inception PATH"
    ):
        inception_path(url=url)
    assert {entry.name for entry in folder.iterdir()} == {f".{NAME}.lock"}


def test_offline(folder):
    with pytest.raises(
        InputError, match=rf"{NAME} could not be downloaded \(.*\): try again, or get .* --inception PATH"
    ):
        inception_path(url="http://127.0.0.1:9/none")


def test_no_progress_ends_it(folder, serve):
    url, requests = serve(cuts=[1000, 0, 0, 0])
    with pytest.raises(InputError, match="it ended after 1000 of 102400 bytes"):
        inception_path(url=url)
    assert len(requests) == 2


def test_a_changed_file(folder, serve):
    url, _ = serve()
    path = inception_path(url=url)
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(InputError, match="is not the file that was downloaded and checked: delete it"):
        inception_path(url=url)


def test_a_copy_that_somebody_put_there(folder):
    """It is checked once and noted."""
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(b"none")
    with pytest.raises(InputError, match="is not the Inception graph"):
        inception_path()
    (folder / NAME).write_bytes(CONTENT)
    assert inception_path() == folder / NAME
    assert (folder / f"{NAME}.sha256").is_file()


def test_a_file_that_is_given_or_lies_here(tmp_path):
    assert inception_path(tmp_path / "given.pb") == tmp_path / "given.pb"
    (tmp_path / NAME).write_bytes(b"")
    assert inception_path().name == NAME
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*: set XDG_CACHE_HOME, or get .* --inception PATH"):
        inception_path()
