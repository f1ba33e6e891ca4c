"""RUN/report.md and RUN/report.html, from what the stages left in their folders."""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from autoregressive.train.schedule import free_levels, patch_levels, relative_cost
from dataset.images import evenly_spaced
from scripts.benchmark.harness import card
from scripts.pipeline.images import Images
from scripts.pipeline.nearest import nearest, pick
from scripts.pipeline.pages import Page
from scripts.pipeline.plan import TITLES, Plan
from scripts.pipeline.stages import newest_checkpoint, newest_gpt, sample_files, stages, tokenizer_file
from utils import draw
from utils.cli import InputError, counted
from utils.distributed import best_device
from utils.files import atomic_path
from utils.log import duration, read_metrics
from utils.records import read_json
from utils.samples import Samples

SHOWN_CLASSES = 10  # pictures of classes
A_CLASS = 8  # images of each
COMPARED = 500  # samples whose nearest training image is looked for


def write(run: Path, plan: Plan, images: Images, took: Mapping[str, float]) -> None:
    """Write both forms, and print the Markdown. took: seconds of each stage. Raises InputError where files are missing."""
    gpt, samples = newest_gpt(run, plan), sample_files(run)
    if gpt is None or not samples:
        raise InputError(f"{run} holds no training or no samples: delete {run / 'done'} and run the same command again")
    page = Page(f"{plan.name}: {plan.gpt_model}, {plan.image_size} px", run)
    _summary(page, run, plan, gpt)
    _figures(page, run, plan, samples[-1])
    _classes(page, run, plan, samples[-1])
    _losses(page, run, plan, gpt)
    _left_out(page, run, images)
    _times(page, plan, took)
    _next(page, run, plan, images)
    for path, content in ((run / "report.md", page.as_markdown()), (run / "report.html", page.as_html())):
        with atomic_path(path) as temporary:
            temporary.write_text(content)
    print(page.as_markdown())
    print(f"wrote {run / 'report.html'} and report.md")


def _summary(page: Page, run: Path, plan: Plan, gpt: Path) -> None:
    machine = card(best_device())
    changed = read_json(gpt / "run.json")["args"].get("start_changed")
    start = f" It began as {plan.init}{f': {changed}' if changed else ''}." if plan.init else ""
    page.text(
        f"{machine['date']}, {machine['device']}, {counted(machine['threads'], 'thread')}, torch "
        f"{machine['torch']}, Python {machine['python']}. {plan.train_images:,} images to train on, {plan.test_images:,} "
        f"held out, in {counted(len(plan.classes), 'class')}. {counted(plan.epochs, 'epoch')}.{start}"
    )
    page.picture(run / "samples.png", "Samples, a row a class")


def _figures(page: Page, run: Path, plan: Plan, samples: Path) -> None:
    """Samples beside what can be attained: reconstructions and real test images."""
    page.heading("Figures")
    if plan.network == "none":
        for note in plan.notes:
            page.text(note)
    else:
        _metrics(page, run, samples)
    psnr = read_json(run / "reconstructions.json")["psnr"]
    side = int(plan.tokens**0.5)
    page.text(f"Tokenizer: {plan.vq_model}, {side}x{side} codes an image, PSNR {psnr:.1f} on test images.")
    pictures = run / "tokenizer" / "reconstructions.png"
    if plan.tokenizer == "train" and pictures.is_file():
        page.picture(pictures, "Training images, and what the tokenizer makes of them")


