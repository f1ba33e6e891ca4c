"""A small classifier of small images (32 px or so), whose pooled features serve as the eye of an evaluation.

B batch, H, W image, D features, C classes.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Block(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )


class Classifier(nn.Module):
    """uint8 images (B, H, W, 3) -> features (B, D), logits (B, C). D = 96.

    Features are pooled over the image and standardised over the training set, so that distances between them have a scale.
    """

    def __init__(self, classes: int, widths: tuple[int, int, int] = (32, 64, 96)) -> None:
        super().__init__()
        first, second, third = widths
        self.body = nn.Sequential(
            Block(3, first, stride=2),
            Block(first, second, stride=2),
            Block(second, second),
            Block(second, third, stride=2),
            Block(third, third),
        )
        self.standardise = nn.BatchNorm1d(third, affine=False)
        self.head = nn.Linear(third, classes)

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        x = images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W), channels last in memory
        features_BD = self.standardise(self.body(x).mean(dim=(2, 3)))
        return features_BD, self.head(features_BD)


def fused(model: Classifier) -> Classifier:
    """A copy for inference, on the CPU: evaluation mode, batch norms folded into the convolutions."""
    copy = deepcopy(model).cpu().eval().requires_grad_(False)
    copy.body = nn.Sequential(
        *(nn.Sequential(fuse_conv_bn_eval(block[0], block[1]), nn.ReLU(inplace=True)) for block in copy.body)
    )
    return copy


def shifted(images_BHWC: Tensor, offsets_B2: Tensor) -> Tensor:
    """Each image moved by its own (rows, columns); the border is repeated into what comes free."""
    batch, height, width, _ = images_BHWC.shape
    rows_BH = (torch.arange(height) - offsets_B2[:, :1]).clamp(0, height - 1)
    columns_BW = (torch.arange(width) - offsets_B2[:, 1:]).clamp(0, width - 1)
    return images_BHWC[torch.arange(batch)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
