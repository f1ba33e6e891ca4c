"""Write a batch of real images, evenly spaced over a folder, into an .npz that the evaluator compares with.

    python -m evaluations.c2i.reference imagenet/train REFERENCE.npz --image-size 256 --num-images 50000

Image i of n is image i * N // n of the sorted folder of N, so every class has its share; centre crops as ADM's
(arXiv 2105.05233); labels as `arr_1`. Images that cannot be read are skipped. REFERENCE.json says where all come from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataset.images import CropRequest, ImageFolder, ImageSettings, check_some_readable, read_crops, skipped_text
from dataset.listing import ImagesPath
from utils import cli, samples
from utils.cli import InputError
from utils.files import check_output, check_space, file_lock
from utils.log import progress
from utils.records import Record
from utils.samples import Samples
from utils.settings import ImageSize, PositiveInt, differences, setting

BATCH = 512


class ReferenceSettings(ImageSettings):
    """The settings of a reference; see --help."""

    data_path: ImagesPath = setting(help="a folder of images: one folder a class, or flat", positional=True, free=True)
    out: Path = setting(help="the .npz to write", positional=True, free=True)
    image_size: ImageSize = setting(256)
    num_images: PositiveInt | None = setting(None, "default: all", free=True)  # `chosen` of the record tells


class ReferenceRecord(Record):
    """REFERENCE.json: what the .npz was made of. images: in the .npz; chosen: with those skipped; of: in the folder."""

    data_path: str
    images: int
    of: int
    image_size: int
    classes: list[str]
    chosen: int | None = None
    content_id: str | None = None
    background: str | None = None
    exif_orientation: bool | None = None
    bytes: int | None = None
    skipped: list[dict[str, Any]] = []


def is_complete(out: Path, wanted: ReferenceRecord) -> bool:
    """Whether `out` is the reference that is wanted. InputError if it is another one, or not what its record says."""
    if not out.is_file():
        return False
    advice = "delete it or give another name"
    record = ReferenceRecord.read_if_present(out.with_suffix(".json"))
    if record is None:
        raise InputError(f"{out} exists without its record {out.with_suffix('.json').name}: {advice}")
    old = {key: value for key, value in record.plain().items() if value is not None}
    ignore = ("data_path", "images", "skipped", "bytes", "classes")
    if different := differences(old, wanted.plain(), ignore):
        images = any(line.startswith("content_id") for line in different)
        raise InputError(
            f"{out} is of {'other images' if images else 'other settings'} ({'; '.join(different)}): {advice}"
        )
    if record.bytes not in (None, out.stat().st_size) or Samples(out).shape[0] != record.images:
        raise InputError(f"{out} is damaged (its record says {record.bytes} bytes, {record.images} images): {advice}")
    return True


class SomeUnreadable(Exception):
    """Images that turned out to be unreadable; the file's header had counted them."""


def write(out: Path, folder: ImageFolder, chosen: np.ndarray, size: int) -> list[dict[str, Any]]:
    """Write the crops of the chosen images that can be read; return what to record of the others.

    The .npz begins with the number of images, so it is begun again where one cannot be read.
    """
    skipped: list[dict[str, Any]] = []

    def batches(numbers: np.ndarray) -> Iterator[np.ndarray]:
        parts = np.split(numbers, range(BATCH, len(numbers), BATCH))
        with progress(total=len(numbers), desc="reading", unit=" images") as bar:
            for batch in read_crops(folder, (CropRequest(part, (size,)) for part in parts)):
                skipped.extend(batch.skipped)
                yield batch.crops[0]
                bar.update(len(batch.images))
        if len(numbers) == len(chosen) and skipped:
            raise SomeUnreadable

    try:
        samples.write(out, batches(chosen), (len(chosen), size, size, 3), folder.labels[chosen])
    except SomeUnreadable:
        check_some_readable(folder, skipped, len(chosen))
        good = np.setdiff1d(chosen, [row["image"] for row in skipped])
        samples.write(out, batches(good), (len(good), size, size, 3), folder.labels[good])
    return skipped


def main() -> None:
    s = ReferenceSettings.from_command_line(__doc__)
    out = check_output(s.out, (".npz",))
    folder = s.image_folder(s.data_path)
    chosen = folder.evenly_spaced(s.num_images)
    n = len(chosen)
    cli.note(folder.summary())
    wanted = ReferenceRecord(
        data_path=str(s.data_path), images=n, chosen=n, of=len(folder), image_size=s.image_size, classes=folder.classes,
        content_id=folder.content_id(), background=s.background, exif_orientation=s.exif_orientation,
    )  # fmt: skip
    with file_lock(out):
        if is_complete(out, wanted):
            print(f"{out} is complete already")
            return
        check_space(out.parent, n * 3 * s.image_size**2)
        skipped = write(out, folder, chosen, s.image_size)
        done = {"images": n - len(skipped), "skipped": skipped, "bytes": out.stat().st_size}
        wanted.model_copy(update=done).write(out.with_suffix(".json"))
    if skipped:
        print(skipped_text(skipped, n))
    print(f"wrote {out}: {n - len(skipped)} images of {s.image_size} px in {len(folder.classes)} classes")


if __name__ == "__main__":
    cli.run(main)
