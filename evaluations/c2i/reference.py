"""Write a batch of real images, evenly spaced over an ImageFolder, into an .npz that the evaluator compares with.

    python -m evaluations.c2i.reference imagenet/train REFERENCE.npz --image-size 256 --num-images 50000

Image i of n is image i * N // n of the sorted folder of N, so every class has its share; centre crops as ADM's
(arXiv 2105.05233); labels as `arr_1`. REFERENCE.json says where they come from.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np

from dataset.images import ImageFolder, load_images
from utils import cli, samples
from utils.files import write_json
from utils.samples import Samples


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("data_path", type=cli.existing_folder, help="an ImageFolder: one folder of images a class")
    add("out", type=Path, help="the .npz to write")
    add("--image-size", type=cli.positive_int, default=256)
    add("--num-images", type=cli.positive_int, help="default: all")
    return parser.parse_args()


def is_there(out: Path, shape: tuple[int, ...], labels_N: np.ndarray) -> bool:
    """Whether `out` holds images of this shape with these labels already. InputError if it holds others."""
    if not out.is_file():
        return False
    found = Samples(out)
    if found.shape == shape and found.labels is not None and np.array_equal(found.labels, labels_N):
        return True
    n, height, width, _ = found.shape
    labels = ", with other labels" if found.shape == shape else ""
    raise cli.InputError(
        f"{out} holds {n} images of {height}x{width}{labels}, asked for are {shape[0]} of {shape[1]}x{shape[2]}: "
        "delete it or give another name"
    )


def main() -> None:
    args = parse()
    if args.out.suffix != ".npz":
        raise cli.InputError(f"expected a name that ends in .npz, got {args.out}")
    folder = ImageFolder(args.data_path)
    n, size = args.num_images or len(folder), args.image_size
    if n > len(folder):
        raise cli.InputError(f"--num-images {n} is more than the {len(folder)} images in {args.data_path}")
    chosen = np.arange(n) * len(folder) // n
    shape, labels_N = (n, size, size, 3), folder.labels[chosen]
    if is_there(args.out, shape, labels_N):
        print(f"{args.out} is complete already")
        return
    batches = load_images([folder.paths[i] for i in chosen], size)
    samples.write(args.out, batches, shape, labels_N)
    source = {"data_path": str(args.data_path), "images": n, "of": len(folder), "image_size": size}
    write_json(args.out.with_suffix(".json"), {**source, "classes": folder.classes})
    print(f"wrote {args.out}: {n} images of {size} px in {len(folder.classes)} classes")


if __name__ == "__main__":
    cli.run(main)
