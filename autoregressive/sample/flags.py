"""What both samplers share: flags, names of classes, a progress bar that counts codes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import model_validator
from typing_extensions import Self

from autoregressive.models.gpt import PRESETS
from autoregressive.models.guidance import POWER, SCHEDULES, guidance_scales
from autoregressive.models.sampler import ImageSampler
from pretrained_models.catalogue import WeightsFile, published_sampling
from utils import cli
from utils.distributed import precision_dtype
from utils.log import progress
from utils.settings import Count, ImageSize, Positive, PositiveFraction, PositiveInt, Settings, one_of, setting

WNID = re.compile(r"n\d{8}")  # how ImageNet's class folders are named


class DrawingSettings(Settings):
    """How images are drawn, less the guidance scale: of a command, or of a request to the demo."""

    image_size_eval: ImageSize | None = setting(None, "resize samples to this (bicubic); default: as drawn")
    cfg_schedule: one_of(SCHEDULES) = setting("constant", "how guidance grows from 1 to --cfg-scale")
    cfg_power: Positive | None = setting(None, f"of --cfg-schedule power-cosine; default: {POWER}")
    cfg_interval: list[int] = setting(
        [-1],
        "C guides only the first C + 2 codes (-1: all); FIRST STOP only the codes from FIRST up to, not including, STOP",
    )
    temperature: Positive = setting(1.0)
    top_k: Count = setting(0, "0: off")
    top_p: PositiveFraction = setting(1.0, "1: off")

    @model_validator(mode="after")
    def _power_has_a_use(self) -> Self:
        if self.cfg_power is not None and self.cfg_schedule != "power-cosine":
            raise ValueError(
                f"--cfg-power {self.cfg_power} is for --cfg-schedule power-cosine, not {self.cfg_schedule}"
            )
        return self

    @property
    def drawing(self) -> dict[str, Any]:
        """Arguments of ImageSampler.__call__, less the guidance scale."""
        return {
            "size": self.image_size_eval, "cfg_schedule": self.cfg_schedule, "cfg_power": self.cfg_power or POWER,
            "cfg_interval": self.cfg_interval, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p,
        }  # fmt: skip


class SamplerSettings(DrawingSettings):
    """The published sampling flags, less --cfg-scale, of which one sampler takes several."""

    gpt_model: one_of(PRESETS) | None = setting(
        None, "insist on this preset; needed for files that don't say (published ones)"
    )
    gpt_ckpt: WeightsFile = setting(help="a file, a published name, or hf://user/repo/file")
    weights: Literal["auto", "model", "ema"] = setting(
        "auto", "auto: the average (EMA) where the checkpoint has one that is no worse than the weights"
    )
    vq_model: str | None = setting(None, "insist on this tokenizer preset; default: what the file says")
    vq_ckpt: WeightsFile = setting(help="a file, a published name, or hf://user/repo/file")
    image_size: ImageSize | None = setting(None, "default: what the GPT was trained at; 256 for files that don't say")
    num_classes: PositiveInt | None = setting(None, "checked against the GPT file, which says it")
    precision: Literal["auto", "none", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto: bf16 where the device computes in it"
    )
    compile: bool | None = setting(None, "torch.compile of both models; default: on GPUs", free=True)

    def as_published(self, *flags: str) -> Self:
        """With the settings that published weights' figures were drawn with for those flags that were not given; prints them.

        Only at the published image size: at another one the weights were trained for something else.
        """
        published = published_sampling(self.gpt_ckpt)
        if self.image_size not in (None, published.get("image_size")):
            return self
        taken = {flag: published[flag] for flag in flags if flag in published and getattr(self, flag) is None}
        if taken:
            words = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in taken.items())
            cli.note(f"{words}: {published['why']}")
        return self.model_copy(update=taken)

    def sampler(self, device: torch.device, batch_size: int) -> ImageSampler:
        """Both models. Raises InputError for what does not fit."""
        sampler = ImageSampler.from_pretrained(
            self.gpt_ckpt, self.vq_ckpt, gpt_model=self.gpt_model, vq_model=self.vq_model, weights=self.weights,
            image_size=self.image_size, device=device, dtype=precision_dtype(self.precision, device),
            batch_size=batch_size, compiled=self.compile,
        )  # fmt: skip
        classes = sampler.gpt.config.num_classes
        if self.num_classes not in (None, classes):
            raise cli.InputError(
                f"--num-classes {self.num_classes}, but {self.gpt_ckpt} has {classes} classes: leave it out"
            )
        guidance_scales(sampler.codes, 1.0, interval=self.cfg_interval)  # refuses an interval outside the image
        return sampler


def class_names(sampler: ImageSampler) -> list[str]:
    """The names of a GPT's classes: those of its file; ImageNet's words for its 1,000; else numbers."""
    classes, known = sampler.gpt.config.num_classes, sampler.gpt.about.get("classes")
    names = [str(name) for name in known][:classes] if isinstance(known, list) else []
    if classes == 1000 and (not names or (len(names) == 1000 and all(map(WNID.fullmatch, names)))):
        from torchvision.models import ResNet50_Weights  # imported here: it takes a second

        return ResNet50_Weights.DEFAULT.meta["categories"]
    return names + [f"class {i}" for i in range(len(names), classes)]


@contextmanager
def drawing_progress(
    images: int, codes: int, processes: int = 1, **options: Any
) -> Iterator[Callable[[torch.Tensor], None]]:
    """A bar of so many images, and an on_codes for it: it counts codes, so that the bar moves within a batch.

    processes: how many draw at the same pace as this one.
    """
    with progress(total=images * codes, unit=" images", unit_scale=1 / codes, **options) as bar:
        yield lambda codes_BL: bar.update(min(len(codes_BL) * processes, bar.total - bar.n))
