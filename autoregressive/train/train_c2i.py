"""Train a class-conditional GPT on codes, coarse to fine (Next Patch Prediction).

    bash scripts/autoregressive/train_c2i.sh --cloud-save-path /backup --code-path codes --image-size 256 \
        --gpt-model GPT-B --epoch-rate 0.5 --patch-level 2 --scheduler

Writes RESULTS_DIR/000-GPT-B/: checkpoints/, log.txt, metrics.jsonl, plan.png, loss.png, samples/. The same command
continues a run that was cut off, and it is the same run; SIGTERM, SIGHUP and Ctrl-C save before they end it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from autoregressive.models.gpt import GPT, GPTConfig, Transformer, preset
from autoregressive.train.fine_tune import fitted
from autoregressive.train.gpt_task import Data, GPTTask, TrainSettings
from autoregressive.train.preview import Preview
from dataset.codes import Codes
from tokenizer.tokenizer_image.vq_model import Tokenizer
from utils import checkpoint, cli
from utils.cli import InputError
from utils.distributed import World, join_world, precision_dtype, world_size
from utils.engine import run_training
from utils.files import check_folder
from utils.log import RunLog, event_writer
from utils.machine import keep_freed_memory
from utils.runs import Run


def open_data(settings: TrainSettings) -> Data:
    """The training and validation codes, checked against the settings. Raises InputError for codes in no square grid."""
    codes = Codes(settings.code_path, settings.dataset, settings.image_size)
    if math.isqrt(codes.tokens) ** 2 != codes.tokens:
        raise InputError(
            f"{settings.code_path[0]} has {codes.tokens} codes an image; expected a square grid (64, 256, 576, ...): "
            "this GPT knows a code by its row and column, so it learns neither 1-D nor oblong tokenizers"
        )
    if settings.val_code_path:
        val = Codes(settings.val_code_path, settings.dataset, settings.image_size)
        if val.tokens != codes.tokens:
            raise InputError(f"validation codes have {val.tokens} tokens an image, training codes {codes.tokens}")
        if val.manifest and codes.manifest:
            for key in ("codebook_size", "tokenizer_sha256", "classes"):
                training, validation = getattr(codes.manifest, key), getattr(val.manifest, key)
                if training and validation and training != validation:
                    raise InputError(
                        f"validation codes have {key} {validation}, training codes {training}: extract them alike"
                    )
        data = Data(codes, val=val)
    else:
        data = Data.split(codes, settings.val_split) if settings.val_split else Data(codes)
    settings.check_batch(len(data), world_size())
    return data


def gpt_config(settings: TrainSettings, data: Data) -> GPTConfig:
    """The preset, with the data's vocabulary, classes and grid, and the training dropouts."""
    codes, s = data.codes, settings
    manifest = codes.manifest
    dropout = 0.0 if s.drop_path_rate else s.dropout_p  # one or the other, as published
    classes = s.num_classes or (len(manifest.classes) if manifest else 0) or 1000
    vocab = s.vocab_size or (manifest.codebook_size if manifest else 16384)
    if manifest and vocab < manifest.codebook_size:
        raise InputError(f"--vocab-size {vocab} is smaller than the codebook of {manifest.codebook_size}")
    for part in dict.fromkeys((codes, data.val or codes)):
        part.check_range(classes, vocab)
    return preset(
        s.gpt_model,
        vocab_size=vocab,
        num_classes=classes,
        block_size=codes.tokens,
        token_dropout_p=s.token_dropout_p,
        resid_dropout_p=dropout,
        ffn_dropout_p=dropout,
        drop_path_rate=s.drop_path_rate,
    )


def starting_weights(
    settings: TrainSettings, config: GPTConfig, classes: Sequence[str]
) -> tuple[dict[str, torch.Tensor] | None, str]:
    """The weights of --gpt-ckpt, with a class table for these classes, checked against the model; and what was changed."""
    if not settings.gpt_ckpt:
        return None, ""
    content = checkpoint.load(settings.gpt_ckpt, mmap=True)
    state, changed = fitted(
        checkpoint.state_dict(content), checkpoint.about(content), classes=classes, num_classes=config.num_classes,
        tokens=config.block_size, init_classes=settings.init_classes or (),
    )  # fmt: skip
    GPT.check_weights(state, config, f"{settings.gpt_ckpt} (as {settings.gpt_model})")
    described = checkpoint.describe(settings.gpt_ckpt, content, "model", state)
    cli.note(f"starting from {described}{f'; {changed}' if changed else ''}")
    return state, changed


