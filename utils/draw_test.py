"""Pictures: what is drawn where."""

import numpy as np
import pytest
from PIL import Image

from utils.cli import InputError
from utils.draw import curves, image_grid, save_image

GAP = 2
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)


def test_a_grid_holds_every_image_in_reading_order():
    page = np.array(image_grid(IMAGES, columns=3))
    assert page.shape == (2 * (20 + GAP) + GAP, 3 * (30 + GAP) + GAP, 3)
    for i, image in enumerate(IMAGES):
        top, left = GAP + i // 3 * (20 + GAP), GAP + i % 3 * (30 + GAP)
        assert np.array_equal(page[top : top + 20, left : left + 30], image)
        page[top : top + 20, left : left + 30] = 255
    assert (page == 255).all()


def test_enlarged_pixels_stay_sharp():
    page = np.array(image_grid(IMAGES[:1], columns=1, scale=3))
    assert np.array_equal(page[GAP:-GAP, GAP:-GAP], IMAGES[0].repeat(3, axis=0).repeat(3, axis=1))


def test_row_names_stand_under_their_rows_and_hide_nothing():
    plain = np.array(image_grid(IMAGES, columns=3))
    named = np.array(image_grid(IMAGES, columns=3, row_names=["ankle boot", "bag", "a row that is not there"]))
    line = (len(named) - len(plain)) // 2
    assert line > 8
    for row in range(2):
        top, before = row * (20 + GAP + line), row * (20 + GAP)
        width = plain.shape[1]
        assert np.array_equal(named[top : top + 20 + GAP, :width], plain[before : before + 20 + GAP])
        assert (named[top + 20 + GAP : top + 20 + GAP + line] < 128).any()


def test_pictures_are_written_whole(tmp_path):
    save_image(tmp_path / "new" / "grid.png", image_grid(IMAGES, columns=5))
    assert np.array_equal(np.array(Image.open(tmp_path / "new" / "grid.png")), np.array(image_grid(IMAGES, columns=5)))
    curves(
        tmp_path / "loss.png",
        {"training": (range(50), np.linspace(9, 5, 50)), "validation": ([10, 40], [8, 6])},
        x_label="step",
        y_label="loss",
        boundaries={25: "1x1"},
    )
    assert np.array(Image.open(tmp_path / "loss.png").convert("L")).std() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "new"]


@pytest.mark.parametrize("name", ["two\nlines", "\udcff", "$x^", "x" * 10**6, "", "中文"])
def test_names_of_files_and_folders_are_labels(tmp_path, name):
    """Whatever they hold: a manifest's classes, a results folder."""
    assert max(image_grid(IMAGES, columns=5, row_names=[name]).size) < 2000
    curves(tmp_path / "a.png", {name: ([0, 1], [1, 2])}, x_label="x", y_label="y", title=name)
    assert (tmp_path / "a.png").is_file()


def test_a_grid_too_large_is_one_line():
    with pytest.raises(InputError, match="give a smaller --scale or fewer images"):
        image_grid(IMAGES, columns=5, scale=2**31 - 1)


def test_a_picture_too_large_for_its_format_is_one_line(tmp_path):
    for suffix in ("webp", "jpg"):
        with pytest.raises(InputError, match=r"70000 x 1 pixels cannot be written in this format .* ends in .png"):
            save_image(tmp_path / f"a.{suffix}", Image.new("RGB", (70_000, 1)))
    assert not list(tmp_path.iterdir())
