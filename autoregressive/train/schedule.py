"""The plan of a run: which patch side when, and the learning rate of every step. Pure functions of progress."""

from collections.abc import Sequence
from typing import NamedTuple


class Stage(NamedTuple):
    """Training on patches of side `patch` from start to stop (exclusive), in epochs or in steps."""

    patch: int
    start: float
    stop: float


def patch_stages(epochs: int, patch_level: int, epoch_rate: float) -> list[Stage]:
    """The published schedule, in epochs: patch sides 2**(levels-1) .. 2, 1, with boundaries int(epochs * rate**i).

    Three levels at rate 0.5 of 300 epochs end at 75, 150 and 300. Empty stages are left out.
    Raises ValueError unless epochs >= 1, patch_level >= 1 and 0 < epoch_rate <= 1.
    """
    if epochs < 1 or patch_level < 1 or not 0 < epoch_rate <= 1:
        raise ValueError(
            "expected epochs >= 1, patch level >= 1 and an epoch rate in (0, 1], "
            f"got {epochs}, {patch_level} and {epoch_rate}"
        )
    stops = [int(epochs * epoch_rate**i) for i in reversed(range(patch_level))]
    starts = [0, *stops[:-1]]
    sides = [2**i for i in reversed(range(patch_level))]
    return [Stage(*row) for row in zip(sides, starts, stops, strict=True) if row[1] < row[2]]


def free_stages(patches: Sequence[int], lengths: Sequence[float]) -> list[Stage]:
    """Stages of these patch sides, one after the other, each so many epochs or steps long.

    Raises ValueError unless there are as many lengths as sides and all are above 0.
    """
    if len(patches) != len(lengths) or not patches or min(lengths) <= 0 or min(patches) < 1:
        raise ValueError(f"expected a length above 0 for each patch side, got {list(lengths)} for {list(patches)}")
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [Stage(*row) for row in zip(patches, [0, *stops[:-1]], stops, strict=True)]


def in_steps(stages: Sequence[Stage], steps_per_epoch: int) -> list[Stage]:
    """Stages in epochs -> stages in steps; boundaries are rounded. Raises ValueError for a stage of less than a step."""
    rows = [Stage(s.patch, round(s.start * steps_per_epoch), round(s.stop * steps_per_epoch)) for s in stages]
    for stage, row in zip(stages, rows, strict=True):
        if row.start >= row.stop:
            raise ValueError(
                f"{stage.stop - stage.start:g} epochs of {steps_per_epoch} steps on patches of side {row.patch} are no step"
            )
    return rows


def relative_cost(stages: Sequence[Stage]) -> float:
    """Positions trained on, as a share of next-token training of the same length (0.625 for two levels at rate 0.5)."""
    return sum((s.stop - s.start) / s.patch**2 for s in stages) / stages[-1].stop


def stage_at(stages: Sequence[Stage], position: float) -> Stage:
    """The stage of an epoch or step; the last one past the end."""
    return next((stage for stage in stages if position < stage.stop), stages[-1])


def learning_rate(
    step: int,
    stages: Sequence[Stage],
    *,
    lr: float,
    end_lr: float,
    warmup: float,
    decay_ratio: float,
) -> float:
    """The rate of update `step` (from 0): in each stage (in steps) a linear warm-up from 0 over `warmup` steps, then lr,
    then a linear decay towards end_lr over the stage's last decay_ratio. Past the end it stays at end_lr.

    Where warm-up and decay overlap the warm-up is followed first, as published.
    """
    if step >= stages[-1].stop:
        return end_lr
    stage = stage_at(stages, step)
    if step - stage.start < warmup:
        return lr * (step - stage.start) / warmup
    decay_start = stage.stop - decay_ratio * (stage.stop - stage.start)
    if step < decay_start:
        return lr
    return lr + (end_lr - lr) * (step - decay_start) / (stage.stop - decay_start)
