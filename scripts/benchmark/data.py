"""Data: images a second of the extraction, by stage, and samples a second of the reader of codes.

    python -m scripts.benchmark.data --image-size 64                            # 2,000 made JPEGs, two views each
    python -m scripts.benchmark.data --data-path imagenet/val --images 20000 --image-size 256 --ten-crop --compare
    python -m scripts.benchmark.data --measure reading packing --code-path FOLDER

extraction: beside a loop that takes one image at a time, as the published code does: one process of torch's DataLoader,
views cropped and normalised as floats one by one, the views of one image encoded at once, two int64 files and a line an
image. Without --vq-ckpt the weights are random, which costs the same. --compare: what torch.compile and bf16 give, and
the share of codes that they change. reading: batches of random images and views, read for the first time and again.
packing: the first use of a folder with one file an image.
"""

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.train.extract_codes_c2i import ExtractionSettings, encoder_of, manifests, work
from autoregressive.train.extraction import Encoder, crop_side
from dataset.codes import Codes, Manifest, Place, Writer
from dataset.crops import center_crops, cut_views
from dataset.images import ImageFolder
from dataset.sampler import epoch_batches
from scripts.benchmark import harness
from scripts.benchmark.harness import CPU
from tokenizer.tokenizer_image.load import Tokenizer
from tokenizer.tokenizer_image.vq_model import PRESETS, VQModel, preset
from utils import checkpoint, cli
from utils.distributed import World, best_device
from utils.log import progress
from utils.machine import durations, keep_freed_memory, matmul_rate
from utils.pixels import to_float
from utils.settings import Count, ExistingFile, ExistingFolder, Positive, PositiveInt, Settings, one_of, setting

FEW = 64  # images that the stages are measured on, and the comparison
DATASET, SIZE, CLASSES = "random", 1, 1000  # of the codes to read


class DataBenchmarkSettings(Settings):
    """The settings of this benchmark; see --help."""

    measure: list[one_of(("extraction", "reading", "packing"))] = setting(["extraction"])
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
    compare: bool = setting(False, "also torch.compile and bf16")

    code_path: Path | None = setting(
        None, "folder for the codes to read, used again when they are there; default: a temporary one"
    )
    code_images: PositiveInt = setting(1_281_167, "images in packed shards")
    per_image: PositiveInt = setting(20_000, "images in one file each")
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


class OneByOne(Dataset):
    """Image i as the published loop loads it: (V, 3, size, size) float, and i."""

    def __init__(self, folder: ImageFolder, manifest: Manifest, images: int) -> None:
        self.folder, self.m, self.images = folder, manifest, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        crop = center_crops(self.folder.read(i), [crop_side(self.m)])[0]
        return to_float(cut_views(torch.from_numpy(crop)[None], self.m.image_size, self.m.view_mode)[0]), i


@torch.inference_mode()
def one_by_one(data: OneByOne, tokenizer: VQModel, root: Path, device: torch.device) -> None:
    """The published way: codes and labels of each image in a file of its own."""
    (root / "codes").mkdir(parents=True)
    (root / "labels").mkdir()
    tokenizer = tokenizer.to(device)
    with open(os.devnull, "w") as terminal:
        for views_1VCHW, i in DataLoader(data, batch_size=1, num_workers=1):
            codes = tokenizer.encode(views_1VCHW[0].to(device)).flatten(1)[None].cpu().numpy()
            np.save(root / "codes" / f"{int(i)}.npy", codes)
            np.save(root / "labels" / f"{int(i)}.npy", data.folder.labels[int(i)][None])
            print(f"image {int(i)}", file=terminal, flush=True)


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
    """Milliseconds an image of each stage on its own; reading to cropping by one thread."""
    m, device, few, ms = todo[0], encoder.device, range(min(FEW, len(folder))), {}

    def stage(name: str, call: Callable[[], Any]) -> Any:
        seconds, result = harness.timed(call, device)
        ms[name] = 1e3 * seconds / len(few)
        return result

    stage("read", lambda: [Path(folder.paths[i]).read_bytes() for i in few])
    images = stage("decode", lambda: [folder.read(i) for i in few])
    ms["decode"] -= ms["read"]
    sides = [crop_side(manifest) for manifest in todo]
    crops = stage("crop", lambda: [center_crops(image, sides) for image in images])
    tensors = [torch.from_numpy(np.stack([crop[k] for crop in crops])) for k in range(len(sides))]

    def floats() -> list[Tensor]:
        cut = torch.cat([cut_views(t.to(device), m.image_size, m.view_mode) for t in tensors], 1).flatten(0, 1)
        return [to_float(part).contiguous(memory_format=torch.channels_last) for part in cut.split(encoder.batch_size)]

    with torch.inference_mode():
        parts = stage("normalise", floats)
        encoder.tokenizer.latents(parts[0])
        latents = stage("encode", lambda: [encoder.tokenizer.latents(part) for part in parts])
        codes = stage("quantise", lambda: [encoder.tokenizer.quantize.codes(latent) for latent in latents])
    views = sum(manifest.views for manifest in todo)
    codes_NVL = torch.cat(codes).view(len(few), views, -1).cpu().numpy()
    writer = Writer(Place(root, m.dataset, m.image_size), m.changed(images=len(few), views=views, crop_range=None))
    stage("write", lambda: writer.write(0, codes_NVL, folder.labels[: len(few)]))
    return ms


