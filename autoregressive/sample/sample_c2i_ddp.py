"""Draw many images into one .npz for the evaluator, on any number of processes.

    bash scripts/autoregressive/sample_c2i.sh --vq-ckpt vq_ds16_c2i.pt --gpt-ckpt c2i_B_256.pt --gpt-model GPT-B \
        --image-size 256 --image-size-eval 256 --cfg-scale 2.0

Several --cfg-scale values give a file each. Image i of a seed is the same whatever the batch size and the number of
processes. Batches are kept beside the .npz until it is written, so the same command continues a run that was cut off, with
any batch size and number of processes.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from autoregressive.sample.pipeline import POWER, Pipeline, add_flags, checkpoint_name, use_published
from utils import cli, samples, streams
from utils.distributed import World, best_device, precision_dtype, world
from utils.draw import save_image
from utils.files import atomic_path, sha256, write_json
from utils.log import progress

PNG_BATCH = 64


def labels_flag(text: str) -> str | int:
    """argparse type: random, balanced, or a class."""
    return text if text in ("random", "balanced") else cli.count(text)


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add_flags(parser)
    add = parser.add_argument
    add(
        "--cfg-scale", type=cli.at_least_one, nargs="+",
        help="classifier-free guidance, 1 is off; several give a file each; default: as published for the weights, or 1.5",
    )  # fmt: skip
    add("--num-fid-samples", type=cli.positive_int, default=50000)
    add(
        "--labels", type=labels_flag, nargs="+", default=["random"],
        help="random: as published; balanced: class i mod n; or classes, taken in turn",
    )  # fmt: skip
    add("--per-proc-batch-size", type=cli.positive_int, default=32)
    add("--global-seed", type=cli.count, default=0)
    add("--sample-dir", type=Path, default=Path("samples"))
    add("--save-png", action="store_true", help="also write each image as a PNG, in a folder named like the .npz")
    args = parser.parse_args()
    use_published(args, "image_size", "image_size_eval", "cfg_scale")
    args.cfg_scale = args.cfg_scale if isinstance(args.cfg_scale, list) else [args.cfg_scale or 1.5]
    if len(args.labels) > 1 and not all(isinstance(label, int) for label in args.labels):
        raise cli.InputError(f"--labels {' '.join(map(str, args.labels))}: expected random, balanced, or only classes")
    return args


def file_name(args: Namespace, pipeline: Pipeline, cfg_scale: float) -> str:
    """The published name of a samples file; settings that the published sampler lacks are named where they are in use."""
    gpt, vq = pipeline.names["gpt_model"], pipeline.names["vq_model"]
    raw = "-raw" if args.weights == "model" else ""
    schedule = "" if args.cfg_schedule == "constant" else f"-{args.cfg_schedule}"
    schedule += f"-{args.cfg_power or POWER}" if args.cfg_schedule == "power-cosine" else ""
    interval = "" if args.cfg_interval == [-1] else "-interval-" + "-".join(map(str, args.cfg_interval))
    return (
        f"{gpt}-{checkpoint_name(args.gpt_ckpt)}{raw}-size-{pipeline.image_size}-size-{pipeline.output_size}-{vq}-"
        f"topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-"
        f"cfg-{cfg_scale}{schedule}{interval}-seed-{args.global_seed}.npz"
    )


def settings(args: Namespace, pipeline: Pipeline) -> dict:
    """What the images depend on beside the guidance scale, as plain data."""
    keys = ("cfg_schedule", "cfg_power", "cfg_interval", "temperature", "top_k", "top_p", "labels", "num_fid_samples")
    return {key: getattr(args, key) for key in keys} | {
        "precision": str(precision_dtype(args.precision, best_device())).removeprefix("torch."),
        "seed": args.global_seed,
        "image_size": pipeline.image_size,
        "image_size_eval": pipeline.output_size,
        "weights": pipeline.names["weights"],
        "gpt_sha256": sha256(args.gpt_ckpt),
        "vq_sha256": sha256(args.vq_ckpt),
    }


def all_labels(args: Namespace, pipeline: Pipeline) -> np.ndarray:
    """Labels (N,) int64, each a function of (seed, image). Raises InputError for a class that the GPT does not know."""
    indices, classes = np.arange(args.num_fid_samples), pipeline.gpt.config.num_classes
    if args.labels == ["random"]:
        return (streams.uniform(args.global_seed, streams.LABEL, indices) * classes).astype(np.int64)
    chosen = range(classes) if args.labels == ["balanced"] else args.labels
    pipeline.check_classes(chosen, "--labels")
    return np.asarray(chosen, np.int64)[indices % len(chosen)]


class Parts:
    """Images drawn so far, in files beside the .npz-to-be, each named after the images in it: first and stop."""

    def __init__(self, out: Path, settings: dict) -> None:
        self.folder, self.settings = out.with_suffix(".parts"), settings
        refuse_other_settings(self.folder / "settings.json", settings)

    def start(self) -> None:
        try:
            write_json(self.folder / "settings.json", self.settings)
        except OSError as error:
            raise cli.InputError(
                f"cannot write to {self.folder} ({error.strerror}): give another --sample-dir"
            ) from None

    def there(self) -> list[tuple[int, int, Path]]:
        """(first, stop, path) of each file, in order."""
        found = sorted((*map(int, path.stem.split("-")), path) for path in self.folder.glob("[0-9]*-[0-9]*.npy"))
        chain, at = [], 0
        for first, stop, path in found:
            if first >= at:  # files overlap if two runs drew at the same time
                chain.append((first, stop, path))
                at = stop
        return chain

    def missing(self, images: int, batch: int) -> list[range]:
        """The images that are not there, in ranges of at most `batch`."""
        gaps, at = [], 0
        for first, stop, _ in [*self.there(), (images, images, None)]:
            gaps += [range(start, min(first, start + batch)) for start in range(at, first, batch)]
            at = stop
        return gaps

    def write(self, part: range, images: np.ndarray) -> None:
        with atomic_path(self.folder / f"{part.start:08d}-{part.stop:08d}.npy") as temporary:
            np.save(temporary, images)

    def read(self) -> Iterator[np.ndarray]:
        for _, _, path in self.there():
            yield np.load(path)


def refuse_other_settings(path: Path, wanted: dict) -> None:
    """InputError if `path` records other settings than these."""
    if path.is_file() and (found := json.loads(path.read_text())) != wanted:
        different = ", ".join(key for key in wanted if found.get(key) != wanted[key])
        raise cli.InputError(
            f"{path} belongs to samples of other settings ({different} differ): delete them or give another --sample-dir"
        )


def save_pngs(path: Path) -> None:
    """Write the images of a samples file as FOLDER/000000.png, those that are not there yet."""
    file, folder = samples.Samples(path), path.with_suffix("")
    start = 0
    with ThreadPoolExecutor() as pool, progress(total=len(file), desc="PNG", unit=" images") as bar:
        for images in file.batches(PNG_BATCH):
            paths = [folder / f"{i:06d}.png" for i in range(start, start + len(images))]
            new = [(p, Image.fromarray(image)) for p, image in zip(paths, images, strict=True) if not p.is_file()]
            list(pool.map(lambda item: save_image(*item), new))
            start += len(images)
            bar.update(len(images))


def draw(pipeline: Pipeline, parts: Parts, labels: np.ndarray, args: Namespace, cfg_scale: float, here: World) -> None:
    """Draw this process's share of the images that are not there yet."""
    missing = parts.missing(len(labels), args.per_proc_batch_size)
    here.barrier()  # every process has seen the same gaps before one is filled
    mine, total = missing[here.rank :: here.size], sum(map(len, missing))
    with pipeline.progress(total, here.size, desc=f"guidance {cfg_scale}", show=here.is_main) as count:
        for part in mine:
            parts.write(part, pipeline.images(labels[part], np.array(part), args.global_seed, cfg_scale, count))
    here.barrier()


