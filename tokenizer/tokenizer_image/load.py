"""Tokenizer weights from a file into a model: ours (the config is inside) or published ones (the tensors tell the preset)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import PRESETS, VQConfig, VQModel, preset
from utils import checkpoint
from utils.cli import InputError, note
from utils.weights import fill_folder

DEFAULT = "VQ-16"  # of files that fit no preset and don't say, as in the published commands
# What a preset leaves open: the command line of vq_train.py can change it.
OPEN = ("codebook_size", "codebook_embed_dim", "commit_loss_beta", "entropy_loss_ratio", "show_usage")


class Tokenizer(
    VQModel,
    PyTorchModelHubMixin,
    library_name="pytorch",
    tags=["image-tokenizer", "vector-quantization", "next-patch-prediction"],
    paper_url="https://arxiv.org/abs/2406.06525",
):
    """A VQModel that was loaded: Tokenizer.from_pretrained("user/repo" or a folder), .push_to_hub("user/repo")."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.about: dict[str, Any] = {}  # plain data of its file, but for the run's arguments

    def _save_pretrained(self, save_directory: Path) -> None:
        fill_folder(save_directory, self.state_dict(), {**self.about, "config": vars(self.config)})

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config=None, **download: Any) -> "Tokenizer":
        files = ["*.safetensors", "*.json"]
        folder = model_id if Path(model_id).is_dir() else snapshot_download(model_id, allow_patterns=files, **download)
        return load_tokenizer(folder)[0]


def load_tokenizer(
    source: str | Path | Mapping[str, Any], vq_model: str | None = None, weights: str = "auto"
) -> tuple[Tokenizer, dict[str, Any]]:
    """Read weights strictly; return the model (eval mode, float32, on the CPU) and the file's plain data, and say what was
    loaded.

    source: whatever utils.checkpoint.load takes, or what it made of that. vq_model: a preset to insist on; by default what
    the file says, or the preset that its tensors are of. weights: model, ema, or auto (ema where the file has it).
    What is returned beside the model always has `vq_model` and `weights`. Raises InputError if the file is not that
    preset, naming the first tensors that differ and the preset that would fit.
    """
    given = isinstance(source, Mapping)
    content, what = (source, "the checkpoint") if given else (checkpoint.load(source, mmap=True), str(source))
    state, about = checkpoint.state_dict(content, weights), checkpoint.about(content)
    name = vq_model or about.get("vq_model") or preset_of(state) or DEFAULT
    config = tokenizer_config(about, state, vq_model, what)
    model = checkpoint.on_meta(lambda: Tokenizer(config))
    checkpoint.check_fit(model, state, f"{what} (loaded as {name})", lambda: tokenizer_advice(state))
    checkpoint.adopt_weights(model, state, torch.float32)
    kind = about.get("weights") or checkpoint.chosen(content, weights)  # an export says which it was made of
    about = {**(about if "config" in about else {}), "vq_model": name, "weights": kind}
    model.about = {key: value for key, value in about.items() if key != "args"}
    if not given:
        note(f"loaded {name} from {checkpoint.describe(source, content, weights, state)}")
    return model.eval().requires_grad_(False), about


def tokenizer_config(
    about: Mapping[str, Any], state: Mapping[str, Tensor], vq_model: str | None, what: str
) -> VQConfig:
    """The config of a loaded checkpoint, or of the named preset. Raises InputError for an unknown name or config."""
    if vq_model is not None and vq_model not in PRESETS:
        raise InputError(f"there is no tokenizer {vq_model}; choose one of {', '.join(PRESETS)}")
    if "config" not in about:
        return preset(vq_model) if vq_model else sized(preset_of(state) or DEFAULT, state)
    try:
        config = VQConfig(**about["config"])
    except TypeError as error:
        raise InputError(f"{what} is no tokenizer of this code: its config does not fit ({error})") from None
    return config if vq_model is None else preset(vq_model, **{key: getattr(config, key) for key in OPEN})


def sized(name: str, state: Mapping[str, Tensor]) -> VQConfig:
    """A preset with the codebook that the weights have, if they have one."""
    codebook = state.get("quantize.embedding.weight", torch.empty(0))
    if codebook.dim() != 2:
        return preset(name)
    usage = "quantize.codebook_used" in state
    return preset(name, codebook_size=len(codebook), codebook_embed_dim=codebook.shape[1], show_usage=usage)


def preset_of(state: Mapping[str, Tensor]) -> str | None:
    """The preset that has these tensors' names and shapes, whatever the codebook."""
    for name in PRESETS:
        config = sized(name, state)
        if not checkpoint.misfits(checkpoint.on_meta(lambda config=config: VQModel(config)), state):
            return name
    return None


def tokenizer_advice(state: Mapping[str, Tensor]) -> str:
    """What to say of weights that do not fit: the preset that would."""
    name = preset_of(state)
    size = len(state["quantize.embedding.weight"]) if name else 0
    return f"; they are those of {name} with {size} codes" if name else "; no tokenizer preset has these tensors"
