"""RUN/report.md and RUN/report.html, from what the stages left in their folders."""

import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoregressive.train.schedule import Level, free_levels, patch_levels, relative_cost
from scripts.benchmark.harness import card
from scripts.pipeline.images import Images
from scripts.pipeline.nearest import nearest, pick
from scripts.pipeline.pages import Block, Code, Heading, Picture, Table, Text, as_html, as_markdown
from scripts.pipeline.plan import Plan, clock
from scripts.pipeline.runner import Runner
from scripts.pipeline.stages import TITLES, newest_checkpoint, newest_gpt, sample_files, stages, tokenizer_file
from utils import draw, records
from utils.cli import InputError, counted
from utils.distributed import best_device
from utils.files import atomic_path
from utils.log import read_metrics
from utils.samples import Samples

SHOWN_CLASSES = 10  # pictures of classes
A_CLASS = 8  # images of each
COMPARED = 500  # samples whose nearest training image is looked for


def write(run: Path, plan: Plan, images: Images, runner: Runner) -> None:
    """Write both forms, and print the Markdown. Raises InputError where a stage's files are missing."""
    gpt = newest_gpt(run, plan)
    if gpt is None:
        raise InputError(f"there is no training in {run / 'gpt'}: run the same command again")
    shutil.copyfile(gpt / "loss.png", run / "loss.png")
    machine = card(best_device())
    title = f"{plan.name}: {plan.gpt_model}, {plan.image_size} px"
    changed = records.read_json(gpt / "run.json")["args"].get("start_changed")
    start = f" It began as {plan.init}{f': {changed}' if changed else ''}." if plan.init else ""
    blocks: list[Block] = [
        Text(
            f"{time.strftime('%Y-%m-%d')}, {machine['device']}, {counted(machine['threads'], 'thread')}, torch "
            f"{machine['torch']}, Python {machine['python']}. {plan.train_images:,} images to train on, {plan.test_images:,} "
            f"held out, in {counted(len(plan.classes), 'class')}. {counted(plan.epochs, 'epoch')}.{start}"
        ),
        Picture(run / "samples.png", "Samples, a row a class"),
        *_figures(run, plan),
        *_classes(run, plan),
        *_losses(gpt, plan, run),
        *_images(run, images),
        Heading("Time"), _times(plan, runner),
        *_next(run, plan, images, gpt),
    ]  # fmt: skip
    text = as_markdown(title, blocks, run)
    for path, content in ((run / "report.md", text), (run / "report.html", as_html(title, blocks))):
        with atomic_path(path) as temporary:
            temporary.write_text(content)
    print(text)
    print(f"wrote {run / 'report.html'} and report.md")


def _figures(run: Path, plan: Plan) -> list[Block]:
    """Samples beside what can be attained: reconstructions and real test images."""
    reconstructed = records.read_json(run / "reconstructions.json")
    side = int(plan.tokens**0.5)
    tokenizer = (
        f"Tokenizer: {plan.vq_model}, {side}x{side} codes an image, PSNR {reconstructed['psnr']:.1f} on test images."
    )
    pictures = run / "tokenizer" / "reconstructions.png"
    decoded: list[Block] = [Text(tokenizer)]
    if plan.tokenizer == "train" and pictures.is_file():
        decoded.append(Picture(pictures, "Training images, and what the tokenizer makes of them"))
    samples = sample_files(run)
    if plan.network == "none" or not samples:
        return [Heading("Figures"), *map(Text, plan.notes), *decoded]
    rows = {
        "samples": Path(samples[-1]).with_suffix(".metrics.json"),
        "tokenizer's reconstructions of test images": run / "reconstructions.metrics.json",
        "test images": run / "test.metrics.json",
    }
    found = {name: records.read_json(path) for name, path in rows.items()}
    network, reference = found["samples"]["network"]["name"], found["samples"]["reference"]["images"]
    head = [
        "images",
        "number",
        f"FID ({network})",
        "Inception Score",
        "precision",
        "recall",
        "share in the class asked for",
    ]
    table = []
    for name, content in found.items():
        m, n = content["metrics"], content["samples"]["images"]
        right = f"{m['class_accuracy']:.1%}" if "class_accuracy" in m else ""
        table.append([
            name, f"{n:,}", f"{m['fid']:.2f}", f"{m['inception_score']:.2f}", f"{m['precision']:.3f}", f"{m['recall']:.3f}",
            right,
        ])  # fmt: skip
    fid = [content["metrics"]["fid"] for content in found.values()]
    remarks = f"Against {reference:,} training images. "
    if network != "Inception":
        remarks += f"These distances are in the features of {network}: they say nothing beside Inception's. "
        accuracy = found["test images"]["metrics"].get("class_accuracy")
        remarks += f"It is right about {accuracy:.1%} of the test images. " if accuracy is not None else ""
    remarks += (
        "FID of the samples over that of the reconstructions, which no sampler of these codes can be expected to beat: "
        f"{fid[0] / fid[1]:.1f}."
    )
    warnings = list(dict.fromkeys(text for content in found.values() for text in content["warnings"]))
    said = [Text("What to mind: " + "; ".join(_short(text, run) for text in warnings) + ".")] if warnings else []
    return [Heading("Figures"), Table(head, table), Text(remarks), *said, *decoded]


