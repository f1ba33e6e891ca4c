"""Crops against the published code's pixels, the order of an ImageFolder, and every way a folder or a file can be odd."""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision import datasets

from dataset import listing
from dataset.crops import VIEWS, Unreadable, center_crop, center_crops, cut_views, decode, random_crop
from dataset.images import CropRequest, ImageFolder, ImageSettings, crops_in_memory, read_crops
from utils.cli import InputError
from utils.pixels import to_float
from utils.testing import PATIENCE, ROOT, wait_for

GOLDEN = np.load(Path(__file__).parent / "testdata" / "crops.npz")


@pytest.fixture(params=["image0", "image1"])
def picture(request, tmp_path):
    """A golden image as a file, and its name in the golden data."""
    path = tmp_path / "picture.png"
    Image.fromarray(GOLDEN[request.param]).save(path)
    return path, request.param


def views_of(path: Path, size: int, mode: str, crop_range: float = 1) -> torch.Tensor:
    return cut_views(torch.from_numpy(center_crop(decode(path), int(size * crop_range)))[None], size, mode)[0]


@pytest.mark.parametrize("crop_range", ["1.1", "1.05"])
def test_ten_crops_equal_the_published_ones(picture, crop_range):
    path, name = picture
    prefix = f"{name}_size32_range{crop_range}"
    size = int(32 * float(crop_range))
    assert np.array_equal(center_crop(decode(path), size), GOLDEN[f"{prefix}_center"])
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
    crops = torch.from_numpy(np.stack([center_crop(decode(picture[0]), 20)] * 3))
    assert cut_views(crops, 16, "ten-crop").shape == (3, 10, 16, 16, 3)


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (64, 64), (63, 200), (129, 70), (32, 500)])
def test_crops_of_any_shape_fit(shape):
    pixels = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    crop = center_crop(Image.fromarray(pixels), 32)
    assert crop.shape == (32, 32, 3)
    assert shape != (32, 32) or np.array_equal(crop, pixels)  # of the right size: left alone


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


def picture_at(path: Path, colour=(9, 8, 7), size=(4, 4), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def make_folder(root: Path) -> Path:
    for name in ("b/10.png", "b/9.png", "a/z.png", "a/deep/y.png", "a/deep-er/x.png", "c/x.PNG"):
        picture_at(root / name, format="PNG")
    (root / "a" / "notes.txt").touch()
    return root


def test_the_order_is_torchvisions(tmp_path):
    folder, theirs = ImageFolder(make_folder(tmp_path)), datasets.ImageFolder(str(tmp_path))
    assert folder.paths == [path for path, _ in theirs.samples]
    assert folder.labels.tolist() == theirs.targets
    assert folder.classes == theirs.classes == ["a", "b", "c"]
    assert len(folder) == 6
    assert (
        "6 images in 3 classes (a, b, c). Left out: 1 .txt files (a/notes.txt). 2 images in deeper" in folder.summary()
    )


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; expected a folder of images"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"no images in .*: expected one folder of images a class, or images; it holds not"
    ):
        ImageFolder(tmp_path)
    make_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.tar").touch()
    with pytest.raises(InputError, match=r"no images in class folder empty of .*: add some.*1 \.tar files"):
        ImageFolder(tmp_path)
    broken = tmp_path / "a" / "z.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(Unreadable, match="truncated"):
        decode(broken)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (("train/a/1.png", "val/a/1.png"), "train/ and val/, .*: give .*/train"),
        (("Train/1.png", "TEST/1.png", "meta/1.png"), "TEST/ and Train/, .*: give .*/Train"),
        (("validation/a/1.png",), "validation/, .*: give .*/validation"),
        (("train/1.png", "bus/1.png"), None),
        (("test/1.png",), None),
    ],
)
def test_the_folder_above_the_splits_is_refused(tmp_path, names, advice):
    for name in names:
        picture_at(tmp_path / name)
    if advice is None:
        assert len(ImageFolder(tmp_path)) == len(names)
    else:
        with pytest.raises(InputError, match=f"holds {advice}"):
            ImageFolder(tmp_path)


