"""Train a small classifier on a folder of images and export it: a feature network for the evaluation of such images.

    bash scripts/evaluations/train_classifier.sh --data-path images/train --val-path images/test --image-size 32 \
        --name fashion-mnist-classifier --out classifier.pt2 --epochs 3

Writes OUT.pt2 (images to features and logits), OUT.json (settings, validation accuracy) and the run folder OUT.run. One
process; images are read once, into RAM. Order and augmentation are functions of (seed, epoch, image).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import StringConstraints
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dataset.images import ImageFolder, ImageSettings, crops_in_memory
from dataset.listing import ImagesPath
from dataset.sampler import epoch_batches
from evaluations.c2i.classifier import Classifier, fused, shifted
from evaluations.c2i.features import FeatureNetwork
from evaluations.c2i.metrics import class_accuracy
from pretrained_models.loader import on_meta
from utils import cli, streams
from utils.cli import InputError
from utils.distributed import World, join_world
from utils.engine import Trainer, run_training
from utils.files import atomic_path, check_output, sha256
from utils.log import RunLog
from utils.networks import save_network
from utils.records import Record
from utils.runs import Run
from utils.settings import Count, FractionBelowOne, ImageSize, NonNegative, Positive, PositiveInt, setting
from utils.task import EngineSettings, Task
from utils.update import adamw

WARMUP = 0.2  # of the run
SHIFT, MIRROR = range(2)  # parts of the augmentation's stream
Arrays = tuple[np.ndarray, np.ndarray]  # uint8 images (N, H, W, 3) and labels (N,) int64


class ClassifierSettings(EngineSettings, ImageSettings):
    """The settings of classifier training; see --help."""

    data_path: ImagesPath = setting(help="a folder of images: one folder a class", free=True)
    val_path: ImagesPath = setting(help="a folder of images with the same classes", free=True)
    image_size: ImageSize = setting()
    name: Annotated[str, StringConstraints(pattern=r"^[\w.+-]+$"), "letters, digits and ._+- only"] = setting(
        help="a word: labels every figure measured with this network"
    )
    out: Path = setting(help="the .pt2 to write", free=True)
    epochs: PositiveInt = setting(3)
    global_batch_size: PositiveInt = setting(128, "images a step")
    lr: Positive = setting(4e-3, "the highest; it rises from 0 and falls back to 0")
    beta2: FractionBelowOne = setting(0.999)
    max_grad_norm: NonNegative = setting(0.0, "gradients are clipped to this norm; 0: no clipping")
    max_shift: Count = setting(0, "move images by up to so many pixels; pays in long runs")
    flip: bool = setting(False, "mirror half of the images; pays in long runs")


class ClassifierRecord(Record):
    """OUT.json: what a network was trained on, and how good it is."""

    settings: dict[str, Any]
    classes: list[str]
    images: int
    val_images: int
    val_accuracy: float
    sha256: str


def check(settings: ClassifierSettings, train: ImageFolder, val: ImageFolder) -> None:
    """InputError for folders of different classes, and for more images than fit."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"--data-path and --val-path have different classes: {', '.join(odd[:3])} in one of them only")
    if settings.image_size < 8:
        raise InputError(f"--image-size {settings.image_size}: expected at least 8, as images are halved three times")
    settings.check_batch(len(train), 1)
    least = 2 * settings.gradient_accumulation_steps
    if settings.global_batch_size < least:
        raise InputError(
            f"--global-batch-size {settings.global_batch_size}: expected at least {least}, as batch norms need"
        )
    needed = (len(train) + len(val)) * settings.image_size**2 * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise InputError(
            f"{len(train) + len(val)} images of {settings.image_size} px take {needed / 1e9:.0f} GB of memory, more than "
            f"half of the {memory / 1e9:.0f} GB there are: give a smaller --image-size or fewer images"
        )


