"""Images a second of the extraction, by stage, beside a loop that takes one image at a time as the published code does.

    python scripts/benchmark/extract.py --image-size 64                               # 2,000 made JPEGs, two views each
    python scripts/benchmark/extract.py --data-path imagenet/val --images 20000 --image-size 256 --ten-crop --compare

Without --data-path it makes JPEGs of mixed sizes of Fashion-MNIST, enlarged, tinted and textured, in a folder of the
temporary directory, once. Without --vq-ckpt the weights are random, which costs the same. The loop loads by one process
of torch's DataLoader, crops and normalises each view as floats, encodes the views of one image, and writes two int64
files and a line an image. --compare: what torch.compile and bf16 give, and the share of codes that they change.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.train import extraction
from autoregressive.train.extract_codes_c2i import workers_of
from dataset import fashion_mnist
from dataset.codes import Codes, Manifest, Place, Writer
from dataset.images import VIEWS, ImageFolder, center_crop, center_crops, cut_views, decode
from scripts.benchmark.card import card, finish
from tokenizer.tokenizer_image.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import PRESETS, VQModel
from utils import cli
from utils.distributed import World
from utils.log import progress
from utils.machine import durations, keep_freed_memory, matmul_rate
from utils.pixels import to_float

FEW = 64  # images that the stages are measured on, and the comparison


def make_jpegs(root: Path, count: int) -> Path:
    """A folder of `count` JPEGs of 200 to 640 px a side, about 90 KB each, the same each time."""
    if root.is_dir() and sum(1 for _ in root.rglob("*.jpg")) == count:
        return root
    with fashion_mnist.files(None) as source:
        garments, labels = fashion_mnist.read_split(source, "test")
    rng = np.random.default_rng(0)
    for i in progress(range(count), desc="making JPEGs", unit=" images"):
        width, height = rng.integers(200, 641, size=2).tolist()
        picture = Image.fromarray(garments[i % len(garments)]).resize((width, height), Image.Resampling.BICUBIC)
        tint, grain = (
            rng.uniform(0.3, 1, 3),
            rng.normal(0, 9, (height, width, 1)) + rng.normal(0, 4, (height, width, 3)),
        )
        pixels = np.asarray(picture)[..., None] * tint + 40 * (1 - tint) + grain
        path = root / f"{labels[i % len(labels)]}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return root


class OneByOne(Dataset):
    """Image i as the published loop loads it: (V, 3, size, size) float, and i."""

    def __init__(self, folder: ImageFolder, manifest: Manifest) -> None:
        self.folder, self.m = folder, manifest

    def __len__(self) -> int:
        return self.m.images

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        crop = center_crop(decode(self.folder.paths[i]), extraction.crop_side(self.m))
        return to_float(cut_views(torch.from_numpy(crop)[None], self.m.image_size, self.m.view_mode)[0]), i


@torch.inference_mode()
def one_by_one(folder: ImageFolder, manifest: Manifest, tokenizer: VQModel, root: Path, device: torch.device) -> float:
    """Seconds of the published way over the folder's first images."""
    for name in ("codes", "labels"):
        (root / name).mkdir()
    start = time.perf_counter()
    with open(os.devnull, "w") as terminal:
        for views_1VCHW, i in DataLoader(OneByOne(folder, manifest), batch_size=1, num_workers=1):
            codes = tokenizer.encode(views_1VCHW[0].to(device)).flatten(1)[None].cpu().numpy()
            np.save(root / "codes" / f"{int(i)}.npy", codes)
            np.save(root / "labels" / f"{int(i)}.npy", folder.labels[int(i)][None])
            print(f"image {int(i)}", file=terminal, flush=True)
    return time.perf_counter() - start


class TimedEncoder(extraction.Encoder):
    """An Encoder that adds up the seconds it takes, with cutting views, normalising and quantising in them."""

    seconds = 0.0

    def codes(self, crops: list[Tensor], size: int, mode: str) -> Tensor:
        start = synchronised(self.device)
        codes = super().codes(crops, size, mode)
        self.seconds += synchronised(self.device) - start
        return codes


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def batched(folder: ImageFolder, manifests: list[Manifest], encoder: TimedEncoder, root: Path, workers: int) -> float:
    """Seconds of the extraction over the folder's first images."""
    writers = [Writer(Place(root / str(i), m.dataset, m.image_size), m) for i, m in enumerate(manifests)]
    start = time.perf_counter()
    for writer in writers:
        writer.start()
    here = World(0, 1, encoder.device)
    chunks = extraction.chunks_of(extraction.missing_shards(writers, here), writers, encoder.batch_size)
    extraction.extract(folder, chunks, writers, encoder, workers=workers, strict=True, show=True)
    for writer in writers:
        writer.finish()
    return time.perf_counter() - start


