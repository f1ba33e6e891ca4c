"""Codes: round trips of both layouts, several folders as one, and every way a folder can be wrong."""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.codes import LAYOUTS, Codes, Manifest, Place, Writer
from dataset.codes.folders import open_folder
from dataset.codes.manifest import find_place
from dataset.codes.repack_test import limited, published
from dataset.codes.toy import files, unfinish, write_codes
from utils.cli import InputError
from utils.files import HOST

TOY = {"dataset": "toy", "image_size": 32, "images": 23, "views": 2, "tokens": 16, "codebook_size": 512}


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(LAYOUTS), st.integers(1, 40), st.integers(1, 11), st.integers(1, 3),
    st.sampled_from([2, 256, 257, 16384, 65537]),
)  # fmt: skip
def test_round_trip_of_any_shape_in_the_smallest_type(tmp_path_factory, layout, images, shard_size, views, codebook):
    root = tmp_path_factory.mktemp("codes")
    codes, labels = write_codes(root, layout, images=images, shard_size=shard_size, views=views, codebook=codebook)
    read = Codes(root, "toy", 32)
    assert (len(read), read.views, read.tokens, read.manifest.images) == (images, views, 16, images)
    indices = np.random.default_rng(0).integers(images, size=50)
    which = np.arange(50) % views
    got, got_labels = read.batch(indices, which)
    assert got.dtype == got_labels.dtype == np.int64
    assert np.array_equal(got, codes[indices, which])
    assert np.array_equal(got_labels, labels[indices])
    smallest = np.uint8 if codebook <= 256 else np.uint16 if codebook <= 65536 else np.uint32
    assert layout == "per-image" or np.load(root / "toy32_codes" / "00000.npy").dtype == smallest


def test_per_image_files_are_the_published_ones(tmp_path):
    """`{i}.npy` of (1, views, tokens) int64 and (1,) int64; what lies beside them does not matter."""
    codes, labels = published(tmp_path)
    one, label = np.load(tmp_path / "toy32_codes" / "7.npy"), np.load(tmp_path / "toy32_labels" / "7.npy")
    assert (one.dtype, one.shape, label.dtype, label.shape) == (np.int64, (1, 2, 16), np.int64, (1,))
    for name in (".DS_Store", "._0.npy", ".nfs0001", "00.npy", "1-best.npy", "٣.npy"):
        (tmp_path / "toy32_codes" / name).touch()
    np.save(tmp_path / "toy32_codes" / "5.npy", np.asfortranarray(codes[5:6]))
    got, got_labels = Codes(tmp_path, "toy", 32).batch(np.arange(23), np.ones(23, int))
    assert np.array_equal(got, codes[:, 1])
    assert np.array_equal(got_labels, labels)


def test_trap_another_size_says_which_sizes_are_there(tmp_path):
    """The published README extracts at 384 and trains at 256."""
    write_codes(tmp_path, size=384)
    with pytest.raises(InputError, match=r"has no toy256_codes: there is toy384; .*--image-size"):
        Codes(tmp_path, "toy", 256)
    with pytest.raises(InputError, match=r"toy384_codes has no toy256_codes: there is toy384;"):
        Codes(tmp_path / "toy384_codes", "toy", 256)
    with pytest.raises(InputError, match="there is no folder"):
        Codes(tmp_path / "nowhere", "toy", 256)


def test_the_folder_of_codes_itself_is_taken_too(tmp_path, monkeypatch):
    codes, _ = write_codes(tmp_path)
    write_codes(tmp_path, size=64)
    monkeypatch.chdir(tmp_path / "toy32_codes")
    for root in (tmp_path / "toy32_codes", ".", "../toy32_codes/"):
        assert np.array_equal(Codes(root, "toy", 32).batch([3])[0], codes[[3], 0])
        assert find_place(root).name == "toy32"


