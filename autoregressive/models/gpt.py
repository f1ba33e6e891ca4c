"""The class-conditional GPT over image codes (LlamaGen, arXiv 2406.06525), for patches of any side.

Shapes: B batch, N patches, K codes in a patch, L positions (class token and patches), V vocabulary, D width,
H query heads, G key/value heads, C channels of a head. Parameter names are those of the published checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from autoregressive.models.patches import grid_side, head_loss
from pretrained_models.loader import Pretrained, check_sizes
from utils.cli import InputError
from utils.kernels import Linear, attention, dropout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> what each query position gets


@dataclass(frozen=True)
class GPTConfig:
    """What fixes the weights' shapes and the forward pass. block_size is the number of codes of an image."""

    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    vocab_size: int = 16384
    num_classes: int = 1000
    block_size: int = 256
    token_dropout_p: float = 0.0
    resid_dropout_p: float = 0.0
    ffn_dropout_p: float = 0.0
    attn_dropout_p: float = 0.0
    drop_path_rate: float = 0.0

    def check(self) -> None:
        """Raise ValueError for sizes that do not go together."""
        if self.dim % self.n_head or self.head_dim % 4 or self.n_head % self.kv_heads:
            raise ValueError(f"heads do not fit: dim {self.dim}, {self.n_head} heads, {self.kv_heads} kv heads")
        grid_side(self.block_size)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def ffn_hidden(self) -> int:
        """Two thirds of 4 D (SwiGLU has three matrices), rounded up to a multiple."""
        return -(-int(8 * self.dim / 3) // self.multiple_of) * self.multiple_of

    def training_flops(self, patch: int = 1) -> float:
        """FLOPs of the matrix products of forward and backward for one image at a patch side.

        6 for each weight of the blocks and the head and each position, and causal attention's two products.
        """
        positions = self.block_size / patch**2
        qkv = self.dim * (self.n_head + 2 * self.kv_heads) * self.head_dim
        block = qkv + self.dim**2 + 3 * self.dim * self.ffn_hidden
        attention = self.n_layer * 2 * (positions / 2) * self.dim
        return 6.0 * positions * (self.n_layer * block + self.dim * self.vocab_size + attention)


PRESETS = {
    # for laptops and small data sets
    "GPT-XXS": GPTConfig(dim=128, n_layer=4, n_head=4, multiple_of=64),
    "GPT-XS": GPTConfig(dim=192, n_layer=6, n_head=6, multiple_of=64),
    "GPT-S": GPTConfig(dim=384, n_layer=6, n_head=6),
    # published
    "GPT-B": GPTConfig(dim=768, n_layer=12, n_head=12),  # 111M
    "GPT-L": GPTConfig(dim=1024, n_layer=24, n_head=16),  # 343M
    "GPT-XL": GPTConfig(dim=1280, n_layer=36, n_head=20),  # 775M
    "GPT-XXL": GPTConfig(dim=1536, n_layer=48, n_head=24),  # 1.4B
    "GPT-XXXL": GPTConfig(dim=2560, n_layer=48, n_head=40),  # 3.9B
    "GPT-1B": GPTConfig(dim=2048, n_layer=22, n_head=32),
    "GPT-3B": GPTConfig(dim=3200, n_layer=24, n_head=32),
    "GPT-7B": GPTConfig(dim=4096, n_layer=32, n_head=32),
}


def preset(name: str, **changes) -> GPTConfig:
    """A row of PRESETS with fields replaced."""
    return replace(PRESETS[name], **changes)


def rope_grid(config: GPTConfig) -> Tensor:
    """The rotary table of an image's codes (side, side, C/2, 2) of (cos, sin), on the CPU for a model on any device.

    The first C/4 pairs turn with the row, the rest with the column.
    """
    side, C = grid_side(config.block_size), config.head_dim
    frequency = config.rope_base ** -(torch.arange(0, C // 4, device="cpu").float() * 2 / (C // 2))
    angle = torch.arange(side, device="cpu").float()[:, None] * frequency
    rows, columns = angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)
    angles = torch.cat((rows, columns), dim=-1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x_BLHC: Tensor, rope_LC2: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels by its position's angle; computed in float32."""
    even, odd = x_BLHC.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_LC2[:, None].unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).type_as(x_BLHC)


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Stochastic depth: drop a sample's whole branch with probability p."""
    if p == 0 or not training:
        return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= p
    return x * keep / (1 - p or 1)  # p = 1 keeps nothing


class Attention(nn.Module):
    rotate = staticmethod(apply_rope)  # decoding on CPUs has a faster one

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.n_head + 2 * config.kv_heads
        self.wqkv = Linear(config.dim, heads * config.head_dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(self, x_BLD: Tensor, rope_LC2: Tensor, attend: Attend | None = None) -> Tensor:
        """Causal attention over these positions, or what `attend` makes of q (B, H, L, C), k and v (B, G, L, C)."""
        c = self.config
        qkv = self.wqkv(x_BLD).unflatten(-1, (-1, c.head_dim))
        turned, v_BLGC = qkv.split((c.n_head + c.kv_heads, c.kv_heads), dim=2)
        q_BLHC, k_BLGC = self.rotate(turned, rope_LC2).split((c.n_head, c.kv_heads), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q_BLHC, k_BLGC, v_BLGC))
        if attend is not None:
            x_BHLC = attend(q, k, v)
        else:
            x_BHLC = attention(
                q, k, v,
                is_causal=True,
                dropout_p=c.attn_dropout_p if self.training else 0.0,
                enable_gqa=c.kv_heads != c.n_head,
            )  # fmt: skip
        x_BLD = self.wo(x_BHLC.transpose(1, 2).flatten(2))
        return dropout(x_BLD, c.resid_dropout_p, self.training)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout_p = config.ffn_dropout_p
        self.w1 = Linear(config.dim, config.ffn_hidden)
        self.w3 = Linear(config.dim, config.ffn_hidden)
        self.w2 = Linear(config.ffn_hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout_p, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, drop_path_p: float) -> None:
        super().__init__()
        self.drop_path_p = drop_path_p
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BLD: Tensor, rope_LC2: Tensor, attend: Attend | None = None) -> Tensor:
        branch = self.attention(self.attention_norm(x_BLD), rope_LC2, attend)
        x_BLD = x_BLD + drop_path(branch, self.drop_path_p, self.training)
        return x_BLD + drop_path(self.feed_forward(self.ffn_norm(x_BLD)), self.drop_path_p, self.training)


class LabelEmbedder(nn.Module):
    """Class embeddings; the last row (index num_classes) is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)


class Transformer(nn.Module):
    """GPT over patches of codes: `model(patches_BNK, labels_B) -> logits_BNV`, one distribution a patch."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.cls_embedding = LabelEmbedder(config.num_classes, config.dim)
        depths = torch.linspace(0, config.drop_path_rate, config.n_layer, device="cpu").tolist()
        self.layers = nn.ModuleList(Block(config, p) for p in depths)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.register_buffer("rope", rope_grid(config).to(self.output.weight.device), persistent=False)
        self.apply(self._init)
        nn.init.zeros_(self.output.weight)  # the first loss is ln(vocab_size)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def rope_table(self, patches: int) -> Tensor:
        """(1 + patches, C/2, 2): the class token's row, then a fresh integer grid of that many patches.

        The class token's cos AND sin are 0, so its query and key vanish: published weights depend on it.
        A coarse level's grid 0..side-1 is a corner of the finest one; it is neither rescaled nor centred.
        """
        side = grid_side(patches)
        grid = self.rope[:side, :side].flatten(0, 1)
        return F.pad(grid, (0, 0, 0, 0, 1, 0))

    def embed(self, patches_BNK: Tensor, labels_B: Tensor) -> Tensor:
        """(B, 1 + N, D): the class embedding, then each patch as the mean of its codes' embeddings (paper, eq. 3)."""
        h_B1D = self.cls_embedding.embedding_table(labels_B)[:, None]
        h_BND = self.tok_embeddings(patches_BNK).mean(dim=2)
        return dropout(torch.cat((h_B1D, h_BND), dim=1), self.config.token_dropout_p, self.training)

    def hidden(
        self, h_BLD: Tensor, rope_LC2: Tensor, attends: Sequence[Attend] | None = None, recompute: bool = False
    ) -> Tensor:
        """Embedded positions -> what the head reads (B, L, D).

        attends: each layer's attention, with keys and values from elsewhere (see generate.attend).
        recompute: keep only the input of each block for the backward pass, and compute the rest again there.
        """
        for layer, attend in zip(self.layers, attends or [None] * len(self.layers), strict=True):
            if recompute and torch.is_grad_enabled():
                h_BLD = checkpoint(layer, h_BLD, rope_LC2, attend, use_reentrant=False)
            else:
                h_BLD = layer(h_BLD, rope_LC2, attend)
        return self.norm(h_BLD)

    def inputs(self, patches_BNK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """The embedded class and all patches but the last (B, N, D), and their rotary table."""
        return self.embed(patches_BNK[:, :-1], labels_B), self.rope_table(patches_BNK.shape[1])[:-1]

    def forward(self, patches_BNK: Tensor, labels_B: Tensor) -> Tensor:
        """Logits (B, N, V): position t sees the class and patches before t, and predicts patch t.

        patches_BNK: int64 (B, N, K) of to_patches, the targets included; the last one is not read.
        labels_B: int64 (B,), num_classes for the null class.
        """
        return self.output(self.hidden(*self.inputs(patches_BNK, labels_B)))

    def loss(self, patches_BNK: Tensor, labels_B: Tensor, recompute: bool = False) -> Tensor:
        """patch_loss of forward's logits, which are never held at once (see patches.head_loss)."""
        h_BND = self.hidden(*self.inputs(patches_BNK, labels_B), recompute=recompute)
        return head_loss(h_BND, self.output.weight, patches_BNK)


class GPT(
    Transformer,
    Pretrained,
    library_name="pytorch",
    pipeline_tag="unconditional-image-generation",
    tags=["autoregressive-image-generation", "next-patch-prediction"],
    paper_url="https://arxiv.org/abs/2412.15321",
):
    """A Transformer that was loaded: GPT.from_pretrained("c2i_B_256"), gpt.push_to_hub("user/repo"); see Pretrained."""

    PRESETS, CONFIG, KIND, NAME = PRESETS, GPTConfig, "GPT", "gpt_model"
    OPEN = ("vocab_size", "num_classes", "block_size")

    @classmethod
    def empty(cls, config: GPTConfig) -> Self:
        """A model on the meta device, to be given a file's tensors; its rotary table, in no file, is real."""
        model = super().empty(config)
        model.rope = rope_grid(config)
        return model

    @classmethod
    def candidates(cls, state: Mapping[str, Tensor]) -> list[str]:
        size = (_width(state), _layers(state))
        return [name for name, row in PRESETS.items() if (row.dim, row.n_layer) == size]

    @classmethod
    def sizes_of(cls, state: Mapping[str, Tensor]) -> dict[str, int]:
        tables = {"vocab_size": "tok_embeddings.weight", "num_classes": "cls_embedding.embedding_table.weight"}
        rows = {size: len(state[table]) for size, table in tables.items() if table in state}
        return rows | ({"num_classes": rows["num_classes"] - 1} if "num_classes" in rows else {})  # less the null class

    @classmethod
    def check_config(cls, config: GPTConfig, state: Mapping[str, Tensor], what: str) -> None:
        whole = ("dim", "n_layer", "n_head", "kv_heads", "multiple_of", "vocab_size", "num_classes", "block_size")
        check_sizes({key: getattr(config, key) for key in whole}, what)
        try:
            config.check()
        except ValueError as error:
            raise InputError(f"{what}: {error}") from None
        held = {**cls.sizes_of(state), "n_layer": _layers(state), "dim": _width(state) or config.dim}
        for key, value in held.items():
            if getattr(config, key) != value:
                raise InputError(f"{what} says {key} {getattr(config, key)}, its tensors are of {value}")


def _layers(state: Mapping[str, Tensor]) -> int:
    """The number of layers that tensors are named after."""
    return len({name.split(".")[1] for name in state if name.startswith("layers.")})


def _width(state: Mapping[str, Tensor]) -> int:
    """The width of the token embeddings; 0 where there are none."""
    return state["tok_embeddings.weight"].shape[-1] if "tok_embeddings.weight" in state else 0
