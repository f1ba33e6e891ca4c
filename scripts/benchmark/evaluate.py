"""Evaluation: time and memory of everything but the network at full size, and the network's images a second.

    python -m scripts.benchmark.evaluate --samples 50000 --references 10000 --network-images 128

Images of noise are written to a temporary .npz and read back as the evaluator reads them. A stub gives random features for
them, and the time that it takes is left out. The network is Inception's graph with random weights, or --inception PATH.
Peak memory is the process's own; network and figures run in a process each. --sqrtm also times the matrix square root
that the published evaluator takes, twice, on the same covariances.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from evaluations.c2i import metrics
from evaluations.c2i.features import FeatureNetwork, extract
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


def stub(device: torch.device, seconds: list[float]) -> FeatureNetwork:
    """A network that gives random features of unequal spreads; adds the seconds that each call takes to a list."""
    spread_D = torch.linspace(0.05, 1.5, POOL_SIZE, device=device)

    def draw(n: int) -> tuple[Tensor, ...]:
        features_BD = torch.randn(n, POOL_SIZE, device=device).abs() * spread_D
        return features_BD, torch.randn(n, CLASSES, device=device), features_BD[:, :SPATIAL_SIZE]

    def run(images_BHWC: Tensor) -> tuple[Tensor, ...]:
        taken, outputs = harness.timed(lambda: draw(len(images_BHWC)), device)
        seconds.append(taken)
        return outputs

    return FeatureNetwork("stub", Path("-"), "", POOL_SIZE, CLASSES, device, run, SPATIAL_SIZE)


def write_noise(path: Path, n: int, size: int) -> Samples:
    images = harness.noise(range(min(n, DISTINCT)), size)
    batches = (images[: n - start] for start in range(0, n, DISTINCT))
    samples.write(path, batches, (n, size, size, 3), np.zeros(n))
    return Samples(path)


def phase(rows: list[dict[str, Any]], name: str, call: Callable[[], Any], device: torch.device) -> Any:
    """Add a row: seconds of a call, and the process's peak memory after it. Returns what the call does."""
    seconds, result = harness.timed(call, device)
    rows.append({"phase": name, "seconds": seconds, "peak GB": peak_memory(CPU) / 1e9})
    return result


def figures(s: EvaluationBenchmarkSettings, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Everything but the network."""
    rows, sides = [], []
    run = partial(phase, rows, device=device)
    for side, n in (("reference", s.references), ("samples", s.samples)):
        images, drawing = write_noise(folder / f"{side}.npz", n, s.image_size), []
        call = partial(extract, stub(device, drawing), images, 128)
        sides.append(run(f"{side}: read {n} images, moments", call))
        rows[-1]["seconds"] -= sum(drawing)
        images.path.unlink()
    reference, others = sides
    score = partial(metrics.inception_score, others.logits_NC)
    run("Inception Score", score)
    run("Inception Score, shuffled", partial(score, shuffled=True))
    run("Inception Score, one split", partial(score, None))
    for figure, part in (("FID", "pool"), ("sFID", "spatial")):
        run(figure, partial(metrics.frechet_distance, reference.moments[part], others.moments[part]))
    run("precision and recall", lambda: precision_recall(
        *(Manifold(side.features_ND, device=device) for side in (reference, others))
    ))  # fmt: skip
    if s.sqrtm:
        product_DD = reference.moments["pool"].covariance_DD @ others.moments["pool"].covariance_DD
        run("published: scipy sqrtm, for FID", partial(scipy.linalg.sqrtm, product_DD))
    return rows


def network(s: EvaluationBenchmarkSettings, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """The network alone, after one batch that is left out."""
    inception = load_inception(s.inception or write_stand_in(folder / "graph.pb"), device, s.backend)
    batch = min(inception.batch_size, s.network_images)
    images, rounds, rows = harness.noise(range(batch), s.image_size), -(-s.network_images // batch), []
    inception(images)
    phase(rows, f"network ({s.backend})", lambda: [inception(images) for _ in range(rounds)], device)
    rows[-1]["images/s"] = rounds * batch / rows[-1]["seconds"]
    return rows


def main(arguments: list[str] | None = None) -> None:
    s = EvaluationBenchmarkSettings.from_command_line(__doc__, arguments)
    device = best_device()
    machine = harness.start(device)
    with tempfile.TemporaryDirectory(dir=s.folder) as folder:
        rows = [row for part in (network, figures) for row in harness.in_a_process(part, s, device, Path(folder))]
    harness.table(rows, {"phase": "s", "seconds": ".2f", "peak GB": ".2f"})
    rate = rows[0]["images/s"]
    beside = sum(row["seconds"] for row in rows[1:] if not row["phase"].startswith("published"))
    minutes = (beside + (s.samples + s.references) / rate) / 60
    print(f"{rate:.2f} images a second; {beside:.1f} s beside the network; {minutes:.1f} minutes in all")
    harness.finish("evaluate", machine, s, images_per_s=rate, seconds_beside=beside, rows=rows)


if __name__ == "__main__":
    cli.run(main)