def _short(text: str, run: Path) -> str:
    return text.replace(f"{run}/", "")


def _classes(run: Path, plan: Plan) -> list[Block]:
    """A picture a class: real images, samples, and the training image nearest to each sample."""
    samples = sample_files(run)
    if not samples:
        return []
    drawn, real, test = Samples(samples[-1]), Samples(run / "reference.npz"), Samples(run / "test.npz")
    shown = np.unique(np.linspace(0, len(plan.classes) - 1, min(SHOWN_CLASSES, len(plan.classes))).astype(int))
    mirrored = not plan.settings["no_flip"]
    few = np.linspace(0, len(drawn) - 1, min(COMPARED, len(drawn))).astype(int)
    near = nearest(pick(drawn, few), real, mirrored).distance
    held = nearest(
        pick(test, np.linspace(0, len(test) - 1, min(COMPARED, len(test))).astype(int)), real, mirrored
    ).distance
    closest = float(np.quantile(held, 0.05))
    among = "all" if len(real) == plan.train_images else f"{len(real):,} of {plan.train_images:,}"
    blocks: list[Block] = [
        Heading("Does it repeat what it saw?"),
        Text(
            f"Of each sample the nearest among {among} training images{' and their mirror images' if mirrored else ''} was "
            f"looked for, by the root mean square difference of pixels (0 to 255, at most 32 px a side). In the median it is "
            f"{np.median(near):.1f} for samples and {np.median(held):.1f} for real images that were held out. "
            f"{np.mean(near < closest):.1%} of the samples are nearer to a training image than the nearest 5 % of the held-out "
            "ones: much more than 5 % would be memorising. In each picture: real images, samples, and below each sample the "
            "training image nearest to it."
        ),
    ]
    folder = run / "report"
    scale = max(1, 64 // plan.image_size)
    for label in shown.tolist():
        chosen = np.flatnonzero(drawn.labels == label)[:A_CLASS]
        originals = np.flatnonzero(real.labels == label)[:A_CLASS]
        if not len(chosen):
            continue
        rows = pick(drawn, chosen)
        copies = pick(real, nearest(rows, real, mirrored).index)
        strips = [_padded(part, A_CLASS) for part in (pick(real, originals), rows, copies)]
        grid = draw.image_grid(np.concatenate(strips), A_CLASS, ("real", "samples", "nearest training images"), scale)
        path = folder / f"class-{label:04d}.png"
        draw.save_image(path, grid)
        blocks.append(Picture(path, plan.classes[label]))
    return blocks


def _padded(images_NHWC: np.ndarray, n: int) -> np.ndarray:
    """n images, white ones behind those there are."""
    missing = n - len(images_NHWC)
    return np.concatenate((images_NHWC, np.full((missing, *images_NHWC.shape[1:]), 255, np.uint8)))


def _levels(args: dict[str, Any]) -> list[Level]:
    """The levels of a training, in epochs or steps."""
    if args.get("patch_sizes"):
        return free_levels(args["patch_sizes"], args.get("patch_epochs") or args["patch_steps"])
    return patch_levels(args["epochs"], args["patch_level"], args["epoch_rate"])


def _losses(gpt: Path, plan: Plan, run: Path) -> list[Block]:
    """A row a level: its epochs and losses."""
    args, rows = records.read_json(gpt / "run.json")["args"], read_metrics(gpt)
    unit = "steps" if args.get("patch_steps") else "epochs"
    head = ["patches", unit, "positions an image", "loss on patches, first to last", "validation, single codes (EMA)"]
    levels = _levels(args)

    def loss(key: str, patch: int, first: bool = False) -> str:
        values = [row[key] for row in rows if row.get("patch") == patch and key in row]
        return f"{values[0 if first else -1]:.3f}" if values else ""

    table = [
        [
            f"{s.patch}x{s.patch}", f"{s.start:g} to {s.stop:g}", str(plan.tokens // s.patch**2),
            f"{loss('loss', s.patch, first=True)} to {loss('loss', s.patch)}",
            f"{loss('val_loss', s.patch)} ({loss('val_loss_ema', s.patch)})",
        ]
        for s in levels
    ]  # fmt: skip
    best = [(row["val_loss"], row["step"]) for row in rows if "val_loss" in row]
    overfit = ""
    if best and best[-1][0] > 1.02 * min(best)[0]:
        overfit = (
            f" The validation loss was lowest at step {min(best)[1]}: fewer epochs, or more images, would do better."
        )
    return [
        Heading("Schedule and losses"),
        Text(f"{plan.gpt_model}, batches of {args['global_batch_size']}, {plan.train_images:,} images."),
        Table(head, table),
        Text(
            f"Losses are in nats a code. The plan costs {relative_cost(levels):.3f} of next-token training for as many "
            f"{unit}.{overfit}"
        ),
        Picture(run / "loss.png", "Loss over the epochs"),
    ]  # fmt: skip


def _images(run: Path, images: Images) -> list[Block]:
    """What was left out, and what could not be read."""
    rows = [[reason, str(len(names)), repr(names[0])[1:-1]] for reason, names in images.left_out.items()]
    for name in ("train", "test"):
        for path in sorted((run / "codes" / name).glob("*.json")):
            skipped = records.read_json(path).get("skipped") or []
            if skipped:
                rows.append(
                    [f"{name}: cannot be read ({skipped[0]['reason']}, ...)", str(len(skipped)), skipped[0]["path"]]
                )
    if not rows:
        return []
    return [
        Heading("Left out"),
        Table(["why", "number", "one of them"], rows),
        Text("`left_out.txt` has all that are no images; `codes/*/*.json` those that cannot be read."),
    ]


def _times(plan: Plan, runner: Runner) -> Table:
    took = {stage: mark.seconds for stage in plan.seconds if (mark := runner.mark(stage))}
    rows = [[TITLES[stage], clock(plan.seconds[stage]), clock(seconds)] for stage, seconds in took.items()]
    planned = sum(plan.seconds[stage] for stage in took)
    return Table(
        ["stage", "planned", "took"], [*rows, ["all, after installation", clock(planned), clock(sum(took.values()))]]
    )


def _next(run: Path, plan: Plan, images: Images, gpt: Path) -> list[Block]:
    """Commands that use what was made."""
    checkpoint, vq = newest_checkpoint(run, plan), tokenizer_file(run, plan)
    train = next(s for s in stages(plan, run, images.train, images.test) if s.name == "train").command()
    models = ["--vq-ckpt", vq, "--gpt-ckpt", checkpoint]
    again = [*_without(train, "--gpt-ckpt", "--init-classes"), "--gpt-ckpt", checkpoint, "--fresh"]
    more = [
        "--labels",
        "0",
        "--cfg-scale",
        f"{plan.settings['cfg_scale']:g}",
        "--num-fid-samples",
        "64",
        "--save-png",
        "--sample-dir",
        str(run / "more"),
    ]
    export = ["python", "-m", "pretrained_models.export", checkpoint, str(run / "export")]
    commands: list[tuple[str, Sequence[str]]] = [
        ("Train these weights further, with a new schedule:", again),
        ("Draw more of a class:", ["bash", "scripts/autoregressive/sample_c2i.sh", *models, *more]),
        ("Draw in a browser (this needs gradio: pip install gradio):", ["bash", "scripts/demo.sh", *models]),
        ("Export, as safetensors and for the Hugging Face Hub:", export),
    ]
    return [Heading("What to do next"), *(Code(about, shlex.join(words)) for about, words in commands)]


def _without(command: Sequence[str], *flags: str) -> list[str]:
    """A command without some flags and their values."""
    kept, leave_out = [], False
    for word in command:
        leave_out = word in flags if word.startswith("--") else leave_out
        kept += [] if leave_out else [word]
    return kept
