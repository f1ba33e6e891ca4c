"""The emoji as a folder of images: the list, and the drawing where the font is installed."""

from pathlib import Path

import matplotlib
import pytest
from PIL import Image, ImageFont

from dataset import emoji
from dataset.images import ImageFolder
from utils.testing import assert_refused, run_script

LIST = """# group: Smileys & Emotion
1F600                 ; fully-qualified     # 😀 E1.0 grinning face
263A                  ; unqualified         # ☺ E0.6 smiling face
# group: People & Body
1F44B                 ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB           ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
1F441 FE0F 200D 1F5E8 FE0F ; fully-qualified # 👁️‍🗨️ E2.0 eye in speech bubble
"""


@pytest.fixture
def listing(tmp_path):
    (tmp_path / "emoji-test.txt").write_text(LIST, encoding="utf-8")
    return tmp_path / "emoji-test.txt"


def test_the_list_has_groups_and_no_skin_tones(listing):
    found = emoji.read_list(listing)
    assert [(item.group, item.name) for item in found] == [
        ("smileys-emotion", "1f600"), ("people-body", "1f44b"), ("people-body", "1f441-fe0f-200d-1f5e8-fe0f"),
    ]  # fmt: skip
    assert found[0].text == "\U0001f600"


def test_only_what_a_font_has_is_drawn(listing, tmp_path, monkeypatch):
    """With matplotlib's font, which has the first face of the list, in outlines, but no hand and no joined sequence."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    box = ImageFont.truetype(str(path), emoji.STRIKE, layout_engine=ImageFont.Layout.RAQM).getbbox("\U0001f600")
    monkeypatch.setattr(emoji, "BOX", (box[2] - box[0], box[3] - box[1]))
    out = tmp_path / "emoji"
    assert emoji.write_images(out, path, emoji.read_list(listing), 64) == 1
    assert [file.relative_to(out).as_posix() for file in out.rglob("*.png")] == ["smileys-emotion/1f600.png"]
    image = Image.open(out / "smileys-emotion" / "1f600.png")
    assert (image.size, image.mode) == ((64, 64), "RGBA")
    assert image.getpixel((0, 0))[3] == 0 and max(image.getchannel("A").tobytes()) == 255


@pytest.mark.skipif(not emoji.FONT.is_file(), reason=f"{emoji.FONT} is not installed")
def test_what_is_drawn(listing, tmp_path):
    out = tmp_path / "emoji"
    assert emoji.write_images(out, emoji.FONT, emoji.read_list(listing), 64) == 3
    assert ImageFolder(out).classes == ["people-body", "smileys-emotion"]
    image = Image.open(out / "smileys-emotion" / "1f600.png")
    assert (image.size, image.mode) == ((64, 64), "RGBA")
    assert image.getpixel((0, 0))[3] == 0 and image.getpixel((32, 32))[3] == 255


def test_wrong_files_are_one_line(listing, tmp_path):
    result = run_script("dataset/emoji.py", tmp_path / "out", "--font", listing, "--list", listing)
    assert_refused(result, "emoji-test.txt", "cannot be read as a font")
    assert not (tmp_path / "out").exists()