def test_a_flat_folder_is_one_class(tmp_path):
    for name in ("b.png", "a.JPG", ".DS_Store.png"):
        picture_at(tmp_path / name, format="PNG")
    (tmp_path / "notes").mkdir()
    folder = ImageFolder(tmp_path)
    assert (folder.names, folder.classes, folder.labels.tolist()) == (["a.JPG", "b.png"], ["all"], [0, 0])
    assert "2 images in one class, as there are no class folders" in folder.summary()
    picture_at(tmp_path / "notes" / "x.png")
    mixed = ImageFolder(tmp_path)
    assert mixed.names == ["notes/x.png"]
    assert "2 images beside the class folders, in no class (a.JPG)" in mixed.summary()


def test_litter_links_and_special_files(tmp_path):
    """Nothing here is opened, loops end, and all of it is counted; what is linked to is read."""
    root = make_folder(tmp_path / "images")
    plain = ImageFolder(root).names
    picture_at(tmp_path / "elsewhere" / "e.png")
    for name in ("._z.png", ".ipynb_checkpoints/z.png", "__MACOSX/z.png", "@eaDir/z.png", "Thumbs.db", "desktop.ini"):
        picture_at(root / "a" / name, format="PNG")
    picture_at(root / ".ipynb_checkpoints" / "z.png")
    picture_at(root / "lost+found" / "z.png")
    os.mkfifo(root / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(root / "a")
        server.bind("socket.png")
        os.chdir(before)
    (root / "b" / "gone.png").symlink_to("nowhere.png")
    (root / "b" / "self.png").symlink_to("self.png")
    (root / "b" / "again.png").symlink_to("9.png")
    (root / "b" / "loop").symlink_to("..")
    (root / "b" / "above").symlink_to(tmp_path)
    (root / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "linked-too").symlink_to(tmp_path / "elsewhere")
    folder = ImageFolder(root)
    assert set(folder.names) - set(plain) == {"b/again.png", "b/linked/e.png"}
    said = folder.summary()
    for part in (
        "8 hidden or system files", "2 pipes, sockets or devices (a/pipe.png)", "2 links that lead nowhere (b/gone.png)",
        "3 links to folders that are read already or hold this one", "1 images are the same file as another one, by links",
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".JPE", ".avif", ".webp", ".TIFF", ".bmp", ".tga", ".jp2", ".qoi"])
def test_formats_that_pillow_reads_are_read(tmp_path, suffix):
    format = {".jfif": "JPEG", ".JPE": "JPEG"}.get(suffix)
    picture_at(tmp_path / "a" / f"x{suffix}", (200, 30, 30), (16, 16), **({"format": format} if format else {}))
    folder = ImageFolder(tmp_path)
    assert np.abs(np.array(folder.read(0)).astype(int) - (200, 30, 30)).max() < 6


def test_formats_that_need_more_are_left_out_with_advice(tmp_path, monkeypatch):
    for name in ("a/x.png", "a/y.HEIC", "a/z.webp"):
        picture_at(tmp_path / name, format="PNG")
    listing.missing_reader.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    said = ImageFolder(tmp_path).summary()
    listing.missing_reader.cache_clear()
    assert "1 .heic files that need pip install pillow-heif (a/y.HEIC)" in said
    assert "1 .webp files that need a Pillow with webp (a/z.webp)" in said


