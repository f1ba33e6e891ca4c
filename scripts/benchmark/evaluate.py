"""Time and memory of an evaluation: everything but the network at full size, and the network's images a second.

    python scripts/benchmark/evaluate.py --samples 50000 --references 10000 --network-images 128

Images of noise are written to a temporary .npz and read back as the evaluator reads them; a stub gives random features for
them, and the time that it takes is left out. The network is Inception's graph with random weights, or --inception PATH.
Peak memory is the process's own; each part runs in a process of its own. --sqrtm also times the matrix square root that
the published evaluator takes, twice, on the same covariances.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from card import card, finish

from evaluations.c2i import metrics
from evaluations.c2i.features import Extracted, extract
from evaluations.c2i.inception import BACKENDS, CLASSES, POOL_SIZE, SPATIAL_SIZE, InceptionNetwork
from evaluations.c2i.manifold import Manifold, precision_recall
from evaluations.c2i.stand_in import write_stand_in
from utils import cli, samples
from utils.samples import Samples

PUBLISHED = Path(__file__).parents[2] / "evaluations" / "c2i" / "testdata" / "evaluator.json"
DISTINCT = 256  # noise images; they are repeated


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
        found = features_ND, common_NR @ self.logits_RC, features_ND[:, :SPATIAL_SIZE] + 0.1
        self.seconds += time.perf_counter() - start
        return found

    def check_size(self, samples: Samples) -> None:
        """Images of any size will do."""


def noise(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def write_noise(path: Path, n: int, size: int) -> None:
    images = noise(min(n, DISTINCT), size)
    batches = (images[: min(DISTINCT, n - start)] for start in range(0, n, DISTINCT))
    samples.write(path, batches, (n, size, size, 3), np.zeros(n))


class Clock:
    """Seconds a phase, and the process's peak memory after it."""

    def __init__(self, device: torch.device) -> None:
        self.rows, self.device = [], device

    def __call__(self, phase: str, call: Callable[[], Any], less: Callable[[], float] = lambda: 0.0) -> Any:
        start, before = time.perf_counter(), less()
        found = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start - (less() - before)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.rows.append({"phase": phase, "seconds": seconds, "peak_rss_mib": peak})
        print(f"{phase:<44} {seconds:>9.2f} s {peak:>9.0f} MiB", flush=True)
        return found


def all_but_the_network(args: Namespace, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """A row a phase."""
    clock, found = Clock(device), {}
    for side, n in (("reference", args.references), ("samples", args.samples)):
        path, stub = folder / f"{side}.npz", Stub(device, len(side))
        write_noise(path, n, args.image_size)
        images = Samples(path)
        extracted: Extracted = clock(
            f"{side}: read {n} images of {args.image_size} px, sFID moments",
            lambda images=images, stub=stub: extract(stub, images, 128, show=False),
            lambda stub=stub: stub.seconds,
        )
        path.unlink()
        pool = clock(
            f"{side}: FID moments", lambda extracted=extracted: metrics.moments_of(extracted.features_ND, device)
        )
        found[side] = extracted, pool
    (reference, pool), (others, other_pool) = found["reference"], found["samples"]
    clock("Inception Score", lambda: metrics.inception_score(others.logits_NC))
    clock("Inception Score, shuffled and in one split", lambda: [
        metrics.inception_score(others.logits_NC, shuffle_seed=0), metrics.inception_score(others.logits_NC, None)
    ])  # fmt: skip
    clock("FID", lambda: metrics.frechet_distance(pool, other_pool))
    clock("sFID", lambda: metrics.frechet_distance(reference.spatial, others.spatial))
    clock("precision and recall", lambda: precision_recall(
        *(Manifold(side.features_ND, device=device) for side in (reference, others))
    ))  # fmt: skip
    if args.sqrtm:
        product_DD = pool.covariance_DD @ other_pool.covariance_DD
        clock("published: scipy sqrtm, for FID", lambda: scipy.linalg.sqrtm(product_DD))
    return clock.rows


def network_alone(args: Namespace, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Images a second of the network, after one batch that is left out."""
    clock = Clock(device)
    network = InceptionNetwork(args.inception or write_stand_in(folder / "graph.pb"), device, args.backend)
    n = network.batch_size
    images = noise(n, args.image_size)
    network(images[:n])
    rounds = -(-args.network_images // n)
    clock(f"network ({args.backend}), {rounds * n} images", lambda: [network(images) for _ in range(rounds)])
    clock.rows[-1]["images_per_s"] = rounds * n / clock.rows[-1]["seconds"]
    return clock.rows


def published_rows() -> list[str]:
    """What the published script took for 400 and 360 images, on the two shared cores it was run on."""
    phases = json.loads(PUBLISHED.read_text())["cases"]["small64"]["phases"]
    return [f"{name:<44} {row['seconds']:>9.2f} s {row['peak_rss_mib']:>9} MiB" for name, row in phases.items()]


def in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--samples", type=cli.positive_int, default=50000)
    add("--references", type=cli.positive_int, default=10000)
    add("--image-size", type=cli.positive_int, default=256)
    add("--network-images", type=cli.positive_int, default=128, help="measured images")
    add("--inception", type=cli.existing_file, help="classify_image_graph_def.pb; default: random weights")
    add("--backend", choices=BACKENDS, default="torch")
    add(
        "--folder",
        type=cli.existing_folder,
        help="for the temporary .npz (10 GB for 50,000 of 256 px); default: the system's",
    )
    add("--sqrtm", action="store_true", help="also time the published way to FID")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = card(device)
    print(machine)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        network = in_a_process(network_alone, args, device, Path(folder))
        rest = in_a_process(all_but_the_network, args, device, Path(folder))
    seconds = sum(row["seconds"] for row in rest if not row["phase"].startswith("published"))
    rate = network[-1]["images_per_s"]
    whole = seconds + (args.samples + args.references) / rate
    print(f"{rate:.2f} images a second; {seconds:.1f} s beside the network; {whole / 60:.1f} minutes in all")
    print("\nThe published script, 400 and 360 images of 64 px, on the machine of testdata/evaluator.json:")
    print("\n".join(published_rows()))
    finish({**machine, "benchmark": "evaluate", **{key: str(value) for key, value in vars(args).items()},
            "images_per_s": rate, "seconds_beside": seconds, "rows": network + rest})  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
