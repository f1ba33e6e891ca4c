"""Folders of images: one reader for all stages, by threads or processes.

One policy holds for images that cannot be read: they are skipped, counted and listed; `strict` stops at the first.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor
from pydantic import AfterValidator
from torch.utils.data import DataLoader, Dataset

from dataset.crops import Unreadable, center_crops, decode, orientation, random_crop, reason
from dataset.listing import ONE_CLASS, Listing, shown
from utils.cli import InputError, counted, note
from utils.distributed import cores
from utils.log import progress
from utils.settings import Settings, setting
from utils.stop import stop_signals

SMALL_FILE = 16384  # bytes; below, handing a file to a thread takes longer than reading it (3.6 times, at 1 KB)
SAMPLE = 256  # headers that are looked at before the work
PATIENCE = 1800  # seconds that reading processes may take for one batch


def _colour(text: str) -> str:
    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise ValueError(f"expected a colour such as white, black or '#808080', got {text!r}") from None
    return text


class ImageSettings(Settings):
    """The settings of every stage that reads images."""

    background: Annotated[str, AfterValidator(_colour)] = setting(
        "white", "colour behind transparent pixels", metavar="COLOUR"
    )
    exif_orientation: bool = setting(False, "turn photos as their EXIF data says; the published pixels are not turned")
    strict: bool = setting(False, "stop at an image that cannot be read instead of skipping it", free=True)

    def image_folder(self, path: str | Path) -> "ImageFolder":
        """An ImageFolder that is read with these settings."""
        return ImageFolder(path, background=self.background, exif_orientation=self.exif_orientation, strict=self.strict)


class ImageFolder(Listing):
    """A folder of images, and how they are read.

    One folder of images a class, deeper folders belonging to it; a folder without class folders is one class. A table of
    files and labels (dataset.listing.read_table) stands for a folder. Classes, and the images in them, are in torchvision's
    sorted order, so image i is the published image i. Raises InputError as Listing does.
    """

    def __init__(
        self, root: str | Path, *, background: str = "white", exif_orientation: bool = False, strict: bool = False
    ) -> None:
        super().__init__(root)
        self.background, self.exif_orientation, self.strict = background, exif_orientation, strict

    def __len__(self) -> int:
        return len(self.paths)

    def evenly_spaced(self, n: int | None) -> np.ndarray:
        """The images of --num-images n, evenly spaced, or all: (n,) int64. Raises InputError where there are fewer."""
        if n and n > len(self):
            raise InputError(f"--num-images {n} is more than the {len(self)} images in {self.root}")
        return evenly_spaced(len(self), n or len(self))

    def read(self, i: int) -> Image.Image:
        """Image i as RGB. Raises Unreadable as decode does."""
        return decode(self.paths[i], self.background, self.exif_orientation)

    def crops(
        self, i: int, sizes: Sequence[int], place: np.ndarray | None = None
    ) -> "list[np.ndarray] | dict[str, Any]":
        """center_crops of image i, or what to record of it if it cannot be read: image, path, reason.

        place: of a random_crop at the first size instead. Raises InputError for one that cannot be read where strict.
        """
        try:
            image = self.read(i)
            return center_crops(image, sizes) if place is None else [random_crop(image, sizes[0], place)]
        except Unreadable as error:
            if self.strict:
                raise InputError(
                    f"{shown(self.paths[i])} cannot be read as an image ({error}): "
                    "replace it, or leave out --strict to skip it"
                ) from None
            return {"image": i, "path": shown(self.names[i]), "reason": str(error)}

    @property
    def has_large_files(self) -> bool:
        """Whether threads read these files faster, judged by the one in the middle."""
        return Path(self.paths[len(self) // 2]).stat().st_size > SMALL_FILE

    def content_id(self) -> str:
        """What tells these images from others, whatever folder they lie in: a sha256 (hex) of names, labels, sizes (20,000
        evenly spaced ones) and the first bytes of 64 of them."""
        digest = hashlib.sha256("\0".join([*self.names, *self.classes]).encode(errors="surrogateescape"))
        digest.update(self.labels.tobytes())
        for i in evenly_spaced(len(self), 20_000):
            try:
                digest.update(Path(self.paths[i]).stat().st_size.to_bytes(8, "little"))
            except OSError:
                digest.update(b"unreadable")
        for i in evenly_spaced(len(self), 64):
            try:
                with open(self.paths[i], "rb") as file:
                    digest.update(file.read(1 << 16))
            except OSError:
                digest.update(b"unreadable")
        return digest.hexdigest()

    def summary(self) -> str:
        """What was found, in one paragraph; opens some headers."""
        names = ", ".join(self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        classes = f"{counted(len(self.classes), 'class')} ({names})"
        if self.classes == [ONE_CLASS]:
            classes = "one class, as there are no class folders"
        parts = [f"{shown(self.root)}: {len(self):,} images in {classes}"]
        if self.left_out:
            parts.append(f"Left out: {self.left_out_text()}")
        if self.nested:
            first = shown(str(Path(self.nested[0]).parent))
            parts.append(f"{len(self.nested):,} images in deeper folders ({first}) belong to the class above them")
        if self.repeated:
            parts.append(f"{self.repeated:,} images are the same file as another one, by links")
        return ". ".join([*parts, *self._sampled()]) + "."

    def _sampled(self) -> list[str]:
        """What some headers say that changes pixels, or that the file is no image."""
        chosen = evenly_spaced(len(self), SAMPLE)
        of = f"of {len(chosen)} sampled images" if len(chosen) < len(self) else f"of {len(self)} images"
        turned = clear = 0
        broken = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in chosen:
                try:
                    with Image.open(self.paths[i]) as image:
                        turned += orientation(image) != 1
                        clear += image.has_transparency_data
                except Exception as error:  # a decoder fails on damaged bytes in any way
                    broken.append(f"{shown(self.names[i])} ({reason(error)[:80]})")
        texts = []
        if turned:
            done = "applied" if self.exif_orientation else "not applied (--exif-orientation applies it)"
            texts.append(f"{turned} {of} have an EXIF orientation, which is {done}")
        if clear:
            texts.append(f"{clear} {of} can be transparent: laid on {self.background} (--background)")
        if broken:
            texts.append(f"{len(broken)} {of} cannot be read and will be skipped: {', '.join(broken[:3])}")
        return texts


def evenly_spaced(n: int, most: int) -> np.ndarray:
    """At most so many of 0 to n - 1, evenly spaced: (min(n, most),) int64."""
    return np.arange(n) if n <= most else np.arange(most) * n // most


class CropRequest(NamedTuple):
    """Images of a folder, and the sides of the centre crops wanted of each; with places (n, 3), one random_crop of each."""

    images: Sequence[int]
    sizes: tuple[int, ...]
    places: np.ndarray | None = None


class CropBatch(NamedTuple):
    """uint8 (n, size, size, 3) for each size; the images (n,) int64 they are of; what to record of those skipped."""

    crops: list[np.ndarray]
    images: np.ndarray
    skipped: list[dict[str, Any]]


class CropReader(Dataset):
    """CropRequest -> CropBatch; each file is decoded once. each: map, or that of a pool of threads.

    hand_over: this is for a reading process, whose crops become tensors in shared memory where there is enough of it. (A
    pipe takes four times as long. Where memory runs out on the way, DataLoader would wait for ever.)
    """

    def __init__(self, folder: ImageFolder, each: Callable[..., Iterator] = map, hand_over: bool = False) -> None:
        self.folder, self.each, self.hand_over = folder, each, hand_over

    def __getitem__(self, request: CropRequest) -> CropBatch:
        sizes, places = request.sizes, repeat(None) if request.places is None else request.places
        results = list(self.each(self.folder.crops, map(int, request.images), repeat(sizes), places))
        images = np.array([i for i, crops in zip(request.images, results, strict=True) if isinstance(crops, list)], int)
        kept = [crops for crops in results if isinstance(crops, list)]
        stacks = [
            np.stack([crops[k] for crops in kept]) if kept else np.empty((0, size, size, 3), np.uint8)
            for k, size in enumerate(sizes)
        ]
        if self.hand_over and shared_memory_left() > 2 * cores() * sum(stack.nbytes for stack in stacks):
            stacks = [torch.from_numpy(stack) for stack in stacks]
        return CropBatch(stacks, images, [row for row in results if isinstance(row, dict)])


def quiet_pillow() -> None:
    """No warnings of odd metadata or large images, of which a large folder has thousands."""
    warnings.filterwarnings("ignore", module="PIL")


def start_reading(_: int) -> None:
    """What a reading process does first. It ends with its parent or when that asks for it, and at nobody else's request: a
    terminal or a scheduler asks both, and a parent that saves needs the images of its last step."""
    quiet_pillow()
    for number in set(stop_signals()) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # os.getppid() is another one where processes come from a fork server

    def end_with_parent() -> None:
        parent.join()
        os._exit(0)

    def end_when_asked() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_asked, daemon=True).start()
    threading.Thread(target=end_with_parent, daemon=True).start()


def shared_memory_left() -> int:
    """Bytes; 0 where there is no /dev/shm."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _unchanged(batch: CropBatch) -> CropBatch:
    return batch


