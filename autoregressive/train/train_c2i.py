"""Train a class-conditional GPT on codes, coarse to fine (Next Patch Prediction).

    bash scripts/autoregressive/train_c2i.sh --cloud-save-path /backup --code-path codes --image-size 256 \
        --gpt-model GPT-B --epoch-rate 0.5 --patch-level 2 --scheduler

Writes RESULTS_DIR/000-GPT-B/: checkpoints/, log.txt, metrics.jsonl, plan.png, loss.png, samples/. The same command
continues a run that was cut off, and it is the same run; SIGTERM and Ctrl-C save before they end it.
"""

import hashlib
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from autoregressive.models.load import GPT, gpt_advice
from autoregressive.models.patches import grid_side
from autoregressive.train.plan import Plan
from autoregressive.train.preview import Preview
from autoregressive.train.schedule import free_stages, in_steps, patch_stages
from autoregressive.train.trainer import Data, Settings, Trainer, draw_losses
from dataset.codes import Codes
from pretrained_models.catalogue import weights_file
from tokenizer.tokenizer_image.load import load_tokenizer
from utils import checkpoint, cli
from utils.distributed import World, precision_dtype, world, world_size
from utils.files import sha256
from utils.log import RunLog, event_writer, forget_after
from utils.machine import keep_freed_memory
from utils.runs import Keeper, Run, open_run
from utils.stop import stop_signals

