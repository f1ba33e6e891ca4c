"""The tokenizer against the published code's numbers, and what published weights depend on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenizer.tokenizer_image.vq_model import (
    PRESETS,
    SEARCH_ELEMENTS,
    USAGE_LENGTH,
    VectorQuantizer,
    VQConfig,
    VQModel,
    code_health,
    preset,
)
from utils.pixels import to_float
from utils.testing import close, fill_by_formula, formula

DATA = Path(__file__).parent / "testdata"
STATE_DICTS = json.loads((DATA / "vq_state_dicts.json").read_text())
TIE = 1e-4  # below this margin the nearest code is a matter of rounding
PIXELS = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module", params=["VQ-16", "VQ-8"])
def published(request):
    """A published configuration with formula weights, in eval mode, and its golden data."""
    model = fill_by_formula(VQModel(PRESETS[request.param])).eval()
    return model, np.load(DATA / f"{request.param.lower().replace('-', '')}.npz")


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def stats(x: torch.Tensor) -> np.ndarray:
    x = x.detach().double()
    return np.array([x.mean(), x.std(), x.abs().mean(), x.min(), x.max()])


def usage(quantize: VectorQuantizer) -> float:
    return code_health(quantize.counts())["codebook_usage"]


def agree(codes: torch.Tensor, golden: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Assert equal codes away from ties; return where they may differ."""
    tie = margin < TIE
    np.testing.assert_array_equal(codes.numpy()[~tie], golden[~tie])
    return tie


@pytest.mark.parametrize("name", STATE_DICTS)
def test_published_names_and_shapes(name):
    with torch.device("meta"):
        model = VQModel(PRESETS[name])
    expected = STATE_DICTS[name]
    parameters = dict(model.named_parameters())
    assert list(expected["state_dict"].items()) == [(k, list(v.shape)) for k, v in model.state_dict().items()]
    assert sum(p.numel() for p in parameters.values()) == expected["parameters"]
    assert len(parameters) == expected["parameter_tensors"]
    decayed = [p.numel() for p in parameters.values() if p.dim() >= 2]
    assert (sum(decayed), len(decayed)) == (expected["decayed_parameters"], expected["decayed_tensors"])
    assert [key for key in model.state_dict() if key not in parameters] == expected["buffers"]
    assert {str(v.dtype).removeprefix("torch.") for v in model.state_dict().values()} == set(expected["dtype"])
    config = {key: getattr(model.config, key) for key in expected["config"]}
    assert json.loads(json.dumps(config)) == expected["config"]


@torch.inference_mode()
def test_encode_small_images(published):
    model, golden = published
    images = to_float(tensor(golden["img_small"]))
    close(model.latents(images), golden["latent_small"])
    codes = model.encode(images)
    tie = agree(codes, golden["codes_small"], golden["margin_small"])
    values = model.eval()(images)
    quantised = model.quantize(model.latents(images)).values_BDHW.permute(0, 2, 3, 1)
    close(quantised[tensor(~tie)], golden["quant_small"].transpose(0, 2, 3, 1)[~tie])
    assert values.codes_BHW.equal(codes)


@pytest.mark.parametrize(
    ("codes", "decoded", "statistics"),
    [("codes_small", "recon_small", "recon_stats_small"), ("random_codes", "random_decoded", "random_decoded_stats")],
)
@torch.inference_mode()
def test_decode_codes_of_images_and_given_ones(published, codes, decoded, statistics):
    model, golden = published
    images = model.decode_code(tensor(golden[codes]))
    close(images, golden[decoded], **PIXELS)
    close(stats(images), golden[statistics], **PIXELS)


