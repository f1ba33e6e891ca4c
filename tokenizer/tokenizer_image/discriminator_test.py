"""Discriminators: the published sizes, receptive fields and formulas; batch norm over processes."""

import math
import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrained_models.loader import on_meta
from tokenizer.tokenizer_image.discriminator import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    BatchNorm,
    Blur,
    DiscriminatorLoss,
    PatchGAN,
    StyleGAN,
    discriminator,
)
from utils.cli import InputError
from utils.testing import run_script


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_patchgan_is_pix2pix_of_70_pixels():
    """With the six channels of pix2pix it has 2,768,705 parameters; three are 3 * 64 * 16 fewer."""
    model = PatchGAN()
    assert parameters(model) == 2_768_705 - 3 * 64 * 16 == 2_765_633
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["main.0.weight"] == (64, 3, 4, 4)
    assert shapes["main.2.weight"] == (128, 64, 4, 4)
    assert shapes["main.3.running_var"] == (128,)
    assert shapes["main.8.weight"] == (512, 256, 4, 4)
    assert shapes["main.11.weight"] == (1, 512, 4, 4)
    assert [name for name in shapes if name.endswith("bias")] == [f"main.{i}.bias" for i in (0, 3, 6, 9, 11)]
    with torch.device("meta"):
        assert PatchGAN()(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert model.main[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.main[3].weight.mean().item() == pytest.approx(1, abs=0.02)


def test_patchgan_looks_at_70_pixels():
    model = PatchGAN(filters=4).eval()
    images = torch.rand(1, 3, 256, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images)[0, 0, 15, 15], images)
    rows = gradient.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def conv(width_in, width, side):
    return width_in * width * side * side + width


def test_stylegan_of_256_pixels():
    widths = [64, 128, 256, 512, 512, 512, 512]
    expected = conv(3, 64, 3) + conv(512, 512, 3) + (512 * 16 * 512 + 512) + (512 + 1)
    for a, b in pairwise(widths):
        expected += conv(a, b, 1) + conv(a, b, 3) + 2 * conv(b, b, 3)
    model = on_meta(StyleGAN)
    assert parameters(model) == expected == 36_500_225
    state = model.state_dict()
    assert state["blocks.0.weight"].shape == (64, 3, 3, 3)
    assert state["blocks.2.conv_res.weight"].shape == (128, 64, 1, 1)
    assert state["blocks.7.downsample.1.weight"].shape == (512, 512, 3, 3)
    assert state["final_linear.0.weight"].shape == (512, 8192)
    with torch.device("meta"):
        assert StyleGAN()(torch.empty(2, 3, 256, 256)).shape == (2, 1)


def test_blur_is_a_binomial_filter_with_a_mirrored_border():
    x = torch.zeros(1, 2, 5, 5)
    x[0, 1, 2, 2] = 16.0
    assert Blur()(x)[0, 1, 1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert not Blur()(x)[0, 0].any()
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    assert Blur()(ramp)[0, 0, 0].tolist() == [0.5, 1, 2, 3, 3.5]


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([0.3, -3.0])

    def mean(values):
        return sum(values) / 2

    def cross_entropy(logit, label):
        p = 1 / (1 + math.exp(-logit))
        return -math.log(p if label else 1 - p)

    hinge = (mean([max(0, 1 - x) for x in (2.0, -0.5)]) + mean([max(0, 1 + x) for x in (0.3, -3.0)])) / 2
    entropy = (mean([cross_entropy(x, 1) for x in (2.0, -0.5)]) + mean([cross_entropy(x, 0) for x in (0.3, -3.0)])) / 2
    expected = {"hinge": hinge, "vanilla": entropy, "non-saturating": entropy}
    assert {name: loss(real, fake).item() for name, loss in DISCRIMINATOR_LOSSES.items()} == pytest.approx(expected)
    generator = {"hinge": -mean([0.3, -3.0]), "non-saturating": mean([cross_entropy(x, 1) for x in (0.3, -3.0)])}
    assert {name: loss(fake).item() for name, loss in GENERATOR_LOSSES.items()} == pytest.approx(generator)


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_discriminator_loss_trains_the_discriminator_alone(name):
    torch.manual_seed(0)
    model, images = PatchGAN(filters=4, layers=1), torch.rand(2, 3, 16, 16)
    fake = torch.rand(2, 3, 16, 16)
    loss, real_logit, fake_logit = DiscriminatorLoss(model, name)(images, fake)
    assert loss.item() == pytest.approx(DISCRIMINATOR_LOSSES[name](model(images), model(fake)).item())
    assert (real_logit.item(), fake_logit.item()) == pytest.approx(
        (model(images).mean().item(), model(fake).mean().item())
    )
    loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.dim() > 1)


def test_sides_that_do_not_fit():
    assert discriminator("patchgan", 24)(torch.zeros(1, 3, 24, 24)).shape[2:] == (1, 1)
    with pytest.raises(InputError, match="--image-size 23 is too small for a PatchGAN of 3 layers, which takes 24 px"):
        discriminator("patchgan", 23)
    assert discriminator("stylegan", 8)(torch.zeros(1, 3, 8, 8)).shape == (1, 1)
    for side in (4, 48):
        with pytest.raises(
            InputError, match=f"--image-size {side} does not fit --disc-type stylegan, which takes 8, 16"
        ):
            discriminator("stylegan", side)


def batch_norm_rows() -> None:
    """What each of two processes does with its half of a batch; the result of both goes to a file."""
    torch.manual_seed(0)
    x, weights = torch.randn(6, 4, 5, 5) * 3 + 2, torch.randn(6, 4, 5, 5)
    norm = BatchNorm(4)
    nn.init.uniform_(norm.weight)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    part = slice(6 * rank // size, 6 * (rank + 1) // size)
    mine = x[part].clone().requires_grad_()
    out = norm(mine)
    (out * weights[part]).sum().backward()
    for p in norm.parameters():
        if size > 1:
            dist.all_reduce(p.grad)
    result = [out.detach(), mine.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    torch.save(result, f"{sys.argv[1]}/{rank}-of-{size}.pt")


def test_batch_norm_over_two_processes(tmp_path):
    """Values, gradients and running statistics are those of one process with the whole batch."""
    result = run_script(__file__, tmp_path, processes=2, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    result = run_script(__file__, tmp_path)
    assert result.returncode == 0, result.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    for i, expected in enumerate(one):
        actual = torch.cat((first[i], second[i])) if i < 2 else first[i]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_of_one_process_is_pytorchs():
    x = torch.randn(4, 3, 6, 6)
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), F.batch_norm(x, ours.running_mean, ours.running_var))


if __name__ == "__main__":
    from utils.distributed import join_world

    with join_world():
        batch_norm_rows()
