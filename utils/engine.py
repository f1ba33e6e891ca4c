"""The training engine: one loop for whatever gives batches, a loss, a learning rate and named parts to save.

GPT, tokenizer and classifier are its users; each is a Task (utils/task.py). Order, views, dropped labels and dropout are
functions of (seed, epoch, step), so a run that was cut off and resumed is the same run. The number of processes changes only
dropout masks and rounding errors.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint, sharding, streams
from utils.cli import InputError
from utils.distributed import World, autocast, precision_dtype
from utils.log import RunLog, duration, forget_after, progress, read_metrics
from utils.machine import matmul_rate, peak_memory, use_compile
from utils.runs import CheckpointManager, Run, open_run
from utils.stop import StopRequest, stop_on_signals
from utils.task import EngineSettings, Task
from utils.update import ema_copy, update, update_ema, warm_decay

PLOT_EVERY = 60  # seconds between two plots of the curves


class Recent(NamedTuple):
    """Losses since the last report: their names, and a row a step."""

    names: list[str]
    rows: list[Tensor]


class Trainer:
    """A run under way: a task, its average and optimizer, and its place in the run."""

    def __init__(
        self, task: Task, settings: EngineSettings, world: World, run: Run, log: RunLog, manager: CheckpointManager
    ) -> None:
        self.task, self.settings, self.world, self.run = task, settings, world, run
        self.log, self.manager = log, manager
        self.dtype = precision_dtype(settings.mixed_precision, world.device)
        self.sharded = task.data_parallel != "ddp" and world.size > 1
        if not self.sharded:
            task.model.to(world.device)
        self.ema = ema_copy(task.model) if task.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(world.device.type) if self.dtype == torch.float16 else None
        self.amp = partial(autocast, world.device, self.dtype)
        self.objective = self.wrapped(task.objective)
        if task.opponent:
            task.opponent.objective.to(world.device)
            self.opponent_objective = self.wrapped(task.opponent.objective)
            self.opponent_scaler = torch.amp.GradScaler(world.device.type) if self.scaler else None
        self.step = 0
        self.validation: dict[str, float] = {}  # figures of the last validation
        self.recent = Recent(["loss"], [])  # of this process
        self.earlier = torch.zeros(0, 1, device=world.device)  # of all processes, from a checkpoint
        self.drawn = time.monotonic()
        self.restart_clock()

    def wrapped(self, objective: nn.Module) -> nn.Module:
        """The objective for one process or several, compiled or not; the model and its average are sharded if asked for."""
        task, world, s = self.task, self.world, self.settings
        compiled = use_compile(s.compile, world.device)
        if self.sharded:
            mesh, names = sharding.make_mesh(world, task.data_parallel), sharding.names_of(task.model)
            self.plain_copy = sharding.frame(task.model)
            for model in filter(None, (task.model, self.ema)):
                blocks = model.get_submodule(task.blocks)
                if compiled:
                    for block in blocks:
                        block.compile(dynamic=False)
                sharding.shard(model, blocks, task.methods, mesh, self.dtype)
                model.to(world.device)  # its buffers
            sharding.point_to(task.optimizer, task.model, names)
            return objective
        if compiled:
            objective = torch.compile(objective, dynamic=False)
        if world.size == 1:
            return objective
        return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)

    def parts(self) -> dict[str, Any]:
        """Everything that resuming needs, by its name in a checkpoint."""
        parts = {"model": self.task.model, "optimizer": self.task.optimizer, **self.task.parts()}
        parts |= {"ema": self.ema} if self.ema else {}
        if self.scaler and self.task.opponent:
            parts["scaler_opponent"] = self.opponent_scaler
        return parts | ({"scaler": self.scaler} if self.scaler else {})

    def resume(self) -> None:
        """Load the run's newest whole checkpoint, if it has any.

        Raises InputError if there are some and none of them is whole, or if the processes read different ones.
        """
        newest = None

        def choose() -> tuple[Path, int] | None:
            nonlocal newest
            newest = self.manager.newest_whole()
            return newest and (newest[0], newest[1]["steps"])

        chosen = self.world.from_main(choose)
        if chosen is None:
            return
        path, steps = chosen
        content = newest[1] if newest else checkpoint.load(path, mmap=True)
        if content["steps"] != steps:
            raise InputError(
                f"process {self.world.rank} sees another {path} than the first process: put the results folder on "
                "storage that all share"
            )
        for name, part in self.parts().items():
            if isinstance(part, nn.Module):
                state = sharding.parts_of(content[name], part) if self.sharded else content[name]
                checkpoint.load_weights(part, state, f"{path} ({name})")
            elif isinstance(part, torch.optim.Optimizer):
                sharding.load_optimizer(part, content[name])
            elif name in content:
                part.load_state_dict(content[name])
        self.step, self.validation = steps, dict(content.get("validation", {}))
        self.recent = Recent(list(content.get("loss_names", ["loss"])), [])
        if "recent" in content:
            self.earlier = content["recent"].reshape(-1, len(self.recent.names)).clone().to(self.world.device)
        self.log.line(f"continuing at step {self.step} of {self.task.steps} from {path}")

    def save(self) -> None:
        """Write a checkpoint, unless something in it is not finite; draw the curves, once a minute."""
        start = time.perf_counter()
        losses = self.losses()
        self.refuse_not_finite(losses)
        self.earlier, self.recent = losses, Recent(self.recent.names, [])
        if self.world.is_main or self.sharded:
            content = {name: part.state_dict() for name, part in self.parts().items()}
            content = sharding.whole(content, self.world.is_main) if self.sharded else content
        if self.world.is_main:
            for name in content:
                if tensor := checkpoint.first_not_finite(content[name]):
                    self.stop_run(f"{tensor} of the {name} weights is not finite after step {self.step}")
            content |= {
                "steps": self.step, "loss_names": self.recent.names, "recent": losses.cpu(),
                "validation": self.validation, **self.task.about,
            }  # fmt: skip
            self.manager.save(self.step, content)
            if time.monotonic() - self.drawn > PLOT_EVERY:
                self.draw()
        self.since += time.perf_counter() - start

    def draw(self) -> None:
        self.task.draw(self.run.folder, read_metrics(self.run.folder))
        self.drawn = time.monotonic()

    def train(self, stop: StopRequest | None = None) -> bool:
        """Run to the last step; False if `stop` ended it before, after a checkpoint."""
        task, world = self.task, self.world
        if world.is_main:
            forget_after(self.run.folder, self.step)
        self.bar = progress(
            total=task.steps, initial=self.step, unit=" steps", show=world.is_main,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip
        side = 1024 if world.device.type == "cpu" else 8192
        self.peak = matmul_rate(world.device, self.dtype, side, repeats=20) if self.step < task.steps else 0.0
        task.model.train()
        self.restart_clock()
        with self.bar:
            while self.step < task.steps:
                epoch, first_step = divmod(self.step, task.steps_per_epoch)
                batches = task.batches(epoch, first_step, world)
                while self.step < min(task.steps, (epoch + 1) * task.steps_per_epoch):
                    start = time.perf_counter()
                    batch = next(batches)
                    self.waited += time.perf_counter() - start
                    self.train_step(batch)
                    self.after_step(epoch)
                    if self.step < task.steps and stop and stop.agreed():
                        self.save()
                        world.barrier()  # the first one to leave would have the launcher end the others
                        return False
        return True

    def train_step(self, batch: Sequence[Tensor]) -> None:
        """One update on this process's part of a global batch."""
        s, task, device = self.settings, self.task, self.world.device
        if device.type == "cuda":
            batch = [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
        parts = list(zip(*(tensor.chunk(s.gradient_accumulation_steps) for tensor in batch), strict=True))
        seed = streams.bits(s.global_seed, streams.DROPOUT, self.step, self.world.rank) >> np.uint64(1)
        torch.manual_seed(int(seed))
        self.lr = task.learning_rate(self.step)
        losses, self.grad_norm = update(
            lambda part: task.loss(self.objective, part, self.step), self.objective, task.optimizer, parts,
            lr=self.lr, max_grad_norm=s.max_grad_norm, scaler=self.scaler, amp=self.amp,
        )  # fmt: skip
        losses |= self.opponent_step()
        if self.recent.names != list(losses):
            self.recent = Recent(list(losses), [])
        self.recent.rows.append(torch.stack(list(losses.values())))
        self.step += 1
        self.timed += 1
        task.after_update(self.step, self.ema, self.world)
        if self.ema:
            update_ema(self.ema, task.model, warm_decay(task.ema_decay, self.step))

    def opponent_step(self) -> dict[str, Tensor]:
        """One update of the opponent, if there is one and it has batches; the parts of its loss."""
        s, opponent = self.settings, self.task.opponent
        if not opponent or not (batches := opponent.batches(self.step)):
            return {}
        losses, _ = update(
            partial(opponent.loss, self.opponent_objective), self.opponent_objective, opponent.optimizer, batches,
            lr=self.lr * opponent.lr_ratio, max_grad_norm=s.max_grad_norm, scaler=self.opponent_scaler, amp=self.amp,
        )  # fmt: skip
        return {name: value for name, value in losses.items() if name != "loss"}

    def after_step(self, epoch: int) -> None:
        """What is due after this step: a report, the validation, samples, a checkpoint."""
        s, task = self.settings, self.task
        self.bar.update()
        ends = self.step in task.stops or self.step == task.steps
        save = ends or self.step % s.ckpt_every == 0
        if save or self.step % s.log_every == 0 or self.step == 1:
            self.report(epoch)
        if ends or self.step % (s.val_every or task.steps_per_epoch) == 0:
            self.validate(epoch)
        if task.previews(self.step):
            start = time.perf_counter()
            model = self.ema_or_model()
            state = sharding.whole(model.state_dict(), self.world.is_main) if self.sharded else {}
            if self.world.is_main:
                task.preview(self.plain_copy(state) if self.sharded else model, self.step, self.log)
            self.since += time.perf_counter() - start
        if save:  # last, so that a run killed before it does again what comes before it
            self.save()

    def ema_or_model(self) -> nn.Module:
        """The average, unless the last validation found it worse than the weights."""
        v = self.validation
        worse = v.get("val_loss_ema", 0.0) > v.get("val_loss", float("inf"))
        return self.task.model if worse or not self.ema else self.ema

    def losses(self) -> Tensor:
        """The mean over processes of each step's losses since the last report: (steps, losses)."""
        if not self.recent.rows:
            return self.earlier
        rows = self.world.sum(torch.stack(self.recent.rows)) / self.world.size
        return torch.cat((self.earlier, rows)) if len(self.earlier) else rows

    def restart_clock(self) -> None:
        self.since, self.timed, self.waited = time.perf_counter(), 0, 0.0

    def report(self, epoch: int) -> None:
        """Log the mean losses since the last report, over all processes; one that is not finite stops the run."""
        losses = self.losses()
        self.refuse_not_finite(losses)
        means = dict(zip(self.recent.names, losses.mean(0).tolist(), strict=True))
        self.earlier, self.recent = losses[:0], Recent(self.recent.names, [])
        task, at = self.task, self.step - 1
        elapsed = time.perf_counter() - self.since
        images = self.timed * self.settings.global_batch_size / elapsed
        speed = {"images_per_s": images}
        if positions := task.positions(at):
            speed["tokens_per_s"] = images * positions
        if flops := task.flops(at):
            speed["mfu"] = images * flops / self.world.size / self.peak
        speed |= {"data_wait": self.waited / elapsed, "memory_gb": peak_memory(self.world.device) / 1e9}
        speed = {name: float(f"{value:.4g}") for name, value in speed.items()}
        norm = float(self.grad_norm)
        labels, extra = task.labels(at), task.metrics()
        self.log.metrics(step=self.step, epoch=epoch, **labels, **means, lr=self.lr, grad_norm=norm, **extra, **speed)
        per_update = images / self.settings.global_batch_size
        left = task.cost_after(self.step) / (per_update * (task.flops(at) or 1.0))
        name = f"{labels['patch']}x{labels['patch']} " if "patch" in labels else ""
        shown = [f"ETA {duration(left)}", f"loss {means['loss']:.3f}", f"lr {self.lr:.1e}", f"|g| {norm:.2f}"]
        shown += [f"{key.replace('_', ' ')} {value:.3g}" for key, value in extra.items()]
        shown += [f"{images:.0f} images/s"]
        shown += [f"{speed['tokens_per_s']:.3g} tokens/s"] if "tokens_per_s" in speed else []
        shown += [f"MFU {speed['mfu']:.0%}"] if "mfu" in speed else []
        self.bar.set_description(f"{name}epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(", ".join([*shown, f"{speed['memory_gb']:.1f} GB"]))
        self.restart_clock()

    def refuse_not_finite(self, losses: Tensor) -> None:
        """Stop the run if a loss or the gradient is not finite; a loss scaler skips such gradients by itself."""
        bad = (~torch.isfinite(losses).all(1)).nonzero().flatten().tolist()
        first = self.step - len(losses) + 1
        if bad:
            steps = [first + i for i in bad]
            reason = f"the loss is {losses[bad[0], 0].item()} at step {steps[0]}"
            self.stop_run(reason + (f" and {len(steps) - 1} more up to step {steps[-1]}" if len(steps) > 1 else ""))
        if not self.scaler and self.step and self.timed and not np.isfinite(norm := float(self.grad_norm)):
            self.stop_run(f"the gradient norm is {norm} at step {self.step}")

    def stop_run(self, reason: str) -> None:
        """SystemExit with the reason and what to do, from the first process only."""
        if not self.world.is_main:
            raise SystemExit(1)
        kept = self.manager.checkpoints()
        message = (
            f"error: {reason}: the run stops; the last good checkpoint is {kept[0] if kept else 'none'}; "
            "start again with a lower --lr or --max-grad-norm"
        )
        self.log.note(message)
        self.draw()
        raise SystemExit(message)

    def validate(self, epoch: int) -> None:
        """Figures on held-out data of the weights and of their average."""
        start = time.perf_counter()
        row = self.task.validate(self.task.model, self.step, self.world, self.amp)
        if row and self.ema:
            average = self.task.validate(self.ema, self.step, self.world, self.amp)
            if self.sharded:  # a backward pass would do so
                self.ema.reshard()
            row |= {f"{name}_ema": average[name] for name in average if name in ("val_loss", "val_accuracy")}
        if row:
            self.validation = row
            labels = self.task.labels(self.step - 1)
            self.log.metrics(step=self.step, epoch=epoch, **labels, **row)
            values = ", ".join(f"{key} {value:.4f}" for key, value in row.items())
            patch = f" ({labels['patch']}x{labels['patch']})" if "patch" in labels else ""
            self.log.line(f"epoch {epoch}{patch}, step {self.step}: {values}")
            if self.step == self.task.steps and self.ema and self.ema_or_model() is not self.ema:
                self.log.line(
                    "warning: the average of the weights is worse than the weights: the run is short for --ema-decay "
                    f"{self.task.ema_decay}; sampling takes the weights unless told otherwise"
                )
        self.since += time.perf_counter() - start


def run_training(
    world: World,
    settings: EngineSettings,
    make_task: Callable[[Run, RunLog], Task],
    *,
    results: Path,
    name: str | None,
    args: Mapping[str, Any],
    header: Callable[[Task], Sequence[str]],
    finish: Callable[[Trainer], None] = lambda trainer: None,
    is_complete: Callable[[Path], bool] = lambda folder: True,
    fresh: bool = False,
    start_flag: str = "",
) -> None:
    """Open a run, or continue it, train to its end and mark it as done; or stop after a checkpoint when asked to.

    results, name, args, fresh, start_flag: see open_run. header: lines for the log before the first step. finish: what
    the first process does after the last one. is_complete: whether a finished run's folder still holds what finish made.
    Raises SystemExit, with the status that the signal asks for, where a signal ended it.
    """
    world.check_shared(results)
    precision = settings.precision(world.device)
    if precision != (first := world.from_main(lambda: settings.precision(world.device))):
        raise InputError(
            f"process {world.rank} would compute in {precision}, the first one in {first}: their machines differ; give "
            "--mixed-precision fp32 or bf16"
        )
    with stop_on_signals(world.size) as stop, ExitStack() as at_end:
        run = world.from_main(
            lambda: open_run(
                results, name, args, settings.free(), settings.defaults(), fresh=fresh, start_flag=start_flag
            )
        )
        at_end.callback(run.close)
        log = RunLog(run.folder, world.is_main, settings.tensorboard)
        cloud = settings.cloud_save_path and settings.cloud_save_path / f"{run.folder.name}-{run.record.id}"
        manager = CheckpointManager(run.folder, log, settings.keep_last, cloud=cloud)
        if cloud and world.is_main:
            for path in manager.checkpoints():  # whose copies an earlier process did not finish
                manager.copy(path)
        if run.finished and world.from_main(lambda: is_complete(run.folder)):
            if world.is_main:
                more = "" if name is None else "; --fresh starts a new run"
                print(f"{run.folder} is finished already{more}")
            manager.close(until=lambda: stop.asked is not None)
            return
        task = make_task(run, log)
        manager.kept = task.stops
        trainer = Trainer(task, settings, world, run, log, manager)
        trainer.resume()
        precision = (
            [] if trainer.dtype == torch.float32 else [f"in {settings.precision(world.device)}, weights in float32"]
        )
        for line in (*header(task), *precision, *run.notes):
            log.line(line)
        ended = trainer.train(stop)
        if world.is_main:
            trainer.draw()
        if not ended:
            reason = stop.asked.name if stop.asked else "another process"
            log.line(f"stopped at step {trainer.step} of {task.steps} by {reason}; the same command continues")
            manager.close(deadline=10)  # a pre-empted process has some 30 s
            raise SystemExit(stop.exit_status())
        if world.is_main:
            finish(trainer)
            run.finish()
            manager.close(until=lambda: stop.asked is not None)
