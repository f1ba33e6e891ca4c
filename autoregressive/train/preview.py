"""Samples drawn during training: a grid of a few classes, always from the same streams, so that one sees them improve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoregressive.models.sampler import ImageSampler
from utils import draw
from utils.log import RunLog


@dataclass
class Preview:
    """Draws `per_class` images of some classes to folder/epoch-0010.png."""

    tokenizer: nn.Module
    folder: Path
    log: RunLog
    names: Sequence[str]
    num_classes: int
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    cfg_scale: float = 2.0
    rows: int = 8
    per_class: int = 8

    def __call__(self, model: nn.Module, epoch: int) -> None:
        """Draw after so many epochs. The model stays as it is.

        A model whose logits are not finite is a line in the log: a picture that fails does not end the training.
        """
        classes = np.unique(np.linspace(0, self.num_classes - 1, self.rows).astype(np.int64))
        sampler = ImageSampler(model, self.tokenizer, device=self.device, dtype=self.dtype, compiled=False)
        path = self.folder / f"epoch-{epoch:04d}.png"
        try:
            images = sampler(np.repeat(classes, self.per_class), cfg_scale=self.cfg_scale, seed=self.seed)
        except ValueError as error:
            self.log.line(f"did not draw {path}: {error}")
            return
        names = [self.names[c] if c < len(self.names) else str(c) for c in classes]
        draw.save_image(path, draw.image_grid(images, self.per_class, names, max(1, 64 // images.shape[1])))
        self.log.line(f"drew {path} (guidance {self.cfg_scale:g})")
