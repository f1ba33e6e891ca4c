"""Draw many images into one .npz for the evaluator, on any number of processes.

    bash scripts/autoregressive/sample_c2i.sh --vq-ckpt vq_ds16_c2i.pt --gpt-ckpt c2i_B_256.pt --gpt-model GPT-B \
        --image-size 256 --image-size-eval 256 --cfg-scale 2.0

Several --cfg-scale values give a file each. Image i of a seed is the same whatever the batch size and the number of
processes. Batches are kept beside the .npz until it is written, so the same command resumes a run that was cut off, with
any batch size and number of processes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from PIL import Image
from pydantic import model_validator
from typing_extensions import Self

from autoregressive.models.guidance import POWER
from autoregressive.models.sampler import ImageSampler
from autoregressive.sample.flags import SamplerSettings, drawing_progress
from utils import cli, samples, streams
from utils.distributed import World, join_world, precision_dtype
from utils.draw import save_image
from utils.files import check_folder, check_space, file_lock, sha256
from utils.log import progress
from utils.parts import Parts, is_whole
from utils.records import Record
from utils.settings import AtLeastOne, PositiveInt, Seed, differences, setting

PNG_BATCH = 64
WORDS = ("random", "balanced")


class SampleSettings(SamplerSettings):
    cfg_scale: list[AtLeastOne] | None = setting(
        None,
        "classifier-free guidance, 1 is off; several give a file each; default: as published for the weights, or 1.5",
    )
    num_fid_samples: PositiveInt = setting(50000, "images to draw")
    labels: list[str] = setting(
        ["random"], "random: as published; balanced: class i mod n; or classes, taken in turn", metavar="LABEL"
    )
    per_proc_batch_size: PositiveInt = setting(32, "images that a process draws at once", free=True)
    global_seed: Seed = setting(0)
    sample_dir: Path = setting(Path("samples"))
    save_png: bool = setting(False, "also write each image as a PNG, in a folder named like the .npz", free=True)

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> Self:
        if not ((self.labels[0] in WORDS and len(self.labels) == 1) or all(text.isdecimal() for text in self.labels)):
            raise ValueError(f"--labels {' '.join(self.labels)}: expected random, balanced, or only classes")
        return self

    def class_of_each(self, sampler: ImageSampler) -> np.ndarray:
        """Labels (N,) int64, each a function of (seed, image). Raises InputError for a class that the GPT does not know."""
        indices, classes = np.arange(self.num_fid_samples), sampler.gpt.config.num_classes
        if self.labels == ["random"]:
            return (streams.uniform(self.global_seed, streams.LABEL, indices) * classes).astype(np.int64)
        chosen = list(range(classes)) if self.labels == ["balanced"] else [int(text) for text in self.labels]
        sampler.check_labels(chosen, "--labels")
        return np.asarray(chosen, np.int64)[indices % len(chosen)]

    def file_name(self, sampler: ImageSampler, cfg_scale: float) -> str:
        """The published name of a samples file; settings that the published sampler lacks are named where they are in use."""
        gpt = _one_word(self.gpt_model or sampler.gpt.about.get("gpt_model") or "GPT")
        vq = _one_word(sampler.tokenizer.about["vq_model"])
        raw = "-raw" if self.weights == "model" else ""
        schedule = "" if self.cfg_schedule == "constant" else f"-{self.cfg_schedule}"
        schedule += f"-{self.cfg_power or POWER}" if self.cfg_schedule == "power-cosine" else ""
        interval = "" if self.cfg_interval == [-1] else "-interval-" + "-".join(map(str, self.cfg_interval))
        path = self.gpt_ckpt
        return (
            f"{gpt}-{path.stem if path.suffix in ('.pt', '.pth', '.safetensors') else path.name}{raw}-"
            f"size-{sampler.image_size}-size-{self.image_size_eval or sampler.image_size}-{vq}-"
            f"topk-{self.top_k}-topp-{self.top_p}-temperature-{self.temperature}-"
            f"cfg-{cfg_scale}{schedule}{interval}-seed-{self.global_seed}.npz"
        )


def _one_word(name: object) -> str:
    """A name that a file gives itself, as part of a file's name: it cannot lead into another folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in str(name))[:64]


class SampleRecord(Record):
    """What the images of a samples file depend on; written beside it as .json."""

    cfg_scale: float
    cfg_schedule: str
    cfg_power: float | None
    cfg_interval: list[int]
    temperature: float
    top_k: int
    top_p: float
    labels: list[int | str]
    num_fid_samples: int
    precision: str
    seed: int
    image_size: int
    image_size_eval: int
    weights: str
    gpt_sha256: str
    vq_sha256: str


def make_record(settings: SampleSettings, sampler: ImageSampler, world: World) -> dict[str, Any]:
    """The record's fields, less the guidance scale. Weights are hashed once, on the first process."""
    shared = settings.model_dump(include=SampleRecord.model_fields.keys() - {"cfg_scale", "image_size_eval"})
    gpt_sha256, vq_sha256 = world.from_main(lambda: (sha256(settings.gpt_ckpt), sha256(settings.vq_ckpt)))
    return shared | {
        "labels": [int(text) if text.isdecimal() else text for text in settings.labels],
        "precision": str(precision_dtype(settings.precision, sampler.device)).removeprefix("torch."),
        "seed": settings.global_seed,
        "image_size": sampler.image_size,
        "image_size_eval": settings.image_size_eval or sampler.image_size,
        "weights": sampler.gpt.about["weights"],
        "gpt_sha256": gpt_sha256,
        "vq_sha256": vq_sha256,
    }


