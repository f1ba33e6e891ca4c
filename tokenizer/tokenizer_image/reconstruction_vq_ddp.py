"""Reconstruct an ImageFolder with a tokenizer into one .npz for the evaluator; say PSNR and MSE.

    bash scripts/tokenizer/reconstruct_vq.sh --data-path imagenet/val --vq-model VQ-16 \
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt --image-size 256

Batches are dealt out to the processes and written in the order of the sorted folder, with labels.
"""

import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.images import ImageFolder
from pretrained_models.catalogue import weights_file
from tokenizer.tokenizer_image.load import load_tokenizer
from tokenizer.tokenizer_image.vq_data import Crops
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import cli, samples
from utils.distributed import World, world
from utils.files import atomic_path, write_json
from utils.log import progress
from utils.pixels import resize, to_float, to_uint8


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=cli.existing_folder, required=True, help="an ImageFolder: one folder of images a class")
    add("--vq-model", help="insist on this tokenizer preset; default: what the file says, or what its tensors are of")
    add("--vq-ckpt", type=weights_file, required=True)
    add("--image-size", type=cli.positive_int, default=256)
    add("--image-size-eval", type=cli.positive_int, help="resize images and reconstructions to this (bicubic)")
    add("--num-images", type=cli.positive_int, help="evenly spaced over the sorted folder; default: all")
    add("--per-proc-batch-size", type=cli.positive_int, default=32)
    add("--num-workers", type=cli.count, default=0, help="processes that read images, for each that reconstructs")
    add("--sample-dir", type=Path, default=Path("reconstructions"))
    add("--out", type=Path, help="the .npz; default: a name in --sample-dir that says what it holds")
    return parser.parse_args()


def file_name(args: Namespace, vq_model: str, images: int) -> str:
    """What the file holds: tokenizer, its checkpoint, the images' folder, their number and sizes."""
    size = args.image_size_eval or args.image_size
    return (
        f"{vq_model}-{args.vq_ckpt.stem}-{args.data_path.resolve().name}-{images}-"
        f"size-{args.image_size}-size-{size}.npz"
    )


def error_per_image(decoded_NHWC: Tensor, images_NHWC: Tensor) -> Tensor:
    """Mean squared error (N,) of uint8 images, of pixels in 0..1, float64."""
    return (decoded_NHWC.double() - images_NHWC.double()).div(255).square().mean(dim=(1, 2, 3))


@torch.inference_mode()
def reconstruct(
    model: VQModel, crops: Crops, parts: list[tuple[Path, np.ndarray]], here: World, *, size: int, workers: int
) -> tuple[float, float]:
    """Write each part (file, image indices) of this process; return PSNR (mean over images) and MSE of all processes."""
    totals = torch.zeros(3, dtype=torch.float64, device=here.device)  # PSNR, MSE, images
    mine = parts[here.rank :: here.size]
    loader = DataLoader(
        crops, batch_sampler=[[(int(i), 0) for i in indices] for _, indices in mine], num_workers=workers
    )
    with progress(total=sum(len(i) for _, i in mine), desc="reconstructing", unit=" images", show=here.is_main) as bar:
        for (path, _), images_NHWC in zip(mine, loader, strict=True):
            images = to_float(images_NHWC.to(here.device)).contiguous(memory_format=torch.channels_last)
            decoded = to_uint8(resize(model.reconstruct(images), size))
            mse = error_per_image(decoded, to_uint8(resize(images, size)))
            psnr = -10 * mse.clamp(min=1e-10).log10()
            totals += torch.stack((psnr.sum(), mse.sum(), mse.new_tensor(len(mse))))
            with atomic_path(path) as temporary:
                np.save(temporary, decoded.cpu().numpy())
            bar.update(len(images))
    psnr, mse, n = here.sum(totals).tolist()
    return psnr / n, mse / n


def read_parts(parts: list[tuple[Path, np.ndarray]]) -> Iterator[np.ndarray]:
    for path, _ in parts:
        yield np.load(path)


def main() -> None:
    args = parse()
    folder = ImageFolder(args.data_path)
    model, about = load_tokenizer(args.vq_ckpt, args.vq_model)
    if args.image_size % model.downsample:
        raise cli.InputError(
            f"--image-size {args.image_size} is no multiple of {model.downsample}, the side of a code of {about['vq_model']}"
        )
    n = min(args.num_images or len(folder), len(folder))
    if args.num_images and args.num_images > len(folder):
        raise cli.InputError(
            f"--num-images {args.num_images} is more than the {len(folder)} images in {args.data_path}"
        )
    chosen = np.arange(n) * len(folder) // n
    size = args.image_size_eval or args.image_size
    out = args.out or args.sample_dir / file_name(args, about["vq_model"], n)
    temporary = out.with_suffix(".parts")
    starts = range(0, n, args.per_proc_batch_size)
    parts = [(temporary / f"{start:08d}.npy", chosen[start : start + args.per_proc_batch_size]) for start in starts]
    with world() as here:
        model.to(here.device, memory_format=torch.channels_last)
        psnr, mse = reconstruct(model, Crops(folder, args.image_size), parts, here, size=size, workers=args.num_workers)
        here.barrier()
        if here.is_main:
            samples.write(out, read_parts(parts), (n, size, size, 3), folder.labels[chosen])
            record = {"images": n, "psnr": psnr, "mse": mse, "vq_model": about["vq_model"], "weights": about["weights"]}
            write_json(out.with_suffix(".json"), record)
            shutil.rmtree(temporary)
            print(f"wrote {out}: {n} images of {size} px, PSNR {psnr:.3f}, MSE {mse:.6f} (pixels in 0..1)")


if __name__ == "__main__":
    cli.run(main)
