"""The plan of a pipeline: what is chosen from the data, the device and the time, and how long each stage will take."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoregressive.models.gpt import GPTConfig
from autoregressive.sample.sample_c2i_ddp import SampleSettings
from autoregressive.train.gpt_task import TrainSettings
from autoregressive.train.schedule import patch_levels
from evaluations.c2i.train_classifier import ClassifierSettings
from pretrained_models.catalogue import CATALOGUE
from scripts.pipeline.images import Images
from scripts.pipeline.measure import Costs
from scripts.pipeline.models import Models, absolute, level_count, whole_number
from scripts.pipeline.settings import PipelineSettings, parse_flags
from tokenizer.tokenizer_image.vq_settings import TokenizerSettings
from utils.cli import InputError, counted
from utils.distributed import from_environment
from utils.records import Record

STARTUP = 5.0  # seconds until a stage has loaded PyTorch and its data
LEARNING_RATES = {"GPT-XXS": 3e-3, "GPT-XS": 2e-3, "GPT-S": 1e-3, "GPT-B": 4e-4}  # from scratch, at a batch of about 64
LARGE_LEARNING_RATE = 2e-4  # of larger ones
FINE_TUNING_FACTOR = 0.2  # of the rate from scratch
TIME_SHARES = {"classifier": 0.08, "tokenizer": 0.25, "sample": 0.08}  # of the time, at most
MAX_EPOCHS = {"classifier": 40, "tokenizer": 300, "gpt": 300}
TOKENIZER_IMAGES, CLASSIFIER_IMAGES = 2_000_000, 200_000  # seen in training; more helps little
MIN_TEST_IMAGES = 8  # images, below which figures mean nothing
KV_CACHE = {"cpu": 1 << 30, "cuda": 4 << 30}  # bytes of keys and values while drawing


STAGE_SETTINGS = {
    "classifier": ClassifierSettings, "tokenizer": TokenizerSettings, "gpt": TrainSettings, "sample": SampleSettings,
}  # fmt: skip
RESERVED_FLAGS = frozenset(
    f"--{name}" for name in (
        "data-path", "val-path", "out", "results-dir", "code-path", "val-code-path", "sample-dir", "vq-ckpt", "gpt-ckpt",
        "gpt-model", "vq-model", "image-size", "dataset", "background", "exif-orientation", "fresh", "dry-run", "init-classes",
    )
)  # fmt: skip


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


def recorded(s: PipelineSettings) -> dict[str, Any]:
    """The settings that a plan follows from, as plain data."""
    return {key: value for key, value in s.plain().items() if key not in s.free() or key == "strict"}


def processes() -> int:
    """How many processes the stages of several use, as utils/launch.py has it."""
    if from_environment("NNODES", 1, least=1) > 1:
        raise InputError("NNODES is above 1, but the pipeline runs on one machine: run its stages one by one (docs)")
    return from_environment("NPROC_PER_NODE", max(1, torch.cuda.device_count()), least=1)


class Work(NamedTuple):
    """How much there is to do: images, epochs, samples, views of an image, processes."""

    train: int
    test: int
    reference: int
    measured_tests: int
    samples: int
    views: int
    world: int
    classifier_epochs: int
    tokenizer_epochs: int


def make_plan(
    s: PipelineSettings, name: str, images: Images, models: Models, costs: Costs, device: torch.device
) -> Plan:
    """Choose what was not given, and estimate. Raises InputError for settings that exclude each other."""
    budget = s.time_budget or (1800.0 if device.type == "cpu" else 3600.0)
    given = {stage: parse_flags(getattr(s, f"{stage}_flags")) for stage in STAGE_SETTINGS}
    for stage, words in given.items():
        _check_flags(stage, words)
    batch = _batch(s, images.train_names, device)
    network, notes = _network(s, images)
    work = _work(s, images, costs, budget, given)
    seconds = _seconds(work, costs, models, s.init, network, len(images.classes))
    levels = level_count(s)
    per_epoch, least = _epoch_cost(costs, work.train, levels) / work.world, 2 ** (levels - 1)
    left = 0.95 * (budget - sum(seconds.values()))
    if s.epochs or "--epochs" in given["gpt"]:
        epochs = s.epochs or whole_number("--gpt-flags --epochs", given["gpt"]["--epochs"])
    else:
        epochs = max(least, min(MAX_EPOCHS["gpt"], int(left / per_epoch)))
        if left < per_epoch * least:
            notes.append(f"the time of {budget:.0f} s is too short for {least} epochs: the plan exceeds it")
    planned = _flags(s, name, images, models, work, device, batch, epochs)
    flags = {stage: _merged(planned[stage], given[stage]) for stage in planned}
    steps = epochs * (work.train // batch)
    seconds["train"] += epochs * per_epoch + _monitoring(flags["gpt"], costs, epochs, steps)
    return Plan(
        content=images.content, settings=recorded(s), name=name, image_size=models.image_size, classes=images.classes,
        train_images=work.train, test_images=work.test, tokens=models.gpt.block_size, tokenizer=models.tokenizer,
        vq_model=models.vq_model, init=s.init and absolute(s.init), gpt_model=models.gpt_model, epochs=epochs,
        batch_size=batch, network=network, samples=work.samples, flags=flags,
        seconds={key: round(value, 1) for key, value in seconds.items()}, notes=notes,
    )  # fmt: skip


def _batch(s: PipelineSettings, n: int, device: torch.device) -> int:
    """Images a step: as given or chosen, rounded down to a multiple of the processes."""
    world = processes()
    wanted = s.batch_size or min(64 if device.type == "cpu" or n < 50_000 else 256, max(4, n // 8))
    batch = world if world > wanted else wanted // world * world
    if batch > n:
        raise InputError(
            f"a batch of {batch} images for {world} processes is more than the {n} training images there are"
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


def _work(s: PipelineSettings, images: Images, costs: Costs, budget: float, given: dict[str, dict]) -> Work:
    n, world = images.train_names, processes()

    def epochs(stage: str, cost: float, most: int) -> int:
        if words := given[stage].get("--epochs"):
            return whole_number(f"--{stage}-flags --epochs", words)
        return max(1, min(most, MAX_EPOCHS[stage], int(TIME_SHARES[stage] * budget / (n * cost))))

    affordable = int(TIME_SHARES["sample"] * budget * world / costs.sample)
    return Work(
        train=n, test=images.test_names, reference=min(s.reference_images, n),
        measured_tests=min(s.test_images, images.test_names),
        samples=s.samples or min(5000, max(200, affordable // 100 * 100)), views=1 if s.no_flip else 2, world=world,
        classifier_epochs=epochs("classifier", costs.classify, max(3, CLASSIFIER_IMAGES // n)),
        tokenizer_epochs=epochs("tokenizer", costs.tokenizer_training / world, max(1, TOKENIZER_IMAGES // n)),
    )  # fmt: skip


def _seconds(
    work: Work, costs: Costs, models: Models, init: str | None, network: str, classes: int
) -> dict[str, float]:
    """Seconds of each stage, in order; of the GPT's training only its start."""
    n, c = work.train, costs
    view = c.read + work.views * c.encode
    rows = {
        "weights": 0.0 if models.tokenizer in CATALOGUE or init in CATALOGUE else None,
        "reference": work.reference * c.read,
        "test_images": work.measured_tests * c.read,
        "classifier": 5 + (n + work.test) * c.read + work.classifier_epochs * n * c.classify if network == "train" else None,
        "tokenizer": n * c.read + work.tokenizer_epochs * n * c.tokenizer_training / work.world
        if models.tokenizer == "train" else None,
        "reconstruct": work.measured_tests * (c.read + 2 * c.encode),
        "codes": n * view / work.world,
        "test_codes": work.test * view / work.world,
        "train": 0.0,
        "sample": work.samples * c.sample / work.world,
        "grid": min(10, classes) * 12 * c.sample,
        "evaluate": None if network == "none" else
        5 + (work.reference + work.samples + 2 * work.measured_tests) * c.classify / 2,
        "report": 0.0,
    }  # fmt: skip
    return {stage: STARTUP + seconds for stage, seconds in rows.items() if seconds is not None}


