"""Samples a second of the codes loader, up to the numpy arrays of a training step: packed shards and one file an image.

    python scripts/benchmark/loader.py --path /tmp/codes --images 1281167 --views 10 --image-tokens 256

Writes random codes under --path once and reads them in the sampler's order. Cold: the shards are dropped from the page
cache first. Warm: every page has been read. --clean deletes what it wrote.
"""

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dataset.codes import LAYOUTS, Codes, Manifest, Place, Writer
from dataset.sampler import Selection, epoch_batches
from scripts.benchmark.card import card, finish
from utils import cli
from utils.log import progress

DATASET, SIZE, CLASSES = "random", 1, 1000


def write_random(root: Path, manifest: Manifest) -> bool:
    """Fill a folder with random codes, the same each time; False if they are there already."""
    writer = Writer(Place(root, DATASET, SIZE), manifest)
    if writer.finished:
        return False
    writer.check_space(manifest.shards)
    writer.start()
    with progress(total=manifest.images, unit=" images", desc=f"writing {manifest.layout}") as bar:
        for shard in range(manifest.shards):
            n = len(manifest.rows(shard))
            if not writer.has(shard):
                rng = np.random.default_rng(shard)
                shape = (n, manifest.views, manifest.tokens)
                writer.write(
                    shard,
                    rng.integers(manifest.codebook_size, size=shape, dtype=np.uint32),
                    rng.integers(CLASSES, size=n),
                )
            bar.update(n)
    writer.finish()
    return True


def size_on_disk(root: Path) -> tuple[int, int]:
    """Number of files under a folder, and bytes allocated for them."""
    blocks = [path.stat().st_blocks for path in root.rglob("*") if path.is_file()]
    return len(blocks), 512 * sum(blocks)


def cool(root: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in root.rglob("*.npy"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def warm(root: Path) -> None:
    """Read every file under a folder once."""
    for path in root.rglob("*.npy"):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def epoch(codes: Codes, batch: int, number: int) -> Iterator[Selection]:
    return epoch_batches(len(codes), codes.views, batch, seed=0, epoch=number, label_drop=0.1)


def measure(codes: Codes, batch: int, batches: int, number: int) -> dict[str, float]:
    """Seconds to the first batch of an epoch, and samples a second of those after: over all of them, and at the median."""
    start = time.perf_counter()
    selections = epoch(codes, batch, number)
    first = next(selections)
    setup = time.perf_counter() - start
    codes.batch(first.indices, first.views)
    times = []
    start = time.perf_counter()
    for selection, _ in zip(selections, range(batches), strict=False):
        codes.batch(selection.indices, selection.views)
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return {
        "setup_s": setup,
        "samples_per_s": batch * len(times) / sum(times),
        "samples_per_s_median": batch / statistics.median(times),
        "batches": len(times),
    }


def measure_folder(root: Path, batch: int, batches: int) -> dict[str, dict[str, float]]:
    """Seconds to open a folder, and its figures cold, then warm."""
    cool(root)
    rows = {}
    for number, state in enumerate(("cold", "warm")):
        if state == "warm":
            warm(root)
        start = time.perf_counter()
        codes = Codes(root, DATASET, SIZE)
        opened = time.perf_counter() - start
        rows[state] = {"open_s": opened, **measure(codes, batch, batches, number)}
    return rows


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--path", type=Path, required=True, help="folder for the random codes; used again when they are there")
    add("--images", type=cli.positive_int, default=1_281_167)
    add("--views", type=cli.positive_int, default=10)
    add("--image-tokens", type=cli.positive_int, default=256)
    add("--vocab-size", type=cli.positive_int, default=16384)
    add("--batch-size", type=cli.positive_int, default=256)
    add("--batches", type=cli.positive_int, default=2000, help="measured batches")
    add("--per-image", type=cli.positive_int, default=20_000, help="images of the folder with one file an image")
    add("--clean", action="store_true", help="delete the random codes at the end")
    args = parser.parse_args()
    if args.batch_size * 2 > min(args.images, args.per_image):
        raise cli.InputError(f"--batch-size {args.batch_size}: --images and --per-image must hold two batches at least")

    machine = card(torch.device("cpu"))
    print(machine)
    result, roots = {}, []
    for layout in LAYOUTS:
        images = args.images if layout == "packed" else min(args.images, args.per_image)
        root = args.path / f"{layout}-{images}x{args.views}x{args.image_tokens}"
        manifest = Manifest(DATASET, SIZE, images, args.views, args.image_tokens, args.vocab_size, layout)
        roots.append(root)
        written = write_random(root, manifest)
        files, size = size_on_disk(root)
        print(
            f"{layout}: {images} images, {args.views} views of {args.image_tokens} random codes, "
            f"{'written now' if written else 'there already'}: {files} files, {size / 1e9:.2f} GB on disk in {root}"
        )
        result[layout] = {"files": files, "bytes": size, **measure_folder(root, args.batch_size, args.batches)}
    print("layout      cache   open s   epoch setup s   samples/s   median batch")
    for layout in LAYOUTS:
        for state in ("cold", "warm"):
            row = result[layout][state]
            print(
                f"{layout:<11} {state:<5} {row['open_s']:>8.2f} {row['setup_s']:>15.3f} {row['samples_per_s']:>11.0f} "
                f"{row['samples_per_s_median']:>14.0f}"
            )
    ratio = result["packed"]["warm"]["samples_per_s"] / result["per-image"]["warm"]["samples_per_s"]
    print(f"packed reads {ratio:.1f} times as many samples a second as one file an image, warm")
    if args.clean:
        for root in roots:
            shutil.rmtree(root)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    finish({**machine, "benchmark": "loader", **arguments, **result, "ratio_warm": ratio})


if __name__ == "__main__":
    cli.run(main)
