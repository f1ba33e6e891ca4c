"""Noto Color Emoji as a folder of images, a class for each group of Unicode's emoji: some 1,900 pictures of 64 px.

    python -m dataset.emoji runs/emoji

The font comes from Debian's package `fonts-noto-color-emoji`, the groups from `unicode-data`: where they are installed,
else from those packages by apt (unpacked in a temporary folder, nothing is installed). Emoji in a skin tone are left out,
as they repeat the same picture. Transparent pixels stay so.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from dataset.fashion_mnist import from_apt
from utils import cli
from utils.cli import InputError
from utils.files import atomic_folder, check_folder, file_lock
from utils.log import progress
from utils.settings import ExistingFile, PositiveInt, Settings, setting

PACKAGES = ("fonts-noto-color-emoji", "unicode-data")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
STRIKE = 109  # the only size of the font's bitmaps
BOX = (136, 128)  # pixels of one of them
SKIN_TONES = range(0x1F3FB, 0x1F400)


class Emoji(NamedTuple):
    """A sequence of code points, the class it is in, and a name for its file."""

    text: str
    group: str
    name: str


def read_list(path: Path) -> list[Emoji]:
    """The fully qualified emoji of Unicode's emoji-test.txt, without those in a skin tone. Raises InputError."""
    found, group = [], ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := re.match(r"# group: (.+)", line):
            group = re.sub(r"\W+", "-", match[1]).strip("-").lower()
        elif match := re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)", line):
            points = [int(point, 16) for point in match[1].split()]
            if not any(point in SKIN_TONES for point in points):
                name = "-".join(f"{point:x}" for point in points)
                found.append(Emoji("".join(map(chr, points)), group, name))
    if not found:
        raise InputError(f"{path} lists no emoji: expected Unicode's emoji-test.txt")
    return found


@contextmanager
def sources(font: Path | None, listing: Path | None) -> Iterator[tuple[Path, Path]]:
    """The font and the list: given, installed, or from Debian's packages. Raises InputError where they cannot be had."""
    found = [font or FONT, listing or LIST]
    with tempfile.TemporaryDirectory() as temporary:
        for i, package in enumerate(PACKAGES):
            if not found[i].is_file():
                print(f"getting {package}: from apt", flush=True)
                found[i] = from_apt(package, found[i], Path(temporary))
            if not found[i].is_file():
                raise InputError(
                    f"Debian's package {package} cannot be had here: give --font and --list, where they are at hand"
                )
        yield found[0], found[1]


def draw(font: ImageFont.FreeTypeFont, text: str, size: int) -> Image.Image | None:
    """An emoji, RGBA of size x size pixels; None for one that the font draws in pieces or not at all."""
    box = font.getbbox(text)
    if box[2] - box[0] != BOX[0]:
        return None
    page = Image.new("RGBA", (max(BOX), max(BOX)), (255, 255, 255, 0))
    ImageDraw.Draw(page).text((0, (max(BOX) - BOX[1]) // 2 - box[1]), text, font=font, embedded_color=True)
    return page.resize((size, size), Image.Resampling.LANCZOS) if page.getbbox() else None


def write_images(out: Path, font_path: Path, emoji: list[Emoji], size: int) -> int:
    """OUT/GROUP/CODEPOINTS.png for each emoji that the font has; returns their number. The folder appears when it is whole."""
    if not features.check("raqm"):
        raise InputError("this Pillow cannot join emoji sequences (it has no raqm): pip install --upgrade pillow")
    try:
        font = ImageFont.truetype(str(font_path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise InputError(f"{font_path} cannot be read as a font with bitmaps of {STRIKE} px ({error})") from None
    number = 0
    with atomic_folder(out) as unfinished:
        for item in progress(emoji, desc="drawing", unit=" emoji"):
            image = draw(font, item.text, size)
            if image is not None:
                (unfinished / item.group).mkdir(exist_ok=True)
                image.save(unfinished / item.group / f"{item.name}.png")
                number += 1
        if not number:
            raise InputError(f"{font_path} draws none of these emoji")
    return number


class EmojiSettings(Settings):
    """The settings of this command; see --help."""

    out: Path = setting(help="folder to write a folder a group to", positional=True)
    size: PositiveInt = setting(64, "side of the images in pixels")
    font: ExistingFile | None = setting(None, "NotoColorEmoji.ttf, where it is at hand")
    list: ExistingFile | None = setting(None, "emoji-test.txt, where it is at hand")


def main() -> None:
    s = EmojiSettings.from_command_line(__doc__)
    out = check_folder(s.out)
    if s.size > 1024:
        raise InputError(f"--size {s.size}: expected at most 1024, as the font's bitmaps have {BOX[1]} px")
    with file_lock(out):
        if out.is_dir() and any(out.iterdir()):
            print(f"{out} is there already")
            return
        with sources(s.font, s.list) as (font, listing):
            number = write_images(out, font, read_list(listing), s.size)
        print(f"wrote {out}: {number} images")


if __name__ == "__main__":
    cli.run(main)
