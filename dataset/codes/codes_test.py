"""Codes: round trips of both layouts, several folders as one, and every way a folder can be wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.codes import Codes, Manifest, Place, Writer, reader
from dataset.codes.toy import unfinish, write_codes
from utils.cli import InputError


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_round_trip(tmp_path, layout):
    codes, labels = write_codes(tmp_path, layout)
    read = Codes(tmp_path, "toy", 32)
    assert (len(read), read.views, read.tokens) == (23, 2, 16)
    indices, views = np.array([22, 0, 9, 10, 0]), np.array([1, 0, 1, 0, 1])
    got, got_labels = read.batch(indices, views)
    assert got.dtype == np.int64
    assert np.array_equal(got, codes[indices, views])
    assert np.array_equal(got_labels, labels[indices])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 11), st.integers(1, 3), st.integers(2, 70000))
def test_round_trip_of_any_shape(tmp_path_factory, images, shard_size, views, codebook):
    root = tmp_path_factory.mktemp("codes")
    codes, _ = write_codes(root, images=images, shard_size=shard_size, views=views, codebook=codebook)
    got, _ = Codes(root, "toy", 32).batch(np.arange(images), np.full(images, views - 1))
    assert np.array_equal(got, codes[:, -1])


def test_packed_codes_take_the_smallest_type(tmp_path):
    for codebook, dtype in ((256, np.uint8), (257, np.uint16), (16384, np.uint16), (65537, np.uint32)):
        write_codes(tmp_path / str(codebook), codebook=codebook)
        assert np.load(tmp_path / str(codebook) / "toy32_codes" / "00000.npy").dtype == dtype


def test_per_image_files_are_the_published_ones(tmp_path):
    """`{i}.npy` of (1, views, tokens) int64 and (1,) int64, and they are read without a manifest."""
    codes, labels = write_codes(tmp_path, "per-image")
    one, label = np.load(tmp_path / "toy32_codes" / "7.npy"), np.load(tmp_path / "toy32_labels" / "7.npy")
    assert (one.dtype, one.shape, label.dtype, label.shape) == (np.int64, (1, 2, 16), np.int64, (1,))
    (tmp_path / "toy32.json").unlink()
    got, got_labels = Codes(tmp_path, "toy", 32).batch(np.arange(23))
    assert np.array_equal(got, codes[:, 0])
    assert np.array_equal(got_labels, labels)


def test_trap_views_are_read_from_the_arrays_not_from_names(tmp_path):
    write_codes(tmp_path / "ten_crop_flip", "per-image", views=3)
    (tmp_path / "ten_crop_flip" / "toy32.json").unlink()
    assert Codes(tmp_path / "ten_crop_flip", "toy", 32).views == 3


def test_trap_another_size_says_which_sizes_are_there(tmp_path):
    """The published README extracts at 384 and trains at 256."""
    write_codes(tmp_path, size=384)
    with pytest.raises(InputError, match=r"has no toy256_codes: there is toy384\..*--image-size"):
        Codes(tmp_path, "toy", 256)
    with pytest.raises(InputError, match="there is no folder"):
        Codes(tmp_path / "nowhere", "toy", 256)


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_a_truncated_file_is_named(tmp_path, layout):
    write_codes(tmp_path, layout)
    path = tmp_path / "toy32_codes" / ("00001.npy" if layout == "packed" else "11.npy")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=f"{path.name} is truncated or damaged"):
        Codes(tmp_path, "toy", 32)


def test_a_missing_file_of_the_published_layout_is_named(tmp_path):
    for folder in ("toy32_labels", "toy32_codes"):
        write_codes(tmp_path / folder, "per-image")
        (tmp_path / folder / folder / "12.npy").unlink()
        with pytest.raises(InputError, match=f"{folder}/12.npy is missing"):
            Codes(tmp_path / folder, "toy", 32)
    for folder in ("toy32_labels", "toy32_codes"):
        (tmp_path / "toy32_codes" / folder / "12.npy").unlink(missing_ok=True)
    with pytest.raises(InputError, match="holds 22 of 23 images"):
        Codes(tmp_path / "toy32_codes", "toy", 32)


def test_a_missing_shard_is_named(tmp_path):
    write_codes(tmp_path)
    (tmp_path / "toy32_labels" / "00002.npy").unlink()
    with pytest.raises(InputError, match=r"00002.npy is missing"):
        Codes(tmp_path, "toy", 32)


def test_an_unfinished_extraction_is_not_read(tmp_path):
    write_codes(tmp_path)
    (tmp_path / "toy32.json").rename(tmp_path / "toy32.unfinished.json")
    with pytest.raises(InputError, match="is unfinished"):
        Codes(tmp_path, "toy", 32)


def test_an_empty_folder_and_a_damaged_manifest(tmp_path):
    (tmp_path / "toy32_codes").mkdir()
    with pytest.raises(InputError, match="holds no codes"):
        Codes(tmp_path, "toy", 32)
    (tmp_path / "toy32.json").write_text("{")
    with pytest.raises(InputError, match="is not a manifest"):
        Codes(tmp_path, "toy", 32)
    (tmp_path / "toy32.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="has format 99"):
        Codes(tmp_path, "toy", 32)


def test_codes_of_other_settings_are_not_mixed(tmp_path):
    write_codes(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(views 2, now 10\)"):
        Writer(Place(tmp_path, "toy", 32), Manifest("toy", 32, 23, 10, 16, 512, "packed", 10, classes=["a", "b", "c"]))


def test_codes_that_are_no_whole_numbers_are_refused(tmp_path):
    write_codes(tmp_path, "per-image")
    for i in range(23):
        path = tmp_path / "toy32_codes" / f"{i}.npy"
        np.save(path, np.load(path).astype(np.float64) * np.nan)
    with pytest.raises(InputError, match=r"0.npy holds float64, 32 of its values not finite; expected whole numbers"):
        Codes(tmp_path, "toy", 32)


def test_a_file_of_another_type_is_named_when_it_is_read(tmp_path):
    """Of the same size as the others, so that opening the folder does not tell."""
    write_codes(tmp_path, "per-image")
    path = tmp_path / "toy32_codes" / "7.npy"
    np.save(path, np.load(path).astype(np.float64))
    codes = Codes(tmp_path, "toy", 32)
    codes.batch(np.array([6, 8]))
    with pytest.raises(InputError, match=r"7.npy is float64 .*, 0.npy is int64"):
        codes.batch(np.array([7]))


def test_files_with_another_header_are_read_right(tmp_path):
    """Fortran order and a longer header: what the fast path must leave to numpy."""
    codes, labels = write_codes(tmp_path, "per-image")
    for i in (0, 5):
        np.save(tmp_path / "toy32_codes" / f"{i}.npy", np.asfortranarray(codes[i : i + 1]))
    got, got_labels = Codes(tmp_path, "toy", 32).batch(np.arange(23), np.ones(23, int))
    assert np.array_equal(got, codes[:, 1])
    assert np.array_equal(got_labels, labels)


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_an_index_that_is_not_there_is_refused(tmp_path, layout):
    write_codes(tmp_path, layout)
    codes = Codes([tmp_path], "toy", 32)
    for indices, views, message in (
        ([23], [0], "image 23: there are 0 to 22"),
        ([-1], [0], "image -1"),
        ([0], [2], "view 2: there are 0 to 1"),
    ):
        with pytest.raises(IndexError, match=message):
            codes.batch(np.array(indices), np.array(views))
    with pytest.raises(ValueError, match="1 images, 2 views"):
        codes.batch(np.array([0]), np.array([0, 1]))
    assert codes.batch(np.array([], int))[0].shape == (0, 16)


@pytest.mark.parametrize("layouts", [("packed", "packed"), ("packed", "per-image"), ("per-image", "packed")])
def test_views_of_several_folders_are_counted_on(tmp_path, layouts):
    """Two crop ranges of the same images, the second folder without a manifest where it can do without."""
    a, labels = write_codes(tmp_path / "a", layouts[0], views=2, seed=1, crop_range=1.1)
    b, _ = write_codes(tmp_path / "b", layouts[1], views=3, seed=2, crop_range=1.05, shard_size=7)
    for root, layout in zip("ab", layouts, strict=True):
        if layout == "per-image":
            (tmp_path / root / "toy32.json").unlink()
    codes = Codes([tmp_path / "a", str(tmp_path / "b")], "toy", 32)
    assert (len(codes), codes.views, codes.tokens) == (23, 5, 16)
    assert codes.manifest is not None
    assert codes.manifest.crop_range == (1.1 if layouts[0] == "packed" else 1.05)
    assert bool(codes.hint) == ("per-image" in layouts)
    expected = np.concatenate((a, b), axis=1)
    indices, views = np.repeat(np.arange(23), 5), np.tile(np.arange(5), 23)
    order = np.random.default_rng(0).permutation(len(indices))
    got, got_labels = codes.batch(indices[order], views[order])
    assert got.dtype == np.int64
    assert np.array_equal(got, expected[indices[order], views[order]])
    assert np.array_equal(got_labels, labels[indices[order]])
    assert np.array_equal(codes.batch(np.arange(23))[0], a[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 22}, "images 23 and 22"),
        ({"tokens": 64}, "tokens an image 16 and 64"),
        ({"codebook": 256}, "codebook size 512 and 256"),
        ({"tokenizer_sha256": "f00"}, "tokenizer sha256 beef and f00"),
        ({"classes": ["a", "b", "d"]}, "classes .*'c'. and .*'d'."),
        ({"labels": np.zeros(23, int)}, "labels differ, the first of image 0: 2 and 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_folders_of_other_images_or_tokenizers_are_refused(tmp_path, change, message, layout):
    write_codes(tmp_path / "a", tokenizer_sha256="beef")
    write_codes(tmp_path / "b", seed=1, tokenizer_sha256="beef")
    write_codes(tmp_path / "c", layout, **{"tokenizer_sha256": "beef", **change})
    roots = [tmp_path / name for name in "abc"]
    assert Codes(roots[:2], "toy", 32).views == 4
    with pytest.raises(InputError, match=rf"a/toy32_codes and .*c/toy32_codes are not of the same images.*{message}"):
        Codes(roots, "toy", 32)


def test_a_folder_given_twice_or_none_is_refused(tmp_path):
    write_codes(tmp_path)
    with pytest.raises(InputError, match="is given twice"):
        Codes([tmp_path, tmp_path / "toy32_codes" / ".."], "toy", 32)
    with pytest.raises(InputError, match="got none"):
        Codes([], "toy", 32)


def test_the_hint_is_a_command_that_works(tmp_path):
    codes, _ = write_codes(tmp_path / "codes", "per-image")
    hint = Codes(tmp_path / "codes", "toy", 32).hint
    command = hint.split("pack it once: ")[1].split()
    assert command[:3] == ["python", "-m", "dataset.codes"]
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    packed = Codes(command[-1], "toy", 32)
    assert packed.hint == ""
    assert np.array_equal(packed.batch(np.arange(23))[0], codes[:, 0])


def test_a_manifest_of_nothing_is_refused(tmp_path):
    write_codes(tmp_path)
    manifest = json.loads((tmp_path / "toy32.json").read_text())
    (tmp_path / "toy32.json").write_text(json.dumps({**manifest, "images": 0}))
    with pytest.raises(InputError, match="is of no codes"):
        Codes(tmp_path, "toy", 32)


def test_too_many_shards_to_open_say_what_to_do(tmp_path):
    """A mapped shard is an open file."""
    write_codes(tmp_path, images=100, shard_size=1)
    line = f"ulimit -n 60; exec {sys.executable} -m dataset.codes check {tmp_path}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "cannot be read (Too many open files); raise `ulimit -n`, or pack" in result.stderr
    assert "delete" not in result.stderr


def test_many_files_are_read_by_threads_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MANY", 8)
    codes, labels = write_codes(tmp_path, "per-image", images=103, shard_size=103)
    folder = Codes(tmp_path, "toy", 32).folders[0]
    assert np.array_equal(folder.read(range(5, 102)), codes[5:102])
    assert np.array_equal(folder.labels, labels)
    (tmp_path / "toy32_codes" / "90.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"90.npy is truncated or damaged"):
        folder.read(range(103))


GAPS = [0, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 22]  # of 23 in shards of 10: the second shard is empty


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_skipped_images_keep_their_numbers_and_shift_no_label(tmp_path, layout):
    codes, labels = write_codes(tmp_path, layout, skipped=GAPS)
    read = Codes(tmp_path, "toy", 32)
    kept = np.delete(np.arange(23), GAPS)
    assert (len(read), read.manifest.images) == (10, 23)
    assert [row["image"] for row in read.manifest.skipped] == GAPS
    assert np.array_equal(read.folders[0].numbers, kept)
    got, got_labels = read.batch(np.arange(10), np.ones(10, int))
    assert np.array_equal(got, codes[kept, 1])
    assert np.array_equal(got_labels, labels[kept])
    assert np.array_equal(read.folders[0].read(range(2, 10)), codes[kept[2:]])
    if layout == "per-image":
        assert sorted(int(p.stem) for p in (tmp_path / "toy32_codes").iterdir()) == kept.tolist()


def test_folders_that_skipped_other_images_are_refused(tmp_path):
    labels = np.zeros(23, int)
    for name, gap in (("a", 3), ("b", 4), ("c", 3)):
        write_codes(tmp_path / name, labels=labels, skipped=[gap])
    assert Codes([tmp_path / "a", tmp_path / "c"], "toy", 32).views == 4
    with pytest.raises(InputError, match=r"skipped images \[3\] and \[4\]"):
        Codes([tmp_path / "a", tmp_path / "b"], "toy", 32)


def as_format_1(path) -> None:
    values = json.loads(path.read_text())
    for key in ("precision", "paths_sha256", "skipped", "shards_sha256"):
        values.pop(key)
    path.write_text(json.dumps({**values, "format": 1}))


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_manifests_of_format_1_are_read_and_completed(tmp_path, layout):
    codes, labels = write_codes(tmp_path, layout)
    whole = json.loads((tmp_path / "toy32.json").read_text())
    as_format_1(tmp_path / "toy32.json")
    read = Codes(tmp_path, "toy", 32)
    assert np.array_equal(read.batch(np.arange(23))[0], codes[:, 0])
    manifest = Manifest(**{**whole, "shards_sha256": []})
    assert Writer(Place(tmp_path, "toy", 32), manifest).finished
    (tmp_path / "toy32_codes" / ("00001.npy" if layout == "packed" else "13.npy")).unlink()
    writer = Writer(Place(tmp_path, "toy", 32), manifest)
    assert [writer.has(shard) for shard in range(3)] == [True, False, True]
    writer.start()
    writer.write(1, codes[10:20], labels[10:20])
    writer.finish()
    assert json.loads((tmp_path / "toy32.json").read_text()) == whole


@pytest.mark.parametrize("layout", ["packed", "per-image"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_is_there_when_its_bytes_are_right(tmp_path, layout, finished):
    write_codes(tmp_path, layout, skipped=[3])
    manifest = Manifest(**{**json.loads((tmp_path / "toy32.json").read_text()), "skipped": [], "shards_sha256": []})
    if not finished:
        unfinish(tmp_path)
    place = Place(tmp_path, "toy", 32)
    assert Writer(place, manifest).finished == finished
    assert all(map(Writer(place, manifest).has, range(3)))
    for folder in ("toy32_codes", "toy32_labels"):
        path = tmp_path / folder / ("00001.npy" if layout == "packed" else "13.npy")
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert [Writer(place, manifest).has(shard) for shard in range(3)] == [True, False, True]
        assert not Writer(place, manifest).finished
        path.write_bytes(good)
    if not finished:
        (tmp_path / "toy32.unfinished" / "00000.json").write_text("{")
        assert not Writer(place, manifest).has(0)


def test_what_a_kill_left_is_removed_and_an_image_that_cannot_be_read_any_more_has_no_file(tmp_path):
    codes, labels = write_codes(tmp_path, "per-image")
    manifest = Manifest(**{**json.loads((tmp_path / "toy32.json").read_text()), "shards_sha256": []})
    for name in ("toy32_codes/.5.77.part.npy", ".toy32.77.part.json", ".toy32.unfinished.77.part.json"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".toy320.77.part.json").write_bytes(b"another's")
    writer = Writer(Place(tmp_path, "toy", 32), manifest)
    writer.start()
    assert [path.name for path in tmp_path.rglob(".*")] == [".toy320.77.part.json"]
    rows = np.delete(np.arange(10), 5)
    writer.write(0, codes[rows], labels[rows], [{"image": 5, "path": "x", "reason": "y"}])
    assert not (tmp_path / "toy32_codes" / "5.npy").exists()
    assert [row["image"] for row in writer.finish().skipped] == [5]
    assert len(Codes(tmp_path, "toy", 32)) == 22


def test_codes_are_not_written_into_a_folder_of_something_else(tmp_path):
    write_codes(tmp_path, "per-image")
    (tmp_path / "toy32.json").unlink()
    with pytest.raises(InputError, match="holds files of something else"):
        write_codes(tmp_path, "per-image")
