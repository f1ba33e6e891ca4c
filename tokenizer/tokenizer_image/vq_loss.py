"""The tokenizer's training loss: reconstruction, perceptual, adversarial, codebook, commitment and entropy terms.

The terms on images are computed on the reconstruction alone, and their gradient is taken there. So the gradients at the
decoder's last layer, which the adaptive weight compares (VQGAN, arXiv 2012.09841, eq. 7), cost one convolution each and no
second pass through the perceptual network or the discriminator.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import Output

RECONSTRUCTION = {"l1": F.l1_loss, "l2": F.mse_loss}
MOST_ADAPTIVE = 1e4  # of the adaptive weight


def adaptive_weight(image_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|image_gradient| / (|adversarial_gradient| + 1e-4), at most MOST_ADAPTIVE; both at the decoder's last layer."""
    return (image_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0.0, MOST_ADAPTIVE)


def vq_loss(
    images_BCHW: Tensor,
    output: Output,
    *,
    reconstruction: str = "l2",
    reconstruction_weight: float = 1.0,
    codebook_weight: float = 1.0,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 0.0,
    adversarial: Callable[[Tensor], Tensor] | None = None,
    adversarial_weight: float = 0.0,
    last_layer_gradient: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Add up the terms, in float32: "loss" to minimise, and its parts by name for the log (detached, before the weights).

    reconstruction: l1 or l2. perceptual: the distance of two batches of images (B, 3, H, W). adversarial: a loss of
    reconstructions (GENERATOR_LOSSES of the discriminator's logits). last_layer_gradient: the gradient at the decoder's last
    layer, averaged over processes, of a gradient at the pixels; adversarial_weight is then adaptive. codebook_weight is of
    all three terms of the quantiser, which carry their own factors (beta, entropy ratio) already.
    """
    images_BCHW, decoded_BCHW = images_BCHW.float(), output.reconstruction_BCHW.float()
    leaf_BCHW = decoded_BCHW.detach().requires_grad_()
    terms = {"reconstruction": (reconstruction_weight, RECONSTRUCTION[reconstruction](leaf_BCHW, images_BCHW))}
    if perceptual:
        terms["perceptual"] = (perceptual_weight, perceptual(leaf_BCHW, images_BCHW))
    value = sum(weight * term for weight, term in terms.values())
    (gradient_BCHW,) = torch.autograd.grad(value, leaf_BCHW)
    parts = {name: term.detach() for name, (_, term) in terms.items()}
    value = value.detach()
    if adversarial:
        term = adversarial(leaf_BCHW)
        (adversarial_BCHW,) = torch.autograd.grad(term, leaf_BCHW)
        weight = torch.full_like(value, adversarial_weight)
        if last_layer_gradient:
            weight = weight * adaptive_weight(last_layer_gradient(gradient_BCHW), last_layer_gradient(adversarial_BCHW))
        gradient_BCHW = gradient_BCHW + weight * adversarial_BCHW
        value = value + weight * term.detach()
        parts |= {"adversarial": term.detach(), "adversarial_weight": weight}
    linear = (gradient_BCHW * decoded_BCHW).sum()  # it has the gradient that is known already
    total = value + (linear - linear.detach()) + codebook_weight * sum(output.loss)
    return {"loss": total, **parts, **{name: term.detach() for name, term in output.loss._asdict().items()}}
