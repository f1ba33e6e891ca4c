"""Samples files: streamed out and in, readable by numpy, refused where they are not what they should be."""

import zipfile

import numpy as np
import pytest
from numpy.lib import format as npy

from utils import samples
from utils.cli import InputError
from utils.samples import Samples

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 6, 4, 3), np.uint8)
LABELS = np.arange(10) * 3


@pytest.fixture
def path(tmp_path):
    return tmp_path / "samples.npz"


def test_written_in_batches_of_any_size(path):
    batches = [
        IMAGES[:3],
        IMAGES[3:3],
        IMAGES[3:4],
        np.asfortranarray(IMAGES[4:]),
    ]  # one empty, one in another memory order
    samples.write(path, iter(batches), IMAGES.shape, LABELS.astype(np.int32))
    with np.load(path) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], IMAGES)
        assert file["arr_1"].dtype == np.int64 and np.array_equal(file["arr_1"], LABELS)


@pytest.mark.parametrize("size", [1, 3, 10, 64])
@pytest.mark.parametrize("writer", ["ours", "numpy", "compressed", "fortran"])
def test_read_in_batches_of_any_size(path, writer, size):
    if writer == "ours":
        samples.write(path, [IMAGES], IMAGES.shape, LABELS)
    elif writer == "fortran":
        np.savez(path, np.asfortranarray(IMAGES), LABELS)
    else:
        (np.savez if writer == "numpy" else np.savez_compressed)(path, IMAGES, LABELS)
    file = Samples(path)
    batches = list(file.batches(size))
    assert (len(file), file.shape) == (10, IMAGES.shape) and np.array_equal(file.labels, LABELS)
    assert [len(batch) for batch in batches] == [size] * (10 // size) + [10 % size] * (10 % size > 0)
    assert np.array_equal(np.concatenate(batches), IMAGES)


def test_published_reference_batches_have_no_labels(path):
    np.savez(path, arr_0=IMAGES, mu=np.zeros(3), sigma=np.eye(3))
    assert Samples(path).labels is None


def test_the_same_images_make_the_same_bytes(tmp_path):
    for name, batches in (("a.npz", [IMAGES]), ("b.npz", [IMAGES[:1], IMAGES[1:]])):
        samples.write(tmp_path / name, batches, IMAGES.shape, LABELS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize(
    ("batches", "labels", "message"),
    [
        ([IMAGES[:4]], LABELS, "expected 10 images and labels, got 4 and 10"),
        ([IMAGES, IMAGES[:1]], LABELS, "expected 10 images and labels, got 11 and 10"),
        ([IMAGES], LABELS[:9], "expected 10 images and labels, got 10 and 9"),
        ([IMAGES[:5], IMAGES[5:, :5]], LABELS, r"expected uint8 images of \(6, 4, 3\), got uint8 of \(5, 4, 3\)"),
        ([IMAGES.astype(np.float32)], LABELS, r"expected uint8 images of \(6, 4, 3\), got float32"),
    ],
)
def test_wrong_batches_raise_and_leave_the_old_file(path, batches, labels, message):
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        samples.write(path, batches, IMAGES.shape, labels)
    assert list(path.parent.iterdir()) == [path] and path.read_text() == "old"


def test_an_error_while_drawing_leaves_no_file(path):
    def batches():
        yield IMAGES[:5]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        samples.write(path, batches(), IMAGES.shape, LABELS)
    assert not list(path.parent.iterdir())


def test_missing(path):
    with pytest.raises(InputError, match=r"there is no samples file .*samples\.npz; expected an \.npz with arr_0"):
        Samples(path)


def test_truncated_anywhere(path):
    samples.write(path, [IMAGES], IMAGES.shape, LABELS)
    whole = path.read_bytes()
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        with pytest.raises(
            InputError, match=r"samples\.npz is damaged or not an \.npz file: write or download it again"
        ):
            Samples(path)


@pytest.mark.parametrize("member", ["images", "labels"])
def test_trap_damage_in_the_middle_of_a_large_file(path, member):
    """The archive's directory is whole, so only reading the data finds it: a checksum, raised by the last batch."""
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    samples.write(path, [images], images.shape, np.arange(50))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if member == "images" else data.index(np.arange(50).tobytes()) + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged or not an \.npz file"):
        list(Samples(path).batches(16))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, r"holds images; expected arr_0 .*write it again by np\.savez"),
        ({"arr_0": IMAGES / 255}, r"arr_0 is float64 of shape \(10, 6, 4, 3\); expected uint8 .*\(x \* 255\)"),
        ({"arr_0": IMAGES[0, 0]}, r"arr_0 is uint8 of shape \(4, 3\); .*write the images in this form"),
        ({"arr_0": IMAGES[..., 0]}, r"of shape \(10, 6, 4\); .*np\.stack\(\[x\] \* 3, -1\)"),
        ({"arr_0": IMAGES[..., :1]}, r"of shape \(10, 6, 4, 1\); .*np\.repeat\(x, 3, -1\)"),
        ({"arr_0": IMAGES.repeat(2, 3)[..., :4]}, r"of shape \(10, 6, 4, 4\); .*x\[\.\.\., :3\]"),
        (
            {"arr_0": IMAGES.transpose(0, 3, 1, 2)},
            r"arr_0 is uint8 of shape \(10, 3, 6, 4\); .*transpose\(0, 2, 3, 1\)",
        ),
        ({"arr_0": IMAGES.astype(np.int64)}, r"arr_0 is int64 .*x\.astype\(np\.uint8\)"),
        ({"arr_0": IMAGES[:0]}, r"holds no images \(arr_0 is of shape \(0, 6, 4, 3\)\)"),
        ({"arr_0": np.array([None] * 10)}, r"arr_0 is object of shape \(10,\)"),
        ({"arr_0": np.zeros((1, 1, 9000, 3), np.uint8)}, "H and W at most 8192"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "holds mu, sigma; .*statistics without images"),
        ({}, "holds nothing; expected arr_0"),
    ],
)
def test_other_arrays_are_refused(path, arrays, message):
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message):
        Samples(path)


