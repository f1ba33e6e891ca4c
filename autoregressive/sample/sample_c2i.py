"""Draw a grid of chosen classes, one row a class, to a PNG.

python autoregressive/sample/sample_c2i.py --vq-ckpt vq_ds16_c2i --gpt-ckpt c2i_B_256 --class-ids 207 360 387 974
"""

from pathlib import Path

import numpy as np

from autoregressive.sample.pipeline import Pipeline, add_flags, use_published
from utils import cli
from utils.distributed import best_device
from utils.draw import image_grid, save_image


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add_flags(parser)
    add = parser.add_argument
    add("--cfg-scale", type=cli.at_least_one, default=4.0, help="classifier-free guidance; 1 is off")
    add("--class-ids", type=cli.count, nargs="+", help="default: the first ten classes")
    add("--per-class", type=cli.positive_int, default=8, help="images a row")
    add("--seed", type=cli.count, default=0)
    add("--batch-size", type=cli.positive_int, default=16)
    add("--scale", type=cli.positive_int, default=1, help="enlarge each image this many times")
    add("--out", type=Path, default=Path("samples/grid.png"))
    args = parser.parse_args()
    use_published(args, "image_size")

    pipeline = Pipeline.load(args)
    ids = args.class_ids or list(range(min(10, pipeline.gpt.config.num_classes)))
    pipeline.check_classes(ids, "--class-ids")
    labels, indices = np.repeat(ids, args.per_class), np.arange(len(ids) * args.per_class)
    pipeline.to(best_device(), min(args.batch_size, len(labels)))
    parts = [slice(start, start + args.batch_size) for start in range(0, len(labels), args.batch_size)]
    with pipeline.progress(len(labels)) as count:
        images = [pipeline.images(labels[part], indices[part], args.seed, args.cfg_scale, count) for part in parts]
    names = [pipeline.names["classes"][i] for i in ids]
    save_image(args.out, image_grid(np.concatenate(images), args.per_class, names, args.scale))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
