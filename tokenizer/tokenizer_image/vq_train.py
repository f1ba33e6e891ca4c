"""Train a VQ tokenizer on a folder of images, as LlamaGen does: reconstruction, perceptual, adversarial and codebook losses.

    bash scripts/tokenizer/train_vq.sh --data-path imagenet/train --image-size 256 --vq-model VQ-16
    bash scripts/tokenizer/train_vq.sh --data-path images/train --vq-model VQ-4-small --image-size 32 --epochs 3

The first is the published recipe; the second, for small images, has no perceptual and no adversarial loss unless it is
asked for (RECIPES). Writes RESULTS_DIR/vq.pt (weights, their moving average, the discriminator, the config),
reconstructions.png, loss.png, codebook.png, log.txt, metrics.jsonl and checkpoints/. The same command continues a run that
was cut off. Order and mirroring follow from (seed, epoch, image), so a continued run is the same run, and any number of
processes trains the same model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from dataset.sampler import Selection
from tokenizer.tokenizer_image.similarity import psnr, squared_error
from tokenizer.tokenizer_image.vq_data import batches_of
from tokenizer.tokenizer_image.vq_settings import TokenizerSettings, check
from tokenizer.tokenizer_image.vq_task import TokenizerTask
from utils import checkpoint, cli, draw
from utils.cli import InputError
from utils.distributed import World, join_world
from utils.engine import Trainer, run_training
from utils.log import RunLog
from utils.pixels import to_float, to_uint8
from utils.runs import Run

PICTURES = 16  # columns of reconstructions.png


def header(task: TokenizerTask, world: World) -> list[str]:
    """What the log says before the first step."""
    s, config, side = task.settings, task.model.config, task.settings.image_size // task.model.downsample
    parameters = sum(p.numel() for p in task.model.parameters())
    lines = [
        f"{s.vq_model}: {parameters / 1e6:.2f}M parameters, {side}x{side} of {config.codebook_size} codes an image; "
        f"{task.images} images, {task.steps} steps, {world.size} process(es) on {world.device.type}"
    ]
    if task.discriminator:
        weights = sum(p.numel() for p in task.discriminator.parameters())
        lines.append(f"{s.disc_type} discriminator: {weights:,} parameters, from step {task.disc_start} on")
        if task.disc_start >= task.steps:
            lines.append(
                f"note: --disc-start {task.disc_start} is beyond the {task.steps} steps of this run: the "
                "discriminator is not trained and has no part in the loss"
            )
    return lines


def finish(trainer: Trainer) -> None:
    """Draw reconstructions.png and write vq.pt, which the next stages read."""
    task, folder = trainer.task, trainer.run.folder
    chosen = np.linspace(0, task.images - 1, min(PICTURES, task.images)).astype(np.int64)
    images = next(iter(task.read([Selection(chosen, np.zeros_like(chosen), np.zeros_like(chosen, bool))])))
    model = (trainer.ema or task.model).eval()
    decoded = to_uint8(model.reconstruct(to_float(images.to(trainer.world.device)))).cpu()
    scale = max(1, 64 // task.settings.image_size)
    grid = draw.image_grid(torch.cat((images, decoded)).numpy(), len(images), ("image", "decoded"), scale)
    draw.save_image(folder / "reconstructions.png", grid)
    weights = {"model": task.model, "ema": trainer.ema, "discriminator": task.discriminator}
    states = {name: module.state_dict() for name, module in weights.items() if module}
    checkpoint.save(folder / "vq.pt", {**states, "steps": trainer.step, "epochs": task.settings.epochs, **task.about})
    quality = psnr(squared_error(images, decoded).mean())
    trainer.log.line(
        f"wrote {folder / 'vq.pt'} after {trainer.step} steps; PSNR of {len(decoded)} training images {quality:.2f}"
    )


def is_complete(folder: Path) -> bool:
    """Whether vq.pt can be read."""
    try:
        return "model" in checkpoint.load(folder / "vq.pt", mmap=True)
    except InputError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    settings = TokenizerSettings.from_command_line(__doc__, arguments).complete()
    folder = settings.image_folder(settings.data_path)
    cli.note(folder.summary())
    start = check(settings, len(folder))
    with join_world() as world:
        held: list[nn.Module | None] = []
        # the first process downloads what there is to download; where it cannot, all are told
        world.from_main(lambda: held.append(settings.perceptual(world.device)))
        perceptual = held[0] if held else settings.perceptual(world.device)
        args = {
            **settings.plain(),
            "images": folder.content_id(),
            "start": checkpoint.identity(start["model"]) if start else None,
            **settings.identity(),
            "precision": settings.precision(world.device),
        }
        about = {
            "vq_model": settings.vq_model,
            "image_size": settings.image_size,
            "config": asdict(settings.vq_config()),
            "args": args,
        }

        def make_task(run: Run, log: RunLog) -> TokenizerTask:
            read = batches_of(folder, settings.image_size, settings.num_workers, world.is_main, settings.random_crop)
            return TokenizerTask(settings, len(folder), read, world.device, about, start, perceptual)

        run_training(
            world, settings, make_task, results=settings.results_dir, name=None, args=args,
            header=lambda task: header(task, world), finish=finish, is_complete=is_complete,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
