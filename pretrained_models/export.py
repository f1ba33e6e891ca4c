"""Weights of a checkpoint as safetensors.

    python -m pretrained_models.export results/000-GPT-B/checkpoints/0400000.pt c2i_B.safetensors

OUT is a .safetensors file, or a new folder that can be uploaded to the Hugging Face Hub as it is: config.json,
model.safetensors, README.md with the recipe and what was measured. Names are LlamaGen's; both are read by every stage.
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from pretrained_models.catalogue import WeightsFile
from utils import checkpoint, cli
from utils.files import atomic_folder, check_folder, check_output, file_lock
from utils.log import read_metrics
from utils.settings import ExistingFile, Settings, one_of, setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECIPE = (
    "dataset", "image_size", "patch_level", "epoch_rate", "patch_sizes", "patch_epochs", "patch_steps", "epochs",
    "global_batch_size", "lr", "end_lr", "scheduler", "warmup_epochs", "decay_ratio", "weight_decay", "beta1", "beta2",
    "max_grad_norm", "dropout_p", "token_dropout_p", "class_dropout_p", "drop_path_rate", "ema_decay", "mixed_precision",
    "global_seed",
)  # fmt: skip


class ExportSettings(Settings):
    """The settings of this command; see --help."""

    checkpoint: WeightsFile = setting(
        help="a file, a folder of safetensors, a published name, or hf://user/repo/file", positional=True
    )
    out: Path = setting(help="a .safetensors file, or a new folder for the Hub", positional=True)
    weights: Literal["auto", "model", "ema"] = setting("auto", "auto: the average (EMA) where the checkpoint has one")
    dtype: one_of(DTYPES) | None = setting(None, "default: as in the checkpoint")
    metrics: list[ExistingFile] = setting([], "SAMPLES.metrics.json files, for the model card")

    @property
    def is_file(self) -> bool:
        return self.out.suffix == ".safetensors"

    @model_validator(mode="after")
    def _metrics_have_a_card(self) -> Self:
        if self.is_file and self.metrics:
            raise ValueError("--metrics goes into the model card of a folder; a .safetensors file has none")
        return self


def exported(content: Mapping[str, Any], weights: str, dtype: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights to write, and what is written beside them: the plain data, without the run's arguments."""
    state = checkpoint.state_dict(content, weights)
    checkpoint.check_finite(state, "the checkpoint")
    if dtype:
        state = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in state.items()}
    about = {key: value for key, value in checkpoint.about(content).items() if key != "args"}
    return state, {**about, "weights": about.get("weights") or checkpoint.chosen(content, weights)}


def figures(paths: list[Path]) -> list[str]:
    """A table of evaluator results. Raises InputError for a file that holds none."""
    rows = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            network, metrics = content["network"]["name"], content["metrics"]
            cells = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise cli.InputError(f"{path} is no SAMPLES.metrics.json of evaluations/c2i/evaluator.py") from None
        rows.append(f"| {path.name.removesuffix('.metrics.json')} | {network} | {cells} |")
    return ["## Figures", "", "| samples | in the features of | figures |", "|---|---|---|", *rows, ""] if rows else []


def losses(source: Path) -> list[str]:
    """The last losses that the run folder of a checkpoint (FOLDER/checkpoints/STEP.pt, or FOLDER/vq.pt) has at its step."""
    folder = next((f for f in list(source.parents)[:2] if (f / "metrics.jsonl").is_file()), None)
    rows = read_metrics(folder) if folder else []
    if source.stem.isdigit():
        rows = [row for row in rows if row["step"] <= int(source.stem)]
    last = {key: (row[key], row["step"]) for row in rows for key in row if "loss" in key}
    lines = [f"| {key} | {value:.4f} | {step} |" for key, (value, step) in last.items()]
    return ["## Training", "", "| | value | step |", "|---|---|---|", *lines, ""] if lines else []


def card(
    source: Path, content: Mapping[str, Any], about: Mapping[str, Any], state: Mapping[str, Tensor], rows: list[str]
) -> str:
    """The model card: what it is, how to load it, recipe and figures as far as they are known."""
    gpt = "gpt_model" in about or "tok_embeddings.weight" in state
    name = about.get("gpt_model" if gpt else "vq_model") or ("GPT" if gpt else "tokenizer")
    tags = ["autoregressive-image-generation" if gpt else "image-tokenizer", "next-patch-prediction"]
    module = "autoregressive.models.gpt" if gpt else "tokenizer.tokenizer_image.vq_model"
    loader = "GPT" if gpt else "Tokenizer"
    flag = "--gpt-ckpt" if gpt else "--vq-ckpt"
    args = content.get("args") or {}
    args = vars(args) if isinstance(args, Namespace) else args
    recipe = [f"| {key} | {args[key]} |" for key in RECIPE if args.get(key) is not None]
    numbers = checkpoint.describe(name, content, about["weights"], state)
    return "\n".join([
        "---", "library_name: pytorch", "tags:", *(f"- {tag}" for tag in tags), "---", "",
        f"# {name}", "", f"{numbers}.", "",
        f"An image {'generator' if gpt else 'tokenizer'} of the LlamaGen architecture; its config is in `config.json`.", "",
        "```python", f"from {module} import {loader}", f'model = {loader}.from_pretrained("FOLDER or user/repo")', "```",
        "", f"Every stage's `{flag}` takes the folder.", "",
        *(["## Recipe", "", "| argument | value |", "|---|---|", *recipe, ""] if recipe else []),
        *losses(source), *rows,
    ])  # fmt: skip


def write_folder(folder: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], card: str) -> None:
    """Write a folder for the Hub, which appears whole or not at all. Raises InputError if it is there already."""
    check_new(folder)
    with atomic_folder(folder) as unfinished:
        checkpoint.save_folder(unfinished, state, about)
        (unfinished / "README.md").write_text(card)


def check_new(folder: Path) -> None:
    """Raise InputError for a folder that is there already, or cannot be made."""
    if folder.exists():
        raise cli.InputError(f"{folder} is there already: give a new folder, or delete it")
    check_folder(folder)


def main() -> None:
    s = ExportSettings.from_command_line(__doc__)
    (check_output if s.is_file else check_new)(s.out)
    rows = figures(s.metrics)
    with file_lock(s.out):
        content = checkpoint.load(s.checkpoint, mmap=True)
        state, about = exported(content, s.weights, s.dtype)
        if s.is_file:
            checkpoint.save_safetensors(s.out, state, about)
        else:
            write_folder(s.out, state, about, card(s.checkpoint, content, about, state, rows))
    print(f"wrote {s.out} from {checkpoint.describe(s.checkpoint, content, s.weights, state)}")


if __name__ == "__main__":
    cli.run(main)
