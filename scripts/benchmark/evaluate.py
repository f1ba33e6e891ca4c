"""Evaluation: time and memory of everything but the network at full size, and the network's images a second.

    python -m scripts.benchmark.evaluate --samples 50000 --references 10000 --network-images 128

Images of noise are written to a temporary .npz and read back as the evaluator reads them. A stub gives random features for
them, and the time that it takes is left out. The network is Inception's graph with random weights, or --inception PATH.
Peak memory is the process's own; network and figures run in a process each. --sqrtm also times the matrix square root
that the published evaluator takes, twice, on the same covariances. --compare: the network in bf16, which the evaluator does
not offer, and how far its features then are from those in float32.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

from evaluations.c2i import metrics
from evaluations.c2i.features import extract
from evaluations.c2i.inception import BACKENDS, CLASSES, POOL_SIZE, SPATIAL_SIZE, load_inception
from evaluations.c2i.manifold import Manifold, precision_recall
from evaluations.c2i.testdata.stand_in import write_stand_in
from scripts.benchmark import harness
from scripts.benchmark.harness import CPU
from utils import cli, samples
from utils.distributed import best_device
from utils.machine import peak_memory
from utils.samples import Samples
from utils.settings import ExistingFile, ExistingFolder, PositiveInt, Settings, one_of, setting

DISTINCT = 256  # noise images; they are repeated


class EvaluationBenchmarkSettings(Settings):
    """The settings of this benchmark; see --help."""

    samples: PositiveInt = setting(50000)
    references: PositiveInt = setting(10000)
    image_size: PositiveInt = setting(256)
    network_images: PositiveInt = setting(128, "measured images of the network")
    inception: ExistingFile | None = setting(None, "classify_image_graph_def.pb; default: random weights")
    backend: one_of(BACKENDS) = setting("torch")
    folder: ExistingFolder | None = setting(
        None, "for the temporary .npz (10 GB for 50,000 of 256 px); default: the system's temporary folder"
    )
    sqrtm: bool = setting(False, "also time the published way to FID")
    compare: bool = setting(False, "also the network in bf16")


class Stub:
    """As much of a network as extract() needs: features of full rank with unequal spreads; notes what it takes itself."""

    name, path, dimensions, classes, spatial_dimensions = "stub", Path("-"), POOL_SIZE, CLASSES, SPATIAL_SIZE

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seconds, self.rng = device, 0.0, np.random.default_rng(seed)
        shared = np.random.default_rng(0)
        self.spread_D = (0.05 + shared.gamma(1, 0.3, POOL_SIZE)).astype(np.float32)
        self.weights_RD = shared.normal(0, 0.3, (64, POOL_SIZE)).astype(np.float32)  # what features have in common
        self.logits_RC = shared.normal(0, 0.5, (64, CLASSES)).astype(np.float32)

    def __call__(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start, n = time.perf_counter(), len(images_NHWC)
        common_NR = self.rng.standard_normal((n, 64), np.float32)
        noise_ND = self.rng.standard_normal((n, POOL_SIZE), np.float32)
        features_ND = np.abs(noise_ND * self.spread_D + common_NR @ self.weights_RD * 0.3)
        outputs = features_ND, common_NR @ self.logits_RC, features_ND[:, :SPATIAL_SIZE] + 0.1
        self.seconds += time.perf_counter() - start
        return outputs


def noise(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def write_noise(path: Path, n: int, size: int) -> Samples:
    images = noise(min(n, DISTINCT), size)
    batches = (images[: min(DISTINCT, n - start)] for start in range(0, n, DISTINCT))
    samples.write(path, batches, (n, size, size, 3), np.zeros(n))
    return Samples(path)


class Phases(list):
    """A row a phase: seconds, and the process's peak memory after it."""

    def run(self, name: str, call: Callable[[], Any], device: torch.device) -> Any:
        seconds, result = harness.timed(call, device)
        self.append({"phase": name, "seconds": seconds, "peak GB": peak_memory(CPU) / 1e9})
        return result


def figures(s: EvaluationBenchmarkSettings, device: torch.device, folder: Path) -> Phases:
    """Everything but the network."""
    phases = Phases()
    run = partial(phases.run, device=device)
    sides = []
    for side, n in (("reference", s.references), ("samples", s.samples)):
        images, stub = write_noise(folder / f"{side}.npz", n, s.image_size), Stub(device, len(side))
        sides.append(run(f"{side}: read {n} images, moments", partial(extract, stub, images, 128)))
        phases[-1]["seconds"] -= stub.seconds
        images.path.unlink()
    reference, others = sides
    logits_NC = others.logits_NC
    run("Inception Score", partial(metrics.inception_score, logits_NC))
    run("Inception Score, shuffled", partial(metrics.inception_score, logits_NC, shuffled=True))
    run("Inception Score, one split", partial(metrics.inception_score, logits_NC, None))
    for figure, part in (("FID", "pool"), ("sFID", "spatial")):
        run(figure, partial(metrics.frechet_distance, reference.moments[part], others.moments[part]))
    run("precision and recall", lambda: precision_recall(
        *(Manifold(side.features_ND, device=device) for side in (reference, others))
    ))  # fmt: skip
    if s.sqrtm:
        product_DD = reference.moments["pool"].covariance_DD @ others.moments["pool"].covariance_DD
        run("published: scipy sqrtm, for FID", partial(scipy.linalg.sqrtm, product_DD))
    return phases


def network(s: EvaluationBenchmarkSettings, device: torch.device, folder: Path) -> Phases:
    """The network alone, after one batch that is left out."""
    phases = Phases()
    inception = load_inception(s.inception or write_stand_in(folder / "graph.pb"), device, s.backend)
    batch = min(inception.batch_size, s.network_images)
    images, rounds = noise(batch, s.image_size), -(-s.network_images // batch)
    inception(images)
    phases.run(f"network ({s.backend})", lambda: [inception(images) for _ in range(rounds)], device)
    phases[-1]["images/s"] = rounds * batch / phases[-1]["seconds"]
    if s.compare:
        exact_ND = inception(images)[0]
        with torch.autocast(device.type, torch.bfloat16):
            off_ND = inception(images)[0] - exact_ND
            phases.run("network in bf16", lambda: [inception(images) for _ in range(rounds)], device)
        print(f"in bf16 features are off by {np.linalg.norm(off_ND) / np.linalg.norm(exact_ND):.2%} of their norm")
    return phases


def main(arguments: list[str] | None = None) -> None:
    s = EvaluationBenchmarkSettings.from_command_line(__doc__, arguments)
    device = best_device()
    machine = harness.start(device)
    with tempfile.TemporaryDirectory(dir=s.folder) as folder:
        rows = [row for part in (network, figures) for row in harness.in_a_process(part, s, device, Path(folder))]
    harness.table(rows, {"phase": "s", "seconds": ".2f", "peak GB": ".2f"})
    rate = rows[0]["images/s"]
    beside = sum(row["seconds"] for row in rows[1:] if not row["phase"].startswith(("published", "network")))
    minutes = (beside + (s.samples + s.references) / rate) / 60
    print(f"{rate:.2f} images a second; {beside:.1f} s beside the network; {minutes:.1f} minutes in all")
    harness.finish("evaluate", machine, s, images_per_s=rate, seconds_beside=beside, rows=rows)


if __name__ == "__main__":
    cli.run(main)