def test_a_damaged_or_missing_file_is_named(tmp_path, layout):
    codes, labels = (
        tmp_path / f"toy32_{kind}" / ("00001.npy" if layout == "packed" else "11.npy") for kind in ("codes", "labels")
    )
    write_codes(tmp_path, layout)
    good = codes.read_bytes(), labels.read_bytes()
    objects = np.array([None])

    def fails(path, message):
        with pytest.raises(InputError, match=f"{path.name}.* {message}"):
            Codes(tmp_path, "toy", 32).batch([0])
        codes.write_bytes(good[0]), labels.write_bytes(good[1])

    codes.write_bytes(good[0][:-7])
    fails(codes, "is truncated or damaged")
    for path in (codes, labels):
        path.unlink()
        fails(path, "is missing")
        np.save(path, objects, allow_pickle=True)
        fails(path, "holds Python objects; expected whole numbers")
        np.save(path, np.full(3, np.nan))
        fails(path, "holds float64, 3 of its values not finite; expected whole numbers")
        with open(path, "wb") as file:
            np.savez(file, objects.astype(float))
        fails(path, "holds an archive of arrays")
        np.save(path, np.zeros((1, 3), int))
        fails(path, r"has shape|labels of shape")
    if layout == "per-image":
        codes.unlink(), labels.unlink()
        with pytest.raises(InputError, match="holds 22 of 23 images"):
            Codes(tmp_path, "toy", 32)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((64,), r"with one view \(1, 1, 64\)"), ((1, 64), r"\(1, 1, 64\)"), ((1, 8, 8), r"flattened to \(1, 1, 64\)"),
     ((2, 1, 64), r"expected \(1, views, tokens\)"), ((1, 1, 0), r"expected \(1, views, tokens\)")],
)  # fmt: skip
def test_published_codes_of_another_shape_say_what_is_expected(tmp_path, shape, message):
    published(tmp_path)
    np.save(tmp_path / "toy32_codes" / "0.npy", np.zeros(shape, int))
    with pytest.raises(InputError, match=rf"0.npy has shape .*{message}"):
        Codes(tmp_path, "toy", 32)


def test_published_codes_with_holes_or_of_one_dimension_are_read(tmp_path, capfd):
    codes, _ = published(tmp_path, views=1, tokens=32)
    for folder in ("toy32_codes", "toy32_labels"):
        for i in (3, 17):
            (tmp_path / folder / f"{i}.npy").unlink()
    assert np.array_equal(Codes(tmp_path, "toy", 32).batch(np.arange(21))[0], np.delete(codes, (3, 17), 0)[:, 0])
    assert "21 images numbered up to 22, 2 numbers have no file, the first is 3" in capfd.readouterr().err


def test_what_is_no_finished_set_of_codes_is_not_read(tmp_path):
    (tmp_path / "toy32_codes").mkdir()
    with pytest.raises(InputError, match="holds no codes"):
        Codes(tmp_path, "toy", 32)
    path = tmp_path / "toy32.json"
    for text in (
        "", "{", "[]", "3", "{}", "[" * 100_000, "\0" * 50, *(json.dumps({**TOY, key: []}) for key in TOY),
        *(json.dumps({**TOY, key: 0}) for key in TOY), *(json.dumps({**TOY, key: 10**12}) for key in TOY),
        json.dumps({**TOY, "layout": "other"}), json.dumps({**TOY, "skipped": [{"image": "x"}]}),
        json.dumps({**TOY, "shards_sha256": 3}),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match=r"toy32.json is damaged or not a record"):
            Codes(tmp_path, "toy", 32)
    path.write_text(json.dumps({**TOY, "format": 99}))
    with pytest.raises(InputError, match="has format 99"):
        Codes(tmp_path, "toy", 32)
    path.rename(tmp_path / "toy32.unfinished.json")
    with pytest.raises(InputError, match="is unfinished"):
        Codes(tmp_path, "toy", 32)