def test_names_that_are_no_utf8_can_be_printed(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png")).write_bytes(b"none")
    folder = ImageFolder(tmp_path)
    row = folder.crops(0, (4,))
    assert (folder.classes, row["path"]) == (["caf\ufffd"], "caf\ufffd/\ufffd.png")
    folder.summary().encode()
    assert len(folder.content_id()) == 64


def test_images_are_known_by_their_content(tmp_path):
    folder = make_folder(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    known = ImageFolder(folder).content_id()
    assert ImageFolder(tmp_path / "two").content_id() == known
    path = tmp_path / "two" / "b" / "9.png"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAT"[::-1]))  # as many bytes, but others
    assert ImageFolder(tmp_path / "two").content_id() != known
    picture_at(folder / "b" / "more.png")
    assert ImageFolder(folder).content_id() != known


def test_what_headers_say_is_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture_at(tmp_path / "1.jpg", size=(40, 20), exif=exif)
    picture_at(tmp_path / "2.jpg", size=(40, 20))
    Image.new("RGBA", (4, 4)).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(b"none")
    said = ImageFolder(tmp_path).summary()
    assert "1 of 4 images have an EXIF orientation, which is not applied (--exif-orientation applies it)" in said
    assert "1 of 4 images can be transparent: laid on white (--background)" in said
    assert "1 of 4 images cannot be read and will be skipped: 4.png (no image of a known format)" in said
    turned = ImageFolder(tmp_path, exif_orientation=True)
    sizes = [ImageFolder(tmp_path).read(0).size, turned.read(0).size, turned.read(1).size]
    assert sizes == [(40, 20), (20, 40), (40, 20)]


def test_settings(tmp_path, capsys):
    picture_at(tmp_path / "1.png")
    settings = ImageSettings.from_command_line("x", ["--background", "#102030", "--strict"])
    folder = settings.image_folder(tmp_path)
    assert (folder.background, folder.strict, folder.exif_orientation) == ("#102030", True, False)
    with pytest.raises(SystemExit):
        ImageSettings.from_command_line("x", ["--background", "transparent-ish"])
    assert "--background: expected a colour such as white" in capsys.readouterr().err


READING = """
import multiprocessing, os, signal, sys
from dataset.images import CropRequest, ImageFolder, read_crops

if __name__ == "__main__":
    _, method, folder, end = sys.argv
    multiprocessing.set_start_method(method)
    batches = read_crops(ImageFolder(folder), [CropRequest([i], (4,)) for i in range(11)], workers=1)
    next(batches)
    (process,) = multiprocessing.active_children()
    print(process.pid, flush=True)
    exec(end)
    os._exit(process.exitcode or 0)
"""


class TestReading:
    """The one parallel reader: order, skipping, strictness, and no need of shared memory."""

    @pytest.fixture
    def folder(self, tmp_path):
        for i in range(11):
            picture_at(tmp_path / "ab"[i % 2] / f"{i:02d}.png", (i, 2 * i, 3 * i), (5, 7))
        (tmp_path / "a" / "04.png").write_bytes(b"none")
        return tmp_path

    @pytest.mark.parametrize(("workers", "small_file"), [(0, -1), (0, 1 << 30), (1, 0)])
    def test_batches_come_in_order(self, folder, monkeypatch, workers, small_file):
        monkeypatch.setattr("dataset.images.SMALL_FILE", small_file)
        images = ImageFolder(folder)
        requests = [CropRequest(range(i, min(i + 4, 11)), (4, 3)) for i in range(0, 11, 4)]
        batches = list(read_crops(images, iter(requests), workers=workers, threads=2))
        assert [len(batch.images) for batch in batches] == [3, 4, 3]
        assert [row for batch in batches for row in batch.skipped] == [
            {"image": 2, "path": "a/04.png", "reason": "no image of a known format"}
        ]
        numbers = np.concatenate([batch.images for batch in batches])
        assert numbers.tolist() == [i for i in range(11) if i != 2]
        for k, size in enumerate((4, 3)):
            expected = np.stack([center_crop(decode(images.paths[i]), size) for i in numbers])
            assert np.array_equal(np.concatenate([batch.crops[k] for batch in batches]), expected)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_strict_stops(self, folder, workers):
        with pytest.raises(ValueError, match=r"a/04\.png cannot be read as an image .*leave out --strict"):
            list(read_crops(ImageFolder(folder, strict=True), [CropRequest(range(11), (4,))], workers=workers))

    def test_in_memory(self, folder, capsys):
        images = ImageFolder(folder)
        crops, labels = crops_in_memory(images, 4, show=False)
        assert crops.shape == (10, 4, 4, 3)
        assert labels.tolist() == [0] * 5 + [1] * 5
        assert "skipped 1 of 11 images that cannot be read: a/04.png (no image" in capsys.readouterr().err
        shutil.rmtree(folder / "b")
        for path in (folder / "a").iterdir():
            path.write_bytes(b"")
        with pytest.raises(InputError, match=r"none of the 6 images of .* can be read"):
            crops_in_memory(ImageFolder(folder), 4, show=False)

    def test_a_thousand_workers_are_as_many_as_cores(self, folder, monkeypatch, capsys):
        monkeypatch.setattr("dataset.images.cores", lambda: 1)
        list(read_crops(ImageFolder(folder), [CropRequest(range(2), (4,))], workers=1000))
        assert "--num-workers 1000: 1 processes read, one for each core" in capsys.readouterr().err

    def test_a_request_to_end_is_left_to_the_process_that_asks_for_images(self, folder):
        """A terminal or a scheduler sends it to the whole group; a training that saves still takes a step."""
        before = set(multiprocessing.active_children())  # of other tests
        batches = read_crops(ImageFolder(folder), [CropRequest([i], (4,)) for i in range(11)], workers=1)
        images = len(next(batches).images)
        (process,) = set(multiprocessing.active_children()) - before
        for name in ("TERM", "INT", "HUP"):
            subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
        assert images + sum(len(batch.images) for batch in batches) == 10

    def test_a_reading_process_that_is_left_behind_ends(self, folder):
        before = set(multiprocessing.active_children())
        batches = read_crops(ImageFolder(folder), [CropRequest([i], (4,)) for i in range(11)], workers=1)
        next(batches)
        (process,) = set(multiprocessing.active_children()) - before
        process.terminate()  # as multiprocessing does at the end of the program
        process.join(PATIENCE)
        assert process.exitcode == 0

    @pytest.mark.parametrize("method", ["fork", "forkserver"])
    @pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "process.terminate(), process.join(60)"])
    def test_a_reading_process_ends_with_its_parent_however_it_was_started(self, folder, tmp_path, method, end):
        (tmp_path / "read.py").write_text(READING)
        command = [sys.executable, str(tmp_path / "read.py"), method, str(folder), end]
        result = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        reader = Path("/proc", result.stdout.split()[0])
        wait_for("the reading process has ended", lambda: not reader.exists() or " Z " in (reader / "stat").read_text())

    def test_processes_hand_over_by_pipes_where_shared_memory_is_small(self, folder, monkeypatch):
        """As in a container: a tensor would need a file in /dev/shm, and DataLoader would wait for it for ever."""

        def refuse(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("dataset.images.shared_memory_left", lambda: 1 << 16)
        monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
        monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", refuse)
        batches = list(read_crops(ImageFolder(folder), [CropRequest(range(11), (64,))], workers=1))
        assert batches[0].crops[0].shape == (10, 64, 64, 3)


MODES = ["L", "1", "RGB", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "PA"]


@pytest.mark.parametrize("mode", MODES)
def test_opaque_images_of_any_mode_are_converted_as_torchvision_does(tmp_path, mode):
    """In a TIFF, which keeps most modes, or as a PNG where Pillow does not write or read that (12.3: YCbCr)."""
    pixels = np.random.default_rng(0).integers(256, size=(20, 30), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image if mode == "L" else image.convert("RGB").convert({"PA": "P"}.get(mode, mode))
    path = tmp_path / "x.tif"
    try:
        image.save(path)
        datasets.folder.pil_loader(str(path))
    except OSError:
        path = tmp_path / "x.png"
        image.convert("RGB").save(path)
    assert np.array_equal(np.array(decode(path)), np.array(datasets.folder.pil_loader(str(path))))


def test_sixteen_bits_are_scaled_and_more_are_refused(tmp_path):
    ramp = np.linspace(0, 1, 400).reshape(20, 20)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "x.png")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "x.tif")
    for name in ("x.png", "x.tif"):
        got = np.array(decode(tmp_path / name))
        assert np.abs(got - ramp[..., None] * 255).max() <= 0.51
    for mode in ("I", "F"):
        Image.fromarray((ramp * 255).astype(np.uint8)).convert(mode).save(tmp_path / "x.tif")
        with pytest.raises(Unreadable, match="32-bit pixels, which have no known range"):
            decode(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
@pytest.mark.parametrize(("background", "expected"), [("white", 255), ("#000", 0)])
def test_transparent_pixels_lie_on_the_background(tmp_path, mode, background, expected):
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (4, 4), (77, 77, 77, 255)).convert(mode)
        image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255, 255, 255]]), 4, 0)))
        image.save(tmp_path / "x.png")
    else:
        pixels = np.full((4, 4), 77, np.uint8)
        pixels[:, 0] = 33
        clear = {"P": 33, "L": 33, "RGB": (33, 33, 33)}[mode]
        image = Image.fromarray(pixels)
        if mode == "P":
            image.putpalette(bytes(v for i in range(256) for v in (i, i, i)))
        else:
            image = image.convert(mode)
        image.save(tmp_path / "x.png", transparency=clear)
    got = np.array(decode(tmp_path / "x.png", background))
    assert (got[:, 0] == expected).all()
    assert (got[:, 1:] == 77).all()