@torch.inference_mode()
def test_a_picture_of_256_pixels(published):
    model, golden = published
    images = to_float(tensor(golden["img_big"]))
    close(model.latents(images), golden["latent_big"])
    agree(model.encode(images), golden["codes_big"], golden["margin_big"])
    decoded = model.decode_code(tensor(golden["codes_big"]))
    a, b = golden["recon_big_slice_at"]
    close(decoded[0, :, a : a + 32, b : b + 32], golden["recon_big_slice"], **PIXELS)
    close(F.avg_pool2d(decoded, 8)[0], golden["recon_big_pooled"], **PIXELS)
    close(stats(decoded), golden["recon_stats_big"], **PIXELS)


def test_quantiser_in_training(published):
    """Values, codes, losses, gradients, and the usage buffer after one and two calls."""
    model, golden = published
    quantize = fill_by_formula(VQModel(model.config)).quantize.train()
    z = tensor(golden["train_z"]).requires_grad_()
    values, codes, loss = quantize(z)
    close(values, golden["train_zq"])
    np.testing.assert_array_equal(codes.flatten(), golden["train_codes"])
    close(loss.codebook, golden["train_vq_loss"], atol=0)
    close(loss.commitment, golden["train_commit_loss"], atol=0)
    close(loss.entropy, golden["train_entropy_loss"])
    ((values * tensor(golden["train_w"])).sum() + loss.codebook + loss.commitment).backward()
    close(z.grad, golden["train_grad_z"])
    gradient = quantize.embedding.weight.grad
    close(gradient.double().norm(), golden["train_grad_codebook_norm"], atol=0)
    rows = gradient.abs().sum(1).nonzero()[:, 0]
    np.testing.assert_array_equal(rows, np.unique(golden["train_grad_codebook_rows"]))

    quantize.record(codes)
    assert usage(quantize) == golden["train_codebook_usage"]
    np.testing.assert_array_equal(quantize.codebook_used[-60:], golden["train_codes"])
    quantize.record(quantize(-z.detach()).codes_BHW)
    assert usage(quantize) == golden["train_codebook_usage_second"]


@pytest.mark.parametrize("l2", [True, False])
def test_small_quantiser_with_entropy_loss(published, l2):
    _, golden = published
    prefix = "tiny_l2" if l2 else "tiny_nol2"
    config = VQConfig(codebook_size=64, codebook_l2_norm=l2, entropy_loss_ratio=0.1, show_usage=False)
    quantize = VectorQuantizer(config)
    with torch.no_grad():
        quantize.embedding.weight.copy_(tensor(formula("quantize.embedding.weight", (64, 8))))
    values, codes, loss = quantize(tensor(golden["train_z"]))
    np.testing.assert_array_equal(codes.flatten(), golden[f"{prefix}_codes"])
    close(values, golden[f"{prefix}_zq"])
    close(torch.stack(loss), golden[f"{prefix}_losses"][:3])
    assert "codebook_used" not in quantize.state_dict()


def test_whole_model_in_training(published):
    """The stored tail of the usage buffer is that of this call: the golden array is a view of the reference's buffer."""
    _, golden = published
    model = fill_by_formula(VQModel(published[0].config)).train()
    output = model(to_float(tensor(golden["img_small"])))
    close(torch.stack(output.loss), golden["train_full_losses"][:3])
    model.quantize.record(output.codes_BHW)
    assert usage(model.quantize) == golden["train_full_losses"][3]
    np.testing.assert_array_equal(model.quantize.codebook_used[-64:], golden["train_codebook_used_tail"])
    close(stats(output.reconstruction_BCHW), golden["train_full_recon_stats"], **PIXELS)


