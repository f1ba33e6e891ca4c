"""The stages of a plan: the existing commands, with the plan's flags. Paths are in the run's folder."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrained_models.catalogue import CATALOGUE
from scripts.pipeline.plan import Plan
from scripts.pipeline.runner import Stage
from utils.runs import checkpoints_of, numbered_folders

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


def python() -> str:
    """The Python that scripts/env.sh found."""
    return os.environ.get("PYTHON") or sys.executable


def words(flags: dict[str, list[str]]) -> list[str]:
    """Flags as a command line has them."""
    return [word for flag, values in flags.items() for word in (flag, *values)]


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
    return str(run / "tokenizer" / "vq.pt") if plan.tokenizer == "train" else plan.tokenizer


def network_words(run: Path, plan: Plan) -> list[str]:
    """The evaluator's flag for the plan's feature network."""
    named = {"train": ["--network", str(run / "classifier.pt2")], "inception": []}
    return named.get(plan.network, ["--network", plan.network])


def sample_files(run: Path) -> list[str]:
    """The .npz files of samples, the newest last."""
    return [str(path) for path in sorted((run / "samples").glob("*.npz"), key=lambda path: path.stat().st_mtime)]


def stages(plan: Plan, run: Path, train: Path, test: Path) -> list[Stage]:
    """What makes the report's figures, in order. train, test: the folders or tables of images."""
    flags, vq, size = plan.flags, tokenizer_file(run, plan), ["--image-size", str(plan.image_size)]
    pixels = _pixel_flags(plan)
    reference_images = min(plan.settings["reference_images"], plan.train_images)
    tests = min(plan.settings["test_images"], plan.test_images)
    mirrored = ["--no-flip"] if plan.settings["no_flip"] else []
    names = [name for name in (plan.tokenizer, plan.init) if name in CATALOGUE]
    made: list[Stage] = []

    def add(name: str, *command: str, **options) -> None:
        made.append(Stage(name, TITLES[name], lambda: command, **options))

    if names:
        add("weights", python(), "-m", "pretrained_models.download", *names)
    reference = (python(), "-m", "evaluations.c2i.reference")
    add(
        "reference",
        *reference,
        str(train),
        str(run / "reference.npz"),
        *size,
        "--num-images",
        str(reference_images),
        *pixels,
    )
    add("test_images", *reference, str(test), str(run / "test.npz"), *size, "--num-images", str(tests), *pixels)
    if plan.network == "train":
        add(
            "classifier", "bash", "scripts/evaluations/train_classifier.sh", "--data-path", str(train), "--val-path", str(test),
            *size, "--out", str(run / "classifier.pt2"), *words(flags["classifier"]), *pixels,
            run_folder=lambda: run / "classifier.run",
        )  # fmt: skip
    if plan.tokenizer == "train":
        add(
            "tokenizer", "bash", "scripts/tokenizer/train_vq.sh", "--data-path", str(train), "--vq-model", plan.vq_model, *size,
            "--results-dir", str(run / "tokenizer"), *words(flags["tokenizer"]), *pixels,
            run_folder=lambda: run / "tokenizer",
        )  # fmt: skip
    add(
        "reconstruct", "bash", "scripts/tokenizer/reconstruct_vq.sh", "--data-path", str(test), "--vq-ckpt", vq, *size,
        "--num-images", str(tests), "--out", str(run / "reconstructions.npz"), *pixels,
    )  # fmt: skip
    for name, source, target in (("codes", train, "train"), ("test_codes", test, "test")):
        add(
            name, "bash", "scripts/autoregressive/extract_codes_c2i.sh", "--vq-ckpt", vq, "--dataset", plan.name,
            "--data-path", str(source), "--code-path", str(run / "codes" / target), *size, *mirrored, *pixels,
        )  # fmt: skip
    start = ["--gpt-ckpt", plan.init] if plan.init else []
    add(
        "train", "bash", "scripts/autoregressive/train_c2i.sh", "--code-path", str(run / "codes" / "train"),
        "--val-code-path", str(run / "codes" / "test"), "--dataset", plan.name, *size, "--results-dir", str(run / "gpt"),
        "--gpt-model", plan.gpt_model, *start, "--vq-ckpt", vq, *words(flags["gpt"]),
        run_folder=lambda: newest_gpt(run, plan),
    )  # fmt: skip

    def sample() -> Sequence[str]:
        return (
            "bash", "scripts/autoregressive/sample_c2i.sh", "--vq-ckpt", vq, "--gpt-ckpt", newest_checkpoint(run, plan),
            *words(flags["sample"]), "--sample-dir", str(run / "samples"),
        )  # fmt: skip

    def grid() -> Sequence[str]:
        return (
            python(), "autoregressive/sample/sample_c2i.py", "--vq-ckpt", vq, "--gpt-ckpt", newest_checkpoint(run, plan),
            "--cfg-scale", f"{plan.settings['cfg_scale']:g}", "--per-class", "12",
            "--scale", str(max(1, 64 // plan.image_size)), "--out", str(run / "samples.png"),
        )  # fmt: skip

    def evaluate() -> Sequence[str]:
        measured = sample_files(run) or [f"{run}/samples/*.npz"]
        return (
            python(), "evaluations/c2i/evaluator.py", str(run / "reference.npz"), *measured, str(run / "reconstructions.npz"),
            str(run / "test.npz"), *network_words(run, plan),
        )  # fmt: skip

    made += [Stage("sample", TITLES["sample"], sample), Stage("grid", TITLES["grid"], grid)]
    if plan.network != "none":
        made.append(Stage("evaluate", TITLES["evaluate"], evaluate))
    return made


def _pixel_flags(plan: Plan) -> list[str]:
    """How images are read, where it is not the default."""
    s = plan.settings
    flags = ["--background", s["background"]] if s["background"] != "white" else []
    return [*flags, *(f"--{name.replace('_', '-')}" for name in ("exif_orientation", "strict") if s[name])]
