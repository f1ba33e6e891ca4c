"""Tables of images, and the split into two of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.images import ImageFolder
from dataset.listing import ONE_CLASS, read_table
from dataset.split import held_out, write_table
from utils.cli import InputError


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, format="PNG")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "b.png,dog\na.png,cat\n",
        "image;class\nb.png;dog\na.png;cat\n",
        "\ufefflabel\tother\tFile\r\ndog\tx\tb.png\r\n\r\ncat\ty\ta.png\r\n",
        'file,label\n"b.png",dog\na.png,cat\na.png,cat\nmissing.png,bird\nnotes.txt,dog\n',
    ],
)
def test_a_table_stands_for_a_folder(tmp_path, text):
    for name in ("a.png", "b.png", "notes.txt"):
        picture(tmp_path / name)
    (tmp_path / "t.csv").write_text(text, newline="")
    folder = ImageFolder(tmp_path / "t.csv")
    assert (folder.names, folder.labels.tolist(), folder.classes) == (["a.png", "b.png"], [0, 1], ["cat", "dog"])
    assert folder.read(0).size == (4, 4)
    if "missing" in text:
        assert folder.left_out == {"files that are not there": ["missing.png"], ".txt files": ["notes.txt"]}


def test_files_alone_are_one_class_and_paths_may_be_absolute(tmp_path):
    path = picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "t.csv").write_text(f"{path}\n")
    folder = ImageFolder(tmp_path / "t.csv")
    assert folder.classes == [ONE_CLASS] and folder.paths == [str(path)]
    assert "one class" in folder.summary()


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "is empty"), ("id,label\n1,cat\n", "expected one called file"), ("a,b,c\n1,2,3\n", "expected one called file"),
     ("file,kind\na.png,cat\n", "expected one called label"), ("x.png,cat\n", "no images in"),
     ("file,label\n", "no images in")],
)  # fmt: skip
def test_other_tables_are_one_line(tmp_path, text, part):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=part):
        ImageFolder(tmp_path / "t.csv")


def test_what_is_written_is_read_again_with_odd_names_and_classes_without_images(tmp_path):
    names = ['a, "b".png', "ü.png", "b\udcff.png", "new\nline.png"]
    write_table(tmp_path / "t.csv", names, [0, 0, 2, 2], ["ä b", "none", "c"])
    assert read_table(tmp_path / "t.csv") == [
        (names[0], "ä b"), (names[1], "ä b"), (names[2], "c"), (names[3], "c"), ("", "none"),
    ]  # fmt: skip
    for name in names:
        picture(tmp_path / name)
    folder = ImageFolder(tmp_path / "t.csv")
    assert folder.classes == ["c", "none", "ä b"] and sorted(folder.names) == sorted(names)
    assert sorted(folder.labels.tolist()) == [0, 0, 2, 2]


def test_the_split_follows_from_names_alone():
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(200)]
    labels = np.repeat([0, 1, 2, 3], [150, 46, 3, 1])
    chosen = held_out(names, labels, 0.1, 5000)
    assert [int(chosen[labels == label].sum()) for label in range(4)] == [15, 5, 1, 0]
    order = rng.permutation(200)
    again = held_out([names[i] for i in order], labels[order], 0.1, 5000)
    assert np.array_equal(again, chosen[order])
    assert held_out(names, labels, 0.5, 20).sum() == 15 + 5 + 1  # about 20, at least one of a class that has two