@cache
def reading_processes(asked: int) -> int:
    """At most as many as this process has cores for; a note where that is fewer than asked."""
    most = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if asked > most:
        note(f"--num-workers {asked}: {most} processes read, one for each core")
    return min(asked, most)


def read_crops(
    folder: ImageFolder, requests: Iterable[CropRequest], *, workers: int = 0, threads: int | None = None
) -> Iterator[CropBatch]:
    """The batches of requests, in their order.

    workers: processes that read ahead. 0: this process reads when it is asked, by so many threads (default: its cores).
    An error in one of them is raised here; RuntimeError for a batch that takes more than half an hour.
    """
    quiet_pillow()
    if workers:
        batches = DataLoader(
            CropReader(folder, hand_over=True), batch_size=None, sampler=requests, num_workers=reading_processes(workers),
            worker_init_fn=start_reading, collate_fn=_unchanged, timeout=PATIENCE,
        )  # fmt: skip
        for crops, *others in batches:
            yield CropBatch([np.asarray(stack) for stack in crops], *others)
        return
    threads = threads or cores()
    with ThreadPoolExecutor(threads) as pool:
        each = pool.map if threads > 1 and folder.has_large_files else map
        yield from map(CropReader(folder, each).__getitem__, requests)


def skipped_text(skipped: Sequence[dict[str, Any]], total: int) -> str:
    """Which images could not be read, in one line."""
    first = "; ".join(f"{row['path']} ({row['reason']})" for row in skipped[:3])
    return f"skipped {len(skipped)} of {total} images that cannot be read: {first}{'; ...' if len(skipped) > 3 else ''}"


