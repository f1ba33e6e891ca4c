"""The nearest training image of a sample, by pixels: whether a GPT draws, or repeats what it saw.

N, M images; D numbers of an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.samples import Samples

SIDE = 32  # pixels that images are shrunk to for comparison
AT_ONCE = 1024  # images of the larger set


def pick(file: Samples, chosen: Sequence[int]) -> np.ndarray:
    """Images of a file by their numbers, in that order: uint8 (n, H, W, 3)."""
    wanted, places = np.unique(np.asarray(chosen, np.int64), return_inverse=True)
    found, start = [np.empty((0, *file.shape[1:]), np.uint8)], 0
    for batch in file.batches(AT_ONCE):
        found.append(batch[wanted[(wanted >= start) & (wanted < start + len(batch))] - start])
        start += len(batch)
    return np.concatenate(found)[places]


def _shrunk(images_NHWC: np.ndarray) -> Tensor:
    """float32 (N, D), at most SIDE pixels a side."""
    x = torch.from_numpy(images_NHWC.copy()).permute(0, 3, 1, 2).float()
    if max(x.shape[2:]) > SIDE:
        x = F.interpolate(x, size=(SIDE, SIDE), mode="area")
    return x.flatten(1)


@torch.inference_mode()
def nearest(images_NHWC: np.ndarray, file: Samples, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """The nearest image of a file for each of N images: its number, (N,) int64, and the root mean square difference of
    pixels, (N,) of 0 to 255. mirrored: also in its mirror image."""
    queries = _shrunk(images_NHWC)
    best, index = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.int64)
    start = 0
    for batch in file.batches(AT_ONCE):
        for view in (batch, batch[:, :, ::-1]) if mirrored else (batch,):
            distances, at = torch.cdist(queries, _shrunk(view), compute_mode="use_mm_for_euclid_dist").min(1)
            index = torch.where(distances < best, at + start, index)
            best = torch.minimum(best, distances)
        start += len(batch)
    return index.numpy(), (best / queries.shape[1] ** 0.5).numpy()
