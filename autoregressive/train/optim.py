"""One update of the GPT: AdamW, gradient accumulation, clipping, mixed precision."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer
from autoregressive.models.patches import to_patches


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW; weights of two or more dimensions decay, gains do not (as published)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


class Objective(nn.Module):
    """What is trained: `objective(patches_BNK, labels_B)` is the loss of a model, in one forward that
    DistributedDataParallel and torch.compile can wrap. recompute: activation checkpointing."""

    def __init__(self, model: Transformer, recompute: bool = False) -> None:
        super().__init__()
        self.model, self.recompute = model, recompute

    def forward(self, patches_BNK: Tensor, labels_B: Tensor) -> Tensor:
        return self.model.loss(patches_BNK, labels_B, self.recompute)


def update(
    objective: nn.Module,
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
        last = i == len(batches) - 1
        with nullcontext() if last or not hasattr(objective, "no_sync") else objective.no_sync():
            with autocast():
                loss = objective(to_patches(codes_BL, patch), labels_B) / len(batches)
            (scaler.scale(loss) if scaler else loss).backward()
        total = total + loss.detach()
    if scaler:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), max_grad_norm or float("inf"))
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