class Command:
    """A pickle of it raises when it is read."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    "labels",
    [
        None, LABELS[:9], np.eye(10), LABELS.astype(str), LABELS + 0.5, np.full(10, np.nan), IMAGES,
        np.array([None] * 10), np.array([Command()] * 10, object),
    ],
)  # fmt: skip
def test_labels_that_are_none_are_ignored(path, labels):
    np.savez(path, IMAGES, labels)
    file = Samples(path)
    assert file.labels is None and "labels of" in file.label_note and "expected int64 of shape (10,)" in file.label_note
    assert np.array_equal(next(file.batches(10)), IMAGES)


@pytest.mark.parametrize("labels", [LABELS.astype(">i8"), LABELS.astype(np.float32), LABELS[:, None], LABELS.tolist()])
def test_labels_of_other_types(path, labels):
    np.savez(path, IMAGES, labels)
    file = Samples(path)
    assert file.labels.dtype == np.int64 and np.array_equal(file.labels, LABELS) and not file.label_note


def with_header(path, shape, content: bytes, compression=zipfile.ZIP_STORED):
    """arr_0 with a header of any shape, whatever follows."""
    with zipfile.ZipFile(path, "w", compression) as archive, archive.open("arr_0.npy", "w") as member:
        npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        member.write(content)


@pytest.mark.parametrize("shape", [(10**7, 512, 512, 3), (2**62, 4, 4, 3), (5, 6, 4, 3), (-10, -6, 4, 3)])
def test_a_header_that_promises_something_else(path, shape):
    with_header(path, shape, IMAGES.tobytes() if min(shape) > 0 else bytes(719))
    with pytest.raises(InputError, match=r"is damaged: arr_0 of shape .* takes -?\d+ bytes, the file holds \d+"):
        Samples(path)


def test_a_small_file_that_unfolds_is_refused(path):
    with_header(path, (300, 1024, 1024, 1), bytes(300 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"is refused: \d+ bytes in it unfold to 314572800 of arr_0"):
        Samples(path)


def test_statistics(path):
    sigma = np.asfortranarray(np.arange(9.0).reshape(3, 3))
    np.savez(path, IMAGES, mu=np.zeros(3, np.float32), sigma=sigma, mu_s=np.array([Command()] * 3))
    file = Samples(path)
    found = file.statistics({"mu": (3,), "sigma": (3, 3), "sigma_s": (2, 2)})
    assert sorted(found) == ["mu", "sigma"] and np.array_equal(found["sigma"], sigma)
    for name, shape in (("mu", (4,)), ("mu_s", (3,))):
        with pytest.raises(InputError, match=rf"holds {name} of .* and shape \(3,\), expected numbers of shape"):
            file.statistics({name: shape})


def test_another_kind_of_file_is_refused(path):
    with open(path, "wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(InputError, match=r"is an \.npy file: write it again by np\.savez"):
        Samples(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(InputError, match=r"is a file of torch\.save"):
        Samples(path)
    path.write_text("<html>")
    with pytest.raises(InputError, match=r"damaged or not an \.npz file.*not a zip file"):
        Samples(path)