def holds(path: Path, labels: np.ndarray, size: int) -> bool:
    """Whether a samples file has images of these labels and this size, undamaged (sizes and CRC). Reads all of it."""
    try:
        file = samples.Samples(path)
        if file.shape != (len(labels), size, size, 3) or not np.array_equal(file.labels, labels):
            return False
        return is_whole(path)
    except (cli.InputError, OSError):
        return False


def images_of(parts: Parts) -> Iterator[np.ndarray]:
    """What the parts hold, in order, in batches."""
    for part, path in parts.present():
        yield from samples.Samples(path).batches(len(part))


def check_room(outs: list[Path], bytes_each: int) -> None:
    """Raise InputError if samples files of so many bytes, and the parts of one of them, do not fit on the disk."""
    parts = [path for out in outs for path in out.with_suffix(".parts").glob("*.npz")]
    present = sum(path.stat().st_size for path in [*outs, *parts] if path.is_file())
    check_space(outs[0].parent, bytes_each * (len(outs) + 1), present)


def is_complete(out: Path, record: SampleRecord, labels: np.ndarray) -> bool:
    """Whether a samples file is finished. Raises InputError for one of other settings, or of settings that are not known."""
    beside, started = out.with_suffix(".json"), out.with_suffix(".parts") / "settings.json"
    if out.is_file() and not beside.is_file():
        raise cli.InputError(f"{out} exists without its .json, so how it was drawn is unknown: move or delete it")
    for path in (beside, started):
        other = SampleRecord.read_if_present(path)
        if other and (changes := differences(other.plain(), record.plain())):
            raise cli.InputError(
                f"{path} belongs to samples of other settings ({'; '.join(changes)}): "
                "delete them or give another --sample-dir"
            )
    if not out.is_file():
        return False
    if holds(out, labels, record.image_size_eval):
        return True
    cli.note(f"{out} is damaged: making it again")
    return False


def save_pngs(path: Path) -> None:
    """Write the images of a samples file as FOLDER/000000.png, those that do not exist yet."""
    file, folder = samples.Samples(path), path.with_suffix("")
    start = 0
    with ThreadPoolExecutor() as pool, progress(total=len(file), desc="PNG", unit=" images") as bar:
        for images in file.batches(PNG_BATCH):
            paths = [folder / f"{i:06d}.png" for i in range(start, start + len(images))]
            new = [(p, Image.fromarray(image)) for p, image in zip(paths, images, strict=True) if not p.is_file()]
            list(pool.map(lambda item: save_image(*item), new))
            start += len(images)
            bar.update(len(images))


def draw(
    sampler: ImageSampler, settings: SampleSettings, out: Path, record: SampleRecord, labels: np.ndarray, world: World
) -> None:
    """Draw the images of a file that are not in parts yet, each process its share, and write the file."""
    parts, size = Parts(out, len(labels)), record.image_size_eval
    if world.is_main:
        record.write(parts.folder / "settings.json")
    missing = world.from_main(
        lambda: parts.missing(settings.per_proc_batch_size, lambda part, path: holds(path, labels[part], size)),
        slow=True,
    )
    total, title = sum(map(len, missing)), f"guidance {record.cfg_scale}"
    with drawing_progress(total, sampler.codes, world.size, desc=title, show=world.is_main) as count:
        for part in missing[world.rank :: world.size]:
            images = sampler(
                labels[part], cfg_scale=record.cfg_scale, seed=settings.global_seed, indices=np.array(part),
                on_codes=count, **settings.drawing,
            )  # fmt: skip
            samples.write(parts.path(part), [images], images.shape, labels[part])
    world.barrier()
    if world.is_main:
        record.write(out.with_suffix(".json"))
        samples.write(out, images_of(parts), (len(labels), size, size, 3), labels)
        parts.remove()
        print(f"wrote {out}: {len(labels)} images of {size} px")


def main() -> None:
    settings = SampleSettings.from_command_line(__doc__).as_published("image_size", "image_size_eval", "cfg_scale")
    given = settings.cfg_scale
    scales = given if isinstance(given, list) else [given or 1.5]
    check_folder(settings.sample_dir)
    with join_world() as world, ExitStack() as stack:
        sampler = settings.sampler(world.device, settings.per_proc_batch_size)
        size = settings.image_size_eval or sampler.image_size
        outs = [settings.sample_dir / settings.file_name(sampler, scale) for scale in scales]
        world.from_main(lambda: check_room(outs, settings.num_fid_samples * size * size * 3))
        labels = settings.class_of_each(sampler)
        world.check_shared(settings.sample_dir)
        fields = make_record(settings, sampler, world)
        records = {out: SampleRecord(cfg_scale=scale, **fields) for out, scale in zip(outs, scales, strict=True)}

        def finished() -> list[Path]:
            for out in records:
                stack.enter_context(file_lock(out))
            return [out for out, record in records.items() if is_complete(out, record, labels)]

        complete = world.from_main(finished, slow=True)
        for out, record in records.items():
            if out not in complete:
                draw(sampler, settings, out, record, labels, world)
        if world.is_main:
            for out in records:
                if out in complete:
                    print(f"{out} is complete already")
                Parts(out, len(labels)).remove()
                if settings.save_png:
                    save_pngs(out)


if __name__ == "__main__":
    cli.run(main)
