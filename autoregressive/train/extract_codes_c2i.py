"""Images to codes: encode an ImageFolder with a frozen tokenizer into `CODE_PATH/{dataset}{size}_codes`.

    bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt vq_ds16_c2i.pt --data-path imagenet/train \
        --code-path codes --ten-crop --crop-range 1.1 --image-size 384

Several crop ranges in one pass (`--crop-range 1.1 1.05`) go to `CODE_PATH/crop-1.1` and `CODE_PATH/crop-1.05`. Whole
shards go to processes; a finished shard is never redone, so the same command completes a run that was killed, on any
number of processes. An image that cannot be read is skipped and listed in the manifest.
"""

import os
from argparse import BooleanOptionalAction, Namespace
from hashlib import sha256 as digest
from pathlib import Path

from autoregressive.train.extraction import (
    Encoder,
    chunks_of,
    extract,
    fitting_batch,
    missing_shards,
    quiet_pillow,
)
from dataset.codes import LAYOUTS, SHARD_SIZE, Manifest, Place, Writer
from dataset.images import VIEWS, ImageFolder
from pretrained_models.catalogue import weights_file
from tokenizer.tokenizer_image.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import cli
from utils.distributed import World, precision_dtype, world
from utils.files import sha256
from utils.machine import keep_freed_memory


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=cli.existing_folder, required=True, help="an ImageFolder: one folder of images a class")
    add("--code-path", type=Path, required=True, help="folder to write to")
    add("--vq-model", help="insist on this tokenizer preset; default: what the file says, VQ-16 if it doesn't")
    add("--vq-ckpt", type=weights_file, required=True, help="tokenizer weights")
    add("--dataset", default="imagenet", help="name of the data set in the folders' names")
    add("--image-size", type=cli.positive_int, default=256)
    add("--ten-crop", action="store_true", help="ten views an image: corners and centre, and their mirror images")
    add(
        "--crop-range",
        type=cli.positive,
        nargs="+",
        default=[1.1],
        help="ten crops are cut from int(size * this); several: each in a folder of its own, from one reading",
    )
    add("--no-flip", action="store_true", help="one view an image; without it (and --ten-crop), a mirrored one too")
    add("--layout", choices=LAYOUTS, default="packed", help="packed shards, or one file an image as published")
    add("--shard-size", type=cli.positive_int, default=SHARD_SIZE, help="images a packed shard")
    add("--batch-size", type=cli.positive_int, help="views encoded at once; default: what the memory is good for")
    add("--num-workers", type=cli.count, help="processes that read images, for each one that encodes; default: all cores "
        "on a GPU's machine, 0 on a CPU, where threads read between encodings")  # fmt: skip
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="with bf16 some codes are others",
    )
    add("--compile", action=BooleanOptionalAction, default=None, help="torch.compile (default: on GPUs)")
    add("--strict", action="store_true", help="stop at an image that cannot be read instead of skipping it")
    args = parser.parse_args()
    check_ranges(args)
    return args


def check_ranges(args: Namespace) -> None:
    ranges = args.crop_range
    if not args.ten_crop and len(ranges) > 1:
        raise cli.InputError(
            f"--crop-range {ranges[0]:g} {ranges[1]:g}: several are for --ten-crop, which is not given"
        )
    for one in ranges if args.ten_crop else ():
        if one < 1:
            raise cli.InputError(f"--crop-range {one:g}: expected at least 1, ten crops are cut from a larger image")
        same = [other for other in ranges if int(args.image_size * other) == int(args.image_size * one)]
        if len(same) > 1:
            raise cli.InputError(
                f"--crop-range {' '.join(f'{other:g}' for other in same)}: at --image-size {args.image_size} these are "
                f"the same crop of {int(args.image_size * one)} px; give one of them"
            )


