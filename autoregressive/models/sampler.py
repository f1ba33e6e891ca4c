"""Images from class labels, by a GPT and its tokenizer:

sampler = ImageSampler.from_pretrained("c2i_B_256", "vq_ds16_c2i")  # files, published names, hf://user/repo/file
images = sampler([207, 360], cfg_scale=2.0, seed=0)                 # uint8 (2, 256, 256, 3)
PIL.Image.fromarray(images[0]).save("dog.png")
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.generate import Decoder, image_uniforms
from autoregressive.models.gpt import GPT, Transformer
from autoregressive.models.guidance import POWER, guidance_scales
from autoregressive.models.patches import grid_side
from tokenizer.tokenizer_image.vq_model import Tokenizer, VQModel
from utils import checkpoint, cli
from utils.distributed import best_device, precision_dtype
from utils.machine import use_compile
from utils.pixels import resize, to_uint8


class ImageSampler:
    """Two models, fitted to each other: class labels in, uint8 images out. The GPT itself stays where it is.

    device: by default a GPU where there is one. dtype: of the GPT's weights while drawing, by default bfloat16 on devices
    that compute in it, float32 elsewhere. batch_size: images drawn at once. compiled: torch.compile both models; by default on
    GPUs that can. Raises InputError for models that do not fit.
    """

    def __init__(
        self, gpt: Transformer, tokenizer: VQModel, *, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, batch_size: int = 16, compiled: bool | None = None, name: str = "the GPT",
    ) -> None:  # fmt: skip
        self.gpt, self.name = gpt, name
        self.device = torch.device(device) if device else best_device()
        self.dtype = dtype or precision_dtype("auto", self.device)
        self.compiled = use_compile(compiled, self.device)
        self.batch_size = batch_size
        self.tokenizer = tokenizer.to(self.device, memory_format=torch.channels_last).eval()
        if gpt.config.vocab_size < tokenizer.config.codebook_size:
            raise cli.InputError(
                f"{name} knows {gpt.config.vocab_size} codes, the tokenizer has {tokenizer.config.codebook_size}: "
                "give the tokenizer that it was trained with"
            )
        self.image_size = grid_side(gpt.config.block_size) * tokenizer.downsample
        self._decode = torch.compile(self.tokenizer.decode_code) if self.compiled else self.tokenizer.decode_code
        self._decoder: Decoder | None = None

    @classmethod
    def from_pretrained(
        cls, gpt: str | Path, tokenizer: str | Path, *, gpt_model: str | None = None, vq_model: str | None = None,
        weights: str = "auto", image_size: int | None = None, **options: Any,
    ) -> "ImageSampler":  # fmt: skip
        """Both models from files, published names or hf://user/repo/file. Raises InputError for what cannot be used.

        gpt_model, vq_model: presets to insist on; by default what the files say. weights: model, ema, or auto (the average
        where the file has one, unless its last validation says that it is worse). image_size: of files that don't say
        (256). options: those of ImageSampler.
        """
        vq = Tokenizer.from_pretrained(tokenizer, vq_model)
        size = ((image_size or 256) // vq.downsample) ** 2
        model = GPT.from_pretrained(gpt, gpt_model, weights=weights, defaults={"block_size": size})
        if weights == "auto" and checkpoint.average_is_worse(model.about):
            figures = model.about["validation"]
            cli.note(
                f"warning: {gpt}: the average of the weights is worse than the weights (validation loss "
                f"{figures['val_loss_ema']:.4f}, {figures['val_loss']:.4f}), so the weights are taken; --weights ema insists"
            )
        wanted, codes = image_size or model.about.get("image_size") or 256, model.config.block_size
        if codes != (wanted // vq.downsample) ** 2:
            raise cli.InputError(
                f"images of {wanted} px are {(wanted // vq.downsample) ** 2} codes of {vq.about['vq_model']}, but "
                f"{gpt} draws {codes}: give the --image-size it was trained at and its tokenizer"
            )
        return cls(model, vq, name=str(gpt), **options)

    @property
    def codes(self) -> int:
        """Codes of an image."""
        return self.gpt.config.block_size

    def check_labels(self, labels: Sequence[int], what: str = "label") -> None:
        """Raise InputError for a class that the GPT does not know."""
        classes = self.gpt.config.num_classes
        for wrong in [label for label in labels if not 0 <= label < classes]:
            raise cli.InputError(f"{what} {wrong} is out of range: {self.name} has classes 0 to {classes - 1}")

    @torch.inference_mode()
    def __call__(
        self, labels: Sequence[int] | np.ndarray | Tensor, *, cfg_scale: float = 2.0, seed: int | Sequence[int] = 0,
        indices: Sequence[int] | np.ndarray | None = None, size: int | None = None, cfg_schedule: str = "constant",
        cfg_power: float = POWER, cfg_interval: Sequence[int] = (-1,), temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, on_codes: Callable[[Tensor], None] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """uint8 (B, H, W, 3) of B class labels, drawn `batch_size` at once.

        Image i of a seed draws from a stream of its own, so the batch it is in does not matter. seed: of all images, or one
        of each. indices: the i of each label, by default 0 to B - 1. size: side of the images in pixels, by default as
        drawn (else bicubic). cfg_scale, cfg_schedule, cfg_power, cfg_interval: see guidance_scales. temperature, top_k,
        top_p: see guidance.probabilities. on_codes(codes_BL) is called after each code of a batch, with all codes up to
        there; they are valid until it returns. Raises InputError for labels or settings out of range, and for a GPT whose
        logits are not finite.
        """
        labels_B = torch.as_tensor(labels, dtype=torch.int64).cpu()
        self.check_labels(labels_B.tolist())
        numbers = np.arange(len(labels_B)) if indices is None else np.asarray(indices)
        seeds = np.broadcast_to(seed, len(labels_B))
        scales = guidance_scales(self.codes, cfg_scale, cfg_schedule, cfg_power, cfg_interval)
        decoder, images = self._ready(len(labels_B)), []
        on_step = on_codes and (lambda t, logits_BV: on_codes(decoder.codes[: len(logits_BV), : t + 1]))
        for start in range(0, len(labels_B), decoder.images):
            part = slice(start, start + decoder.images)
            uniforms = image_uniforms(seeds[part], numbers[part], self.codes)
            try:
                codes_BL = decoder(
                    labels_B[part], uniforms, scales, temperature=temperature, top_k=top_k, top_p=top_p, on_step=on_step
                )
            except FloatingPointError as error:
                raise cli.InputError(f"{self.name}: {error}") from None
            images.append(self.pixels(codes_BL, size))
        return np.concatenate(images) if images else np.zeros((0, *[size or self.image_size] * 2, 3), np.uint8)

    def _ready(self, images: int) -> Decoder:
        """The decoder, made at first use, and again for more images at once."""
        batch = max(1, min(images, self.batch_size))
        if self._decoder is None or self._decoder.images < batch:
            self._decoder = None  # its caches are freed before there are new ones
            self._decoder = Decoder(self.gpt, batch, self.dtype, self.compiled, self.device)
        return self._decoder

    def pixels(self, codes_BL: Tensor, size: int | None = None) -> np.ndarray:
        """Codes -> uint8 (B, H, W, 3)."""
        batch = 32 if self.device.type == "cuda" else 1  # on a CPU more is no faster, and changes the last bits
        codes_BL = codes_BL.clamp(max=self.tokenizer.config.codebook_size - 1)
        parts = [self._decode(part) for part in codes_BL.split(batch)]
        return torch.cat([to_uint8(resize(part, size or part.shape[-1])).cpu() for part in parts]).numpy()
