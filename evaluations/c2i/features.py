"""Features and logits of images: by an exported network of one's own (the `.pt2` file, its writer and its reader), and of
all images of a samples file, by any network.

The file of a network of one's own is written by torch.export.save: a program from uint8 images (B, H, W, 3), any B, to
(features (B, D), logits (B, C)). Its name, which labels every figure, is the extra file `name`; without one, the file's own
name serves. Reading an exported program can run code that it holds: use networks that you trust.
"""

import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from evaluations.c2i.metrics import Moments
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
    backend: str = "torch"
    batch_size: int = 256
    spatial_dimensions: int = 0

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
        with full_float32():
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


class Eye(Protocol):
    """What a network must offer to measure with: Network here, and InceptionNetwork.

    A call gives features (n, dimensions), logits (n, classes) and, if it has any, features of another layer for sFID
    (n, spatial_dimensions) of uint8 images (n, H, W, 3).
    """

    name: str
    path: Path
    sha256: str
    dimensions: int
    classes: int
    spatial_dimensions: int
    device: torch.device
    backend: str
    batch_size: int

    def __call__(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, ...]: ...

    def check_size(self, samples: Samples) -> None: ...


@dataclass
class Extracted:
    """A samples file in a network's features; of the other layer, moments only, as it would take as much memory again."""

    features_ND: np.ndarray  # float32
    logits_NC: np.ndarray  # float32
    spatial: Moments | None
    digests_N: np.ndarray  # 16 bytes an image: equal for equal pixels
    constant: int  # images of one colour


def extract(network: Eye, samples: Samples, batch_size: int = 256, show: bool = True, logits: bool = True) -> Extracted:
    """Everything that figures need of a samples file, read batch by batch; logits (N, 0) if they are not asked for.

    Raises InputError for images of another size than the network's, and for features that are not finite.
    """
    network.check_size(samples)
    n = len(samples)
    found = Extracted(
        np.empty((n, network.dimensions), np.float32),
        np.empty((n, network.classes if logits else 0), np.float32),
        Moments(network.spatial_dimensions, network.device) if network.spatial_dimensions else None,
        np.empty(n, "V16"),
        0,
    )
    done = 0
    with progress(total=n, desc=f"features of {samples.path.name}", unit=" images", show=show) as bar:
        for images, digests, constant in _ahead(map(_looked_at, samples.batches(batch_size))):
            rows = slice(done, done + len(images))
            features_BD, logits_BC, *spatial = network(images)
            _check_finite(network, samples, features_BD, logits_BC, *spatial)
            found.features_ND[rows], found.digests_N[rows] = features_BD, digests
            found.constant += constant
            if logits:
                found.logits_NC[rows] = logits_BC
            if found.spatial is not None:
                found.spatial.add(*spatial)
            done += len(images)
            bar.update(len(images))
    return found


def _looked_at(images_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The images, a digest of each, and how many are of one colour."""
    digests = [hashlib.sha256(np.ascontiguousarray(image)).digest()[:16] for image in images_BHWC]
    return images_BHWC, np.array(digests, "V16"), int(one_colour(images_BHWC).sum())


def one_colour(images_BHWC: np.ndarray) -> np.ndarray:
    """Whether all pixels of an image are equal: (B,)."""
    found_B = (images_BHWC[:, 0] == images_BHWC[:, 0, :1]).all(axis=(1, 2))  # the first row tells most of them
    found_B[found_B] = (images_BHWC[found_B] == images_BHWC[found_B, :1, :1]).all(axis=(1, 2, 3))
    return found_B


def _ahead(items: Iterator) -> Iterator:
    """The items, each one made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item


def _check_finite(network: Eye, samples: Samples, *parts: np.ndarray) -> None:
    if not all(np.isfinite(part).all() for part in parts):
        raise InputError(f"{network.name} ({network.path}) gives NaN or infinity for images of {samples.path}")


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, in convolutions nor in matrix products, whatever the settings outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


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
