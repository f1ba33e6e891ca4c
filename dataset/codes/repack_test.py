"""pack and unpack: bit for bit there and back, cut off and continued, and every refusal in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.codes import Codes, Place, Writer
from dataset.codes.reader import open_folder
from dataset.codes.repack import repack, repacked
from dataset.codes.toy import files, unfinish, write_codes
from utils.cli import InputError
from utils.testing import assert_refused


def convert(
    source: Path, target: Path, layout: str, shard_size: int | None = None, codebook: int | None = None
) -> bool:
    folder = open_folder(Place(source, "toy", 32))
    return repack(folder, Writer(Place(target, "toy", 32), repacked(folder, layout, shard_size, codebook)), show=False)


def command(*arguments: str | Path, limit: int | None = None) -> subprocess.CompletedProcess:
    """`python -m dataset.codes ...`; limit: kilobytes that a file may have."""
    line = [sys.executable, "-m", "dataset.codes", *map(str, arguments)]
    if limit is not None:
        line = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *line]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 11), st.integers(1, 11), st.integers(1, 3), st.sampled_from([200, 512, 70000])
)
def test_there_and_back_is_bit_for_bit(tmp_path_factory, images, shard_size, other_size, views, codebook):
    root = tmp_path_factory.mktemp("codes")
    settings = {"images": images, "views": views, "codebook": codebook, "vq_model": "VQ-16", "crop_range": 1.1}
    write_codes(root / "a", shard_size=shard_size, **settings)
    write_codes(root / "b", "per-image", shard_size=shard_size, **settings)
    assert convert(root / "a", root / "unpacked", "per-image")
    assert files(root / "unpacked") == files(root / "b")
    convert(root / "unpacked", root / "packed", "packed")
    assert files(root / "packed") == files(root / "a")
    convert(root / "a", root / "other", "packed", other_size)  # packed to packed, in shards of another size
    convert(root / "other", root / "again", "packed", shard_size)
    assert files(root / "again") == files(root / "a")


def test_skipped_images_stay_skipped_there_and_back(tmp_path):
    gaps = [0, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 22]
    for name, layout in (("a", "packed"), ("b", "per-image")):
        write_codes(tmp_path / name, layout, skipped=gaps)
    convert(tmp_path / "a", tmp_path / "unpacked", "per-image")
    assert files(tmp_path / "unpacked") == files(tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "packed", "packed")
    assert files(tmp_path / "packed") == files(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "other", "packed", 4)
    convert(tmp_path / "other", tmp_path / "again", "packed", 10)
    assert files(tmp_path / "again") == files(tmp_path / "a")


def test_published_codes_are_packed(tmp_path):
    """Without a manifest: the numbers of the arrays, the published codebook unless told, no names."""
    codes, labels = write_codes(tmp_path / "a", "per-image", images=23)
    (tmp_path / "a" / "toy32.json").unlink()
    convert(tmp_path / "a", tmp_path / "b", "packed", 10)
    packed = Codes(tmp_path / "b", "toy", 32)
    m = packed.manifest
    assert (m.images, m.views, m.tokens, m.codebook_size, m.classes, m.shards) == (23, 2, 16, 16384, [], 3)
    assert np.load(tmp_path / "b" / "toy32_codes" / "00002.npy").dtype == np.uint16
    assert np.array_equal(packed.batch(np.arange(23), np.ones(23, int))[0], codes[:, 1])
    assert np.array_equal(packed.labels, labels)
    convert(tmp_path / "a", tmp_path / "c", "packed", codebook=512)
    assert Codes(tmp_path / "c", "toy", 32).manifest.codebook_size == 512


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_cut_off_and_continued_is_the_same(tmp_path, layout):
    other = {"packed": "per-image", "per-image": "packed"}[layout]
    write_codes(tmp_path / "source", other)
    convert(tmp_path / "source", tmp_path / "whole", layout)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = tmp_path / "cut"
    unfinish(cut)
    lost = ["toy32_labels/00001.npy", "toy32_codes/00002.npy"] if layout == "packed" else ["toy32_labels/15.npy"]
    for name in lost:
        (cut / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in cut.rglob("*0.npy")}
    with pytest.raises(InputError, match="unfinished"):
        Codes(cut, "toy", 32)
    assert convert(tmp_path / "source", cut, layout)
    assert files(cut) == files(tmp_path / "whole")
    first = [path for path in kept if path.name in ("00000.npy", "0.npy")]
    assert len(first) == 2
    assert all(path.stat().st_mtime_ns == kept[path] for path in first)  # a finished shard is not written again
    assert not convert(tmp_path / "source", cut, layout)


def test_killed_in_the_middle_and_run_again(tmp_path, monkeypatch):
    write_codes(tmp_path / "source", "per-image")
    convert(tmp_path / "source", tmp_path / "whole", "packed")
    save = np.save

    def dies(path, array):
        if Path(path).parent.name == "toy32_labels" and "00001" in str(path):
            raise KeyboardInterrupt
        save(path, array)

    monkeypatch.setattr(np, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "cut", "packed")
    monkeypatch.undo()
    assert sorted(files(tmp_path / "cut")) == [
        "toy32.unfinished.json", "toy32.unfinished/00000.json",
        "toy32_codes/00000.npy", "toy32_codes/00001.npy", "toy32_labels/00000.npy",
    ]  # fmt: skip
    assert convert(tmp_path / "source", tmp_path / "cut", "packed")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


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


def test_other_settings_or_foreign_files_are_not_mixed_in(tmp_path):
    write_codes(tmp_path / "a", "per-image")
    convert(tmp_path / "a", tmp_path / "b", "packed")
    with pytest.raises(InputError, match=r"other settings \(shard_size 10, now 5\)"):
        convert(tmp_path / "a", tmp_path / "b", "packed", 5)
    with pytest.raises(InputError, match="holds files of something else"):  # itself
        Place(tmp_path / "a", "toy", 32).manifest.unlink()
        convert(tmp_path / "a", tmp_path / "a", "packed")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with pytest.raises(InputError, match="holds files of something else"):
        convert(tmp_path / "a", tmp_path / "c", "packed")


def test_a_bad_code_or_label_names_its_file(tmp_path):
    write_codes(tmp_path / "a", "per-image", codebook=512)
    np.save(tmp_path / "a" / "toy32_codes" / "4.npy", np.full((1, 2, 16), 512))
    with pytest.raises(InputError, match=r"4.npy: code 512 of image 4 is outside the codebook of 512"):
        convert(tmp_path / "a", tmp_path / "b", "packed")
    assert not (tmp_path / "b").exists()
    with pytest.raises(InputError, match=r"--codebook-size 100: the manifest .* says 512"):
        convert(tmp_path / "a", tmp_path / "b", "packed", codebook=100)
    np.save(tmp_path / "a" / "toy32_codes" / "4.npy", np.full((1, 2, 16), -1))
    with pytest.raises(InputError, match="code -1 of image 4"):
        convert(tmp_path / "a", tmp_path / "b", "packed")
    np.save(tmp_path / "a" / "toy32_codes" / "4.npy", np.zeros((1, 2, 16), int))
    np.save(tmp_path / "a" / "toy32_labels" / "12.npy", np.array([-3]))
    with pytest.raises(InputError, match="image 12 has label -3"):
        convert(tmp_path / "a", tmp_path / "b", "packed")


def test_too_small_a_disk_is_seen_before_work_starts(tmp_path, monkeypatch):
    write_codes(tmp_path / "a", "per-image", images=50, tokens=64)
    free = shutil.disk_usage(tmp_path)._replace(free=12_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(InputError, match=r"and its disk has 0\.0 GB free"):
        convert(tmp_path / "a", tmp_path / "b", "packed")
    assert not (tmp_path / "b").exists()


def test_the_commands(tmp_path):
    write_codes(tmp_path / "a", "per-image")
    packed = command("pack", tmp_path / "a", tmp_path / "b", "--shard-size", "7")
    assert packed.returncode == 0, packed.stderr
    assert "23 images, 2 views of 16 codes" in packed.stdout
    unpacked = command("unpack", tmp_path / "b", tmp_path / "c")
    assert unpacked.returncode == 0, unpacked.stderr
    same = {name: content for name, content in files(tmp_path / "a").items() if name.endswith("npy")}
    assert same == {name: content for name, content in files(tmp_path / "c").items() if name.endswith("npy")}
    assert "is complete already" in command("pack", tmp_path / "a", tmp_path / "b", "--shard-size", "7").stdout


@pytest.mark.skipif(os.name != "posix", reason="limits the size of a file by the shell")
def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    write_codes(tmp_path / "a", "per-image", images=100, tokens=64, shard_size=50)
    result = command("pack", tmp_path / "a", tmp_path / "b", limit=8)
    assert_refused(result, "cannot write", "00000.npy")
    assert sorted(files(tmp_path / "b")) == ["toy32.unfinished.json"]
    assert command("pack", tmp_path / "a", tmp_path / "b").returncode == 0


def test_wrong_command_lines_are_one_line(tmp_path):
    write_codes(tmp_path / "a", "per-image")
    write_codes(tmp_path / "a", "per-image", size=64)
    assert_refused(
        command("pack", tmp_path / "a", tmp_path / "b"), "--dataset toy --image-size 32, --dataset toy --image-size 64"
    )
    assert_refused(
        command("pack", tmp_path / "a", tmp_path / "b", "--image-size", "16"), "has no {dataset}16_codes", "toy"
    )
    assert_refused(command("pack", tmp_path / "none", tmp_path / "b"), "there is no folder")
    assert_refused(command("pack", tmp_path / "a"), "dst", "python -m dataset.codes pack --help")
    assert_refused(command("pack", tmp_path / "a", tmp_path / "b", "--shard-size", "0"), "at least 1")
    (tmp_path / "a" / "toy64_codes" / "9.npy").write_bytes(b"")
    assert_refused(command("pack", tmp_path / "a", tmp_path / "b", "--image-size", "64"), "9.npy", "damaged")
    assert not (tmp_path / "b").exists()
