"""The checkpoint contract: one safe, strict reader of ours and the published files, and atomic writers.

A checkpoint is a `.pt` dict: `model` (and `ema`) state dicts under the published names, and for our own files also
`optimizer`, `steps`, progress, `config` and `args` as plain data. Reading never executes code from the file
(`weights_only`); published files hold an argparse.Namespace, which is allow-listed. Weights alone are safetensors, too, whose
tensors are mapped, not copied:

    X.safetensors               tensors under the published names; the metadata has `next_patch_prediction`, JSON
    FOLDER/config.json          the model's config, and the same JSON under the key `next_patch_prediction`
    FOLDER/model.safetensors    or model.safetensors.index.json and the shards that it names

The JSON is plain data of the checkpoint: config, gpt_model or vq_model, image_size, classes, steps, weights.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.cli import DISK_MARKS, InputError, note
from utils.download import recorded_sha256
from utils.files import atomic_path, write_json
from utils.records import read_json

WRAPPER = "module."  # DistributedDataParallel
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP: at any depth
OWNERS = ("module.", "model.", "gpt.", "net.")  # attributes that held the model; taken off where all names have them
# Buffers that other code keeps and ours computes.
STALE = ("freqs_cis", "freqs", "inv_freq", "causal_mask", "attn_mask", "mask")
STATES = ("model", "module", "state_dict", "net")  # ours and LlamaGen's, DeepSpeed's, Lightning's
AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_model")
BUFFER = "codebook_used"  # what a tokenizer has besides parameters
ZIP = b"PK\x03\x04"
KEY = "next_patch_prediction"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "5GB"  # the largest file of a folder


def _plain_dict(_factory: Any = None) -> dict:
    """Stands for defaultdict: the factory is never called."""
    return {}


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


# What may lie beside the weights, by the names that pickle gives it. All are plain data; paths are read as text.
PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    Counter,
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
    *(
        (getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(
        (kind, f"{module}.{kind.__name__}")
        for module in ("builtins", "__builtin__")
        for kind in (bool, int, float, complex, str, list, tuple, dict, set, frozenset)
    ),
    (_plain_dict, "collections.defaultdict"),
    *((_posix_path, f"{m}.{kind}PosixPath") for m in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
    *((_windows_path, f"{m}.{kind}WindowsPath") for m in ("pathlib", "pathlib._local") for kind in ("", "Pure")),
]


def save(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: a killed run leaves the previous file, never half of a new one.

    Raises OSError, also for a full disk.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(dict(checkpoint), temporary)
        except RuntimeError as error:
            if any(mark in str(error) for mark in DISK_MARKS):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise


def save_safetensors(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write one .safetensors file, atomically. about: plain data that reading gives back."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, _metadata(about))


def save_folder(folder: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], shard: str = SHARD) -> None:
    """Write config.json and the weights into an empty folder (made if missing), in files of at most `shard`."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(state), folder, max_shard_size=shard, metadata=_metadata(about))
    rest = {key: value for key, value in about.items() if key != "config"}
    write_json(folder / "config.json", {**about.get("config", {}), KEY: rest})


def _metadata(about: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", KEY: json.dumps(dict(about))}


@cache
def _damaged_entry(path: Path, _size: int, _changed: int) -> str | None:
    """The first entry of a zip file whose bytes differ from its checksum; a file is read once as long as it stays."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def load(source: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: a .pt or .safetensors file, or a folder of safetensors.

    mmap: leave the tensors in the file until they are used (safetensors always are); for what is read and let go.
    Raises InputError for a missing, truncated or unsafe file.
    """
    path = Path(source)
    if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
        return _read_safetensors(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; give the path of a .pt or .safetensors file")
    try:
        if _is_zip(path):
            status = path.stat()
            damaged = _damaged_entry(path.absolute(), status.st_size, status.st_mtime_ns)
            if damaged is not None:
                raise InputError(
                    f"{path} is damaged: the bytes of {damaged} in it have changed; copy or download it again"
                )
        with torch.serialization.safe_globals(PLAIN_TYPES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and _is_zip(path))
    except InputError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead the reader to
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path} is not read: it asks for {asked[1]}, so it is damaged or would run code; expected plain data"
            ) from None
        reason = re.split(r"\.\s|\n", f"{type(error).__name__}: {error}")[0][:120]
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a checkpoint: copy or download it again ({reason})"
        ) from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}; expected a dict with 'model' or a state dict")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Any]:
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
    raise InputError(
        f"{path} holds neither {SINGLE} nor {INDEX}; give a file, or a folder that pretrained_models.export wrote"
    )


