"""What is fast on some CPUs does what PyTorch's plain operations do; oneDNN's products are tested wherever PyTorch has them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils import kernels
from utils.distributed import precision_dtype

CPU = torch.device("cpu")
SIZES = st.integers(1, 40)
ASKED = tuple(
    question.__wrapped__ for question in (kernels.onednn_is_faster, kernels.cpu_computes_in_bf16)
)  # not cached


@pytest.fixture(autouse=True, scope="module")
def onednn():
    """Take oneDNN's products, whatever the processor."""
    if not kernels.has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "onednn_is_faster", lambda: True)
        yield


@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans())
def test_products(rows, inner, columns, turned_a, turned_b):
    """Of views of any strides, also where the transposed product is taken."""
    a = torch.randn(inner, rows).t() if turned_a else torch.randn(rows, inner)
    b = torch.randn(columns, inner).t() if turned_b else torch.randn(inner, columns)
    torch.testing.assert_close(kernels.product(a, b), a @ b)
    batch = torch.randn(3, rows, inner)
    torch.testing.assert_close(kernels.product(batch, b), batch @ b)


@given(st.lists(SIZES, min_size=0, max_size=2), SIZES, SIZES, st.booleans(), st.booleans())
def test_the_layer_and_its_gradients(batch, width_in, width_out, wants_x, wants_weight):
    plain, mine = nn.Linear(width_in, width_out, bias=False), kernels.Linear(width_in, width_out)
    mine.load_state_dict(plain.state_dict())
    x, results = torch.randn(*batch, 5, width_in), []
    for layer in (plain, mine):
        layer.weight.requires_grad_(wants_weight)
        given_x = x.clone().requires_grad_(wants_x)
        y = layer(given_x)
        if y.requires_grad:
            y.square().sum().backward()
        results.append((y.detach(), given_x.grad, layer.weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8)])
def test_the_layer_takes_what_the_plain_one_takes(shape):
    x = torch.randn(shape, requires_grad=True)
    layer = kernels.Linear(8, 6)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 6) and layer.weight.grad.shape == (6, 8) and x.grad.shape == x.shape


def test_the_layer_under_autocast_is_the_plain_one():
    layer, x = kernels.Linear(8, 6), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight)) and layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_in_bfloat16_is_that_in_float32_rounded(causal, kv_heads):
    q, k, v = (torch.randn(2, heads, 9, 16, dtype=torch.bfloat16) for heads in (4, kv_heads, kv_heads))
    options = {"is_causal": causal, "enable_gqa": kv_heads != 4}
    results = []
    for cast in (torch.Tensor.bfloat16, torch.Tensor.float):
        inputs = [cast(x).detach().clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.Tensor.bfloat16):
            mixed = kernels.attention(*inputs, **options)
        assert mixed.dtype == inputs[0].dtype
        mixed.backward(torch.ones_like(mixed))
        results.append([mixed.detach().bfloat16(), *(x.grad.bfloat16() for x in inputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_group_norm_in_bfloat16_is_that_in_float32():
    mine, plain = kernels.GroupNorm(4, 8), nn.GroupNorm(4, 8)
    x = torch.randn(2, 8, 5, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mine(x), plain(x.float()))
    assert list(mine.state_dict()) == list(plain.state_dict())
    assert torch.equal(mine.bfloat16()(x), plain.bfloat16()(x))  # weights that are bfloat16 themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype):
    """Its share, its scale, the same mask backwards, and the same one for a seed; nothing outside of training."""
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    dropped = kernels.dropout(x, 0.1, True)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert dropped.unique().tolist() == F.dropout(x, 0.1, True).unique().tolist()
    rows = (dropped == 0).double().mean(0)
    assert rows.std().item() == pytest.approx((0.1 * 0.9 / 1001) ** 0.5, rel=0.1)  # neighbours are independent
    dropped.backward(torch.ones_like(dropped))
    assert torch.equal(x.grad, dropped)
    torch.manual_seed(1)
    assert torch.equal(kernels.dropout(x, 0.1, True), dropped)
    assert torch.equal(kernels.dropout(x, 0.1, False), x) and torch.equal(kernels.dropout(x, 0.0, True), x)
    assert not kernels.dropout(x, 1.0, True).any()


PROCESSORS = {
    "avx2": ({"avx2": True, "cpu_name": "AMD EPYC"}, True, (False, False)),
    "avx512 of AMD": ({"avx512_f": True, "cpu_name": "AMD EPYC"}, True, (True, False)),
    "avx512 of Intel": ({"avx512_f": True, "cpu_name": "Intel Xeon"}, True, (False, False)),
    "avx512_bf16": ({"avx512_f": True, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True, (True, True)),
    "the same, oneDNN limited to AVX2": ({"avx512_f": True, "avx512_bf16": True}, False, (False, False)),
    "amx": ({"avx512_f": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True, (False, True)),
    "arm": ({"bf16": True}, True, (False, True)),
}


@pytest.mark.parametrize(("processor", "onednn_bf16", "expected"), PROCESSORS.values(), ids=PROCESSORS)
def test_what_is_taken_depends_on_the_processor(monkeypatch, processor, onednn_bf16, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn_bf16)
    assert tuple(question() for question in ASKED) == expected
    monkeypatch.setattr("utils.distributed.cpu_computes_in_bf16", lambda: expected[1])
    assert precision_dtype("auto", CPU) == (torch.bfloat16 if expected[1] else torch.float32)
    assert precision_dtype("none", CPU) == precision_dtype("fp32", CPU) == torch.float32