def test_a_manifest_of_more_codes_than_its_files_hold_builds_nothing(tmp_path, layout):
    """3 * 10^8 images would take gigabytes before the first file is missed."""
    write_codes(tmp_path, layout, images=40, codebook=64)
    path = tmp_path / "toy32.json"
    whole = json.loads(path.read_text())
    for change in (
        {"images": 3 * 10**8}, {"images": 3 * 10**8, "shard_size": 10**9}, {"images": 3 * 10**8, "shard_size": 1},
        {"tokens": 10**9}, {"views": 10**9},
    ):  # fmt: skip
        path.write_text(json.dumps(whole | change))
        start = time.monotonic()
        if layout == "packed" or "images" in change:
            with pytest.raises(InputError, match=r"is missing|has shape|cannot be read|holds 40 of"):
                Codes(tmp_path, "toy", 32)
        assert time.monotonic() - start < 5
    path.write_text(json.dumps(whole | {"an_unknown_field": 1}))
    assert len(Codes(tmp_path, "toy", 32)) == 40


def test_names_of_others_choose_no_path_and_need_no_utf8(tmp_path, command):
    write_codes(tmp_path / "a", dataset="../b", classes=["../x", os.fsdecode(b"na\xefve"), "/etc"])
    assert find_place(tmp_path / "a").name == "toy32"
    with pytest.raises(InputError, match=r"'../toy'; expected a name without /"):
        find_place(tmp_path / "a", "../toy", 32)
    assert Codes(tmp_path / "a", "toy", 32).manifest.classes == ["../x", "na\ufffdve", "/etc"]
    assert command("check", tmp_path / "a")[0] == 0
    assert command("unpack", tmp_path / "a", tmp_path / "c" / "d")[0] == 0
    assert {path.parts[0] for path in map(Path, files(tmp_path))} == {"a", "c"}
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["d"]


def test_an_index_that_is_not_there_is_refused(tmp_path):
    write_codes(tmp_path)
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