def test_one_pixel_is_an_image_and_a_thread_is_none(tmp_path):
    picture_at(tmp_path / "one.png", size=(1, 1))
    assert (center_crop(decode(tmp_path / "one.png"), 16) == (9, 8, 7)).all()
    with pytest.raises(Unreadable, match="1 x 60000 pixels would be scaled to 256 x 15360000"):
        center_crops(Image.new("RGB", (1, 60000)), [256])


def test_reasons_do_not_depend_on_where_and_when(tmp_path, monkeypatch):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.jpg").touch()
    for name, reason in (
        ("empty.jpg", "no image of a known format"),
        ("gone.jpg", "No such file or directory"),
        ("bomb.png", "DecompressionBombError: Image size .*"),
    ):
        with pytest.raises(Unreadable, match=f"^{reason}$"):
            decode(tmp_path / name)

    def fails(*_):
        raise RuntimeError(f"bad {object()}")

    picture_at(tmp_path / "x.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fails)
    with pytest.raises(Unreadable, match=r"^RuntimeError: bad object$"):
        decode(tmp_path / "x.png")


def test_a_machine_in_trouble_is_no_broken_image(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(InputError, match=r"x\.png cannot be read \(Input/output error\): run the same command again"):
        decode(tmp_path / "x.png")


def test_random_crops_lie_anywhere_in_the_image():
    """Of a picture whose pixels say where they are: scale and place follow from three numbers."""
    rows, columns = np.mgrid[0:80, 0:120].astype(np.uint8)
    image = Image.fromarray(np.stack((rows, columns, rows), 2))
    whole = random_crop(image, 64, (0.999, 0.0, 0.0))  # ceil(64 / 0.8) = 80: not scaled
    np.testing.assert_array_equal(whole, np.asarray(image)[:64, :64])
    corner = random_crop(image, 64, (0.999, 0.999, 0.999))
    np.testing.assert_array_equal(corner, np.asarray(image)[16:, 56:])
    middle = random_crop(image, 64, (0.0, 0.5, 0.5))  # scaled to 64 x 96
    scaled = image.resize((96, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(middle, np.asarray(scaled)[:, 16:80])
    large = random_crop(image.resize((480, 320)), 64, (0.5, 0.5, 0.5))
    assert large.shape == (64, 64, 3)
    shown = {random_crop(image, 64, (u, 0.0, 0.0))[-1, 0, 0] for u in np.linspace(0, 0.999, 17)}
    assert len(shown) > 10 and min(shown) == 63 and max(shown) > 75
