"""Data: images a second of the extraction, by stage, and samples a second of the reader of codes.

    python -m scripts.benchmark.data --image-size 64                            # 2,000 made JPEGs, two views each
    python -m scripts.benchmark.data --data-path imagenet/val --images 20000 --image-size 256 --ten-crop
    python -m scripts.benchmark.data --measure reading --code-path FOLDER

extraction: beside a loop that takes one image at a time, as the published code does: one process of torch's DataLoader,
the views of one image encoded at once in float32, two int64 files and a line an image. Without --vq-ckpt the weights are
random, which costs the same. reading: batches of random images and views, read for the first time and again.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.train.extract_codes_c2i import Encoder, ExtractionSettings, crop_side, encoder_of, manifests, work
from dataset.codes import Codes, Manifest, Place, Writer
from dataset.crops import center_crops, cut_views
from dataset.images import CropRequest, ImageFolder, read_crops
from dataset.sampler import epoch_batches
from scripts.benchmark import harness
from scripts.benchmark.harness import CPU
from tokenizer.tokenizer_image.vq_model import PRESETS, Tokenizer, VQModel, preset
from utils import checkpoint, cli
from utils.distributed import World, best_device
from utils.log import progress
from utils.machine import durations, keep_freed_memory, matmul_rate
from utils.pixels import to_float
from utils.settings import Count, ExistingFile, ExistingFolder, Positive, PositiveInt, Settings, one_of, setting

FEW = 64  # images that the stages are measured on
DATASET, SIZE, CLASSES = "random", 1, 1000  # of the codes to read


class DataBenchmarkSettings(Settings):
    """The settings of this benchmark; see --help."""

    measure: list[one_of(("extraction", "reading"))] = setting(["extraction"])
    data_path: ExistingFolder | None = setting(None, "images to extract; default: JPEGs made for this")
    images: PositiveInt = setting(2000, "images to extract")
    loop_images: PositiveInt = setting(1000, "images for the loop that takes one at a time")
    vq_model: one_of(PRESETS) = setting("VQ-16")
    vq_ckpt: ExistingFile | None = setting(None)
    image_size: PositiveInt = setting(64)
    ten_crop: bool = setting(False)
    crop_range: list[Positive] | None = setting(None)
    no_flip: bool = setting(False)
    batch_size: PositiveInt | None = setting(None, "views encoded at once; default as in the extraction")
    num_workers: Count | None = setting(None, "default as in the extraction")
    precision: one_of(("fp32", "bf16")) = setting("fp32", "of the extraction")
    compile: bool | None = setting(None, "torch.compile in the extraction (default: on GPUs)")

    code_path: Path | None = setting(
        None, "folder for the codes to read, used again when they are there; default: a temporary one"
    )
    code_images: PositiveInt = setting(1_281_167)
    views: PositiveInt = setting(10)
    image_tokens: PositiveInt = setting(256)
    vocab_size: PositiveInt = setting(16384)
    global_batch_size: PositiveInt = setting(256)
    batches: PositiveInt = setting(2000, "measured batches")


# Extraction


def make_jpegs(root: Path, count: int) -> Path:
    """A folder of `count` JPEGs of 200 to 640 px a side, about 70 KB each, the same each time."""
    if root.is_dir() and sum(1 for _ in root.rglob("*.jpg")) == count:
        return root
    rng = np.random.default_rng(0)
    for i in progress(range(count), desc="making JPEGs", unit=" images"):
        width, height = rng.integers(200, 641, size=2).tolist()
        coarse = Image.fromarray(rng.integers(256, size=(12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        grain = rng.normal(0, 9, (height, width, 1)) + rng.normal(0, 4, (height, width, 3))
        path = root / f"{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return root


def first_images(folder: ImageFolder, n: int) -> ImageFolder:
    """The folder, cut to its first n images."""
    folder.paths, folder.names, folder.labels = folder.paths[:n], folder.names[:n], folder.labels[:n]
    return folder


@torch.inference_mode()
def one_by_one(
    folder: ImageFolder, images: int, m: Manifest, tokenizer: VQModel, root: Path, device: torch.device
) -> None:
    """The published way: codes and labels of each image in a file of its own."""
    (root / "codes").mkdir(parents=True)
    (root / "labels").mkdir()
    tokenizer = tokenizer.to(device)
    requests = [CropRequest([i], (crop_side(m),)) for i in range(images)]
    with open(os.devnull, "w") as terminal:
        for i, batch in enumerate(read_crops(folder, requests, workers=1)):
            views_VHWC = cut_views(torch.from_numpy(batch.crops[0]), m.image_size, m.view_mode)[0]
            codes = tokenizer.encode(to_float(views_VHWC).to(device)).flatten(1)[None].cpu().numpy()
            np.save(root / "codes" / f"{i}.npy", codes)
            np.save(root / "labels" / f"{i}.npy", folder.labels[i][None])
            print(f"image {i}", file=terminal, flush=True)


@contextmanager
def encoder_seconds(device: torch.device) -> Iterator[list[float]]:
    """The seconds of each call of an Encoder, with cutting views, normalising and quantising in them."""
    spent, codes = [], Encoder.codes

    def timed(self: Encoder, crops: list[Tensor], size: int, mode: str) -> Tensor:
        seconds, result = harness.timed(lambda: codes(self, crops, size, mode), device)
        spent.append(seconds)
        return result

    with mock.patch.object(Encoder, "codes", timed):
        yield spent


def stages(folder: ImageFolder, todo: list[Manifest], encoder: Encoder, root: Path) -> dict[str, float]:
    """Milliseconds an image of each stage on its own; decoding (with reading) and cropping by one thread."""
    m, few, ms = todo[0], range(min(FEW, len(folder))), {}

    def stage(name: str, call: Callable[[], Any]) -> Any:
        seconds, result = harness.timed(call, encoder.device)
        ms[name] = 1e3 * seconds / len(few)
        return result

    images = stage("decode", lambda: [folder.read(i) for i in few])
    sides = [crop_side(manifest) for manifest in todo]
    crops = stage("crop", lambda: [center_crops(image, sides) for image in images])
    tensors = [torch.from_numpy(np.stack(of_a_side)) for of_a_side in zip(*crops, strict=True)]
    codes_NVL = stage("encode", lambda: encoder.codes(tensors, m.image_size, m.view_mode)).cpu().numpy()
    of_all = m.changed(images=len(few), views=codes_NVL.shape[1], crop_range=None)
    writer = Writer(Place(root, m.dataset, m.image_size), of_all)
    stage("write", lambda: writer.write(0, codes_NVL, folder.labels[: len(few)]))
    return ms


@torch.inference_mode()
def conv_rate(device: torch.device) -> float:
    """Measured FLOP/s of a wide 3x3 convolution in float32, the best of ten: what an encoder could reach at most."""
    channels, side, images = 512, 32, 8
    conv = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    x = torch.randn(images, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return 2 * 9 * channels**2 * side**2 * images / min(durations(lambda: conv(x), 10, device))


def flops_a_view(tokenizer: VQModel, size: int, device: torch.device) -> int:
    """FLOPs (a multiplication and an addition are two) of encoding a view."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.encode(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops()


