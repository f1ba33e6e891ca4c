"""The tokenizer's training loss: reconstruction, codebook, commitment and entropy terms, weighted and added."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import QuantiserLoss

RECONSTRUCTION = {"l1": F.l1_loss, "l2": F.mse_loss}


class Loss(NamedTuple):
    """The total to minimise, and its parts by name for the log (detached, before the weights of vq_loss)."""

    total: Tensor
    parts: dict[str, Tensor]


def vq_loss(
    images_BCHW: Tensor,
    reconstruction_BCHW: Tensor,
    quantiser: QuantiserLoss,
    *,
    reconstruction: str = "l2",
    reconstruction_weight: float = 1.0,
    codebook_weight: float = 1.0,
) -> Loss:
    """Add up the terms, in float32. The quantiser's terms carry their own factors (beta, entropy ratio) already.

    A term on images (perceptual, adversarial) is another entry of `terms` with its weight.
    """
    if reconstruction not in RECONSTRUCTION:
        raise ValueError(f"reconstruction: expected one of {', '.join(RECONSTRUCTION)}, got {reconstruction}")
    terms = {
        "reconstruction": (
            reconstruction_weight,
            RECONSTRUCTION[reconstruction](reconstruction_BCHW.float(), images_BCHW.float()),
        ),
        **{name: (codebook_weight, term) for name, term in quantiser._asdict().items()},
    }
    total = sum(weight * term for weight, term in terms.values())
    return Loss(total, {name: term.detach() for name, (_, term) in terms.items()})
