"""Samples drawn during training: a grid of a few classes, always from the same streams, so that one sees them improve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoregressive.models.generate import Decoder, guidance_scales
from utils import draw, streams
from utils.log import RunLog
from utils.pixels import to_uint8

BATCH = 16  # images decoded at once: little memory beside what training takes


@dataclass
class Preview:
    """Draws `per_class` images of some classes to folder/epoch-0010.png, every so many epochs and at the end."""

    tokenizer: nn.Module
    folder: Path
    log: RunLog
    every: int
    last_epoch: int
    names: Sequence[str]
    num_classes: int
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    cfg_scale: float = 2.0
    rows: int = 8
    per_class: int = 8

    def __post_init__(self) -> None:
        self.tokenizer = self.tokenizer.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, model: nn.Module, epoch: int) -> None:
        """Draw, if it is the turn of this epoch (the number of finished ones)."""
        if epoch % self.every and epoch < self.last_epoch:
            return
        was_training = model.training
        model.eval()
        classes = np.unique(np.linspace(0, self.num_classes - 1, self.rows).astype(np.int64))
        labels = np.repeat(classes, self.per_class)
        images = np.arange(len(labels))
        uniforms = streams.uniform(self.seed, streams.SAMPLE, images[:, None], np.arange(model.config.block_size))
        decoder = Decoder(model, BATCH, self.dtype)
        scales = guidance_scales(model.config.block_size, self.cfg_scale)
        parts = zip(torch.from_numpy(labels).split(BATCH), torch.from_numpy(uniforms).split(BATCH), strict=True)
        codes = torch.cat([decoder(part, numbers.to(self.device), scales) for part, numbers in parts])
        codes = codes.clamp(max=self.tokenizer.config.codebook_size - 1)
        pixels = torch.cat([to_uint8(self.tokenizer.decode_code(part)).cpu() for part in codes.split(16)]).numpy()
        names = [self.names[c] if c < len(self.names) else str(c) for c in classes]
        scale = max(1, 64 // pixels.shape[1])
        path = self.folder / f"epoch-{epoch:04d}.png"
        draw.save_image(path, draw.image_grid(pixels, self.per_class, names, scale))
        self.log.line(f"drew {path} (guidance {self.cfg_scale:g})")
        model.train(was_training)