def sample_tokenizer(settings: TrainSettings, codes: Codes) -> torch.nn.Module | None:
    """The tokenizer of --vq-ckpt, which must be the codes'."""
    if not settings.vq_ckpt:
        return None
    tokenizer = Tokenizer.from_pretrained(settings.vq_ckpt)
    known = codes.manifest.codebook_size if codes.manifest else settings.vocab_size or 16384
    made = (settings.image_size // tokenizer.downsample) ** 2
    if made != codes.tokens or tokenizer.config.codebook_size != known:
        raise InputError(
            f"{settings.vq_ckpt} makes {made} codes of {tokenizer.config.codebook_size} of an image of "
            f"{settings.image_size} px; these codes are {codes.tokens} of {known}: give the tokenizer they are of"
        )
    if codes.manifest and not checkpoint.is_tokenizer(settings.vq_ckpt, codes.manifest.tokenizer_sha256):
        raise InputError(f"{settings.vq_ckpt} is not the tokenizer of these codes (its weights differ): give that one")
    return tokenizer


def recorded(
    settings: TrainSettings, data: Data, start: dict | None, start_changed: str, world: World
) -> dict[str, Any]:
    """What makes the run what it is, as plain data: the settings, the codes' content, the starting weights and what was
    changed in them, the precision."""
    return {
        **settings.plain(),
        **settings.published(),
        "data": data.codes.fingerprint(),
        "start": checkpoint.identity(start) if start else None,
        "start_changed": start_changed,
        "precision": settings.precision(world.device),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    settings = TrainSettings.from_command_line(__doc__, arguments)
    if settings.tensorboard:
        event_writer()
    data = open_data(settings)
    plan = settings.plan(settings.lr, len(data) // settings.global_batch_size, data.codes.tokens)
    config = gpt_config(settings, data)
    table = plan.table(settings.global_batch_size, data.codes.tokens, config.training_flops)
    if settings.dry_run:
        print(table)
        plan.draw(settings.results_dir / "plan.png", settings.gpt_model)
        print(f"drew {settings.results_dir / 'plan.png'}")
        return
    check_folder(settings.results_dir)
    manifest = data.codes.manifest
    classes = manifest.classes if manifest else []
    start, start_changed = starting_weights(settings, config, classes)
    tokenizer = sample_tokenizer(settings, data.codes)
    keep_freed_memory()
    with join_world() as world:
        args = recorded(settings, data, start, start_changed, world)
        about = {
            "gpt_model": settings.gpt_model,
            "config": asdict(config),
            "args": args,
            "image_size": settings.image_size,
            "classes": classes,
            "vq_model": manifest.vq_model if manifest else "",
            "tokenizer_sha256": manifest.tokenizer_sha256 if manifest else "",
        }

        def make_task(run: Run, log: RunLog) -> GPTTask:
            torch.manual_seed(settings.global_seed)
            model = Transformer(config)
            if start:
                model.load_state_dict(start)
            if world.is_main:
                plan.draw(run.folder / "plan.png", settings.gpt_model)
            preview = None
            if tokenizer and world.is_main:
                preview = Preview(
                    tokenizer, run.folder / "samples", log, classes, config.num_classes, world.device,
                    precision_dtype(settings.mixed_precision, world.device), settings.global_seed,
                )  # fmt: skip
            return GPTTask(model, data, plan, settings, about, preview)

        def header(task: GPTTask) -> list[str]:
            parameters = sum(p.numel() for p in task.model.parameters())
            way = f" ({settings.data_parallel})" if world.size > 1 else ""
            line = (
                f"{settings.gpt_model}: {parameters / 1e6:.1f}M parameters, {len(data)} images of {data.codes.tokens} codes "
                f"in {data.codes.views} views, {world.size} process(es) on {world.device.type}{way}"
            )
            return [text for text in (line, data.codes.hint, table) if text]

        run_training(
            world, settings, make_task, results=settings.results_dir, name=settings.gpt_model, args=args,
            header=header, fresh=settings.fresh, start_flag="--gpt-ckpt",
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
