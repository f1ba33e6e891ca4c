"""The checkpoint contract: one safe, strict reader of ours and the published files, and one atomic writer.

A checkpoint is a `.pt` dict: `model` (and `ema`) state dicts under the published names, and for our own files also
`optimizer`, `steps`, progress, `config` and `args` as plain data. Reading never executes code from the file
(`weights_only`); published files hold an argparse.Namespace, which is allow-listed. Safetensors: see utils.weights.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils import weights as safetensors
from utils.cli import InputError
from utils.files import atomic_path
from utils.hub import hub_file, parse_address

Model = TypeVar("Model", bound=nn.Module)
WRAPPER = "module."  # DistributedDataParallel
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP: at any depth
STALE = ("freqs_cis",)  # rotary tables that old files carry; ours are computed
STATES = ("model", "module", "state_dict")  # ours and LlamaGen's, DeepSpeed's, Lightning's
BUFFER = "codebook_used"  # what a tokenizer has besides parameters
ZIP = b"PK\x03\x04"


def save(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: a killed run leaves the previous file, never half of a new one."""
    with atomic_path(path) as temporary:
        torch.save(dict(checkpoint), temporary)


def load(source: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: a .pt or .safetensors file, a folder of those, or hf://user/repo/file.

    mmap: leave the tensors in the file until they are used (safetensors always are); for what is read and let go.
    Raises InputError for a missing, truncated or unsafe file.
    """
    path = hub_file(*parse_address(source)) if str(source).startswith("hf://") else Path(source)
    if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
        return safetensors.read(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; give the path of a .pt or .safetensors file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and _is_zip(path))
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


def _is_zip(path: Path) -> bool:
    """Whether a .pt file is of the newer form; the older one cannot be mapped."""
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def chosen(checkpoint: Mapping[str, Any], weights: str = "auto") -> str:
    """`model` or `ema`; auto is ema where the checkpoint has it. Raises InputError for anything else."""
    if weights not in ("auto", "model", "ema"):
        raise InputError(f"weights: expected model or ema, got {weights}")
    if weights == "auto":
        return "ema" if checkpoint.get("ema") is not None else "model"
    return weights


def state_dict(checkpoint: Mapping[str, Any], weights: str = "model") -> dict[str, Tensor]:
    """The `model` or `ema` weights (auto: see chosen) of a loaded checkpoint under their plain names.

    Knows our and the published files (`model`, `ema`), DeepSpeed's `module`, `state_dict`, and bare state dicts (FSDP's
    consolidated files).
    """
    if chosen(checkpoint, weights) == "ema":
        if "ema" not in checkpoint:
            raise InputError(
                f"no EMA weights in this checkpoint (it holds {', '.join(map(str, list(checkpoint)[:8]))})"
            )
        state = checkpoint["ema"]
    else:
        state = next((checkpoint[key] for key in STATES if key in checkpoint), checkpoint)
    if not isinstance(state, Mapping):
        raise InputError(f"the checkpoint's weights are a {type(state).__name__}; expected a dict of tensors")
    plain = {plain_name(str(name)): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in plain.items() if name not in STALE}


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers of the model put into it."""
    for inner in INNER:
        name = name.replace(inner, "")
    while name.startswith(WRAPPER):
        name = name.removeprefix(WRAPPER)
    return name


def about(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a loaded checkpoint: what is neither weights nor the state of a training run."""
    if not any(key in checkpoint for key in (*STATES, "ema")):
        return {}
    other = (*STATES, "ema", "optimizer", "scaler")
    return {key: value for key, value in checkpoint.items() if key not in other and not isinstance(value, Tensor)}


def describe(source: str | Path, checkpoint: Mapping[str, Any], weights: str, state: Mapping[str, Tensor]) -> str:
    """A line about weights: source, parameters, dtype, EMA or raw, steps. `state` is state_dict(checkpoint, weights)."""
    parameters = [t for name, t in state.items() if t.is_floating_point() and not name.endswith(BUFFER)]
    dtypes = "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in parameters}))
    kind = "EMA" if "ema" in (chosen(checkpoint, weights), checkpoint.get("weights")) else "raw"
    steps = f", {checkpoint['steps']} steps" if "steps" in checkpoint else ""
    return f"{source}: {sum(t.numel() for t in parameters) / 1e6:.1f}M parameters, {dtypes}, {kind} weights{steps}"


class _NoInitialisation(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device it changes nothing, but costs PyTorch seconds of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def on_meta(build: Callable[[], Model]) -> Model:
    """What build() makes, with all its tensors on the meta device: names and shapes without memory."""
    with torch.device("meta"), _NoInitialisation():
        return build()


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


def check_fit(model: nn.Module, state: Mapping[str, Tensor], what: str, advice: Callable[[], str] = str) -> None:
    """Raise InputError, naming the first mismatches, unless names and shapes agree.

    what: whose weights they are. advice: gives what to say besides, such as a preset that would fit.
    """
    if problems := misfits(model, state):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{what} does not fit this model: {'; '.join(problems[:3])}{more}{advice()}")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy every tensor into the model, strictly; raises as check_fit does."""
    check_fit(model, state, what)
    model.load_state_dict(state, strict=True)


def adopt_weights(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Give a model on the meta device the tensors themselves, so that no second copy of them exists; names must fit.

    dtype: of all floating-point weights; by default the file's, float32 where it holds several.
    """
    floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if dtype is None and len(floating) > 1:
        dtype = torch.float32
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(cast if dtype else state, strict=True, assign=True)