def tokenizer_file(s: DataBenchmarkSettings, folder: Path) -> Path:
    """--vq-ckpt, or a file of random weights."""
    if s.vq_ckpt:
        return s.vq_ckpt
    torch.manual_seed(0)
    config = preset(s.vq_model)
    checkpoint.save(folder / "vq.pt", {
        "model": VQModel(config).state_dict(), "config": asdict(config), "vq_model": s.vq_model, "args": {},
    })  # fmt: skip
    return folder / "vq.pt"


def measure_extraction(s: DataBenchmarkSettings, device: torch.device, root: Path) -> dict[str, Any]:
    """The loop, the extraction, its stages, and the machine's rates."""
    e = ExtractionSettings(
        data_path=s.data_path or make_jpegs(Path(tempfile.gettempdir()) / f"npp-jpegs-{s.images}", s.images),
        code_path=root / "packed", vq_ckpt=str(tokenizer_file(s, root)), dataset="benchmark", image_size=s.image_size,
        ten_crop=s.ten_crop, crop_range=s.crop_range, no_flip=s.no_flip, batch_size=s.batch_size,
        num_workers=s.num_workers, precision=s.precision, compile=s.compile, strict=True,
    )  # fmt: skip
    folder, world = first_images(e.image_folder(e.data_path), s.images), World(0, 1, device)
    tokenizer = Tokenizer.from_pretrained(e.vq_ckpt)
    if s.image_size % tokenizer.downsample:
        raise cli.InputError(f"--image-size {s.image_size} is no multiple of the tokenizer's {tokenizer.downsample}")
    todo = manifests(e, folder, tokenizer)
    n, looped, views = len(folder), min(s.loop_images, len(folder)), sum(m.views for m in todo)
    loop_seconds, _ = harness.timed(
        lambda: one_by_one(folder, looped, todo[0], tokenizer, root / "loop", device), device
    )

    keep_freed_memory()  # not before: it is a part of what is compared
    flops = flops_a_view(tokenizer, s.image_size, device)
    encoder = encoder_of(e, tokenizer, world)
    blank = torch.zeros(encoder.batch_size, s.image_size, s.image_size, 3, dtype=torch.uint8)
    encoder.codes([blank], s.image_size, "single")  # what is compiled is compiled before
    writers = [Writer(e.place(m), m) for m in todo]
    with encoder_seconds(device) as spent:
        seconds, _ = harness.timed(lambda: work(e, folder, writers, tokenizer, world), device)
    codes, wrong = Codes(writers[0].place.root, "benchmark", s.image_size), []
    for i in range(looped):
        one_VL = np.load(root / "loop" / "codes" / f"{i}.npy")[0]
        wrong.append(codes.batch(np.full(len(one_VL), i), np.arange(len(one_VL)))[0] != one_VL)
    result = {
        "images/s": n / seconds, "views/s": n * views / seconds, "loop images/s": looped / loop_seconds,
        "of the loop": (n * views / seconds) / (looped * todo[0].views / loop_seconds),
        "codes differ": float(np.mean(wrong)), "outside the encoder": 1 - sum(spent) / seconds,
        "GFLOP a view": flops / 1e9, "encoder GFLOP/s": flops * n * views / sum(spent) / 1e9,
        "conv GFLOP/s": conv_rate(device) / 1e9, "matmul GFLOP/s": matmul_rate(device, torch.float32) / 1e9,
        "views at once": encoder.batch_size,
    }  # fmt: skip
    for key, value in result.items():
        print(f"{key:<20} {value:>10.4g}")
    result["ms"] = stages(folder, todo, encoder, root / "stages")
    print("ms an image alone:", ", ".join(f"{name} {value:.3f}" for name, value in result["ms"].items()))
    return result