def _metrics(page: Page, run: Path, samples: Path) -> None:
    """The evaluator's figures."""
    measured = {
        "samples": samples,
        "tokenizer's reconstructions of test images": run / "reconstructions.npz",
        "test images": run / "test.npz",
    }
    found = {name: read_json(path.with_suffix(".metrics.json")) for name, path in measured.items()}
    network, reference = found["samples"]["network"]["name"], found["samples"]["reference"]["images"]
    figures = [f"FID ({network})", "Inception Score", "precision", "recall", "share in the class asked for"]
    rows = []
    for name, content in found.items():
        m = content["metrics"]
        rows.append([
            name, f"{content['samples']['images']:,}", f"{m['fid']:.2f}", f"{m['inception_score']:.2f}",
            f"{m['precision']:.3f}", f"{m['recall']:.3f}", f"{m['class_accuracy']:.1%}" if "class_accuracy" in m else "",
        ])  # fmt: skip
    page.table(["images", "number", *figures], rows)
    remarks = f"Against {reference:,} training images. "
    if network != "Inception":
        remarks += f"These distances are in the features of {network}: they say nothing beside Inception's. "
        accuracy = found["test images"]["metrics"].get("class_accuracy")
        remarks += f"It is right about {accuracy:.1%} of the test images. " if accuracy is not None else ""
    fid, attainable, _ = (content["metrics"]["fid"] for content in found.values())
    page.text(
        f"{remarks}FID of the samples over that of the reconstructions, which no sampler of these codes can be expected to "
        f"beat: {fid / attainable:.1f}."
    )
    if warnings := list(dict.fromkeys(text for content in found.values() for text in content["warnings"])):
        page.text(f"What to mind: {'; '.join(warnings)}.".replace(f"{run}/", ""))


def _classes(page: Page, run: Path, plan: Plan, samples: Path) -> None:
    """A picture a class: real images, samples, and the training image nearest to each sample."""
    drawn, real, test = Samples(samples), Samples(run / "reference.npz"), Samples(run / "test.npz")
    mirrored = not plan.settings["no_flip"]
    near, held = (nearest(pick(file, evenly_spaced(len(file), COMPARED)), real, mirrored)[1] for file in (drawn, test))
    among = "all" if len(real) == plan.train_images else f"{len(real):,} of {plan.train_images:,}"
    page.heading("Does it repeat what it saw?")
    page.text(
        f"Of each sample the nearest among {among} training images{' and their mirror images' if mirrored else ''} was "
        f"looked for, by the root mean square difference of pixels (0 to 255, at most 32 px a side). In the median it is "
        f"{np.median(near):.1f} for samples and {np.median(held):.1f} for real images that were held out. "
        f"{np.mean(near < np.quantile(held, 0.05)):.1%} of the samples are nearer to a training image than the nearest 5 % of "
        "the held-out ones: much more than 5 % would be memorising. In each picture: real images, samples, and below each "
        "sample the training image nearest to it."
    )
    for label in evenly_spaced(len(plan.classes), SHOWN_CLASSES):
        chosen = pick(drawn, np.flatnonzero(drawn.labels == label)[:A_CLASS])
        if not len(chosen):
            continue
        originals = pick(real, np.flatnonzero(real.labels == label)[:A_CLASS])
        copies = pick(real, nearest(chosen, real, mirrored)[0])
        rows = np.full((3, A_CLASS, *drawn.shape[1:]), 255, np.uint8)  # white where there are fewer images
        for row, part in zip(rows, (originals, chosen, copies), strict=True):
            row[: len(part)] = part
        grid = draw.image_grid(
            rows.reshape(-1, *drawn.shape[1:]), A_CLASS, ("real", "samples", "nearest training images"), plan.scale
        )
        path = run / "report" / f"class-{label:04d}.png"
        draw.save_image(path, grid)
        page.picture(path, plan.classes[label])


