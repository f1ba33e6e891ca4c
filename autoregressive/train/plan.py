"""A run's plan: its stages in steps, the learning rate of each step, what it costs, as a table and as a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoregressive.train.schedule import Stage, learning_rate, relative_cost, stage_at
from utils import draw


def whole_number(n: int) -> str:
    """1,234 in full, 1.23e+06 from a million on."""
    return f"{n:,}" if n < 1_000_000 else f"{n:.3g}"


@dataclass(frozen=True)
class Plan:
    """Stages in steps; the rate is `lr` throughout, or warms up and decays in each stage where `scheduler` is set."""

    stages: Sequence[Stage]
    steps_per_epoch: int
    lr: float
    scheduler: bool = False
    end_lr: float = 0.0
    warmup_epochs: float = 0.0
    decay_ratio: float = 0.0

    @property
    def total(self) -> int:
        return self.stages[-1].stop

    def stage(self, step: int) -> Stage:
        """The stage of update `step`."""
        return stage_at(self.stages, step)

    def rate(self, step: int) -> float:
        """The learning rate of update `step`."""
        if not self.scheduler:
            return self.lr
        return learning_rate(
            step, self.stages, lr=self.lr, end_lr=self.end_lr,
            warmup=self.warmup_epochs * self.steps_per_epoch, decay_ratio=self.decay_ratio,
        )  # fmt: skip

    def remaining(self, step: int, cost: Callable[[int], float]) -> float:
        """The cost of the updates from `step` on, where cost(patch) is that of one."""
        return sum(max(0, s.stop - max(s.start, step)) * cost(s.patch) for s in self.stages)

    def table(self, batch: int, tokens: int, flops: Callable[[int], float]) -> str:
        """A row a stage: steps, positions, FLOPs and learning rates, for `batch` images of `tokens` codes a step.

        flops: the FLOPs of training on one image at a patch side.
        """
        rows = [("patch", "epochs", "steps", "positions", "FLOPs", "of the cost", "lr: first, middle, last")]
        whole = self.remaining(0, flops)
        for stage in self.stages:
            steps = stage.stop - stage.start
            shown = (stage.start, (stage.start + stage.stop - 1) // 2, stage.stop - 1)
            rows.append((
                f"{stage.patch}x{stage.patch}",
                f"{stage.start / self.steps_per_epoch:g}-{stage.stop / self.steps_per_epoch:g}",
                f"{steps}",
                whole_number(steps * batch * tokens // stage.patch**2),
                f"{steps * batch * flops(stage.patch):.3g}",
                f"{steps * flops(stage.patch) / whole:.1%}",
                ", ".join(f"{self.rate(step):.2e}" for step in shown),
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        positions = relative_cost(self.stages)
        share = whole / (self.total * flops(1))
        lines.append(
            f"cost relative to next-token training of the same epochs: {positions:.3f} (positions), {share:.3f} (FLOPs)"
        )
        if self.stages[-1].patch != 1:
            lines.append("note: the last stage is not on single codes, and sampling draws single codes")
        return "\n".join(lines)

    def draw(self, path: str | Path, title: str) -> None:
        """A picture of the learning rate over the epochs, with the stages' boundaries."""
        points = 1000
        steps = sorted(
            {round(i * (self.total - 1) / points) for i in range(points + 1)}
            | {step for s in self.stages for step in (s.start, s.stop - 1)}
        )
        draw.curves(
            path,
            {"learning rate": ([s / self.steps_per_epoch for s in steps], [self.rate(s) for s in steps])},
            x_label="epoch", y_label="learning rate", boundaries=self.boundaries(),
            title=f"{title}: {relative_cost(self.stages):.3f} of the positions of next-token training",
        )  # fmt: skip

    def boundaries(self) -> dict[float, str]:
        """Where each stage begins, in epochs, and its name."""
        return {s.start / self.steps_per_epoch: f"{s.patch}x{s.patch}" for s in self.stages}
