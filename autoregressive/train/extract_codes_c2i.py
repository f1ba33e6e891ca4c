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
from contextlib import ExitStack
from hashlib import sha256 as digest

from pydantic import model_validator
from typing_extensions import Self

from autoregressive.train.extraction import (
    Encoder,
    chunks_of,
    convolution_precision,
    default_workers,
    extract,
    fitting_batch,
    missing_shards,
)
from dataset.codes import LAYOUTS, SHARD_SIZE, Manifest, Place, Writer
from dataset.crops import VIEWS
from dataset.images import ImageFolder, ImageSettings, skipped_text
from dataset.listing import ImagesPath
from pretrained_models.catalogue import WeightsFile
from tokenizer.tokenizer_image.load import Tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import cli
from utils.distributed import World, best_device, join_world, precision_dtype
from utils.files import check_folder, file_lock, sha256
from utils.machine import keep_freed_memory, use_compile
from utils.settings import Count, ImageSize, Positive, PositiveInt, one_of, setting

CROP_RANGE = 1.1


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

    def code_path_of(self, manifest: Manifest) -> Path:
        """The published place for one crop range, a folder in it for each of several."""
        several = len(self.crop_ranges) > 1
        return self.code_path / f"crop-{manifest.crop_range:g}" if several else self.code_path


def manifests(s: ExtractionSettings, folder: ImageFolder, tokenizer: VQModel, vq_model: str) -> list[Manifest]:
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
            vq_model=vq_model,
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


def report(writer: Writer, manifest: Manifest, what: str) -> None:
    """Which codes there are now, and which images have none."""
    m, place = manifest, writer.place
    print(f"{place.codes} {what}: {len(m.numbers)} images, {m.views} views of {m.tokens} codes")
    if m.skipped:
        print(f"{skipped_text(m.skipped, m.images)}. Their numbers stay free; {place.manifest} lists them")


def finish(writers: list[Writer], done: set[int]) -> None:
    """Write the manifests of the writers that had something to do, and print what they hold."""
    for i, writer in enumerate(writers):
        manifest = writer.finish() if i in done else writer.before
        report(writer, manifest, "is written" if i in done else "is complete already")
    if len(writers) > 1:
        print("train on both by --code-path", *(writer.place.root for writer in writers))


def encoder_of(s: ExtractionSettings, tokenizer: VQModel, world: World) -> Encoder:
    compiled = use_compile(s.compile, world.device)
    batch_size = s.batch_size or fitting_batch(tokenizer.config, s.image_size, world.device)
    dtype = precision_dtype(s.precision, world.device)
    return Encoder(tokenizer, world.device, batch_size=batch_size, precision=dtype, compiled=compiled)


def work(s: ExtractionSettings, folder: ImageFolder, writers: list[Writer], tokenizer: VQModel, world: World) -> None:
    """Extract what is missing, as one of the processes."""
    missing = missing_shards(writers, world)
    todo = {i for i, writer in enumerate(writers) if writer.under_way} | {i for lack in missing.values() for i in lack}
    world.barrier()  # before it changes, every process has seen which shards are missing
    if world.is_main:
        for i in todo:
            writers[i].check_space(sum(i in lack for lack in missing.values()))
            writers[i].start()
    encoder = encoder_of(s, tokenizer, world)
    world.barrier()
    shards = sorted(missing)
    if 0 < len(shards) < world.size:
        cli.note(f"{len(shards)} shards for {world.size} processes: a smaller --shard-size would give all of them work")
    mine = {shard: missing[shard] for shard in shards[world.rank :: world.size]}
    workers = default_workers(world.device) if s.num_workers is None else s.num_workers
    chunks = chunks_of(mine, writers, encoder.batch_size)
    extract(folder, chunks, writers, encoder, workers=workers, show=world.is_main)
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
    wanted = manifests(settings, folder, tokenizer, tokenizer.about["vq_model"])
    if not wanted[0].own_shards:
        raise cli.InputError(
            f"--part {settings.part}: there are {wanted[0].shards} shards; give a smaller --shard-size"
        )
    places = [Place(settings.code_path_of(m), m.dataset, m.image_size) for m in wanted]
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