def augmented(
    images_BHWC: Tensor, indices_B: np.ndarray, epoch: int, *, seed: int, max_shift: int, flip: bool
) -> Tensor:
    """Shifted and mirrored, each image by its own draw from (seed, epoch, image)."""
    key = (seed, streams.AUGMENT, epoch)
    if max_shift:
        draws_B2 = streams.uniform(*key, SHIFT, indices_B[:, None], np.arange(2))
        offsets_B2 = np.floor(draws_B2 * (2 * max_shift + 1)).astype(np.int64) - max_shift
        images_BHWC = shifted(images_BHWC, torch.from_numpy(offsets_B2))
    if flip:
        mirrored_B = torch.from_numpy(streams.uniform(*key, MIRROR, indices_B) < 0.5)
        images_BHWC = torch.where(mirrored_B[:, None, None, None], images_BHWC.flip(2), images_BHWC)
    return images_BHWC


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of update `step` (0-based) of `steps`: linear up to the peak, then a half cosine down towards 0."""
    warmup = int(WARMUP * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class ClassifierTask(Task):
    """Training of a Classifier on images in memory."""

    def __init__(
        self, settings: ClassifierSettings, train: Arrays, val: Arrays, classes: int, args: dict[str, Any]
    ) -> None:
        self.settings, self.about = settings, {"args": args}
        self.images, self.image_labels = (torch.from_numpy(array) for array in train)
        self.val = tuple(torch.from_numpy(array) for array in val)
        torch.manual_seed(settings.global_seed)
        self.model = self.objective = Classifier(classes)
        self.optimizer = adamw(self.model, settings)
        self.steps_per_epoch = len(self.images) // settings.global_batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        self.stops = (self.steps,)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            side = settings.image_size
            on_meta(lambda: Classifier(classes)).eval()(torch.empty(1, side, side, 3, dtype=torch.uint8, device="meta"))
        self.image_flops = 3 * counter.get_total_flops()

    def batches(self, epoch: int, first_step: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 (B, H, W, 3), augmented, and labels (B,)."""
        s = self.settings
        selections = epoch_batches(
            len(self.images), 1, s.global_batch_size, seed=s.global_seed, epoch=epoch, label_drop=0.0,
            first_step=first_step, part=world.share(s.global_batch_size),
        )  # fmt: skip
        for selection in selections:
            chosen = torch.from_numpy(selection.indices)
            images = augmented(
                self.images[chosen], selection.indices, epoch, seed=s.global_seed, max_shift=s.max_shift, flip=s.flip
            )
            yield images, self.image_labels[chosen]

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.steps, self.settings.lr)

    def loss(self, objective: nn.Module, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        _, logits_BC = objective(batch[0])
        return {"loss": F.cross_entropy(logits_BC, batch[1])}

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int, world: World, amp: Callable) -> dict[str, float]:
        model.eval()
        with amp():
            logits_NC = torch.cat([model(part.to(world.device))[1].float() for part in self.val[0].split(256)]).cpu()
        model.train()
        loss = F.cross_entropy(logits_NC, self.val[1]).item()
        return {"val_loss": loss, "val_accuracy": class_accuracy(logits_NC.numpy(), self.val[1].numpy())}

    def flops(self, step: int) -> float:
        return self.image_flops


def export(trainer: Trainer, classes: list[str], args: dict[str, Any]) -> None:
    """Write OUT.pt2, measured as it was written, and its record."""
    task, s = trainer.task, trainer.task.settings
    with atomic_path(s.out) as temporary:  # it gets its name when its record is there
        save_network(temporary, fused(task.model), s.image_size, s.name)
        network = FeatureNetwork.load(temporary, trainer.world.device)
        images, labels = (array.numpy() for array in task.val)
        logits_NC = np.concatenate([network(images[i : i + 256])[1] for i in range(0, len(images), 256)])
        correct = class_accuracy(logits_NC, labels)
        record = ClassifierRecord(
            settings=args, classes=classes, images=len(task.images), val_images=len(images), val_accuracy=correct,
            sha256=sha256(temporary),
        )  # fmt: skip
        record.write(s.out.with_suffix(".json"))
    trainer.log.line(f"wrote {s.out}: {correct:.2%} of {len(images)} validation images right")


def is_complete(out: Path) -> bool:
    """Whether `out` is the network that its record says."""
    record = ClassifierRecord.read_if_present(out.with_suffix(".json"))
    return bool(record) and out.is_file() and sha256(out) == record.sha256


def main(arguments: Sequence[str] | None = None) -> None:
    settings = ClassifierSettings.from_command_line(__doc__, arguments)
    out = check_output(settings.out, (".pt2",))
    run_folder = out.with_suffix(".run")
    if out.is_file() and not (run_folder / "run.json").is_file():
        raise InputError(f"{out} exists without its run in {run_folder}: give another --out, or delete it")
    folder, val = settings.image_folder(settings.data_path), settings.image_folder(settings.val_path)
    cli.note(folder.summary())
    check(settings, folder, val)
    with join_world() as world:
        if world.size > 1:
            raise InputError("the classifier is trained by one process: set NPROC_PER_NODE=1")
        args = {
            **settings.plain(), "images": folder.content_id(), "val_images": val.content_id(),
            "precision": settings.precision(world.device),
        }  # fmt: skip

        def make_task(run: Run, log: RunLog) -> ClassifierTask:
            arrays = [crops_in_memory(part, settings.image_size) for part in (folder, val)]
            return ClassifierTask(settings, *arrays, len(folder.classes), args)

        def header(task: ClassifierTask) -> list[str]:
            parameters = sum(p.numel() for p in task.model.parameters())
            return [
                f"classifier of {len(folder.classes)} classes: {parameters / 1e6:.2f}M parameters, {len(task.images)} images, "
                f"{task.steps} steps on {world.device.type}"
            ]

        run_training(
            world, settings, make_task, results=run_folder, name=None, args=args, header=header,
            finish=lambda trainer: export(trainer, folder.classes, args), is_complete=lambda _: is_complete(out),
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
