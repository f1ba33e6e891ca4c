"""Discriminators of real against reconstructed images: PatchGAN (arXiv 1611.07004) and StyleGAN2's (arXiv 1912.04958).

Both are as LlamaGen trains them, with the parameter names of its checkpoints. Images are float (B, 3, H, W), about -1..1;
what comes out are logits, higher for images that look real.
"""

from collections.abc import Callable
from itertools import pairwise
from math import log2, sqrt
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from utils.cli import InputError

PATCHGAN_KERNEL = 4
# Channels at each side in pixels.
STYLEGAN_CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


class _MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes; gradients flow back to each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _MeanOverProcesses.forward(ctx, gradient)


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, with gradients; the tensor itself for one process."""
    many = dist.is_initialized() and dist.get_world_size() > 1
    return _MeanOverProcesses.apply(x) if many else x


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes' images (equally many each), on any device.

    So a discriminator's gradient does not depend on the number of processes. PyTorch's own works on GPUs only.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x_BCHW)
        x = x_BCHW.float()
        mean_C = mean_over_processes(x.mean(dim=(0, 2, 3)))
        centred = x - mean_C[:, None, None]
        variance_C = mean_over_processes(centred.square().mean(dim=(0, 2, 3)))
        n = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * n / max(1, n - 1), self.momentum)
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return (centred * scale_C[:, None, None] + self.bias[:, None, None]).to(x_BCHW.dtype)


class PatchGAN(nn.Module):
    """(B, 3, H, W) -> logits (B, 1, h, w), one for each patch: 70 px wide with three layers, of which a side has H/8 - 2."""

    def __init__(self, filters: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [filters * min(2**i, 8) for i in range(layers + 1)]

        def conv(width_in: int, width: int, stride: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(width_in, width, PATCHGAN_KERNEL, stride, padding=1, bias=bias)

        parts: list[nn.Module] = [conv(3, widths[0], 2, True), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [conv(widths[i - 1], widths[i], stride, False), BatchNorm(widths[i]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, conv(widths[-1], 1, 1, True))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.main(images_BCHW)


class Blur(nn.Module):
    """Binomial smoothing [1 2 1] x [1 2 1] / 16; the border is mirrored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels, f = x_BCHW.shape[1], self.f.to(x_BCHW.dtype) / self.f.sum()
        kernel = (f[:, None] * f).expand(channels, 1, 3, 3)
        return F.conv2d(F.pad(x_BCHW, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)


class StyleGANBlock(nn.Module):
    """Two 3x3 convolutions and a blurred stride beside a strided 1x1 shortcut: half the side."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(width_in, width, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(width_in, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(width, width, 3, stride=2, padding=1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (self.downsample(self.net(x_BCHW)) + self.conv_res(x_BCHW)) / sqrt(2)


class StyleGAN(nn.Module):
    """(B, 3, side, side) -> logits (B, 1), one for each image. `side` is a key of STYLEGAN_CHANNELS, above 4."""

    def __init__(self, side: int = 256) -> None:
        super().__init__()
        widths = [STYLEGAN_CHANNELS[2**i] for i in range(int(log2(side)), 1, -1)]
        blocks = [StyleGANBlock(a, b) for a, b in pairwise(widths)]
        self.blocks = nn.ModuleList([nn.Conv2d(3, widths[0], 3, padding=1), nn.LeakyReLU(0.2), *blocks])
        last = widths[-1]
        self.final_conv = nn.Sequential(nn.Conv2d(last, last, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(last * 4 * 4, last), nn.LeakyReLU(0.2), nn.Linear(last, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = images_BCHW
        for block in self.blocks:
            x = block(x)
        return self.final_linear(self.final_conv(x).flatten(1))


DISCRIMINATORS = ("patchgan", "stylegan")


def discriminator(kind: str, image_size: int, filters: int = 64, layers: int = 3) -> nn.Module:
    """A discriminator of images of this side; filters and layers are a PatchGAN's. InputError for a side that does not fit."""
    if kind == "patchgan":
        if image_size < (least := 3 * 2**layers):
            raise InputError(
                f"--image-size {image_size} is too small for a PatchGAN of {layers} layers, which takes "
                f"{least} px and more: lower --disc-layers, or --disc-weight 0 goes without"
            )
        return PatchGAN(filters, layers)
    if image_size not in STYLEGAN_CHANNELS or image_size < 8:
        sides = ", ".join(str(side) for side in STYLEGAN_CHANNELS if side >= 8)
        raise InputError(f"--image-size {image_size} does not fit --disc-type stylegan, which takes {sides}")
    return StyleGAN(image_size)


def _softplus_pair(real: Tensor, fake: Tensor) -> Tensor:
    """Half the cross-entropy of telling them apart: -log sigmoid(real) - log(1 - sigmoid(fake)), over 2."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def _hinge_pair(real: Tensor, fake: Tensor) -> Tensor:
    """(max(0, 1 - real) + max(0, 1 + fake)) / 2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# Of logits of real and of reconstructed images. The last two are the same formula (arXiv 1406.2661), under both published
# names; what differs is the generator's side.
DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": _hinge_pair,
    "vanilla": _softplus_pair,
    "non-saturating": _softplus_pair,
}
# Of logits of reconstructed images: -fake, or -log sigmoid(fake).
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda fake: -fake.mean(),
    "non-saturating": lambda fake: F.softplus(-fake).mean(),
}


class DiscriminatorLoss(nn.Module):
    """What a discriminator is trained on: its loss on images and their reconstructions, in one call."""

    def __init__(self, discriminator: nn.Module, loss: str) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.loss = DISCRIMINATOR_LOSSES[loss]

    def forward(self, images_BCHW: Tensor, reconstruction_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the mean logits of images and of reconstructions."""
        real, fake = (self.discriminator(x).float() for x in (images_BCHW, reconstruction_BCHW))
        return self.loss(real, fake), real.mean(), fake.mean()
