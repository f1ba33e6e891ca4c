"""GPT weights from a file into a model: ours (the config is inside) or published ones (the tensors tell the preset)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor

from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from utils import checkpoint
from utils.cli import InputError, note
from utils.weights import fill_folder


class GPT(
    Transformer,
    PyTorchModelHubMixin,
    library_name="pytorch",
    pipeline_tag="unconditional-image-generation",
    tags=["autoregressive-image-generation", "next-patch-prediction"],
    paper_url="https://arxiv.org/abs/2412.15321",
):
    """A Transformer that was loaded: GPT.from_pretrained("user/repo" or a folder), gpt.push_to_hub("user/repo")."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.about: dict[str, Any] = {}  # plain data of its file, but for the run's arguments

    @classmethod
    def empty(cls, config: GPTConfig) -> "GPT":
        """A model on the meta device, to be given a file's tensors; its rotary table, in no file, is real."""
        model = checkpoint.on_meta(lambda: cls(config))
        model.rope = model.rope_grid()
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        fill_folder(save_directory, self.state_dict(), {**self.about, "config": vars(self.config)})

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, dtype: torch.dtype | None = None, config=None, **download: Any
    ) -> "GPT":
        files = ["*.safetensors", "*.json"]
        folder = model_id if Path(model_id).is_dir() else snapshot_download(model_id, allow_patterns=files, **download)
        return load_gpt(folder, dtype=dtype)[0]


def load_gpt(
    source: str | Path,
    gpt_model: str | None = None,
    weights: str = "auto",
    dtype: torch.dtype | None = None,
    **published: Any,
) -> tuple[GPT, dict[str, Any]]:
    """Read weights strictly; return the model (eval mode, on the CPU) and the file's plain data, and say what was loaded.

    source: whatever utils.checkpoint.load takes. gpt_model: a preset to insist on; by default the file's config, or the
    preset that its tensors are of. weights: model, ema, or auto (ema where the file has it). dtype: of the weights, by
    default the file's. published: vocab_size, num_classes and block_size of files without a config; what is not given is
    read off the tensors, but for block_size (256). The model has the file's own tensors: no second copy is made.
    What is returned beside the model has `weights`, and `gpt_model` where it is known.
    Raises InputError if the file is not that model, naming the first tensors that differ and the preset that would fit.
    """
    content = checkpoint.load(source, mmap=True)
    state = checkpoint.state_dict(content, weights)
    about = checkpoint.about(content)
    name, config = gpt_config(about, state, gpt_model, published, str(source))
    model = GPT.empty(config)
    checkpoint.check_fit(model, state, f"{source} (loaded as {name or 'GPT'})", lambda: gpt_advice(state))
    checkpoint.adopt_weights(model, state, dtype)
    kind = about.get("weights") or checkpoint.chosen(content, weights)  # an export says which it was made of
    about |= {**({"gpt_model": name} if name else {}), "weights": kind}
    model.about = {key: value for key, value in about.items() if key != "args"}
    note(f"loaded {name or 'GPT'} from {checkpoint.describe(source, content, weights, state)}")
    return model.eval(), about


def gpt_config(
    about: Mapping[str, Any],
    state: Mapping[str, Tensor],
    gpt_model: str | None,
    published: Mapping[str, Any],
    what: str,
) -> tuple[str | None, GPTConfig]:
    """The preset's name, if there is one, and the config of a file. Raises InputError where nothing says it."""
    if "config" in about:
        try:
            config = GPTConfig(**about["config"])
        except TypeError as error:
            raise InputError(f"{what} is no GPT of this code: its config does not fit ({error})") from None
        if gpt_model is None:
            return about.get("gpt_model"), config
        shared = ("vocab_size", "num_classes", "block_size")
        return gpt_model, preset(gpt_model, **{key: getattr(config, key) for key in shared})
    fits = presets_of(state)
    if gpt_model is None and not fits:
        raise InputError(f"{what} does not say which model it is; its tensors are those of no GPT preset")
    name = gpt_model or fits[0]
    return name, preset(name, **{**sizes_of(state), **published})


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The vocabulary and the number of classes that GPT weights are for, as far as they have them."""
    tables = {"vocab_size": "tok_embeddings.weight", "num_classes": "cls_embedding.embedding_table.weight"}
    rows = {size: len(state[table]) for size, table in tables.items() if table in state}
    return rows | ({"num_classes": rows["num_classes"] - 1} if "num_classes" in rows else {})  # less the null class


def presets_of(state: Mapping[str, Tensor]) -> list[str]:
    """The presets that have these tensors' names and shapes, whatever the vocabulary and the number of classes."""
    if "tok_embeddings.weight" not in state:
        return []
    width = state["tok_embeddings.weight"].shape[-1]
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    candidates = [name for name, row in PRESETS.items() if (row.dim, row.n_layer) == (width, layers)]
    return [n for n in candidates if not checkpoint.misfits(GPT.empty(preset(n, **sizes_of(state))), state)]


def gpt_advice(state: Mapping[str, Tensor]) -> str:
    """What to say of weights that do not fit: the preset that would, with its sizes."""
    fits, sizes = presets_of(state), sizes_of(state)
    if not fits:
        return "; no GPT preset has these tensors"
    return f"; they are those of {fits[0]} for {sizes['vocab_size']} codes and {sizes['num_classes']} classes"