def _losses(page: Page, run: Path, plan: Plan, gpt: Path) -> None:
    """A row a level: its epochs and losses."""
    args, metrics = read_json(gpt / "run.json")["args"], read_metrics(gpt)
    unit = "steps" if args.get("patch_steps") else "epochs"
    if args.get("patch_sizes"):
        levels = free_levels(args["patch_sizes"], args.get("patch_epochs") or args["patch_steps"])
    else:
        levels = patch_levels(args["epochs"], args["patch_level"], args["epoch_rate"])

    def losses(key: str, patch: int) -> list[str]:
        return [f"{row[key]:.3f}" for row in metrics if row.get("patch") == patch and key in row] or [""]

    rows = []
    for patch, start, stop in levels:
        on_patches, single, average = (losses(key, patch) for key in ("loss", "val_loss", "val_loss_ema"))
        rows.append([
            f"{patch}x{patch}", f"{start:g} to {stop:g}", str(plan.tokens // patch**2),
            f"{on_patches[0]} to {on_patches[-1]}", f"{single[-1]} ({average[-1]})",
        ])  # fmt: skip
    page.heading("Schedule and losses")
    page.text(f"{plan.gpt_model}, batches of {args['global_batch_size']}, {plan.train_images:,} images.")
    head = ["patches", unit, "positions an image", "loss on patches, first to last", "validation, single codes (EMA)"]
    page.table(head, rows)
    text = f"Losses are in nats a code. The plan costs {relative_cost(levels):.3f} of next-token training for as many {unit}."
    validated = [(row["val_loss"], row["step"]) for row in metrics if "val_loss" in row]
    if validated and validated[-1][0] > 1.02 * min(validated)[0]:
        text += f" The validation loss was lowest at step {min(validated)[1]}: fewer epochs, or more images, would do better."
    page.text(text)
    shutil.copyfile(gpt / "loss.png", run / "loss.png")
    page.picture(run / "loss.png", "Loss over the epochs")


def _left_out(page: Page, run: Path, images: Images) -> None:
    """What was left out, and what could not be read."""
    rows = [[reason, str(len(names)), repr(names[0])[1:-1]] for reason, names in images.left_out.items()]
    for name in ("train", "test"):
        for path in sorted((run / "codes" / name).glob("*.json")):
            if skipped := read_json(path).get("skipped"):
                why = f"{name}: cannot be read ({skipped[0]['reason']}, ...)"
                rows.append([why, str(len(skipped)), skipped[0]["path"]])
    if rows:
        page.heading("Left out")
        page.table(["why", "number", "one of them"], rows)
        page.text("`left_out.txt` has all that are no images; `codes/*/*.json` those that cannot be read.")


def _times(page: Page, plan: Plan, took: Mapping[str, float]) -> None:
    rows = [(TITLES[stage], plan.seconds[stage], seconds) for stage, seconds in took.items()]
    rows.append(("all, after installation", sum(plan.seconds[stage] for stage in took), sum(took.values())))
    page.heading("Time")
    page.table(["stage", "planned", "took"], [[title, *map(duration, times)] for title, *times in rows])


def _next(page: Page, run: Path, plan: Plan, images: Images) -> None:
    """Commands that use what was made."""
    checkpoint = newest_checkpoint(run, plan)
    gpt_flags = {flag: values for flag, values in plan.flags["gpt"].items() if flag != "--init-classes"}
    further = plan.model_copy(update={"init": checkpoint, "flags": {**plan.flags, "gpt": gpt_flags}})
    train = next(stage for stage in stages(further, run, images.train, images.test) if stage.name == "train")
    models = ["--vq-ckpt", tokenizer_file(run, plan), "--gpt-ckpt", checkpoint]
    more = [
        "--labels", "0", "--cfg-scale", f"{plan.settings['cfg_scale']:g}", "--num-fid-samples", "64", "--save-png",
        "--sample-dir", f"{run}/more",
    ]  # fmt: skip
    commands = {
        "Train these weights further, with a new schedule:": [*train.command, "--fresh"],
        "Draw more of a class:": ["bash", "scripts/autoregressive/sample_c2i.sh", *models, *more],
        "Draw in a browser (this needs gradio: pip install gradio):": ["bash", "scripts/demo.sh", *models],
        "Export, as safetensors and for the Hugging Face Hub:":
            ["python", "-m", "pretrained_models.export", checkpoint, f"{run}/export"],
    }  # fmt: skip
    page.heading("What to do next")
    for about, words in commands.items():
        page.code(about, shlex.join(words))
