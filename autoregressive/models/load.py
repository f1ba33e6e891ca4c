"""GPT weights from a file into a model: ours (the config is inside) or published ones (the tensors tell the preset)."""

import math
from collections.abc import Mapping

from torch import Tensor
from typing_extensions import Self

from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, rope_grid
from pretrained_models.loader import Pretrained, check_sizes
from utils.cli import InputError


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
        side = math.isqrt(config.block_size)
        if config.dim % config.n_head or config.n_head % config.kv_heads or side * side != config.block_size:
            raise InputError(f"{what}: dim, n_head, n_kv_head and block_size do not go together ({config})")
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
