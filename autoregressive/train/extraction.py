"""What extraction does between the folder of images and the writer of codes: read, crop, encode, hand over.

Work is cut into chunks of consecutive images of one shard, so that which images are encoded together depends on nothing
but the settings. Shapes: N images, V views, L codes a view, c the side of a centre crop.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.codes import Manifest, Writer
from dataset.images import ImageFolder, Unreadable, are_large, center_crops, cut_views, decode
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.cli import InputError
from utils.distributed import World, autocast
from utils.log import progress
from utils.pixels import to_float

FULL_MAPS = 6  # the encoder's peak, in feature maps of its first convolution (5.4 measured on a CPU)
MOST_VIEWS = 128  # encoded at once; more is no faster
CPU_BYTES = 1 << 28  # feature maps of a CPU's batch; more is no faster


def fitting_batch(config: VQConfig, image_size: int, device: torch.device) -> int:
    """Views to encode at once: a power of two, the same on all devices of a kind. On GPUs they take half of the memory."""
    room = torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else CPU_BYTES
    view = 4 * config.ch * (image_size // config.fold) ** 2 * FULL_MAPS
    return 1 << (min(MOST_VIEWS, max(1, room // view)).bit_length() - 1)


def crop_side(manifest: Manifest) -> int:
    """The side of the centre crop that views are cut from."""
    return int(manifest.image_size * (manifest.crop_range or 1))


class Chunk(NamedTuple):
    """Consecutive images of a shard, and which of the writers want them."""

    shard: int
    images: range
    writers: tuple[int, ...]
    last: bool  # of its shard


def missing_shards(writers: list[Writer], here: World) -> dict[int, tuple[int, ...]]:
    """The shards that are not there: which writers lack each. Every process checks a part of them and hears of all."""
    shards = range(writers[0].manifest.shards)[here.share(writers[0].manifest.shards)]
    lacking = {s: tuple(i for i, writer in enumerate(writers) if not writer.has(s)) for s in shards}
    parts = [lacking]
    if here.size > 1:
        parts = [None] * here.size
        dist.all_gather_object(parts, lacking)
    return {shard: lack for part in parts for shard, lack in part.items() if lack}


def chunks_of(shards: dict[int, tuple[int, ...]], writers: list[Writer], batch_size: int) -> list[Chunk]:
    """Shards cut into chunks of about batch_size views, at least one image."""
    chunks = []
    for shard, wanted in shards.items():
        rows = writers[0].manifest.rows(shard)
        step = max(1, batch_size // sum(writers[i].manifest.views for i in wanted))
        for start in range(rows.start, rows.stop, step):
            images = range(start, min(start + step, rows.stop))
            chunks.append(Chunk(shard, images, wanted, images.stop == rows.stop))
    return chunks


class Crops(Dataset):
    """Chunk k -> k; crops (N, c, c, 3) uint8 for each of its writers; and what to record of the images that have none.

    Each file is read and decoded once, for all crop ranges; by `threads` where files are large.
    """

    def __init__(
        self, folder: ImageFolder, chunks: list[Chunk], sides: list[int], strict: bool = False, threads: int = 1
    ) -> None:
        self.folder, self.chunks, self.sides, self.strict = folder, chunks, sides, strict
        self.threads = threads if are_large(folder.paths) else 1

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, item: int) -> tuple[int, list[Tensor], list[dict[str, Any]]]:
        chunk = self.chunks[item]
        sides = [self.sides[i] for i in chunk.writers]
        found = list(self._map(partial(self.read, sides=sides), chunk.images))
        crops = [image for image in found if isinstance(image, list)]
        stacked = [
            torch.from_numpy(
                np.stack([image[k] for image in crops]) if crops else np.empty((0, side, side, 3), np.uint8)
            )
            for k, side in enumerate(sides)
        ]
        return item, stacked, [row for row in found if isinstance(row, dict)]

    def _map(self, call: Callable, items: range) -> Iterator:
        """map, by threads that are made at the first use: a process of its own makes its own."""
        if self.threads == 1:
            return map(call, items)
        if "pool" not in vars(self):
            self.pool = ThreadPoolExecutor(self.threads)
        return self.pool.map(call, items)

    def read(self, i: int, sides: list[int]) -> list[np.ndarray] | dict[str, Any]:
        """The crops of image i, or what to record of it. Raises InputError for one that is unreadable, where strict."""
        try:
            return center_crops(decode(self.folder.paths[i]), sides)
        except Unreadable as error:
            if self.strict:
                raise InputError(
                    f"{self.folder.paths[i]} cannot be read as an image ({error}): "
                    "replace it, or leave out --strict to skip it and go on"
                ) from None
            return {"image": i, "path": self.folder.names[i], "reason": str(error)}


def quiet_pillow(*_: object) -> None:
    """No warnings of odd metadata or large images, of which a large folder has thousands. (Also for a worker.)"""
    warnings.filterwarnings("ignore", module="PIL")


def as_it_is(item: tuple) -> tuple:
    return item


def reads(crops: Crops, workers: int, device: torch.device) -> DataLoader:
    """Chunks in their order, read ahead by so many processes; by this one's threads, between encodings, for none."""
    return DataLoader(
        crops, batch_size=None, num_workers=workers, worker_init_fn=quiet_pillow, collate_fn=as_it_is,
        pin_memory=device.type == "cuda",
    )  # fmt: skip


