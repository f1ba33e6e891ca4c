"""Downloads from a stand-in for the Hub: recorded, continued, pinned, checked; and one line where they cannot be had.

Each command is a process of its own, because huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autoregressive.models import gpt
from autoregressive.models.gpt import GPT
from pretrained_models.catalogue import CATALOGUE
from utils import checkpoint
from utils.testing import PATIENCE, ROOT, assert_refused, fill_by_formula

CONTENT = bytes(range(256)) * 1000
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}
NAME, PATH = "c2i_B_256", "pytttttt/LlamaGen-NPP/c2i_B_256.pt"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: it says what a file is, and sends whoever wants it to another host.

    `cuts` are how many bytes that host sends before it hangs up, request by request; for -1 it answers with an error.
    """

    files: dict[str, bytes]
    cuts: list[int]
    ranges: list[str | None]
    tokens: dict[str, str | None]
    delay = 0.0  # seconds before that host answers
    listed: str | None = None  # a sha256 other than the content's

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if self.path.startswith("/cdn/"):
            self.send(self.files[self.path.removeprefix("/cdn/")])
        else:
            self.answer()

    def answer(self):
        if "/resolve/" not in self.path:
            self.list_files()
            return
        user, repo, _, revision, file = self.path.strip("/").split("/", 4)
        self.tokens["hub"] = self.headers.get("Authorization")
        problem = None if revision in COMMITS else "RevisionNotFound"
        problem = problem or (None if f"{user}/{repo}/{file}" in self.files else "EntryNotFound")
        if problem:
            self.send_response(404)
            self.send_header("X-Error-Code", problem)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.files[f"{user}/{repo}/{file}"]
        self.send_response(302)
        self.send_header("X-Repo-Commit", COMMITS[revision])
        self.send_header("X-Linked-Etag", f'"{self.listed or hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{user}/{repo}/{file}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def list_files(self):
        """What a repository holds: its files, or a page of them with sizes. The path: /api/models/user/repo/what/..."""
        _, _, _, user, name, what, *_ = f"{self.path}//".split("/")
        repo = f"{user}/{name}"
        names = [path.removeprefix(f"{repo}/") for path in self.files if path.startswith(f"{repo}/")]
        sizes = [{"type": "file", "path": n, "size": len(self.files[f"{repo}/{n}"]), "oid": "0" * 40} for n in names]
        answer = (
            sizes if what == "tree" else {"id": repo, "sha": "a" * 40, "siblings": [{"rfilename": n} for n in names]}
        )
        body = json.dumps(answer).encode()
        self.send_response(200 if names else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send(self, content: bytes):
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        time.sleep(self.delay)
        self.tokens["cdn"] = self.headers.get("Authorization")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        cut = self.cuts.pop(0) if self.cuts else len(content)
        if cut < 0:
            self.send_error(503)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    """A Hub with the files of this test; gives the handler class and its address."""
    handler = type("Handler", (Hub,), {"files": {PATH: CONTENT}, "cuts": [], "ranges": [], "tokens": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "weights"


def run(folder: Path, address: str, *command: str, **env: str) -> subprocess.CompletedProcess:
    """`python COMMAND` with this folder of weights and this Hub."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    variables = {
        **clean,
        "PRETRAINED_MODELS": str(folder),
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "none"),
        **env,
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def download(folder: Path, address: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return run(folder, address, "-m", "pretrained_models.download", *arguments, **env)


def test_what_came_is_recorded(hub, folder):
    result = download(folder, hub.address, NAME, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr
    path = folder / PATH
    assert path.read_bytes() == CONTENT
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert json.loads((folder / f"{PATH}.json").read_text()) == {
        "repo": "pytttttt/LlamaGen-NPP", "file": "c2i_B_256.pt", "revision": "a" * 40, "sha256": digest, "bytes": len(CONTENT),
        "mtime_ns": path.stat().st_mtime_ns,
    }  # fmt: skip
    assert f"revision {'a' * 40}, sha256 {digest}" in result.stdout and str(path) in result.stdout
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.json"}
    assert hub.tokens == {"hub": "Bearer hf_secret", "cdn": None}
    again = download(folder, "http://127.0.0.1:9", NAME)
    assert again.returncode == 0 and again.stdout == result.stdout  # nothing is asked for
    line = next(line for line in download(folder, hub.address, "--list").stdout.splitlines() if line.startswith(NAME))
    assert "111M" in line and "FID 4.47" in line and "  2  " in line and "aaaaaaaaaaaa" in line and "0 MB" in line


def test_a_connection_that_is_cut_off_resumes_and_a_failed_download_leaves_nothing(hub, folder):
    """huggingface_hub writes pieces of 10 MiB."""
    hub.files[PATH] = CONTENT * 120
    hub.cuts += [11 << 20, -1]
    result = download(folder, hub.address, NAME)
    assert_refused(result, "c2i_B_256.pt was not fetched", "try again", "by hand and put it at")
    assert not [*(folder / PATH).parent.iterdir()]
    hub.cuts += [11 << 20]
    assert download(folder, hub.address, NAME).returncode == 0
    assert (folder / PATH).read_bytes() == CONTENT * 120
    assert hub.ranges == [None, "bytes=10485760-", None, "bytes=10485760-"]


def test_a_changed_file_is_refused_ever_after(hub, folder):
    assert download(folder, hub.address, NAME).returncode == 0
    (folder / PATH).write_bytes(CONTENT[:-1] + b"x")
    train = ["autoregressive/train/train_c2i.py", "--code-path", "nowhere", "--gpt-ckpt"]
    for command in (["-m", "pretrained_models.download", NAME], [*train, NAME], [*train, str(folder / PATH)]):
        result = run(folder, hub.address, *command)
        assert_refused(result, "is not the file that was downloaded", "delete it and c2i_B_256.pt.json")
    (folder / PATH).unlink()
    assert download(folder, hub.address, NAME).returncode == 0


def test_what_the_hub_lists_is_what_must_come(hub, folder):
    hub.listed = "0" * 64
    assert_refused(download(folder, hub.address, NAME), "is not what the Hub lists")
    assert not [*(folder / PATH).parent.iterdir()]


def test_a_revision_is_pinned(hub, folder):
    assert download(folder, hub.address, NAME, "--revision", "v1").returncode == 0
    assert json.loads((folder / f"{PATH}.json").read_text())["revision"] == "b" * 40
    assert download(folder, hub.address, NAME, "--revision", "b" * 8).returncode == 0
    assert download(folder, hub.address, NAME, "--revision", "a" * 40).returncode == 0
    assert json.loads((folder / f"{PATH}.json").read_text())["revision"] == "a" * 40
    assert hub.ranges == [None]  # the same file in both
    hub.files[PATH] = CONTENT[::-1]
    assert download(folder, hub.address, NAME).returncode == 0 and hub.ranges == [None]
    assert download(folder, hub.address, NAME, "--revision", "main").returncode == 0
    assert (folder / PATH).read_bytes() == CONTENT[::-1]
    assert_refused(
        download(folder, hub.address, NAME, "--revision", "v2"), "there is no revision v2 of pytttttt/LlamaGen-NPP"
    )


def test_a_file_that_the_hub_does_not_have(hub, folder):
    assert_refused(
        download(folder, hub.address, "llamagen/c2i_XL_256"),
        "there is no file c2i_XL_256.pt in FoundationVision/LlamaGen",
    )


@pytest.mark.parametrize("env", [{}, {"HF_HUB_OFFLINE": "1"}, {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}])
def test_no_server(folder, env):
    """Nobody there, offline by choice, behind a proxy that does not answer: the address to fetch, and where to put it."""
    result = download(folder, "http://127.0.0.1:9", "vq_ds16_c2i", **env)
    url = "http://127.0.0.1:9/FoundationVision/LlamaGen/resolve/main/vq_ds16_c2i.pt"
    assert_refused(result, f"fetch {url} by hand and put it at {folder}/FoundationVision/LlamaGen/vq_ds16_c2i.pt")


def test_something_else_answers(hub, folder):
    """A login page of a network, say."""
    hub.answer = lambda self: (self.send_response(200), self.send_header("Content-Length", "0"), self.end_headers())
    assert_refused(download(folder, hub.address, NAME), "is not the Hub", "by hand and put it at")


def test_two_processes_fetch_a_file_once(hub, folder):
    hub.delay = 5  # so that both are at it
    code = "import sys; from pretrained_models.catalogue import find_weights; print(find_weights(sys.argv[1]))"
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(run(folder, hub.address, "-c", code, NAME))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.stdout.strip() for result in found] == [str(folder / PATH)] * 2, found
    assert len(hub.ranges) == 1


def test_any_file_of_the_hub_by_address(hub, folder):
    hub.files["user/repo/sub/x.pt"] = CONTENT
    code = "import sys; from pretrained_models.catalogue import find_weights; print(find_weights(sys.argv[1]))"
    result = run(folder, hub.address, "-c", code, "hf://user/repo@v1/sub/x.pt")
    assert result.stdout.strip() == str(folder / "user/repo/sub/x.pt"), result.stderr
    assert json.loads((folder / "user/repo/sub/x.pt.json").read_text())["revision"] == "b" * 40


def test_models_come_from_the_hub_by_the_name_of_their_repository(hub, folder, tmp_path):
    """What save_pretrained wrote, through GPT.from_pretrained("user/repo"), in several files."""
    config = gpt.preset("GPT-XXS", vocab_size=8, num_classes=2, block_size=4)
    model = fill_by_formula(GPT(config))
    checkpoint.save_folder(tmp_path, model.state_dict(), {"config": vars(config), "gpt_model": "GPT-XXS"}, shard="1MB")
    hub.files |= {f"user/repo/{path.name}": path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert len(hub.files) > 4
    code = """
import sys
from autoregressive.models.gpt import GPT
model = GPT.from_pretrained("user/repo@main")
print(model.about["gpt_model"], sum(p.detach().double().sum().item() for p in model.parameters()))
"""
    result = run(folder, hub.address, "-c", code)
    assert result.returncode == 0, result.stderr
    name, total = result.stdout.split()
    assert name == "GPT-XXS"
    assert float(total) == pytest.approx(sum(p.detach().double().sum().item() for p in model.parameters()))


def test_wrong_names(folder):
    assert_refused(download(folder, "", "c2i_B_512"), "there are no weights c2i_B_512; expected some of vq_ds16_c2i,")
    assert_refused(download(folder, ""), "no names given; expected some of")


def test_the_list_names_everything(folder):
    result = download(folder, "", "--list")
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["name", *CATALOGUE] and result.returncode == 0