def _read_file(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open  # here, as most files are .pt

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if not isinstance(about, dict):
                raise ValueError(f"{KEY} in its metadata is no JSON object")
            return {**about, "model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
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
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _is_zip(path: Path) -> bool:
    """Whether a .pt file is of the newer form; the older one cannot be mapped."""
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def chosen(checkpoint: Mapping[str, Any], weights: str = "auto") -> str:
    """`model` or `ema`. auto is ema in our own files that have it, unless their records say that it is worse; in files of
    others, whose average may be of anything, it is ema only where there is nothing else.

    Raises InputError for anything else.
    """
    if weights not in ("auto", "model", "ema"):
        raise InputError(f"weights: expected model or ema, got {weights}")
    if weights != "auto":
        return weights
    average = _part(checkpoint, AVERAGES)
    if average is None:
        return "model"
    if _part(checkpoint, STATES) is None:
        return "ema"
    return "ema" if _is_ours(checkpoint) and not average_is_worse(checkpoint) else "model"


def _part(checkpoint: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """What lies under the first of the keys that holds anything."""
    return next((checkpoint[key] for key in keys if checkpoint.get(key) is not None), None)


def _is_ours(checkpoint: Mapping[str, Any]) -> bool:
    """Whether this code wrote a checkpoint, to judge by the plain data beside the weights."""
    return "weights" in checkpoint or all(isinstance(checkpoint.get(key), Mapping) for key in ("config", "args"))


def average_is_worse(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint records, in `validation`, a higher loss of the average (EMA) than of the weights."""
    figures = checkpoint.get("validation")
    losses = [figures.get(key) for key in ("val_loss", "val_loss_ema")] if isinstance(figures, Mapping) else [None]
    if not all(isinstance(loss, int | float) for loss in losses):
        return False
    return not losses[1] <= losses[0] and math.isfinite(losses[0])


def state_dict(checkpoint: Mapping[str, Any], weights: str = "model") -> dict[str, Tensor]:
    """The `model` or `ema` weights (auto: see chosen) of a loaded checkpoint under their plain names.

    Knows our and the published files (`model`, `ema`), the keys of STATES and AVERAGES, and bare state dicts (FSDP's
    consolidated files). Buffers of STALE are left out; a note names them.
    """
    held = ", ".join(map(str, list(checkpoint)[:8]))
    if chosen(checkpoint, weights) == "ema":
        state = _part(checkpoint, AVERAGES)
        if state is None:
            raise InputError(f"no EMA weights in this checkpoint (it holds {held})")
    else:
        state = _part(checkpoint, STATES)
        if state is None and any(key in checkpoint for key in (*STATES, *AVERAGES)):
            raise InputError(f"no weights but EMA weights in this checkpoint (it holds {held}): ask for ema")
        state = checkpoint if state is None else state
    if not isinstance(state, Mapping):
        raise InputError(f"the checkpoint's weights are a {type(state).__name__}; expected a dict of tensors")
    plain = {plain_name(str(name)): tensor for name, tensor in state.items()}
    while owner := next((o for o in OWNERS if plain and all(name.startswith(o) for name in plain)), None):
        plain = {name.removeprefix(owner): tensor for name, tensor in plain.items()}
    stale = [name for name in plain if name.rsplit(".", 1)[-1] in STALE]
    if surprising := [name for name in stale if name != "freqs_cis"]:
        note(f"left out of the weights, as they are computed: {', '.join(surprising[:5])}")
    return {name: tensor for name, tensor in plain.items() if name not in stale}


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers of the model put into it."""
    for inner in INNER:
        name = name.replace(inner, "")
    while name.startswith(WRAPPER):
        name = name.removeprefix(WRAPPER)
    return name


def about(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a loaded checkpoint: what is neither weights nor the state of a training run."""
    if not any(key in checkpoint for key in (*STATES, *AVERAGES)):
        return {}
    other = (*STATES, *AVERAGES, "optimizer", "optimizer_disc", "scaler", "scaler_opponent")
    return {
        key: value.item() if isinstance(value, np.generic) else value
        for key, value in checkpoint.items()
        if key not in other and not isinstance(value, Tensor | np.ndarray | set | frozenset) and not _is_state(value)
    }


def _is_state(value: Any) -> bool:
    """Whether a value is the state dict of a further model, such as a discriminator."""
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def describe(source: str | Path, checkpoint: Mapping[str, Any], weights: str, state: Mapping[str, Tensor]) -> str:
    """A line about weights: source, parameters, dtype, EMA or raw, steps. `state` is state_dict(checkpoint, weights)."""
    parameters = [t for name, t in state.items() if t.is_floating_point() and not name.endswith(BUFFER)]
    dtypes = "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in parameters}))
    kind = "EMA" if "ema" in (chosen(checkpoint, weights), checkpoint.get("weights")) else "raw"
    steps = f", {checkpoint['steps']} steps" if "steps" in checkpoint else ""
    return f"{source}: {sum(t.numel() for t in parameters) / 1e6:.1f}M parameters, {dtypes}, {kind} weights{steps}"


def identity(state: Mapping[str, Tensor]) -> str:
    """What weights are, whatever file they lie in: a hash (16 hex digits) of names, shapes and values.

    Buffers that training only counts in are left out, and values are read as float32, so that every lossless form of a
    file gives the same.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not name.endswith(BUFFER)):
        tensor = state[name].detach()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """The name of the first tensor of a state dict with a value that is not finite."""
    floating = {name: t for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point() and t.numel()}
    # The smallest and largest values are finite only if all are; finding them takes no memory.
    wide = ((t if t.itemsize > 1 else t.float()).detach() for t in floating.values())  # float8 has no such operation
    ends = [torch.stack(t.aminmax()).isfinite().all() for t in wide]
    finite = torch.stack(ends).tolist() if ends else []
    return next((name for name, good in zip(floating, finite, strict=True) if not good), None)


def check_finite(state: Mapping[str, Any], what: str) -> None:
    """Raise InputError, naming the first such tensor, if weights have values that are not finite."""
    if name := first_not_finite(state):
        raise InputError(
            f"{what}: {name} has values that are not finite; its training failed, take an earlier checkpoint"
        )


def is_tokenizer(path: str | Path, recorded: str) -> bool:
    """Whether a file holds the tokenizer that a manifest of codes records: by its weights or, in older ones, its bytes.

    An empty record agrees with any.
    """
    if len(recorded) == 64:  # a file's sha256
        return recorded_sha256(Path(path)) == recorded
    return not recorded or identity(state_dict(load(path, mmap=True), "auto")) == recorded


def misfits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from fitting a model: shapes that differ, names that are missing or not in the model."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    problems = [
        f"{name} is {given[name]}, the model has {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    problems += [f"{name} is missing" for name in wanted if name not in given]
    return problems + [f"{name} is not in the model" for name in given if name not in wanted]


def check_fit(
    model: nn.Module, state: Mapping[str, Tensor], what: str, advice: Callable[[], str] | None = None
) -> None:
    """Raise InputError, naming the first mismatches, unless names and shapes agree.

    what: whose weights they are. advice: gives what to say besides, such as a preset that would fit.
    """
    if problems := misfits(model, state):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"{what} does not fit this model: {'; '.join(problems[:3])}{more}{f'; {advice()}' if advice else ''}"
        )


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy every tensor into the model, strictly; raises as check_fit does."""
    check_fit(model, state, what)
    model.load_state_dict(state, strict=True)
