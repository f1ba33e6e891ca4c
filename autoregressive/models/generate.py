"""Drawing codes: static key/value caches, one step a code, and classifier-free guidance before the head.

Shapes: B images, R rows (B, or 2 B with the unconditional half behind), L codes of an image, V vocabulary, H query heads,
G key/value heads, Q = H / G queries of a group, C channels of a head, D width, n positions that are read.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models import cpu
from autoregressive.models.gpt import Transformer
from autoregressive.models.guidance import draw, guidance_scales, probabilities
from utils import streams

MIN_BUCKET = 64  # positions


def for_decoding(model: Transformer, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A copy of a model whose weights have a dtype and a device; those that have both already are shared."""
    memo = {id(w): nn.Parameter(w.detach().to(device, dtype), requires_grad=False) for w in model.parameters()}
    memo |= {id(buffer): buffer.to(device) for buffer in model.buffers()}  # the rotary table keeps its float32
    return copy.deepcopy(model, memo).eval()


def fill(keys_RGLC: Tensor, values_RGLC: Tensor, q_RHNC: Tensor, k_RGNC: Tensor, v_RGNC: Tensor) -> Tensor:
    """Store keys and values of the first N positions of one layer in its caches; causal attention, (R, H, N, C)."""
    N, gqa = k_RGNC.shape[2], k_RGNC.shape[1] != q_RHNC.shape[1]
    keys_RGLC[:, :, :N], values_RGLC[:, :, :N] = k_RGNC, v_RGNC
    return F.scaled_dot_product_attention(q_RHNC, k_RGNC, v_RGNC, is_causal=True, enable_gqa=gqa)


def attend(
    keys_RGLC: Tensor, values_RGLC: Tensor, index: Tensor, read: int, mask: Tensor | None,
    bags: tuple[Tensor, Tensor] | None, q_RH1C: Tensor, k_RG1C: Tensor, v_RG1C: Tensor,
) -> Tensor:  # fmt: skip
    """Store the key and value of one position of one layer in its caches; attend to all up to there. Returns (R, H, 1, C).

    index: (1,), a tensor so that one graph serves all positions. read: how far caches are read. mask: (read,), -inf at
    positions to come; without it, index is the last that is read. bags: see cpu.mix.
    """
    R, H, _, C = q_RH1C.shape
    keys_RGnC, values_RGnC = keys_RGLC[:, :, :read], values_RGLC[:, :, :read]
    q_RGQC = (q_RH1C * C**-0.5).view(R, k_RG1C.shape[1], -1, C)
    if mask is None:
        keys_RGnC[:, :, -1], values_RGnC[:, :, -1] = k_RG1C[:, :, 0], v_RG1C[:, :, 0]
        scores_RGQn = (keys_RGnC @ q_RGQC.transpose(2, 3)).transpose(2, 3).float()  # in this order faster on CPUs
    else:
        keys_RGLC.index_copy_(2, index, k_RG1C)
        values_RGLC.index_copy_(2, index, v_RG1C)
        scores_RGQn = (q_RGQC @ keys_RGnC.transpose(2, 3)).float() + mask
    weights_RGQn = scores_RGQn.softmax(-1).type_as(q_RH1C)
    mixed = cpu.mix(weights_RGQn, values_RGLC, bags) if bags else weights_RGQn @ values_RGnC
    return mixed.view(R, H, 1, C)


