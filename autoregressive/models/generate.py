"""Sampling: static KV caches, classifier-free guidance, filters, and one uniform a token by inverse CDF.

Shapes: B images, R rows (B, or 2 B with the unconditional half behind), L codes of an image, V vocabulary, H query heads,
G key/value heads, Q = H / G queries of a group, C channels of a head, D width.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer

MIN_BUCKET = 64  # positions

# Scale at x, the share of the image that is drawn, on the way from 1 to s.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda x, s, power: s,
    "linear": lambda x, s, power: 1 + (s - 1) * x,  # MUSE (arXiv 2301.00704)
    "power-cosine": lambda x, s, power: 1 + (s - 1) * (1 - math.cos(math.pi * x**power)) / 2,  # MDTv2, RAR
}


def guidance_scales(
    length: int, scale: float, schedule: str = "constant", power: float = 2.75, interval: Sequence[int] = (-1,)
) -> list[float]:
    """The guidance scale of each of `length` codes; 1 is no guidance, and scales below 1 count as 1.

    schedule: a key of SCHEDULES; power is that of power-cosine (2.75 as in RAR, arXiv 2411.00776).
    interval: (first, stop) guides only the codes from first up to, not including, stop (arXiv 2404.07724); the published
    form (c,) guides the first c + 2 codes, and all for c = -1.
    """
    if len(interval) == 1:
        interval = (0, length if interval[0] < 0 else interval[0] + 2)
    curve = SCHEDULES[schedule]
    return [max(1.0, curve(t / length, scale, power)) if interval[0] <= t < interval[1] else 1.0 for t in range(length)]


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
    logits_BV = logits_BV.float()
    if temperature != 1:
        logits_BV = logits_BV / max(temperature, 1e-5)
    return filter_logits(logits_BV, top_k, top_p).softmax(-1)


def draw(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Inverse CDF: the first code whose cumulative mass exceeds u of the whole (u in [0, 1)); never one of mass 0."""
    cdf = probs_BV.double().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms_B.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0]


class PackedLinear(nn.Module):
    """nn.Linear without bias on a CPU, its float32 weight in oneDNN's own order.

    On an AMD processor a product takes less than half of the time of F.linear (scripts/benchmark/sample.py prints both
    rates), and a row's result is the same whatever the number of rows, from two rows on.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether this PyTorch and machine have it; its operators are not public, so they may go."""
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def for_decoding(model: Transformer, dtype: torch.dtype, pack: bool) -> Transformer:
    """A copy of a model whose weights have a dtype (shared where it is theirs already) and, on a CPU, may be packed."""
    memo = {id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=False) for weight in model.parameters()}
    model = copy.deepcopy(model, memo).eval()  # buffers (the rotary table) keep their float32
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if pack and isinstance(child, nn.Linear) and PackedLinear.fits(child.weight):
                setattr(module, name, PackedLinear(child))
    return model


class Position(NamedTuple):
    """Where a step is."""

    index: Tensor | None  # (1,), a tensor so that one graph serves all positions; None for the positions 0 to L - 1
    read: int  # how far caches are read
    mask: Tensor | None = None  # (read,), -inf at what is not there yet; without it, all that is read is there
    bags: tuple[Tensor, Tensor] | None = None  # see mix


def mix(weights_RGQn: Tensor, values_RGLC: Tensor, bags: tuple[Tensor, Tensor]) -> Tensor:
    """weights @ values[:, :, :n], as EmbeddingBag sums weighted rows: on CPUs faster than a batched product.

    bags: the rows (R G Q n,) of the values, and where each of the R G Q sums starts.
    """
    table = values_RGLC.view(-1, values_RGLC.shape[-1])
    sums = F.embedding_bag(bags[0], table, bags[1], mode="sum", per_sample_weights=weights_RGQn.flatten())
    return sums.view(*weights_RGQn.shape[:-1], -1)