def check_some_readable(folder: ImageFolder, skipped: Sequence[dict[str, Any]], total: int) -> None:
    """InputError where every image was skipped."""
    if len(skipped) == total:
        raise InputError(f"none of the {total} images of {folder.root} can be read; {skipped_text(skipped, total)}")


def readable_crops(folder: ImageFolder, size: int, show: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The centre crops of all images that can be read, in memory: uint8 (n, size, size, 3), and their numbers (n,) int64.

    The others are skipped, with a note. Raises InputError if none can be read, or one cannot and the folder is strict.
    """
    crops, numbers, skipped = np.empty((len(folder), size, size, 3), np.uint8), [], []
    requests = [
        CropRequest(range(start, min(start + 512, len(folder))), (size,)) for start in range(0, len(folder), 512)
    ]
    with progress(total=len(folder), desc="reading", unit=" images", show=show) as bar:
        for request, batch in zip(requests, read_crops(folder, requests), strict=True):
            crops[len(numbers) : len(numbers) + len(batch.images)] = batch.crops[0]
            numbers += batch.images.tolist()
            skipped += batch.skipped
            bar.update(len(request.images))
    check_some_readable(folder, skipped, len(folder))
    if skipped:
        note(skipped_text(skipped, len(folder)))
    return crops[: len(numbers)], np.array(numbers)


def crops_in_memory(folder: ImageFolder, size: int, show: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The crops of readable_crops, and their labels (n,) int64."""
    crops, numbers = readable_crops(folder, size, show)
    return crops, folder.labels[numbers]