# Reading codes


def write_random(s: DataBenchmarkSettings, root: Path) -> None:
    """Fill a folder with random codes, the same each time, unless they are there."""
    manifest = Manifest(
        dataset=DATASET, image_size=SIZE, images=s.code_images, views=s.views, tokens=s.image_tokens,
        codebook_size=s.vocab_size,
    )  # fmt: skip
    writer = Writer(Place(root, DATASET, SIZE), manifest)
    if writer.finished:
        return
    writer.check_space(manifest.shards)
    writer.start()
    for shard in progress(range(manifest.shards), unit=" shards", desc="writing codes"):
        if not writer.has(shard):
            rng, n = np.random.default_rng(shard), len(manifest.rows(shard))
            codes = rng.integers(manifest.codebook_size, size=(n, manifest.views, manifest.tokens), dtype=np.uint32)
            writer.write(shard, codes, rng.integers(CLASSES, size=n))
    writer.finish()


def drop_from_cache(root: Path) -> None:
    """Have the system forget a folder's files, so that they are read from the disk."""
    for path in root.rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(root: Path) -> None:
    for path in root.rglob("*.npy"):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def read_batches(root: Path, batch: int, batches: int, epoch: int) -> dict[str, float]:
    """Seconds to open a folder and to an epoch's first batch; samples a second of the others, and at the median batch."""
    opened, codes = harness.timed(lambda: Codes(root, DATASET, SIZE))
    selections = epoch_batches(len(codes), codes.views, batch, seed=0, epoch=epoch, label_drop=0.1)

    def read() -> None:
        selection = next(selections)
        codes.batch(selection.indices, selection.views)

    setup, _ = harness.timed(read)
    times = [harness.timed(read)[0] for _ in range(min(batches, len(codes) // batch - 1))]
    return {
        "open s": opened, "epoch setup s": setup, "samples/s": batch * len(times) / sum(times),
        "at the median": batch / statistics.median(times),
    }  # fmt: skip


def measure_reading(s: DataBenchmarkSettings, root: Path) -> list[dict[str, Any]]:
    """Batches of packed shards, with their files in the system's memory and without."""
    place, rows = root / f"packed-{s.code_images}x{s.views}x{s.image_tokens}", []
    write_random(s, place)
    size = sum(path.stat().st_size for path in place.rglob("*.npy"))
    for epoch, (cache, prepare) in enumerate((("cold", drop_from_cache), ("warm", read_once))):
        prepare(place)
        figures = read_batches(place, s.global_batch_size, s.batches, epoch)
        rows.append({"images": s.code_images, "GB": size / 1e9, "cache": cache, **figures})
    harness.table(rows, {
        "images": "d", "GB": ".2f", "cache": "s", "open s": ".2f", "epoch setup s": ".3f", "samples/s": ".0f",
        "at the median": ".0f",
    })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    s = DataBenchmarkSettings.from_command_line(__doc__, arguments)
    if "reading" in s.measure and 2 * s.global_batch_size > s.code_images:
        raise cli.InputError(f"--global-batch-size {s.global_batch_size}: --code-images must hold two batches at least")
    with tempfile.TemporaryDirectory() as temporary:
        device, root = best_device(), s.code_path or Path(temporary) / "codes"
        measurements = {
            "extraction": lambda: measure_extraction(s, device, Path(temporary)),
            "reading": lambda: measure_reading(s, root),
        }
        machine = harness.start(device if "extraction" in s.measure else CPU)
        results = {name: measure() for name, measure in measurements.items() if name in s.measure}
    harness.finish("data", machine, s, **results)


if __name__ == "__main__":
    cli.run(main)