def manifests(args: Namespace, folder: ImageFolder, tokenizer: VQModel, vq_model: str) -> list[Manifest]:
    """What there is to do: a manifest for each crop range."""
    paths = "\n".join(folder.names).encode(errors="surrogateescape")
    tokenizer_sha256, paths_sha256 = sha256(args.vq_ckpt), digest(paths).hexdigest()
    mode = "ten-crop" if args.ten_crop else "single" if args.no_flip else "flip"
    return [
        Manifest(
            dataset=args.dataset,
            image_size=args.image_size,
            images=len(folder),
            views=VIEWS[mode],
            tokens=(args.image_size // tokenizer.downsample) ** 2,
            codebook_size=tokenizer.config.codebook_size,
            layout=args.layout,
            shard_size=args.shard_size,
            view_mode=mode,
            crop_range=crop_range,
            vq_model=vq_model,
            tokenizer_sha256=tokenizer_sha256,
            classes=folder.classes,
            precision=args.precision,
            paths_sha256=paths_sha256,
        )
        for crop_range in (args.crop_range if args.ten_crop else (None,))
    ]


def code_path(args: Namespace, manifest: Manifest) -> Path:
    """The published place for one crop range, a folder in it for each of several."""
    return args.code_path / f"crop-{manifest.crop_range:g}" if len(args.crop_range) > 1 else args.code_path


def report(writer: Writer, manifest: Manifest, what: str) -> None:
    """Which codes there are now, and which images have none."""
    m, place = manifest, writer.place
    print(f"{place.codes} {what}: {len(m.numbers)} images, {m.views} views of {m.tokens} codes")
    if m.skipped:
        first = "; ".join(f"{row['path']} ({row['reason']})" for row in m.skipped[:3])
        print(
            f"skipped {len(m.skipped)} of {m.images} images that cannot be read, their numbers stay free: {first}"
            f"{'; ...' if len(m.skipped) > 3 else ''}. {place.manifest} lists them"
        )


def finish(writers: list[Writer], done: set[int]) -> None:
    """Write the manifests of the writers that had something to do, and say what there is."""
    for i, writer in enumerate(writers):
        manifest = writer.finish() if i in done else writer.before
        report(writer, manifest, "is written" if i in done else "is complete already")
    if len(writers) > 1:
        print("train on both by --code-path", *(writer.place.root for writer in writers))


def encoder_of(args: Namespace, tokenizer: VQModel, here: World) -> Encoder:
    compiled = here.device.type == "cuda" if args.compile is None else args.compile
    batch_size = args.batch_size or fitting_batch(tokenizer.config, args.image_size, here.device)
    dtype = precision_dtype(args.precision, here.device)
    return Encoder(tokenizer, here.device, batch_size=batch_size, precision=dtype, compiled=compiled)


def workers_of(args: Namespace, here: World) -> int:
    """Reading processes of this process."""
    if args.num_workers is not None:
        return args.num_workers
    here_too = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, (os.cpu_count() or 1) // here_too - 1) if here.device.type == "cuda" else 0


def main() -> None:
    args = parse()
    folder = ImageFolder(args.data_path)
    tokenizer, about = load_tokenizer(args.vq_ckpt, args.vq_model)
    if args.image_size % tokenizer.downsample:
        raise cli.InputError(f"--image-size {args.image_size} is no multiple of the tokenizer's {tokenizer.downsample}")
    wanted = manifests(args, folder, tokenizer, about["vq_model"])
    writers = [Writer(Place(code_path(args, m), m.dataset, m.image_size), m) for m in wanted]
    keep_freed_memory()
    quiet_pillow()
    with world() as here:
        missing = missing_shards(writers, here)
        todo = {i for i, writer in enumerate(writers) if writer.under_way} | {
            i for lack in missing.values() for i in lack
        }
        here.barrier()  # before it changes, every process has seen what there was
        if here.is_main:
            for i in todo:
                writers[i].check_space(sum(i in lack for lack in missing.values()))
                writers[i].start()
        encoder = encoder_of(args, tokenizer, here)
        here.barrier()
        shards = sorted(missing)
        if 0 < len(shards) < here.size and here.is_main:
            print(
                f"note: {len(shards)} shards for {here.size} processes: a smaller --shard-size would give all of them work"
            )
        mine = {shard: missing[shard] for shard in shards[here.rank :: here.size]}
        extract(
            folder, chunks_of(mine, writers, encoder.batch_size), writers, encoder,
            workers=workers_of(args, here), strict=args.strict, show=here.is_main,
        )  # fmt: skip
        here.barrier()
        if here.is_main:
            finish(writers, todo)


if __name__ == "__main__":
    cli.run(main)
