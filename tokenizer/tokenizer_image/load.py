"""Tokenizer weights from a file into a model: ours (the config is inside) or published ones (the preset is named)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizer.tokenizer_image.vq_model import PRESETS, VQConfig, VQModel, preset
from utils import checkpoint
from utils.cli import InputError

DEFAULT = "VQ-16"  # of files that don't say, as in the published commands
# What a preset leaves open: the command line of vq_train.py can change it.
OPEN = ("codebook_size", "codebook_embed_dim", "commit_loss_beta", "entropy_loss_ratio", "show_usage")


def load_tokenizer(
    source: str | Path | Mapping[str, Any], vq_model: str | None = None, weights: str = "auto"
) -> tuple[VQModel, dict[str, Any]]:
    """Read a checkpoint strictly; return the model (eval mode, on the CPU) and the checkpoint without its weights.

    source: a file, or what utils.checkpoint.load made of it. vq_model: a preset to insist on; by default what the file
    says, VQ-16 for one that doesn't. weights: model, ema, or auto (ema where the file has it). What is returned beside
    the model always has `vq_model` and `weights`. Raises InputError if the file is not that preset, naming the first
    tensors that differ.
    """
    content, what = (
        (source, "the checkpoint") if isinstance(source, Mapping) else (checkpoint.load(source), str(source))
    )
    name = vq_model or content.get("vq_model", DEFAULT)
    config = tokenizer_config(content, vq_model, what)
    if weights == "auto":
        weights = "ema" if "ema" in content else "model"
    model = VQModel(config)
    hint = "" if vq_model or "vq_model" in content else "; --vq-model names another"
    checkpoint.load_weights(model, checkpoint.state_dict(content, weights), f"{what} (loaded as {name}{hint})")
    kept = ("model", "ema", "optimizer", "module", "state_dict")
    about = {key: value for key, value in content.items() if key not in kept} if "config" in content else {}
    return model.eval().requires_grad_(False), {**about, "vq_model": name, "weights": weights}


def tokenizer_config(content: Mapping[str, Any], vq_model: str | None, what: str) -> VQConfig:
    """The config of a loaded checkpoint, or of the named preset. Raises InputError for an unknown name or config."""
    if vq_model is not None and vq_model not in PRESETS:
        raise InputError(f"there is no tokenizer {vq_model}; choose one of {', '.join(PRESETS)}")
    stored = content.get("config")
    if stored is None:
        return preset(vq_model or DEFAULT)
    try:
        config = VQConfig(**stored)
    except TypeError as error:
        raise InputError(f"{what} is no tokenizer of this code: its config does not fit ({error})") from None
    return config if vq_model is None else preset(vq_model, **{key: getattr(config, key) for key in OPEN})