def main() -> None:
    args = parse()
    pipeline = Pipeline.load(args)
    labels = all_labels(args, pipeline)
    shape = (len(labels), pipeline.output_size, pipeline.output_size, 3)
    outs = {scale: args.sample_dir / file_name(args, pipeline, scale) for scale in args.cfg_scale}
    wanted = {out: {"cfg_scale": scale, **settings(args, pipeline)} for scale, out in outs.items()}
    for out in outs.values():
        if out.is_file() and not out.with_suffix(".json").is_file():
            raise cli.InputError(f"{out} is there without its .json, so how it was drawn is unknown: move or delete it")
        refuse_other_settings(out.with_suffix(".json"), wanted[out])
    work = {scale: Parts(out, wanted[out]) for scale, out in outs.items() if not out.is_file()}
    with world() as here:
        if work:
            pipeline.to(here.device, min(args.per_proc_batch_size, len(labels)))
        for scale, parts in work.items():
            if here.is_main:
                parts.start()
            draw(pipeline, parts, labels, args, scale, here)
            if here.is_main:
                out = outs[scale]
                write_json(out.with_suffix(".json"), wanted[out])
                samples.write(out, parts.read(), shape, labels)
                print(f"wrote {out}: {len(labels)} images of {pipeline.output_size} px")
        if here.is_main:
            for scale, out in outs.items():
                if scale not in work:
                    print(f"{out} is complete already")
                shutil.rmtree(out.with_suffix(".parts"), ignore_errors=True)
                if args.save_png:
                    save_pngs(out)


if __name__ == "__main__":
    cli.run(main)
