"""Archives of images: what is unpacked, and what is refused."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from dataset import archives
from dataset.archives import is_archive, unpack
from utils.cli import InputError

FILES = {"cats/a b.png": b"one", "cats/deep/ü.png": b"two" * 1000, "dogs/c.png": b""}


def make_zip(path: Path, files: dict[str, bytes] = FILES) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("cats") if hasattr(file, "mkdir") else None
        for name, content in files.items():
            file.writestr(name, content)
    return path


def add(
    file: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = ""
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), target
    file.addfile(info, io.BytesIO(content))


def make_tar(path: Path, files: dict[str, bytes] = FILES) -> Path:
    mode = {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as file:
        for name, content in files.items():
            add(file, name, content)
    return path


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "A.TXZ"])
def test_what_is_unpacked_once(tmp_path, name):
    make = make_zip if name.endswith("zip") else make_tar
    archive = make(tmp_path / name)
    assert is_archive(archive)
    folder = unpack(archive, tmp_path / "run" / "unpacked")
    assert held(folder) == FILES
    (folder / "dogs" / "c.png").write_bytes(b"untouched")
    assert (unpack(archive, folder) / "dogs" / "c.png").read_bytes() == b"untouched"
    make(archive, {"other.png": b"x" * 50_000})
    with pytest.raises(InputError, match="unpacked from another archive"):
        unpack(archive, folder)


@pytest.mark.parametrize("name", ["../out.png", "/tmp/out.png", "a/../../out.png", "..\\out.png", "C:/out.png"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_member_that_leaves_the_folder_refuses_the_archive(tmp_path, name, make):
    archive = make(tmp_path / ("a.zip" if make is make_zip else "a.tar"), {"good.png": b"1", name: b"2"})
    with pytest.raises(InputError, match="would be written outside"):
        unpack(archive, tmp_path / "run" / "unpacked")
    assert not list(tmp_path.rglob("*.png")) and not Path("/tmp/out.png").exists()


def test_links_and_devices_are_left_out(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        add(file, "link.png", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add(file, "hard.png", kind=tarfile.LNKTYPE, target="../../x")
        add(file, "pipe", kind=tarfile.FIFOTYPE)
        add(file, "a.png", b"1")
    assert held(unpack(tmp_path / "a.tar", tmp_path / "out")) == {"a.png": b"1"}
    assert "left out 3 links, devices or pipes" in capsys.readouterr().err


def test_what_is_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "SPARE", 1 << 60)
    with pytest.raises(InputError, match=r"unfolds to more than .* make room"):
        unpack(make_zip(tmp_path / "a.zip"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_damaged_and_empty_archives_are_one_line(tmp_path, name):
    make = make_zip if name.endswith("zip") else make_tar
    archive = make(tmp_path / name, {f"{i}.png": bytes([i]) * 3000 for i in range(20)})
    whole = archive.read_bytes()
    for content in (b"", b"no archive at all", whole[: len(whole) // 2], whole[:40]):
        archive.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged|no files"):
            unpack(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    make(archive, {})
    with pytest.raises(InputError, match="holds no files"):
        unpack(archive, tmp_path / "out")
