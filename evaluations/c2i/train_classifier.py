"""Train a small classifier on an ImageFolder and export it: an eye for the evaluation of images of this kind.

    bash scripts/evaluations/train_classifier.sh --data-path images/train --val-path images/test --image-size 32 \
        --name fashion-mnist-classifier --out classifier.pt2 --epochs 3

Writes OUT.pt2 (images to features and logits) and, with the settings and the validation accuracy, OUT.json. One
process; images are read once, into RAM. Order and augmentation are functions of (seed, epoch, image).
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.images import ImageFolder, load_images
from evaluations.c2i.classifier import Classifier, fused, shifted
from evaluations.c2i.features import Network, save_network
from evaluations.c2i.metrics import class_accuracy
from utils import cli, streams
from utils.distributed import world
from utils.files import atomic_path, write_json
from utils.log import progress

WARMUP = 0.2  # of the run
WEIGHT_DECAY = 0.05
SHIFT, MIRROR = range(2)  # parts of the augmentation's stream


@dataclass(frozen=True)
class Settings:
    """The command line but for --out; see parse() for what each means."""

    data_path: Path
    val_path: Path
    image_size: int
    name: str
    epochs: int
    batch_size: int
    lr: float
    max_shift: int
    flip: bool
    seed: int

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def network_name(text: str) -> str:
    """argparse type: a word, because it stands in the labels of figures."""
    if not re.fullmatch(r"[\w.+-]+", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits and ._+- only, got {text!r}")
    return text


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, Path]:
    """The settings and where to write to."""
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=cli.existing_folder, required=True, help="an ImageFolder: one folder of images a class")
    add("--val-path", type=cli.existing_folder, required=True, help="an ImageFolder with the same classes")
    add("--image-size", type=cli.positive_int, required=True)
    add("--name", type=network_name, required=True, help="labels every figure measured with this network")
    add("--out", type=Path, required=True, help="the .pt2 to write")
    add("--epochs", type=cli.positive_int, default=3)
    add("--batch-size", type=cli.positive_int, default=128)
    add("--lr", type=cli.positive, default=4e-3, help="the highest; it rises from 0 and falls back to 0")
    add("--max-shift", type=cli.count, default=0, help="move images by up to so many pixels; pays in long runs")
    add("--flip", action="store_true", help="mirror half of the images; pays in long runs")
    add("--seed", type=cli.count, default=0)
    args = vars(parser.parse_args(arguments))
    out = args.pop("out")
    if out.suffix != ".pt2":
        raise cli.InputError(f"--out: expected a name that ends in .pt2, got {out}")
    return Settings(**args), out


def is_there(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` was trained with these settings already. InputError if with others, or unknown ones."""
    if not out.is_file():
        return False
    record = out.with_suffix(".json")
    try:
        found = json.loads(record.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise cli.InputError(f"{out} is there without a record in {record}: give another --out, or delete it") from None
    different = [f"{key} {found.get(key)}, now {value}" for key, value in wanted.items() if found.get(key) != value]
    if different:
        raise cli.InputError(
            f"{out} was trained with other settings ({'; '.join(different[:3])}): give another --out, or delete it"
        )
    return True


def check(settings: Settings, train: ImageFolder, val: ImageFolder) -> None:
    """InputError for folders of different classes, and for more images than fit."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise cli.InputError(
            f"--data-path and --val-path have different classes: {', '.join(odd[:3])} in one of them only"
        )
    if not 2 <= settings.batch_size <= len(train):
        raise cli.InputError(
            f"--batch-size {settings.batch_size}: expected at least 2, at most the {len(train)} images there are"
        )
    needed = (len(train) + len(val)) * settings.image_size**2 * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise cli.InputError(
            f"{len(train) + len(val)} images of {settings.image_size} px take {needed / 1e9:.0f} GB of memory, more than "
            f"half of the {memory / 1e9:.0f} GB there are: give a smaller --image-size or fewer images"
        )


def read_all(folder: ImageFolder, size: int) -> np.ndarray:
    """All images of a folder: uint8 (N, size, size, 3)."""
    images_NHWC = np.empty((len(folder), size, size, 3), np.uint8)
    done = 0
    for batch in load_images(folder.paths, size):
        images_NHWC[done : done + len(batch)] = batch
        done += len(batch)
    return images_NHWC


def augmented(images_BHWC: Tensor, indices_B: np.ndarray, epoch: int, settings: Settings) -> Tensor:
    """Shifted and mirrored, each image by its own draw from (seed, epoch, image)."""
    key = (settings.seed, streams.AUGMENT, epoch)
    if settings.max_shift:
        draws_B2 = streams.uniform(*key, SHIFT, indices_B[:, None], np.arange(2))
        offsets_B2 = np.floor(draws_B2 * (2 * settings.max_shift + 1)).astype(np.int64) - settings.max_shift
        images_BHWC = shifted(images_BHWC, torch.from_numpy(offsets_B2))
    if settings.flip:
        mirrored_B = torch.from_numpy(streams.uniform(*key, MIRROR, indices_B) < 0.5)
        images_BHWC = torch.where(mirrored_B[:, None, None, None], images_BHWC.flip(2), images_BHWC)
    return images_BHWC


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of update `step` (0-based) of `steps`: linear up to the peak, then a half cosine down towards 0."""
    warmup = int(WARMUP * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(settings: Settings, images: np.ndarray, labels: np.ndarray, classes: int, device: torch.device) -> Classifier:
    """A trained classifier. Raises InputError if an epoch ends with a loss that is not finite."""
    images_NHWC, labels_N = torch.from_numpy(images), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Classifier(classes).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    batch, per_epoch = settings.batch_size, len(images) // settings.batch_size
    for epoch in range(settings.epochs):
        order = streams.permutation(len(images), settings.seed, streams.ORDER, epoch)
        for step in progress(range(per_epoch), desc=f"epoch {epoch + 1} of {settings.epochs}", unit=" steps"):
            indices_B = order[step * batch : (step + 1) * batch]
            chosen = torch.from_numpy(indices_B)
            x_BHWC = augmented(images_NHWC[chosen], indices_B, epoch, settings).to(device)
            _, logits_BC = model(x_BHWC)
            loss = F.cross_entropy(logits_BC, labels_N[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            done = epoch * per_epoch + step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, settings.epochs * per_epoch, settings.lr)
            optimizer.step()
        if not loss.isfinite():
            raise cli.InputError(f"the loss is {loss.item()} after epoch {epoch + 1}: give a lower --lr")
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    return model


def accuracy(network: Network, images_NHWC: np.ndarray, labels_N: np.ndarray, batch_size: int = 256) -> float:
    """Share of images that an exported network puts in their class."""
    starts = range(0, len(images_NHWC), batch_size)
    logits_NC = np.concatenate([network(images_NHWC[start : start + batch_size])[1] for start in starts])
    return class_accuracy(logits_NC, labels_N)


def main() -> None:
    settings, out = parse()
    if is_there(out, settings.plain()):
        print(f"{out} is complete already")
        return
    folder, val = ImageFolder(settings.data_path), ImageFolder(settings.val_path)
    check(settings, folder, val)
    start = time.monotonic()
    images, val_images = (read_all(part, settings.image_size) for part in (folder, val))
    with world() as here:
        model = train(settings, images, folder.labels, len(folder.classes), here.device)
        with atomic_path(out) as temporary:  # it gets its name when its record is there
            save_network(temporary, fused(model), settings.image_size, settings.name)
            network = Network.load(temporary, here.device)
            correct = accuracy(network, val_images, val.labels)
            record = {
                "settings": settings.plain(), "classes": folder.classes, "images": len(folder), "val_images": len(val),
                "val_accuracy": correct, "sha256": network.sha256, "seconds": round(time.monotonic() - start, 1),
            }  # fmt: skip
            write_json(out.with_suffix(".json"), record)
    print(f"wrote {out}: {correct:.2%} of {len(val)} validation images right, {record['seconds']:.0f} s")


if __name__ == "__main__":
    cli.run(main)