@torch.inference_mode()
def conv_rate(device: torch.device, channels: int = 512, side: int = 32, images: int = 8) -> float:
    """Measured FLOP/s of a wide 3x3 convolution in float32, the best of ten: what an encoder could reach at most."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    x = torch.randn(images, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return 2 * 9 * channels**2 * side**2 * images / min(durations(lambda: conv(x), 10, device))


def flops_a_view(tokenizer: VQModel, size: int, device: torch.device) -> int:
    """FLOPs (a multiplication and an addition are two) of encoding a view."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.encode(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops()


def compare(e: ExtractionSettings, folder: ImageFolder, m: Manifest, tokenizer: VQModel, world: World) -> list[dict]:
    """Views a second, and the share of codes that differ from plain float32, with torch.compile, bf16, and both."""
    few = range(min(FEW, len(folder)))
    crops = torch.from_numpy(np.stack([folder.crops(i, (crop_side(m),))[0] for i in few]))
    rows, plain = [], None
    for precision in ("fp32", "bf16"):
        for compiled in (False, True):
            encoder = encoder_of(e.model_copy(update={"precision": precision, "compile": compiled}), tokenizer, world)
            call = partial(encoder.codes, [crops], m.image_size, m.view_mode)
            codes = call()
            plain = codes if plain is None else plain
            seconds = min(durations(call, 2, world.device, warmup=0))
            rows.append({
                "precision": precision, "compiled": compiled, "views/s": codes.shape[0] * codes.shape[1] / seconds,
                "codes changed": float((codes != plain).float().mean()),
            })  # fmt: skip
    harness.table(rows, {"precision": "s", "compiled": "", "views/s": ".1f", "codes changed": ".3%"})
    return rows


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


def bytes_an_image(root: Path, images: int) -> float:
    """Of the files under a folder, without what a file system adds."""
    return sum(path.stat().st_size for path in root.rglob("*.npy")) / images


def measure_extraction(s: DataBenchmarkSettings, device: torch.device, root: Path) -> dict[str, Any]:
    """The loop, the extraction, its stages, and the machine's rates."""
    e = ExtractionSettings(
        data_path=s.data_path or make_jpegs(Path(tempfile.gettempdir()) / f"npp-jpegs-{s.images}", s.images),
        code_path=root / "packed", vq_ckpt=str(tokenizer_file(s, root)), dataset="benchmark", image_size=s.image_size,
        ten_crop=s.ten_crop, crop_range=s.crop_range, no_flip=s.no_flip, batch_size=s.batch_size,
        num_workers=s.num_workers, strict=True,
    )  # fmt: skip
    folder, world = first_images(e.image_folder(e.data_path), s.images), World(0, 1, device)
    tokenizer = Tokenizer.from_pretrained(e.vq_ckpt)
    if s.image_size % tokenizer.downsample:
        raise cli.InputError(f"--image-size {s.image_size} is no multiple of the tokenizer's {tokenizer.downsample}")
    todo = manifests(e, folder, tokenizer, tokenizer.about["vq_model"])
    n, views = len(folder), sum(m.views for m in todo)
    data = OneByOne(folder, todo[0], min(s.loop_images, n))
    loop_seconds, _ = harness.timed(lambda: one_by_one(data, tokenizer, root / "loop", device), device)

    keep_freed_memory()  # not before: it is a part of what is compared
    rates = [(matmul_rate(device, torch.float32), conv_rate(device))]
    flops = flops_a_view(tokenizer, s.image_size, device)
    encoder = encoder_of(e, tokenizer, world)
    blank = torch.zeros(encoder.batch_size, s.image_size, s.image_size, 3, dtype=torch.uint8)
    encoder.codes([blank], s.image_size, "single")  # what is compiled is compiled before
    writers = [Writer(Place(e.code_path_of(m), m.dataset, m.image_size), m) for m in todo]
    with encoder_seconds(device) as spent:
        seconds, _ = harness.timed(lambda: work(e, folder, writers, tokenizer, world), device)
    rates.append((matmul_rate(device, torch.float32), conv_rate(device)))
    matmul, conv = map(max, zip(*rates, strict=True))
    codes, wrong = Codes(writers[0].place.root, "benchmark", s.image_size), []
    for i in range(len(data)):
        one_VL = np.load(root / "loop" / "codes" / f"{i}.npy")[0]
        wrong.append(codes.batch(np.full(len(one_VL), i), np.arange(len(one_VL)))[0] != one_VL)
    packed, plain = bytes_an_image(root / "packed", n), bytes_an_image(root / "loop", len(data)) * len(todo)
    result = {
        "images/s": n / seconds, "views/s": n * views / seconds, "loop images/s": len(data) / loop_seconds,
        "of the loop": (n * views / seconds) / (len(data) * todo[0].views / loop_seconds),
        "codes differ": float(np.mean(wrong)), "outside the encoder": 1 - sum(spent) / seconds,
        "GFLOP a view": flops / 1e9, "encoder GFLOP/s": flops * n * views / sum(spent) / 1e9,
        "conv GFLOP/s": conv / 1e9, "matmul GFLOP/s": matmul / 1e9, "views at once": encoder.batch_size,
        "bytes an image": packed, "bytes of the loop's": plain / packed,
    }  # fmt: skip
    for key, value in result.items():
        print(f"{key:<20} {value:>10.4g}")
    result["ms"] = stages(folder, todo, encoder, root / "stages")
    print("ms an image alone:", ", ".join(f"{name} {value:.3f}" for name, value in result["ms"].items()))
    return result | ({"compare": compare(e, folder, todo[0], tokenizer, world)} if s.compare else {})


