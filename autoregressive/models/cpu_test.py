"""What is fast on CPUs does what the plain functions do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoregressive.models.cpu import PackedLinear, apply_complex_rope, make_bags, mix
from autoregressive.models.gpt import GPTConfig, apply_rope, rope_grid


@given(st.integers(2, 40), st.integers(1, 70), st.integers(1, 70))
def test_packed_products_are_those_of_the_plain_layer(rows, width_in, width_out):
    linear = torch.nn.Linear(width_in, width_out, bias=False)
    if not PackedLinear.fits(linear.weight):
        pytest.skip("this PyTorch has no packed linear layer")
    x = torch.randn(rows, 1, width_in)
    with torch.no_grad():
        packed = PackedLinear(linear)
        torch.testing.assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(packed(x[:2]), packed(x)[:2])  # bit for bit: what a row gets does not depend on the others


def test_rotating_complex_numbers_is_rotating_pairs():
    rope = rope_grid(GPTConfig(dim=48, n_head=3, block_size=9)).flatten(0, 1)
    x = torch.randn(2, 9, 3, 16)
    torch.testing.assert_close(apply_complex_rope(x, torch.view_as_complex(rope)), apply_rope(x, rope))


@given(st.integers(1, 3), st.sampled_from([(4, 1), (4, 2), (3, 3)]), st.integers(1, 12))
def test_bags_are_a_product(rows, heads, read):
    n_head, kv_heads = heads
    weights = torch.rand(rows, kv_heads, n_head // kv_heads, read)
    values = torch.randn(rows, kv_heads, 12, 8)
    mixed = mix(weights, values, make_bags(rows, n_head, kv_heads, 12, read))
    torch.testing.assert_close(mixed, weights @ values[:, :, :read])