def stages(folder: ImageFolder, manifests: list[Manifest], encoder: extraction.Encoder, root: Path) -> dict[str, float]:
    """Milliseconds an image of each stage on its own; reading to cropping by one thread."""
    m, device, paths = manifests[0], encoder.device, folder.paths[: min(FEW, manifests[0].images)]
    n, views, ms = len(paths), sum(m.views for m in manifests), {}

    def timed(name: str, call) -> list:
        start = synchronised(device)
        result = call()
        ms[name] = 1e3 * (synchronised(device) - start) / n
        return result

    timed("read", lambda: [Path(path).read_bytes() for path in paths])
    images = timed("decode", lambda: [decode(path) for path in paths])
    ms["decode"] -= ms["read"]
    sides = [extraction.crop_side(m) for m in manifests]
    crops = timed("crop", lambda: [center_crops(image, sides) for image in images])
    tensors = [torch.from_numpy(np.stack([crop[k] for crop in crops])) for k in range(len(sides))]
    size, b = m.image_size, encoder.batch_size

    @torch.inference_mode()
    def floats() -> list[Tensor]:
        cut = torch.cat([cut_views(t.to(device), size, m.view_mode) for t in tensors], 1).flatten(0, 1)
        return [to_float(part).contiguous(memory_format=torch.channels_last) for part in cut.split(b)]

    @torch.inference_mode()
    def each(call, parts: list[Tensor]) -> list[Tensor]:
        return [call(part) for part in parts]

    parts = timed("normalise", floats)
    encoder.tokenizer.latents(parts[0])
    latents = timed("encode", partial(each, encoder.tokenizer.latents, parts))
    codes = timed("quantise", partial(each, encoder.tokenizer.quantize.codes, latents))
    codes_NVL = torch.cat(codes).view(n, views, -1).cpu().numpy()
    few = Manifest(m.dataset, size, n, views, m.tokens, m.codebook_size)
    timed("write", lambda: Writer(Place(root, m.dataset, size), few).write(0, codes_NVL, folder.labels[:n]))
    return ms


def flops_a_view(tokenizer: VQModel, size: int, device: torch.device) -> int:
    """FLOPs (a multiplication and an addition are two) of encoding a view."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.encode(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops()


@torch.inference_mode()
def conv_rate(device: torch.device, channels: int = 512, side: int = 32, images: int = 8) -> float:
    """Measured FLOP/s of a wide 3x3 convolution in float32, the best of ten: what an encoder could reach at most."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    x = torch.randn(images, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return 2 * 9 * channels**2 * side**2 * images / min(durations(lambda: conv(x), 10, device))


def size_of(root: Path) -> int:
    """Bytes of the files under a folder, without what a file system adds."""
    return sum(path.stat().st_size for path in root.rglob("*.npy"))


def compare(folder: ImageFolder, manifest: Manifest, encoder: extraction.Encoder) -> dict[str, dict[str, float]]:
    """Views a second, and the share of codes that differ from plain float32, with torch.compile, bf16, and both."""
    sides, few = [extraction.crop_side(manifest)], range(min(FEW, manifest.images))
    crops = torch.from_numpy(np.stack([center_crops(decode(folder.paths[i]), sides)[0] for i in few]))
    rows, plain = {}, None
    for name, dtype, compiled in (
        ("fp32", torch.float32, False),
        ("fp32 compiled", torch.float32, True),
        ("bf16", torch.bfloat16, False),
        ("bf16 compiled", torch.bfloat16, True),
    ):
        other = extraction.Encoder(
            encoder.tokenizer, encoder.device, batch_size=encoder.batch_size, precision=dtype, compiled=compiled
        )
        call = partial(other.codes, [crops], manifest.image_size, manifest.view_mode)
        codes = call()
        plain = codes if plain is None else plain
        seconds = min(durations(call, 2, encoder.device, warmup=0))
        rows[name] = {
            "views_per_s": codes.shape[0] * codes.shape[1] / seconds,
            "changed": float((codes != plain).float().mean()),
        }
        print(
            f"{name:<14} {rows[name]['views_per_s']:>8.1f} views/s, {rows[name]['changed']:.3%} of the codes are others"
        )
    return rows


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=cli.existing_folder, help="an ImageFolder; default: JPEGs made for this")
    add("--images", type=cli.positive_int, default=2000, help="images to extract")
    add("--loop-images", type=cli.positive_int, default=1000, help="images for the loop that takes one at a time")
    add("--vq-model", choices=PRESETS, default="VQ-16")
    add("--vq-ckpt", type=cli.existing_file)
    add("--image-size", type=cli.positive_int, default=64)
    add("--ten-crop", action="store_true")
    add("--crop-range", type=cli.positive, nargs="+", default=[1.1])
    add("--no-flip", action="store_true")
    add("--batch-size", type=cli.positive_int, help="views encoded at once; default as in the extraction")
    add("--num-workers", type=cli.count, help="default as in the extraction")
    add("--compare", action="store_true", help="also torch.compile and bf16")
    return parser.parse_args()


