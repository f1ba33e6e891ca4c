"""The tokenizer's loss and its gradients against autograd on the formula written down."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer.tokenizer_image.discriminator import GENERATOR_LOSSES, PatchGAN
from tokenizer.tokenizer_image.vq_loss import MOST_ADAPTIVE, adaptive_weight, vq_loss
from tokenizer.tokenizer_image.vq_model import VQModel, preset


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQModel(preset("VQ-4-small", codebook_size=16, entropy_loss_ratio=0.1))


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def distance(a, b):
    """Stands for a perceptual network."""
    return (F.avg_pool2d(a, 4) - F.avg_pool2d(b, 4)).abs().mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(actual, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(("kind", "naive"), [("l1", lambda d: d.abs().mean()), ("l2", lambda d: d.square().mean())])
def test_without_an_adversary(model, images, kind, naive):
    output = model(images)
    loss = vq_loss(
        images, output, reconstruction=kind, reconstruction_weight=2.0, codebook_weight=0.5, perceptual=distance,
        perceptual_weight=0.3,
    )  # fmt: skip
    actual = gradients(model, loss["loss"])
    output = model(images)
    image, far = naive(output.reconstruction_BCHW - images), distance(output.reconstruction_BCHW, images)
    total = 2 * image + 0.3 * far + 0.5 * (output.loss.codebook + output.loss.commitment + output.loss.entropy)
    torch.testing.assert_close(loss["loss"], total)
    assert_same(actual, gradients(model, total))
    expected = {"loss": total, "reconstruction": image, "perceptual": far, **output.loss._asdict()}
    assert {name: value.item() for name, value in loss.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )
    assert [name for name, value in loss.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("kind", GENERATOR_LOSSES)
def test_with_an_adversary(model, images, kind, adaptive):
    """The adaptive weight is that of autograd at the decoder's last layer; the discriminator gets no gradient."""
    discriminator = PatchGAN(filters=8, layers=2)

    def adversarial(x):
        return GENERATOR_LOSSES[kind](discriminator(x))

    output = model(images)
    last = (lambda g: model.decoder.last_layer_gradient(output.features_BCHW, g)) if adaptive else None
    loss = vq_loss(
        images, output, perceptual=distance, perceptual_weight=1.0, adversarial=adversarial, adversarial_weight=0.5,
        last_layer_gradient=last,
    )  # fmt: skip
    actual = gradients(model, loss["loss"])
    assert all(p.grad is None for p in discriminator.parameters())

    output, weight = model(images), model.decoder.conv_out.weight
    decoded = output.reconstruction_BCHW
    image, term = F.mse_loss(decoded, images) + distance(decoded, images), adversarial(decoded)
    ratio = 1.0
    if adaptive:
        image_norm, term_norm = (torch.autograd.grad(x, weight, retain_graph=True)[0].norm() for x in (image, term))
        ratio = (image_norm / (term_norm + 1e-4)).clamp(0, 1e4).item()
    total = image + 0.5 * ratio * term + sum(output.loss)
    torch.testing.assert_close(loss["loss"], total)
    torch.testing.assert_close(loss["adversarial"], term.detach())
    assert loss["adversarial_weight"].item() == pytest.approx(0.5 * ratio, rel=1e-4)
    assert_same(actual, gradients(model, total))


def test_adaptive_weight_is_limited():
    one = torch.ones(4)
    assert adaptive_weight(one, one).item() == pytest.approx(2 / (2 + 1e-4))
    assert adaptive_weight(one, 0 * one) == MOST_ADAPTIVE == 1e4
    assert adaptive_weight(0 * one, one) == 0


def test_codebook_learns_through_its_own_term_only(model, images):
    """The terms on images reach the encoder through the straight-through estimator and pass the codebook by."""
    output = model(images)
    loss = vq_loss(images, output, codebook_weight=0.0)
    actual = gradients(model, loss["loss"])
    assert not actual["quantize.embedding.weight"].any()
    assert actual["encoder.conv_in.weight"].any() and actual["quant_conv.weight"].any()
    output = model(images)
    actual = gradients(model, vq_loss(images, output, reconstruction_weight=0.0)["loss"])
    assert actual["quantize.embedding.weight"].any() and not actual["decoder.conv_out.weight"].any()
    codebook = torch.autograd.grad(model(images).loss.codebook, model.encoder.conv_in.weight, allow_unused=True)[0]
    assert codebook is None or not codebook.any()


def test_straight_through(model, images):
    """The gradient at the latents is the one at what the decoder reads, projected on the sphere as F.normalize does."""
    z = model.latents(images).detach().requires_grad_()
    values = model.quantize(z).values_BDHW
    at_values = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    (at_z,) = torch.autograd.grad(values, z, at_values)
    unit = F.normalize(z.detach(), dim=1)
    expected = (at_values - unit * (unit * at_values).sum(1, keepdim=True)) / z.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(at_z, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_reconstructions_give_float32_terms(model, images):
    output = model(images)
    half = output._replace(reconstruction_BCHW=output.reconstruction_BCHW.bfloat16())
    loss = vq_loss(images, half)
    assert loss["loss"].dtype == torch.float32
    loss["loss"].backward()
    assert model.decoder.conv_out.weight.grad.isfinite().all()