def make_bags(
    rows: int, heads: int, kv_heads: int, length: int, read: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The bags of mix for caches (rows, kv_heads, length, C) that are read up to `read`."""
    starts = torch.arange(0, rows * kv_heads * length, length, device=device)
    indices = starts.repeat_interleave(heads // kv_heads)[:, None] + torch.arange(read, device=device)
    return indices.flatten(), torch.arange(0, indices.numel(), read, device=device)


def attend(
    keys_RGLC: Tensor, values_RGLC: Tensor, at: Position, q_RHNC: Tensor, k_RGNC: Tensor, v_RGNC: Tensor
) -> Tensor:
    """Store keys and values of N positions of one layer in its caches; attend to all up to there. Returns (R, H, N, C)."""
    R, H, N, C = q_RHNC.shape
    if at.index is None:
        keys_RGLC[:, :, :N], values_RGLC[:, :, :N] = k_RGNC, v_RGNC
        return F.scaled_dot_product_attention(q_RHNC, k_RGNC, v_RGNC, is_causal=True, enable_gqa=k_RGNC.shape[1] != H)
    keys_RGnC, values_RGnC = keys_RGLC[:, :, : at.read], values_RGLC[:, :, : at.read]
    q_RGQC = (q_RHNC * C**-0.5).view(R, k_RGNC.shape[1], -1, C)
    if at.mask is None:
        keys_RGnC[:, :, -1], values_RGnC[:, :, -1] = k_RGNC[:, :, 0], v_RGNC[:, :, 0]
        scores_RGQn = (keys_RGnC @ q_RGQC.transpose(2, 3)).transpose(2, 3).float()  # in this order faster on CPUs
    else:
        keys_RGLC.index_copy_(2, at.index, k_RGNC)
        values_RGLC.index_copy_(2, at.index, v_RGNC)
        scores_RGQn = (q_RGQC @ keys_RGnC.transpose(2, 3)).float() + at.mask
    weights_RGQn = scores_RGQn.softmax(-1).type_as(q_RHNC)
    mixed = mix(weights_RGQn, values_RGLC, at.bags) if at.bags else weights_RGQn @ values_RGnC
    return mixed.view(R, H, 1, C)


class Draw(NamedTuple):
    """How a code is chosen from its logits."""

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
        if self.greedy:
            return logits_BV.argmax(-1)
        return draw(probabilities(logits_BV, self.temperature, self.top_k, self.top_p), uniforms_B)


def many_graphs() -> AbstractContextManager:
    """Let torch.compile make a graph for each bucket, guided or not; by default it gives up after eight."""
    config = torch._dynamo.config
    return config.patch({"recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": 1000})


class Decoder:
    """Decodes batches of up to `batch` images; caches, and graphs on a GPU, are made once and serve every batch.

    dtype: of weights and caches. compiled: torch.compile the step, and on a GPU replay it as a CUDA graph; such a step
    reads its caches up to a multiple of a quarter of the image. Otherwise it reads exactly what is there.
    """

    def __init__(
        self, model: Transformer, batch: int, dtype: torch.dtype = torch.float32, compiled: bool = False
    ) -> None:
        self.config = c = model.config
        self.model = for_decoding(model, dtype, pack=not compiled)
        self.device = device = model.output.weight.device
        self.batch = B = max(2, batch)  # products of one row may be summed in another order than those of several
        self.compiled = compiled
        shape = (2 * B, c.kv_heads, c.block_size, c.head_dim)
        new = partial(torch.zeros, shape, dtype=dtype, device=device)  # zeros: what a mask hides must be finite
        self.caches = [(new(), new()) for _ in range(c.n_layer)]
        self.bagged = device.type == "cpu" and dtype == torch.float32
        rope = self.model.rope_table(c.block_size)
        self.rope = rope if compiled or device.type != "cpu" else torch.view_as_complex(rope)
        self.bucket = max(MIN_BUCKET, -(-c.block_size // 4))
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.arange(c.block_size, device=device)
        self.scales = torch.ones(c.block_size, device=device)
        self.uniforms = torch.zeros(B, c.block_size, dtype=torch.float64, device=device)
        self.codes = torch.zeros(B, c.block_size, dtype=torch.int64, device=device)
        self.h_RD = torch.zeros(2 * B, c.dim, dtype=dtype, device=device)
        self.replays: dict[tuple, Callable[[], Tensor]] = {}

    def _rows(self, first: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Each layer's caches of some rows. A compiled step gets them as they are: cut inside, it would copy them whole."""
        return [(k[first:stop], v[first:stop]) for k, v in self.caches]

    def _hidden(self, h_RLD: Tensor, rope_LC2: Tensor, at: Position, caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return self.model.hidden(h_RLD, rope_LC2, [partial(attend, k, v, at) for k, v in caches])

    def _step(self, caches: Sequence[tuple[Tensor, Tensor]], read: int, masked: bool, choose: Draw) -> Tensor:
        """Draw the code at self.index for all images; returns the (guided) logits (B, V)."""
        rows = len(caches[0][0])
        mask = torch.where(self.positions[:read] <= self.index, 0.0, -torch.inf) if masked else None
        bags = None
        if self.bagged and not masked:
            bags = make_bags(rows, self.config.n_head, self.config.kv_heads, self.config.block_size, read, self.device)
        at, rope = Position(self.index, read, mask, bags), self.rope.index_select(0, self.index)
        h_RD = self._hidden(self.h_RD[:rows, None], rope, at, caches)[:, 0]
        if rows > self.batch:  # the head is linear: guiding what it reads guides its logits, at half the products
            conditional, unconditional = h_RD.float().chunk(2)
            scale = self.scales.index_select(0, self.index)
            h_RD = (unconditional + (conditional - unconditional) * scale).type_as(h_RD)
        logits_BV = self.model.output(h_RD).float()
        codes_B = choose(logits_BV, self.uniforms.index_select(1, self.index)[:, 0])
        self.codes.index_copy_(1, self.index, codes_B[:, None])
        self.h_RD.copy_(self.model.tok_embeddings(codes_B).repeat(2, 1))
        self.index.add_(1)
        return logits_BV

    def _catch_up(self, positions: int, nulls_B: Tensor) -> None:
        """Fill the unconditional rows' caches for positions that were drawn without them, in one pass."""
        h_B1D = self.model.cls_embedding.embedding_table(nulls_B)[:, None]
        h_BLD = torch.cat((h_B1D, self.model.tok_embeddings(self.codes[:, : positions - 1])), dim=1)
        self._hidden(h_BLD, self.rope[:positions], Position(None, positions), self._rows(self.batch, 2 * self.batch))

    def _runner(self, rows: int, t: int, choose: Draw) -> Callable[[], Tensor]:
        """What draws the code at position t."""
        if not self.compiled:
            return partial(self._step, self._rows(0, rows), t + 1, False, choose)
        read = min(self.config.block_size, (t // self.bucket + 1) * self.bucket)
        key = (rows, read, choose)
        if key not in self.replays:
            step = partial(
                torch.compile(self._step, fullgraph=True, dynamic=False), self._rows(0, rows), read, True, choose
            )
            self.replays[key] = self._captured(step) if self.device.type == "cuda" else step
        return self.replays[key]

    def _captured(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The step as a CUDA graph. The calls that warm it up leave no trace but in caches, at positions still to come."""
        state = [(tensor, tensor.clone()) for tensor in (self.index, self.h_RD, self.codes)]

        def restore() -> None:
            for tensor, before in state:
                tensor.copy_(before)

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
                restore()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    @torch.inference_mode()
    def __call__(
        self,
        labels_B: Tensor,
        uniforms_BL: Tensor | None,
        scales_L: Sequence[float],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw the codes (B, L) int64 of B <= batch images, L = len(scales_L), code by code.

        uniforms_BL: a number in [0, 1) for each code, or None for the most likely code (greedy). scales_L: see
        guidance_scales; where all scales to come are 1 there is no unconditional half, and where they were 1 so far it is
        filled in one pass. on_step(t, logits_BV) sees the (guided) logits.
        """
        n, L, B = len(labels_B), len(scales_L), self.batch
        labels = F.pad(labels_B.to(self.device), (0, B - n))
        nulls = torch.full_like(labels, self.config.num_classes)
        if uniforms_BL is not None:
            self.uniforms[:n, :L] = uniforms_BL[:, :L]
        self.scales[:L] = torch.tensor(scales_L)
        self.index.zero_()
        self.h_RD.copy_(self.model.cls_embedding.embedding_table(torch.cat((labels, nulls))))
        guided = [t for t, scale in enumerate(scales_L) if scale > 1]
        first, stop = (guided[0], guided[-1] + 1) if guided else (L, L)
        choose = Draw(uniforms_BL is None, temperature, top_k, top_p)
        with many_graphs() if self.compiled else nullcontext():
            for t in range(L):
                if 0 < t == first:
                    self._catch_up(t, nulls)
                logits_BV = self._runner(2 * B if first <= t < stop else B, t, choose)()
                if on_step:
                    on_step(t, logits_BV[:n])
        return self.codes[:n, :L].clone()


def generate(
    model: Transformer,
    labels_B: Tensor,
    uniforms_BL: Tensor | None,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Tensor:
    """The codes of one batch, by a Decoder of its own with constant guidance; options are those of Decoder.__call__."""
    scales = guidance_scales(length or model.config.block_size, cfg_scale, interval=(cfg_interval,))
    return Decoder(model, len(labels_B), dtype)(labels_B, uniforms_BL, scales, **options)