def manifests_of(args: argparse.Namespace, images: int, tokenizer: VQModel, classes: list[str]) -> list[Manifest]:
    mode = "ten-crop" if args.ten_crop else "single" if args.no_flip else "flip"
    return [
        Manifest(
            "benchmark", args.image_size, images, VIEWS[mode], (args.image_size // tokenizer.downsample) ** 2,
            tokenizer.config.codebook_size, view_mode=mode, crop_range=crop_range, classes=classes,
        )
        for crop_range in (args.crop_range if args.ten_crop else (None,))
    ]  # fmt: skip


def rates_of(device: torch.device) -> dict[str, float]:
    return {"matmul_flops": matmul_rate(device, torch.float32), "conv_flops": conv_rate(device)}


def share_that_differs(codes: Codes, loop: Path, images: int) -> float:
    """The share of the loop's codes that the extraction's (its first crop range) differ from."""
    wrong = []
    for i in range(images):
        one_VL = np.load(loop / "codes" / f"{i}.npy")[0]
        wrong.append(codes.batch(np.full(len(one_VL), i), np.arange(len(one_VL)))[0] != one_VL)
    return float(np.mean(wrong))


def measure(args: argparse.Namespace, folder: ImageFolder, tokenizer: VQModel, device: torch.device, out: Path) -> dict:
    """The loop, the extraction, its stages, the machine's rates."""
    manifests = manifests_of(args, min(args.images, len(folder)), tokenizer, folder.classes)
    loop = manifests_of(args, min(args.loop_images, manifests[0].images), tokenizer, folder.classes)[0]
    images, views, size = manifests[0].images, sum(m.views for m in manifests), args.image_size
    flops = flops_a_view(tokenizer, size, device)
    batch = args.batch_size or extraction.fitting_batch(tokenizer.config, size, device)
    workers = workers_of(args, World(0, 1, device))
    print(f"{images} images of {size} px, {views} views each, {flops / 1e9:.2f} GFLOP a view")
    print(f"{batch} views at once, {workers} reading processes")

    (out / "loop").mkdir()
    loop_s = one_by_one(folder, loop, tokenizer, out / "loop", device)
    keep_freed_memory()  # not before: it is a part of what is compared
    before = rates_of(device)
    encoder = TimedEncoder(
        tokenizer, device, batch_size=batch, precision=torch.float32, compiled=device.type == "cuda"
    )  # fmt: skip
    encoder.codes([torch.zeros(batch, size, size, 3, dtype=torch.uint8)], size, "single")
    encoder.seconds = 0.0
    seconds = batched(folder, manifests, encoder, out / "packed", workers)
    encoding = encoder.seconds
    rates = {key: max(rate, before[key]) for key, rate in rates_of(device).items()}
    ours, theirs = size_of(out / "packed") / images, size_of(out / "loop") / loop.images * len(manifests)
    return {
        "batch": batch,
        "workers": workers,
        "images_per_s": images / seconds,
        "views_per_s": images * views / seconds,
        "loop_images_per_s": loop.images / loop_s,
        "loop_views_per_s": loop.images * loop.views / loop_s,
        "not_encoder": 1 - encoding / seconds,
        "encoder_flops": flops * images * views / encoding,
        **rates,
        "bytes": ours,
        "bytes_ratio": theirs / ours,
        "differ": share_that_differs(Codes(out / "packed" / "0", "benchmark", size), out / "loop", loop.images),
        "ms": stages(folder, manifests, encoder, out / "stages"),
        "compare": compare(folder, manifests[0], encoder) if args.compare else {},
    }


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.vq_ckpt)[0] if args.vq_ckpt else VQModel(PRESETS[args.vq_model]).eval()
    tokenizer.requires_grad_(False).to(device)
    if args.image_size % tokenizer.downsample:
        raise cli.InputError(f"--image-size {args.image_size} is no multiple of the tokenizer's {tokenizer.downsample}")
    root = args.data_path or make_jpegs(Path(tempfile.gettempdir()) / f"npp-jpegs-{args.images}", args.images)
    machine = card(device)
    print(machine)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args, ImageFolder(root), tokenizer, device, Path(temporary))
    report(result)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    finish({**machine, "benchmark": "extract", **arguments, **result})


def report(r: dict) -> None:
    print("stage       ms an image alone")
    for name, ms in r["ms"].items():
        print(f"{name:<10} {ms:>10.3f}")
    print(f"extraction {r['images_per_s']:.2f} images/s, {r['views_per_s']:.2f} views/s")
    print(f"one by one {r['loop_images_per_s']:.2f} images/s, {r['loop_views_per_s']:.2f} views/s")
    print(f"ratio      {r['views_per_s'] / r['loop_views_per_s']:.2f}; codes that differ {r['differ']:.4%}")
    print(
        f"encoder    {r['encoder_flops'] / 1e9:.0f} GFLOP/s, {r['encoder_flops'] / r['conv_flops']:.1%} of a wide 3x3 "
        f"convolution's {r['conv_flops'] / 1e9:.0f}, {r['encoder_flops'] / r['matmul_flops']:.1%} of the matmul's "
        f"{r['matmul_flops'] / 1e9:.0f}; everything else {r['not_encoder']:.1%} of the time"
    )
    print(f"disk       {r['bytes']:.1f} bytes an image, {r['bytes_ratio']:.2f} times less than int64 files")


if __name__ == "__main__":
    cli.run(main)
