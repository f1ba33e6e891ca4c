"""The images that the published evaluator was run on for evaluator.json, from their seeds.

An image is a smooth random field of colours on one of two palettes, which meet along a contour, and a little noise. All
of it comes from raw PCG64 words, so it is the same anywhere; evaluator.json has the sha256 of each array.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Look(NamedTuple):
    """How the images of a batch are drawn."""

    brightness: float
    spread: float  # of the brightness
    contrast: float
    roughness: float  # how much of the finer scales there is
    saturation: float


class Batch(NamedTuple):
    seed: int
    images: int
    height: int
    width: int
    look: Look


PLAIN = Look(0.50, 0.15, 0.55, 0.55, 0.8)
SHIFTED = Look(0.44, 0.17, 0.50, 0.48, 0.6)
VIVID = Look(0.55, 0.12, 0.70, 0.65, 1.0)
CASES = {  # of images; each a reference and samples
    "small64": {"ref": Batch(11, 400, 64, 64, PLAIN), "sample": Batch(12, 360, 64, 64, SHIFTED)},
    "full256": {"ref": Batch(21, 110, 256, 256, PLAIN), "sample": Batch(22, 96, 256, 256, VIVID)},
    "odd": {"ref": Batch(31, 129, 83, 131, VIVID), "sample": Batch(32, 65, 61, 47, PLAIN)},
    "large": {"ref": Batch(41, 40, 401, 352, PLAIN), "sample": Batch(42, 24, 512, 512, PLAIN)},
    "stats": {"ref": Batch(51, 70, 64, 64, PLAIN), "sample": Batch(52, 66, 64, 64, SHIFTED)},
    "same": {"ref": Batch(61, 66, 64, 64, PLAIN), "sample": Batch(61, 66, 64, 64, PLAIN)},
}
STATISTICS_SEED = 53  # of the reference of `stats`
SCALES = (1, 2, 4, 8, 16, 32)  # cells of noise along each side


class Uniform:
    """Numbers in [0, 1) with 24 bits, by a key."""

    def __init__(self, *key: int) -> None:
        self.words = np.random.PCG64(np.random.SeedSequence(key))

    def __call__(self, *shape: int) -> np.ndarray:
        return (self.words.random_raw(int(np.prod(shape))) >> np.uint64(40)).reshape(shape) / 2.0**24


def image(batch: Batch, i: int) -> np.ndarray:
    """Image i of a batch: uint8 (H, W, 3)."""
    draw, look = Uniform(batch.seed, i), batch.look
    contrast = look.contrast * (0.5 + draw(1))
    roughness = min(0.9, look.roughness * (0.6 + 0.8 * draw(1).item()))
    field_HWC = _noise(draw, batch.height, batch.width, roughness)
    colours, height_of_contour = field_HWC[..., :3], field_HWC[..., 3:]
    grey = colours.mean(2, keepdims=True)
    colours = grey + look.saturation * (colours - grey)
    palettes = look.brightness + look.spread * (2 * draw(2, 3) - 1)
    inside = height_of_contour > 0.3 * (draw(1) - 0.5)
    tint = np.where(inside, 1.0, 0.3 + draw(1))
    pixels = np.where(inside, *palettes) + 2 * contrast * tint * colours + 0.02 * (draw(*colours.shape) - 0.5)
    return np.clip(np.floor(255 * pixels + 0.5), 0, 255).astype(np.uint8)


def _noise(draw: Uniform, height: int, width: int, roughness: float) -> np.ndarray:
    """(H, W, 4) in [-1, 1]: random grids of each scale, interpolated; each scale weighs `roughness` times the one before."""
    weights = roughness ** np.arange(len(SCALES))
    total = np.zeros((4, height, width))
    for weight, cells in zip(weights, SCALES, strict=True):
        grid_C = (2 * draw(cells + 1, cells + 1, 4) - 1).transpose(2, 0, 1)
        total += weight * (_hats(height, cells) @ grid_C @ _hats(width, cells).T)
    return total.transpose(1, 2, 0) / weights.sum()


def _hats(length: int, cells: int) -> np.ndarray:
    """(length, cells + 1): what each point of a grid adds to each pixel, by linear interpolation."""
    places = np.arange(length)[:, None] * (cells / length)
    return np.clip(1 - abs(places - np.arange(cells + 1)), 0, 1)


def images(case: str, side: str) -> np.ndarray:
    """All images of a side ("ref" or "sample") of a case: uint8 (N, H, W, 3)."""
    batch = CASES[case][side]
    return np.stack([image(batch, i) for i in range(batch.images)])


def statistics(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A mean (size,) and a covariance (size, size) of full rank."""
    draw = Uniform(STATISTICS_SEED, size)
    mean = 0.2 + 0.6 * draw(size)
    root = (2 * draw(size, size) - 1) * 0.996 ** np.arange(size)
    return mean, 0.02 * root @ root.T / np.sqrt(size) + 1e-4 * np.eye(size)


def write(case: str, folder: Path) -> dict[str, Path]:
    """Write both sides as .npz; their paths by side. The reference of `stats` gets statistics too."""
    paths = {}
    for side in CASES[case]:
        arrays = {"arr_0": images(case, side)}
        if (case, side) == ("stats", "ref"):
            arrays["mu"], arrays["sigma"] = statistics(2048)
            arrays["mu_s"], arrays["sigma_s"] = statistics(17 * 17 * 7)
        paths[side] = folder / f"{case}_{side}.npz"
        np.savez(paths[side], **arrays)
    return paths
