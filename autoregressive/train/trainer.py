"""The training loop: a run under way, from its first step or from a checkpoint to the end of its plan.

What is random at a step (order, views, dropped labels, dropout) follows from (seed, epoch, step), so a run that was cut
off and goes on is the same run. The number of processes changes only the dropout masks and roundings.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoregressive.models.gpt import Transformer
from autoregressive.models.patches import to_patches
from autoregressive.train.optim import Objective, adamw, update
from autoregressive.train.plan import Plan
from dataset.codes import Codes
from dataset.sampler import Selection, epoch_batches
from utils import checkpoint, draw, streams
from utils.cli import InputError
from utils.distributed import World, autocast
from utils.ema import ema_copy, update_ema
from utils.log import RunLog, progress, read_metrics
from utils.machine import matmul_rate, peak_memory
from utils.runs import Keeper, numbered
from utils.stop import Stop


@dataclass(frozen=True)
class Settings:
    """How each step is done, and what happens every so many of them. Units: steps, images; rates are shares."""

    global_batch: int
    seed: int = 0
    label_drop: float = 0.1
    weight_decay: float = 5e-2
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    accumulation: int = 1
    ema_decay: float | None = None  # None: no average is kept
    dtype: torch.dtype = torch.float32
    compile: bool = False
    recompute: bool = False
    log_every: int = 100
    save_every: int = 5000
    val_images: int = 5000


@dataclass(frozen=True)
class Data:
    """Codes to train on, the images of them (indices) that take part, and held-out ones to measure on."""

    codes: Codes
    images: np.ndarray | None = None  # None: all
    val: Codes | None = None
    val_images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.codes) if self.images is None else len(self.images)

    @classmethod
    def split(cls, codes: Codes, share: float) -> "Data":
        """Hold out this share of the images, at least one; which ones depends on their number alone."""
        order = streams.permutation(len(codes), streams.HELD_OUT)
        held = max(1, round(share * len(codes)))
        return cls(codes, np.sort(order[held:]), codes, np.sort(order[:held]))


class Trainer:
    """A run under way: its model, optimizer and place in the plan."""

    def __init__(
        self,
        model: Transformer,
        data: Data,
        plan: Plan,
        settings: Settings,
        here: World,
        log: RunLog,
        keeper: Keeper,
        about: Mapping[str, Any],
        preview: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        """about: plain data that goes into every checkpoint. preview(model, epoch) is called after each epoch."""
        self.data, self.plan, self.settings, self.here = data, plan, settings, here
        self.log, self.keeper, self.about, self.preview = log, keeper, about, preview
        self.model = model.to(here.device)
        self.ema = ema_copy(self.model) if settings.ema_decay is not None else None
        self.optimizer = adamw(self.model, plan.lr, settings.weight_decay, settings.betas)
        self.scaler = torch.amp.GradScaler(here.device.type) if settings.dtype == torch.float16 else None
        self.amp = partial(autocast, here.device, settings.dtype)
        objective = Objective(self.model, settings.recompute)
        if settings.compile:
            objective = torch.compile(objective, dynamic=False)
        self.objective = DistributedDataParallel(objective) if here.size > 1 else objective
        self.step, self.drawn = 0, time.monotonic()
        self.recent: list[Tensor] = []  # this process's losses since the last report
        self.known = torch.zeros(0, device=here.device)  # all processes' losses since then, from a checkpoint

    def resume(self, paths: Sequence[Path]) -> None:
        """Go on from the first of these checkpoints that is whole, as the first process sees it; others are set aside.

        Raises InputError if there are some and none of them is whole, or if the processes read different ones.
        """
        chosen = [self.newest_whole(paths) if self.here.is_main else None]
        if self.here.size > 1:
            dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], str):
            raise InputError(chosen[0])
        if chosen[0] is None:
            return
        path, steps = chosen[0]
        content = checkpoint.load(path)
        if content["steps"] != steps:
            raise InputError(f"{path} is another file here than for the first process: share --results-dir")
        checkpoint.load_weights(self.model, content["model"], str(path))
        if self.ema:
            checkpoint.load_weights(self.ema, content["ema"], f"{path} (ema)")
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler and "scaler" in content:
            self.scaler.load_state_dict(content["scaler"])
        self.step = content["steps"]
        self.known = content.get("recent", self.known).to(self.here.device)
        self.log.line(f"continuing at step {self.step} of {self.plan.total} from {path}")

    def newest_whole(self, paths: Sequence[Path]) -> tuple[Path, int] | str | None:
        """A checkpoint and its step; None if there are no files, what is wrong if none of them is whole."""
        wrong = []
        for path in paths:
            try:
                steps = checkpoint.load(path)["steps"]
            except InputError as error:
                wrong.append((path, str(error)))
                continue
            for damaged, error in wrong:  # it must not count as one of the newest
                self.log.line(f"warning: {error}; it is set aside")
                damaged.rename(damaged.with_suffix(".damaged"))
            return path, steps
        return f"no checkpoint is whole: {wrong[0][1]}; or start another run with --fresh" if wrong else None

    def save(self) -> None:
        """Write a checkpoint, unless there is something in it that is not finite; draw the losses, once a minute."""
        start = time.perf_counter()
        losses = self.losses()
        self.refuse_what_is_not_finite(losses, float(self.grad_norm))
        self.known, self.recent = losses, []
        if not self.here.is_main:
            return
        content = {
            "model": self.model.state_dict(),
            **({"ema": self.ema.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            **({"scaler": self.scaler.state_dict()} if self.scaler else {}),
            "steps": self.step,
            "recent": self.known.cpu(),
            **self.about,
        }
        self.keeper.save(self.step, content)
        if time.monotonic() - self.drawn > 60:
            draw_losses(self.log.folder, self.plan)
            self.drawn = time.monotonic()
        self.since += time.perf_counter() - start

    def batches(self, selection: Selection) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of a selection, on the device; dropped labels are the null class."""
        images = selection.indices if self.data.images is None else self.data.images[selection.indices]
        codes, labels = self.data.codes.batch(images, selection.views)
        labels = np.where(selection.dropped, self.model.config.num_classes, labels)
        tensors = [torch.from_numpy(a) for a in (codes, labels)]
        if self.here.device.type == "cuda":
            tensors = [t.pin_memory().to(self.here.device, non_blocking=True) for t in tensors]
        parts = self.settings.accumulation
        return list(zip(*(t.chunk(parts) for t in tensors), strict=True))

    def selections(self, epoch: int, first_step: int):
        s = self.settings
        return epoch_batches(
            len(self.data), self.data.codes.views, s.global_batch,
            seed=s.seed, epoch=epoch, label_drop=s.label_drop, first_step=first_step, part=self.here.share(s.global_batch),
        )  # fmt: skip

    def train(self, stop: Stop | None = None) -> bool:
        """Run to the end of the plan; False if `stop` ended it before, after a checkpoint."""
        self.bar = progress(
            total=self.plan.total, initial=self.step, unit=" steps", show=self.here.is_main,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip
        self.flops = self.model.config.training_flops
        side = 1024 if self.here.device.type == "cpu" else 8192
        self.peak = matmul_rate(self.here.device, self.settings.dtype, side, repeats=20)
        self.model.train()
        self.restart_clock()
        with self.bar:
            while self.step < self.plan.total:
                epoch, first_step = divmod(self.step, self.plan.steps_per_epoch)
                for selection in self.selections(epoch, first_step):
                    self.train_step(selection)
                    self.after_step(epoch)
                    if self.step == self.plan.total:
                        break
                    if stop and stop.agreed():
                        self.save()
                        self.here.barrier()  # the first one to leave would have the launcher end the others
                        return False
        return True

    def train_step(self, selection: Selection) -> None:
        s = self.settings
        start = time.perf_counter()
        batches = self.batches(selection)
        self.waited += time.perf_counter() - start
        seed = streams.bits(s.seed, streams.DROPOUT, self.step, self.here.rank) >> np.uint64(1)
        torch.manual_seed(int(seed))
        self.patch, self.lr = self.plan.stage(self.step).patch, self.plan.rate(self.step)
        loss, self.grad_norm = update(
            self.objective, self.optimizer, batches, self.patch,
            lr=self.lr, max_grad_norm=s.max_grad_norm, scaler=self.scaler, autocast=self.amp,
        )  # fmt: skip
        if self.ema:
            update_ema(self.ema, self.model, s.ema_decay)
        self.recent.append(loss)
        self.step += 1
        self.timed += 1

    def after_step(self, epoch: int) -> None:
        """What is due after this step: a report, the validation, a checkpoint, samples."""
        s = self.settings
        self.bar.update()
        ends = any(self.step == stage.stop for stage in self.plan.stages)
        due = ends or self.step % s.save_every == 0
        if due or self.step % s.log_every == 0 or self.step == 1:
            self.report(epoch)
        if ends or self.step % self.plan.steps_per_epoch == 0:
            self.validate(epoch)
        if due:
            self.save()
        if self.preview and (self.step % self.plan.steps_per_epoch == 0 or self.step == self.plan.total):
            start = time.perf_counter()
            self.preview(self.ema or self.model, epoch + 1)
            self.since += time.perf_counter() - start

    def losses(self) -> Tensor:
        """The mean over processes of each step's loss since the last report."""
        if not self.recent:
            return self.known
        return torch.cat((self.known, self.here.sum(torch.stack(self.recent)) / self.here.size))

    def restart_clock(self) -> None:
        self.since, self.timed, self.waited = time.perf_counter(), 0, 0.0

    def report(self, epoch: int) -> None:
        """The mean loss since the last report, over all processes; a loss that is not finite stops the run."""
        losses = self.losses()
        loss, norm = losses.mean().item(), float(self.grad_norm)
        self.refuse_what_is_not_finite(losses, norm)
        self.recent, self.known = [], self.known[:0]
        s, config = self.settings, self.model.config
        elapsed = time.perf_counter() - self.since
        images = self.timed * s.global_batch / elapsed
        rate = images * self.flops(self.patch)
        row = {
            "loss": loss,
            "lr": self.lr,
            "grad_norm": norm,
            "images_per_s": images,
            "tokens_per_s": images * config.block_size / self.patch**2,
            "mfu": rate / self.here.size / self.peak,
            "data_wait": self.waited / elapsed,
            "memory_gb": peak_memory(self.here.device) / 1e9,
        }
        row = {
            key: float(f"{value:.4g}") if key not in ("loss", "lr", "grad_norm") else value
            for key, value in row.items()
        }
        self.log.metrics(step=self.step, epoch=epoch, patch=self.patch, **row)
        left = self.plan.remaining(self.step, lambda patch: self.flops(patch) * s.global_batch) / rate
        self.bar.set_description(f"{self.patch}x{self.patch} epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(
            f"ETA {duration(left)}, loss {loss:.3f}, lr {self.lr:.1e}, |g| {norm:.2f}, {images:.0f} images/s, "
            f"{row['tokens_per_s']:.3g} tokens/s, MFU {row['mfu']:.0%}, {row['memory_gb']:.1f} GB"
        )
        self.restart_clock()

    def refuse_what_is_not_finite(self, losses: Tensor, norm: float) -> None:
        """SystemExit that names the steps; a loss scaler skips steps of infinite gradients by itself."""
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        first = self.step - len(losses) + 1
        if not bad and (np.isfinite(norm) or self.scaler):
            return
        if bad:
            steps = [first + i for i in bad]
            what = f"the loss is {losses[bad[0]].item()} at step {steps[0]}"
            what += f" and {len(steps) - 1} more up to step {steps[-1]}" if len(steps) > 1 else ""
        else:
            what = f"the gradient norm is {norm} at step {self.step}"
        if not self.here.is_main:
            raise SystemExit(1)
        kept = numbered(self.keeper.folder)
        advice = (
            f"start again with a lower --lr or --max-grad-norm{f', from it by --gpt-ckpt {kept[0]}' if kept else ''}"
        )
        message = f"{what}: the run stops; the last good checkpoint is {kept[0] if kept else 'none'}; --fresh: {advice}"
        self.log.note(message)
        draw_losses(self.log.folder, self.plan)
        raise SystemExit(message)

    def validate(self, epoch: int) -> None:
        """Held-out loss at the token level, and at this stage's patch side, of the raw weights (and the EMA's)."""
        if not self.data.val:
            return
        start = time.perf_counter()
        s = self.settings
        images = np.arange(len(self.data.val)) if self.data.val_images is None else self.data.val_images
        chosen = images[np.linspace(0, len(images) - 1, min(s.val_images, len(images))).astype(np.int64)]
        batch = max(1, s.global_batch // (self.here.size * s.accumulation))
        loss = partial(mean_loss, codes=self.data.val, images=chosen, batch=batch, here=self.here, amp=self.amp)
        row = {"val_loss": loss(self.model, patch=1)}
        if self.patch > 1:
            row[f"val_loss_p{self.patch}"] = loss(self.model, patch=self.patch)
        if self.ema:
            row["val_loss_ema"] = loss(self.ema, patch=1)
        self.log.metrics(step=self.step, epoch=epoch, patch=self.patch, **row)
        words = ", ".join(f"{key} {value:.4f}" for key, value in row.items())
        self.log.line(f"epoch {epoch} ({self.patch}x{self.patch}), step {self.step}: {words}")
        self.since += time.perf_counter() - start


@torch.no_grad()
def mean_loss(
    model: Transformer, codes: Codes, images: np.ndarray, patch: int, batch: int, here: World, amp: Callable
) -> float:
    """Mean loss (nats a code) of these images at a patch side, in eval mode; each process does its share."""
    was_training = model.training
    model.eval()
    mine = images[here.share(len(images))]
    total = torch.zeros(2, dtype=torch.float64, device=here.device)
    for start in range(0, len(mine), batch):
        codes_BL, labels_B = (torch.from_numpy(a).to(here.device) for a in codes.batch(mine[start : start + batch]))
        with amp():
            total[0] += model.loss(to_patches(codes_BL, patch), labels_B).double() * len(labels_B)
        total[1] += len(labels_B)
    model.train(was_training)
    here.sum(total)
    return (total[0] / total[1]).item()


def duration(seconds: float) -> str:
    """1:02:03, or 2 d 3 h for what takes days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours}:{minutes:02d}:{rest:02d}"


def draw_losses(folder: Path, plan: Plan) -> None:
    """loss.png: the training loss, a line a patch side, and the token-level validation loss, over the epochs."""
    rows = read_metrics(folder)
    series: dict[str, tuple[list[float], list[float]]] = {}

    def add(name: str, key: str, chosen: list[dict[str, Any]]) -> None:
        chosen = [row for row in chosen if key in row]
        if chosen:
            series[name] = ([r["step"] / plan.steps_per_epoch for r in chosen], [r[key] for r in chosen])

    for patch in dict.fromkeys(stage.patch for stage in plan.stages):
        add(f"training, {patch}x{patch} patches", "loss", [row for row in rows if row["patch"] == patch])
    add("validation, single codes", "val_loss", rows)
    add("validation, single codes, EMA", "val_loss_ema", rows)
    draw.curves(
        folder / "loss.png", series, x_label="epoch", y_label="loss (nats a code)", title=folder.name,
        boundaries=plan.boundaries(),
    )  # fmt: skip
