"""Before a run: what each GPU would hold, what to set so that it fits, and how long it would take.

    python -m autoregressive.train.plan --gpt-model GPT-XXL --gpus 32 --gpu h100

--all: of every model.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from pydantic import model_validator
from typing_extensions import Self

from autoregressive.models.gpt import PRESETS, GPTConfig, preset
from autoregressive.train.memory import Memory, memory, meta_model, parameters
from autoregressive.train.schedule import Plan, ScheduleSettings
from utils import cli
from utils.settings import ImageSize, Positive, PositiveFraction, PositiveInt, one_of, setting

GPUS = {  # GB and dense bf16 FLOP/s of the data sheets
    "a100-40": (40, 312e12),
    "a100": (80, 312e12),
    "h100": (80, 989e12),
    "h200": (141, 989e12),
    "b200": (180, 2250e12),
    "l40s": (48, 362e12),
    "rtx4090": (24, 165e12),
}
USABLE = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and what lies idle between tensors
EFFICIENT = 8  # images at once, below which recomputing comes before smaller parts
PUBLISHED = (1, 2, 3)  # levels at rate 0.5 of 300 epochs


class PlanSettings(ScheduleSettings):
    """The settings of a projection; the defaults are the published ones."""

    gpt_model: one_of(PRESETS) = setting("GPT-B")
    all: bool = setting(False, "a table (Markdown) of every model instead of one in detail")
    gpus: PositiveInt = setting(8)
    gpu: one_of(GPUS) = setting("h100")
    mfu: PositiveFraction = setting(0.4, "share of the data sheet's bf16 rate that training reaches")
    images_per_s: Positive | None = setting(None, "or images/s that one GPU was measured at, of --gpt-model at 1x1")
    images: PositiveInt = setting(1281167, "in the data set")
    grid: ImageSize = setting(16, "codes a side of an image")
    vocab_size: PositiveInt = setting(16384)
    num_classes: PositiveInt = setting(1000)
    global_batch_size: PositiveInt = setting(256, "images a step, over all GPUs")
    lr: Positive = setting(1e-4)
    ema: bool = setting(False, "with an average of the weights")

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.global_batch_size % self.gpus or self.images < self.global_batch_size:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: expected a multiple of the {self.gpus} GPUs, and at most the "
                f"{self.images} images"
            )
        if self.all and self.images_per_s:
            raise ValueError("--images-per-s is of one model, --all is of every one: give --mfu")
        return self

    def config(self, name: str) -> GPTConfig:
        """A preset with this vocabulary, classes and grid, and the published dropout."""
        return preset(
            name, vocab_size=self.vocab_size, num_classes=self.num_classes, block_size=self.grid**2,
            token_dropout_p=0.1, resid_dropout_p=0.1, ffn_dropout_p=0.1,
        )  # fmt: skip

    def plans(self) -> dict[str, Plan]:
        """The schedule asked for, or the published ones."""
        asked = self.patch_level or self.epoch_rate or self.patch_sizes
        settings = [self] if asked else [self.model_copy(update={"patch_level": level}) for level in PUBLISHED]
        plans = [one.plan(self.lr, self.images // self.global_batch_size, self.grid**2) for one in settings]
        return {", ".join(f"{s.patch}x{s.patch}" for s in plan.levels): plan for plan in plans}

    def flops(self, plan: Plan, config: GPTConfig) -> float:
        """FLOPs of a whole run."""
        return self.global_batch_size * plan.remaining(0, config.training_flops)

    def hours(self, plan: Plan, config: GPTConfig) -> float:
        """How long the run takes."""
        rate = self.images_per_s * config.training_flops() if self.images_per_s else self.mfu * GPUS[self.gpu][1]
        return self.flops(plan, config) / (self.gpus * rate) / 3600


class Way(NamedTuple):
    """A way to train: how many images a GPU takes at once, the most that fit (or 1), and what it then holds."""

    data_parallel: str
    recompute: bool
    images: int
    memory: Memory
    fits: bool

    def flags(self, images: int) -> str:
        """What to give the trainer, where a GPU has so many images a step."""
        parts = f" --gradient-accumulation-steps {images // self.images}" if images > self.images else ""
        return f"--data-parallel {self.data_parallel}{parts}{' --activation-checkpointing' if self.recompute else ''}"


def ways(s: PlanSettings, config: GPTConfig) -> list[Way]:
    """ddp and fsdp, without and with recomputing, each with the largest part of a GPU's batch that fits."""
    found, whole = [], s.global_batch_size // s.gpus
    parts = [images for images in range(whole, 0, -1) if whole % images == 0]
    for recompute, data_parallel in product((False, True), ("ddp", "fsdp") if s.gpus > 1 else ("ddp",)):
        for images in parts:
            held = memory(config, images, data_parallel=data_parallel, gpus=s.gpus, recompute=recompute, ema=s.ema)
            if fits := held.total <= USABLE * GPUS[s.gpu][0] * 1e9:
                break
        found.append(Way(data_parallel, recompute, images, held, fits))
    return found


