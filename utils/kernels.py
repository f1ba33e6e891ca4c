"""Operations for which PyTorch's own kernels are slow on some CPUs. Elsewhere, and compiled, each is PyTorch's plain one.

Which are used depends on the processor alone, and is not measured at run time: all processes of a run, and its restarts, must
decide alike. What each gains is in docs/benchmarks.md. Shapes: D and O widths.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@cache
def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's operators that are not public, and so may be missing in another one."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


@cache
def onednn_is_faster() -> bool:
    """Whether its float32 products beat PyTorch's own (MKL's): where there is AVX-512 that MKL does not use, as on AMD."""
    processor = torch.cpu.get_capabilities()
    fits = processor.get("avx512_f", False) and "intel" not in processor.get("cpu_name", "").lower()
    return fits and has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # no where oneDNN is limited to AVX2


@cache
def cpu_computes_in_bf16() -> bool:
    """Whether this processor has products of bfloat16 (those of x86 or Arm), which are faster than those of float32."""
    processor = torch.cpu.get_capabilities()
    native = any(processor.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return native and has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def runs_on_cpu(x: Tensor) -> bool:
    """Whether x is computed on a CPU, by PyTorch's own kernels: not compiled, and not fake, as a plan of a GPU's memory is."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def use_onednn(x: Tensor) -> bool:
    """Whether `product` of x is oneDNN's."""
    return x.dtype == torch.float32 and runs_on_cpu(x) and onednn_is_faster()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., D) @ b (D, O), by the faster library."""
    if not use_onednn(a):
        return a @ b
    if b.shape[1] < len(a) <= b.shape[0] and a.dim() == 2:  # up to 1.6 times as fast: the transposed product, as a view
        return product(b.t(), a.t()).t()
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


class _Linear(torch.autograd.Function):
    """x @ weight.T and its gradients by product."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_OD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OD)
        return product(x, weight_OD.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OD = ctx.saved_tensors
        dx = product(grad, weight_OD) if ctx.needs_input_grad[0] else None
        dweight = product(grad.flatten(0, -2).t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, dweight


class Linear(nn.Linear):
    """nn.Linear without bias."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 1 and x.numel() and use_onednn(x) and not torch.is_autocast_enabled("cpu"):
            return _Linear.apply(x, self.weight)
        return super().forward(x)


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """F.scaled_dot_product_attention; bfloat16 on CPUs is computed in float32, which takes down to a quarter of the time."""
    if q.dtype != torch.bfloat16 or not runs_on_cpu(q):
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).type_as(q)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm; under autocast to bfloat16 CPUs compute it in float32, as GPUs do: PyTorch's takes 5 times as long where
    channels come last, as in training."""

    def forward(self, x: Tensor) -> Tensor:
        widen = x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32 and runs_on_cpu(x)
        return super().forward(x.float() if widen else x)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout; on CPUs a mask takes a quarter of the time: 16 random bits an element, so p is a multiple of 2**-16."""
    if not training or not 0 < p < 1 or not runs_on_cpu(x):
        return F.dropout(x, p, training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * (keep.to(x.dtype) / (1 - p))