def test_trap_11_codebook_is_normalised_on_lookup_and_usage_is_stored(published):
    """Scaled codebook rows change neither codes nor images; codebook_used is in the state dict."""
    model, golden = published
    scaled = VQModel(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    weight = scaled.quantize.embedding.weight
    with torch.no_grad():
        weight.mul_(torch.linspace(0.2, 5, len(weight))[:, None])
        z = tensor(golden["latent_small"])
        tie = tensor(golden["margin_small"] < TIE)
        assert scaled.quantize.codes(z)[~tie].equal(model.quantize.codes(z)[~tie])
        codes = tensor(golden["codes_small"])
        close(scaled.quantize.lookup(codes).norm(dim=-1), np.ones(codes.shape, np.float32), atol=1e-6)
        close(scaled.decode_code(codes), golden["recon_small"], **PIXELS)
    assert scaled.state_dict()["quantize.codebook_used"].shape == (USAGE_LENGTH,)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_halves_as_it_says(name):
    model = VQModel(preset(name, ch=32, codebook_size=16)).eval()
    side = 2 * int(name.split("-")[1])
    with torch.inference_mode():
        codes = model.encode(torch.zeros(3, 3, side, 2 * side))
        assert codes.shape == (3, 2, 4)
        assert codes.dtype == torch.int64
        assert model.decode_code(codes).shape == (3, 3, side, 2 * side)
        square = codes[:, :, :2]
        close(model.decode_code(square.flatten(1)), model.decode_code(square).numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="8 codes are no square grid"):
        model.decode_code(codes.flatten(1))


def test_search_in_parts_equals_the_whole(monkeypatch):
    quantize = VectorQuantizer(VQConfig(codebook_size=50))
    z = torch.randn(2, 8, 7, 5, generator=torch.Generator().manual_seed(0))
    whole = quantize.codes(z)
    monkeypatch.setitem(SEARCH_ELEMENTS, "cpu", 50 * 9)
    assert quantize.codes(z).equal(whole)
    unit = F.normalize(z.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
    assert torch.cdist(unit, quantize.lookup(torch.arange(50))).argmin(1).view(2, 7, 5).equal(whole)


def test_usage_buffer_keeps_the_newest_codes():
    quantize = VectorQuantizer(VQConfig(codebook_size=100))
    quantize.record(torch.arange(100).repeat(USAGE_LENGTH // 100 + 5))
    assert usage(quantize) == 1
    quantize.record(torch.full((2, USAGE_LENGTH // 2), 7))
    assert usage(quantize) == 0.01
    assert quantize.counts().nonzero().tolist() == [[7]]


def test_code_health_by_hand():
    counts = torch.tensor([2, 0, 1, 1, 0])
    health = code_health(counts)
    assert (health["codebook_usage"], health["dead_codes"]) == (0.6, 2)
    assert health["perplexity"] == pytest.approx(2**1.5)  # entropy of 1/2, 1/4, 1/4 in bits
    assert code_health(torch.full((7,), 3))["perplexity"] == pytest.approx(7)
    assert code_health(torch.tensor([9, 0]))["perplexity"] == pytest.approx(1)


def test_forward_leaves_the_module_alone():
    model = VQModel(PRESETS["VQ-4-small"]).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.rand(2, 3, 32, 32))
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_levels_must_agree():
    with pytest.raises(ValueError, match="levels"):
        VQConfig(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2, 4))


@pytest.mark.parametrize("side", [50, 8])
def test_sides_that_are_no_whole_number_of_codes_are_refused(side):
    with torch.device("meta"):
        model, images = VQModel(PRESETS["VQ-16"]), torch.zeros(1, 3, 32, side)
        with pytest.raises(ValueError, match=f"multiples of 16 px, got 32 x {side}"):
            model.encode(images)


@pytest.mark.parametrize("method", ["forward", "encode", "decode_code"])
def test_torch_compile_takes_it_whole(method):
    """fullgraph=True: a break of the graph is an error. These are what training, extraction and sampling compile."""
    config = VQConfig(
        ch=4, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), num_res_blocks=1, z_channels=4, codebook_size=16
    )
    call = getattr(VQModel(config), method)
    given = torch.ones(2, 16, dtype=torch.int64) if method == "decode_code" else torch.rand(2, 3, 8, 8)
    results = [f(given) for f in (call, torch.compile(call, backend="eager", fullgraph=True, dynamic=False))]
    torch._dynamo.reset()
    torch.testing.assert_close(*([*torch.utils._pytree.tree_leaves(result)] for result in results))
