"""Next Patch Prediction (arXiv 2412.15321): codes as patches, and the loss of predicting a patch.

Shapes: B batch, L positions (codes of an image, raster order), N patches, K codes in a patch (patch**2), V vocabulary.
One integer, `patch` (the side of a patch), covers every level: patch = 1 is next-token prediction with K = 1.
"""

import math

import torch
from torch import Tensor


def grid_side(length: int) -> int:
    """Side of the square grid that holds `length` codes. Raises ValueError if there is none."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"expected a square number of codes, got {length}")
    return side


def to_patches(codes_BL: Tensor, patch: int) -> Tensor:
    """Integer codes (B, L) of a square grid -> patch-major (B, N, K): patches and the codes in them in raster order.

    A view and a permutation of integers: nothing is cast (ids above 256 do not survive bfloat16).
    Raises ValueError if patch does not divide the grid's side.
    """
    side = grid_side(codes_BL.shape[1])
    if side % patch:
        raise ValueError(f"patch side {patch} does not divide the grid of {side}x{side} codes")
    blocks = codes_BL.view(-1, side // patch, patch, side // patch, patch)
    return blocks.transpose(2, 3).reshape(codes_BL.shape[0], -1, patch * patch)


def from_patches(patches_BNK: Tensor) -> Tensor:
    """The inverse of to_patches: (B, N, K) -> (B, L)."""
    B, N, K = patches_BNK.shape
    rows, patch = grid_side(N), grid_side(K)
    return patches_BNK.view(B, rows, rows, patch, patch).transpose(2, 3).reshape(B, N * K)


def patch_loss(logits_BNV: Tensor, patches_BNK: Tensor) -> Tensor:
    """Mean cross-entropy (nats a code) of all codes, each against the one distribution of its patch (paper, eq. 4).

    The K cross-entropies of a patch share their normaliser: logsumexp(logits) - mean over K of the codes' logits.
    So no copy of the logits is made; ints of shape (B, N, K) pick what is needed.
    """
    logits_BNV = logits_BNV.float()
    picked_BNK = logits_BNV.gather(-1, patches_BNK)
    return (torch.logsumexp(logits_BNV, dim=-1) - picked_BNK.mean(dim=-1)).mean()
