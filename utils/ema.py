"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn

from utils.sharding import local


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
    torch._foreach_lerp_(local(ema.parameters()), local(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)
