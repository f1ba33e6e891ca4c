"""An update of weights: the optimizer, forward and backward over micro-batches, clipping, and the moving average (EMA)."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from utils import sharding
from utils.task import EngineSettings


def adamw(model: nn.Module, settings: EngineSettings) -> torch.optim.AdamW:
    """Fused AdamW; weights of two or more dimensions decay, gains and biases do not (as published)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def update(
    loss: Callable[[Sequence[Tensor]], dict[str, Tensor]],
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    max_grad_norm: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    amp: Callable = nullcontext,
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward, backward and step over micro-batches; their gradients are averaged.

    loss: gives {"loss": ..., parts} of a micro-batch. Returns their means and the gradient norm before clipping
    (max_grad_norm 0: not clipped), all on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    total: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last or not hasattr(objective, "no_sync") else objective.no_sync():
            with amp():
                values = {name: value / len(batches) for name, value in loss(batch).items()}
            (scaler.scale(values["loss"]) if scaler else values["loss"]).backward()
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + value.detach()
    if scaler:
        scaler.unscale_(optimizer)
    norm = clip_gradients(objective, max_grad_norm)
    if sharding.is_sharded(norm):
        norm = norm.full_tensor()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def clip_gradients(module: nn.Module, most: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ (most 0: only the norm), which multiplies even by 1: on a CPU a tenth of a coarse step."""
    weights = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
    if most and (norm.device.type != "cpu" or not norm <= most - 1e-6):  # a GPU would have to be waited for
        torch.nn.utils.clip_grads_with_norm_(weights, most, norm)
    return norm


def ema_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of the model, in evaluation mode, to be moved by update_ema."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def warm_decay(decay: float, step: int) -> float:
    """The decay of update `step` (from 1): at most (1 + step) / (10 + step), so that a short run's average is of it.

    Long runs keep theirs: the decay is 0.9999 from update 90,000 on, and earlier weights do not count 100,000 updates later.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model for every parameter; buffers are copied."""
    torch._foreach_lerp_(sharding.local(ema.parameters()), sharding.local(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)