@pytest.mark.parametrize("bare", ["", "a", "b"])
def test_views_of_several_folders_are_counted_on(tmp_path, bare):
    """Two crop ranges of the same images, one of them in the published layout without a manifest."""
    layouts = {name: "per-image" if name == bare else "packed" for name in "ab"}
    a, labels = write_codes(tmp_path / "a", layouts["a"], views=2, seed=1, crop_range=1.1)
    b, _ = write_codes(tmp_path / "b", layouts["b"], views=3, seed=2, crop_range=1.05, shard_size=7)
    if bare:
        (tmp_path / bare / "toy32.json").unlink()
    codes = Codes([tmp_path / "a", str(tmp_path / "b")], "toy", 32)
    assert (len(codes), codes.views, codes.tokens) == (23, 5, 16)
    assert codes.manifest.crop_range == (1.05 if bare == "a" else 1.1)
    assert (f"{bare}/toy32_packed" in codes.hint) if bare else not codes.hint
    expected = np.concatenate((a, b), axis=1)
    indices, views = np.repeat(np.arange(23), 5), np.tile(np.arange(5), 23)
    order = np.random.default_rng(0).permutation(len(indices))
    got, got_labels = codes.batch(indices[order], views[order])
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
        ({"images_id": "f00"}, "images id beef and f00"),
        ({"labels": np.zeros(23, int)}, "labels differ, the first of image 0: 2 and 0"),
        ({"skipped": [4]}, r"images 23 and 22; skipped images \[\] and \[4\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_folders_of_other_images_or_tokenizers_are_refused(tmp_path, change, message, layout):
    same = {"tokenizer_sha256": "beef", "images_id": "beef"}
    write_codes(tmp_path / "a", **same)
    write_codes(tmp_path / "b", seed=1, **same)
    write_codes(tmp_path / "c", layout, **{**same, **change})
    roots = [tmp_path / name for name in "abc"]
    assert Codes(roots[:2], "toy", 32).views == 4
    with pytest.raises(InputError, match=rf"a/toy32_codes and .*c/toy32_codes are not of the same images.*{message}"):
        Codes(roots, "toy", 32).batch([0])
    with pytest.raises(InputError, match="is given twice"):
        Codes([roots[0], roots[0] / "toy32_codes" / ".."], "toy", 32)
    with pytest.raises(InputError, match="got none"):
        Codes([], "toy", 32)


def test_too_many_shards_to_open_say_what_to_do(tmp_path):
    """A mapped shard is an open file."""
    write_codes(tmp_path, images=100, shard_size=1)
    with limited(resource.RLIMIT_NOFILE, 80), pytest.raises(InputError) as caught:
        Codes(tmp_path, "toy", 32)
    assert "cannot be read (Too many open files); raise `ulimit -n`, or pack" in str(caught.value)
    assert "delete" not in str(caught.value)


GAPS = [0, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 22]  # of 23 in shards of 10: the second shard is empty


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
    source = open_folder(Place(tmp_path, "toy", 32))
    for array, expected in zip(source.read(range(2, 10)), (codes[kept[2:]], labels[kept[2:]]), strict=True):
        assert np.array_equal(array, expected)
    assert source.read(range(3, 3))[0].shape == (0, 2, 16)
    if layout == "per-image":
        assert sorted(int(p.stem) for p in (tmp_path / "toy32_codes").iterdir()) == kept.tolist()


@pytest.mark.parametrize("kind", ["packed", "format 1", "altered", "published"])
def test_codes_and_labels_outside_a_model_are_named_before_the_work(tmp_path, kind):
    codes = np.zeros((300, 2, 16), np.int64)
    codes[234, 1, 7] = 60
    write_codes(
        tmp_path, "per-image" if kind == "published" else "packed", images=300, codebook=64, shard_size=100,
        codes=codes, labels=np.arange(300) // 3 % 3, skipped=[] if kind == "format 1" else [5],
    )  # fmt: skip
    if kind == "format 1":
        as_format_1(tmp_path / "toy32.json")
    if kind == "published":
        (tmp_path / "toy32.json").unlink()
    opened = Codes(tmp_path, "toy", 32)
    opened.check_range(3, 61)
    with pytest.raises(InputError, match=r"image 6 of .*toy32_labels has label 2, .*--num-classes is 2: give 3"):
        opened.check_range(2, 64)
    outside = r"image {} of .*toy32_codes has the code {}, but the vocabulary is {}: give --vocab-size {}"
    if kind == "altered":  # since the manifest was written
        shard = np.load(tmp_path / "toy32_codes" / "00000.npy")
        shard[7, 0, 0] = 63
        np.save(tmp_path / "toy32_codes" / "00000.npy", shard)
        opened = Codes(tmp_path, "toy", 32)
        opened.check_range(3, 61)
        with pytest.raises(InputError, match=outside.format(8, 63, 61, 64)):
            opened.batch([0, 7])
    else:
        with pytest.raises(InputError, match=outside.format(234, 60, 32, 61)):
            opened.check_range(3, 32)


def test_the_fingerprint_stays_what_it_was(tmp_path, layout):
    """A run that was cut off under an older version knows its codes by it, in either layout."""
    codes = np.arange(100 * 2 * 16).reshape(100, 2, 16) * 7 % 512
    write_codes(tmp_path, layout, images=100, codes=codes, labels=np.arange(100) % 3, tokenizer_sha256="f00")
    assert Codes(tmp_path, "toy", 32).fingerprint() == "6c5dcf4bd088c93f"


def as_format_1(path) -> None:
    values = json.loads(path.read_text())
    for key in ("precision", "paths_sha256", "skipped", "shards_sha256", "shards_max"):
        values.pop(key)
    path.write_text(json.dumps({**values, "format": 1}))


def test_manifests_of_format_1_are_read_and_completed(tmp_path, layout):
    codes, labels = write_codes(tmp_path, layout)
    whole = files(tmp_path)
    as_format_1(tmp_path / "toy32.json")
    assert np.array_equal(Codes(tmp_path, "toy", 32).batch(np.arange(23))[0], codes[:, 0])
    manifest = Manifest(**json.loads(whole["toy32.json"])).changed(shards_sha256=[])
    assert Writer(Place(tmp_path, "toy", 32), manifest).finished
    (tmp_path / "toy32_codes" / ("00001.npy" if layout == "packed" else "13.npy")).unlink()
    writer = Writer(Place(tmp_path, "toy", 32), manifest)
    assert [writer.has(shard) for shard in range(3)] == [True, False, True]
    writer.start()
    writer.write(1, codes[10:20], labels[10:20])
    writer.finish()
    assert Manifest.read(tmp_path / "toy32.json").shards_sha256 == json.loads(whole["toy32.json"])["shards_sha256"]
    assert all(files(tmp_path)[name] == whole[name] for name in whole if name.endswith(".npy"))


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_is_there_when_its_bytes_are_right(tmp_path, layout, finished):
    write_codes(tmp_path, layout, skipped=[3])
    manifest = Manifest.read(tmp_path / "toy32.json").changed(skipped=[], shards_sha256=[], shards_max=[])
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
        for text in ("{", "", '{"sha256": 3}'):
            (tmp_path / "toy32.unfinished" / "00000.json").write_text(text)
            assert not Writer(place, manifest).has(0)
        with pytest.raises(InputError, match=r"shard 0 of .* was not written, or into another folder"):
            Writer(place, manifest).finish()


def test_what_a_kill_left_is_removed_and_an_image_that_cannot_be_read_any_more_has_no_file(tmp_path):
    codes, labels = write_codes(tmp_path, "per-image")
    manifest = Manifest.read(tmp_path / "toy32.json").changed(shards_sha256=[], shards_max=[])
    host, dead, living = HOST, 2**22 + 1, os.getpid()
    left = [f"toy32_codes/.5.{host}-{dead}.part.npy", f".toy32.{host}-{dead}.part.json",
            f".toy32.unfinished.{host}-{dead}.part.json"]  # fmt: skip
    others = [f".toy320.{host}-{dead}.part.json", f"toy32_codes/.5.{host}-{living}.part.npy"]
    for name in left + others:
        (tmp_path / name).write_bytes(b"half")
    writer = Writer(Place(tmp_path, "toy", 32), manifest)
    writer.start()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".*")) == sorted(others)
    rows = np.delete(np.arange(10), 5)
    writer.write(0, codes[rows], labels[rows], [{"image": 5, "path": "x", "reason": "y"}])
    assert not (tmp_path / "toy32_codes" / "5.npy").exists()
    assert [row["image"] for row in writer.finish().skipped] == [5]
    assert len(Codes(tmp_path, "toy", 32)) == 22


def test_codes_of_other_settings_or_files_of_something_else_are_not_mixed(tmp_path):
    write_codes(tmp_path, "per-image")
    manifest = Manifest.read(tmp_path / "toy32.json")
    with pytest.raises(InputError, match=r"other settings \(views 2, now 10\)"):
        Writer(Place(tmp_path, "toy", 32), manifest.changed(views=10))
    (tmp_path / "toy32.json").unlink()
    with pytest.raises(InputError, match="holds files of something else"):
        write_codes(tmp_path, "per-image")
    (tmp_path / "new" / "toy32_codes").mkdir(parents=True)
    (tmp_path / "new" / "toy32_codes" / ".DS_Store").touch()
    write_codes(tmp_path / "new")
    unknown, gpu, cpu = (manifest.changed(convolutions=kind) for kind in ("", "tf32", "fp32"))
    assert (gpu.differences(cpu), unknown.differences(cpu)) == (["convolutions tf32, now fp32"], [])
