"""What a user may choose of the pipeline. What is not given is chosen from the data and the device (plan.py)."""

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from pydantic import AfterValidator, BeforeValidator, StringConstraints, model_validator
from typing_extensions import Self

from autoregressive.models.gpt import PRESETS as GPT_PRESETS
from autoregressive.sample.sample_c2i_ddp import SampleSettings
from autoregressive.train.gpt_task import TrainSettings
from dataset.images import ImageSettings
from evaluations.c2i.train_classifier import ClassifierSettings
from tokenizer.tokenizer_image.vq_model import PRESETS as VQ_PRESETS
from tokenizer.tokenizer_image.vq_settings import TokenizerSettings
from utils.cli import InputError
from utils.settings import AtLeastOne, FractionBelowOne, PositiveInt, Settings, one_of, setting

DECIDED = frozenset((  # by the pipeline itself
    "data-path", "val-path", "out", "results-dir", "code-path", "val-code-path", "sample-dir", "vq-ckpt", "gpt-ckpt",
    "gpt-model", "vq-model", "image-size", "dataset", "background", "exif-orientation", "fresh", "dry-run", "init-classes",
))  # fmt: skip
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LARGEST_BUDGET = 365 * 86400  # seconds


def _seconds(text: Any) -> float:
    """90, 90s, 30m, 2h or 1d in seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", str(text).strip())
    seconds = float(match[1]) * UNITS[match[2] or "s"] if match else 0.0
    if not 0 < seconds <= LARGEST_BUDGET:
        raise ValueError(f"expected a time such as 30m, 2h or 900s, got {str(text)[:40]!r}")
    return seconds


def parse_flags(text: str) -> dict[str, list[str]]:
    """`--lr 1e-3 --ema --name=x` as {"--lr": ["1e-3"], "--ema": [], "--name": ["x"]}. Raises ValueError for no flags."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"expected flags as on a command line, got {text[:60]!r} ({error})") from None
    if words and not words[0].startswith("--"):
        raise ValueError(f"expected flags such as '--lr 1e-3', got {text[:60]!r}")
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found[name] = [value] if equals else []
        else:
            found[name].append(word)
    return found


def flags_of(stage: type[Settings]) -> Any:
    """The type of a setting that holds more flags of a stage: those that it knows and the pipeline does not decide."""
    fields = {name.replace("_", "-"): str(field.annotation) for name, field in stage.model_fields.items()}
    known = {*fields, *(f"no-{name}" for name, annotation in fields.items() if "bool" in annotation)}

    def check(text: str) -> str:
        for flag in parse_flags(text):
            if flag[2:] not in known:
                raise ValueError(f"unknown flag {flag}")
            if flag[2:] in DECIDED:
                raise ValueError(f"{flag} is set by the pipeline; leave it out, or give it to the pipeline itself")
        return text

    return Annotated[str, AfterValidator(check)]


Word = Annotated[str, StringConstraints(pattern=r"^[\w.+-]{1,60}$"), "a word of letters, digits and ._+-"]
ImageSize = Annotated[int, Interval(ge=16, le=1024), "a whole number from 16 to 1024"]


class PipelineSettings(ImageSettings):
    """The settings of the pipeline; see --help."""

    images: Path = setting(
        help="a folder of images (one folder a class, or flat; train/ beside test/), a .zip or .tar of one, or a .csv of "
        "file and label",
        free=True,
    )
    run: Path | None = setting(None, "folder for everything that is made; default: runs/NAME", free=True)
    name: Word | None = setting(None, "a word for the data; default: from --images")
    dry_run: bool = setting(False, "print the plan and the commands, and stop", free=True)
    time_budget: Annotated[float, BeforeValidator(_seconds)] | None = setting(
        None, "what the plan aims at, such as 30m or 2h; default: 30m on a CPU, 1h on a GPU", metavar="TIME"
    )

    image_size: ImageSize | None = setting(None, "side of the images in pixels")
    test_share: FractionBelowOne = setting(0.1, "of each class, held out for figures, where there is no test/")
    no_flip: bool = setting(False, "don't mirror images: for letters, digits and whatever has a left and a right")
    tokenizer: str | None = setting(None, "train, a published name or a file", metavar="train|WEIGHTS")
    vq_model: one_of(VQ_PRESETS) | None = setting(None, "preset of a tokenizer that is trained")
    init: str | None = setting(None, "fine-tune this GPT: a published name or a file", metavar="WEIGHTS")
    init_classes: list[str] | None = setting(
        None, "with --init: classes that begin as one of its own", metavar="NAME=OLD"
    )
    gpt_model: one_of(GPT_PRESETS) | None = setting(None, "preset of the GPT")
    patch_level: PositiveInt | None = setting(None, "levels of patches; 1: single codes only")
    epochs: PositiveInt | None = setting(None, "of the GPT")
    batch_size: PositiveInt | None = setting(
        None, "images a step of tokenizer and GPT; less where it has to divide by the number of processes"
    )
    cfg_scale: AtLeastOne = setting(2.0, "guidance of the samples; 1 is off")
    samples: PositiveInt | None = setting(None, "images to draw for the figures")
    reference_images: PositiveInt = setting(10000, "training images that samples are compared with, at most")
    test_images: PositiveInt = setting(5000, "test images that figures are measured with, at most")
    network: str | None = setting(
        None, "whose features figures are in: train (a classifier), inception, none, or a .pt2", metavar="NETWORK"
    )

    classifier_flags: flags_of(ClassifierSettings) = setting(
        "", 'more flags of train_classifier.sh, in quotes: ="--epochs 5"', metavar="FLAGS"
    )
    tokenizer_flags: flags_of(TokenizerSettings) = setting("", "more flags of train_vq.sh", metavar="FLAGS")
    gpt_flags: flags_of(TrainSettings) = setting("", "more flags of train_c2i.sh", metavar="FLAGS")
    sample_flags: flags_of(SampleSettings) = setting("", "more flags of sample_c2i.sh", metavar="FLAGS")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.init_classes and not self.init:
            raise ValueError("--init-classes says how classes of --init are taken over: give that, too")
        if self.vq_model and self.tokenizer not in (None, "train"):
            raise ValueError("--vq-model is for a tokenizer that is trained: leave it out, or give --tokenizer train")
        return self

    def given(self, stage: str) -> dict[str, list[str]]:
        """The flags given for a stage, with their values."""
        return parse_flags(getattr(self, f"{stage}_flags"))

    def given_number(self, stage: str, flag: str) -> int | None:
        """A number among the flags given for a stage. Raises InputError for one that is no whole number above 0."""
        words = self.given(stage).get(flag)
        if words is None:
            return None
        if len(words) != 1 or not words[0].isdecimal() or not 0 < int(words[0]) < 1 << 20:
            raise InputError(f"--{stage}-flags {flag}: expected a whole number of at least 1, got {' '.join(words)!r}")
        return int(words[0])
