"""Sampling: KV cache, classifier-free guidance, filters, and one uniform a token by inverse CDF.

Shapes: B images, L codes of an image, V vocabulary, G key/value heads, C channels of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from autoregressive.models.gpt import Transformer


class KVCache:
    """Keys and values of one layer, in arrays allocated once: rows (B), G heads, `length` positions, C channels."""

    def __init__(self, rows: int, heads: int, length: int, channels: int, like: Tensor) -> None:
        self.k = like.new_empty(rows, heads, length, channels)
        self.v = like.new_empty(rows, heads, length, channels)
        self.filled = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, n, C) behind what is there; return views of all keys and values so far."""
        start, self.filled = self.filled, self.filled + k.shape[2]
        self.k[:, :, start : self.filled] = k
        self.v[:, :, start : self.filled] = v
        return self.k[:, :, : self.filled], self.v[:, :, : self.filled]

    def keep(self, rows: int) -> None:
        """Forget all but the first rows."""
        self.k, self.v = self.k[:rows], self.v[:rows]


def guide(logits_RV: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance: rows are B conditional, then B unconditional logits -> uncond + scale (cond - uncond)."""
    conditional, unconditional = logits_RV.chunk(2)
    return unconditional + (conditional - unconditional) * cfg_scale


def filter_logits(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf outside the top_k largest (ties with the k-th stay; 0: off), then outside the nucleus of mass top_p (1: off).

    A token is in the nucleus if the tokens above it hold no more than top_p; the largest always is.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits_BV.sort(descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        outside = torch.zeros_like(mass, dtype=torch.bool)
        outside[:, 1:] = mass[:, :-1] > top_p
        logits_BV = logits_BV.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits_BV


def probabilities(logits_BV: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that a code is drawn from: temperature, then the filters, then softmax (float32)."""
    return filter_logits(logits_BV.float() / max(temperature, 1e-5), top_k, top_p).softmax(-1)


def draw(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Inverse CDF: the first code whose cumulative mass exceeds u of the whole (u in [0, 1)); never one of mass 0."""
    cdf = probs_BV.double().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms_B.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0]


@torch.inference_mode()
def generate(
    model: Transformer,
    labels_B: Tensor,
    uniforms_BL: Tensor | None,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    length: int | None = None,
    autocast: Callable | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw the codes (B, L) int64 of B images, code by code.

    uniforms_BL: a number in [0, 1) for each code, or None for the most likely code (greedy).
    cfg_scale: guidance for scales above 1; cfg_interval c > -1 guides only the first c + 2 codes, and the
    unconditional half of the batch is dropped from then on. length: codes to draw, the whole grid by default.
    autocast: a context manager's factory for mixed precision. on_step(t, logits_BV) sees the guided logits.
    """
    config = model.config
    B, length = labels_B.shape[0], length or config.block_size
    guided = cfg_scale > 1
    rows = 2 * B if guided else B
    if guided:
        labels_B = torch.cat((labels_B, torch.full_like(labels_B, config.num_classes)))
    cache_dtype = model.output.weight
    caches = [KVCache(rows, config.kv_heads, length, config.head_dim, cache_dtype) for _ in range(config.n_layer)]
    rope = model.rope_table(config.block_size)
    codes_BL = torch.empty(B, length, dtype=torch.int64, device=labels_B.device)
    h_R1D = model.cls_embedding.embedding_table(labels_B)[:, None]
    for t in range(length):
        with autocast() if autocast else torch.autocast(labels_B.device.type, enabled=False):
            logits_RV = model.decode(h_R1D, rope[t : t + 1], caches)[:, -1].float()
        logits_BV = guide(logits_RV, cfg_scale) if guided else logits_RV
        if on_step:
            on_step(t, logits_BV)
        if uniforms_BL is None:
            codes_BL[:, t] = logits_BV.argmax(-1)
        else:
            codes_BL[:, t] = draw(probabilities(logits_BV, temperature, top_k, top_p), uniforms_BL[:, t])
        if guided and -1 < cfg_interval <= t - 1:
            guided = False
            for cache in caches:
                cache.keep(B)
        h_R1D = model.tok_embeddings(codes_BL[:, t : t + 1]).repeat(2 if guided else 1, 1, 1)
    return codes_BL
