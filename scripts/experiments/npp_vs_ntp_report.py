"""The report of scripts/experiments/npp_vs_ntp.sh: RUN/report.md and its pictures, from what its stages left in RUN.

python -m scripts.experiments.npp_vs_ntp_report runs/npp_vs_ntp
python -m scripts.experiments.npp_vs_ntp_report runs/npp_vs_ntp docs/npp_vs_ntp.md assets/npp_vs_ntp_  # elsewhere
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from autoregressive.models.gpt import preset
from autoregressive.train.schedule import free_levels, in_steps, relative_cost
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


class Trained:
    """One arm's training with one seed, measured.

    losses, speeds: on validation images, and images a second, by step. figures: by guidance scale.
    """

    def __init__(self, folder: Path) -> None:
        run, self.samples = folder / "000-GPT-XXS", folder / "samples"
        self.args = records.read_json(run / "run.json")["args"]
        rows = read_metrics(run)
        self.losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
        self.speeds = {row["step"]: row["images_per_s"] for row in rows if "images_per_s" in row}
        self.figures: dict[float, dict[str, float]] = {}
        for path in self.samples.glob("*.metrics.json"):
            scale = records.read_json(path.with_name(path.name.replace(".metrics.json", ".json")))["cfg_scale"]
            self.figures[float(scale)] = records.read_json(path)["metrics"]

    @property
    def last_loss(self) -> float:
        return self.losses[max(self.losses)]

    def seconds(self, step: float = math.inf) -> float:
        """Seconds of the first steps, by the logged speeds: without start, validation and checkpoints."""
        total, before = 0.0, 0
        for after, speed in self.speeds.items():
            if after <= step:
                total += (after - before) * self.args["global_batch_size"] / speed
                before = after
        return total


class Experiment:
    """The arms whose evaluation is done. Raises InputError if the control is not among them, or settings differ.

    trained: by arm, then by seed. levels: of each arm, in steps. scale: that of the guidance scales of all whose mean FID
    over arms and seeds is least.
    """

    def __init__(self, folder: Path) -> None:
        found: dict[str, dict[int, Trained]] = {arm: {} for arm in ARMS}
        for mark in sorted((folder / "done").glob("*-evaluate")):
            arm, _, seed = mark.name.removesuffix("-evaluate").rpartition("-")
            if arm in ARMS:
                found[arm][int(seed)] = Trained(folder / "arms" / f"{arm}-{seed}")
        if not found[CONTROL]:
            raise cli.InputError(
                f"{folder} holds no measured arm {CONTROL}: run scripts/experiments/npp_vs_ntp.sh with this RUN first"
            )
        self.folder, self.trained = folder, {arm: seeds for arm, seeds in found.items() if seeds}
        runs = [run for seeds in self.trained.values() for run in seeds.values()]
        self.args = args = next(iter(found[CONTROL].values())).args
        for run in runs:
            if changed := differences(args, run.args, OWN):
                raise cli.InputError(
                    f"{run.samples.parent} differs from the control by {', '.join(changed[:4])}: give another RUN"
                )
        self.codes = Codes(folder / "codes" / "train", args["dataset"], args["image_size"])
        self.steps_per_epoch = len(self.codes) // args["global_batch_size"]
        m = self.codes.manifest
        self.config = preset(args["gpt_model"], vocab_size=m.codebook_size, num_classes=10, block_size=m.tokens)
        self.levels = {}
        for arm, seeds in self.trained.items():
            own = next(iter(seeds.values())).args
            self.levels[arm] = in_steps(free_levels(own["patch_sizes"], own["patch_epochs"]), self.steps_per_epoch)
        self.scales = sorted(set.intersection(*(set(run.figures) for run in runs)))
        self.scale = min(self.scales, key=lambda scale: statistics.mean(run.figures[scale]["fid"] for run in runs))

    def of(self, arm: str, figure: Callable[[Trained], float]) -> list[float]:
        """A figure of each seed."""
        return [figure(run) for run in self.trained[arm].values()]

    def flops(self, arm: str, step: float = math.inf) -> float:
        """FLOPs of the first steps."""
        done = [(level.patch, max(0, min(step, level.stop) - level.start)) for level in self.levels[arm]]
        return sum(steps * self.args["global_batch_size"] * self.config.training_flops(patch) for patch, steps in done)

    def share_of_time(self, arm: str) -> float:
        """Of the control's."""
        return statistics.mean(self.of(arm, Trained.seconds)) / statistics.mean(self.of(CONTROL, Trained.seconds))


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def verdict(changes: Sequence[float], unit: str) -> str:
    """What a difference says: whether its 95 % confidence interval, by Student's t over seeds, leaves out 0."""
    if len(changes) < 2:
        return f"{changes[0]:+.3f}{unit}, of one seed, which says nothing about chance"
    mean, deviation, n = statistics.mean(changes), statistics.stdev(changes), len(changes)
    said = "more than chance" if abs(mean) > stats.t.ppf(0.975, n - 1) * deviation / n**0.5 else "may be chance"
    return f"{mean:+.3f} ± {deviation:.3f}{unit} ({said})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:]]


