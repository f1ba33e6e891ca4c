"""The graph's download: continued, checked, recorded; and one line where it cannot be had."""

import http.server
import threading

import pytest

from evaluations.c2i import download
from evaluations.c2i.download import NAME, cache_folder, inception_path
from utils.cli import InputError
from utils.download import record_of
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
    """Serves `content`, `missing` bytes fewer than it says; `requests` are the methods and tokens that it was asked with."""

    requests: list[tuple[str, str | None]]
    content: bytes
    missing: int

    def do_GET(self):
        self.requests.append((self.command, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content) + self.missing))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Start a server with this content; gives its URL and what it is asked for."""
    servers = []

    def start(content: bytes = CONTENT, missing: int = 0):
        handler = type("Handler", (Server,), {"requests": [], "content": content, "missing": missing})
        server = http.server.HTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/{NAME}", handler.requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_downloaded_once_without_the_users_token(folder, serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    url, requests = serve()
    path = inception_path(url=url)
    assert path == cache_folder() / NAME == folder / NAME
    assert path.read_bytes() == CONTENT
    assert record_of(path).sha256 == sha256(path)
    monkeypatch.setattr("utils.download.sha256", None)  # it is hashed once
    assert inception_path(url=url) == path
    assert requests == [("GET", None)]
    assert {entry.name for entry in folder.iterdir()} == {NAME, f"{NAME}.json"}


@pytest.mark.parametrize(("content", "missing"), [(b"<html>", 0), (CONTENT[:-1], 1)], ids=["other", "cut off"])
def test_something_else_is_sent(folder, serve, content, missing):
    url, _ = serve(content, missing)
    with pytest.raises(
        InputError,
        match=rf"what {url} sent is not the graph, or not all of it .*: try again, or get {NAME} .* and give --inception PATH",
    ):
        inception_path(url=url)
    assert not [*folder.iterdir()]


def test_offline(folder):
    with pytest.raises(InputError, match=rf"{NAME} was not fetched \(.*\): try again, or get .* --inception PATH"):
        inception_path(url="http://127.0.0.1:9/none")


def test_a_changed_file(folder, serve):
    url, _ = serve()
    path = inception_path(url=url)
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(InputError, match=r"is not the file that was downloaded .*: delete it and"):
        inception_path(url=url)


def test_a_copy_that_somebody_put_there(folder):
    """It is checked once and recorded."""
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(b"none")
    with pytest.raises(InputError, match="is not the Inception graph"):
        inception_path()
    (folder / NAME).write_bytes(CONTENT)
    assert inception_path() == folder / NAME
    assert record_of(folder / NAME)


def test_a_file_that_is_given_or_lies_here(tmp_path):
    assert inception_path(tmp_path / "given.pb") == tmp_path / "given.pb"
    (tmp_path / NAME).write_bytes(b"")
    assert inception_path().name == NAME
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(
        InputError, match=r"cannot be made: .* is no folder; set XDG_CACHE_HOME, or get .* --inception PATH"
    ):
        inception_path()
