"""One update of the GPT: AdamW, gradient accumulation, clipping, mixed precision."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from autoregressive.models.patches import patch_loss, to_patches


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW; weights of two or more dimensions decay, gains do not (as published)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    patch: int,
    *,
    lr: float,
    max_grad_norm: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    autocast=nullcontext,
) -> tuple[Tensor, Tensor]:
    """Forward, backward and step over micro-batches of (codes (B, L), labels (B,)); their gradients are averaged.

    Returns the mean loss and the gradient norm before clipping (max_grad_norm 0: not clipped), both on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = 0.0
    for i, (codes_BL, labels_B) in enumerate(batches):
        patches_BNK = to_patches(codes_BL, patch)
        last = i == len(batches) - 1
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            with autocast():
                loss = patch_loss(model(patches_BNK, labels_B), patches_BNK) / len(batches)
            (scaler.scale(loss) if scaler else loss).backward()
        total = total + loss.detach()
    if scaler:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
