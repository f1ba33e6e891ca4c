"""The checkpoint contract: one safe, strict reader and one atomic writer.

A checkpoint is a `.pt` dict: `model` (and `ema`) state dicts under the published names, and for our own files also
`optimizer`, `steps`, progress, `config` and `args` as plain data. Reading never executes code from the file
(`weights_only`); published files hold an argparse.Namespace, which is allow-listed.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.cli import InputError
from utils.files import atomic_path

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
STALE = ("freqs_cis",)  # rotary tables that old files carry; ours are computed


def save(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: a killed run leaves the previous file, never half of a new one."""
    with atomic_path(path) as temporary:
        torch.save(dict(checkpoint), temporary)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises InputError for a missing, truncated or unsafe file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; give the path of a .pt file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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


def state_dict(checkpoint: Mapping[str, Any], weights: str = "model") -> dict[str, Tensor]:
    """The `model` or `ema` weights of a loaded checkpoint under their plain names.

    Knows our and the published files (`model`, `ema`), DeepSpeed's `module`, `state_dict`, and bare state dicts.
    """
    if weights not in ("model", "ema"):
        raise InputError(f"weights: expected model or ema, got {weights}")
    if weights == "ema":
        if "ema" not in checkpoint:
            raise InputError(
                f"no EMA weights in this checkpoint (it holds {', '.join(map(str, list(checkpoint)[:8]))})"
            )
        state = checkpoint["ema"]
    else:
        state = next((checkpoint[key] for key in ("model", "module", "state_dict") if key in checkpoint), checkpoint)
    if not isinstance(state, Mapping):
        raise InputError(f"the checkpoint's weights are a {type(state).__name__}; expected a dict of tensors")
    plain = {}
    for name, tensor in state.items():
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if name not in STALE:
            plain[name] = tensor
    return plain


def check_fit(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raise InputError, naming the first mismatches, unless names and shapes agree. `what` says whose weights they are."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    problems = [
        f"{name} is {given[name]}, the model has {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    problems += [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is not in the model" for name in given if name not in wanted]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{what} does not fit this model: {'; '.join(problems[:3])}{more}")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load every tensor, strictly; raises as check_fit does."""
    check_fit(model, state, what)
    model.load_state_dict(state, strict=True)
