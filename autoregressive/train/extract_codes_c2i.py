"""Images to codes: encode an ImageFolder with a frozen tokenizer into `CODE_PATH/{dataset}{size}_codes`.

    bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt vq_ds16_c2i.pt --data-path imagenet/train \
        --code-path codes --ten-crop --crop-range 1.1 --image-size 384

Whole shards go to processes; a finished shard is never redone, so the same command completes a run that was killed.
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.codes import LAYOUTS, SHARD_SIZE, Manifest, Place, Writer
from dataset.images import VIEWS, ImageFolder, image_views
from pretrained_models.catalogue import weights_file
from tokenizer.tokenizer_image.load import load_tokenizer
from utils import cli
from utils.distributed import World, world
from utils.files import sha256
from utils.log import progress
from utils.pixels import to_float


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
    add("--crop-range", type=cli.positive, default=1.1, help="ten crops are cut from int(size * this)")
    add("--no-flip", action="store_true", help="one view an image; without it (and --ten-crop), a mirrored one too")
    add("--layout", choices=LAYOUTS, default="packed", help="packed shards, or one file an image as published")
    add("--shard-size", type=cli.positive_int, default=SHARD_SIZE, help="images a packed shard")
    add("--batch-size", type=cli.positive_int, default=64, help="views encoded at once")
    add("--num-workers", type=cli.count, default=0, help="processes that read images, for each process that encodes")
    return parser.parse_args()


class Views(Dataset):
    """Image i of the folder -> uint8 (views, size, size, 3)."""

    def __init__(self, folder: ImageFolder, indices: list[int], size: int, mode: str, crop_range: float) -> None:
        self.folder, self.indices, self.how = folder, indices, (size, mode, crop_range)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> torch.Tensor:
        return torch.from_numpy(image_views(self.folder.paths[self.indices[item]], *self.how))


@torch.inference_mode()
def encode(loader: DataLoader, tokenizer, device: torch.device) -> Iterator[np.ndarray]:
    """Batches of views -> codes (n, views, tokens) as numpy."""
    for views_NVHWC in loader:
        n, views = views_NVHWC.shape[:2]
        images = to_float(views_NVHWC.flatten(0, 1).to(device)).contiguous(memory_format=torch.channels_last)
        yield tokenizer.encode(images).view(n, views, -1).cpu().numpy()


def extract(
    folder: ImageFolder,
    tokenizer,
    writer: Writer,
    world: World,
    *,
    batch_size: int,
    num_workers: int,
    crop_range: float,
) -> None:
    """Write this process's missing shards, in order."""
    m = writer.manifest
    mine = [s for s in range(m.shards) if s % world.size == world.rank and not writer.has(s)]
    indices = [i for shard in mine for i in m.rows(shard)]
    views = Views(folder, indices, m.image_size, m.view_mode, crop_range)
    loader = DataLoader(views, batch_size=max(1, batch_size // m.views), num_workers=num_workers)
    pending, shards = np.empty((0, m.views, m.tokens), np.int64), iter(mine)
    shard = next(shards, None)
    with progress(total=len(indices), unit=" images", desc="codes", show=world.is_main) as bar:
        for codes in encode(loader, tokenizer, world.device):
            bar.update(len(codes))
            pending = np.concatenate((pending, codes))
            while shard is not None and len(pending) >= len(m.rows(shard)):
                rows = m.rows(shard)
                writer.write(shard, pending[: len(rows)], folder.labels[rows.start : rows.stop])
                pending, shard = pending[len(rows) :], next(shards, None)


def main() -> None:
    args = parse()
    folder = ImageFolder(args.data_path)
    tokenizer, about = load_tokenizer(args.vq_ckpt, args.vq_model)
    if args.image_size % tokenizer.downsample:
        raise cli.InputError(f"--image-size {args.image_size} is no multiple of the tokenizer's {tokenizer.downsample}")
    if args.ten_crop and args.crop_range < 1:
        raise cli.InputError(
            f"--crop-range {args.crop_range}: expected at least 1, ten crops are cut from a larger image"
        )
    mode = "ten-crop" if args.ten_crop else "single" if args.no_flip else "flip"
    manifest = Manifest(
        dataset=args.dataset,
        image_size=args.image_size,
        images=len(folder),
        views=VIEWS[mode],
        tokens=(args.image_size // tokenizer.downsample) ** 2,
        codebook_size=tokenizer.config.codebook_size,
        layout=args.layout,
        shard_size=args.shard_size,
        view_mode=mode,
        crop_range=args.crop_range if args.ten_crop else None,
        vq_model=about["vq_model"],
        tokenizer_sha256=sha256(args.vq_ckpt),
        classes=folder.classes,
    )
    place = Place(args.code_path, args.dataset, args.image_size)
    writer = Writer(place, manifest)
    if writer.finished:
        print(
            f"{place.codes} is complete already: {manifest.images} images, {manifest.views} views of {manifest.tokens} codes"
        )
        return
    with world() as here:
        if here.is_main:
            writer.start()
        tokenizer.to(here.device, memory_format=torch.channels_last)
        here.barrier()
        extract(
            folder, tokenizer, writer, here,
            batch_size=args.batch_size, num_workers=args.num_workers, crop_range=args.crop_range,
        )  # fmt: skip
        here.barrier()
        if here.is_main:
            writer.finish()
            print(f"wrote {place.codes}: {manifest.images} images, {manifest.views} views of {manifest.tokens} codes")


if __name__ == "__main__":
    cli.run(main)
