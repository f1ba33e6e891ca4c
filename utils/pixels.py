"""Between pixels on disk (uint8, NHWC) and what the tokenizer reads and writes (float, NCHW, about -1..1)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(images_NHWC: Tensor) -> Tensor:
    """uint8 NHWC -> float32 NCHW in [-1, 1] by (x / 255 - 0.5) / 0.5."""
    return images_NHWC.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)


def to_uint8(images_NCHW: Tensor) -> Tensor:
    """float NCHW -> uint8 NHWC by clamp(127.5 x + 128, 0, 255), truncated (the published conversion)."""
    return images_NCHW.float().mul(127.5).add(128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def resize(images_NCHW: Tensor, size: int) -> Tensor:
    """Bicubic to size x size without antialiasing (the published --image-size-eval); the input itself if it fits."""
    if images_NCHW.shape[-1] == size and images_NCHW.shape[-2] == size:
        return images_NCHW
    return F.interpolate(images_NCHW.float(), size=(size, size), mode="bicubic")
