"""What a training is to the engine: the settings that all have, a Task, and its Opponent if it has one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils import draw
from utils.cli import InputError
from utils.distributed import World, precision_dtype
from utils.log import RunLog
from utils.settings import (
    Count,
    FractionBelowOne,
    NonNegative,
    Positive,
    PositiveInt,
    Seed,
    Settings,
    one_of,
    setting,
)


class EngineSettings(Settings):
    """What every training has: the update, and what happens every so many steps."""

    global_batch_size: PositiveInt = setting(256, "images a step, over all processes")
    gradient_accumulation_steps: PositiveInt = setting(1, "parts that a process's batch is cut in", free=True)
    lr: Positive = setting(1e-4)
    weight_decay: NonNegative = setting(5e-2)
    beta1: FractionBelowOne = setting(0.9)
    beta2: FractionBelowOne = setting(0.95)
    max_grad_norm: NonNegative = setting(1.0, "gradients are clipped to this norm; 0: no clipping")
    global_seed: Seed = setting(0)
    mixed_precision: one_of(("auto", "none", "fp32", "bf16", "fp16")) = setting(
        "auto", "auto: bf16 where the device computes in it, otherwise fp32", free=True
    )  # what it comes to is recorded as `precision`
    compile: bool | None = setting(None, "torch.compile (default: on GPUs)", free=True)
    log_every: PositiveInt = setting(100, "steps", free=True)
    val_every: PositiveInt | None = setting(None, "steps between validations; default: an epoch", free=True)
    ckpt_every: PositiveInt = setting(5000, "steps", free=True)
    keep_last: Count = setting(3, "checkpoints to keep besides the ends of levels; 0: all", free=True)
    cloud_save_path: Path | None = setting(None, "copy checkpoints there too, in the background", free=True)
    tensorboard: bool = setting(False, "write events for TensorBoard too (pip install tensorboard)", free=True)

    def precision(self, device: torch.device) -> str:
        """What --mixed-precision comes to on this device, for the record of a run."""
        return str(precision_dtype(self.mixed_precision, device)).removeprefix("torch.")

    def check_batch(self, images: int, processes: int) -> None:
        """Raise InputError unless the global batch fits the images and divides by processes and parts."""
        if images < self.global_batch_size:
            raise InputError(f"--global-batch-size {self.global_batch_size} is more than the {images} images there are")
        parts = processes * self.gradient_accumulation_steps
        if self.global_batch_size % parts:
            raise InputError(
                f"--global-batch-size {self.global_batch_size} is not divisible by {processes} processes x "
                f"{self.gradient_accumulation_steps} accumulation steps: give a multiple of {parts}"
            )


class Opponent(NamedTuple):
    """A second model that is trained in turn with the first one, such as a GAN's discriminator, on what the first one's update
    leaves behind. Its model and optimizer are among Task.parts().

    objective: the module around it that is called for the loss. batches: the micro-batches that update `step` (0-based) left
    behind, on the device; none: the opponent is not trained in it. loss: as Task.loss, of one of them; its parts are logged.
    lr_ratio: its learning rate is that of the first model, times this.
    """

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], Sequence[Sequence[Tensor]]]
    loss: Callable[[nn.Module, Sequence[Tensor]], dict[str, Tensor]]
    lr_ratio: float = 1.0


class Task(ABC):
    """What is trained. A subclass sets the attributes in its __init__ and overrides what it needs.

    model: the weights to train. objective: what is called for the loss, the model itself or a module around it; it is what
    processes and torch.compile wrap. about: plain data that goes into every checkpoint. steps: updates of the whole run.
    stops: steps whose checkpoints are kept for good. ema_decay: of the weights' average, which warms up; None: there is none.
    opponent: what is trained in turn with the model. Names of losses are the same in every step.
    """

    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    opponent: Opponent | None = None
    about: Mapping[str, Any]
    steps: int
    steps_per_epoch: int
    stops: Collection[int] = ()
    ema_decay: float | None = None
    loss_unit: str = ""  # for the curve's axis
    data_parallel: str = "ddp"  # or fsdp, hsdp: shard the weights, a group for each of `blocks` and one for the rest
    blocks: str = ""  # the model's list of them; its objective calls the model only by forward and by `methods`
    methods: Sequence[str] = ()

    @abstractmethod
    def batches(self, epoch: int, first_step: int, world: World) -> Iterator[Sequence[Tensor]]:
        """This process's part of each global batch of an epoch from its step first_step on: CPU tensors, (B, ...) each."""

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """The rate of update `step` (0-based)."""

    @abstractmethod
    def loss(self, objective: nn.Module, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """The loss of a (micro-)batch on the device, under the name "loss", and parts of it to be logged."""

    def after_update(self, step: int, ema: nn.Module | None, world: World) -> None:  # noqa: B027 (optional)
        """Called after update `step - 1`, before the average moves."""

    def labels(self, step: int) -> dict[str, Any]:
        """What is logged with update `step` besides its epoch, such as its patch side."""
        return {}

    def metrics(self) -> dict[str, float]:
        """What is logged with each report besides the losses."""
        return {}

    def flops(self, step: int) -> float:
        """FLOPs of training on one image in update `step`; 0 where they are not known."""
        return 0.0

    def cost_after(self, step: int) -> float:
        """The cost of all updates from `step` on, in units of flops() or, where those are 0, in updates."""
        return (self.steps - step) * (self.flops(step) or 1.0)

    def positions(self, step: int) -> float:
        """Sequence positions of one image in update `step`; 0 for what is no sequence."""
        return 0.0

    def validate(self, model: nn.Module, step: int, world: World, amp: Callable) -> dict[str, float]:
        """Figures of a model on held-out data, the token-level or only loss as "val_loss"; empty without such data."""
        return {}

    def previews(self, step: int) -> bool:
        """Whether preview is due after so many updates."""
        return False

    def preview(self, model: nn.Module, step: int, log: RunLog) -> None:  # noqa: B027 (optional)
        """Draw what the model makes."""

    def parts(self) -> dict[str, Any]:
        """Further stateful parts by their names in a checkpoint: objects with state_dict and load_state_dict."""
        return {}

    def draw(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Draw the rows of metrics.jsonl into the run's folder, as loss.png: the training loss, a line a patch side where there
        are several, and the validation loss, over the epochs."""
        series: dict[str, tuple[list[float], list[float]]] = {}

        def add(name: str, key: str, chosen: Sequence[Mapping[str, Any]]) -> None:
            chosen = [row for row in chosen if key in row]
            if chosen:
                series[name] = ([r["step"] / self.steps_per_epoch for r in chosen], [r[key] for r in chosen])

        patches = dict.fromkeys(row["patch"] for row in rows if "patch" in row)
        for patch in patches:
            add(f"training, {patch}x{patch} patches", "loss", [row for row in rows if row.get("patch") == patch])
        if not patches:
            add("training", "loss", rows)
        codes = ", single codes" if patches else ""
        add(f"validation{codes}", "val_loss", rows)
        add(f"validation{codes}, average of the weights", "val_loss_ema", rows)
        unit = f" ({self.loss_unit})" if self.loss_unit else ""
        draw.curves(
            folder / "loss.png", series, x_label="epoch", y_label=f"loss{unit}", title=folder.name,
            boundaries=self.boundaries(),
        )  # fmt: skip

    def boundaries(self) -> dict[float, str]:
        """Where stages begin, in epochs, and their names, for the curves."""
        return {}
