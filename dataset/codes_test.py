"""Codes: round trips of both layouts, and every way a folder can be wrong."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.codes import Codes, Manifest, Place, Writer
from utils.cli import InputError


def write_codes(root, layout="packed", images=23, views=2, tokens=16, codebook=512, shard_size=10, size=32):
    manifest = Manifest("toy", size, images, views, tokens, codebook, layout, shard_size, classes=["a", "b", "c"])
    writer = Writer(Place(root, "toy", size), manifest)
    writer.start()
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(codebook, size=(images, views, tokens)), rng.integers(3, size=images)
    for shard in range(manifest.shards):
        rows = manifest.rows(shard)
        writer.write(shard, codes[rows.start : rows.stop], labels[rows.start : rows.stop])
    writer.finish()
    return codes, labels


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
