"""The report of scripts/experiments/npp_vs_ntp.sh: RUN/report.md and its pictures, from what its stages left in RUN.

python -m scripts.experiments.npp_vs_ntp_report runs/npp_vs_ntp
python -m scripts.experiments.npp_vs_ntp_report runs/npp_vs_ntp docs/npp_vs_ntp.md assets/npp_vs_ntp_  # elsewhere
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from autoregressive.models.gpt import GPTConfig, preset
from autoregressive.train.schedule import Level, free_levels, in_steps, relative_cost
from dataset.codes import Codes
from scripts.benchmark.harness import card
from utils import cli, draw, records
from utils.cli import counted
from utils.distributed import best_device
from utils.files import atomic_path
from utils.log import read_metrics
from utils.samples import Samples
from utils.settings import differences

CONTROL, COMPUTE, PUBLISHED = "ntp", "ntp-compute", "ntp-constant"
OTHERS = {  # what arms are compared with; the last two with Next Patch Prediction only
    CONTROL: "the control",
    COMPUTE: "next-token training at the compute of npp2",
    PUBLISHED: "next-token training at a constant rate, as in the paper",
}
ARMS = {
    "ntp": "next-token, learning rate warmed up and decayed: the control",
    "npp2": "Next Patch Prediction in two levels: half of the epochs on 2x2 patches, half on single codes",
    "npp3": "three levels: a quarter on 4x4, a quarter on 2x2, half on single codes",
    "npp2-67": "two levels: two thirds of the epochs on 2x2 patches, a third on single codes",
    "ntp-compute": "next-token with decay, for 0.625 of the epochs: the compute of npp2",
    "ntp-constant": "next-token at a constant learning rate: LlamaGen's recipe",
    "ntp-half": "next-token with decay, for half of the epochs: what npp2 is without its level on patches",
    "ntp-restart": "next-token with the learning rate of npp2, warmed up and decayed twice",
}
FIGURES = {
    "fid": "FID (classifier)", "inception_score": "Inception Score", "precision": "precision", "recall": "recall",
    "class_accuracy": "class asked for",
}  # fmt: skip
SHOWN = 20  # samples of an arm in the picture
OWN = ("patch_sizes", "patch_epochs", "scheduler", "global_seed", "results_dir")  # may differ between trainings
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, those of the normal distribution
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass
class Trained:
    """One arm's training with one seed, measured."""

    arm: str
    seed: int
    folder: Path  # of the experiment's arm: the run and its samples

    @cached_property
    def args(self) -> dict[str, Any]:
        return records.read_json(self.run / "run.json")["args"]

    @property
    def run(self) -> Path:
        return self.folder / "000-GPT-XXS"

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.run)

    @cached_property
    def figures(self) -> dict[float, dict[str, float]]:
        """By guidance scale."""
        found = {}
        for path in (self.folder / "samples").glob("*.metrics.json"):
            scale = records.read_json(path.with_name(path.name.replace(".metrics.json", ".json")))["cfg_scale"]
            found[float(scale)] = records.read_json(path)["metrics"]
        return dict(sorted(found.items()))

    def levels(self, steps_per_epoch: int) -> list[Level]:
        return in_steps(free_levels(self.args["patch_sizes"], self.args["patch_epochs"]), steps_per_epoch)

    def cost(self, step: int, levels: Sequence[Level], config: GPTConfig) -> float:
        """FLOPs of the first steps."""
        done = ((min(step, level.stop) - min(step, level.start), level.patch) for level in levels)
        return sum(steps * self.args["global_batch_size"] * config.training_flops(patch) for steps, patch in done)

    def seconds(self, step: int) -> float:
        """Seconds of the first steps, by the logged speeds: without start, validation and checkpoints."""
        total, before = 0.0, 0
        for row in self.rows:
            if "images_per_s" in row and row["step"] <= step:
                total += (row["step"] - before) * self.args["global_batch_size"] / row["images_per_s"]
                before = row["step"]
        return total

    @property
    def val_losses(self) -> dict[int, float]:
        return {row["step"]: row["val_loss"] for row in self.rows if "val_loss" in row}


