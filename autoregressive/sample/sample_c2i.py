"""Draw a grid of chosen classes, one row a class, to a PNG.

    python autoregressive/sample/sample_c2i.py --vq-ckpt vq_ds16_c2i.pt --gpt-ckpt c2i_B_256.pt --gpt-model GPT-B \
        --vq-model VQ-16 --cfg-scale 4.0 --class-ids 207 360 387 974
"""

from pathlib import Path

import numpy as np

from autoregressive.sample.pipeline import Pipeline, add_flags
from utils import cli
from utils.distributed import world
from utils.draw import image_grid, save_image
from utils.log import progress


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add_flags(parser)
    add = parser.add_argument
    add("--class-ids", type=cli.count, nargs="+", help="default: the first ten classes")
    add("--per-class", type=cli.positive_int, default=8, help="images a row")
    add("--seed", type=cli.count, default=0)
    add("--batch-size", type=cli.positive_int, default=64)
    add("--scale", type=cli.positive_int, default=1, help="enlarge each image this many times")
    add("--out", type=Path, default=Path("samples/grid.png"))
    args = parser.parse_args()

    pipeline = Pipeline.load(args)
    classes = pipeline.gpt.config.num_classes
    ids = args.class_ids or list(range(min(10, classes)))
    for wrong in [i for i in ids if i >= classes]:
        raise cli.InputError(f"--class-ids {wrong} is out of range: {args.gpt_ckpt} has classes 0 to {classes - 1}")
    names = pipeline.names["classes"] or [f"class {i}" for i in range(classes)]
    labels, indices = np.repeat(ids, args.per_class), np.arange(len(ids) * args.per_class)
    with world() as here:
        pipeline.to(here.device)
        parts = [slice(start, start + args.batch_size) for start in range(0, len(labels), args.batch_size)]
        bar = progress(parts, desc="drawing", unit=" batches")
        images = [pipeline.images(labels[part], indices[part], args.seed) for part in bar]
    save_image(args.out, image_grid(np.concatenate(images), args.per_class, [names[i] for i in ids], args.scale))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
