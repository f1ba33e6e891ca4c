"""The plan of a run: which patch side when, the learning rate of every step, what it costs, as a table and as a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import model_validator
from typing_extensions import Self

from autoregressive.models.patches import grid_side
from utils import draw
from utils.cli import InputError
from utils.settings import Fraction, NonNegative, Positive, PositiveFraction, PositiveInt, Settings, setting

DEFAULTS = {"epochs": 300, "patch_level": 2, "epoch_rate": 0.5}  # of patch_levels
LONGEST = 2**31  # epochs or steps of a level


class Level(NamedTuple):
    """Training on patches of side `patch` from start to stop (exclusive), in epochs or in steps."""

    patch: int
    start: float
    stop: float


def patch_levels(epochs: int, patch_level: int, epoch_rate: float) -> list[Level]:
    """The published schedule, in epochs: patch sides 2**(levels-1) .. 2, 1, with boundaries int(epochs * rate**i).

    Three levels at rate 0.5 of 300 epochs end at 75, 150 and 300. Empty levels are left out.
    Raises InputError unless epochs >= 1, 1 <= patch_level <= 32 and 0 < epoch_rate <= 1.
    """
    if epochs < 1 or not 1 <= patch_level <= 32 or not 0 < epoch_rate <= 1:
        raise InputError(
            "expected epochs >= 1, a patch level of 1 to 32 and an epoch rate in (0, 1], "
            f"got {epochs}, {patch_level} and {epoch_rate}"
        )
    sides = [2**i for i in reversed(range(patch_level))]
    stops = [int(epochs * epoch_rate**i) for i in reversed(range(patch_level))]
    return [level for level in _one_by_one(sides, stops) if level.start < level.stop]


def free_levels(patches: Sequence[int], lengths: Sequence[float]) -> list[Level]:
    """Levels of these patch sides, one after the other, each so many epochs or steps long.

    Raises InputError unless there are as many lengths as sides, and all are above 0 and at most LONGEST.
    """
    fit = len(patches) == len(lengths) and patches and min(patches) >= 1
    if not fit or min(lengths) <= 0 or max(lengths) > LONGEST:
        raise InputError(
            f"expected a length above 0 and at most {LONGEST} for each patch side, got {list(lengths)} for {list(patches)}"
        )
    return _one_by_one(patches, [sum(lengths[: i + 1]) for i in range(len(lengths))])


def _one_by_one(patches: Sequence[int], stops: Sequence[float]) -> list[Level]:
    return [Level(*row) for row in zip(patches, [0, *stops[:-1]], stops, strict=True)]


def in_steps(levels: Sequence[Level], steps_per_epoch: int) -> list[Level]:
    """Levels in epochs -> levels in steps; boundaries are rounded. Raises InputError for a level of less than a step."""
    rows = [Level(s.patch, round(s.start * steps_per_epoch), round(s.stop * steps_per_epoch)) for s in levels]
    for level, row in zip(levels, rows, strict=True):
        if row.start >= row.stop:
            raise InputError(
                f"{level.stop - level.start:g} epochs of {steps_per_epoch} steps on patches of side {row.patch} are no step"
            )
    return rows


def relative_cost(levels: Sequence[Level]) -> float:
    """Positions trained on, as a share of next-token training of the same length (0.625 for two levels at rate 0.5)."""
    return sum((s.stop - s.start) / s.patch**2 for s in levels) / levels[-1].stop


@dataclass(frozen=True)
class Plan:
    """Levels in steps; the rate is `lr` throughout, or warms up and decays in each level where `scheduler` is set."""

    levels: Sequence[Level]
    steps_per_epoch: int
    lr: float
    scheduler: bool = False
    end_lr: float = 0.0
    warmup_epochs: float = 0.0
    decay_ratio: float = 0.0

    @property
    def total(self) -> int:
        return self.levels[-1].stop

    def level(self, step: int) -> Level:
        """The level of update `step` (from 0); the last one past the end."""
        return next((level for level in self.levels if step < level.stop), self.levels[-1])

    def rate(self, step: int) -> float:
        """The learning rate of update `step`: with `scheduler` in each level a linear warm-up from 0, then lr, then a linear
        decay towards end_lr over the level's last decay_ratio. Past the end it stays at end_lr.

        Where warm-up and decay overlap the warm-up is followed first, as published.
        """
        if not self.scheduler:
            return self.lr
        if step >= self.total:
            return self.end_lr
        level, warmup = self.level(step), self.warmup_epochs * self.steps_per_epoch
        if step - level.start < warmup:
            return self.lr * (step - level.start) / warmup
        decay_start = level.stop - self.decay_ratio * (level.stop - level.start)
        if step < decay_start:
            return self.lr
        return self.lr + (self.end_lr - self.lr) * (step - decay_start) / (level.stop - decay_start)

    def remaining(self, step: int, cost: Callable[[int], float]) -> float:
        """The cost of the updates from `step` on, where cost(patch) is that of one."""
        return sum(max(0, s.stop - max(s.start, step)) * cost(s.patch) for s in self.levels)

    def table(self, batch: int, tokens: int, flops: Callable[[int], float]) -> str:
        """A row a level: steps, positions, FLOPs and learning rates, for `batch` images of `tokens` codes a step.

        flops: the FLOPs of training on one image at a patch side.
        """
        rows = [("patch", "epochs", "steps", "positions", "FLOPs", "of the cost", "lr: first, middle, last")]
        whole = self.remaining(0, flops)
        for level in self.levels:
            steps = level.stop - level.start
            positions = steps * batch * tokens // level.patch**2
            shown = (level.start, (level.start + level.stop - 1) // 2, level.stop - 1)
            rows.append((
                f"{level.patch}x{level.patch}",
                f"{level.start / self.steps_per_epoch:g}-{level.stop / self.steps_per_epoch:g}",
                f"{steps}",
                f"{positions:,}" if positions < 1_000_000 else f"{positions:.3g}",
                f"{steps * batch * flops(level.patch):.3g}",
                f"{steps * flops(level.patch) / whole:.1%}",
                ", ".join(f"{self.rate(step):.2e}" for step in shown),
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.append(
            "cost relative to next-token training of the same epochs: "
            f"{relative_cost(self.levels):.3f} (positions), {whole / (self.total * flops(1)):.3f} (FLOPs)"
        )
        if self.levels[-1].patch != 1:
            lines.append("note: the last level is not on single codes, and sampling draws single codes")
        return "\n".join(lines)

    def draw(self, path: str | Path, title: str) -> None:
        """A picture of the learning rate over the epochs, with the levels' boundaries."""
        ends = {step for level in self.levels for step in (level.start, level.stop - 1)}
        steps = sorted({*range(0, self.total, -(-self.total // 1000)), *ends})
        draw.curves(
            path,
            {"learning rate": ([s / self.steps_per_epoch for s in steps], [self.rate(s) for s in steps])},
            x_label="epoch", y_label="learning rate", boundaries=self.boundaries(),
            title=f"{title}: {relative_cost(self.levels):.3f} of the positions of next-token training",
        )  # fmt: skip

    def boundaries(self) -> dict[float, str]:
        """Where each level begins, in epochs, and its name."""
        return {s.start / self.steps_per_epoch: f"{s.patch}x{s.patch}" for s in self.levels}


class ScheduleSettings(Settings):
    """Which patch side when, and how the learning rate follows."""

    patch_level: PositiveInt | None = setting(
        None, "levels: patch sides 2**(n-1) .. 1; 1 is next-token; 2 if not given"
    )
    epoch_rate: PositiveFraction | None = setting(None, "levels end at epochs * rate**i; 0.5 if not given")
    epochs: PositiveInt | None = setting(None, "of the whole run; 300 if not given")
    patch_sizes: list[PositiveInt] | None = setting(None, "any other schedule: the patch side of each level, and")
    patch_epochs: list[Positive] | None = setting(None, "how many epochs each one lasts, or")
    patch_steps: list[PositiveInt] | None = setting(None, "how many steps")
    scheduler: bool = setting(False, "warm-up and decay in each level; constant --lr without it")
    warmup_epochs: NonNegative = setting(1.0)
    decay_ratio: Fraction = setting(0.2, "last part of each level over which the rate decays")
    end_lr: NonNegative = setting(1e-5)

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.patch_sizes is None:
            if self.patch_epochs or self.patch_steps:
                raise ValueError(
                    "--patch-epochs and --patch-steps say how long each of --patch-sizes lasts: give those too"
                )
        elif self.patch_level or self.epoch_rate or self.epochs:
            raise ValueError(
                "--patch-sizes makes a schedule of its own: leave out --patch-level, --epoch-rate and --epochs"
            )
        elif bool(self.patch_epochs) == bool(self.patch_steps):
            raise ValueError("--patch-sizes needs either --patch-epochs or --patch-steps: how long each level lasts")
        return self

    def published(self) -> dict[str, float]:
        """The arguments of patch_levels, with DEFAULTS; none where --patch-sizes makes the schedule."""
        return {} if self.patch_sizes else {name: getattr(self, name) or value for name, value in DEFAULTS.items()}

    def plan(self, lr: float, steps_per_epoch: int, tokens: int) -> Plan:
        """The levels in steps. Raises InputError for one without a step, or whose side does not divide the grid of codes."""
        if self.patch_steps:
            levels = free_levels(self.patch_sizes, self.patch_steps)
        elif self.patch_epochs:
            levels = in_steps(free_levels(self.patch_sizes, self.patch_epochs), steps_per_epoch)
        else:
            levels = in_steps(patch_levels(**self.published()), steps_per_epoch)
        side = grid_side(tokens)
        for level in levels:
            if side % level.patch:
                raise InputError(
                    f"the schedule has patches of side {level.patch}, which does not divide the grid of {side}x{side} codes"
                )
        return Plan(levels, steps_per_epoch, lr, self.scheduler, self.end_lr, self.warmup_epochs, self.decay_ratio)
