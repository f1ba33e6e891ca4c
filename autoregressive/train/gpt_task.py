"""What the engine needs to know of a GPT: its batches of codes, its loss on patches, its plan, and how it is validated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer
from autoregressive.models.patches import to_patches
from autoregressive.train.schedule import Plan
from dataset.codes import Codes
from dataset.sampler import epoch_batches
from utils import streams
from utils.distributed import World
from utils.log import RunLog
from utils.task import EngineSettings, Task
from utils.update import adamw


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

    label_drop: share of labels replaced by the null class. val_images: how many held-out images are measured at most.
    preview: draws samples on the first process; preview_every: epochs. data_parallel: see Task.
    """

    loss_unit = "nats a code"
    blocks, methods = "layers", ("loss",)

    def __init__(
        self,
        model: Transformer,
        data: Data,
        plan: Plan,
        settings: EngineSettings,
        *,
        label_drop: float,
        val_images: int = 5000,
        ema_decay: float | None = None,
        recompute: bool = False,
        about: Mapping[str, Any] | None = None,
        preview: Callable[[nn.Module, int], None] | None = None,
        preview_every: int | None = None,
        data_parallel: str = "ddp",
    ) -> None:
        self.data_parallel, self.preview_every = data_parallel, preview_every
        self.model, self.data, self.plan, self.ema_decay = model, data, plan, ema_decay
        self.about = about or {}
        self.objective = PatchLoss(model, recompute)
        self.optimizer = adamw(model, settings)
        self.batch, self.seed, self.label_drop = settings.global_batch_size, settings.global_seed, label_drop
        self.val_images, self.draw_samples = val_images, preview
        self.steps, self.steps_per_epoch = plan.total, plan.steps_per_epoch
        self.stops = {level.stop for level in plan.levels}

    def batches(self, epoch: int, first_step: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes (B, L) and labels (B,), dropped ones replaced by the null class."""
        selections = epoch_batches(
            len(self.data), self.data.codes.views, self.batch, seed=self.seed, epoch=epoch,
            label_drop=self.label_drop, first_step=first_step, part=world.share(self.batch),
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
        chosen = images[np.linspace(0, len(images) - 1, min(self.val_images, len(images))).astype(np.int64)]
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
        was_training, batch = model.training, max(1, min(256, self.batch // world.size))
        model.eval()
        share = images[world.share(len(images))]
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        for start in range(
            0, -(-len(images) // world.size), batch
        ):  # as many batches on each process: sharded models need all
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
        epoch, rest = divmod(step, self.steps_per_epoch)
        due = not rest and self.preview_every is not None and epoch % self.preview_every == 0
        return self.preview_every is not None and (due or step == self.steps)

    def preview(self, model: nn.Module, step: int, log: RunLog) -> None:
        if self.draw_samples:
            self.draw_samples(model, -(-step // self.steps_per_epoch))
