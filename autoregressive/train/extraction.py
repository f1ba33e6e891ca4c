"""What extraction does between the folder of images and the writer of codes: read, crop, encode, hand over.

Work is cut into chunks of consecutive images of one shard, so that which images are encoded together depends on nothing
but the settings. Shapes: N images, V views, L codes a view, c the side of a centre crop.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dataset.codes import Manifest, Writer
from dataset.crops import cut_views
from dataset.images import CropRequest, ImageFolder, read_crops
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.distributed import World, autocast, cores
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


def default_workers(device: torch.device) -> int:
    """Reading processes of this process: all cores but one on a GPU's machine, none on a CPU."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, cores() // local - 1) if device.type == "cuda" else 0


def convolution_precision(precision: str, device: torch.device) -> str:
    """What convolutions compute in: `tf32` at precision fp32 on GPUs that have it, as the published codes were made."""
    tf32 = (
        device.type == "cuda" and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device)[0] >= 8
    )
    return "tf32" if precision == "fp32" and tf32 else precision


def crop_side(manifest: Manifest) -> int:
    """The side of the centre crop that views are cut from."""
    return int(manifest.image_size * (manifest.crop_range or 1))


class Chunk(NamedTuple):
    """Consecutive images of a shard, and which of the writers want them."""

    shard: int
    images: range
    writers: tuple[int, ...]
    last: bool  # of its shard


def missing_shards(writers: list[Writer], world: World) -> dict[int, tuple[int, ...]]:
    """The shards that are missing: which writers lack each. Every process checks a part and learns the result of all."""
    shards = writers[0].manifest.own_shards
    shards = shards[world.share(len(shards))]
    lacking = {s: tuple(i for i, writer in enumerate(writers) if not writer.has(s)) for s in shards}
    parts = [lacking]
    if world.size > 1:
        parts = [None] * world.size
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
    """The codes and skipped images of a shard so far."""

    codes: list[Tensor] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


class BackgroundWriter:
    """Runs one call at a time in another thread; the next submit() waits for it, and raises its error."""

    def __init__(self) -> None:
        self._pool, self._last = ThreadPoolExecutor(1), Future()
        self._last.set_result(None)

    def submit(self, call: Callable[[], None]) -> None:
        self._last.result()
        self._last = self._pool.submit(call)

    def __enter__(self) -> "BackgroundWriter":
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
    folder: ImageFolder, chunks: list[Chunk], writers: list[Writer], encoder: Encoder, *, workers: int, show: bool
) -> None:
    """Write the shards that the chunks make up, in order, while the next ones are read and encoded.

    Raises InputError for an image that is unreadable where the folder is strict, and for a file that cannot be written.
    """
    m = writers[0].manifest
    sides = [crop_side(writer.manifest) for writer in writers]
    requests = [CropRequest(chunk.images, tuple(sides[i] for i in chunk.writers)) for chunk in chunks]
    batches = read_crops(folder, requests, workers=workers, threads=min(cores(), torch.get_num_threads()))
    shard = Shard()
    total = sum(len(chunk.images) for chunk in chunks)
    with BackgroundWriter() as writer, progress(total=total, unit=" images", desc="codes", show=show) as bar:
        for chunk, batch in zip(chunks, batches, strict=True):
            shard.skipped += batch.skipped
            if len(batch.images):
                crops = [torch.from_numpy(crops) for crops in batch.crops]
                shard.codes.append(encoder.codes(crops, m.image_size, m.view_mode))
            bar.update(len(chunk.images))
            if chunk.last:
                writer.submit(partial(hand_over, writers, chunk, shard, folder.labels))
                shard = Shard()
