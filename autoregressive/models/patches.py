"""Next Patch Prediction (arXiv 2412.15321): codes as patches, and the loss of predicting a patch.

Shapes: B batch, L positions (codes of an image, raster order), N patches, K codes in a patch (patch**2), V vocabulary.
One integer, `patch` (the side of a patch), covers every level: patch = 1 is next-token prediction with K = 1.
"""

import math

import torch
from torch import Tensor

from utils.kernels import product


def grid_side(length: int) -> int:
    """Side of the square grid that holds `length` codes. Raises ValueError if there is none."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"expected a square number of codes, got {length}")
    return side


def to_patches(codes_BL: Tensor, patch: int) -> Tensor:
    """Codes (B, L) int64 of a square grid -> patch-major (B, N, K): patches and the codes in them in raster order.

    A view and a permutation of integers: nothing is cast (ids above 256 do not survive bfloat16).
    Raises ValueError for another dtype, or if patch does not divide the grid's side.
    """
    if codes_BL.dtype != torch.int64:
        raise ValueError(f"expected int64 codes, got {codes_BL.dtype}")
    side = grid_side(codes_BL.shape[1])
    if patch < 1 or side % patch:
        raise ValueError(f"patch side {patch} does not divide the grid of {side}x{side} codes")
    blocks = codes_BL.view(-1, side // patch, patch, side // patch, patch)
    return blocks.transpose(2, 3).reshape(codes_BL.shape[0], -1, patch * patch)


def patch_loss(logits_BNV: Tensor, patches_BNK: Tensor) -> Tensor:
    """Mean cross-entropy (nats a code) of all codes, each against the one distribution of its patch (paper, eq. 4).

    This is the definition, for tests and small uses; training computes the same from hidden states, by head_loss.
    The K cross-entropies of a patch share their normaliser: logsumexp(logits) - mean over K of the codes' logits.
    So no copy of the logits is made; ints of shape (B, N, K) pick what is needed.
    """
    logits_BNV = logits_BNV.float()
    picked_BNK = logits_BNV.gather(-1, patches_BNK)
    return (torch.logsumexp(logits_BNV, dim=-1) - picked_BNK.mean(dim=-1)).mean()


class _HeadLoss(torch.autograd.Function):
    """patch_loss(h @ weight.T) a block of rows at a time, the gradients computed on the way.

    The gradient of the logits is softmax - (share of the patch's codes), so a block's logits are turned into it in place,
    multiplied, and freed: no (rows, V) tensor outlives its block, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, h_RD: Tensor, weight_VD: Tensor, targets_RK: Tensor, block: int) -> Tensor:
        R, K = targets_RK.shape
        total = torch.zeros((), device=h_RD.device)
        needs_grad = any(ctx.needs_input_grad)
        dh, dweight_VD = [], None
        for h, targets in zip(h_RD.split(block), targets_RK.split(block), strict=True):
            logits = product(h, weight_VD.T).float()
            log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += log_z.sum() - logits.gather(-1, targets).sum() / K
            if not needs_grad:
                continue
            logits = logits.sub_(log_z).exp_()
            logits.scatter_add_(-1, targets, logits.new_full((), -1 / K).expand_as(targets))
            logits = logits.to(h.dtype)
            dh.append(product(logits, weight_VD))
            more = product(logits.T, h).float()  # not addmm_: compilers would fuse products of two dtypes
            dweight_VD = more if dweight_VD is None else dweight_VD.add_(more)
        if needs_grad:
            ctx.save_for_backward(torch.cat(dh) if len(dh) > 1 else dh[0], dweight_VD)
            ctx.rows, ctx.dtype = R, weight_VD.dtype
        return total / R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh_RD, dweight_VD = ctx.saved_tensors
        scale = grad / ctx.rows  # here, since float16 cannot hold a row's share of a large batch
        return dh_RD * scale.to(dh_RD.dtype), (dweight_VD * scale).to(ctx.dtype), None, None


def head_loss(h_BND: Tensor, weight_VD: Tensor, patches_BNK: Tensor, block: int = 1024) -> Tensor:
    """patch_loss of the logits h_BND @ weight_VD.T, without ever holding more than `block` rows of logits.

    Under autocast the products are of that dtype, sums and the softmax float32.
    """
    device = h_BND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        h_BND, weight_VD = h_BND.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        return _HeadLoss.apply(h_BND.flatten(0, 1), weight_VD, patches_BNK.flatten(0, 1), block)
