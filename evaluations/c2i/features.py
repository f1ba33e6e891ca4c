"""Features and logits of images by any network, and of all images of a samples file."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.metrics import Moments, moments_of
from utils.cli import InputError, explain
from utils.files import sha256
from utils.log import progress
from utils.networks import read_network, save_network  # noqa: F401 (where users' scripts import it from)
from utils.samples import Samples


@dataclass(frozen=True)
class FeatureNetwork:
    """A network to measure with: an exported one (load), or Inception (inception.load_inception).

    run: uint8 images (B, H, W, 3) to features (B, dimensions), logits (B, classes) and, if it has any, features of another
    layer for sFID (B, spatial_dimensions). `height` and `width` are the images it takes, None where it takes any.
    """

    name: str
    path: Path
    sha256: str
    dimensions: int
    classes: int
    device: torch.device
    run: Callable[[Tensor], Sequence[Tensor]]
    spatial_dimensions: int = 0
    height: int | None = None
    width: int | None = None
    backend: str = "torch"
    batch_size: int = 256

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "FeatureNetwork":
        """Read an exported network. Raises InputError for a file that is none, or for wrong inputs or outputs."""
        path, device = Path(path), torch.device(device)
        network = read_network(path, device)
        return cls(
            name=network.name, path=path, sha256=sha256(path), dimensions=network.dimensions, classes=network.classes,
            height=network.height, width=network.width, run=network.program.module(check_guards=False), device=device,
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, ...]:
        """Everything that `run` gives of images, float32; computed in full float32 on GPUs too.

        Raises InputError where the network fails.
        """
        images = torch.from_numpy(images_NHWC.copy()).to(self.device)  # a copy, as what is read from files is read-only
        try:
            with full_float32():
                return tuple(part.float().cpu().numpy() for part in self.run(images))
        except RuntimeError as error:
            if explain(error):  # out of memory
                raise
            reason = str(error).strip().splitlines()[-1][:160]
            raise InputError(
                f"{self.name} ({self.path}) fails on images of shape {images_NHWC.shape}: {reason}"
            ) from None

    def check_size(self, samples: Samples) -> None:
        """Raise InputError if the network does not take images of these samples' size."""
        _, height, width, _ = samples.shape
        if self.height not in (None, height) or self.width not in (None, width):
            raise InputError(
                f"{samples.path} holds images of {height}x{width}, but {self.name} ({self.path}) takes "
                f"{self.height or 'any'}x{self.width or 'any'}: give a --network for that size"
            )


@dataclass
class Extracted:
    """A samples file in a network's features; of the other layer, moments only, as it would take as much memory again.

    moments: "pool" of the features and, where the network has that layer, "spatial"; none without images.
    """

    features_ND: np.ndarray  # float32
    logits_NC: np.ndarray  # float32
    moments: dict[str, Moments]
    digests_N: np.ndarray  # 16 bytes an image: equal for equal pixels
    constant: int = 0  # images of one colour


def extract(network: FeatureNetwork, samples: Samples, batch_size: int | None = None, logits: bool = True) -> Extracted:
    """Everything that figures need of a samples file, read batch by batch; logits (N, 0) if they are not asked for.

    batch_size: default: the network's. Images are of the network's size, see check_size. Raises InputError for features
    that are not finite.
    """
    n, done = len(samples), 0
    found = Extracted(
        np.empty((n, network.dimensions), np.float32),
        np.empty((n, network.classes if logits else 0), np.float32),
        {},
        np.empty(n, "V16"),
    )
    if n and network.spatial_dimensions:
        found.moments["spatial"] = Moments.empty(network.spatial_dimensions, network.device)
    with progress(total=n, desc=f"features of {samples.path.name}", unit=" images", show=n > 0) as bar:
        for images, digests, constant in _read_ahead(
            map(_inspected, samples.batches(batch_size or network.batch_size))
        ):
            rows = slice(done, done + len(images))
            features_BD, logits_BC, *spatial = network(images)
            if not all(np.isfinite(part).all() for part in (features_BD, logits_BC, *spatial)):
                raise InputError(f"{network.name} ({network.path}) gives NaN or infinity for images of {samples.path}")
            found.features_ND[rows], found.digests_N[rows] = features_BD, digests
            found.constant += constant
            if logits:
                found.logits_NC[rows] = logits_BC
            for part in spatial:
                found.moments["spatial"].add(part)
            done += len(images)
            bar.update(len(images))
    if n:
        found.moments["pool"] = moments_of(found.features_ND, network.device)
    return found


def _inspected(images_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The images, a digest of each, and how many are of one colour."""
    digests = [hashlib.sha256(np.ascontiguousarray(image)).digest()[:16] for image in images_BHWC]
    return images_BHWC, np.array(digests, "V16"), int(one_colour(images_BHWC).sum())


def one_colour(images_BHWC: np.ndarray) -> np.ndarray:
    """Whether all pixels of an image are equal: (B,)."""
    found_B = (images_BHWC[:, 0] == images_BHWC[:, 0, :1]).all(axis=(1, 2))  # the first row tells most of them
    found_B[found_B] = (images_BHWC[found_B] == images_BHWC[found_B, :1, :1]).all(axis=(1, 2, 3))
    return found_B


def _read_ahead(items: Iterator) -> Iterator:
    """The items, each one made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item


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
