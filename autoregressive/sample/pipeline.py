"""What both samplers share: flags, the two models, and images from labels."""

import re
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.models import ResNet50_Weights

from autoregressive.models.generate import SCHEDULES, Decoder, guidance_scales
from autoregressive.models.gpt import PRESETS, Transformer
from autoregressive.models.load import load_gpt
from pretrained_models.catalogue import published_sampling, weights_file
from tokenizer.tokenizer_image.load import load_tokenizer
from utils import cli, streams
from utils.distributed import precision_dtype
from utils.log import progress
from utils.pixels import resize, to_uint8

POWER = 2.75  # of power-cosine, as in RAR (arXiv 2411.00776)
WNID = re.compile(r"n\d{8}")  # how ImageNet's class folders are named


def add_flags(parser: ArgumentParser) -> None:
    """The published sampling flags, less --cfg-scale, of which one sampler takes several."""
    add = parser.add_argument
    add("--gpt-model", choices=PRESETS, help="insist on this preset; needed for files that don't say (published ones)")
    add("--gpt-ckpt", type=weights_file, required=True, help="a file, a published name, or hf://user/repo/file")
    add(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: the EMA where the checkpoint has one"
    )
    add("--vq-model", help="insist on this tokenizer preset; default: what the file says")
    add("--vq-ckpt", type=weights_file, required=True, help="a file, a published name, or hf://user/repo/file")
    add(
        "--image-size", type=cli.positive_int, help="default: what the GPT was trained at; 256 for files that don't say"
    )
    add("--image-size-eval", type=cli.positive_int, help="resize samples to this (bicubic); default: as drawn")
    add("--num-classes", type=cli.positive_int, default=1000, help="of a GPT file that doesn't say")
    add("--cfg-schedule", choices=SCHEDULES, default="constant", help="how guidance grows from 1 to --cfg-scale")
    add("--cfg-power", type=cli.positive, help=f"of --cfg-schedule power-cosine; default: {POWER}")
    add(
        "--cfg-interval",
        type=int,
        nargs="+",
        default=[-1],
        help="C guides only the first C + 2 codes (-1: all); FIRST STOP only the codes from FIRST up to, not including, STOP",
    )
    add("--temperature", type=cli.positive, default=1.0)
    add("--top-k", type=cli.count, default=0, help="0: off")
    add("--top-p", type=cli.positive_fraction, default=1.0, help="1: off")
    add("--precision", choices=("auto", "none", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on GPUs")
    add("--compile", action=BooleanOptionalAction, default=None, help="torch.compile of both models; default: on GPUs")


def use_published(args: Namespace, *flags: str) -> None:
    """Give these flags, where they were not given, the setting that published weights' figures were drawn with; say so.

    Only at the published image size: at another one the weights were trained for something else.
    """
    settings = published_sampling(args.gpt_ckpt)
    if args.image_size not in (None, settings.get("image_size")):
        return
    taken = {flag: settings[flag] for flag in flags if flag in settings and getattr(args, flag) is None}
    for flag, value in taken.items():
        setattr(args, flag, value)
    if taken:
        words = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in taken.items())
        cli.note(f"{words}: {settings['why']}")


def check_guidance(args: Namespace, codes: int) -> None:
    """InputError for guidance flags that make no sense, also for images of so many codes."""
    if args.cfg_power is not None and args.cfg_schedule != "power-cosine":
        raise cli.InputError(
            f"--cfg-power {args.cfg_power} is for --cfg-schedule power-cosine, not {args.cfg_schedule}"
        )
    interval = args.cfg_interval
    fits = (
        -1 <= interval[0] < codes
        if len(interval) == 1
        else len(interval) == 2 and 0 <= interval[0] < interval[1] <= codes
    )
    if not fits:
        raise cli.InputError(
            f"--cfg-interval {' '.join(map(str, interval))}: expected one number from -1 to {codes - 1}, "
            f"or two, FIRST STOP, with 0 <= FIRST < STOP <= {codes} (codes of an image)"
        )


def class_names(names: Sequence[str], classes: int) -> list[str]:
    """What to call so many classes: the checkpoint's names; ImageNet's words for its 1,000; else numbers."""
    if classes == 1000 and (not names or all(map(WNID.fullmatch, names))):
        return ResNet50_Weights.DEFAULT.meta["categories"]
    return list(names) or [f"class {i}" for i in range(classes)]


@dataclass
class Pipeline:
    """Both models, fitted to each other: labels in, uint8 images out."""

    gpt: Transformer
    tokenizer: torch.nn.Module
    args: Namespace
    names: dict[str, Any]
    image_size: int

    @classmethod
    def load(cls, args: Namespace) -> "Pipeline":
        """Read both checkpoints and check that they fit. Raises InputError otherwise."""
        tokenizer, vq_about = load_tokenizer(args.vq_ckpt, args.vq_model)
        size = args.image_size or 256
        published = {
            "vocab_size": tokenizer.config.codebook_size,
            "num_classes": args.num_classes,
            "block_size": (size // tokenizer.downsample) ** 2,
        }
        gpt, about = load_gpt(args.gpt_ckpt, args.gpt_model, args.weights, **published)
        size = args.image_size or about.get("image_size", 256)
        if gpt.config.block_size != (size // tokenizer.downsample) ** 2:
            raise cli.InputError(
                f"images of {size} px are {(size // tokenizer.downsample) ** 2} codes of {vq_about['vq_model']}, but "
                f"{args.gpt_ckpt} draws {gpt.config.block_size}: give the --image-size it was trained at and its tokenizer"
            )
        if gpt.config.vocab_size < tokenizer.config.codebook_size:
            raise cli.InputError(
                f"{args.gpt_ckpt} knows {gpt.config.vocab_size} codes, {args.vq_ckpt} has {tokenizer.config.codebook_size}"
            )
        check_guidance(args, gpt.config.block_size)
        names = {
            "gpt_model": args.gpt_model or about.get("gpt_model"),
            "vq_model": vq_about["vq_model"],
            "classes": class_names(about.get("classes") or [], gpt.config.num_classes),
            "weights": about["weights"],
        }
        return cls(gpt, tokenizer, args, names, size)

    @property
    def output_size(self) -> int:
        return self.args.image_size_eval or self.image_size

    @property
    def codes(self) -> int:
        """Codes of an image."""
        return self.gpt.config.block_size

    def check_classes(self, labels: Sequence[int], flag: str) -> None:
        """InputError for a class that the GPT does not know."""
        classes = self.gpt.config.num_classes
        for wrong in [label for label in labels if label >= classes]:
            raise cli.InputError(f"{flag} {wrong} is out of range: {self.args.gpt_ckpt} has classes 0 to {classes - 1}")

    def to(self, device: torch.device, batch: int) -> "Pipeline":
        """Get ready to draw batches of so many images on a device."""
        dtype = precision_dtype(self.args.precision, device)
        compiled = device.type == "cuda" if self.args.compile is None else self.args.compile
        self.device = device
        self.decoder = Decoder(self.gpt.to(device), batch, dtype, compiled)
        self.tokenizer.to(device, memory_format=torch.channels_last)
        self._decode = torch.compile(self.tokenizer.decode_code) if compiled else self.tokenizer.decode_code
        # On a CPU a batch is no faster, takes more memory, and changes the last bits.
        self.decode_batch = 32 if device.type == "cuda" else 1
        return self

    def scales(self, cfg_scale: float) -> list[float]:
        """The guidance of each code."""
        args = self.args
        return guidance_scales(self.codes, cfg_scale, args.cfg_schedule, args.cfg_power or POWER, args.cfg_interval)

    @contextmanager
    def progress(
        self, images: int, processes: int = 1, **options: Any
    ) -> Iterator[Callable[[int, torch.Tensor], None]]:
        """A bar of so many images, and what to give to images(): it counts codes, so that the bar moves within a batch.

        processes: how many draw at the same pace as this one.
        """
        with progress(total=images * self.codes, unit=" images", unit_scale=1 / self.codes, **options) as bar:
            yield lambda t, logits_BV: bar.update(min(len(logits_BV) * processes, bar.total - bar.n))

    @torch.inference_mode()
    def images(
        self,
        labels: np.ndarray,
        indices: np.ndarray,
        seed: int,
        cfg_scale: float,
        on_step: Callable[[int, torch.Tensor], None] | None = None,
    ) -> np.ndarray:
        """uint8 (B, H, W, 3). Image i of a seed draws from its own stream: the batch it is in does not matter."""
        args = self.args
        uniforms = streams.uniform(seed, streams.SAMPLE, np.asarray(indices)[:, None], np.arange(self.codes))
        codes_BL = self.decoder(
            torch.from_numpy(np.asarray(labels, np.int64)),
            torch.from_numpy(uniforms).to(self.device),
            self.scales(cfg_scale),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            on_step=on_step,
        ).clamp(max=self.tokenizer.config.codebook_size - 1)
        return torch.cat([self.pixels(part) for part in codes_BL.split(self.decode_batch)]).numpy()

    def pixels(self, codes_BL: torch.Tensor) -> torch.Tensor:
        """Codes -> uint8 (B, H, W, 3) on the CPU, at the output size."""
        return to_uint8(resize(self._decode(codes_BL), self.output_size)).cpu()


def checkpoint_name(path: Path) -> str:
    """The file's name without its suffix, as in the published sample names."""
    return path.stem if path.suffix in (".pt", ".pth", ".safetensors") else path.name
