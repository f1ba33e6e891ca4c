"""GPT weights from a file into a model: ours (the config is inside) or published ones (the preset is named)."""

from pathlib import Path
from typing import Any

from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from utils import checkpoint
from utils.cli import InputError


def load_gpt(
    path: str | Path, gpt_model: str | None = None, weights: str = "auto", **published: Any
) -> tuple[Transformer, dict[str, Any]]:
    """Read a checkpoint strictly; return the model (dropouts off, on the CPU) and the checkpoint without its weights.

    gpt_model: a preset to insist on; needed for files without a config, which are built from it and `published`
    (vocab_size, num_classes, block_size). weights: model, ema, or auto (ema where the file has it).
    Raises InputError if the file is not the named preset, naming the first tensors that differ.
    """
    content = checkpoint.load(path)
    config = content.get("config")
    if gpt_model is None and config is None:
        raise InputError(f"{path} does not say which model it is; give --gpt-model, one of {', '.join(PRESETS)}")
    if config is None:
        config = preset(gpt_model, **published)
    else:
        try:
            config = GPTConfig(**config)
        except TypeError as error:
            raise InputError(f"{path} is no GPT of this code: its config does not fit ({error})") from None
        if gpt_model is not None:
            shared = ("vocab_size", "num_classes", "block_size")
            config = preset(gpt_model, **{key: getattr(config, key) for key in shared})
    if weights == "auto":
        weights = "ema" if "ema" in content else "model"
    model = Transformer(config)
    state = checkpoint.state_dict(content, weights)
    checkpoint.load_weights(model, state, f"{path} (loaded as {gpt_model or content.get('gpt_model', 'GPT')})")
    about = {
        key: value for key, value in content.items() if key not in ("model", "ema", "optimizer", "module", "state_dict")
    }
    return model.eval(), {**about, "weights": weights}
