"""The plan of a run: which patch side when, and the learning rate of every step. Pure functions of progress."""

from collections.abc import Sequence
from typing import NamedTuple

LONGEST = 2**31  # epochs or steps of a level


class Level(NamedTuple):
    """Training on patches of side `patch` from start to stop (exclusive), in epochs or in steps."""

    patch: int
    start: float
    stop: float


def patch_levels(epochs: int, patch_level: int, epoch_rate: float) -> list[Level]:
    """The published schedule, in epochs: patch sides 2**(levels-1) .. 2, 1, with boundaries int(epochs * rate**i).

    Three levels at rate 0.5 of 300 epochs end at 75, 150 and 300. Empty levels are left out.
    Raises ValueError unless epochs >= 1, 1 <= patch_level <= 32 and 0 < epoch_rate <= 1.
    """
    if epochs < 1 or not 1 <= patch_level <= 32 or not 0 < epoch_rate <= 1:
        raise ValueError(
            "expected epochs >= 1, a patch level of 1 to 32 and an epoch rate in (0, 1], "
            f"got {epochs}, {patch_level} and {epoch_rate}"
        )
    stops = [int(epochs * epoch_rate**i) for i in reversed(range(patch_level))]
    starts = [0, *stops[:-1]]
    sides = [2**i for i in reversed(range(patch_level))]
    return [Level(*row) for row in zip(sides, starts, stops, strict=True) if row[1] < row[2]]


def free_levels(patches: Sequence[int], lengths: Sequence[float]) -> list[Level]:
    """Levels of these patch sides, one after the other, each so many epochs or steps long.

    Raises ValueError unless there are as many lengths as sides, and all are above 0 and at most LONGEST.
    """
    fit = len(patches) == len(lengths) and patches and min(patches) >= 1
    if not fit or min(lengths) <= 0 or max(lengths) > LONGEST:
        raise ValueError(
            f"expected a length above 0 and at most {LONGEST} for each patch side, got {list(lengths)} for {list(patches)}"
        )
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [Level(*row) for row in zip(patches, [0, *stops[:-1]], stops, strict=True)]


def in_steps(levels: Sequence[Level], steps_per_epoch: int) -> list[Level]:
    """Levels in epochs -> levels in steps; boundaries are rounded. Raises ValueError for a level of less than a step."""
    rows = [Level(s.patch, round(s.start * steps_per_epoch), round(s.stop * steps_per_epoch)) for s in levels]
    for level, row in zip(levels, rows, strict=True):
        if row.start >= row.stop:
            raise ValueError(
                f"{level.stop - level.start:g} epochs of {steps_per_epoch} steps on patches of side {row.patch} are no step"
            )
    return rows


def relative_cost(levels: Sequence[Level]) -> float:
    """Positions trained on, as a share of next-token training of the same length (0.625 for two levels at rate 0.5)."""
    return sum((s.stop - s.start) / s.patch**2 for s in levels) / levels[-1].stop


def level_at(levels: Sequence[Level], position: float) -> Level:
    """The level of an epoch or step; the last one past the end."""
    return next((level for level in levels if position < level.stop), levels[-1])


def learning_rate(
    step: int,
    levels: Sequence[Level],
    *,
    lr: float,
    end_lr: float,
    warmup: float,
    decay_ratio: float,
) -> float:
    """The rate of update `step` (from 0): in each level (in steps) a linear warm-up from 0 over `warmup` steps, then lr,
    then a linear decay towards end_lr over the level's last decay_ratio. Past the end it stays at end_lr.

    Where warm-up and decay overlap the warm-up is followed first, as published.
    """
    if step >= levels[-1].stop:
        return end_lr
    level = level_at(levels, step)
    if step - level.start < warmup:
        return lr * (step - level.start) / warmup
    decay_start = level.stop - decay_ratio * (level.stop - level.start)
    if step < decay_start:
        return lr
    return lr + (end_lr - lr) * (step - decay_start) / (level.stop - decay_start)
