"""The plan of a pipeline: what is chosen from the data, the device and the time, and how long each stage will take."""

import math
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.gpt import GPTConfig
from autoregressive.train.schedule import patch_levels
from pretrained_models.catalogue import CATALOGUE
from scripts.pipeline.images import Images
from scripts.pipeline.measure import Costs
from scripts.pipeline.models import Models, absolute, level_count
from scripts.pipeline.settings import PipelineSettings, parse_flags
from utils.cli import InputError, counted
from utils.distributed import from_environment
from utils.log import duration
from utils.records import Record

TITLES = {
    "weights": "published weights",
    "reference": "reference batch of training images",
    "test_images": "batch of test images",
    "classifier": "classifier, the feature network of the evaluation",
    "tokenizer": "tokenizer",
    "reconstruct": "reconstructions of test images",
    "codes": "codes of the training images",
    "test_codes": "codes of the test images",
    "train": "GPT, by Next Patch Prediction",
    "sample": "samples",
    "grid": "samples.png",
    "evaluate": "evaluation",
    "report": "report",
}
BUDGET = {"cpu": 1800.0, "cuda": 3600.0}  # seconds, where no time is given
STARTUP = 5.0  # seconds until a stage has loaded PyTorch and its data
LEARNING_RATES = {"GPT-XXS": 3e-3, "GPT-XS": 2e-3, "GPT-S": 1e-3, "GPT-B": 4e-4}  # from scratch, at a batch of about 64
LARGE_LEARNING_RATE = 2e-4  # of larger ones
FINE_TUNING_FACTOR = 0.2  # of the rate from scratch
TIME_SHARES = {"classifier": 0.08, "tokenizer": 0.25, "sample": 0.08}  # of the time, at most
MAX_EPOCHS = {"classifier": 40, "tokenizer": 300, "gpt": 300}
TOKENIZER_IMAGES, CLASSIFIER_IMAGES = 2_000_000, 200_000  # seen in training; more helps little
MIN_TEST_IMAGES = 8  # images, below which figures mean nothing
KV_CACHE = {"cpu": 1 << 30, "cuda": 4 << 30}  # bytes of keys and values while drawing


