"""Measure samples against a reference batch: the published Inception Score, FID, sFID, precision and recall.

    python3 evaluations/c2i/evaluator.py REFERENCE.npz SAMPLES.npz [MORE.npz ...]

The network is the published Inception, in torch, downloaded on first use; --network NETWORK.pt2 measures in another
network's features. The figures are printed, and left beside each samples file: the lines in SAMPLES.txt, everything in
SAMPLES.metrics.json. docs/evaluation.md says what the figures mean and which may be compared.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, model_validator
from typing_extensions import Self

from dataset.images import evenly_spaced
from evaluations.c2i import checks, metrics, reference_cache, report
from evaluations.c2i.download import inception_path
from evaluations.c2i.features import Extracted, FeatureNetwork, extract
from evaluations.c2i.folder_samples import FolderSamples
from evaluations.c2i.inception import BACKENDS, load_inception
from evaluations.c2i.manifold import NEIGHBOURS, Manifold, precision_recall
from evaluations.c2i.metrics import SPLIT, Moments
from utils import cli
from utils.cli import InputError
from utils.distributed import join_world, world_size
from utils.files import check_output, file_lock, sha256
from utils.samples import Samples
from utils.settings import PositiveInt, Settings, one_of, setting

FORMAT = 2  # of metrics.json
STATISTICS = {
    "pool": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
}  # in a file, as ADM's reference batches have them


def _npz_or_folder(path: Path) -> Path:
    if path.suffix != ".npz" and not path.is_dir():
        raise ValueError(f"expected a file that ends in .npz, or a folder of images, got {path}")
    return path if path.name not in ("", "..") else path.resolve()


ImagesPath = Annotated[Path, AfterValidator(_npz_or_folder)]


class EvaluatorSettings(Settings):
    """The settings of the evaluator; see --help."""

    reference: ImagesPath = setting(
        help="what the samples are compared with: an .npz with arr_0 (uint8, NHWC), or a folder of images of one size; "
        "statistics in an .npz (mu, sigma, mu_s, sigma_s) serve FID and sFID, as published",
        positional=True,
    )
    samples: list[ImagesPath] = setting(help="of the same form and size, labels in arr_1", positional=True)
    network: Path | None = setting(
        None, "an exported network (.pt2) instead of Inception; train_classifier.sh makes one"
    )
    inception: Path | None = setting(None, "classify_image_graph_def.pb; default: here, or downloaded once")
    backend: one_of(BACKENDS) = setting("torch", "what runs Inception; tensorflow runs the graph itself")
    batch_size: PositiveInt | None = setting(None, "default: one that suits the network and the device")
    pr_images: PositiveInt = setting(50000, "at most so many of each file, evenly spaced, enter precision and recall")
    float16_distances: bool = setting(
        False, "precision and recall with the published evaluator's rounding, bit for bit, instead of exact ones"
    )
    kid: bool = setting(False, "also KID, over 100 subsets of 1,000 images")
    force: bool = setting(False, "measure what is refused otherwise: other sizes, images of one colour")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.network and (self.inception or self.backend != "torch"):
            raise ValueError("--network is another network than Inception: leave out --inception and --backend")
        if self.pr_images <= NEIGHBOURS:
            raise ValueError(f"--pr-images: expected at least {NEIGHBOURS + 1}, got {self.pr_images}")
        outputs = [report.output_paths(path)[0] for path in self.samples]
        if len(set(outputs)) < len(outputs):
            twice = next(path for path in outputs if outputs.count(path) > 1)
            raise ValueError(f"two of the samples would leave their figures in {twice}: name each once")
        return self


@dataclass
class File:
    """A samples file that is open and checked."""

    images: Samples
    given: dict[str, Moments]  # statistics that it brings along, of Inception's features
    remarks: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        with timed(self.seconds, "hash"):
            return sha256(self.images.path)

    def about(self, pr_images: int) -> dict[str, Any]:
        """What this file is, for the record."""
        images = self.images
        about = {
            "file": images.path.name, "sha256": self.sha256, "images": len(images),
            "precision_recall_images": min(len(images), pr_images), "statistics": "given" if self.given else "computed",
        }  # fmt: skip
        if images.labels is not None:
            counts = np.unique(images.labels, return_counts=True)[1].tolist()
            about["labels"] = {"classes": len(counts), "least": min(counts), "most": max(counts)}
        return about


def given_statistics(samples: Samples, network: FeatureNetwork) -> dict[str, Moments]:
    """Statistics of Inception's features that a file holds; none for another network. InputError for what they cannot be.

    A file without images may hold mu and sigma only, as many projects leave them.
    """
    if not network.spatial_dimensions:
        if len(samples) == 0:
            raise InputError(
                f"{samples.path} holds statistics of Inception's features and no images: --network needs images"
            )
        return {}
    p, s = network.dimensions, network.spatial_dimensions
    arrays = samples.statistics({"mu": (p,), "sigma": (p, p), "mu_s": (s,), "sigma_s": (s, s)})
    if "mu" not in arrays:
        return {}
    parts = ["pool"] if len(samples) == 0 and not {"mu_s", "sigma_s"} & arrays.keys() else list(STATISTICS)
    if missing := sorted({key for part in parts for key in STATISTICS[part]} - arrays.keys()):
        raise InputError(
            f"{samples.path} holds mu, but not all of sigma, mu_s and sigma_s (without {', '.join(missing)})"
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InputError(
            f"{samples.path} holds statistics that cannot be used: NaN or infinity in a mean or covariance"
        )
    return {part: Moments.given(*(arrays[key] for key in STATISTICS[part])) for part in parts}


def load_network(s: EvaluatorSettings, device: torch.device) -> FeatureNetwork:
    if s.network:
        return FeatureNetwork.load(s.network, device)
    return load_inception(inception_path(s.inception), device, s.backend)


def open_inputs(s: EvaluatorSettings, device: torch.device) -> tuple[FeatureNetwork, list[File]]:
    """The network, and the reference and samples files. Raises InputError for whatever would stop the work later."""
    for path in s.samples:
        for output in report.output_paths(path):
            check_output(output)
    opened = [
        FolderSamples(path) if path.is_dir() else Samples(path, statistics_will_do=i == 0)
        for i, path in enumerate((s.reference, *s.samples))
    ]
    with_images = [images for images in opened if len(images)]
    fits = {images: checks.check_fit(images, with_images[0], s.force) for images in with_images}
    network = load_network(s, device)
    for images in with_images:
        network.check_size(images)
    files = [File(images, given_statistics(images, network), fits.get(images, [])) for images in opened]
    for file in files:
        file.remarks += [file.images.label_note] if file.images.label_note else []
        file.remarks += checks.few_images(file.images, network, bool(file.given))
    reference = files[0]
    reference.remarks += checks.statistics_only(reference.images, "spatial" in reference.given)
    reference.remarks += checks.validation_reference(reference.images, bool(reference.given))
    return network, files


class Features:
    """A file in the network's features, and what is computed of it once."""

    def __init__(self, file: File, extracted: Extracted, network: FeatureNetwork, s: EvaluatorSettings) -> None:
        self.file, self.extracted, self.network, self.settings = file, extracted, network, s
        self.moments = extracted.moments | file.given

    @cached_property
    def manifold(self) -> Manifold:
        features_ND, most = self.extracted.features_ND, self.settings.pr_images
        if len(features_ND) > most:
            features_ND = features_ND[evenly_spaced(len(features_ND), most)]
        return Manifold(features_ND, device=self.network.device, float16=self.settings.float16_distances)


