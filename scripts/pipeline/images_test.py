"""Folders as people have them: what the pipeline makes of them, or the one line that refuses them."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dataset.images import ImageFolder
from scripts.pipeline.images import Images, open_images
from scripts.pipeline.settings import PipelineSettings
from utils.cli import InputError, explain


def pictures(folder: Path, n: int, side: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (side + 5, side), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def find(tmp_path) -> Callable[[Path], Images]:
    """open_images of a path, for the folder `run`."""
    (tmp_path / "run").mkdir()
    return lambda path: open_images(PipelineSettings(images=path), tmp_path / "run")


def check(images, classes: list[str], train: int, test: int) -> None:
    images.write()
    folders = [ImageFolder(path) for path in (images.train, images.test)]
    assert [len(folder) for folder in folders] == [train, test] == [images.train_names, images.test_names]
    assert folders[0].classes == folders[1].classes == classes == images.classes
    assert not set(folders[0].paths) & set(folders[1].paths)
    assert folders[0].read(0).size == (25, 20)


def test_class_folders_with_odd_names_links_and_few_images(find, tmp_path):
    root = tmp_path / "Mes photos d'été"
    pictures(root / "äußerst gut" / "deep er", 20)
    pictures(root / "three", 3)
    shutil.copytree(root / "three", tmp_path / "elsewhere")
    (root / 'link, "quoted"').symlink_to(tmp_path / "elsewhere")
    (root / "three" / "notes.txt").touch()
    images = find(root)
    check(images, ['link, "quoted"', "three", "äußerst gut"], 18 + 2 + 2, 2 + 1 + 1)
    assert images.left_out == {".txt files": ["three/notes.txt"]} and images.side == 20
    again = find(root)
    assert again.content == images.content
    moved = root.rename(tmp_path / "moved")
    images = find(moved)
    assert images.content == again.content
    check(images, again.classes, 22, 4)  # the link to the images follows


def test_train_beside_test_is_taken_as_it_is(find, tmp_path):
    for part, n in (("Train", 20), ("val", 5)):
        pictures(tmp_path / "set" / part / "a", n)
        pictures(tmp_path / "set" / part / "b", n)
    images = find(tmp_path / "set")
    check(images, ["a", "b"], 40, 10)
    assert not list((tmp_path / "run").iterdir())
    pictures(tmp_path / "set" / "val" / "c", 2)
    with pytest.raises(InputError, match="different classes: c"):
        find(tmp_path / "set")


def test_a_flat_folder_a_zip_with_a_folder_around_it_and_a_table(find, tmp_path):
    check(find(pictures(tmp_path / "flat", 30)), ["all"], 27, 3)
    pictures(tmp_path / "set" / "a", 10)
    pictures(tmp_path / "set" / "b", 10)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in sorted((tmp_path / "set").rglob("*.png")):
            file.write(path, path.relative_to(tmp_path))
    check(find(tmp_path / "set.zip"), ["a", "b"], 18, 2)
    (tmp_path / "t.csv").write_text("file,label\n" + "".join(f"flat/{i}.png,{'ab'[i % 2]}\n" for i in range(20)))
    check(find(tmp_path / "t.csv"), ["a", "b"], 18, 2)


def test_bad_folders_are_one_line(find, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    for i in range(20):
        (broken / f"{i}.png").write_bytes(b"no image")
    (tmp_path / "file.txt").touch()
    cases = {
        empty: "no images in",
        pictures(tmp_path / "one", 1): "holds 1 image; expected at least 16",
        broken: "none of 20 images of .* can be read: 0.png",
        tmp_path / "nowhere": "there is no such path; expected a folder",
        tmp_path / "file.txt": "expected a folder, a file that ends in .csv",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message):
            find(path)
    for i in range(20):
        pictures(tmp_path / "single" / f"class {i}", 1)
    with pytest.raises(InputError, match="one image a class"):
        find(tmp_path / "single")


def test_a_folder_that_may_not_be_read_is_one_line(find, tmp_path, monkeypatch):
    root, scandir = pictures(tmp_path / "set" / "a", 20).parent, os.scandir

    def refuse(path):
        if Path(path) == root:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError) as error:
        find(root)
    assert f"{root}: Permission denied; change its permissions" in explain(error.value)


def test_some_broken_images_are_passed_over(find, tmp_path):
    root = pictures(tmp_path / "set", 20)
    (root / "3.png").write_bytes(b"no image")
    images = find(root)
    assert images.side == 20 and images.train_names + images.test_names == 20