def best(found: Sequence[Way], images: int) -> Way | None:
    """The cheapest way that fits: ddp before fsdp, recomputing where too few images fit without; None if none does."""
    fitting = [way for way in found if way.fits]
    return next((way for way in fitting if way.images >= min(images, EFFICIENT)), next(iter(fitting), None))


def detail(s: PlanSettings) -> str:
    """What is known of one model."""
    config, images = s.config(s.gpt_model), s.global_batch_size // s.gpus
    found = ways(s, config)
    chosen = best(found, images)
    lines = [
        f"{s.gpt_model}: {parameters(meta_model(config)) / 1e6:,.1f}M parameters, {config.training_flops():.3g} FLOPs an image "
        f"at 1x1; {s.gpus} {s.gpu} of {GPUS[s.gpu][0]} GB, {images} images each a step; GB a GPU:"
    ]
    names = [*Memory._fields, "total"]
    lines.append("".join(name.rjust(13) for name in ["", "recompute", "at once", *names, "fits"]))
    for way in found:
        cells = [way.data_parallel, "yes" if way.recompute else "no", str(way.images)]
        cells += [f"{value / 1e9:.2f}" for value in (*way.memory, way.memory.total)]
        lines.append("".join(cell.rjust(13) for cell in [*cells, "yes" if way.fits else "no"]))
    advice = "train by: " + chosen.flags(images) if chosen else "it does not fit: take more GPUs, or larger ones"
    lines.append(advice + (" --ema" if chosen and s.ema else ""))
    rate = (
        f"{s.images_per_s:g} images/s a GPU at 1x1" if s.images_per_s else f"{s.mfu:.0%} of {GPUS[s.gpu][1]:.3g} FLOP/s"
    )
    plans = s.plans()
    for name, plan in plans.items():
        hours, epochs = s.hours(plan, config), plan.total / plan.steps_per_epoch
        lines.append(f"{name}: {epochs:g} epochs, {s.flops(plan, config):.3g} FLOPs, {hours:,.1f} hours at {rate}")
    if len(plans) == 1:
        lines.append(plan.table(s.global_batch_size, s.grid**2, config.training_flops))
    return "\n".join(lines)


def overview(s: PlanSettings) -> str:
    """A Markdown table of every model."""
    plans = s.plans()
    rows = [
        ["model", "parameters", "GFLOPs an image", "ddp, GB", "fsdp, GB", "train by", *(f"hours, {n}" for n in plans)]
    ]
    rows.append(["---"] * len(rows[0]))
    images = s.global_batch_size // s.gpus
    for name in PRESETS:
        config = s.config(name)
        found = ways(s, config)
        chosen = best(found, images)
        whole = [
            memory(config, images, data_parallel=way, gpus=s.gpus, ema=s.ema).total / 1e9 for way in ("ddp", "fsdp")
        ]
        rows.append([
            f"`{name}`", f"{parameters(meta_model(config)) / 1e6:,.0f}M", f"{config.training_flops() / 1e9:,.0f}",
            *(f"{value:.1f}" for value in whole),
            f"`{chosen.flags(images)}`" if chosen else "does not fit",
            *(f"{s.hours(plan, config):,.1f}" for plan in plans.values()),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = PlanSettings.from_command_line("What a training of a GPT takes: memory a GPU and hours.", arguments)
    print(overview(settings) if settings.all else detail(settings))


if __name__ == "__main__":
    cli.run(main)
