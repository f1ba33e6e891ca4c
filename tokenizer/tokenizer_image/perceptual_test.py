"""Perceptual distances: gradients through networks that were exported for inference; what cannot be trained with."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer.tokenizer_image.perceptual import LPIPS, NetworkDistance
from utils.cli import InputError
from utils.networks import save_network


class Network(nn.Module):
    """Two resolutions of activations, two layers at the first; the second half, as of an evaluation, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.second, self.head = nn.Conv2d(6, 8, 3, stride=2), nn.Linear(8, 5)

    def layers(self, x):
        early = F.silu(self.again(F.relu(self.first(x / 127.5 - 1))))
        late = F.gelu(self.second(early))
        return early, late, late.mean((2, 3))

    def forward(self, images_BHWC):
        with torch.no_grad():
            features = self.layers(images_BHWC.permute(0, 3, 1, 2).float())[2]
        return features, self.head(features)


class Uniform(nn.Module):
    """Features that no pixel changes (rounded), or that do not depend on the image."""

    def __init__(self, rounded: bool) -> None:
        super().__init__()
        self.rounded, self.head = rounded, nn.Linear(3, 2)

    def forward(self, images_BHWC):
        means = images_BHWC.float().mean((1, 2))
        features = means.round() if self.rounded else means.long().float()
        return features, self.head(features)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "net.pt2"
    save_network(path, network, 16, "small")
    return path


def test_distance_and_gradient_are_those_of_the_layers(network, path):
    images, others = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = NetworkDistance(path, 16)
    x = images.clone().requires_grad_()
    actual = distance(x, others)
    (gradient,) = torch.autograd.grad(actual, x)
    y = images.clone().requires_grad_()
    expected = 0.0
    for a, b in zip(network.layers(y * 127.5 + 127.5), network.layers(others * 127.5 + 127.5), strict=True):
        a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
        expected = expected + (a - b).square().sum(1).mean() / 3
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, y)[0], rtol=1e-3, atol=1e-7)
    assert distance(images, images) == 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_networks_that_cannot_be_trained_with(path, tmp_path):
    with pytest.raises(InputError, match="takes images of 16x16, not of --image-size 32"):
        NetworkDistance(path, 32)
    for rounded, words in ((True, "not finite, or 0"), (False, "no gradient|not finite, or 0")):
        save_network(tmp_path / "flat.pt2", Uniform(rounded), 16, "flat")
        with pytest.raises(InputError, match=rf"flat\.pt2 cannot be trained with.*{words}"):
            NetworkDistance(tmp_path / "flat.pt2", 16)
    (tmp_path / "none.pt2").write_bytes(b"none")
    with pytest.raises(InputError, match="damaged, truncated or not a"):
        NetworkDistance(tmp_path / "none.pt2", 16)


class Distances(nn.Module):
    """Stands for the lpips package."""

    def __init__(self, net, verbose) -> None:
        super().__init__()
        assert (net, verbose) == ("vgg", False)
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, a, b):
        return self.weight * (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_is_averaged_and_frozen(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Distances))
    distance = LPIPS()
    a, b = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    value = distance(a, b)
    assert value.item() == 4
    value.backward()
    assert a.grad.any() and distance.distance.weight.grad is None and not distance.training


def test_without_lpips_or_its_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"pip install lpips; or give --perceptual-network NETWORK\.pt2, or"):
        LPIPS()

    def offline(**_):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    with pytest.raises(
        InputError, match=r"cannot be downloaded .*urlopen.* into .*checkpoints; or .*--perceptual-weight 0"
    ):
        LPIPS()


def test_lpips_against_its_formula(monkeypatch):
    """Of the real package, where it is installed, with a random VGG: weights of the layers come with the package."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    random = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    monkeypatch.setattr(lpips, "LPIPS", lambda net, verbose: random)
    distance = LPIPS()
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
    expected = 0.0
    for i, (x, y) in enumerate(zip(*(random.net((v - mean) / std) for v in (a, b)), strict=True)):
        x, y = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (x, y))
        weight = getattr(random, f"lin{i}").model[1].weight
        expected += (weight * (x - y).square()).sum(1).mean()
    assert distance(a, b).item() == pytest.approx(expected.item(), rel=1e-3)
    assert not math.isclose(distance(a, b).item(), 0, abs_tol=1e-6)
