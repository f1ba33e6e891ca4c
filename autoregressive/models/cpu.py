"""What makes decoding fast on CPUs. Each function here does what a plain one of generate.py or gpt.py does.

Shapes: R rows, G key/value heads, Q queries of a head, L positions of a cache, n of them read, C channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.kernels import cpu_computes_in_bf16, has_onednn


class PackedLinear(nn.Module):
    """nn.Linear without bias on a CPU, its weight in oneDNN's own order.

    A row's result is the same whatever the number of rows, from two rows on.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether this PyTorch and processor have it for such a weight."""
        known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and cpu_computes_in_bf16())
        return weight.device.type == "cpu" and known and has_onednn()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def apply_complex_rope(x_BLHC: Tensor, rope_LC: Tensor) -> Tensor:
    """gpt.apply_rope in one operation; rope_LC: complex numbers, torch.view_as_complex of its table."""
    pairs = torch.view_as_complex(x_BLHC.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope_LC[:, None]).flatten(-2).type_as(x_BLHC)


def tune(model: nn.Module) -> nn.Module:
    """Change a Transformer, in place, to packed layers and a rotary table of complex numbers."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None and PackedLinear.fits(child.weight):
                setattr(module, name, PackedLinear(child))
    for layer in model.layers:
        layer.attention.rotate = apply_complex_rope
    return model


def mix(weights_RGQn: Tensor, values_RGLC: Tensor, bags: tuple[Tensor, Tensor]) -> Tensor:
    """weights @ values[:, :, :n], as EmbeddingBag sums weighted rows: faster than a batched product.

    bags: the rows (R G Q n,) of the values, and where each of the R G Q sums starts (see make_bags).
    """
    table = values_RGLC.view(-1, values_RGLC.shape[-1])
    sums = F.embedding_bag(bags[0], table, bags[1], mode="sum", per_sample_weights=weights_RGQn.flatten())
    return sums.view(*weights_RGQn.shape[:-1], -1)


def make_bags(rows: int, heads: int, kv_heads: int, length: int, read: int) -> tuple[Tensor, Tensor]:
    """The bags of mix for caches (rows, kv_heads, length, C) that are read up to `read`."""
    starts = torch.arange(0, rows * kv_heads * length, length)
    indices = starts.repeat_interleave(heads // kv_heads)[:, None] + torch.arange(read)
    return indices.flatten(), torch.arange(0, indices.numel(), read)
