"""What a GPU holds in GPT training: weights and optimizer by their number, activations by a step on tensors without values.

The step is the model's own forward and backward pass, so the count holds for whatever the model is. It is that of eager
CPU kernels, with attention that keeps no matrix of scores, as on GPUs; torch.compile keeps less. Of a deep model some blocks
are counted, and each further one takes what the last of these took.
"""

import weakref
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoregressive.models.gpt import GPTConfig, Transformer
from autoregressive.models.patches import to_patches

COUNTED = 8  # blocks of a deeper model


class Memory(NamedTuple):
    """Bytes on one GPU at the peak of a step. gathered: whole weights and gradients of what fsdp works on."""

    weights: float
    gradients: float
    moments: float
    average: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations make, until it is freed: `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()  # storages: several tensors may share one

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out


def meta_model(config: GPTConfig) -> Transformer:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def parameters(module: nn.Module) -> int:
    """How many weights a module has."""
    return sum(p.numel() for p in module.parameters())


@cache
def step_bytes(
    config: GPTConfig, images: int, recompute: bool = False, dtype: torch.dtype = torch.bfloat16, cast: bool = True
) -> int:
    """The most bytes that forward and backward on single codes hold besides weights and gradients.

    cast: weights are float32 and autocast makes copies of `dtype`; otherwise they are of `dtype` (fsdp).
    """
    if config.n_layer > COUNTED:
        half = COUNTED // 2
        few, more = (step_bytes(replace(config, n_layer=n), images, recompute, dtype, cast) for n in (half, COUNTED))
        return more + (config.n_layer - COUNTED) * (more - few) // (COUNTED - half)
    model = meta_model(config).to(torch.float32 if cast else dtype).train()
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, mixed:
        model.to_empty(device="cpu")
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        codes_BL = torch.zeros(images, config.block_size, dtype=torch.int64)
        labels_B = torch.zeros(images, dtype=torch.int64)
        before = live.peak = live.now
        model.loss(to_patches(codes_BL, 1), labels_B, recompute).backward()
        return live.peak - before


def memory(
    config: GPTConfig,
    images: int,
    *,
    data_parallel: str,
    gpus: int,
    recompute: bool = False,
    ema: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Memory:
    """What one of so many GPUs holds that works on `images` at once, by ddp or fsdp; AdamW, moments in float32.

    What fsdp gathers is an estimate: docs/benchmarks.md.
    """
    model = meta_model(config)
    all_weights, block = parameters(model), parameters(model.layers[0])
    sharded = data_parallel == "fsdp"
    states = 4.0 * all_weights / (gpus if sharded else 1)
    rest = all_weights - config.n_layer * block  # embeddings, norm and head: one group, whole until the step's end
    # Two blocks (the next one is fetched ahead), the buffer they come in, one block's gradients, their float32 sums.
    gathered = dtype.itemsize * (2 * rest + 4 * block) + 4 * block if sharded else 0
    activations = step_bytes(config, images, recompute, dtype, cast=not sharded)
    return Memory(states, states, 2 * states, states * ema, gathered, activations)
