"""Tokenizer weights from a file into a model: ours (the config is inside) or published ones (the tensors tell the preset)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrained_models.loader import Pretrained, check_sizes
from tokenizer.tokenizer_image.vq_model import PRESETS, VQConfig, VQModel
from utils.cli import InputError


class Tokenizer(
    VQModel,
    Pretrained,
    library_name="pytorch",
    tags=["image-tokenizer", "vector-quantization", "next-patch-prediction"],
    paper_url="https://arxiv.org/abs/2406.06525",
):
    """A VQModel that was loaded, in float32: Tokenizer.from_pretrained("vq_ds16_c2i"); see Pretrained."""

    PRESETS, CONFIG, KIND, NAME, DTYPE = PRESETS, VQConfig, "tokenizer", "vq_model", torch.float32
    # What the command line of vq_train.py can change.
    OPEN = ("codebook_size", "codebook_embed_dim", "commit_loss_beta", "entropy_loss_ratio", "show_usage")

    @classmethod
    def sizes_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        codebook = state.get("quantize.embedding.weight", torch.empty(0))
        if codebook.dim() != 2:
            return {}
        usage = "quantize.codebook_used" in state
        return {"codebook_size": len(codebook), "codebook_embed_dim": codebook.shape[1], "show_usage": usage}

    @classmethod
    def check_config(cls, config: VQConfig, state: Mapping[str, Tensor], what: str) -> None:
        whole = ("ch", "num_res_blocks", "z_channels", "codebook_size", "codebook_embed_dim", "fold")
        levels = (*config.encoder_ch_mult, *config.decoder_ch_mult)
        sizes = {key: getattr(config, key) for key in whole} | {f"ch_mult {i}": level for i, level in enumerate(levels)}
        check_sizes(sizes, what)
        if len(levels) * config.num_res_blocks > len(state):
            raise InputError(
                f"{what} says {config.num_res_blocks} blocks for each of {len(levels)} levels, but it holds "
                f"{len(state)} tensors"
            )
