"""Work in parts: files in OUT.parts/, each named after the items in it, so that a command that was cut off resumes."""

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from utils.cli import note


def is_whole(path: Path) -> bool:
    """Whether an .npz is undamaged (sizes and CRC). Reads all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


class Parts:
    """The parts of n items: FOLDER/00000000-00000032.npz holds the items 0 to 31."""

    def __init__(self, out: Path, n: int) -> None:
        self.folder, self.n = out.with_suffix(".parts"), n

    def path(self, part: range) -> Path:
        return self.folder / f"{part.start:08d}-{part.stop:08d}.npz"

    def present(self) -> list[tuple[range, Path]]:
        """The parts that are there, in order; of two that overlap the first."""
        found, at = [], 0
        for path in sorted(self.folder.glob("*.npz")):
            if match := re.fullmatch("([0-9]+)-([0-9]+)", path.stem):
                first, stop = map(int, match.groups())
                if at <= first < stop <= self.n:
                    found.append((range(first, stop), path))
                    at = stop
        return found

    def missing(self, batch: int, holds: Callable[[range, Path], bool]) -> list[range]:
        """The items that are not there, in ranges of at most `batch`; files that do not hold their items are removed first."""
        for part, path in self.present():
            if not holds(part, path):
                note(f"{path} is damaged or of other images: making it again")
                path.unlink()
        gaps, at = [], 0
        for first, stop in [*((part.start, part.stop) for part, _ in self.present()), (self.n, self.n)]:
            gaps += [range(start, min(first, start + batch)) for start in range(at, first, batch)]
            at = stop
        return gaps

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
