"""Exported networks: written and read, and refused where they are not what the evaluator can use."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluations.c2i.features import FeatureNetwork, extract, one_colour
from utils import samples
from utils.cli import InputError
from utils.networks import save_network
from utils.samples import Samples

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 8, 6, 3), np.uint8)


class Means(nn.Module):
    """The mean colour as features, twice it and 1 as logits; an odd `kind` gives something else."""

    def __init__(self, kind: str = "", scale: float = 2.0) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.tensor(scale))
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        features = images.float().mean(dim=(1, 2))
        logits = torch.cat([self.drop(features) * self.scale, torch.ones_like(features[:, :1])], dim=1)
        return {
            "": (features, logits),
            "one output": features,
            "three outputs": (features, logits, logits),
            "maps": (images.float(), logits),
            "classes": (features, logits.argmax(1)),
            "whole numbers": (features.long(), logits),
            "not finite": (features / 0, logits),
            "batch mean": (features.mean(0, keepdim=True), logits),
        }[self.kind]


def export(path, module, example, *dynamic):
    """By torch alone, as a user would; the named sizes of the image are free."""
    sizes = {axis: torch.export.Dim(f"size{axis}", min=2) for axis in dynamic}
    torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=({**sizes},)), path)
    return path


def samples_file(path, images=IMAGES) -> Samples:
    samples.write(path, [images], images.shape, np.arange(len(images)))
    return Samples(path)


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    """The file of Means() for images of 8x8."""
    path = tmp_path_factory.mktemp("network") / "means.pt2"
    save_network(path, Means(), 8, "mean-colour")
    return path


def test_round_trip(means):
    network = FeatureNetwork.load(means)
    assert (network.name, network.dimensions, network.classes) == ("mean-colour", 3, 4)
    assert (network.height, network.width, len(network.sha256)) == (8, 8, 64)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    for n in (1, 2, 7):
        features, logits = network(images[:n])
        assert features.dtype == logits.dtype == np.float32
        np.testing.assert_allclose(features, images[:n].mean((1, 2)), rtol=1e-6)
        np.testing.assert_allclose(logits, np.hstack([2 * features, np.ones((n, 1))]), rtol=1e-6)


def test_a_network_moves_to_another_device(means):
    """The meta device stands for a GPU."""
    network = FeatureNetwork.load(means, "meta")
    assert {value.device.type for value in network.run.state_dict().values()} == {"meta"}


def test_the_same_network_makes_the_same_bytes(tmp_path):
    """Whatever the file is called, so that its sha256 tells networks apart."""
    for name in ("a.pt2", "b.pt2"):
        save_network(tmp_path / name, Means(), 8, "mean-colour")
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


def test_a_network_exported_by_torch_alone(tmp_path):
    """It is named after its file, and may leave the size of its images open."""
    path = export(tmp_path / "of-any-size.pt2", Means(), torch.zeros(2, 5, 7, 3, dtype=torch.uint8), 0, 1, 2)
    network = FeatureNetwork.load(path)
    assert (network.name, network.height, network.width) == ("of-any-size", None, None)
    network.check_size(samples_file(tmp_path / "a.npz"))
    np.testing.assert_allclose(network(IMAGES)[0], IMAGES.mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_extract_in_batches_of_any_size(tmp_path, batch_size):
    path = export(tmp_path / "means.pt2", Means(), torch.zeros(2, 8, 6, 3, dtype=torch.uint8), 0)
    network, file = FeatureNetwork.load(path), samples_file(tmp_path / "a.npz")
    found = extract(network, file, batch_size)
    assert (found.features_ND.shape, found.logits_NC.shape, list(found.moments)) == ((11, 3), (11, 4), ["pool"])
    np.testing.assert_allclose(found.features_ND, IMAGES.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.logits_NC[:, :3], 2 * IMAGES.mean((1, 2)), rtol=1e-6)
    assert extract(network, file, batch_size, logits=False).logits_NC.shape == (11, 0)


def means_of(images):
    means = images.float().mean(dim=(1, 2))
    return means, means, means


WITH_SPATIAL = FeatureNetwork("means", Path("x.pb"), "", 3, 3, torch.device("cpu"), means_of, spatial_dimensions=3)


def test_what_is_found_of_images(tmp_path):
    """Digests tell equal images; images of one colour are counted; spatial features end in moments."""
    images = IMAGES.copy()
    images[4], images[5:7] = images[1], 77
    found = extract(WITH_SPATIAL, samples_file(tmp_path / "a.npz", images), 3)
    assert found.constant == 2
    assert [np.flatnonzero(found.digests_N == digest).tolist() for digest in found.digests_N[[1, 6, 7]]] == [
        [1, 4], [5, 6], [7],
    ]  # fmt: skip
    for part in ("pool", "spatial"):
        np.testing.assert_allclose(found.moments[part].mean_D, images.mean((0, 1, 2)), rtol=1e-6)
        assert found.moments[part].n == 11


def test_one_colour():
    images = np.full((5, 4, 4, 3), 7, np.uint8)
    images[1] = np.arange(3)
    images[2, 3, 3, 2], images[3, 0, 1, 0], images[4, ..., 1] = 8, 8, 9
    assert one_colour(images).tolist() == [True, True, False, False, True]


def test_an_error_while_reading_ahead_is_raised(tmp_path):
    class Broken(Samples):
        def batches(self, size):
            yield from list(super().batches(size))[:1]
            raise InputError("ends early")

    with pytest.raises(InputError, match="ends early"):
        extract(WITH_SPATIAL, Broken(samples_file(tmp_path / "a.npz").path), 3)


def test_trap_no_tf32_whatever_is_set(monkeypatch, means):
    """It is on for convolutions unless told otherwise."""
    network, seen = FeatureNetwork.load(means), []

    def module(images):
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return torch.zeros(1, 3), torch.zeros(1, 4)

    network = replace(network, run=module)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        network(IMAGES)
        assert seen == [(False, "highest")]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_images_of_another_size(tmp_path, means):
    message = r"a\.npz holds images of 8x6, but mean-colour \(.*\) takes 8x8: give a --network"
    with pytest.raises(InputError, match=message):
        FeatureNetwork.load(means).check_size(samples_file(tmp_path / "a.npz"))


def test_a_network_that_fails(means):
    def run(images):
        raise RuntimeError("in relu\nexpected 4 channels")

    with pytest.raises(InputError, match=r"mean-colour \(.*\) fails on images of shape \(11, 8, 6, 3\): expected 4"):
        replace(FeatureNetwork.load(means), run=run)(IMAGES)


def test_features_that_are_not_finite(tmp_path):
    path = export(tmp_path / "x.pt2", Means("not finite"), torch.zeros(2, 8, 6, 3, dtype=torch.uint8), 0)
    with pytest.raises(InputError, match=r"x \(.*\) gives NaN or infinity for images of .*a\.npz"):
        extract(FeatureNetwork.load(path), samples_file(tmp_path / "a.npz"))


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"there is no network .*x\.pt2; expected an exported program"):
        FeatureNetwork.load(tmp_path / "x.pt2")


def test_truncated_anywhere(tmp_path, means, caplog):
    whole = means.read_bytes()
    path = tmp_path / "cut.pt2"
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.pt2 is damaged, truncated or not a \.pt2 file"):
            FeatureNetwork.load(path)
    assert not caplog.records  # torch's tracebacks


def test_trap_a_damaged_weight(tmp_path):
    """torch would load it."""
    save_network(tmp_path / "a.pt2", Means(scale=1234.5), 8, "a")
    data = bytearray((tmp_path / "a.pt2").read_bytes())
    data[data.index(np.float32(1234.5).tobytes())] ^= 1
    (tmp_path / "a.pt2").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.pt2 is damaged.*\(BadZipFile: Bad CRC-32 for file"):
        FeatureNetwork.load(tmp_path / "a.pt2")


def test_other_kinds_of_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as archive:
        archive.writestr("a", "b")
    torch.save(Means().state_dict(), tmp_path / "weights.pt2")
    torch.save(Means().state_dict(), tmp_path / "weights.pt")
    for name in ("zip.pt2", "weights.pt2", "weights.pt"):
        with pytest.raises(
            InputError, match=rf"{name} is damaged, truncated or not a \.pt2 file \(.*; expected an exported"
        ):
            FeatureNetwork.load(tmp_path / name)


class Sum(nn.Module):
    """The sum of each image as features and logits, whatever its form."""

    def forward(self, images):
        sums = images.float().flatten(1)
        return sums, sums


IMAGE = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("module", "example", "dynamic", "message"),
    [
        (Sum(), IMAGE.float(), (0,), r"takes float32 \(\?, 8, 8, 3\)"),
        (Sum(), IMAGE.permute(0, 3, 1, 2), (0,), r"takes uint8 \(\?, 3, 8, 8\)"),
        (Sum(), IMAGE[..., 0], (0,), r"takes uint8 \(\?, 8, 8\)"),
        (Means(), IMAGE, (), "takes batches of 2 only: export it with a dynamic first dimension"),
        (Means("one output"), IMAGE, (0,), r"gives float32 \(\?, 3\); expected"),
        (
            Means("three outputs"),
            IMAGE,
            (0,),
            r"gives float32 \(\?, 3\) and float32 \(\?, 4\) and float32 \(\?, 4\); expected",
        ),
        (Means("maps"), IMAGE, (0,), r"gives float32 \(\?, 8, 8, 3\) and float32 \(\?, 4\); expected"),
        (Means("classes"), IMAGE, (0,), r"gives float32 \(\?, 3\) and int64 \(\?\); expected"),
        (Means("whole numbers"), IMAGE, (0,), r"gives int64 \(\?, 3\) and float32 \(\?, 4\); expected"),
        (Means("batch mean"), IMAGE, (0,), r"gives float32 \(1, 3\) and float32 \(\?, 4\); expected"),
    ],
)
def test_other_inputs_and_outputs(tmp_path, module, example, dynamic, message):
    with pytest.raises(InputError, match=message):
        FeatureNetwork.load(export(tmp_path / "x.pt2", module, example, *dynamic))
