"""The plan of a run: which patch side when, and the learning rate of every step. Pure functions of progress."""

from collections.abc import Sequence
from typing import NamedTuple


class Stage(NamedTuple):
    """Epochs start..stop (exclusive) of training on patches of side `patch`."""

    patch: int
    start: int
    stop: int


def patch_stages(epochs: int, patch_level: int, epoch_rate: float) -> list[Stage]:
    """The published schedule: patch sides 2**(levels-1) .. 2, 1, with boundaries int(epochs * rate**i).

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


def relative_cost(stages: Sequence[Stage]) -> float:
    """Positions trained on, as a share of next-token training for the same epochs (0.625 for two levels at rate 0.5)."""
    return sum((s.stop - s.start) / s.patch**2 for s in stages) / stages[-1].stop


def stage_at(stages: Sequence[Stage], epoch: float) -> Stage:
    """The stage of an epoch; the last one past the end."""
    return next((stage for stage in stages if epoch < stage.stop), stages[-1])


def learning_rate(
    step: int,
    stages: Sequence[Stage],
    steps_per_epoch: int,
    *,
    lr: float,
    end_lr: float,
    warmup_epochs: float,
    decay_ratio: float,
) -> float:
    """The rate of update `step` (from 0): in each stage a linear warm-up from 0, then lr, then a linear decay towards
    end_lr over the stage's last decay_ratio. Past the end it stays at end_lr.

    Where warm-up and decay overlap the warm-up is followed first, as published.
    """
    if step >= stages[-1].stop * steps_per_epoch:
        return end_lr
    stage = stage_at(stages, step / steps_per_epoch)
    start, stop = stage.start * steps_per_epoch, stage.stop * steps_per_epoch
    warmup = warmup_epochs * steps_per_epoch
    if step - start < warmup:
        return lr * (step - start) / warmup
    decay_start = stop - decay_ratio * (stop - start)
    if step < decay_start:
        return lr
    return lr + (end_lr - lr) * (step - decay_start) / (stop - decay_start)