class Encoder:
    """uint8 crops -> codes, batch_size views at a time."""

    def __init__(
        self, tokenizer: VQModel, device: torch.device, *, batch_size: int, precision: torch.dtype, compiled: bool
    ) -> None:
        self.tokenizer = tokenizer.to(device, memory_format=torch.channels_last)
        self.device, self.batch_size, self.precision, self.compiled = device, batch_size, precision, compiled
        self.encode = torch.compile(tokenizer.encode, dynamic=False) if compiled else tokenizer.encode

    @torch.inference_mode()
    def codes(self, crops: list[Tensor], size: int, mode: str) -> Tensor:
        """Crops (N, c, c, 3) uint8, one tensor a crop range -> codes (N, V, L) int32 on the device, in their order."""
        views_NVHWC = torch.cat([cut_views(c.to(self.device, non_blocking=True), size, mode) for c in crops], 1)
        n, v = views_NVHWC.shape[:2]
        parts = [self._encode(part) for part in views_NVHWC.flatten(0, 1).split(self.batch_size)]
        return torch.cat(parts).view(n, v, -1)

    def _encode(self, views_BHWC: Tensor) -> Tensor:
        b = len(views_BHWC)
        if self.compiled and b < self.batch_size:  # one shape, so one compilation
            views_BHWC = torch.cat((views_BHWC, views_BHWC[-1:].expand(self.batch_size - b, -1, -1, -1)))
        images_BCHW = to_float(views_BHWC).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            return self.encode(images_BCHW)[:b].flatten(1).int()


@dataclass
class Shard:
    """What there is of a shard so far."""

    codes: list[Tensor] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


class Behind:
    """Does one thing at a time in another thread; the next one waits for it, and hears of its error."""

    def __init__(self) -> None:
        self._pool, self._last = ThreadPoolExecutor(1), Future()
        self._last.set_result(None)

    def submit(self, call: Callable[[], None]) -> None:
        self._last.result()
        self._last = self._pool.submit(call)

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._last.result()


def hand_over(writers: list[Writer], chunk: Chunk, shard: Shard, labels: np.ndarray) -> None:
    """Write a shard by each of the writers that want it."""
    gaps = {row["image"] for row in shard.skipped}
    rows = writers[0].manifest.rows(chunk.shard)
    labels = labels[[i for i in rows if i not in gaps]]
    if shard.codes:
        codes_NVL = torch.cat(shard.codes).cpu().numpy()
    else:
        m = writers[0].manifest
        codes_NVL = np.empty((0, sum(writers[i].manifest.views for i in chunk.writers), m.tokens), np.int32)
    first = 0
    for writer in (writers[i] for i in chunk.writers):
        views = writer.manifest.views
        writer.write(chunk.shard, codes_NVL[:, first : first + views], labels, shard.skipped)
        first += views


def extract(
    folder: ImageFolder,
    chunks: list[Chunk],
    writers: list[Writer],
    encoder: Encoder,
    *,
    workers: int,
    strict: bool,
    show: bool,
) -> None:
    """Write the shards that the chunks make up, in order, while the next ones are read and encoded.

    Raises InputError for an image that is unreadable where strict, and for a file that cannot be written.
    """
    m = writers[0].manifest
    threads = 1 if workers else min(os.cpu_count() or 1, torch.get_num_threads())
    crops = Crops(folder, chunks, [crop_side(writer.manifest) for writer in writers], strict, threads)
    shard = Shard()
    total = sum(len(chunk.images) for chunk in chunks)
    with Behind() as behind, progress(total=total, unit=" images", desc="codes", show=show) as bar:
        for item, pixels, skipped in reads(crops, workers, encoder.device):
            chunk = chunks[item]
            shard.skipped += skipped
            if len(pixels[0]):
                shard.codes.append(encoder.codes(pixels, m.image_size, m.view_mode))
            bar.update(len(chunk.images))
            if chunk.last:
                behind.submit(partial(hand_over, writers, chunk, shard, folder.labels))
                shard = Shard()
