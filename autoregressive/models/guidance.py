"""How a code is drawn from its logits: the guidance scale of each code, filters, and one uniform number by inverse CDF.

Shapes: B batch, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.cli import InputError

POWER = 2.75  # of power-cosine, as in RAR (arXiv 2411.00776)

# Scale at x, the share of the image that is drawn, on the way from 1 to s.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda x, s, power: s,
    "linear": lambda x, s, power: 1 + (s - 1) * x,  # MUSE (arXiv 2301.00704)
    "power-cosine": lambda x, s, power: 1 + (s - 1) * (1 - math.cos(math.pi * x**power)) / 2,  # MDTv2, RAR
}


def guidance_scales(
    length: int, scale: float, schedule: str = "constant", power: float = POWER, interval: Sequence[int] = (-1,)
) -> list[float]:
    """The guidance scale of each of `length` codes; 1 is no guidance, and scales below 1 count as 1.

    schedule: a key of SCHEDULES; power is that of power-cosine.
    interval: (first, stop) guides only the codes from first up to, not including, stop (arXiv 2404.07724); the published
    form (c,) guides the first c + 2 codes, and all for c = -1. Raises InputError for an interval outside the image.
    """
    if len(interval) == 1:
        fits = -1 <= interval[0] < length
        first, stop = 0, length if interval[0] < 0 else interval[0] + 2
    else:
        fits = len(interval) == 2 and 0 <= interval[0] < interval[1] <= length
        first, stop = (interval[0], interval[-1]) if interval else (0, 0)
    if not fits:
        raise InputError(
            f"cfg-interval {' '.join(map(str, interval))}: expected one number from -1 to {length - 1}, "
            f"or two, FIRST STOP, with 0 <= FIRST < STOP <= {length} (codes of an image)"
        )
    curve = SCHEDULES[schedule]
    return [max(1.0, curve(t / length, scale, power)) if first <= t < stop else 1.0 for t in range(length)]


def probabilities(logits_BV: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that a code is drawn from (float32).

    Temperature, then only the top_k largest (ties with the k-th stay; 0: off), then only the nucleus of mass top_p (1: off).
    A code is in the nucleus if the codes above it hold no more than top_p; the largest always is.
    """
    logits_BV = logits_BV.float()
    if temperature != 1:
        logits_BV = logits_BV / max(temperature, 1e-5)
    if 0 < top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits_BV.sort(descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        outside = torch.zeros_like(mass, dtype=torch.bool)
        outside[:, 1:] = mass[:, :-1] > top_p
        logits_BV = logits_BV.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits_BV.softmax(-1)


def draw(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Inverse CDF: the first code whose cumulative mass exceeds u of the whole (u in [0, 1)); never one of mass 0.

    Always a code of the vocabulary, also where probabilities are NaN.
    """
    cdf = probs_BV.double().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms_B.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=probs_BV.shape[-1] - 1)
