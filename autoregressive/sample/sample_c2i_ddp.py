"""Draw many images into one .npz for the evaluator, on any number of processes.

    bash scripts/autoregressive/sample_c2i.sh --vq-ckpt vq_ds16_c2i.pt --gpt-ckpt c2i_B_256.pt --gpt-model GPT-B \
        --image-size 256 --image-size-eval 256 --cfg-scale 2.0

Image i of a seed is the same whatever the batch size and the number of processes. Batches are kept beside the .npz
until it is written, so the same command continues a run that was cut off.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoregressive.sample.pipeline import Pipeline, add_flags, checkpoint_name
from utils import cli, samples, streams
from utils.distributed import World, world
from utils.files import atomic_path, sha256, write_json
from utils.log import progress


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add_flags(parser)
    add = parser.add_argument
    add("--num-fid-samples", type=cli.positive_int, default=50000)
    add(
        "--labels",
        choices=("random", "balanced"),
        default="random",
        help="random: as published; balanced: class i mod n",
    )
    add("--per-proc-batch-size", type=cli.positive_int, default=32)
    add("--global-seed", type=cli.count, default=0)
    add("--sample-dir", type=Path, default=Path("samples"))
    return parser.parse_args()


def file_name(args: Namespace, pipeline: Pipeline) -> str:
    """The published name of a samples file."""
    gpt, vq = pipeline.names["gpt_model"], pipeline.names["vq_model"]
    return (
        f"{gpt}-{checkpoint_name(args.gpt_ckpt)}-size-{pipeline.image_size}-size-{pipeline.output_size}-{vq}-"
        f"topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-cfg-{args.cfg_scale}-seed-{args.global_seed}.npz"
    )


def settings(args: Namespace, pipeline: Pipeline) -> dict:
    """What the images depend on, as plain data."""
    keys = ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "precision", "labels", "num_fid_samples")
    return {key: getattr(args, key) for key in keys} | {
        "seed": args.global_seed,
        "image_size": pipeline.image_size,
        "image_size_eval": pipeline.output_size,
        "weights": pipeline.names["weights"],
        "gpt_sha256": sha256(args.gpt_ckpt),
        "vq_sha256": sha256(args.vq_ckpt),
    }


def all_labels(args: Namespace, classes: int) -> np.ndarray:
    """Labels (N,) int64, each a function of (seed, image)."""
    indices = np.arange(args.num_fid_samples)
    if args.labels == "balanced":
        return indices % classes
    return (streams.uniform(args.global_seed, streams.LABEL, indices) * classes).astype(np.int64)


def refuse_other_settings(path: Path, wanted: dict) -> None:
    """InputError if `path` records other settings than these."""
    if path.is_file() and (found := json.loads(path.read_text())) != wanted:
        different = ", ".join(key for key in wanted if found.get(key) != wanted[key])
        raise cli.InputError(
            f"{path} belongs to samples of other settings ({different} differ): delete them or give another --sample-dir"
        )


def draw_parts(pipeline: Pipeline, labels: np.ndarray, parts: list[tuple[Path, slice]], seed: int, here: World) -> None:
    """Draw this process's batches that are not there yet, each into a file of its own."""
    missing = [(path, part) for path, part in parts[here.rank :: here.size] if not path.is_file()]
    size = sum(part.stop - part.start for _, part in missing)
    with progress(total=size, desc="drawing", unit=" images", show=here.is_main) as bar:
        for path, part in missing:
            images = pipeline.images(labels[part], np.arange(part.start, part.stop), seed)
            with atomic_path(path) as temporary:
                np.save(temporary, images)
            bar.update(len(images))


def read_parts(parts: list[tuple[Path, slice]]) -> Iterator[np.ndarray]:
    for path, _ in parts:
        yield np.load(path)


def main() -> None:
    args = parse()
    pipeline = Pipeline.load(args)
    out = args.sample_dir / file_name(args, pipeline)
    wanted = settings(args, pipeline)
    record, folder = out.with_suffix(".json"), out.with_suffix(".parts")
    refuse_other_settings(record, wanted)
    if out.is_file() and record.is_file():
        print(f"{out} is complete already")
        return
    wanted_parts = {**wanted, "batch": args.per_proc_batch_size}
    refuse_other_settings(folder / "settings.json", wanted_parts)
    labels = all_labels(args, pipeline.gpt.config.num_classes)
    n, batch = len(labels), args.per_proc_batch_size
    parts = [(folder / f"{start:08d}.npy", slice(start, min(n, start + batch))) for start in range(0, n, batch)]
    with world() as here:
        if here.is_main:
            write_json(folder / "settings.json", wanted_parts)
        here.barrier()
        draw_parts(pipeline.to(here.device), labels, parts, args.global_seed, here)
        here.barrier()
        if here.is_main:
            samples.write(out, read_parts(parts), (n, pipeline.output_size, pipeline.output_size, 3), labels)
            write_json(record, wanted)
            shutil.rmtree(folder)
            print(f"wrote {out}: {n} images of {pipeline.output_size} px")


if __name__ == "__main__":
    cli.run(main)
