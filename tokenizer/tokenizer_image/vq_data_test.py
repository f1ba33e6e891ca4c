"""Batches of crops: from RAM and read by processes they are the same, also where an image cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.crops import center_crop, decode, random_crop
from dataset.images import ImageFolder
from dataset.sampler import Selection
from tokenizer.tokenizer_image import vq_data
from utils.cli import InputError


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(256, size=(9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def selections() -> list[Selection]:
    none = np.zeros(3, bool)
    return [
        Selection(np.array([6, 0, 3]), np.array([0, 1, 0]), none),
        Selection(np.array([1, 2, 5]), np.array([1, 1, 0]), none),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_and_read_batches_are_the_same(root, monkeypatch, capsys, workers):
    """The place of an unreadable image is taken by the next one that can be read, of the last by the first."""
    for broken in (3, 6):
        (root / f"{broken}.png").write_bytes(b"none")
    folder = ImageFolder(root)
    cached = list(vq_data.batches_of(folder, 8, workers, False)(iter(selections())))
    monkeypatch.setattr(vq_data, "CACHE_BYTES", 0)
    read = vq_data.batches_of(folder, 8, workers, False)
    for batches in (cached, list(read(iter(selections()))), list(read(iter(selections())))):
        for batch, images, views in zip(batches, ([0, 0, 4], [1, 2, 5]), ([0, 1, 0], [1, 1, 0]), strict=True):
            crops = [center_crop(decode(folder.paths[i]), 8) for i in images]
            expected = [crop[:, ::-1] if view else crop for crop, view in zip(crops, views, strict=True)]
            assert batch.equal(torch.from_numpy(np.stack(expected)))
    said = capsys.readouterr().err
    assert said.count("3.png (no image of a known format)") == 2  # by the cache, and once by what reads


@pytest.mark.parametrize("workers", [0, 2])
def test_random_crops(root, workers):
    """Of each image its own place, mirrored after the crop; an unreadable one is replaced."""
    (root / "3.png").write_bytes(b"none")
    folder = ImageFolder(root)
    read = vq_data.batches_of(folder, 6, workers, False, random_crop=True)

    def places(indices):
        return np.stack((indices / 7, indices / 14, 1 - indices / 7 - 1e-9), 1)

    (batch, _) = read(iter(selections()), places)
    for image, row, mirrored in ((6, 0, False), (0, 1, True)):
        expected = random_crop(folder.read(image), 6, places(np.array([image]))[0])
        assert batch[row].equal(torch.from_numpy(expected[:, ::-1].copy() if mirrored else expected))
    assert batch[2].equal(torch.from_numpy(center_crop(decode(folder.paths[4]), 6)))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_strict_and_nothing_to_read(root, monkeypatch, cache_bytes):
    monkeypatch.setattr(vq_data, "CACHE_BYTES", cache_bytes)
    (root / "3.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"3\.png cannot be read as an image .*leave out --strict"):
        list(vq_data.batches_of(ImageFolder(root, strict=True), 8, 0, False)(selections()))
    for path in root.iterdir():
        path.write_bytes(b"none")
    with pytest.raises(InputError, match="none of the 7 images"):
        list(vq_data.batches_of(ImageFolder(root), 8, 0, False)(selections()))
