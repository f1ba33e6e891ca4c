"""What both samplers share: flags, the two models, and images from labels."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import PRESETS, Transformer
from autoregressive.models.load import load_gpt
from tokenizer.tokenizer_image.load import load_tokenizer
from utils import cli, streams
from utils.distributed import autocast, precision_dtype
from utils.pixels import resize, to_uint8


def add_flags(parser: ArgumentParser) -> None:
    """The published sampling flags."""
    add = parser.add_argument
    add("--gpt-model", choices=PRESETS, help="insist on this preset; needed for files that don't say (published ones)")
    add("--gpt-ckpt", type=cli.existing_file, required=True)
    add(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: the EMA where the checkpoint has one"
    )
    add("--vq-model", help="insist on this tokenizer preset; default: what the file says, VQ-16 if it doesn't")
    add("--vq-ckpt", type=cli.existing_file, required=True)
    add(
        "--image-size", type=cli.positive_int, help="default: what the GPT was trained at; 256 for files that don't say"
    )
    add("--image-size-eval", type=cli.positive_int, help="resize samples to this (bicubic); default: as drawn")
    add("--num-classes", type=cli.positive_int, default=1000, help="of a GPT file that doesn't say")
    add("--cfg-scale", type=cli.non_negative, default=1.5, help="classifier-free guidance above 1; 1 is off")
    add("--cfg-interval", type=int, default=-1, help="c > -1 guides only the first c + 2 codes")
    add("--temperature", type=cli.positive, default=1.0)
    add("--top-k", type=cli.count, default=0, help="0: off")
    add("--top-p", type=cli.positive_fraction, default=1.0, help="1: off")
    add("--precision", choices=("auto", "none", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on GPUs")
    add("--compile", action=BooleanOptionalAction, default=None, help="torch.compile of the tokenizer's decoder")


@dataclass
class Pipeline:
    """Both models, fitted to each other: labels in, uint8 images out."""

    gpt: Transformer
    tokenizer: torch.nn.Module
    args: Namespace
    names: dict
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
        names = {
            "gpt_model": args.gpt_model or about.get("gpt_model"),
            "vq_model": vq_about["vq_model"],
            "classes": about.get("classes") or [],
            "weights": about["weights"],
        }
        return cls(gpt, tokenizer, args, names, size)

    @property
    def output_size(self) -> int:
        return self.args.image_size_eval or self.image_size

    def to(self, device: torch.device) -> "Pipeline":
        self.gpt.to(device)
        self.tokenizer.to(device, memory_format=torch.channels_last)
        self.amp = partial(autocast, device, precision_dtype(self.args.precision, device))
        self.device = device
        compiled = device.type == "cuda" if self.args.compile is None else self.args.compile
        self._decode = torch.compile(self.tokenizer.decode_code) if compiled else self.tokenizer.decode_code
        return self

    @torch.inference_mode()
    def images(self, labels: np.ndarray, indices: np.ndarray, seed: int, decode_batch: int = 64) -> np.ndarray:
        """uint8 (B, H, W, 3). Image i of a seed draws from its own stream: the batch it is in does not matter."""
        args, config = self.args, self.gpt.config
        uniforms = streams.uniform(seed, streams.SAMPLE, np.asarray(indices)[:, None], np.arange(config.block_size))
        codes_BL = generate(
            self.gpt,
            torch.from_numpy(np.asarray(labels, np.int64)).to(self.device),
            torch.from_numpy(uniforms).to(self.device),
            cfg_scale=args.cfg_scale,
            cfg_interval=args.cfg_interval,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            autocast=self.amp,
        )
        codes_BL = codes_BL.clamp(max=self.tokenizer.config.codebook_size - 1)
        parts = [to_uint8(resize(self._decode(part), self.output_size)).cpu() for part in codes_BL.split(decode_batch)]
        return torch.cat(parts).numpy()


def checkpoint_name(path: Path) -> str:
    """The file's name without its suffix, as in the published sample names."""
    return path.name.removesuffix(".pth").removesuffix(".pt")