def reference_features(file: File, network: FeatureNetwork, s: EvaluatorSettings) -> Features:
    """The reference in the network's features: from the cache, or computed and put there."""
    entry = reference_cache.entry_path(network, file.sha256)
    with timed(file.seconds, "features"):
        extracted = reference_cache.load(entry) if len(file.images) else None
        if extracted is None:
            extracted = extract(network, file.images, s.batch_size, logits=False)
            if len(file.images):  # statistics alone need no cache
                reference_cache.store(entry, extracted)
    return Features(file, extracted, network, s)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long a block takes."""
    start = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - start, 3)


def compare(reference: Features, samples: Features) -> dict[str, float]:
    """All figures of the samples; how long each took is added to their file's `seconds`."""
    seconds, found, network = samples.file.seconds, {}, samples.network
    logits_NC, labels = samples.extracted.logits_NC, samples.file.images.labels
    with timed(seconds, "inception_score"):
        found["inception_score"] = metrics.inception_score(logits_NC, SPLIT)
        found["inception_score_shuffled"] = metrics.inception_score(logits_NC, SPLIT, shuffled=True)
        found["inception_score_one_split"] = metrics.inception_score(logits_NC, None)
    for figure, part in (("fid", "pool"), ("sfid", "spatial")):
        if part in reference.moments and part in samples.moments:
            with timed(seconds, figure):
                found[figure] = metrics.frechet_distance(reference.moments[part], samples.moments[part])
    if len(reference.file.images):
        with timed(seconds, "precision_recall"):
            found["precision"], found["recall"] = precision_recall(reference.manifold, samples.manifold)
        if samples.settings.kid:
            with timed(seconds, "kid"):
                features = reference.extracted.features_ND, samples.extracted.features_ND
                found["kid"], found["kid_deviation"] = metrics.kernel_distance(*features, network.device)
    own_classes = not network.spatial_dimensions  # Inception's are other ones
    if own_classes and labels is not None and labels.min() >= 0 and labels.max() < network.classes:
        found["class_accuracy"] = metrics.class_accuracy(logits_NC, labels)
    return found


