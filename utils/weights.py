"""Weights as safetensors: a file that says what it is, or a Hub-ready folder; tensors are mapped, not copied.

    X.safetensors               tensors under the published names; the metadata has `next_patch_prediction`, JSON
    FOLDER/config.json          the model's config, and the same JSON under the key `next_patch_prediction`
    FOLDER/model.safetensors    or model.safetensors.index.json and the shards that it names
    FOLDER/README.md            the model card

The JSON is plain data of the checkpoint: config, gpt_model or vq_model, image_size, classes, steps, weights.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.cli import InputError
from utils.files import atomic_path, write_json

KEY = "next_patch_prediction"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "5GB"  # the largest file of a folder


def read(path: Path) -> dict[str, Any]:
    """A .safetensors file or a folder of them as a checkpoint: `model` and the plain data beside it.

    Raises InputError for what is missing, truncated or not of this form.
    """
    if not path.is_dir():
        return _read_file(path)
    config = _read_json(path / "config.json") if (path / "config.json").is_file() else {}
    content = config.pop(KEY, {})
    content = {**({"config": config} if config else {}), **content}
    if (path / INDEX).is_file():
        return {**content, "model": _read_shards(path)}
    if (path / SINGLE).is_file():
        return {**content, **_read_file(path / SINGLE)}
    raise InputError(f"{path} holds neither {SINGLE} nor {INDEX}; give a file, or a folder that utils.export wrote")


def _read_file(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open  # here, as most files are .pt

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
            return {**about, "model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise InputError(
            f"{path} ({size} bytes) is missing, truncated or no safetensors file: copy or download it again ({error})"
        ) from None


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors that the index names, file by file."""
    index = _read_json(folder / INDEX).get("weight_map", {})
    state: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name:
            raise InputError(f"{folder / INDEX} names a file outside its folder ({name}): download the folder again")
        state.update(_read_file(folder / name)["model"])
    missing = [name for name in index if name not in state]
    if missing or not index:
        raise InputError(f"{folder} lacks {', '.join(missing[:3]) or 'all tensors'}: download the folder again")
    return {name: state[name] for name in index}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def write_file(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write one .safetensors file, atomically. about: plain data that reading gives back."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, _metadata(about))


def write_folder(folder: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], card: str) -> None:
    """Write a Hub-ready folder, which appears whole or not at all. Raises InputError if it is there already."""
    if folder.exists():
        raise InputError(f"{folder} is there already: give a new folder, or delete it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        fill_folder(temporary, state, about)
        (temporary / "README.md").write_text(card)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fill_folder(folder: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], shard: str = SHARD) -> None:
    """Write config.json and the weights into an empty folder, in files of at most `shard`."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(state), folder, max_shard_size=shard, metadata=_metadata(about))
    rest = {key: value for key, value in about.items() if key != "config"}
    write_json(folder / "config.json", {**about.get("config", {}), KEY: rest})


def _metadata(about: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", KEY: json.dumps(dict(about))}