class Decoder:
    """Decodes batches of up to `batch` images; caches, and compiled steps, are made once and serve every batch.

    dtype, device: of weights and caches; by default float32, and the model's device. The model itself stays as it is.
    compiled: torch.compile the step, as CUDA graphs on a GPU; it reads its caches up to a multiple of a quarter of the
    image. Otherwise a step reads exactly what was drawn. tuned: use the functions of cpu.py where they fit.
    """

    def __init__(
        self, model: Transformer, batch: int, dtype: torch.dtype = torch.float32, compiled: bool = False,
        device: torch.device | None = None, tuned: bool = True,
    ) -> None:  # fmt: skip
        self.config = c = model.config
        self.device = device = device or model.output.weight.device
        self.model = for_decoding(model, dtype, device)
        self.images = batch
        self.batch = B = max(2, batch)  # products of one row may be summed in another order than those of several
        self.compiled = compiled
        self.tuned = tuned and not compiled and device.type == "cpu"
        self.rope = self.model.rope_table(c.block_size)
        if self.tuned:
            self.model, self.rope = cpu.tune(self.model), torch.view_as_complex(self.rope)
        shape = (2 * B, c.kv_heads, c.block_size, c.head_dim)
        new = partial(torch.zeros, shape, dtype=dtype, device=device)  # zeros: what a mask hides must be finite
        caches = [(new(), new()) for _ in range(c.n_layer)]
        # A compiled step gets the rows it works on as a view made once: cut inside the step, caches would be copied whole.
        self.caches = {rows: [(k[:rows], v[:rows]) for k, v in caches] for rows in (B, 2 * B)}
        self.unconditional = [(k[B:], v[B:]) for k, v in caches]
        self.bucket = max(MIN_BUCKET, -(-c.block_size // 4)) if compiled else 1
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.arange(c.block_size, device=device)
        self.scales = torch.ones(c.block_size, device=device)
        self.uniforms = torch.zeros(B, c.block_size, dtype=torch.float64, device=device)
        self.codes = torch.zeros(B, c.block_size, dtype=torch.int64, device=device)
        self.finite = torch.ones(B, dtype=torch.bool, device=device)
        self.h_RD = torch.zeros(2 * B, c.dim, dtype=dtype, device=device)
        self.step = self._step
        if compiled:
            self.step = torch.compile(self._step, fullgraph=True, dynamic=False, mode="reduce-overhead")
            # CUDA graphs may change only tensors whose address stays.
            state = (self.index, self.positions, self.scales, self.uniforms, self.codes, self.finite, self.h_RD)
            for tensor in (*state, self.rope, *(t for rows in self.caches.values() for pair in rows for t in pair)):
                torch._dynamo.mark_static_address(tensor)

    def _step(self, caches: Sequence[tuple[Tensor, Tensor]], read: int, how: tuple[float, int, float] | None) -> Tensor:
        """Draw the code at self.index for all images; returns the (guided) logits (B, V).

        how: temperature, top_k and top_p; None takes the most likely codes.
        """
        rows, c, index = len(caches[0][0]), self.config, self.index
        mask = torch.where(self.positions[:read] <= index, 0.0, -torch.inf) if self.compiled else None
        bags = cpu.make_bags(rows, c.n_head, c.kv_heads, c.block_size, read) if self.tuned else None
        attends = [partial(attend, k, v, index, read, mask, bags) for k, v in caches]
        h_RD = self.model.hidden(self.h_RD[:rows, None], self.rope.index_select(0, index), attends)[:, 0]
        if rows > self.batch:  # the head is linear: guiding what it reads guides its logits, at half the products
            conditional, unconditional = h_RD.float().chunk(2)
            scale = self.scales.index_select(0, index)
            h_RD = (unconditional + (conditional - unconditional) * scale).type_as(h_RD)
        logits_BV = self.model.output(h_RD).float()
        self.finite.logical_and_(logits_BV.sum(-1).isfinite())
        if how is None:
            codes_B = logits_BV.argmax(-1)
        else:
            codes_B = draw(probabilities(logits_BV, *how), self.uniforms.index_select(1, index)[:, 0])
        self.codes.index_copy_(1, index, codes_B[:, None])
        self.h_RD.copy_(self.model.tok_embeddings(codes_B).repeat(2, 1))
        index.add_(1)
        return logits_BV

    def _catch_up(self, positions: int, nulls_B: Tensor) -> None:
        """Fill the unconditional rows' caches for positions that were drawn without them, in one pass."""
        h_B1D = self.model.cls_embedding.embedding_table(nulls_B)[:, None]
        h_BLD = torch.cat((h_B1D, self.model.tok_embeddings(self.codes[:, : positions - 1])), dim=1)
        self.model.hidden(h_BLD, self.rope[:positions], [partial(fill, k, v) for k, v in self.unconditional])

    def _check(self, labels_B: Tensor, uniforms_BL: Tensor | None, length: int) -> None:
        n, classes, most = len(labels_B), self.config.num_classes, self.config.block_size
        if labels_B.dim() != 1 or not 1 <= n <= self.images:
            raise ValueError(f"expected 1 to {self.images} labels (B,), got {tuple(labels_B.shape)}")
        if labels_B.min() < 0 or labels_B.max() > classes:
            raise ValueError(f"labels: expected 0 to {classes} ({classes}: no class), got {labels_B.tolist()}")
        if not 1 <= length <= most:
            raise ValueError(f"expected 1 to {most} codes an image, got {length}")
        if uniforms_BL is not None and uniforms_BL.shape != (n, length):
            raise ValueError(f"uniforms: expected {(n, length)}, got {tuple(uniforms_BL.shape)}")

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

        labels_B: int64 in 0..num_classes. uniforms_BL: a number in [0, 1) for each code, or None for the most likely code
        (greedy). scales_L: see guidance_scales; where all scales to come are 1 there is no unconditional half, and where
        they were 1 so far it is filled in one pass. on_step(t, logits_BV) sees the (guided) logits; they are valid until
        it returns. Raises ValueError for other shapes, FloatingPointError for logits that are not finite.
        """
        n, L, B = len(labels_B), len(scales_L), self.batch
        self._check(labels_B, uniforms_BL, L)
        labels = F.pad(labels_B.to(self.device), (0, B - n))
        nulls = torch.full_like(labels, self.config.num_classes)
        if uniforms_BL is not None:
            self.uniforms[:n, :L] = uniforms_BL
        self.scales[:L] = torch.tensor(scales_L)
        self.index.zero_()
        self.finite.fill_(True)
        self.h_RD.copy_(self.model.cls_embedding.embedding_table(torch.cat((labels, nulls))))
        guided = [t for t, scale in enumerate(scales_L) if scale > 1]
        first, stop = (guided[0], guided[-1] + 1) if guided else (L, L)
        how = None if uniforms_BL is None else (temperature, top_k, top_p)
        # By default torch.compile gives up after eight graphs; there is one for each bucket, guided or not.
        with torch._dynamo.config.patch(recompile_limit=1000) if self.compiled else nullcontext():
            for t in range(L):
                if 0 < t == first:
                    self._catch_up(t, nulls)
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                read = min(self.config.block_size, (t // self.bucket + 1) * self.bucket)
                logits_BV = self.step(self.caches[2 * B if first <= t < stop else B], read, how)
                if on_step:
                    on_step(t, logits_BV[:n])
        if not self.finite[:n].all():
            raise FloatingPointError(
                "the GPT's logits are not finite: its weights are damaged, or the precision too low"
            )
        return self.codes[:n, :L].clone()


def image_uniforms(seed: int | np.ndarray, indices: np.ndarray, length: int) -> Tensor:
    """float64 (B, L) in [0, 1): each image of a seed has a stream of its own, whatever batch it is drawn in.

    seed: of all images, or one of each (B,).
    """
    seeds, images = np.asarray(seed)[..., None], np.asarray(indices)[:, None]
    return torch.from_numpy(streams.uniform(seeds, streams.SAMPLE, images, np.arange(length)))


def generate(
    model: Transformer,
    labels: Tensor | Sequence[int],
    *,
    seed: int | None = 0,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Tensor:
    """The codes (B, L) int64 of images of these classes: image i of a seed is always the same.

    seed: None takes the most likely codes. length: the first codes only. options: those of Decoder.__call__.
    """
    labels_B = torch.as_tensor(labels, dtype=torch.int64)
    length = model.config.block_size if length is None else length
    uniforms_BL = None if seed is None else image_uniforms(seed, np.arange(len(labels_B)), length)
    scales = guidance_scales(length, cfg_scale, interval=(cfg_interval,)) if length > 0 else []
    return Decoder(model, len(labels_B), dtype)(labels_B, uniforms_BL, scales, **options)
