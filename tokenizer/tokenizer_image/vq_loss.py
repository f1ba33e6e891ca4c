"""The tokenizer's training loss: reconstruction, perceptual, adversarial, codebook, commitment and entropy terms.

The terms on images are computed on the reconstruction alone, and their gradient is taken there. So the gradients at the
decoder's last layer, which the adaptive weight compares (VQGAN, arXiv 2012.09841, eq. 7), cost one convolution each and no
second pass through the perceptual network or the discriminator.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import Output

RECONSTRUCTION = {"l1": F.l1_loss, "l2": F.mse_loss}
MOST_ADAPTIVE = 1e4  # of the adaptive weight


class Loss(NamedTuple):
    """The total to minimise, and its parts by name for the log (detached, before the weights of vq_loss)."""

    total: Tensor
    parts: dict[str, Tensor]


class Adversary(NamedTuple):
    """The adversarial term: a loss of reconstructions (GENERATOR_LOSSES of the discriminator's logits) and its weight.

    last_layer_gradient: the gradient at the decoder's last layer, averaged over processes, of a gradient at the pixels;
    the weight is then adaptive. None: it is not.
    """

    loss: Callable[[Tensor], Tensor]
    weight: float
    last_layer_gradient: Callable[[Tensor], Tensor] | None = None


def adaptive_weight(image_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|image_gradient| / (|adversarial_gradient| + 1e-4), at most MOST_ADAPTIVE; both at the decoder's last layer."""
    return (image_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0.0, MOST_ADAPTIVE)


class _GivenGradient(torch.autograd.Function):
    """A value whose gradient with respect to x is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


def vq_loss(
    images_BCHW: Tensor,
    output: Output,
    *,
    reconstruction: str = "l2",
    reconstruction_weight: float = 1.0,
    codebook_weight: float = 1.0,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 0.0,
    adversary: Adversary | None = None,
) -> Loss:
    """Add up the terms, in float32.

    perceptual: the distance of two batches of images (B, 3, H, W). codebook_weight is of all three terms of the quantiser,
    which carry their own factors (beta, entropy ratio) already.
    """
    if reconstruction not in RECONSTRUCTION:
        raise ValueError(f"reconstruction: expected one of {', '.join(RECONSTRUCTION)}, got {reconstruction}")
    images_BCHW, decoded_BCHW = images_BCHW.float(), output.reconstruction_BCHW.float()
    leaf_BCHW = decoded_BCHW.detach().requires_grad_()
    terms = {"reconstruction": (reconstruction_weight, RECONSTRUCTION[reconstruction](leaf_BCHW, images_BCHW))}
    if perceptual:
        terms["perceptual"] = (perceptual_weight, perceptual(leaf_BCHW, images_BCHW))
    value = sum(weight * term for weight, term in terms.values())
    (gradient_BCHW,) = torch.autograd.grad(value, leaf_BCHW)
    parts = {name: term.detach() for name, (_, term) in terms.items()}
    value = value.detach()
    if adversary:
        term = adversary.loss(leaf_BCHW)
        (adversarial_BCHW,) = torch.autograd.grad(term, leaf_BCHW)
        weight = torch.full_like(value, adversary.weight)
        if last := adversary.last_layer_gradient:
            weight = weight * adaptive_weight(last(gradient_BCHW), last(adversarial_BCHW))
        gradient_BCHW = gradient_BCHW + weight * adversarial_BCHW
        value = value + weight * term.detach()
        parts |= {"adversarial": term.detach(), "adversarial_weight": weight}
    total = _GivenGradient.apply(decoded_BCHW, value, gradient_BCHW)
    total = total + codebook_weight * sum(output.loss)
    return Loss(total, parts | {name: term.detach() for name, term in output.loss._asdict().items()})