class Plan(Record):
    """RUN/plan.json: what was chosen, for which images and settings. seconds: estimates, by stage."""

    content: str
    settings: dict[str, Any]
    name: str
    image_size: int
    classes: list[str]
    train_images: int
    test_images: int
    tokens: int
    tokenizer: str  # train, or what --vq-ckpt takes
    vq_model: str
    init: str | None
    gpt_model: str
    epochs: int
    batch_size: int
    network: str  # train, inception, none or a file
    samples: int
    flags: dict[str, dict[str, list[str]]]
    seconds: dict[str, float]
    notes: list[str]

    @property
    def reference_images(self) -> int:
        """Training images that samples are compared with."""
        return min(self.settings["reference_images"], self.train_images)

    @property
    def measured_images(self) -> int:
        """Test images that figures are measured with."""
        return min(self.settings["test_images"], self.test_images)

    @property
    def scale(self) -> int:
        """How many times pictures of images are enlarged."""
        return max(1, 64 // self.image_size)


def recorded(s: PipelineSettings) -> dict[str, Any]:
    """The settings that a plan follows from, as plain data."""
    return {key: value for key, value in s.plain().items() if key not in s.free() or key == "strict"}


def make_plan(
    s: PipelineSettings, name: str, images: Images, models: Models, costs: Costs, device: torch.device
) -> Plan:
    """Choose what was not given, and estimate. Raises InputError for settings that exclude each other."""
    budget = s.time_budget or BUDGET[device.type]
    n, processes = images.train_names, _processes()
    batch = _batch(s, n, processes, device)
    network, notes = _network(s, images)
    affordable = int(TIME_SHARES["sample"] * budget * processes / costs.sample)
    samples = s.samples or min(5000, max(200, affordable // 100 * 100))

    plan = Plan(
        content=images.content, settings=recorded(s), name=name, image_size=models.image_size, classes=images.classes,
        train_images=n, test_images=images.test_names, tokens=models.gpt.block_size, tokenizer=models.tokenizer,
        vq_model=models.vq_model, init=s.init and absolute(s.init), gpt_model=models.gpt_model, epochs=0, batch_size=batch,
        network=network, samples=samples, flags={}, seconds={}, notes=[],
    )  # fmt: skip
    planned = _first_flags(s, plan, costs, budget, processes) | {
        "sample": f"--cfg-scale {s.cfg_scale:g} --labels balanced --num-fid-samples {samples} "
        f"--per-proc-batch-size {_sampling_batch(models.gpt, device)}"
    }
    # What is given takes the place of what is planned.
    flags = {stage: parse_flags(text) | s.given(stage) for stage, text in planned.items()}
    plan = plan.model_copy(update={"flags": flags})
    seconds = _seconds(plan, costs, processes)
    levels = level_count(s)
    an_epoch, least = n * _training_cost(costs, levels) / processes, 2 ** (levels - 1)
    left = 0.95 * (budget - sum(seconds.values()))
    epochs = s.epochs or s.given_number("gpt", "--epochs")
    if not epochs:
        epochs = max(least, min(MAX_EPOCHS["gpt"], int(left / an_epoch)))
        if left < an_epoch * least:
            notes.append(f"the time of {budget:.0f} s is too short for {least} epochs: the plan exceeds it")
    gpt_flags = parse_flags(_gpt_flags(s, plan, epochs))
    seconds["train"] += epochs * an_epoch + _monitoring(s, gpt_flags, costs, epochs, epochs * (n // batch))
    return plan.model_copy(
        update={
            "epochs": epochs, "flags": {**flags, "gpt": gpt_flags | s.given("gpt")}, "notes": notes,
            "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        }
    )  # fmt: skip


def _processes() -> int:
    """How many processes the stages of several use, as utils/launch.py has it."""
    if from_environment("NNODES", 1, least=1) > 1:
        raise InputError("NNODES is above 1, but the pipeline runs on one machine: run its stages one by one (docs)")
    return from_environment("NPROC_PER_NODE", max(1, torch.cuda.device_count()), least=1)


def _batch(s: PipelineSettings, n: int, processes: int, device: torch.device) -> int:
    """Images a step: as given or chosen, rounded down to a multiple of the processes."""
    wanted = s.batch_size or min(64 if device.type == "cpu" or n < 50_000 else 256, max(4, n // 8))
    batch = max(1, wanted // processes) * processes
    if batch > n:
        raise InputError(
            f"a batch of {batch} images for {processes} processes is more than the {n} training images there are"
        )
    return batch


def _network(s: PipelineSettings, images: Images) -> tuple[str, list[str]]:
    """train, inception, none or a file; and why there are no figures."""
    if s.network in ("train", "inception", "none"):
        return s.network, []
    if s.network:
        if not Path(s.network).is_file():
            raise InputError(
                f"--network {s.network}: there is no file of this name; expected train, inception, none or a .pt2"
            )
        return absolute(s.network), []
    if len(images.classes) == 1:
        return "none", ["no figures: one class leaves a classifier nothing to learn (use --network inception)"]
    few = images.test_names < MIN_TEST_IMAGES
    return ("none", ["no figures: too few test images for them"]) if few else ("train", [])


def _first_flags(s: PipelineSettings, plan: Plan, costs: Costs, budget: float, processes: int) -> dict[str, str]:
    """The flags of the classifier and the tokenizer, whose epochs take the shares of the time in TIME_SHARES."""
    n = plan.train_images

    def epochs_of(stage: str, cost: float, most: int) -> int:
        affordable = int(TIME_SHARES[stage] * budget / (n * cost))
        return s.given_number(stage, "--epochs") or max(1, min(most, MAX_EPOCHS[stage], affordable))

    classifier_epochs = epochs_of("classifier", costs.classify, max(3, CLASSIFIER_IMAGES // n))
    tokenizer_epochs = epochs_of("tokenizer", costs.tokenizer_training / processes, max(1, TOKENIZER_IMAGES // n))
    long = classifier_epochs > 10
    few_steps = tokenizer_epochs * (n // plan.batch_size) < 2000
    return {
        "classifier": f"--epochs {classifier_epochs} --global-batch-size {min(128, max(2, n // 4))} "
        f"--name {plan.name}-classifier {'--flip' if long and not s.no_flip else ''} "
        + (f"--max-shift {plan.image_size // 16}" if long else ""),
        "tokenizer": f"{'--no-flip' if s.no_flip else ''} --global-batch-size {plan.batch_size} --restart-dead-codes 25 "
        f"--epochs {tokenizer_epochs} --ckpt-every 500 --ema-decay {0.99 if few_steps else 0.999}",
    }


def _seconds(plan: Plan, costs: Costs, processes: int) -> dict[str, float]:
    """Seconds of each stage, in order; of the GPT's training only its start."""
    train, test, measured = plan.train_images, plan.test_images, plan.measured_images
    views = 1 if plan.settings["no_flip"] else 2
    codes = (costs.read + views * costs.encode) / processes
    seconds = {
        "reference": plan.reference_images * costs.read,
        "test_images": measured * costs.read,
        "reconstruct": measured * (costs.read + 2 * costs.encode),
        "codes": train * codes,
        "test_codes": test * codes,
        "train": 0.0,
        "sample": plan.samples * costs.sample / processes,
        "grid": min(10, len(plan.classes)) * 12 * costs.sample,
        "report": 0.0,
    }
    if plan.tokenizer in CATALOGUE or plan.init in CATALOGUE:
        seconds["weights"] = 0.0
    if plan.network == "train":
        epochs = int(plan.flags["classifier"]["--epochs"][0])
        seconds["classifier"] = 5 + (train + test) * costs.read + epochs * train * costs.classify
    if plan.tokenizer == "train":
        epochs = int(plan.flags["tokenizer"]["--epochs"][0])
        seconds["tokenizer"] = train * (costs.read + epochs * costs.tokenizer_training / processes)
    if plan.network != "none":
        seconds["evaluate"] = 5 + (plan.reference_images + plan.samples + 2 * measured) * costs.classify / 2
    return {stage: STARTUP + seconds[stage] for stage in TITLES if stage in seconds}


def _training_cost(costs: Costs, levels: int) -> float:
    """Seconds of training on an image, in the mean over a schedule of so many levels."""
    rows = patch_levels(2 ** (levels - 1), levels, 0.5)
    return sum((row.stop - row.start) * costs.training[row.patch] for row in rows) / rows[-1].stop


def _monitoring(s: PipelineSettings, planned: dict[str, list[str]], costs: Costs, epochs: int, steps: int) -> float:
    """Seconds of a training's validations, of the weights and their average, and of the samples that it draws."""
    names = ("--val-images", "--val-every", "--sample-every")
    images, every, drawn = (s.given_number("gpt", name) or int(planned[name][0]) for name in names)
    return steps / every * 2 * images * costs.training[1] / 3 + epochs / drawn * 64 * costs.sample


def _gpt_flags(s: PipelineSettings, plan: Plan, epochs: int) -> str:
    levels, batch = level_count(s), plan.batch_size
    steps_per_epoch = plan.train_images // batch
    steps = epochs * steps_per_epoch
    rate = LEARNING_RATES.get(plan.gpt_model, LARGE_LEARNING_RATE) * math.sqrt(batch / 64)
    shortest = min(level.stop - level.start for level in patch_levels(epochs, levels, 0.5))
    own_schedule = "--patch-sizes" in s.given("gpt")
    schedule = "" if own_schedule else f"--patch-level {levels} --epoch-rate 0.5 --epochs {epochs}"
    return (
        f"{schedule} --global-batch-size {batch} --lr {rate * (FINE_TUNING_FACTOR if s.init else 1):.2g} --end-lr 1e-05 "
        f"--scheduler --warmup-epochs {max(0.01, min(shortest / 10, 200 / steps_per_epoch)):.2g} --decay-ratio 0.4 "
        f"--ema --ema-decay {0.99 if steps < 3000 else 0.999 if steps < 50_000 else 0.9999} "
        f"--log-every {max(1, min(100, steps // 100))} --ckpt-every {max(50, min(5000, steps // 10))} "
        f"--val-images {min(1000, plan.test_images)} --val-every {max(1, steps // 15)} "
        f"--sample-every {max(1, epochs // 5)} "
        + (shlex.join(["--init-classes", *s.init_classes]) if s.init_classes else "")
    )


def _sampling_batch(gpt: GPTConfig, device: torch.device) -> int:
    """Images whose keys and values, with those of guidance, take at most KV_CACHE."""
    image = 2 * 2 * 4 * gpt.block_size * gpt.n_layer * gpt.kv_heads * gpt.head_dim
    return max(4, min(500, KV_CACHE[device.type] // image))


def table(plan: Plan, done: Collection[str] = ()) -> str:
    """The plan in words: what was chosen, and the estimated time of each stage. done: stages that are."""
    views = "as they are" if plan.settings["no_flip"] else "and their mirror images"
    start = f", fine-tuned from {plan.init}" if plan.init else ""
    tokenizer = f"{plan.vq_model}, trained here" if plan.tokenizer == "train" else f"{plan.tokenizer} ({plan.vq_model})"
    side = math.isqrt(plan.tokens)
    lines = [
        f"plan for {plan.name}: {plan.train_images:,} images to train on, {plan.test_images:,} held out, "
        f"{counted(len(plan.classes), 'class')}, {plan.image_size} px, {views}",
        f"tokenizer: {tokenizer}, {side}x{side} codes an image",
        f"GPT: {plan.gpt_model}{start}, {plan.epochs} epochs in batches of {plan.batch_size}",
        *[f"note: {text}" for text in plan.notes],
    ]
    width = max(map(len, TITLES.values()))
    for stage, seconds in plan.seconds.items():
        note = "  (done)" if stage in done else ""
        lines.append(f"  {stage:12} {TITLES[stage]:{width}} {duration(seconds):>9}{note}")
    whole = duration(sum(plan.seconds.values()))
    return "\n".join([*lines, f"  {'all':12} {'estimated on this machine as it is now':{width}} {whole:>9}"])
