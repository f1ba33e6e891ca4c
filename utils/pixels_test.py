"""Between uint8 and float images: the published rounding, and no drift on the way there and back."""

import numpy as np
import torch

from utils.pixels import resize, to_float, to_uint8

EVERY_VALUE = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)


def test_every_value_survives_the_round_trip():
    images = EVERY_VALUE.expand(2, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(images)), images)


def test_to_uint8_is_the_published_conversion():
    """clamp(127.5 x + 128, 0, 255), truncated: not rounded, and not (x + 1) / 2 * 255."""
    values = {-2.0: 0, -1.0: 0, -0.996: 1, 0.0: 128, 0.0078: 128, 0.0079: 129, 0.99: 254, 1.0: 255, 3.0: 255}
    images = torch.tensor(list(values)).view(1, 1, 1, -1)
    assert to_uint8(images).flatten().tolist() == list(values.values())
    x = torch.randn(2, 3, 8, 8)
    expected = np.clip(127.5 * x.numpy() + 128, 0, 255).transpose(0, 2, 3, 1).astype(np.uint8)
    assert np.array_equal(to_uint8(x), expected)


def test_half_precision_is_converted_in_float32():
    x = torch.linspace(-1, 1, 256).bfloat16().view(1, 1, 16, 16)
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


def test_to_float_reaches_both_ends():
    x = to_float(EVERY_VALUE)
    assert x.shape == (1, 1, 16, 16) and x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)


def test_layouts():
    image = torch.randint(256, (1, 4, 6, 3), dtype=torch.uint8)
    assert to_float(image).shape == (1, 3, 4, 6)
    assert torch.equal(to_float(image)[0, 2, 1, 5], to_float(image[:, 1:2, 5:6, 2:3]).squeeze())
    assert to_uint8(to_float(image)).is_contiguous()


def test_resize_has_no_antialiasing():
    """Every other pixel's surroundings decide, as published; the average of all would be 0 here."""
    stripes = torch.tensor([1.0, 1.0, -1.0, -1.0] * 8).expand(1, 1, 32, 32)
    assert resize(stripes, 32) is stripes
    shrunk = resize(stripes, 8)
    assert shrunk.shape == (1, 1, 8, 8) and shrunk.abs().max() < 1e-6
    assert resize(stripes, 16).abs().min() > 0.9