def arms_table(e: Experiment) -> list[str]:
    head = ["arm", "seeds", "levels", "FLOPs", "of the control", "seconds", "of the control", "validation loss"]
    rows = []
    for arm, levels in e.levels.items():
        spans = ", ".join(f"{s.patch}x{s.patch} {(s.stop - s.start) / e.steps_per_epoch:.3g}" for s in levels)
        figures = [e.of(arm, lambda run, at=name: run.figures[e.scale].get(at, math.nan)) for name in FIGURES]
        rows.append([
            arm, str(len(e.trained[arm])), spans, f"{e.flops(arm):.3g}", f"{e.flops(arm) / e.flops(CONTROL):.3f}",
            spread(e.of(arm, Trained.seconds), ".1f"), f"{e.share_of_time(arm):.3f}",
            spread(e.of(arm, lambda run: run.last_loss), ".4f"), *map(spread, figures),
        ])  # fmt: skip
    return table([*head, *FIGURES.values()], rows)


def sweep_table(e: Experiment) -> list[str]:
    rows = []
    for arm in e.trained:
        fids = [e.of(arm, lambda run, at=scale: run.figures[at]["fid"]) for scale in e.scales]
        rows.append([arm, *map(spread, fids)])
    return table(["arm", *(f"{scale:g}" for scale in e.scales)], rows)


def sentences(e: Experiment) -> list[str]:
    """What holds and what does not: the differences between arms, seed by seed."""
    measures = (
        ("validation loss", lambda run: run.last_loss, " nats a code"),
        ("FID", lambda run: run.figures[e.scale]["fid"], ""),
    )
    lines = []
    for arm, mine in e.trained.items():
        for other, name in OTHERS.items():
            theirs = e.trained.get(other, {})
            seeds = sorted(mine.keys() & theirs.keys())
            if arm == other or not seeds or (other != CONTROL and not arm.startswith("npp")):
                continue
            parts = [
                f"{what} {verdict([figure(mine[seed]) - figure(theirs[seed]) for seed in seeds], unit)}"
                for what, figure, unit in measures
            ]
            lines.append(f"- **{arm}** beside {name}: {'; '.join(parts)}.")
    return lines


def draw_losses(e: Experiment, name: str, path: str) -> None:
    """Validation losses over FLOPs or over seconds."""
    series, rings = {}, []
    for arm, seeds in e.trained.items():
        runs = list(seeds.values())
        steps = [step for step in runs[0].losses if all(step in run.losses for run in runs)]
        losses = [statistics.mean(run.losses[step] for run in runs) for step in steps]
        if name == "FLOPs":
            xs = [e.flops(arm, step) for step in steps]
        else:
            xs = [statistics.mean(run.seconds(step) for run in runs) for step in steps]
        series[arm] = xs, losses
        ends = {level.stop for level in e.levels[arm][:-1]}
        rings += [(x, loss) for step, x, loss in zip(steps, xs, losses, strict=True) if step in ends]
    most = max(losses[-1] for _, losses in series.values()) + 0.5
    draw.curves(
        path, series, x_label=f"{name} of training", y_label="validation loss (nats a code)",
        title="On single codes, mean of the seeds; rings, at their places or above, are ends of levels",
        rings=([x for x, _ in rings], [min(loss, 0.99 * most) for _, loss in rings]), y_most=most,
    )  # fmt: skip


def draw_all(e: Experiment, pictures: str) -> None:
    """Losses over FLOPs and over seconds, FID over FLOPs, samples side by side. pictures: what their paths begin with."""
    for name in ("FLOPs", "seconds"):
        draw_losses(e, name, f"{pictures}loss_{name.lower()}.png")
    fids = {arm: e.of(arm, lambda run: run.figures[e.scale]["fid"]) for arm in e.trained}
    points = {arm: ([e.flops(arm)] * len(ys), ys) for arm, ys in fids.items()}
    draw.curves(
        f"{pictures}fid_flops.png", points, x_label="FLOPs of training", y_label=FIGURES["fid"],
        title=f"Quality at guidance {e.scale:g}: a point a seed",
    )  # fmt: skip
    drawn = []
    for runs in e.trained.values():
        path = next(runs[min(runs)].samples.glob(f"*cfg-{e.scale}-*.npz"))
        drawn.append(next(iter(Samples(path).batches(SHOWN)))[:SHOWN])
    draw.save_image(f"{pictures}samples.png", draw.image_grid(np.concatenate(drawn), SHOWN, list(e.trained), scale=2))


def report(e: Experiment, pictures: str = "") -> str:
    """The text. pictures: what links to them begin with."""
    machine, args = card(best_device()), e.args
    reconstructed = records.read_json(e.folder / "reconstructions.metrics.json")
    seeds = set.union(*(set(found) for found in e.trained.values()))
    epochs = e.levels[CONTROL][-1].stop / e.steps_per_epoch
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
        lines += [
            f"npp2 has {relative_cost(e.levels['npp2']):.3f} of the positions of the control and "
            f"{e.flops('npp2') / e.flops(CONTROL):.3f} of its FLOPs, and took {e.share_of_time('npp2'):.3f} of its time.", "",
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
    experiment = Experiment(run)
    draw_all(experiment, pictures)
    text = report(experiment, os.path.relpath(f"{pictures}_", page.parent).removesuffix("_"))
    with atomic_path(page) as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
