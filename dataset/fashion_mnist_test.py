"""Fashion-MNIST as an ImageFolder, from IDX files made here and, where it is installed, from the real ones."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from dataset import fashion_mnist
from dataset.crops import center_crop, decode
from dataset.images import ImageFolder
from utils.cli import InputError
from utils.testing import assert_refused, run_script

SCRIPT = "dataset/fashion_mnist.py"


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The four files with the real shapes; image i is the constant i mod 251, its label i mod 10."""
    folder = tmp_path_factory.mktemp("idx")
    for prefix, n in fashion_mnist.SPLITS.values():
        numbers = np.arange(n)
        images = np.broadcast_to((numbers % 251).astype(np.uint8)[:, None, None], (n, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (numbers % 10).astype(np.uint8))
    return folder


def test_what_is_written(source, tmp_path):
    result = run_script(SCRIPT, tmp_path, "--source", source, "--limit", 3)
    assert result.returncode == 0, result.stderr
    for split in ("train", "test"):
        folder = ImageFolder(tmp_path / split)
        assert len(folder) == 30
        assert folder.classes == sorted(fashion_mnist.CLASSES)
        image = Image.open(tmp_path / split / "sneaker" / "00017.png")
        assert (image.size, image.mode) == ((32, 32), "RGB")
    pixels = center_crop(decode(tmp_path / "test" / "sneaker" / "00017.png"), 32)
    assert (pixels[2:-2, 2:-2] == 17).all()
    assert pixels.astype(int).sum() == 17 * 28 * 28 * 3
    again = run_script(SCRIPT, tmp_path, "--source", source, "--limit", 3)
    assert "has train and test already" in again.stdout


def test_a_split_that_was_cut_off_is_written_anew(source, tmp_path):
    (tmp_path / ".train.part" / "bag").mkdir(parents=True)
    (tmp_path / ".train.part" / "bag" / "half.png").touch()
    fashion_mnist.write_split(tmp_path, "train", *fashion_mnist.read_split(source, "train"), limit=1)
    assert len(ImageFolder(tmp_path / "train")) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_what_can_be_had_is_tried_in_turn(source, tmp_path, monkeypatch, capsys):
    missing = tmp_path / "nowhere"
    monkeypatch.setattr(fashion_mnist, "INSTALLED", missing)
    monkeypatch.setattr(fashion_mnist, "from_apt", lambda *_: missing)
    monkeypatch.setattr(fashion_mnist, "from_torchvision", lambda _: source)
    with fashion_mnist.files(None) as folder:
        assert folder == source
    said = "getting Fashion-MNIST: from apt\ngetting Fashion-MNIST: from torchvision\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(fashion_mnist, "from_torchvision", lambda _: missing)
    with pytest.raises(InputError, match="cannot be had here: install Debian's package"), fashion_mnist.files(None):
        pass
    monkeypatch.setattr(fashion_mnist, "INSTALLED", source)
    with fashion_mnist.files(None) as folder:
        assert folder == source


def test_wrong_files(source, tmp_path):
    assert_refused(run_script(SCRIPT, tmp_path / "out", "--source", tmp_path / "nowhere"), "there is no folder")
    assert_refused(run_script(SCRIPT, tmp_path / "out", "--source", tmp_path), "lacks some of train-images-idx3")
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    good = (source / path.name).read_bytes()
    damaged = bytearray(good)
    damaged[12] ^= 0xFF
    for content in (good[:-20], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="truncated or not gzip"):
            fashion_mnist.read_idx(path, (10000,))
    for content in (b"", b"\0\0\x08", b"\0\0\x08\x01\0\0", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\0"):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(InputError, match="not an IDX file of bytes, or is cut short"):
            fashion_mnist.read_idx(path, (5,))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((5, 28, 28), np.uint8))
    with pytest.raises(InputError, match="this is not Fashion-MNIST"):
        fashion_mnist.read_split(tmp_path, "test")


@pytest.mark.skipif(not fashion_mnist.has_files(fashion_mnist.INSTALLED), reason="Fashion-MNIST is not installed")
def test_the_real_files():
    images, labels = fashion_mnist.read_split(fashion_mnist.INSTALLED, "test")
    assert np.bincount(labels).tolist() == [1000] * 10
    assert labels[:4].tolist() == [9, 2, 1, 1]
    assert 60 < images[:, 2:-2, 2:-2].mean() < 90
