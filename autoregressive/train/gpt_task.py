"""What the engine needs to know of a GPT: the settings, batches of codes, loss on patches, plan, and how it is validated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from autoregressive.models.gpt import PRESETS, Transformer
from autoregressive.models.patches import to_patches
from autoregressive.train.schedule import Plan, ScheduleSettings
from dataset.codes import Codes
from dataset.sampler import epoch_batches
from pretrained_models.catalogue import WeightsFile
from utils import streams
from utils.distributed import World
from utils.log import RunLog
from utils.settings import Fraction, FractionBelowOne, ImageSize, PositiveInt, one_of, setting
from utils.sharding import DATA_PARALLEL
from utils.task import EngineSettings, Task
from utils.update import adamw


class TrainSettings(ScheduleSettings, EngineSettings):
    """The settings of GPT training; see --help."""

    code_path: list[Path] = setting(help="folders of extract_codes_c2i.sh: views of the same images", free=True)
    dataset: str = setting("imagenet", "name of the data set in the code folder's name")
    image_size: ImageSize = setting(256, "size the codes were extracted at")
    val_code_path: Path | None = setting(None, "held-out codes, for the token-level validation loss", free=True)
    val_split: Fraction = setting(0.0, "or hold out this share of the training images")
    val_images: PositiveInt = setting(5000, "use this many of them at most", free=True)
    results_dir: Path = setting(Path("results"), free=True)
    fresh: bool = setting(False, "start a new run even if one can be continued", free=True)
    dry_run: bool = setting(False, "print and draw the plan (RESULTS_DIR/plan.png), and stop", free=True)

    gpt_model: one_of(PRESETS) = setting("GPT-B")
    gpt_ckpt: WeightsFile | None = setting(
        None,
        "start from these weights (a new schedule and optimizer); of other classes, too",
        free=True,
        metavar="WEIGHTS",
    )
    init_classes: list[str] | None = setting(
        None, "with --gpt-ckpt: classes that begin as one of its own; others as that of their name, or the mean",
        metavar="NAME=OLD",
    )  # fmt: skip
    vocab_size: PositiveInt | None = setting(None, "default: the codebook's, from the manifest; 16384 without one")
    num_classes: PositiveInt | None = setting(None, "default: from the manifest; 1000 without one")
    dropout_p: Fraction = setting(0.1, "dropout of both branches of a block; none with --drop-path-rate")
    token_dropout_p: Fraction = setting(0.1, "dropout of the embedded input")
    drop_path_rate: FractionBelowOne = setting(0.0, "stochastic depth, rising to this at the last block")
    class_dropout_p: Fraction = setting(0.1, "labels replaced by the null class, for guidance")

    ema: bool = setting(False, "keep an exponential moving average of the weights")
    ema_decay: Fraction = setting(0.9999, "of this average; it warms up as (1 + step) / (10 + step)")
    activation_checkpointing: bool = setting(
        False, "less memory: compute each block again in the backward pass", free=True
    )
    data_parallel: one_of(DATA_PARALLEL) = setting(
        "ddp", "fsdp: each process holds a part of the weights; hsdp: each machine holds all of them", free=True
    )
    vq_ckpt: WeightsFile | None = setting(None, "tokenizer: draw samples while training", free=True, metavar="WEIGHTS")
    sample_every: PositiveInt = setting(10, "epochs, with --vq-ckpt; and at the end", free=True)

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.init_classes and not self.gpt_ckpt:
            raise ValueError("--init-classes says how classes of --gpt-ckpt are taken over: give that, too")
        if self.val_code_path and self.val_split:
            raise ValueError("--val-code-path and --val-split are two ways to hold out images: give one of them")
        return self


@dataclass(frozen=True)
class Data:
    """Codes, and the indices of the images to train on and of those held out."""

    codes: Codes
    images: np.ndarray | None = None  # None: all
    val: Codes | None = None
    val_images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.codes) if self.images is None else len(self.images)

    @classmethod
    def split(cls, codes: Codes, share: float) -> "Data":
        """Hold out this share of the images, at least one; the choice depends only on how many there are."""
        order = streams.permutation(len(codes), streams.HELD_OUT)
        held = max(1, round(share * len(codes)))
        return cls(codes, np.sort(order[held:]), codes, np.sort(order[:held]))


class PatchLoss(nn.Module):
    """A model's training loss as a forward(patches_BNK, labels_B), which DDP and torch.compile can wrap.

    recompute: activation checkpointing.
    """

    def __init__(self, model: Transformer, recompute: bool = False) -> None:
        super().__init__()
        self.model, self.recompute = model, recompute

    def forward(self, patches_BNK: Tensor, labels_B: Tensor) -> Tensor:
        return self.model.loss(patches_BNK, labels_B, self.recompute)


class GPTTask(Task):
    """Training of a GPT on codes by a plan of patch sides.

    preview(model, epoch): draws samples, on the first process, where the settings have a tokenizer.
    """

    loss_unit = "nats a code"
    blocks, methods = "layers", ("loss",)

    def __init__(
        self,
        model: Transformer,
        data: Data,
        plan: Plan,
        settings: TrainSettings,
        about: Mapping[str, Any],
        preview: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        self.model, self.data, self.plan, self.settings = model, data, plan, settings
        self.about, self.draw_samples = about, preview
        self.objective = PatchLoss(model, settings.activation_checkpointing)
        self.optimizer = adamw(model, settings)
        self.data_parallel = settings.data_parallel
        self.ema_decay = settings.ema_decay if settings.ema else None
        self.steps, self.steps_per_epoch = plan.total, plan.steps_per_epoch
        self.stops = {level.stop for level in plan.levels}

    def batches(self, epoch: int, first_step: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes (B, L) and labels (B,), dropped ones replaced by the null class."""
        s, batch = self.settings, self.settings.global_batch_size
        selections = epoch_batches(
            len(self.data), self.data.codes.views, batch, seed=s.global_seed, epoch=epoch, label_drop=s.class_dropout_p,
            first_step=first_step, part=world.share(batch),
        )  # fmt: skip
        for selection in selections:
            images = selection.indices if self.data.images is None else self.data.images[selection.indices]
            codes, labels = self.data.codes.batch(images, selection.views)
            labels = np.where(selection.dropped, self.model.config.num_classes, labels)
            yield torch.from_numpy(codes), torch.from_numpy(labels)

    def learning_rate(self, step: int) -> float:
        return self.plan.rate(step)

    def loss(self, objective: nn.Module, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        codes_BL, labels_B = batch
        return {"loss": objective(to_patches(codes_BL, self.plan.level(step).patch), labels_B)}

    def labels(self, step: int) -> dict[str, Any]:
        return {"patch": self.plan.level(step).patch}

    def flops(self, step: int) -> float:
        return self.model.config.training_flops(self.plan.level(step).patch)

    def cost_after(self, step: int) -> float:
        return self.plan.remaining(step, self.model.config.training_flops)

    def positions(self, step: int) -> float:
        return self.model.config.block_size / self.plan.level(step).patch ** 2

    def boundaries(self) -> dict[float, str]:
        return self.plan.boundaries()

    def validate(self, model: nn.Module, step: int, world: World, amp: Callable) -> dict[str, float]:
        """Held-out loss on single codes, and at this level's patch side if that is above 1."""
        data = self.data
        if not data.val:
            return {}
        images = np.arange(len(data.val)) if data.val_images is None else data.val_images
        chosen = images[np.linspace(0, len(images) - 1, min(self.settings.val_images, len(images))).astype(np.int64)]
        patch = self.plan.level(step - 1).patch
        row = {"val_loss": self._mean_loss(model, data.val, chosen, 1, world, amp)}
        if patch > 1 and model is self.model:
            row[f"val_loss_p{patch}"] = self._mean_loss(model, data.val, chosen, patch, world, amp)
        return row

    @torch.no_grad()
    def _mean_loss(
        self, model: nn.Module, codes: Codes, images: np.ndarray, patch: int, world: World, amp: Callable
    ) -> float:
        """Mean loss (nats a code) of these images at a patch side, in eval mode; each process does its share."""
        was_training, batch = model.training, max(1, min(256, self.settings.global_batch_size // world.size))
        model.eval()
        share = images[world.share(len(images))]
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        most = -(-len(images) // world.size)
        for start in range(0, most, batch):  # as many batches on each process: sharded models need all
            part = share[start : start + batch]
            weight = len(part)
            part = part if weight else images[:1]
            codes_BL, labels_B = (torch.from_numpy(a).to(world.device) for a in codes.batch(part))
            with amp():
                total[0] += model.loss(to_patches(codes_BL, patch), labels_B).double() * weight
            total[1] += weight
        model.train(was_training)
        world.sum(total)
        return (total[0] / total[1]).item()

    def previews(self, step: int) -> bool:
        s = self.settings
        due = step % (s.sample_every * self.steps_per_epoch) == 0 or step == self.steps
        return s.vq_ckpt is not None and due

    def preview(self, model: nn.Module, step: int, log: RunLog) -> None:
        self.draw_samples(model, -(-step // self.steps_per_epoch))
