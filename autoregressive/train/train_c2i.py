"""Train a class-conditional GPT on codes, coarse to fine (Next Patch Prediction).

    bash scripts/autoregressive/train_c2i.sh --cloud-save-path /backup --code-path codes --image-size 256 \
        --gpt-model GPT-B --epoch-rate 0.5 --patch-level 2 --scheduler

Writes RESULTS_DIR/000-GPT-B/: checkpoints/, log.txt, metrics.jsonl, loss.png. The same command continues a run that
was cut off. Order, views, dropped labels and dropout follow from (seed, epoch, position), so a continued run is the
same run; the number of processes changes only the dropout masks.
"""

import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from autoregressive.models.patches import grid_side, patch_loss, to_patches
from autoregressive.train.optim import adamw, update
from autoregressive.train.schedule import Stage, learning_rate, patch_stages, relative_cost, stage_at
from dataset.codes import Codes
from dataset.sampler import epoch_batches
from utils import checkpoint, cli, draw, streams
from utils.distributed import World, autocast, precision_dtype, world, world_size
from utils.ema import ema_copy, update_ema
from utils.log import RunLog, forget_after, progress, read_metrics
from utils.runs import Run, open_run

# Arguments that may change when a run is continued: they don't change what is trained.
FREE = ("results_dir", "cloud_save_path", "log_every", "ckpt_every", "fresh", "compile", "val_code_path", "val_images")


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--code-path", type=Path, required=True, help="folder that extract_codes_c2i.sh wrote")
    add("--dataset", default="imagenet", help="name of the data set in the code folder's name")
    add("--image-size", type=cli.positive_int, default=256, help="size the codes were extracted at")
    add("--val-code-path", type=Path, help="held-out codes of the same form, for the token-level validation loss")
    add("--val-images", type=cli.positive_int, default=5000, help="use this many of them at most")
    add("--results-dir", type=Path, default=Path("results"))
    add("--cloud-save-path", type=Path, help="copy checkpoints there too, in the background")
    add("--fresh", action="store_true", help="start a new run even if one can be continued")

    add("--gpt-model", choices=PRESETS, default="GPT-B")
    add("--gpt-ckpt", type=cli.existing_file, help="start from these weights (a new schedule and optimizer)")
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

    add("--patch-level", type=cli.positive_int, default=2, help="levels: patch sides 2**(n-1) .. 1; 1 is next-token")
    add("--epoch-rate", type=cli.positive_fraction, default=0.5, help="levels end at epochs * rate**i")
    add("--epochs", type=cli.positive_int, default=300)
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
    add("--log-every", type=cli.positive_int, default=100, help="steps")
    add("--ckpt-every", type=cli.positive_int, default=5000, help="steps; the end of a level is always kept")
    return parser.parse_args()


def open_codes(args: Namespace) -> tuple[Codes, Codes | None]:
    """The training and validation codes, checked against the arguments."""
    codes = Codes(args.code_path, args.dataset, args.image_size)
    val = Codes(args.val_code_path, args.dataset, args.image_size) if args.val_code_path else None
    if val and val.tokens != codes.tokens:
        raise cli.InputError(f"validation codes have {val.tokens} tokens an image, training codes {codes.tokens}")
    if len(codes) < args.global_batch_size:
        raise cli.InputError(
            f"--global-batch-size {args.global_batch_size} is more than the {len(codes)} images there are"
        )
    parts = world_size() * args.gradient_accumulation_steps
    if args.global_batch_size % parts:
        raise cli.InputError(
            f"--global-batch-size {args.global_batch_size} is not divisible by {world_size()} processes "
            f"x {args.gradient_accumulation_steps} accumulation steps"
        )
    return codes, val


def plan(args: Namespace, codes: Codes) -> list[Stage]:
    """The levels of the run; every patch side must divide the grid of codes."""
    side = grid_side(codes.tokens)
    stages = patch_stages(args.epochs, args.patch_level, args.epoch_rate)
    for stage in stages:
        if side % stage.patch:
            raise cli.InputError(
                f"--patch-level {args.patch_level} needs patches of side {stage.patch}, "
                f"which does not divide the grid of {side}x{side} codes"
            )
    return stages


