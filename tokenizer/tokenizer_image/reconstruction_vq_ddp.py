"""Reconstruct a folder of images with a tokenizer into one .npz for the evaluator; say PSNR, SSIM and codes in use.

    bash scripts/tokenizer/reconstruct_vq.sh --data-path imagenet/val --vq-model VQ-16 \
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt --image-size 256

Batches are dealt out to the processes and written in the order of the sorted folder, with labels. What was cut off resumes.
Images that cannot be read are skipped. Beside NAME.npz stand NAME.json (figures, and what it is made of; the same command
does not make it again), NAME.png (images and their reconstructions, the worst ones too) and NAME-reference.npz: the
evaluator's rFID is

    python3 evaluations/c2i/evaluator.py NAME-reference.npz NAME.npz
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch

from dataset.images import CropRequest, ImageFolder, ImageSettings, check_some_readable, read_crops, skipped_text
from dataset.listing import ImagesPath
from pretrained_models.catalogue import WeightsFile
from tokenizer.tokenizer_image.perceptual import LPIPS, lpips_is_here
from tokenizer.tokenizer_image.similarity import WINDOW, figures
from tokenizer.tokenizer_image.vq_model import Tokenizer, VQConfig, VQModel, code_health
from utils import cli, draw, samples
from utils.distributed import World, join_world
from utils.download import recorded_sha256
from utils.files import atomic_path, check_output, check_space, file_lock, write_json
from utils.log import progress
from utils.parts import Parts, is_whole
from utils.pixels import resize, to_float, to_uint8
from utils.records import Record, read_json
from utils.settings import Count, ImageSize, PositiveInt, differences, setting

COLUMNS = 8  # of the picture


class ReconstructionSettings(ImageSettings):
    """The settings of a reconstruction; see --help."""

    data_path: ImagesPath = setting(help="a folder of images: one folder a class, or flat", free=True)
    vq_model: str | None = setting(
        None, "insist on this tokenizer preset; default: what the file says, or what its tensors are of", free=True
    )
    vq_ckpt: WeightsFile = setting(help="tokenizer weights", free=True, metavar="WEIGHTS")
    image_size: ImageSize = setting(256)
    image_size_eval: ImageSize | None = setting(None, "resize images and reconstructions to this (bicubic)")
    num_images: PositiveInt | None = setting(None, "evenly spaced over the sorted folder; default: all")
    per_proc_batch_size: PositiveInt = setting(32, "images at once", free=True)
    num_workers: Count = setting(0, "processes that read images, for each that reconstructs", free=True)
    codebook_size: PositiveInt | None = setting(None, "insist on it", free=True)
    codebook_embed_dim: PositiveInt | None = setting(None, "insist on it", free=True)
    dataset: str | None = setting(
        None, "in the .npz's name; default: the name of the folder", free=True, metavar="NAME"
    )
    lpips: bool | None = setting(None, "measure LPIPS too; default: where its weights need no download")
    reference: bool = setting(True, "write the images themselves, too, to compare with")
    sample_dir: Path = setting(Path("reconstructions"), free=True)
    out: Path | None = setting(None, "the .npz; default: a name in --sample-dir that says what it holds", free=True)

    @property
    def final_size(self) -> int:
        return self.image_size_eval or self.image_size

    def out_path(self, vq_model: str, config: VQConfig) -> Path:
        """--out, or the published name. (Nothing is random here; its seed is 0.)"""
        sizes = f"size-{self.image_size}-size-{self.final_size}"
        codebook = f"codebook-size-{config.codebook_size}-dim-{config.codebook_embed_dim}"
        name = f"{vq_model}-{self.dataset or self.data_path.resolve().name}-{sizes}-{codebook}-seed-0.npz"
        return self.out or self.sample_dir / name

    def check(self, model: VQModel, vq_model: str) -> None:
        """Raise InputError for what the tokenizer is not, or for sizes that do not fit it."""
        for name in ("codebook_size", "codebook_embed_dim"):
            wanted, known = getattr(self, name), getattr(model.config, name)
            if wanted not in (None, known):
                raise cli.InputError(f"--{name.replace('_', '-')} {wanted}, but that of {self.vq_ckpt} is {known}")
        if self.image_size % model.downsample:
            raise cli.InputError(
                f"--image-size {self.image_size} is no multiple of {model.downsample}, the side of a code of {vq_model}"
            )
        if self.final_size < WINDOW:
            raise cli.InputError(
                f"images of {self.final_size} px are too small for SSIM, which takes {WINDOW} px and more"
            )


class ReconstructionRecord(Record):
    """The .json beside the .npz: what was made of what, and how good it is."""

    images: int
    psnr: float
    mse: float
    ssim: float | None = None
    ssim_published: float | None = None
    lpips: float | None = None
    codebook_usage: float | None = None
    perplexity: float | None = None
    dead_codes: int | None = None
    vq_model: str
    weights: str
    settings: dict[str, Any] = {}
    bytes: int | None = None
    skipped: list[dict[str, Any]] = []


@torch.inference_mode()
def reconstruct(
    s: ReconstructionSettings, model: VQModel, folder: ImageFolder, mine: dict[Path, np.ndarray], world: World,
    perceptual: LPIPS | None,
) -> None:  # fmt: skip
    """Write the parts of this process, what is of an image by rows: images, reconstructions, codes and figures.

    mine: the images of each file. perceptual: LPIPS, if it is to be measured; its mean over a batch stands for each image of
    the batch.
    """
    requests = [CropRequest(indices, (s.image_size,)) for indices in mine.values()]
    batches = read_crops(folder, requests, workers=s.num_workers)
    total = sum(map(len, mine.values()))
    with progress(total=total, desc="reconstructing", unit=" images", show=world.is_main) as bar:
        for (path, indices), batch in zip(mine.items(), batches, strict=True):
            arrays = {"images": batch.images, "skipped": json.dumps(batch.skipped)}
            if len(batch.images):
                images = to_float(torch.from_numpy(batch.crops[0]).to(world.device))
                images = images.contiguous(memory_format=torch.channels_last)
                codes_BHW = model.encode(images)
                scaled, decoded = (resize(x, s.final_size) for x in (images, model.decode_code(codes_BHW)))
                kept, made = to_uint8(scaled), to_uint8(decoded)
                tensors = {"originals": kept, "pixels": made, "codes": codes_BHW.int(), **figures(kept, made)}
                if perceptual:
                    tensors["lpips"] = perceptual(to_float(kept), to_float(made)).double().expand(len(kept))
                arrays |= {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            with atomic_path(path) as temporary:
                np.savez(temporary, **arrays)
            bar.update(len(indices))


def read_parts(paths: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    """What the parts hold under a name; one without a readable image holds `images` and `skipped` only."""
    for path in paths:
        with np.load(path) as part:
            if name in part:
                yield part[name]


def all_figures(paths: Sequence[Path], codebook_size: int) -> dict[str, float]:
    """Means over the images of all parts, and the use of the codebook."""
    columns = {name: list(read_parts(paths, name)) for name in ("psnr", "mse", "ssim", "ssim_published", "lpips")}
    means = {name: float(np.concatenate(values).mean()) for name, values in columns.items() if values}
    counts_V = sum(np.bincount(codes.flatten(), minlength=codebook_size) for codes in read_parts(paths, "codes"))
    return {**means, **code_health(torch.from_numpy(counts_V))}


def draw_pairs(out: Path, paths: Sequence[Path]) -> None:
    """Images above their reconstructions: evenly spaced ones, and those with the largest errors, worst first."""
    error_N = np.concatenate(list(read_parts(paths, "mse")))
    columns = min(COLUMNS, len(error_N))
    even, worst = np.arange(columns) * len(error_N) // columns, np.argsort(-error_N, kind="stable")[:columns]
    images_of = zip(paths, read_parts(paths, "images"), strict=True)
    places = [(path, row) for path, images in images_of for row in range(len(images))]

    def picture(i: int, name: str) -> np.ndarray:
        path, row = places[i]
        with np.load(path) as arrays:
            return arrays[name][row]

    rows = [picture(i, name) for chosen in (even, worst) for name in ("originals", "pixels") for i in chosen]
    names = ("images", "decoded", "images with the largest errors", "decoded")
    draw.save_image(out, draw.image_grid(np.stack(rows), columns, names, max(1, 64 // rows[0].shape[0])))


def is_complete(out: Path, settings: dict[str, Any], replace: bool) -> bool:
    """Whether `out` was made with these settings, as its record says.

    Raises InputError if it was made with others, unless they may be replaced: the published name does not tell checkpoints
    apart.
    """
    record = ReconstructionRecord.read_if_present(out.with_suffix(".json"))
    whole = record is not None and out.is_file() and out.stat().st_size == record.bytes
    different = differences(record.settings, settings, defaults=ReconstructionSettings.defaults()) if whole else []
    if different and not replace:
        raise cli.InputError(
            f"{out} was made with {', '.join(different[:3])}: give another name by --out, or delete it"
        )
    return whole and bool(record.settings) and not different


def main() -> None:
    s = ReconstructionSettings.from_command_line(__doc__)
    if s.out:
        check_output(s.out, (".npz",))
    folder = s.image_folder(s.data_path)
    model = Tokenizer.from_pretrained(s.vq_ckpt, s.vq_model)
    vq_model = model.about["vq_model"]
    s.check(model, vq_model)
    chosen = folder.evenly_spaced(s.num_images)
    n = len(chosen)
    out = check_output(s.out_path(vq_model, model.config), (".npz",))
    cli.note(folder.summary())
    parts = Parts(out, n)
    present = sum(path.stat().st_size for path in [out, *(path for _, path in parts.present())] if path.is_file())
    check_space(out.parent, 4 * n * 3 * s.final_size**2, present)  # images and reconstructions, in parts and whole
    made_of = {key: value for key, value in s.plain().items() if key not in s.free()}
    made_of |= {
        "lpips": lpips_is_here() if s.lpips is None else s.lpips,
        "content_id": folder.content_id(), "vq_model": vq_model, "tokenizer_sha256": recorded_sha256(s.vq_ckpt),
    }  # fmt: skip
    with join_world() as world, ExitStack() as locks:
        world.check_shared(out.parent)
        world.from_main(lambda: locks.enter_context(file_lock(out)))
        if world.from_main(lambda: is_complete(out, made_of, replace=s.out is not None)):
            if world.is_main:
                print(f"{out} is complete already")
            return

        def missing() -> list[range]:
            started, known = parts.folder / "settings.json", None
            with suppress(cli.InputError):  # what cannot be read counts as other settings
                known = read_json(started)
            if known != made_of:
                parts.remove()
                write_json(started, made_of)
            return parts.missing(s.per_proc_batch_size, lambda _, path: is_whole(path))

        todo = world.from_main(missing, slow=True)[world.rank :: world.size]
        perceptual = LPIPS().to(world.device) if made_of["lpips"] else None
        model.to(world.device, memory_format=torch.channels_last)
        reconstruct(s, model, folder, {parts.path(part): chosen[part] for part in todo}, world, perceptual)
        world.barrier()
        if world.is_main:
            paths = [path for _, path in parts.present()]
            skipped = [row for text in read_parts(paths, "skipped") for row in json.loads(str(text))]
            check_some_readable(folder, skipped, n)
            found = all_figures(paths, model.config.codebook_size)
            kept = np.concatenate(list(read_parts(paths, "images")))
            shape = (len(kept), s.final_size, s.final_size, 3)
            if s.reference:
                reference = out.with_name(f"{out.stem}-reference.npz")
                samples.write(reference, read_parts(paths, "originals"), shape, folder.labels[kept])
            samples.write(out, read_parts(paths, "pixels"), shape, folder.labels[kept])
            draw_pairs(out.with_suffix(".png"), paths)
            ReconstructionRecord(
                images=len(kept), **found, vq_model=vq_model, weights=model.about["weights"], settings=made_of,
                bytes=out.stat().st_size, skipped=skipped,
            ).write(out.with_suffix(".json"))  # fmt: skip
            parts.remove()
            if skipped:
                print(skipped_text(skipped, n))
            print(f"wrote {out}: {len(kept)} images of {s.final_size} px, {in_words(found)}")


def in_words(found: dict[str, float]) -> str:
    lpips = f", LPIPS {found['lpips']:.4f}" if "lpips" in found else ""
    return (
        f"PSNR {found['psnr']:.3f}, SSIM {found['ssim']:.4f} ({found['ssim_published']:.4f} by the published data range of 2)"
        f"{lpips}, MSE {found['mse']:.6f} (pixels in 0..1), {found['codebook_usage']:.1%} of the codes in use, "
        f"perplexity {found['perplexity']:.1f}"
    )


if __name__ == "__main__":
    cli.run(main)