def _flags(
    s: PipelineSettings,
    name: str,
    images: Images,
    models: Models,
    work: Work,
    device: torch.device,
    batch: int,
    epochs: int,
) -> dict[str, dict[str, Any]]:
    """The flags of the stages that have any to be chosen."""
    long = work.classifier_epochs > 10
    few_steps = work.tokenizer_epochs * (work.train // batch) < 2000
    return {
        "classifier": {
            "--epochs": work.classifier_epochs, "--global-batch-size": min(128, max(2, work.train // 4)),
            "--name": f"{name}-classifier", "--flip": long and not s.no_flip,
            "--max-shift": models.image_size // 16 if long else None,
        },
        "tokenizer": {
            "--no-flip": s.no_flip, "--global-batch-size": batch, "--restart-dead-codes": 25,
            "--epochs": work.tokenizer_epochs, "--ckpt-every": 500,
            "--ema-decay": 0.99 if few_steps else 0.999,
        },
        "gpt": _gpt_flags(s, models, work, batch, epochs),
        "sample": {
            "--cfg-scale": f"{s.cfg_scale:g}", "--labels": "balanced", "--num-fid-samples": work.samples,
            "--per-proc-batch-size": _sampling_batch(models.gpt, device),
        },
    }  # fmt: skip


def _epoch_cost(costs: Costs, n: int, levels: int) -> float:
    """Seconds of an epoch, in the mean over a schedule of so many levels."""
    rows = patch_levels(2 ** (levels - 1), levels, 0.5)
    return n * sum((row.stop - row.start) * costs.training[row.patch] for row in rows) / rows[-1].stop


def _monitoring(flags: dict[str, list[str]], costs: Costs, epochs: int, steps: int) -> float:
    """Seconds of a training's validations, of the weights and their average, and of the samples that it draws."""
    count, every, drawn = (int(float(flags[f"--{name}"][0])) for name in ("val-images", "val-every", "sample-every"))
    return steps / every * 2 * count * costs.training[1] / 3 + epochs / drawn * 64 * costs.sample


def _gpt_flags(s: PipelineSettings, models: Models, work: Work, batch: int, epochs: int) -> dict[str, Any]:
    levels, steps_per_epoch = level_count(s), work.train // batch
    steps = epochs * steps_per_epoch
    rate = LEARNING_RATES.get(models.gpt_model, LARGE_LEARNING_RATE) * math.sqrt(batch / 64)
    shortest = min(stage.stop - stage.start for stage in patch_levels(epochs, levels, 0.5))
    return {
        "--patch-level": levels, "--epoch-rate": 0.5, "--epochs": epochs, "--global-batch-size": batch,
        "--lr": f"{rate * (FINE_TUNING_FACTOR if s.init else 1):.2g}", "--end-lr": 1e-5, "--scheduler": True,
        "--warmup-epochs": f"{max(0.01, min(shortest / 10, 200 / steps_per_epoch)):.2g}", "--decay-ratio": 0.4,
        "--ema": True, "--ema-decay": 0.99 if steps < 3000 else 0.999 if steps < 50_000 else 0.9999,
        "--log-every": max(1, min(100, steps // 100)), "--ckpt-every": max(50, min(5000, steps // 10)),
        "--val-images": min(1000, work.test), "--val-every": max(1, steps // 15), "--sample-every": max(1, epochs // 5),
        "--init-classes": s.init_classes,
    }  # fmt: skip


def _sampling_batch(gpt: GPTConfig, device: torch.device) -> int:
    """Images whose keys and values, with those of guidance, take at most KV_CACHE."""
    image = 2 * 2 * 4 * gpt.block_size * gpt.n_layer * gpt.kv_heads * gpt.head_dim
    return max(4, min(500, KV_CACHE[device.type] // image))


def _check_flags(stage: str, given: dict[str, list[str]]) -> None:
    """Raise InputError for flags that a stage does not know, or that the pipeline itself decides."""
    kind = STAGE_SETTINGS[stage]
    known = {f"--{name.replace('_', '-')}" for name in kind.model_fields}
    known |= {
        f"--no-{name.replace('_', '-')}" for name, field in kind.model_fields.items() if "bool" in str(field.annotation)
    }
    for flag in given:
        if flag not in known:
            raise InputError(f"--{stage}-flags: unknown flag {flag}")
        if flag in RESERVED_FLAGS:
            raise InputError(
                f"--{stage}-flags: {flag} is set by the pipeline; leave it out, or give it to the pipeline itself"
            )


def _merged(planned: dict[str, Any], given: dict[str, list[str]]) -> dict[str, list[str]]:
    """Flags as words: what is given takes the place of what is planned."""
    if "--patch-sizes" in given:
        planned = {k: v for k, v in planned.items() if k not in ("--patch-level", "--epoch-rate", "--epochs")}
    words = {
        flag: [] if value is True else [str(item) for item in value] if isinstance(value, list) else [str(value)]
        for flag, value in planned.items()
        if value is not None and value is not False
    }
    return words | given


def table(plan: Plan, titles: dict[str, str], done: Callable[[str], bool] = lambda stage: False) -> str:
    """The plan in words: what was chosen, and the estimated time of each stage."""
    views = "as they are" if plan.settings["no_flip"] else "and their mirror images"
    start = f", fine-tuned from {plan.init}" if plan.init else ""
    tokenizer = f"{plan.vq_model}, trained here" if plan.tokenizer == "train" else f"{plan.tokenizer} ({plan.vq_model})"
    lines = [
        f"plan for {plan.name}: {plan.train_images:,} images to train on, {plan.test_images:,} held out, "
        f"{counted(len(plan.classes), 'class')}, {plan.image_size} px, {views}",
        f"tokenizer: {tokenizer}, {math.isqrt(plan.tokens)}x{math.isqrt(plan.tokens)} codes an image",
        f"GPT: {plan.gpt_model}{start}, {plan.epochs} epochs in batches of {plan.batch_size}",
        *[f"note: {text}" for text in plan.notes],
    ]
    width = max(map(len, titles.values()))
    for stage, seconds in plan.seconds.items():
        note = "  (done)" if done(stage) else ""
        lines.append(f"  {stage.ljust(12)} {titles.get(stage, '').ljust(width)} {clock(seconds):>9}{note}")
    lines.append(
        f"  {'all'.ljust(12)} {'estimated on this machine as it is now'.ljust(width)} {clock(sum(plan.seconds.values())):>9}"
    )
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