def gpt_config(args: Namespace, codes: Codes) -> GPTConfig:
    """The preset, with the data's vocabulary, classes and grid, and the training dropouts."""
    manifest = codes.manifest
    dropout = 0.0 if args.drop_path_rate else args.dropout_p  # one or the other, as published
    classes = args.num_classes or (len(manifest.classes) if manifest else 0) or 1000
    _, labels = codes.batch(np.arange(0, len(codes), max(1, len(codes) // 1000)))
    if labels.min() < 0 or labels.max() >= classes:
        raise cli.InputError(f"the labels go up to {labels.max()}, but --num-classes is {classes}")
    vocab = args.vocab_size or (manifest.codebook_size if manifest else 16384)
    if manifest and vocab < manifest.codebook_size:
        raise cli.InputError(f"--vocab-size {vocab} is smaller than the codebook of {manifest.codebook_size}")
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


def describe(stages: Sequence[Stage], steps_per_epoch: int, args: Namespace, tokens: int) -> str:
    """The schedule as a table: a row a level, with the learning rate at its start, middle and end."""
    rows = ["patch   epochs          steps   positions/image   lr: first, middle, last"]
    for stage in stages:
        first, last = stage.start * steps_per_epoch, stage.stop * steps_per_epoch - 1
        rates = ", ".join(
            f"{rate_at(s, stages, steps_per_epoch, args):.2e}" for s in (first, (first + last) // 2, last)
        )
        epochs = f"{stage.start}-{stage.stop}"
        rows.append(
            f"{stage.patch}x{stage.patch}     {epochs:<12} {last - first + 1:>8}   {tokens // stage.patch**2:>15}   {rates}"
        )
    rows.append(f"cost relative to next-token training of the same epochs: {relative_cost(stages):.3f}")
    return "\n".join(rows)


def rate_at(step: int, stages: Sequence[Stage], steps_per_epoch: int, args: Namespace) -> float:
    """The learning rate of a step: the schedule's, or constant without --scheduler."""
    if not args.scheduler:
        return args.lr
    return learning_rate(
        step, stages, steps_per_epoch,
        lr=args.lr, end_lr=args.end_lr, warmup_epochs=args.warmup_epochs, decay_ratio=args.decay_ratio,
    )  # fmt: skip


@torch.no_grad()
def validation_loss(model: Transformer, codes: Codes, images: int, patch: int, batch: int, here: World, amp) -> float:
    """Mean loss (nats a code) at a patch side over evenly spaced images, in eval mode; each process does its share."""
    was_training = model.training
    model.eval()
    indices = np.linspace(0, len(codes) - 1, min(images, len(codes))).astype(np.int64)[
        here.share(min(images, len(codes)))
    ]
    total = torch.zeros(2, dtype=torch.float64, device=here.device)
    for start in range(0, len(indices), batch):
        codes_BL, labels_B = (torch.from_numpy(a).to(here.device) for a in codes.batch(indices[start : start + batch]))
        patches_BNK = to_patches(codes_BL, patch)
        with amp():
            loss = patch_loss(model(patches_BNK, labels_B), patches_BNK)
        total += torch.tensor([loss.item() * len(labels_B), len(labels_B)], device=here.device, dtype=torch.float64)
    model.train(was_training)
    here.sum(total)
    return (total[0] / total[1]).item()


class Trainer:
    """A run under way: its model, optimizer and place in the plan."""

    def __init__(
        self, args: Namespace, codes: Codes, val: Codes | None, stages: list[Stage], here: World, run: Run
    ) -> None:
        self.args, self.codes, self.val, self.stages, self.here, self.run = args, codes, val, stages, here, run
        self.log = RunLog(run.folder, here.is_main)
        self.steps_per_epoch = len(codes) // args.global_batch_size
        self.total_steps = stages[-1].stop * self.steps_per_epoch
        dtype = precision_dtype(args.mixed_precision, here.device)
        self.amp = partial(autocast, here.device, dtype)
        self.scaler = torch.amp.GradScaler(here.device.type) if dtype == torch.float16 else None
        torch.manual_seed(args.global_seed)
        self.model = Transformer(gpt_config(args, codes)).to(here.device)
        if args.gpt_ckpt:
            state = checkpoint.state_dict(checkpoint.load(args.gpt_ckpt))
            checkpoint.load_weights(self.model, state, f"{args.gpt_ckpt} (as {args.gpt_model})")
        self.ema = ema_copy(self.model) if args.ema else None
        self.optimizer = adamw(self.model, args.lr, args.weight_decay, (args.beta1, args.beta2))
        self.step = 0
        if run.checkpoint:
            self.resume(run.checkpoint)
        self.forward = self._parallel()

    def _parallel(self):
        compiled = self.here.device.type == "cuda" if self.args.compile is None else self.args.compile
        model = torch.compile(self.model, dynamic=False) if compiled else self.model
        return DistributedDataParallel(model) if self.here.size > 1 else model

    def resume(self, path: Path) -> None:
        content = checkpoint.load(path)
        checkpoint.load_weights(self.model, content["model"], str(path))
        if self.ema:
            checkpoint.load_weights(self.ema, content["ema"], f"{path} (ema)")
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(content["scaler"])
        self.step = content["steps"]
        self.log.line(f"continuing at step {self.step} of {self.total_steps} from {path}")

    def save(self) -> None:
        if not self.here.is_main:
            return
        manifest = self.codes.manifest
        content = {
            "model": self.model.state_dict(),
            **({"ema": self.ema.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            **({"scaler": self.scaler.state_dict()} if self.scaler else {}),
            "steps": self.step,
            "gpt_model": self.args.gpt_model,
            "config": asdict(self.model.config),
            "args": plain(self.args),
            "image_size": self.args.image_size,
            "classes": manifest.classes if manifest else [],
            "vq_model": manifest.vq_model if manifest else "",
            "tokenizer_sha256": manifest.tokenizer_sha256 if manifest else "",
        }
        self.run.save(self.step, content, self.log)

    def batches(self, selection) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of a selection, on the device; dropped labels are the null class."""
        codes, labels = self.codes.batch(selection.indices, selection.views)
        labels = np.where(selection.dropped, self.model.config.num_classes, labels)
        parts = self.args.gradient_accumulation_steps
        device = self.here.device
        codes, labels = (torch.from_numpy(a).to(device, non_blocking=True).chunk(parts) for a in (codes, labels))
        return list(zip(codes, labels, strict=True))

    def train(self) -> None:
        """Run to the end of the plan."""
        args = self.args
        bar = progress(total=self.total_steps, initial=self.step, unit=" steps", show=self.here.is_main)
        self.model.train()
        self.recent, self.since = [], time.perf_counter()
        while self.step < self.total_steps:
            epoch, first_step = divmod(self.step, self.steps_per_epoch)
            stage = stage_at(self.stages, epoch)
            selections = epoch_batches(
                len(self.codes), self.codes.views, args.global_batch_size,
                seed=args.global_seed, epoch=epoch, label_drop=args.class_dropout_p,
                first_step=first_step, part=self.here.share(args.global_batch_size),
            )  # fmt: skip
            for selection in selections:
                self.train_step(self.batches(selection), stage.patch)
                bar.update()
                end_of_epoch = self.step % self.steps_per_epoch == 0
                due = self.step % args.ckpt_every == 0 or self.step == stage.stop * self.steps_per_epoch
                if due or self.step % args.log_every == 0 or self.step == 1:
                    self.report(bar, epoch, stage.patch)
                if end_of_epoch:
                    self.validate(epoch, stage.patch)
                if due:
                    self.save()
        bar.close()

    def train_step(self, batches: list[tuple[torch.Tensor, torch.Tensor]], patch: int) -> None:
        args = self.args
        seed = streams.bits(args.global_seed, streams.DROPOUT, self.step, self.here.rank) >> np.uint64(1)
        torch.manual_seed(int(seed))
        self.lr = rate_at(self.step, self.stages, self.steps_per_epoch, args)
        loss, self.grad_norm = update(
            self.forward, self.optimizer, batches, patch,
            lr=self.lr, max_grad_norm=args.max_grad_norm, scaler=self.scaler, autocast=self.amp,
        )  # fmt: skip
        if self.ema:
            update_ema(self.ema, self.model, args.ema_decay)
        self.recent.append(loss)
        self.step += 1

    def report(self, bar, epoch: int, patch: int) -> None:
        """The mean loss since the last report, over all processes; a loss that is not finite stops the run."""
        loss = (self.here.sum(torch.stack(self.recent).mean()) / self.here.size).item()
        first = self.step - len(self.recent) + 1
        norm = float(self.grad_norm)
        if not np.isfinite(loss) or not (np.isfinite(norm) or self.scaler):  # a scaler skips such a step
            kept = sorted((self.run.folder / "checkpoints").glob("*.pt"))
            raise SystemExit(
                f"the loss is {loss} between steps {first} and {self.step} (gradient norm {norm}): the run stops; "
                f"the last good checkpoint is {kept[-1] if kept else 'none'}; try a lower --lr or --max-grad-norm"
            )
        images = len(self.recent) * self.args.global_batch_size / (time.perf_counter() - self.since)
        self.recent, self.since = [], time.perf_counter()
        row = {"loss": loss, "lr": self.lr, "grad_norm": norm, "images_per_s": round(images, 2)}
        self.log.metrics(step=self.step, epoch=epoch, patch=patch, **row)
        bar.set_description(f"{patch}x{patch} epoch {epoch}")
        bar.set_postfix_str(f"loss {loss:.3f}, lr {self.lr:.1e}, |g| {row['grad_norm']:.2f}, {images:.0f} images/s")

    def validate(self, epoch: int, patch: int) -> None:
        """Held-out loss at the token level, and at this level's patch side, of the raw weights (and the EMA's)."""
        if not self.val:
            return
        start = time.perf_counter()
        batch = max(1, self.args.global_batch_size // (self.here.size * self.args.gradient_accumulation_steps))
        loss = partial(
            validation_loss, codes=self.val, images=self.args.val_images, batch=batch, here=self.here, amp=self.amp
        )
        row = {"val_loss": loss(self.model, patch=1)}
        if patch > 1:
            row[f"val_loss_p{patch}"] = loss(self.model, patch=patch)
        if self.ema:
            row["val_loss_ema"] = loss(self.ema, patch=1)
        self.log.metrics(step=self.step, epoch=epoch, patch=patch, **row)
        words = ", ".join(f"{key} {value:.4f}" for key, value in row.items())
        self.log.line(f"epoch {epoch} ({patch}x{patch}), step {self.step}: {words}")
        self.since += time.perf_counter() - start


def draw_losses(run: Run, stages: Sequence[Stage], steps_per_epoch: int) -> None:
    """loss.png: the training loss, a line a level, and the token-level validation loss."""
    rows = read_metrics(run.folder)
    series: dict[str, tuple[list[float], list[float]]] = {}
    for stage in stages:
        here = [r for r in rows if "loss" in r and r["patch"] == stage.patch]
        series[f"training, {stage.patch}x{stage.patch} patches"] = (
            [r["step"] for r in here],
            [r["loss"] for r in here],
        )
    for key, name in (("val_loss", "validation, single codes"), ("val_loss_ema", "validation, single codes, EMA")):
        here = [r for r in rows if key in r]
        if here:
            series[name] = ([r["step"] for r in here], [r[key] for r in here])
    draw.curves(
        run.folder / "loss.png", series,
        x_label="step", y_label="loss (nats a code)", title=run.folder.name,
        boundaries={s.start * steps_per_epoch: f"{s.patch}x{s.patch}" for s in stages},
    )  # fmt: skip


def plain(args: Namespace) -> dict[str, Any]:
    """The arguments as plain data."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def agree_on_run(args: Namespace, here: World) -> Run:
    """The first process finds or makes the run's folder; the others hear of it."""
    fixed = {key: value for key, value in plain(args).items() if key not in FREE}
    run = [
        open_run(args.results_dir, args.gpt_model, fixed, args.fresh, args.cloud_save_path) if here.is_main else None
    ]
    if here.size > 1:
        dist.broadcast_object_list(run)
    return run[0]


def main() -> None:
    args = parse()
    codes, val = open_codes(args)
    stages = plan(args, codes)
    config = gpt_config(args, codes)
    if args.gpt_ckpt:
        with torch.device("meta"):
            empty = Transformer(config)
        checkpoint.check_fit(
            empty, checkpoint.state_dict(checkpoint.load(args.gpt_ckpt)), f"{args.gpt_ckpt} (as {args.gpt_model})"
        )
    with world() as here:
        run = agree_on_run(args, here)
        if run.finished:
            print(f"{run.folder} is finished already; --fresh starts a new run") if here.is_main else None
            return
        trainer = Trainer(args, codes, val, stages, here, run)
        if here.is_main:
            forget_after(run.folder, trainer.step)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        trainer.log.line(
            f"{args.gpt_model}: {parameters / 1e6:.1f}M parameters, {len(codes)} images of {codes.tokens} codes, "
            f"{here.size} process(es) on {here.device.type}; in {run.folder}"
        )
        trainer.log.line(describe(stages, trainer.steps_per_epoch, args, codes.tokens))
        trainer.train()
        if here.is_main:
            draw_losses(run, stages, trainer.steps_per_epoch)
            run.finish()


if __name__ == "__main__":
    cli.run(main)