def settings_of(network: FeatureNetwork, reference: File, file: File, s: EvaluatorSettings) -> dict[str, Any]:
    """All that figures depend on, as plain data: where it is equal, they are."""
    return {
        "format": FORMAT,
        "network": {
            "name": network.name, "backend": network.backend, "file": network.path.name, "sha256": network.sha256,
            "dimensions": network.dimensions, "classes": network.classes,
        },
        "reference": reference.about(s.pr_images),
        "samples": file.about(s.pr_images),
        "neighbours": NEIGHBOURS,
        "split": SPLIT,
        "float16_distances": s.float16_distances,
        "kid": s.kid,
    }  # fmt: skip


def measured_before(path: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """The figures that a file's record holds, if they were measured with these settings; None for a damaged one too."""
    try:
        record = report.MetricsRecord.read(report.output_paths(path)[1])
    except InputError:
        return None
    return record.metrics if settings.items() <= record.plain().items() else None


def measure(reference: Features, file: File, settings: dict[str, Any]) -> dict[str, float]:
    """Measure a file, write its record, and print remarks."""
    network, s = reference.network, reference.settings
    with timed(file.seconds, "features"):
        extracted = extract(network, file.images, s.batch_size)
    figures = compare(reference, Features(file, extracted, network, s))
    found = checks.same_images(file.images, extracted, reference.file.images, reference.extracted)
    found += checks.order_of_samples(file.images, figures)
    say(found)
    record = report.MetricsRecord(
        metrics=figures, **settings, device=str(network.device),
        versions={
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        },
        warnings=reference.file.remarks + file.remarks + found,
        seconds={"reference_features": reference.file.seconds["features"], **file.seconds},
    )  # fmt: skip
    report.write(file.images.path, report.figure_lines(figures, network.name), record)
    return figures


def say(remarks: list[str]) -> None:
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr, flush=True)


def main() -> None:
    s = EvaluatorSettings.from_command_line(__doc__)
    if world_size() > 1:
        raise InputError("the evaluator is one process: start it without torchrun")
    with join_world() as world, ExitStack() as locks:
        network, files = open_inputs(s, world.device)
        say([remark for file in files for remark in file.remarks])
        reference_file, *samples = files
        for file in samples:
            locks.enter_context(file_lock(report.output_paths(file.images.path)[1], "wait for it"))
        reference, rows = None, []
        for file in samples:
            path, settings = file.images.path, settings_of(network, reference_file, file, s)
            figures = measured_before(path, settings)
            print(f"{path}:{'' if figures is None else ' (measured before)'}", flush=True)
            if figures is None:
                reference = reference or reference_features(reference_file, network, s)
                figures = measure(reference, file, settings)
            print("\n".join(report.figure_lines(figures, network.name)), flush=True)
            rows.append((path, len(file.images), figures))
    if len(rows) > 1:
        print(report.table([(path.name, n, figures) for path, n, figures in rows], network.name))
    for path, scales in report.sweeps([(path, figures) for path, _, figures in rows]).items():
        report.draw_sweep(path, scales, network.name)
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