# Arguments that make a run what it is: one that goes on must have the same. `data` stands for the codes' content.
FIXED = (
    "data", "start", "dataset", "image_size", "val_split", "vocab_size", "num_classes", "dropout_p", "token_dropout_p",
    "drop_path_rate", "class_dropout_p", "patch_level", "epoch_rate", "epochs", "patch_sizes", "patch_epochs",
    "patch_steps", "scheduler", "warmup_epochs", "decay_ratio", "lr", "end_lr", "weight_decay", "beta1", "beta2",
    "max_grad_norm", "global_batch_size", "global_seed", "ema", "ema_decay",
)  # fmt: skip


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--code-path",
        type=Path,
        nargs="+",
        required=True,
        help="folders of extract_codes_c2i.sh: views of the same images",
    )
    add("--dataset", default="imagenet", help="name of the data set in the code folder's name")
    add("--image-size", type=cli.positive_int, default=256, help="size the codes were extracted at")
    add("--val-code-path", type=Path, help="held-out codes of the same form, for the token-level validation loss")
    add("--val-split", type=cli.fraction, default=0.0, help="or hold out this share of the training images")
    add("--val-images", type=cli.positive_int, default=5000, help="use this many of them at most")
    add("--results-dir", type=Path, default=Path("results"))
    add("--cloud-save-path", type=Path, help="copy checkpoints there too, in the background")
    add("--fresh", action="store_true", help="start a new run even if one can be continued")
    add("--dry-run", action="store_true", help="print and draw the plan (RESULTS_DIR/plan.png), and stop")

    add("--gpt-model", choices=PRESETS, default="GPT-B")
    add("--gpt-ckpt", type=weights_file, help="start from these weights (a new schedule and optimizer)")
    add("--vocab-size", type=cli.positive_int, help="default: the codebook's, from the manifest; 16384 without one")
    add("--num-classes", type=cli.positive_int, help="default: from the manifest; 1000 without one")
    add(
        "--dropout-p",
        type=cli.fraction,
        default=0.1,
        help="dropout of both branches of a block; none with --drop-path-rate",
    )
    add("--token-dropout-p", type=cli.fraction, default=0.1, help="dropout of the embedded input")
    add("--drop-path-rate", type=cli.fraction, default=0.0, help="stochastic depth, rising to this at the last block")
    add("--class-dropout-p", type=cli.fraction, default=0.1, help="labels replaced by the null class, for guidance")

    add(
        "--patch-level",
        type=cli.positive_int,
        help="levels: patch sides 2**(n-1) .. 1; 1 is next-token; 2 if not given",
    )
    add("--epoch-rate", type=cli.positive_fraction, help="levels end at epochs * rate**i; 0.5 if not given")
    add("--epochs", type=cli.positive_int, help="of the whole run; 300 if not given")
    add("--patch-sizes", type=cli.positive_int, nargs="+", help="any other schedule: the patch side of each stage, and")
    add("--patch-epochs", type=cli.positive, nargs="+", help="how many epochs each one lasts, or")
    add("--patch-steps", type=cli.positive_int, nargs="+", help="how many steps")
    add("--scheduler", action="store_true", help="warm-up and decay in each level; constant --lr without it")
    add("--warmup-epochs", type=cli.non_negative, default=1.0)
    add("--decay-ratio", type=cli.fraction, default=0.2, help="last part of each level over which the rate decays")
    add("--lr", type=cli.positive, default=1e-4)
    add("--end-lr", type=cli.non_negative, default=1e-5)

    add("--weight-decay", type=cli.non_negative, default=5e-2)
    add("--beta1", type=cli.fraction, default=0.9)
    add("--beta2", type=cli.fraction, default=0.95)
    add("--max-grad-norm", type=cli.non_negative, default=1.0, help="0: no clipping")
    add("--global-batch-size", type=cli.positive_int, default=256, help="images a step, over all processes")
    add(
        "--gradient-accumulation-steps", type=cli.positive_int, default=1, help="parts that a process's batch is cut in"
    )
    add("--global-seed", type=cli.count, default=0)
    add("--ema", action="store_true", help="keep an exponential moving average of the weights")
    add("--ema-decay", type=cli.fraction, default=0.9999)
    add(
        "--mixed-precision", choices=("auto", "none", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on GPUs"
    )
    add("--compile", action=BooleanOptionalAction, default=None, help="torch.compile (default: on GPUs)")
    add(
        "--activation-checkpointing",
        action="store_true",
        help="less memory: compute each block again in the backward pass",
    )

    add("--log-every", type=cli.positive_int, default=100, help="steps")
    add("--tensorboard", action="store_true", help="write events too, for TensorBoard (pip install tensorboard)")
    add("--ckpt-every", type=cli.positive_int, default=5000, help="steps; the end of a level is always kept")
    add("--keep-last", type=cli.count, default=3, help="checkpoints to keep besides the ends of levels; 0: all")
    add("--vq-ckpt", type=weights_file, help="tokenizer: draw samples while training")
    add("--sample-every", type=cli.positive_int, default=10, help="epochs, with --vq-ckpt; and at the end")
    args = parser.parse_args()
    if args.patch_sizes is None:
        if args.patch_epochs or args.patch_steps:
            raise cli.InputError(
                "--patch-epochs and --patch-steps say how long each of --patch-sizes lasts: give those too"
            )
        args.patch_level = args.patch_level or 2
        args.epoch_rate = args.epoch_rate or 0.5
        args.epochs = args.epochs or 300
    elif args.patch_level or args.epoch_rate or args.epochs:
        raise cli.InputError(
            "--patch-sizes makes a schedule of its own: leave out --patch-level, --epoch-rate and --epochs"
        )
    elif bool(args.patch_epochs) == bool(args.patch_steps):
        raise cli.InputError("--patch-sizes needs either --patch-epochs or --patch-steps: how long each stage lasts")
    if args.val_code_path and args.val_split:
        raise cli.InputError("--val-code-path and --val-split are two ways to hold out images: give one of them")
    if args.tensorboard:
        event_writer()
    return args


def open_data(args: Namespace) -> Data:
    """The training and validation codes, checked against the arguments."""
    codes = Codes(args.code_path, args.dataset, args.image_size)
    if args.val_code_path:
        val = Codes(args.val_code_path, args.dataset, args.image_size)
        if val.tokens != codes.tokens:
            raise cli.InputError(f"validation codes have {val.tokens} tokens an image, training codes {codes.tokens}")
        if val.manifest and codes.manifest:
            for key in ("codebook_size", "tokenizer_sha256", "classes"):
                mine, theirs = getattr(codes.manifest, key), getattr(val.manifest, key)
                if mine and theirs and mine != theirs:
                    raise cli.InputError(
                        f"validation codes have {key} {theirs}, training codes {mine}: extract them alike"
                    )
        data = Data(codes, val=val)
    else:
        data = Data.split(codes, args.val_split) if args.val_split else Data(codes)
    if len(data) < args.global_batch_size:
        raise cli.InputError(
            f"--global-batch-size {args.global_batch_size} is more than the {len(data)} images there are"
        )
    parts = world_size() * args.gradient_accumulation_steps
    if args.global_batch_size % parts:
        raise cli.InputError(
            f"--global-batch-size {args.global_batch_size} is not divisible by {world_size()} processes "
            f"x {args.gradient_accumulation_steps} accumulation steps"
        )
    return data


def make_plan(args: Namespace, data: Data) -> Plan:
    """The stages of the run, in steps; every patch side must divide the grid of codes."""
    steps_per_epoch = len(data) // args.global_batch_size
    try:
        if args.patch_sizes is None:
            stages = in_steps(patch_stages(args.epochs, args.patch_level, args.epoch_rate), steps_per_epoch)
        elif args.patch_epochs:
            stages = in_steps(free_stages(args.patch_sizes, args.patch_epochs), steps_per_epoch)
        else:
            stages = free_stages(args.patch_sizes, args.patch_steps)
    except ValueError as error:
        raise cli.InputError(str(error)) from None
    side = grid_side(data.codes.tokens)
    for stage in stages:
        if side % stage.patch:
            raise cli.InputError(
                f"the schedule has patches of side {stage.patch}, which does not divide the grid of {side}x{side} codes"
            )
    return Plan(stages, steps_per_epoch, args.lr, args.scheduler, args.end_lr, args.warmup_epochs, args.decay_ratio)


def check_range(codes: Codes, classes: int, vocab: int) -> None:
    """InputError for labels or ids outside the model, in about 1,000 images; all labels where they are in memory."""
    some, labels = codes.batch(np.arange(0, len(codes), max(1, len(codes) // 1000)))
    labels = labels if codes.hint else codes.labels
    where = codes.folders[0].place.root
    if labels.min() < 0 or labels.max() >= classes:
        raise cli.InputError(f"the labels go up to {labels.max()} in {where}, but --num-classes is {classes}")
    if some.min() < 0 or some.max() >= vocab:
        raise cli.InputError(
            f"the codes go from {some.min()} to {some.max()} in {where}, but the vocabulary is {vocab}"
        )


def gpt_config(args: Namespace, data: Data) -> GPTConfig:
    """The preset, with the data's vocabulary, classes and grid, and the training dropouts."""
    codes = data.codes
    manifest = codes.manifest
    dropout = 0.0 if args.drop_path_rate else args.dropout_p  # one or the other, as published
    classes = args.num_classes or (len(manifest.classes) if manifest else 0) or 1000
    vocab = args.vocab_size or (manifest.codebook_size if manifest else 16384)
    if manifest and vocab < manifest.codebook_size:
        raise cli.InputError(f"--vocab-size {vocab} is smaller than the codebook of {manifest.codebook_size}")
    for part in {id(part): part for part in (codes, data.val) if part}.values():
        check_range(part, classes, vocab)
    return preset(
        args.gpt_model,
        vocab_size=vocab,
        num_classes=classes,
        block_size=codes.tokens,
        token_dropout_p=args.token_dropout_p,
        resid_dropout_p=dropout,
        ffn_dropout_p=dropout,
        drop_path_rate=args.drop_path_rate,
    )


def starting_weights(args: Namespace, config: GPTConfig) -> dict[str, torch.Tensor] | None:
    """The weights of --gpt-ckpt, checked against the model."""
    if not args.gpt_ckpt:
        return None
    content = checkpoint.load(args.gpt_ckpt, mmap=True)
    state = checkpoint.state_dict(content)
    what = f"{args.gpt_ckpt} (as {args.gpt_model})"
    checkpoint.check_fit(GPT.empty(config), state, what, lambda: gpt_advice(state))
    cli.note(f"starting from {checkpoint.describe(args.gpt_ckpt, content, 'model', state)}")
    return state


def sample_tokenizer(args: Namespace, codes: Codes) -> torch.nn.Module | None:
    """The tokenizer of --vq-ckpt, which must be the codes'."""
    if not args.vq_ckpt:
        return None
    tokenizer, _ = load_tokenizer(args.vq_ckpt)
    known = codes.manifest.codebook_size if codes.manifest else args.vocab_size or 16384
    if (args.image_size // tokenizer.downsample) ** 2 != codes.tokens or tokenizer.config.codebook_size != known:
        raise cli.InputError(
            f"{args.vq_ckpt} makes {(args.image_size // tokenizer.downsample) ** 2} codes of {tokenizer.config.codebook_size} "
            f"of an image of {args.image_size} px; these codes are {codes.tokens} of {known}: give the tokenizer they are of"
        )
    if codes.manifest and codes.manifest.tokenizer_sha256 not in ("", sha256(args.vq_ckpt)):
        raise cli.InputError(f"{args.vq_ckpt} is not the tokenizer of these codes (its sha256 differs): give that one")
    return tokenizer


def plain(args: Namespace) -> dict[str, Any]:
    """The arguments as plain data."""

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return [value(part) for part in item]
        return str(item) if isinstance(item, Path) else item

    return {key: value(item) for key, item in vars(args).items()}


def fingerprint(codes: Codes) -> str:
    """What the codes are, wherever they lie: a hash of their form, tokenizer, and some of their rows."""
    images = np.unique(np.linspace(0, len(codes) - 1, 64).astype(np.int64))
    sha = codes.manifest.tokenizer_sha256 if codes.manifest else ""
    digest = hashlib.sha256(f"{len(codes)} {codes.views} {codes.tokens} {sha}".encode())
    for view in range(codes.views):
        for array in codes.batch(images, np.full(len(images), view)):
            digest.update(np.ascontiguousarray(array, np.int64))
    return digest.hexdigest()[:16]


def agree_on_run(args: Namespace, recorded: dict[str, Any], here: World) -> Run:
    """The first process finds or makes the run's folder and holds it; the others hear of it."""
    run = open_run(args.results_dir, args.gpt_model, recorded, FIXED, args.fresh) if here.is_main else None
    if here.size == 1:
        return run
    heard = [(run.folder, run.id, run.finished, run.changed)] if here.is_main else [None]
    dist.broadcast_object_list(heard)
    return run or Run(*heard[0])


def build(
    args: Namespace, data: Data, plan: Plan, config: GPTConfig, here: World, run: Run, log: RunLog, keeper: Keeper,
    tokenizer: torch.nn.Module | None, start: dict[str, torch.Tensor] | None, recorded: dict[str, Any],
) -> Trainer:  # fmt: skip
    """The trainer of these arguments, its model initialised from the seed or from given weights."""
    torch.manual_seed(args.global_seed)
    model = Transformer(config)
    if start:
        model.load_state_dict(start)
    manifest, dtype = data.codes.manifest, precision_dtype(args.mixed_precision, here.device)
    classes = manifest.classes if manifest else []
    settings = Settings(
        args.global_batch_size, args.global_seed, args.class_dropout_p, args.weight_decay, (args.beta1, args.beta2),
        args.max_grad_norm, args.gradient_accumulation_steps, args.ema_decay if args.ema else None, dtype,
        here.device.type == "cuda" if args.compile is None else args.compile, args.activation_checkpointing,
        args.log_every, args.ckpt_every, args.val_images,
    )  # fmt: skip
    about = {
        "gpt_model": args.gpt_model,
        "config": asdict(config),
        "args": recorded,
        "image_size": args.image_size,
        "classes": classes,
        "vq_model": manifest.vq_model if manifest else "",
        "tokenizer_sha256": manifest.tokenizer_sha256 if manifest else "",
    }
    preview: Callable | None = None
    if tokenizer and here.is_main:
        preview = Preview(
            tokenizer, run.folder / "samples", log, args.sample_every, -(-plan.total // plan.steps_per_epoch),
            classes, config.num_classes, here.device, dtype, args.global_seed,
        )  # fmt: skip
    return Trainer(model, data, plan, settings, here, log, keeper, about, preview)


def main() -> None:
    args = parse()
    data = open_data(args)
    plan = make_plan(args, data)
    config = gpt_config(args, data)
    table = plan.table(args.global_batch_size, data.codes.tokens, config.training_flops)
    if args.dry_run:
        print(table)
        plan.draw(args.results_dir / "plan.png", args.gpt_model)
        print(f"drew {args.results_dir / 'plan.png'}")
        return
    start, tokenizer = starting_weights(args, config), sample_tokenizer(args, data.codes)
    given = sha256(args.gpt_ckpt)[:16] if args.gpt_ckpt else None
    recorded = {**plain(args), "data": fingerprint(data.codes), "start": given}
    keep_freed_memory()
    with world() as here, stop_signals(here.size) as stop:
        run = agree_on_run(args, recorded, here)
        log = RunLog(run.folder, here.is_main, args.tensorboard)
        cloud = args.cloud_save_path / f"{run.folder.name}-{run.id}" if args.cloud_save_path else None
        keeper = Keeper(run.folder, log, args.keep_last, {stage.stop for stage in plan.stages}, cloud)
        if cloud and here.is_main:
            for path in run.checkpoints:  # whose copies an earlier life did not see to the end
                keeper.copy(path)
        if run.finished:
            print(f"{run.folder} is finished already; --fresh starts a new run") if here.is_main else None
            keeper.close(lambda: stop.asked is None)
            return
        trainer = build(args, data, plan, config, here, run, log, keeper, tokenizer, start, recorded)
        trainer.resume(run.checkpoints)
        if here.is_main:
            forget_after(run.folder, trainer.step)
            plan.draw(run.folder / "plan.png", args.gpt_model)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        log.line(
            f"{args.gpt_model}: {parameters / 1e6:.1f}M parameters, {len(data)} images of {data.codes.tokens} codes in "
            f"{data.codes.views} views, {here.size} process(es) on {here.device.type}; in {run.folder}"
        )
        for note in (data.codes.hint, *(f"changed since the run was started: {change}" for change in run.changed)):
            if note:
                log.line(note)
        log.line(table)
        ended = trainer.train(stop)
        if here.is_main:
            draw_losses(run.folder, plan)
        if not ended:
            log.line(
                f"stopped at step {trainer.step} of {plan.total} by {stop.asked.name if stop.asked else 'another process'}; "
                "the same command continues"
            )
            deadline = time.monotonic() + 10  # a pre-empted process has some 30 s
            keeper.close(lambda: time.monotonic() < deadline)
            sys.exit(stop.exit_status())
        if here.is_main:
            run.finish()
            keeper.close(lambda: stop.asked is None)


if __name__ == "__main__":
    cli.run(main)
