"""Images to codes: encode an ImageFolder with a frozen tokenizer into `CODE_PATH/{dataset}{size}_codes`.

    bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt vq_ds16_c2i.pt --data-path imagenet/train \
        --code-path codes --ten-crop --crop-range 1.1 --image-size 256

Several crop ranges in one pass (`--crop-range 1.1 1.05`) go to `CODE_PATH/crop-1.1` and `CODE_PATH/crop-1.05`. Whole
shards go to processes; a finished shard is never redone, so the same command completes a run that was killed, on any
number of processes. An image that cannot be read is skipped and listed in the manifest.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256 as digest
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from dataset.codes import LAYOUTS, SHARD_SIZE, Manifest, Place, Writer
from dataset.crops import VIEWS, cut_views
from dataset.images import CropRequest, ImageFolder, ImageSettings, read_crops, skipped_text
from dataset.listing import ImagesPath
from pretrained_models.catalogue import WeightsFile
from tokenizer.tokenizer_image.vq_model import Tokenizer, VQConfig, VQModel
from utils import cli
from utils.distributed import World, autocast, best_device, cores, join_world, precision_dtype
from utils.files import check_folder, file_lock, sha256
from utils.log import progress
from utils.machine import keep_freed_memory, use_compile
from utils.pixels import to_float
from utils.settings import Count, ImageSize, Positive, PositiveInt, one_of, setting

CROP_RANGE = 1.1
FULL_MAPS = 6  # the encoder's peak, in feature maps of its first convolution (5.4 measured on a CPU)
MOST_VIEWS = 128  # encoded at once; more is no faster
CPU_BYTES = 1 << 28  # feature maps of a CPU's batch; more is no faster


class ExtractionSettings(ImageSettings):
    """The settings of an extraction; see --help."""

    data_path: ImagesPath = setting(help="a folder of images: one folder a class, or flat", free=True)
    code_path: Path = setting(help="folder to write to", free=True)
    vq_model: str | None = setting(
        None, "insist on this tokenizer preset; default: what the file says, VQ-16 if it doesn't"
    )
    vq_ckpt: WeightsFile = setting(help="tokenizer weights", metavar="WEIGHTS")
    dataset: str = setting("imagenet", "name of the data set in the folders' names")
    image_size: ImageSize = setting(256)
    ten_crop: bool = setting(False, "ten views an image: corners and centre, and their mirror images")
    crop_range: list[Positive] | None = setting(
        None,
        f"ten crops are cut from int(size * this), default {CROP_RANGE}; several: each in a folder of its own, from one "
        "reading",
    )
    no_flip: bool = setting(False, "one view an image; without it (and --ten-crop), a mirrored one too")
    layout: one_of(LAYOUTS) = setting("packed", "packed shards, or one file an image as published")
    shard_size: PositiveInt = setting(SHARD_SIZE, "images a packed shard")
    part: str = setting(
        "",
        "2/4: only the second of four parts, on a machine that shares no folder with the others; then python -m dataset.codes "
        "merge",
        metavar="K/N",
    )
    batch_size: PositiveInt | None = setting(
        None, "views encoded at once; default: what the memory is good for", free=True
    )
    num_workers: Count | None = setting(
        None,
        "processes that read images, for each one that encodes; default: all cores on a GPU's machine, 0 on a CPU, where "
        "threads read between encodings",
        free=True,
    )
    precision: one_of(("fp32", "bf16")) = setting("fp32", "with bf16 some codes are others")
    compile: bool | None = setting(None, "torch.compile (default: on GPUs)", free=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        ranges = self.crop_range or []
        if ranges and not self.ten_crop:
            raise ValueError("--crop-range has no effect without --ten-crop: add --ten-crop, or leave --crop-range out")
        if self.no_flip and self.ten_crop:
            raise ValueError(
                "--no-flip has no effect with --ten-crop, half of whose views are mirrored: give one of them"
            )
        if not self.dataset or "/" in self.dataset:
            raise ValueError(f"--dataset {self.dataset!r}: expected a name without /")
        number, _, parts = self.part.partition("/")
        if self.part and not (re.fullmatch(r"[1-9]\d{0,5}/[1-9]\d{0,5}", self.part) and int(number) <= int(parts)):
            raise ValueError(f"--part {self.part}: expected K/N with K from 1 to N, such as 2/4")
        for one in ranges:
            if one < 1:
                raise ValueError(f"--crop-range {one:g}: expected at least 1, ten crops are cut from a larger image")
            same = [other for other in ranges if int(self.image_size * other) == int(self.image_size * one)]
            if len(same) > 1:
                raise ValueError(
                    f"--crop-range {' '.join(f'{other:g}' for other in same)}: at --image-size {self.image_size} these are "
                    f"the same crop of {int(self.image_size * one)} px; give one of them"
                )
        return self

    @property
    def crop_ranges(self) -> list[float] | list[None]:
        """What the crops are cut from, None where there is one crop."""
        return (self.crop_range or [CROP_RANGE]) if self.ten_crop else [None]

    def place(self, manifest: Manifest) -> Place:
        """The published place for one crop range, a folder in it for each of several."""
        several = len(self.crop_ranges) > 1
        root = self.code_path / f"crop-{manifest.crop_range:g}" if several else self.code_path
        return Place(root, self.dataset, self.image_size)


def manifests(s: ExtractionSettings, folder: ImageFolder, tokenizer: Tokenizer) -> list[Manifest]:
    """The manifests to complete, one for each crop range."""
    paths = "\n".join(folder.names).encode(errors="surrogateescape")
    mode = "ten-crop" if s.ten_crop else "single" if s.no_flip else "flip"
    tokenizer_sha256, paths_sha256 = sha256(s.vq_ckpt), digest(paths).hexdigest()
    return [
        Manifest(
            dataset=s.dataset,
            image_size=s.image_size,
            images=len(folder),
            views=VIEWS[mode],
            tokens=(s.image_size // tokenizer.downsample) ** 2,
            codebook_size=tokenizer.config.codebook_size,
            layout=s.layout,
            shard_size=s.shard_size,
            part=s.part,
            view_mode=mode,
            crop_range=crop_range,
            vq_model=tokenizer.about["vq_model"],
            tokenizer_sha256=tokenizer_sha256,
            classes=folder.classes,
            precision=s.precision,
            paths_sha256=paths_sha256,
            convolutions=convolution_precision(s.precision, best_device()),
            background=s.background,
            exif_orientation=s.exif_orientation,
        )
        for crop_range in s.crop_ranges
    ]


def convolution_precision(precision: str, device: torch.device) -> str:
    """What convolutions compute in: `tf32` at precision fp32 on GPUs that have it, as the published codes were made."""
    tf32 = (
        device.type == "cuda" and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device)[0] >= 8
    )
    return "tf32" if precision == "fp32" and tf32 else precision


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


def fitting_batch(config: VQConfig, image_size: int, device: torch.device) -> int:
    """Views to encode at once: a power of two, the same on all devices of a kind. On GPUs they take half of the memory."""
    room = torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else CPU_BYTES
    view = 4 * config.ch * (image_size // config.fold) ** 2 * FULL_MAPS
    return 1 << (min(MOST_VIEWS, max(1, room // view)).bit_length() - 1)


def encoder_of(s: ExtractionSettings, tokenizer: VQModel, world: World) -> Encoder:
    compiled = use_compile(s.compile, world.device)
    batch_size = s.batch_size or fitting_batch(tokenizer.config, s.image_size, world.device)
    dtype = precision_dtype(s.precision, world.device)
    return Encoder(tokenizer, world.device, batch_size=batch_size, precision=dtype, compiled=compiled)


def missing_shards(writers: list[Writer], world: World) -> dict[int, list[Writer]]:
    """The shards that are missing, in order, and the writers that lack each. Every process checks a part of them."""
    shards = writers[0].manifest.own_shards
    shards = shards[world.share(len(shards))]
    lacking = {shard: [i for i, writer in enumerate(writers) if not writer.has(shard)] for shard in shards}
    parts = [lacking]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, lacking)
    return {shard: [writers[i] for i in lack] for part in parts for shard, lack in part.items() if lack}


def crop_side(manifest: Manifest) -> int:
    """The side of the centre crop that views are cut from."""
    return int(manifest.image_size * (manifest.crop_range or 1))


def requests_of(shard: int, writers: list[Writer], batch_size: int) -> list[CropRequest]:
    """The images of a shard in parts of about batch_size views, at least one image: what is encoded together depends on
    nothing but the settings."""
    images = writers[0].manifest.rows(shard)
    step = max(1, batch_size // sum(writer.manifest.views for writer in writers))
    sides = tuple(crop_side(writer.manifest) for writer in writers)
    return [CropRequest(images[start : start + step], sides) for start in range(0, len(images), step)]


def write_shard(
    shard: int, writers: list[Writer], codes_NVL: list[Tensor], labels: np.ndarray, skipped: list[dict]
) -> None:
    """Write a shard, whose codes come in parts of its images, by each of the writers: the views of one after the other's."""
    parts = torch.cat(codes_NVL).cpu().split([writer.manifest.views for writer in writers], dim=1)
    for writer, part in zip(writers, parts, strict=True):
        writer.write(shard, part.numpy(), labels, skipped)


