"""pack, unpack and the packed copies of published folders: bit for bit, cut off and resumed, every refusal in one line."""

import resource
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.codes import Codes, Place, Writer, repack
from dataset.codes.folders import Packed, open_folder
from dataset.codes.repack import packed_form
from dataset.codes.toy import files, unfinish, write_codes
from utils.cli import InputError
from utils.files import file_lock


def published(root: Path, **more) -> tuple[np.ndarray, np.ndarray]:
    """Codes in the published layout, without a manifest."""
    written = write_codes(root, "per-image", **more)
    (root / "toy32.json").unlink()
    return written


def convert(source: Path, target: Path, layout: str, *options: int | None) -> bool:
    folder = open_folder(Place(source, "toy", 32))
    writer = Writer(Place(target, "toy", 32), repack.repacked(folder, layout, *options))
    return repack.repack([folder], writer, show=False)


@contextmanager
def limited(kind: int, value: int):
    """A soft limit of this process, in the block."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 11), st.integers(1, 11), st.integers(1, 3), st.sampled_from([200, 512, 70000]),
    st.sets(st.integers(1, 29)),
)  # fmt: skip
def test_there_and_back_is_bit_for_bit(tmp_path_factory, images, shard_size, other_size, views, codebook, skipped):
    root = tmp_path_factory.mktemp("codes")
    skipped = sorted(i for i in skipped if i < images)
    more = {"images": images, "views": views, "codebook": codebook, "vq_model": "VQ-16", "crop_range": 1.1}
    write_codes(root / "a", shard_size=shard_size, skipped=skipped, **more)
    write_codes(root / "b", "per-image", shard_size=shard_size, skipped=skipped, **more)
    assert convert(root / "a", root / "unpacked", "per-image")
    assert files(root / "unpacked") == files(root / "b")
    convert(root / "unpacked", root / "packed", "packed")
    assert files(root / "packed") == files(root / "a")
    convert(root / "a", root / "other", "packed", other_size)  # packed to packed, in shards of another size
    convert(root / "other", root / "again", "packed", shard_size)
    assert files(root / "again") == files(root / "a")


def test_published_codes_are_packed(tmp_path):
    """Without a manifest: the numbers of the arrays, the published codebook unless told, no names."""
    codes, labels = published(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "packed", 10)
    packed = Codes(tmp_path / "b", "toy", 32)
    m = packed.manifest
    assert (m.images, m.views, m.tokens, m.codebook_size, m.classes, m.shards) == (23, 2, 16, 16384, [], 3)
    assert np.load(tmp_path / "b" / "toy32_codes" / "00002.npy").dtype == np.uint16
    assert np.array_equal(packed.batch(np.arange(23), np.ones(23, int))[0], codes[:, 1])
    assert np.array_equal(packed.labels, labels)
    convert(tmp_path / "a", tmp_path / "c", "packed", None, 512)
    assert Codes(tmp_path / "c", "toy", 32).manifest.codebook_size == 512


def dies_at(monkeypatch, folder: str, name: str) -> None:
    """The process is killed when it saves this file."""
    write = Path.write_bytes

    def dies(path, content):
        if path.parent.name == folder and path.name.startswith(f".{name}."):
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", dies)


def test_killed_in_the_middle_and_run_again(tmp_path, monkeypatch, layout):
    write_codes(tmp_path / "source", "per-image" if layout == "packed" else "packed")
    convert(tmp_path / "source", tmp_path / "whole", layout)
    cut = tmp_path / "cut"
    begun = ["00000", "00001"] if layout == "packed" else [str(i) for i in range(11)]
    dies_at(monkeypatch, "toy32_labels", begun[-1])
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", cut, layout)
    monkeypatch.undo()
    assert files(cut).keys() == {
        "toy32.unfinished.json", "toy32.unfinished/00000.json",
        *(f"toy32_codes/{name}.npy" for name in begun), *(f"toy32_labels/{name}.npy" for name in begun[:-1]),
    }  # fmt: skip
    kept = {path: path.stat().st_mtime_ns for path in cut.rglob("*0.npy") if path.name in ("00000.npy", "0.npy")}
    with pytest.raises(InputError, match="unfinished"):
        Codes(cut, "toy", 32)
    assert convert(tmp_path / "source", cut, layout)
    assert files(cut) == files(tmp_path / "whole")
    assert len(kept) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())  # a finished shard is not written again
    assert not convert(tmp_path / "source", cut, layout)


def test_an_altered_shard_is_written_again_and_an_altered_source_is_caught(tmp_path):
    write_codes(tmp_path / "source", "per-image")
    convert(tmp_path / "source", tmp_path / "b", "packed")
    whole = files(tmp_path / "b")
    unfinish(tmp_path / "b")
    path = tmp_path / "b" / "toy32_codes" / "00001.npy"
    array = np.load(path)
    array[3, 1, 5] ^= 1
    np.save(path, array)
    assert convert(tmp_path / "source", tmp_path / "b", "packed")
    assert files(tmp_path / "b") == whole
    unfinish(tmp_path / "b")
    np.save(tmp_path / "source" / "toy32_codes" / "13.npy", array[3:4].astype(np.int64))
    with pytest.raises(InputError, match=r"shard 1 of .* differs from its source"):
        convert(tmp_path / "source", tmp_path / "b", "packed")
    assert not (tmp_path / "b" / "toy32.json").exists()


def test_a_bad_code_or_label_names_its_file(tmp_path):
    write_codes(tmp_path / "a", "per-image", codebook=512)
    with pytest.raises(InputError, match=r"--codebook-size 100: the manifest .* says 512"):
        convert(tmp_path / "a", tmp_path / "b", "packed", None, 100)
    for name, array, message in (
        ("toy32_codes/4.npy", np.full((1, 2, 16), 512), r"4.npy: code 512 of image 4 is outside the codebook of 512"),
        ("toy32_codes/4.npy", np.full((1, 2, 16), -1), "code -1 of image 4"),
        ("toy32_labels/12.npy", np.array([-3]), "image 12 has label -3"),
    ):
        good = (tmp_path / "a" / name).read_bytes()
        np.save(tmp_path / "a" / name, array)
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "a", tmp_path / "b", "packed")
        (tmp_path / "a" / name).write_bytes(good)
        assert "labels" in name or not (tmp_path / "b").exists()  # what is wrong with the first shard leaves nothing


def test_the_commands(tmp_path, command, monkeypatch):
    write_codes(tmp_path / "a", "per-image")
    with file_lock(tmp_path / "b" / "toy32.json"):
        status, _, (error,) = command("pack", tmp_path / "a", tmp_path / "b")
    assert status == 2 and "toy32.json is in use by process" in error
    free = shutil.disk_usage(tmp_path)._replace(free=1_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        status, _, (error,) = command("pack", tmp_path / "a", tmp_path / "b")
    assert status == 2 and "and its disk has 0.00 MB free" in error and not files(tmp_path / "b")
    pack = ("pack", tmp_path / "a", tmp_path / "b", "--shard-size", 10)
    with limited(resource.RLIMIT_FSIZE, 700):  # a full disk leaves no half file
        status, _, (error,) = command(*pack)
    assert status == 2 and "00000.npy: File too large" in error
    assert sorted(files(tmp_path / "b")) == ["toy32.unfinished.json"]
    status, out, _ = command(*pack)
    assert status == 0 and "23 images, 2 views of 16 codes" in out
    assert "is complete already" in command(*pack)[1]
    assert command("unpack", tmp_path / "b", tmp_path / "c")[0] == 0
    assert files(tmp_path / "c") == files(tmp_path / "a")


def test_wrong_command_lines_are_one_line(tmp_path, command):
    write_codes(tmp_path / "a", "per-image")
    write_codes(tmp_path / "a", "per-image", size=64)
    (tmp_path / "a" / "toy64_codes" / "9.npy").write_bytes(b"")
    (tmp_path / "file").touch()
    pack = ("pack", tmp_path / "a", tmp_path / "b")
    for line, message in (
        (pack, "choose one by --dataset toy --image-size 32 or --dataset toy --image-size 64"),
        ((*pack, "--image-size", 16), "has no {dataset}16_codes: there is toy32, toy64"),
        (("pack", tmp_path / "none", tmp_path / "b"), "there is no folder"),
        (("pack", tmp_path / "a", tmp_path / "file"), "file is no folder"),
        (("pack", tmp_path / "a"), "dst (see python -m dataset.codes pack --help)"),
        ((*pack, "--shard-size", 0), "argument --shard-size: expected a whole number from 1 to 2**31 - 1, got 0"),
        ((*pack, "--image-size", 64), "9.npy is truncated or damaged"),
        (("pack",), "src, dst"),
        (("packs",), "expected pack, unpack, merge or check, got 'packs'"),
        ((), "expected pack, unpack, merge or check"),
    ):
        status, _, (error,) = command(*line)
        assert status == 2 and message in error
    assert not (tmp_path / "b").exists()
    assert "resume where they were cut off" in command("--help")[1]


def test_a_published_folder_is_packed_once_and_again_when_it_changes(tmp_path, capfd):
    codes, labels = published(tmp_path)
    opened = Codes(tmp_path, "toy", 32)
    assert opened.manifest is None and "toy32_packed" in opened.hint
    assert np.array_equal(opened.batch(np.arange(23), np.ones(23, int))[0], codes[:, 1])
    assert np.array_equal(opened.labels, labels)
    said = capfd.readouterr().err
    assert said.count("packing it into") == 1 and "missing" not in said
    copy = files(tmp_path / "toy32_packed")
    assert opened.fingerprint() == Codes(tmp_path, "toy", 32).fingerprint()
    assert np.array_equal(
        Codes(tmp_path / "toy32_packed", "toy", 32).labels, labels
    )  # a folder of codes like any other
    assert "packing" not in capfd.readouterr().err and files(tmp_path / "toy32_packed") == copy

    codes[4] += 1
    np.save(tmp_path / "toy32_codes" / "4.npy", codes[4:5])
    assert np.array_equal(Codes(tmp_path, "toy", 32).batch([4])[0], codes[4:5, 0])
    assert "packing it into" in capfd.readouterr().err
    path = tmp_path / "toy32_packed" / "toy32_codes" / "00000.npy"
    path.write_bytes(path.read_bytes()[:-7])
    assert np.array_equal(Codes(tmp_path, "toy", 32).batch(np.arange(23))[0], codes[:, 0])  # a damaged copy is mended


def test_a_killed_packing_is_resumed_and_wide_codes_take_32_bits(tmp_path, monkeypatch):
    codes, _ = published(tmp_path, images=50)
    dies_at(monkeypatch, "toy32_labels", "00000")
    with pytest.raises(KeyboardInterrupt):
        Codes(tmp_path, "toy", 32).batch([0])
    monkeypatch.undo()
    assert np.array_equal(Codes(tmp_path, "toy", 32).batch(np.arange(50))[0], codes[:, 0])
    codes[33, 0, 5] = 262143  # of a lookup-free tokenizer
    np.save(tmp_path / "toy32_codes" / "33.npy", codes[33:34])
    assert np.array_equal(Codes(tmp_path, "toy", 32).batch(np.arange(50))[0], codes[:, 0])
    np.save(tmp_path / "toy32_codes" / "33.npy", -codes[33:34])
    with pytest.raises(InputError, match=r"33.npy: code -\d+ of image 33"):
        Codes(tmp_path, "toy", 32).batch([0])


def test_where_nothing_can_be_written_the_copy_lies_in_the_cache(tmp_path, monkeypatch):
    codes, _ = published(tmp_path / "codes")
    access = repack.os.access
    monkeypatch.setattr(repack.os, "access", lambda path, mode: "codes" not in Path(path).parts and access(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = files(tmp_path / "codes")
    assert np.array_equal(Codes(tmp_path / "codes", "toy", 32).batch(np.arange(23))[0], codes[:, 0])
    assert files(tmp_path / "codes") == before and files(tmp_path / "cache")


def test_processes_wait_for_the_one_that_packs(tmp_path, capfd):
    codes, _ = published(tmp_path)
    opened: list[Packed] = []
    source = partial(open_folder, Place(tmp_path, "toy", 32))
    with file_lock(tmp_path / "toy32_packed" / "toy32.json"):
        threads = [threading.Thread(target=lambda: opened.append(packed_form(source()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        assert not opened
    for thread in threads:
        thread.join(30)
    assert [np.array_equal(one.read(range(23))[0], codes) for one in opened] == [True] * 3
    err = capfd.readouterr().err
    assert err.count("waiting for it") >= 3 and err.count("packing it into") == 1


@pytest.mark.parametrize(("name", "layout"), [("pack", "per-image"), ("unpack", "packed")])
def test_codes_are_not_converted_in_place(tmp_path, command, name, layout):
    """The advice for a folder of other settings, to delete it, would be to delete the source."""
    write_codes(tmp_path / "codes", layout)
    before = files(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "codes")
    for target in ("codes", "link", "codes/../codes"):
        status, _, (error,) = command(name, tmp_path / "codes", tmp_path / target)
        assert status == 2 and "are the same folder: give another one to write to" in error
    (tmp_path / "link").unlink()
    assert files(tmp_path) == before


def test_a_code_that_needs_32_bits_may_come_late(tmp_path):
    """Shards that were packed with 16 bits before it are packed again."""
    codes, _ = published(tmp_path)
    late = np.load(tmp_path / "toy32_codes" / "22.npy")
    late[..., 0] = 70_000
    np.save(tmp_path / "toy32_codes" / "22.npy", late)
    batch = Codes(tmp_path, "toy", 32).batch(np.arange(23))[0]
    assert np.array_equal(batch[:22], codes[:22, 0]) and batch[22, 0] == 70_000
