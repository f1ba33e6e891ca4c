"""Draw a grid of chosen classes, one row a class, to a PNG.

python autoregressive/sample/sample_c2i.py --vq-ckpt vq_ds16_c2i --gpt-ckpt c2i_B_256 --class-ids 207 360 387 974
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed


import numpy as np

from autoregressive.sample.flags import SamplerSettings, class_names, drawing_progress
from utils import cli
from utils.distributed import best_device
from utils.draw import SUFFIXES, image_grid, save_image
from utils.files import check_output, file_lock
from utils.settings import AtLeastOne, Count, PositiveInt, Seed, setting


class GridSettings(SamplerSettings):
    cfg_scale: AtLeastOne = setting(4.0, "classifier-free guidance; 1 is off")
    class_ids: list[Count] | None = setting(None, "default: the first ten classes")
    per_class: PositiveInt = setting(8, "images a row")
    seed: Seed = setting(0)
    batch_size: PositiveInt = setting(16, free=True)
    scale: PositiveInt = setting(1, "enlarge each image this many times")
    out: Path = setting(Path("samples/grid.png"))


def main() -> None:
    settings = GridSettings.from_command_line(__doc__).as_published("image_size")
    check_output(settings.out, SUFFIXES)
    sampler = settings.sampler(best_device(), settings.batch_size)
    ids = settings.class_ids or list(range(min(10, sampler.gpt.config.num_classes)))
    sampler.check_labels(ids, "--class-ids")
    labels, names = np.repeat(ids, settings.per_class), class_names(sampler)
    with file_lock(settings.out), drawing_progress(len(labels), sampler.codes) as count:
        images = sampler(labels, cfg_scale=settings.cfg_scale, seed=settings.seed, on_codes=count, **settings.drawing)
        save_image(settings.out, image_grid(images, settings.per_class, [names[i] for i in ids], settings.scale))
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    cli.run(main)
