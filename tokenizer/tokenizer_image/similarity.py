"""How alike an image and its reconstruction are: PSNR and SSIM as scikit-image computes them, in the published evaluation."""

import torch.nn.functional as F
from torch import Tensor

WINDOW = 7  # px, the side of what SSIM compares
PUBLISHED_RANGE = 2.0  # LlamaGen's SSIM says so of pixels in 0..1, which makes it higher


def squared_error(images_NHWC: Tensor, others_NHWC: Tensor) -> Tensor:
    """Mean squared error (N,) of uint8 images, of pixels in 0..1, float64."""
    return (images_NHWC.double() - others_NHWC.double()).div(255).square().mean(dim=(1, 2, 3))


def psnr(squared_error_N: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB, at most 100."""
    return -10 * squared_error_N.clamp(min=1e-10).log10()


def ssim(images_NHWC: Tensor, others_NHWC: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity (N,) of uint8 images, of pixels in 0..1, float64 (Wang et al. 2004).

    A uniform window, the covariance of a sample, constants 0.01 and 0.03 of data_range; the mean over channels and all
    windows that lie within the image. Raises ValueError for images smaller than the window.
    """
    if min(images_NHWC.shape[1:3]) < WINDOW:
        raise ValueError(f"expected sides of at least {WINDOW} px, got {tuple(images_NHWC.shape[1:3])}")
    x, y = (part.permute(0, 3, 1, 2).double().div(255) for part in (images_NHWC, others_NHWC))

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, WINDOW, stride=1)

    sample = WINDOW**2 / (WINDOW**2 - 1)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = (sample * (mean(v * v) - m * m) for v, m in ((x, mean_x), (y, mean_y)))
    covariance = sample * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def figures(images_NHWC: Tensor, others_NHWC: Tensor) -> dict[str, Tensor]:
    """Every figure above, (N,) float64 each."""
    error_N = squared_error(images_NHWC, others_NHWC)
    return {
        "psnr": psnr(error_N),
        "mse": error_N,
        "ssim": ssim(images_NHWC, others_NHWC),
        "ssim_published": ssim(images_NHWC, others_NHWC, PUBLISHED_RANGE),
    }