def extract(
    folder: ImageFolder, missing: dict[int, list[Writer]], encoder: Encoder, *, workers: int, show: bool
) -> None:
    """Write each shard by the writers that lack it, in another thread, while the next one is read and encoded.

    Raises InputError for an image that is unreadable where the folder is strict, OSError for a file that cannot be written.
    """
    requests = {shard: requests_of(shard, writers, encoder.batch_size) for shard, writers in missing.items()}
    flat = list(chain.from_iterable(requests.values()))
    batches = read_crops(folder, flat, workers=workers, threads=min(cores(), torch.get_num_threads()))
    total = sum(len(request.images) for request in flat)
    with ThreadPoolExecutor(1) as pool, progress(total=total, unit=" images", desc="codes", show=show) as bar:
        writing = pool.submit(lambda: None)
        for shard, writers in missing.items():
            m, views = writers[0].manifest, sum(writer.manifest.views for writer in writers)
            codes = [torch.empty(0, views, m.tokens, dtype=torch.int32, device=encoder.device)]
            images, skipped = [], []
            for request in requests[shard]:
                batch = next(batches)
                if len(batch.images):
                    crops = [torch.from_numpy(crops) for crops in batch.crops]
                    codes.append(encoder.codes(crops, m.image_size, m.view_mode))
                images += batch.images.tolist()
                skipped += batch.skipped
                bar.update(len(request.images))
            writing.result()  # raises its error
            writing = pool.submit(write_shard, shard, writers, codes, folder.labels[images], skipped)
        writing.result()


