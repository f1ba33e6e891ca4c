"""Filters against the published probabilities, inverse CDF against the distribution, and guidance by position."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoregressive.models.guidance import draw, guidance_scales, probabilities
from utils.cli import InputError
from utils.testing import close

GOLDEN = np.load(Path(__file__).parent / "testdata" / "generate.npz")


@pytest.mark.parametrize("kind", ["filter", "tie"])
def test_filters_equal_the_published_probabilities(kind):
    logits = torch.from_numpy(GOLDEN[f"{kind}_logits"])
    for (temperature, top_k, top_p), expected in zip(GOLDEN[f"{kind}_params"], GOLDEN[f"{kind}_probs"], strict=True):
        close(probabilities(logits, temperature, int(top_k), top_p), expected, atol=1e-6)


def test_filters_are_off_by_default():
    logits = torch.randn(2, 50)
    assert probabilities(logits).equal(logits.softmax(-1))


@given(st.integers(2, 60), st.integers(0, 5))
def test_draw_follows_the_distribution_and_never_takes_a_code_of_mass_zero(vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(vocab, generator=generator) * (torch.rand(vocab, generator=generator) < 0.6)
    probs[seed % vocab] = 0.5
    probs /= probs.sum()
    numbers = torch.cat((torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53])))
    codes = draw(probs.expand(len(numbers), -1), numbers)
    assert (probs[codes] > 0).all()
    share = torch.bincount(codes, minlength=vocab) / len(numbers)
    assert (share - probs).abs().max() < 2e-4


class TestGuidance:
    def test_constant_is_everywhere_and_below_one_is_off(self):
        assert guidance_scales(4, 2.0) == [2.0] * 4
        assert guidance_scales(4, 0.5) == [1.0] * 4

    def test_linear_starts_at_one(self):
        assert guidance_scales(4, 3.0, "linear") == [1.0, 1.5, 2.0, 2.5]

    def test_power_cosine_is_half_way_at_the_half_with_power_one(self):
        scales = guidance_scales(256, 5.0, "power-cosine", 1.0)
        assert scales[0] == 1.0 and abs(scales[128] - 3.0) < 1e-12 and 4.99 < scales[-1] < 5
        assert guidance_scales(256, 5.0, "power-cosine", 3.0)[128] < 1.2  # later with a larger power

    def test_intervals(self):
        assert guidance_scales(6, 2.0, interval=(1,)) == [2, 2, 2, 1, 1, 1]  # the published form: c + 2 codes
        assert guidance_scales(6, 2.0, interval=(2, 4)) == [1, 1, 2, 2, 1, 1]

    @pytest.mark.parametrize("interval", [(), (4, 17), (16,), (-2,), (5, 5), (1, 2, 3)])
    def test_an_interval_outside_the_image_is_refused(self, interval):
        with pytest.raises(InputError, match=r"cfg-interval.*from -1 to 15.*STOP <= 16"):
            guidance_scales(16, 2.0, interval=interval)
