"""Crops against the published code's pixels, the order of an ImageFolder, and every way a folder can be wrong."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision import datasets

from dataset.images import (
    VIEWS,
    ImageFolder,
    Unreadable,
    center_crop,
    center_crops,
    cut_views,
    decode,
    load_image,
    load_images,
)
from utils.cli import InputError
from utils.pixels import to_float

GOLDEN = np.load(Path(__file__).parent / "testdata" / "crops.npz")


@pytest.fixture(params=["image0", "image1"])
def picture(request, tmp_path):
    """A golden image as a file, and its name in the golden data."""
    path = tmp_path / "picture.png"
    Image.fromarray(GOLDEN[request.param]).save(path)
    return path, request.param


def views_of(path: Path, size: int, mode: str, crop_range: float = 1) -> torch.Tensor:
    return cut_views(torch.from_numpy(load_image(path, int(size * crop_range)))[None], size, mode)[0]


@pytest.mark.parametrize("crop_range", ["1.1", "1.05"])
def test_ten_crops_equal_the_published_ones(picture, crop_range):
    path, name = picture
    prefix = f"{name}_size32_range{crop_range}"
    size = int(32 * float(crop_range))
    assert np.array_equal(load_image(path, size), GOLDEN[f"{prefix}_center"])
    views = views_of(path, 32, "ten-crop", float(crop_range))
    assert views.dtype == torch.uint8
    assert np.array_equal(to_float(views), GOLDEN[f"{prefix}_tencrop"])


def test_two_crops_equal_the_published_ones(picture):
    path, name = picture
    views = to_float(views_of(path, 32, "flip"))
    assert np.array_equal(views, GOLDEN[f"{name}_size32_twocrop"])
    assert views_of(path, 32, "single").equal(views_of(path, 32, "flip")[:1])


def test_crop_sizes_equal_the_published_ones():
    for size, crop_range, expected in GOLDEN["crop_sizes"]:
        assert int(int(size) * float(crop_range)) == int(expected)


@pytest.mark.parametrize("mode", VIEWS)
def test_views_are_as_many_as_said(picture, mode):
    assert views_of(picture[0], 16, mode, 1.25).shape[:1] == (VIEWS[mode],)
    crops = torch.from_numpy(np.stack([load_image(picture[0], 20)] * 3))
    assert cut_views(crops, 16, "ten-crop").shape == (3, 10, 16, 16, 3)


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (63, 200), (129, 70), (32, 500)])
def test_crops_of_any_shape_fit(shape):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(*shape, 3), dtype=np.uint8))
    assert center_crop(image, 32).shape == (32, 32, 3)


def test_an_image_of_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 32), pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (40, 50), (200, 30, 30)).convert(mode).save(path)
    assert load_image(path, 16).shape == (16, 16, 3)


def make_folder(root: Path) -> Path:
    for name in ("b/10.png", "b/9.png", "a/z.png", "a/deep/y.png", "a/notes.txt", "c/x.PNG"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, format="PNG")
    return root


def test_the_order_is_torchvisions(tmp_path):
    folder, theirs = ImageFolder(make_folder(tmp_path)), datasets.ImageFolder(str(tmp_path))
    assert folder.paths == [path for path, _ in theirs.samples]
    assert folder.labels.tolist() == theirs.targets
    assert folder.classes == theirs.classes == ["a", "b", "c"]
    assert len(folder) == 5


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; expected an ImageFolder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no class folders"):
        ImageFolder(tmp_path)
    make_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images in class folder empty of .*: add some"):
        ImageFolder(tmp_path)
    broken = tmp_path / "a" / "z.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"z\.png cannot be read as an image"):
        load_image(broken, 4)


@pytest.mark.parametrize("small_file", [0, 1 << 30])
def test_many_images_come_in_order_with_threads_and_without(tmp_path, monkeypatch, small_file):
    monkeypatch.setattr("dataset.images.SMALL_FILE", small_file)
    paths = [str(tmp_path / f"{i}.png") for i in range(11)]
    for i, path in enumerate(paths):
        Image.new("RGB", (5, 7), (i, 2 * i, 3 * i)).save(path)
    batches = list(load_images(paths, 4, batch=4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert np.array_equal(np.concatenate(batches), np.stack([load_image(path, 4) for path in paths]))


def test_sizes_share_their_halves_and_are_as_each_on_its_own(monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(300, 410, 3), dtype=np.uint8))
    sizes = (281, 33, 70, 35)
    alone = [center_crop(image, size) for size in sizes]
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *a: made.append(a[2]) or resize(*a))
    together = center_crops(image, sizes)
    assert all(map(np.array_equal, alone, together))
    assert made.count(Image.Resampling.BOX) == 3
    assert made.count(Image.Resampling.BICUBIC) == 4


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "I;16", "I", "F", "HSV"])
def test_any_mode_is_converted_as_torchvision_does_or_is_unreadable(tmp_path, mode):
    """In a TIFF, which keeps most modes, or in the format that does."""
    pixels = np.random.default_rng(0).integers(65536 if mode == "I;16" else 256, size=(20, 30))
    image = Image.fromarray(pixels.astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels.astype(np.uint8))
    image = image if mode in ("I;16", "L") else image.convert("RGB").convert({"PA": "P"}.get(mode, mode))
    path = tmp_path / "x.tif"
    try:
        image.save(path)
    except OSError:
        path = tmp_path / "x.png"
        image.convert("RGB").save(path)
    assert np.array_equal(np.array(decode(path)), np.array(datasets.folder.pil_loader(str(path))))


def test_a_rotation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg").size == (40, 20)


def test_one_pixel_is_an_image_and_a_thread_is_none(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "one.png")
    assert (load_image(tmp_path / "one.png", 16) == (9, 8, 7)).all()
    with pytest.raises(Unreadable, match="1 x 60000 pixels would be scaled to 256 x 15360000"):
        center_crops(Image.new("RGB", (1, 60000)), [256])


def test_a_decompression_bomb_is_unreadable(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(Unreadable, match="DecompressionBombError: Image size"):
        decode(tmp_path / "bomb.png")


def test_reasons_do_not_depend_on_where_and_when(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    for name, reason in (("x.jpg", "no image of a known format"), ("link.jpg", "No such file or directory")):
        with pytest.raises(Unreadable, match=f"^{reason}$"):
            decode(tmp_path / name)


def test_a_machine_in_trouble_is_no_broken_image(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(InputError, match=r"x\.png cannot be read \(Input/output error\): run the same command again"):
        decode(tmp_path / "x.png")


def test_a_decoder_may_fail_in_any_way(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")

    def fails(*_):
        raise RuntimeError(f"bad {object()}")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fails)
    with pytest.raises(Unreadable, match=r"^RuntimeError: bad object$"):
        decode(tmp_path / "x.png")
