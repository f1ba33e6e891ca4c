"""The file of a feature network: an exported program (`.pt2`) of one's own, read as data.

torch.export.save writes it: a program from uint8 images (B, H, W, 3), any B, to (features (B, D), logits (B, C)). Its name,
which labels every figure, is the extra file `name`. A file that could run code is refused (utils/plain_program.py).
"""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from utils.cli import InputError
from utils.files import atomic_path
from utils.plain_program import NotPlain, plain_copy

WANTED = "expected an exported program (torch.export.save) from uint8 (B, H, W, 3) to features (B, D) and logits (B, C)"


def save_network(path: str | Path, module: nn.Module, image_size: int, name: str) -> None:
    """Export a module (uint8 (B, H, W, 3) -> features (B, D), logits (B, C)) in evaluation mode, atomically."""
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    with torch.no_grad():
        batch = torch.export.Dim("batch")
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))
    content = io.BytesIO()  # in a file, the temporary name would be part of the archive
    torch.export.save(program, content, extra_files={"name": name})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


class Network(NamedTuple):
    """An exported network: `height` and `width` are the images it takes, None where it takes any."""

    name: str
    program: torch.export.ExportedProgram
    dimensions: int
    classes: int
    height: int | None
    width: int | None


def read_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """Read an exported network. Raises InputError for a file that is none, or for wrong inputs or outputs."""
    path, device = Path(path), torch.device(device)
    program, name = _read(path)
    _, height, width, _ = _check_input(path, program)
    features, logits = _check_outputs(path, program)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return Network(name or path.stem, program, features[1], logits[1], _fixed(height), _fixed(width))


def _read(path: Path) -> tuple[Any, str]:
    """The exported program and the name stored with it ("" without one)."""
    if not path.is_file():
        raise InputError(f"there is no network {path}; {WANTED}")
    extra = {"name": ""}
    try:
        with _quiet():
            program = torch.export.load(plain_copy(path), extra_files=extra)
    except NotPlain as error:
        raise InputError(
            f"{path} is refused, as reading it could run code that it holds ({error}): export the network again, "
            "with plain tensors and torch's own operators only"
        ) from None
    except Exception as error:  # whatever a foreign file makes of the reader
        reason = re.split(r"\.\s|\n", f"{type(error).__name__}: {error}")[0][:120]
        raise InputError(f"{path} is damaged, truncated or not a .pt2 file ({reason}); {WANTED}") from None
    name = extra["name"]
    name = name.decode(errors="replace") if isinstance(name, bytes) else name
    return program, " ".join(name.split())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back log messages: torch logs the tracebacks of what it tries, beside raising them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _declared(program: Any, names: tuple[str, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes that a program declares for the named nodes; what is no tensor is left out."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [(values[name].shape, values[name].dtype) for name in names if isinstance(values.get(name), Tensor)]


def _fixed(size: Any) -> int | None:
    """A size that is a number; None for one that is free."""
    return size if isinstance(size, int) else None


def _check_input(path: Path, program: Any) -> torch.Size:
    inputs = _declared(program, program.graph_signature.user_inputs)
    if len(inputs) != 1 or len(inputs[0][0]) != 4 or inputs[0][0][3] != 3 or inputs[0][1] != torch.uint8:
        raise InputError(f"{path} takes {_describe(inputs)}; {WANTED}")
    if _fixed(inputs[0][0][0]) is not None:
        raise InputError(f"{path} takes batches of {inputs[0][0][0]} only: export it with a dynamic first dimension")
    return inputs[0][0]


def _check_outputs(path: Path, program: Any) -> list[torch.Size]:
    outputs = _declared(program, program.graph_signature.user_outputs)
    if len(outputs) != 2 or not all(_is_table(shape) and dtype.is_floating_point for shape, dtype in outputs):
        raise InputError(f"{path} gives {_describe(outputs)}; {WANTED}")
    return [shape for shape, _ in outputs]


def _is_table(shape: torch.Size) -> bool:
    """Whether a shape is one row an image, of a fixed width."""
    return len(shape) == 2 and _fixed(shape[0]) is None and _fixed(shape[1]) is not None


def _describe(tensors: list[tuple[torch.Size, torch.dtype]]) -> str:
    """Shapes and dtypes in words; free sizes are a question mark."""
    words = []
    for shape, dtype in tensors:
        sizes = ", ".join("?" if _fixed(size) is None else str(size) for size in shape)
        words.append(f"{str(dtype).removeprefix('torch.')} ({sizes})")
    return " and ".join(words) or "no tensors"
