"""Files appear whole or not at all."""

import errno
import fcntl
import hashlib
import json
import threading

import pytest

from utils.cli import InputError
from utils.files import atomic_path, file_lock, hold, sha256, write_json


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "new" / "deep" / "file.npz"
    with atomic_path(path) as temporary:
        temporary.write_text("content")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, path.suffix)  # one rename; numpy adds no suffix
    assert [p.name for p in path.parent.iterdir()] == ["file.npz"]
    assert path.read_text() == "content"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_before_anything_was_written_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), atomic_path(tmp_path / "file.txt"):
        raise RuntimeError("mine")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_names_the_file(tmp_path):
    path = tmp_path / "file.txt"
    for name in ((), (str(tmp_path / ".other"),)):
        with pytest.raises(OSError) as caught, atomic_path(path):
            raise OSError(errno.ENOSPC, "No space left on device", *name)
        assert caught.value.filename == (name[0] if name else str(path))
    with pytest.raises(OSError) as caught, atomic_path(path) as temporary:
        temporary.mkdir()
        temporary.write_text("x")
    assert caught.value.filename == str(path)


def test_what_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"finished": False})
    with pytest.raises(TypeError):
        write_json(path, {"finished": object()})
    assert json.loads(path.read_text()) == {"finished": False}


def test_sha256_of_more_than_one_block(tmp_path):
    data = b"0123456789abcdef" * 70_000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_sha256_of_a_folder_is_that_of_names_and_contents(tmp_path):
    for name, files in (
        ("a", {"x": b"1", "sub/y": b"2"}),
        ("b", {"sub/y": b"2", "x": b"1"}),
        ("c", {"x": b"1", "y": b"2"}),
    ):
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
    a, b, c = (sha256(tmp_path / name) for name in "abc")
    assert a == b != c
    (tmp_path / "b" / "x").write_bytes(b"3")
    assert sha256(tmp_path / "b") != a


def test_one_waits_for_what_another_makes_but_not_for_ever(tmp_path, monkeypatch, capsys):
    path, order, waiting = tmp_path / "made", [], threading.Event()
    monkeypatch.setattr("utils.files.time.sleep", lambda seconds: waiting.set())

    def wait() -> None:
        with file_lock(path, wait=True):
            order.append("second")

    second = threading.Thread(target=wait)
    with file_lock(path):
        second.start()
        assert waiting.wait(60)
        order.append("first")
    second.join(60)
    assert order == ["first", "second"]
    err = capsys.readouterr().err
    assert err.count("made is being made by process") == 1 and "waiting for it" in err
    monkeypatch.setattr("utils.files.LONGEST_WAIT", -1)
    with file_lock(path), pytest.raises(InputError, match="made is in use by process"), file_lock(path, wait=True):
        pass


def test_a_lock_file_that_its_last_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def removed_first(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr("utils.files.fcntl.flock", removed_first)
    with hold(path, "it"):
        assert len(calls) == 2 and path.is_file()
        with pytest.raises(InputError, match="it is in use by process"):
            hold(path, "it")