def spread(values: Iterable[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


@dataclass
class Experiment:
    """Everything that was measured. trained: by arm, then by seed."""

    folder: Path
    trained: dict[str, dict[int, Trained]]
    codes: Codes

    @classmethod
    def read(cls, folder: Path) -> "Experiment":
        """The arms whose evaluation is done. Raises InputError if the control is not among them."""
        trained: dict[str, dict[int, Trained]] = {}
        for arm in ARMS:
            for mark in sorted((folder / "done").glob(f"{arm}-[0-9]*-evaluate")):
                name = mark.name.removesuffix("-evaluate")
                if name.removeprefix(f"{arm}-").isdecimal():
                    seed = int(name.removeprefix(f"{arm}-"))
                    trained.setdefault(arm, {})[seed] = Trained(arm, seed, folder / "arms" / name)
        if CONTROL not in trained:
            raise cli.InputError(
                f"{folder} holds no measured arm {CONTROL}: run scripts/experiments/npp_vs_ntp.sh with this RUN first"
            )
        runs = [run for seeds in trained.values() for run in seeds.values()]
        args = next(iter(trained[CONTROL].values())).args
        for run in runs:
            if changed := differences(args, run.args, OWN):
                raise cli.InputError(
                    f"{run.folder} differs from the control by {', '.join(changed[:4])}: give another RUN"
                )
        return cls(folder, trained, Codes(folder / "codes" / "train", args["dataset"], args["image_size"]))

    @property
    def one(self) -> Trained:
        return next(iter(self.trained[CONTROL].values()))

    @cached_property
    def steps_per_epoch(self) -> int:
        return len(self.codes) // self.one.args["global_batch_size"]

    @cached_property
    def config(self) -> GPTConfig:
        vocabulary = self.codes.manifest.codebook_size
        return preset(self.one.args["gpt_model"], vocab_size=vocabulary, num_classes=10, block_size=self.codes.tokens)

    @cached_property
    def scale(self) -> float:
        """The guidance scale of the sweep whose mean FID over all arms and seeds is least."""
        everyone = [run for seeds in self.trained.values() for run in seeds.values()]
        scales = set.intersection(*(set(run.figures) for run in everyone))
        return min(scales, key=lambda scale: statistics.mean(run.figures[scale]["fid"] for run in everyone))

    def levels(self, arm: str) -> list[Level]:
        return next(iter(self.trained[arm].values())).levels(self.steps_per_epoch)

    def flops(self, arm: str, step: int | None = None) -> float:
        run = next(iter(self.trained[arm].values()))
        levels = self.levels(arm)
        return run.cost(levels[-1].stop if step is None else step, levels, self.config)

    def of(self, arm: str, figure: Callable[[Trained], float]) -> list[float]:
        return [figure(run) for run in self.trained[arm].values()]

    def seconds(self, arm: str) -> list[float]:
        return self.of(arm, lambda run: run.seconds(self.levels(arm)[-1].stop))

    def last_loss(self, arm: str) -> list[float]:
        return self.of(arm, lambda run: list(run.val_losses.values())[-1])

    def figure(self, arm: str, name: str) -> list[float]:
        return self.of(arm, lambda run: run.figures[self.scale].get(name, float("nan")))

    def differences(self, arm: str, other: str, figure: Callable[[Trained], float]) -> list[float]:
        """Of an arm to another one, seed by seed."""
        both = self.trained[arm].keys() & self.trained[other].keys()
        return [figure(self.trained[arm][seed]) - figure(self.trained[other][seed]) for seed in sorted(both)]


def verdict(changes: Sequence[float], unit: str) -> str:
    """What a difference says: whether its 95 % confidence interval, by Student's t over seeds, leaves out 0."""
    if len(changes) < 2:
        return f"{changes[0]:+.3f}{unit}, of one seed, which says nothing about chance"
    mean, deviation, n = statistics.mean(changes), statistics.stdev(changes), len(changes)
    quantile = QUANTILES[n - 2] if n - 2 < len(QUANTILES) else 1.96
    said = "more than chance" if abs(mean) > quantile * deviation / n**0.5 else "may be chance"
    return f"{mean:+.3f} ± {deviation:.3f}{unit} ({said})"


def arms_table(e: Experiment) -> list[str]:
    head = [
        "arm",
        "seeds",
        "levels",
        "FLOPs",
        "of the control",
        "seconds",
        "of the control",
        "validation loss",
        *FIGURES.values(),
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for arm in e.trained:
        levels = e.levels(arm)
        spans = ", ".join(f"{s.patch}x{s.patch} {(s.stop - s.start) / e.steps_per_epoch:.3g}" for s in levels)
        seconds = statistics.mean(e.seconds(arm)) / statistics.mean(e.seconds(CONTROL))
        cells = [
            arm, str(len(e.trained[arm])), spans, f"{e.flops(arm):.3g}", f"{e.flops(arm) / e.flops(CONTROL):.3f}",
            spread(e.seconds(arm), ".1f"),
            f"{seconds:.3f}", spread(e.last_loss(arm), ".4f"),
            *(spread(e.figure(arm, name)) for name in FIGURES),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sweep_table(e: Experiment) -> list[str]:
    scales = sorted(set.intersection(*(set(run.figures) for seeds in e.trained.values() for run in seeds.values())))
    lines = [f"| arm | {' | '.join(f'{scale:g}' for scale in scales)} |", f"|{'---|' * (len(scales) + 1)}"]
    for arm in e.trained:
        cells = [spread(e.of(arm, lambda run, at=scale: run.figures[at]["fid"])) for scale in scales]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def sentences(e: Experiment) -> list[str]:
    """What holds and what does not: the differences between arms."""
    measures = {
        "validation loss": (lambda run: list(run.val_losses.values())[-1], " nats a code"),
        "FID": (lambda run: run.figures[e.scale]["fid"], ""),
    }
    lines = []
    for arm in e.trained:
        for other, name in OTHERS.items():
            if arm == other or other not in e.trained or (other != CONTROL and not arm.startswith("npp")):
                continue
            if not e.trained[arm].keys() & e.trained[other].keys():
                continue
            parts = [
                f"{what} {verdict(e.differences(arm, other, figure), unit)}"
                for what, (figure, unit) in measures.items()
            ]
            lines.append(f"- **{arm}** beside {name}: {'; '.join(parts)}.")
    return lines


def draw_all(e: Experiment, pictures: str) -> None:
    """Losses over FLOPs and over seconds, FID over FLOPs, samples side by side. pictures: what their paths begin with."""
    for name in ("FLOPs", "seconds"):
        series, rings = {}, ([], [])
        for arm, seeds in e.trained.items():
            runs = list(seeds.values())
            steps = [step for step in runs[0].val_losses if all(step in run.val_losses for run in runs)]
            losses = [statistics.mean(run.val_losses[step] for run in runs) for step in steps]
            seconds = [statistics.mean(run.seconds(step) for run in runs) for step in steps]
            xs = [e.flops(arm, step) for step in steps] if name == "FLOPs" else seconds
            series[arm] = (xs, losses)
            for step in {level.stop for level in e.levels(arm)[:-1]} & set(steps):
                rings[0].append(xs[steps.index(step)])
                rings[1].append(losses[steps.index(step)])
        most = max(losses[-1] for _, losses in series.values()) + 0.5
        rings = (rings[0], [min(loss, 0.99 * most) for loss in rings[1]])
        draw.curves(
            f"{pictures}loss_{name.lower()}.png",
            series,
            x_label=f"{name} of training",
            y_label="validation loss (nats a code)",
            title="On single codes, mean of the seeds; rings, at their places or above, are ends of levels",
            rings=rings,
            y_most=most,
        )
    points = {arm: ([e.flops(arm)] * len(runs), e.figure(arm, "fid")) for arm, runs in e.trained.items()}
    draw.curves(
        f"{pictures}fid_flops.png", points, x_label="FLOPs of training", y_label=FIGURES["fid"],
        title=f"Quality at guidance {e.scale:g}: a point a seed",
    )  # fmt: skip
    drawn = []
    for runs in e.trained.values():
        folder = runs[min(runs)].folder / "samples"
        path = next(path for path in folder.glob("*.npz") if f"cfg-{e.scale}-" in path.name)
        drawn.append(next(iter(Samples(path).batches(SHOWN)))[:SHOWN])
    draw.save_image(f"{pictures}samples.png", draw.image_grid(np.concatenate(drawn), SHOWN, list(e.trained), scale=2))


def report(e: Experiment, pictures: str = "") -> str:
    """The text. pictures: what links to them begin with."""
    machine, args = card(best_device()), e.one.args
    reconstructed = records.read_json(e.folder / "reconstructions.metrics.json")
    seeds = set.union(*(set(found) for found in e.trained.values()))
    epochs = e.levels(CONTROL)[-1].stop / e.steps_per_epoch
    lines = [
        "# Next patches against next tokens", "",
        "The paper compares Next Patch Prediction, whose learning rate decays, with LlamaGen, whose learning rate is constant. "
        "Here next-token training has the same decay, too. One tokenizer, one GPT, the same images in the same order; "
        f"{counted(len(seeds), 'seed')}. `bash scripts/experiments/npp_vs_ntp.sh` repeats it.", "",
        f"{time.strftime('%Y-%m-%d')}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{args['precision']}. Fashion-MNIST at {args['image_size']} px: {len(e.codes):,} images of {e.codes.tokens} codes "
        f"out of {e.config.vocab_size}. {args['gpt_model']}, {epochs:g} epochs of {e.steps_per_epoch} steps of "
        f"{args['global_batch_size']} images, rate {args['lr']:g}. FID, Inception Score, precision and "
        "recall are in the features of a classifier of these images: "
        f"{reconstructed['samples']['images']:,} samples against {reconstructed['reference']['images']:,} test images. The "
        f"tokenizer's reconstructions of test images have FID {reconstructed['metrics']['fid']:.2f}. ± is the standard "
        "deviation over seeds.", "",
        "## Arms", "", *(f"- **{arm}**: {ARMS[arm]}" for arm in e.trained), "",
        f"## Figures, at guidance {e.scale:g}", "",
        "The scale is the one of the sweep below whose mean FID over all arms is least. Seconds are of the training steps "
        "alone.", "",
        *arms_table(e), "",
        "## What holds", "",
    ]  # fmt: skip
    if "npp2" in e.trained:
        seconds = statistics.mean(e.seconds("npp2")) / statistics.mean(e.seconds(CONTROL))
        lines += [
            f"npp2 has {relative_cost(e.levels('npp2')):.3f} of the positions of the control and "
            f"{e.flops('npp2') / e.flops(CONTROL):.3f} of its FLOPs, and took {seconds:.3f} of its time.", "",
        ]  # fmt: skip
    lines += [
        "Differences are taken seed by seed, ± their standard deviation. One is more than chance if 0 is outside of its 95 % "
        "confidence interval, by Student's t: of twenty comparisons of what is equal one would be.", "",
        *sentences(e), "",
        f"![Validation loss over FLOPs]({pictures}loss_flops.png)", "",
        f"![Validation loss over seconds]({pictures}loss_seconds.png)", "",
        f"![FID over FLOPs]({pictures}fid_flops.png)", "",
        f"The same classes and random numbers in each arm (seed {min(e.trained[CONTROL])}):", "",
        f"![Samples of each arm]({pictures}samples.png)", "",
        "## FID over the guidance scale", "", *sweep_table(e), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) not in (2, 4):
        cli.fail(
            f"expected the folder of an experiment (and a page and a prefix of pictures), got {sys.argv[1:] or 'nothing'}"
        )
    run = Path(sys.argv[1])
    page, pictures = (Path(sys.argv[2]), sys.argv[3]) if len(sys.argv) == 4 else (run / "report.md", f"{run}/")
    experiment = Experiment.read(run)
    draw_all(experiment, pictures)
    link = os.path.relpath(f"{pictures}_", page.parent).removesuffix("_")
    text = report(experiment, link)
    with atomic_path(page) as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
