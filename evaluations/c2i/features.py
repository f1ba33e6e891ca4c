"""Features and logits of images by an exported network of one's own: the `.pt2` file, its writer and its reader.

The file is written by torch.export.save: a program from uint8 images (B, H, W, 3), any B, to (features (B, D), logits
(B, C)). Its name, which labels every figure, is the extra file `name`; without one, the file's own name serves.
Reading an exported program can run code that it holds: use networks that you trust.
"""

import io
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from utils.cli import InputError
from utils.files import atomic_path, sha256
from utils.log import progress
from utils.samples import Samples

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


@dataclass(frozen=True)
class Network:
    """A loaded network. `height` and `width` are the images it takes, None where it takes any."""

    name: str
    path: Path
    sha256: str
    height: int | None
    width: int | None
    dimensions: int
    classes: int
    module: nn.Module
    device: torch.device

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Network":
        """Read an exported network. Raises InputError for a file that is none, or for wrong inputs or outputs."""
        path, device = Path(path), torch.device(device)
        program, name = _read(path)
        _, height, width, _ = _check_input(path, program)
        features, logits = _check_outputs(path, program)
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        return cls(
            name=name or path.stem, path=path, sha256=sha256(path),
            height=_fixed(height), width=_fixed(width), dimensions=features[1], classes=logits[1],
            module=program.module(), device=device,
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, H, W, 3) -> features (n, D), logits (n, C), float32; convolutions in full float32 on GPUs too."""
        images = torch.from_numpy(images_NHWC.copy()).to(self.device)  # a copy, as what is read from files is read-only
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.module(images)
        return features.float().cpu().numpy(), logits.float().cpu().numpy()

    def check_size(self, samples: Samples) -> None:
        """Raise InputError if the network does not take images of these samples' size."""
        _, height, width, _ = samples.shape
        if self.height not in (None, height) or self.width not in (None, width):
            raise InputError(
                f"{samples.path} holds images of {height}x{width}, but {self.name} ({self.path}) takes "
                f"{self.height or 'any'}x{self.width or 'any'}: give a --network for that size"
            )


def extract(
    network: Network, samples: Samples, batch_size: int = 256, show: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and logits (N, C), float32, of all images of a samples file, read batch by batch.

    Raises InputError for images of another size than the network's, and for features that are not finite.
    """
    network.check_size(samples)
    features_ND = np.empty((len(samples), network.dimensions), np.float32)
    logits_NC = np.empty((len(samples), network.classes), np.float32)
    done = 0
    with progress(total=len(samples), desc=f"features of {samples.path.name}", unit=" images", show=show) as bar:
        for images in samples.batches(batch_size):
            rows = slice(done, done + len(images))
            features_ND[rows], logits_NC[rows] = network(images)
            done += len(images)
            bar.update(len(images))
    if not (np.isfinite(features_ND).all() and np.isfinite(logits_NC).all()):
        raise InputError(f"{network.name} ({network.path}) gives NaN or infinity for images of {samples.path}")
    return features_ND, logits_NC


def _read(path: Path) -> tuple[Any, str]:
    """The exported program and the name stored with it ("" without one)."""
    if not path.is_file():
        raise InputError(f"there is no network {path}; {WANTED}")
    extra = {"name": ""}
    try:
        with _quiet(), zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
            program = torch.export.load(path, extra_files=extra)
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