# Reading codes


def write_random(root: Path, manifest: Manifest) -> None:
    """Fill a folder with random codes, the same each time, unless they are there."""
    writer = Writer(Place(root, DATASET, SIZE), manifest)
    if writer.finished:
        return
    writer.check_space(manifest.shards)
    writer.start()
    for shard in progress(range(manifest.shards), unit=" shards", desc=f"writing {manifest.layout}"):
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
    """Seconds to open a folder and to begin an epoch; samples a second over its batches, and at the median batch."""
    opened, codes = harness.timed(lambda: Codes(root, DATASET, SIZE))
    selections = epoch_batches(len(codes), codes.views, batch, seed=0, epoch=epoch, label_drop=0.1)
    setup, first = harness.timed(lambda: next(selections))
    codes.batch(first.indices, first.views)
    times = []
    for _ in range(batches):
        seconds, more = harness.timed(lambda: (one := next(selections, None)) and codes.batch(one.indices, one.views))
        if more is None:
            break
        times.append(seconds)
    return {
        "open s": opened, "epoch setup s": setup, "samples/s": batch * len(times) / sum(times),
        "at the median": batch / statistics.median(times),
    }  # fmt: skip


def write_layout(s: DataBenchmarkSettings, root: Path, layout: str, images: int) -> tuple[Path, dict[str, Any]]:
    """A folder of random codes, and what it takes on the disk."""
    place = root / f"{layout}-{images}x{s.views}x{s.image_tokens}"
    write_random(place, Manifest(
        dataset=DATASET, image_size=SIZE, images=images, views=s.views, tokens=s.image_tokens,
        codebook_size=s.vocab_size, layout=layout,
    ))  # fmt: skip
    blocks = [path.stat().st_blocks for path in place.rglob("*") if path.is_file()]
    return place, {"layout": layout, "images": images, "files": len(blocks), "GB": 512 * sum(blocks) / 1e9}


def measure_reading(s: DataBenchmarkSettings, root: Path) -> list[dict[str, Any]]:
    """Batches of packed shards, with their files in the system's memory and without."""
    place, about = write_layout(s, root, "packed", s.code_images)
    rows = []
    for epoch, (cache, prepare) in enumerate((("cold", drop_from_cache), ("warm", read_once))):
        prepare(place)
        rows.append({**about, "cache": cache, **read_batches(place, s.global_batch_size, s.batches, epoch)})
    harness.table(rows, {
        "images": "d", "files": "d", "GB": ".2f", "cache": "s", "open s": ".2f", "epoch setup s": ".3f",
        "samples/s": ".0f", "at the median": ".0f",
    })  # fmt: skip
    return rows


def measure_packing(s: DataBenchmarkSettings, root: Path) -> dict[str, Any]:
    """The first use of a folder with one file an image, which packs it, and the second."""
    place, about = write_layout(s, root, "per-image", s.per_image)
    shutil.rmtree(Place(place, DATASET, SIZE).packed, ignore_errors=True)
    drop_from_cache(place)
    first, again = (harness.timed(lambda: Codes(place, DATASET, SIZE).batch(np.arange(1)))[0] for _ in range(2))
    row = {**about, "packing s": first, "images/s": s.per_image / first, "open s": again}
    harness.table([row], {"images": "d", "files": "d", "packing s": ".2f", "images/s": ".0f", "open s": ".2f"})
    return row


def main(arguments: list[str] | None = None) -> None:
    s = DataBenchmarkSettings.from_command_line(__doc__, arguments)
    if "reading" in s.measure and 2 * s.global_batch_size > s.code_images:
        raise cli.InputError(f"--global-batch-size {s.global_batch_size}: --code-images must hold two batches at least")
    with tempfile.TemporaryDirectory() as temporary:
        device, root = best_device(), s.code_path or Path(temporary) / "codes"
        measurements = {
            "extraction": lambda: measure_extraction(s, device, Path(temporary)),
            "reading": lambda: measure_reading(s, root),
            "packing": lambda: measure_packing(s, root),
        }
        machine = harness.start(device if "extraction" in s.measure else CPU)
        results = {name: measure() for name, measure in measurements.items() if name in s.measure}
    harness.finish("data", machine, s, **results)


if __name__ == "__main__":
    cli.run(main)
