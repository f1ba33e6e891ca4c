"""The stages of a plan: the existing commands, with the plan's flags. Paths are in the run's folder."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrained_models.catalogue import CATALOGUE
from scripts.pipeline.plan import Plan
from scripts.pipeline.runner import Stage
from utils.runs import checkpoints_of, numbered_folders


def newest_gpt(run: Path, plan: Plan) -> Path | None:
    """The folder of the newest training."""
    return next(iter(numbered_folders(run / "gpt", plan.gpt_model)), None)


def newest_checkpoint(run: Path, plan: Plan) -> str:
    """The GPT to draw with; a pattern where there is none yet."""
    folder = newest_gpt(run, plan)
    paths = checkpoints_of(folder) if folder else []
    return str(paths[0]) if paths else f"{run}/gpt/*-{plan.gpt_model}/checkpoints/*.pt"


def tokenizer_file(run: Path, plan: Plan) -> str:
    """What --vq-ckpt takes."""
    return f"{run}/tokenizer/vq.pt" if plan.tokenizer == "train" else plan.tokenizer


def sample_files(run: Path) -> list[Path]:
    """The .npz files of samples, the newest last."""
    return sorted((run / "samples").glob("*.npz"), key=lambda path: path.stat().st_mtime)


def stages(plan: Plan, run: Path, train: Path, test: Path) -> Iterator[Stage]:
    """What makes the report's figures, in order. train, test: the folders or tables of images.

    Each is made when its turn has come, as its command may name what an earlier one made.
    """
    python = os.environ.get("PYTHON") or sys.executable  # what scripts/env.sh found
    vq, size = ("--vq-ckpt", tokenizer_file(run, plan)), ("--image-size", plan.image_size)
    reference, pixels = (python, "-m", "evaluations.c2i.reference"), _pixel_flags(plan)
    mirrored = ["--no-flip"] if plan.settings["no_flip"] else []

    if names := [name for name in (plan.tokenizer, plan.init) if name in CATALOGUE]:
        yield _stage("weights", python, "-m", "pretrained_models.download", *names)
    for name, source, target, number in (
        ("reference", train, "reference.npz", plan.reference_images), ("test_images", test, "test.npz", plan.measured_images),
    ):  # fmt: skip
        yield _stage(name, *reference, source, run / target, *size, "--num-images", number, *pixels)
    if plan.network == "train":
        yield _stage(
            "classifier", "bash", "scripts/evaluations/train_classifier.sh", "--data-path", train, "--val-path", test, *size,
            "--out", run / "classifier.pt2", *_words(plan, "classifier"), *pixels,
            run_folder=lambda: run / "classifier.run",
        )  # fmt: skip
    if plan.tokenizer == "train":
        yield _stage(
            "tokenizer", "bash", "scripts/tokenizer/train_vq.sh", "--data-path", train, "--vq-model", plan.vq_model, *size,
            "--results-dir", run / "tokenizer", *_words(plan, "tokenizer"), *pixels, run_folder=lambda: run / "tokenizer",
        )  # fmt: skip
    yield _stage(
        "reconstruct", "bash", "scripts/tokenizer/reconstruct_vq.sh", "--data-path", test, *vq, *size,
        "--num-images", plan.measured_images, "--out", run / "reconstructions.npz", *pixels,
    )  # fmt: skip
    for name, source, target in (("codes", train, "train"), ("test_codes", test, "test")):
        yield _stage(
            name, "bash", "scripts/autoregressive/extract_codes_c2i.sh", *vq, "--dataset", plan.name,
            "--data-path", source, "--code-path", run / "codes" / target, *size, *mirrored, *pixels,
        )  # fmt: skip
    start = ["--gpt-ckpt", plan.init] if plan.init else []
    yield _stage(
        "train", "bash", "scripts/autoregressive/train_c2i.sh", "--code-path", run / "codes" / "train",
        "--val-code-path", run / "codes" / "test", "--dataset", plan.name, *size, "--results-dir", run / "gpt",
        "--gpt-model", plan.gpt_model, *start, *vq, *_words(plan, "gpt"), run_folder=lambda: newest_gpt(run, plan),
    )  # fmt: skip
    models = (*vq, "--gpt-ckpt", newest_checkpoint(run, plan))
    yield _stage(
        "sample", "bash", "scripts/autoregressive/sample_c2i.sh", *models, *_words(plan, "sample"),
        "--sample-dir", run / "samples",
    )  # fmt: skip
    yield _stage(
        "grid", python, "autoregressive/sample/sample_c2i.py", *models, "--cfg-scale", f"{plan.settings['cfg_scale']:g}",
        "--per-class", 12, "--scale", plan.scale, "--out", run / "samples.png",
    )  # fmt: skip
    if plan.network != "none":
        networks = {"train": ["--network", run / "classifier.pt2"], "inception": []}
        yield _stage(
            "evaluate", python, "evaluations/c2i/evaluator.py", run / "reference.npz",
            *(sample_files(run) or [run / "samples" / "*.npz"]), run / "reconstructions.npz", run / "test.npz",
            *networks.get(plan.network, ["--network", plan.network]),
        )  # fmt: skip


def _stage(name: str, *words: object, run_folder: Callable[[], Path | None] = lambda: None) -> Stage:
    return Stage(name, [str(word) for word in words], run_folder)


def _words(plan: Plan, stage: str) -> list[str]:
    """The plan's flags of a stage, as a command line has them."""
    return [word for flag, values in plan.flags[stage].items() for word in (flag, *values)]


def _pixel_flags(plan: Plan) -> list[str]:
    """How images are read, where it is not the default."""
    s = plan.settings
    flags = ["--background", s["background"]] if s["background"] != "white" else []
    return [*flags, *(f"--{name.replace('_', '-')}" for name in ("exif_orientation", "strict") if s[name])]