def finish(writers: list[Writer], todo: list[Writer]) -> None:
    """Write the manifests of the writers that had something to do, and print which codes there are now."""
    for writer in writers:
        m, place = writer.finish() if writer in todo else writer.before, writer.place
        what = "is written" if writer in todo else "is complete already"
        print(f"{place.codes} {what}: {len(m.numbers)} images, {m.views} views of {m.tokens} codes")
        if m.skipped:
            print(f"{skipped_text(m.skipped, m.images)}. Their numbers stay free; {place.manifest} lists them")
    if len(writers) > 1:
        print("train on both by --code-path", *(writer.place.root for writer in writers))


def work(s: ExtractionSettings, folder: ImageFolder, writers: list[Writer], tokenizer: VQModel, world: World) -> None:
    """Extract what is missing, as one of the processes."""
    missing = missing_shards(writers, world)
    shards = {writer: sum(writer in lack for lack in missing.values()) for writer in writers}
    todo = [writer for writer in writers if writer.under_way or shards[writer]]
    world.barrier()  # before it changes, every process has seen which shards are missing
    if world.is_main:
        for writer in todo:
            writer.check_space(shards[writer])
            writer.start()
    encoder = encoder_of(s, tokenizer, world)
    world.barrier()
    if 0 < len(missing) < world.size:
        cli.note(
            f"{len(missing)} shards for {world.size} processes: a smaller --shard-size would give all of them work"
        )
    mine = dict(list(missing.items())[world.rank :: world.size])
    workers = s.num_workers
    if workers is None:  # on a GPU's machine all cores but one
        workers = max(1, cores() // world.local_size - 1) if world.device.type == "cuda" else 0
    extract(folder, mine, encoder, workers=workers, show=world.is_main)
    world.barrier()
    if world.is_main:
        finish(writers, todo)


def main() -> None:
    settings = ExtractionSettings.from_command_line(__doc__)
    check_folder(settings.code_path)
    folder = settings.image_folder(settings.data_path)
    tokenizer = Tokenizer.from_pretrained(settings.vq_ckpt, settings.vq_model)
    if settings.image_size % tokenizer.downsample:
        raise cli.InputError(
            f"--image-size {settings.image_size} is no multiple of the tokenizer's {tokenizer.downsample}"
        )
    cli.note(folder.summary())
    wanted = manifests(settings, folder, tokenizer)
    if not wanted[0].own_shards:
        raise cli.InputError(
            f"--part {settings.part}: there are {wanted[0].shards} shards; give a smaller --shard-size"
        )
    places = [settings.place(m) for m in wanted]
    keep_freed_memory()
    with join_world() as world, ExitStack() as locks:
        world.check_shared(settings.code_path)

        def lock() -> None:
            for place in places:
                locks.enter_context(file_lock(place.manifest, "wait for it, or give another --code-path"))

        world.from_main(lock)
        writers = [Writer(place, m) for place, m in zip(places, wanted, strict=True)]
        work(settings, folder, writers, tokenizer, world)


if __name__ == "__main__":
    cli.run(main)
