"""Decoding against the published code's tokens, and against the full forward pass."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.models.generate import (
    SCHEDULES,
    Decoder,
    PackedLinear,
    draw,
    filter_logits,
    generate,
    guidance_scales,
    probabilities,
)
from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from utils import streams
from utils.testing import close, fill_by_formula

GOLDEN = np.load(Path(__file__).parent / "testdata" / "generate.npz")
RUNS = [name.removesuffix("_args") for name in GOLDEN.files if name.startswith("run") and name.endswith("_args")]


@cache
def golden_model() -> Transformer:
    config = GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=64, block_size=64, num_classes=10)
    return fill_by_formula(Transformer(config)).eval()


@pytest.mark.parametrize("run", RUNS)
def test_greedy_runs_equal_the_published_tokens(run):
    args = json.loads(str(GOLDEN[f"{run}_args"]))
    logits = []
    codes = generate(
        golden_model(),
        torch.tensor(args["cond"]),
        None,
        cfg_scale=args["cfg_scale"],
        cfg_interval=args.get("cfg_interval", -1),
        length=args["max_new_tokens"],
        on_step=lambda t, step_logits: logits.append(step_logits.clone()),
    )
    assert np.array_equal(codes, GOLDEN[f"{run}_tokens"])
    close(logits[0], GOLDEN[f"{run}_first_logits"])
    close(logits[-1], GOLDEN[f"{run}_last_logits"])
    if f"{run}_probs" in GOLDEN:
        filters = {key: args[key] for key in ("temperature", "top_k", "top_p") if key in args}
        probs = torch.stack([probabilities(step, **filters) for step in logits], dim=1)
        close(probs, GOLDEN[f"{run}_probs"])


@pytest.mark.parametrize("kind", ["filter", "tie"])
def test_filters_equal_the_published_probabilities(kind):
    logits = torch.from_numpy(GOLDEN[f"{kind}_logits"])
    for (temperature, top_k, top_p), expected in zip(GOLDEN[f"{kind}_params"], GOLDEN[f"{kind}_probs"], strict=True):
        close(probabilities(logits, temperature, int(top_k), top_p), expected, atol=1e-6)


def test_filters_are_off_by_default():
    logits = torch.randn(2, 50)
    assert filter_logits(logits) is logits


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


def uniforms(seed: int, images: int, codes: int) -> torch.Tensor:
    return torch.from_numpy(streams.uniform(seed, streams.SAMPLE, np.arange(images)[:, None], np.arange(codes)))


def full_forward(
    model: Transformer, codes_BL: torch.Tensor, labels_B: torch.Tensor, scales: list[float]
) -> torch.Tensor:
    """The guided logits (B, L, V) of every position at once, without a cache."""
    with torch.no_grad():
        conditional = model(codes_BL[..., None], labels_B)
        null = model(codes_BL[..., None], torch.full_like(labels_B, model.config.num_classes))
    return null + (conditional - null) * torch.tensor(scales)[:, None]


def check_against_full_forward(
    model: Transformer, decoder: Decoder, labels: torch.Tensor, scales: list[float], seed: int | None
) -> None:
    """Cached logits are those of the full forward; codes are the ones that these logits and uniforms make."""
    steps, L = [], len(scales)
    numbers = None if seed is None else uniforms(seed, len(labels), L)
    codes = decoder(labels, numbers, scales, on_step=lambda t, logits: steps.append(logits.clone()))
    full = full_forward(model, codes, labels, scales)
    torch.testing.assert_close(torch.stack(steps, 1), full, rtol=1e-4, atol=2e-4)
    if seed is None:
        assert torch.equal(codes, torch.stack(steps, 1).argmax(-1))


def small_model(layers: int, kv_heads: int, head_dim: int) -> Transformer:
    config = GPTConfig(
        dim=4 * head_dim, n_layer=layers, n_head=4, n_kv_head=kv_heads, vocab_size=40, block_size=16, num_classes=5
    )
    return fill_by_formula(Transformer(config)).eval()


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    layers=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 12]),
    scale=st.sampled_from([1.0, 2.5]),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    interval=st.sampled_from([(-1,), (3,), (0, 16), (1, 2), (5, 16), (7, 11)]),
    seed=st.sampled_from([None, 0, 1]),
)
def test_cached_decoding_equals_the_full_forward(
    batch, layers, kv_heads, head_dim, scale, schedule, interval, seed
):  # fmt: skip
    """Guidance that starts late fills the unconditional half's cache in one pass, one that ends early drops it."""
    model = small_model(layers, kv_heads, head_dim)
    scales = guidance_scales(16, scale, schedule, interval=interval)
    check_against_full_forward(model, Decoder(model, batch), torch.arange(batch), scales, seed)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_compiled_step_draws_the_same(kv_heads, monkeypatch):
    """Static shapes: caches are read in buckets behind a mask. Here the compiler is left out, but not its step."""
    monkeypatch.setattr("autoregressive.models.generate.MIN_BUCKET", 6)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = small_model(2, kv_heads, 8)
    static, plain = Decoder(model, 3, compiled=True), Decoder(model, 3)
    scales = guidance_scales(16, 2.0, "linear", interval=(2, 13))
    check_against_full_forward(model, static, torch.arange(3), scales, 0)
    assert len(static.replays) == 5  # buckets of 6: guided and not in the first and the last, guided in the middle
    for labels in ([0, 3, 1], [4, 4]):
        draws = [d(torch.tensor(labels), uniforms(1, len(labels), 16), scales, top_k=30) for d in (static, plain)]
        assert torch.equal(*draws)
    assert len(static.replays) == 10  # other filters, other graphs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_torch_compile_takes_the_step_whole():
    model = small_model(1, 4, 8)
    compiled, plain = Decoder(model, 2, compiled=True), Decoder(model, 2)
    scales = guidance_scales(16, 3.0)
    draws = [decoder(torch.tensor([1, 2]), uniforms(5, 2, 16), scales) for decoder in (compiled, plain)]
    assert torch.equal(*draws)
    assert len(compiled.replays) == 1


def test_a_decoder_serves_batch_after_batch():
    """Nothing of one batch is seen by the next, also after other guidance and a shorter one."""
    model = golden_model()
    decoder = Decoder(model, 4)
    first = decoder(torch.tensor([1, 2, 3, 4]), uniforms(0, 4, 64), guidance_scales(64, 3.0))
    decoder(torch.tensor([7]), uniforms(1, 1, 64), guidance_scales(64, 1.0))
    decoder(torch.tensor([7, 8]), None, guidance_scales(64, 2.0, "linear"))
    assert torch.equal(decoder(torch.tensor([1, 2, 3, 4]), uniforms(0, 4, 64), guidance_scales(64, 3.0)), first)


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


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("GPT-XXXL", "GPT-3B", "GPT-7B")])
def test_cached_decoding_of_every_preset_shape(name, guidance):
    model = fill_by_formula(Transformer(preset(name, n_layer=1, vocab_size=64, block_size=4, num_classes=3))).eval()
    check_against_full_forward(model, Decoder(model, 2), torch.tensor([0, 2]), [guidance] * 4, None)


def test_trap_an_image_is_the_same_in_any_batch():
    """One stream an image, keyed by (seed, image index): batch size and order don't matter, on a CPU to the last bit."""
    model, labels = golden_model(), torch.arange(6)
    numbers, scales = uniforms(0, 6, 64), guidance_scales(64, 2.0)
    logits = {}
    for batch in (1, 2, 3, 6):
        decoder, steps, codes = Decoder(model, batch), [], []
        for part in torch.arange(6).split(batch):
            mine = []
            codes.append(
                decoder(
                    labels[part], numbers[part], scales, top_k=16, on_step=lambda t, x, to=mine: to.append(x.clone())
                )
            )
            steps.append(torch.stack(mine, 1))
        logits[batch] = (torch.cat(codes), torch.cat(steps))
        assert torch.equal(logits[batch][0], logits[1][0])
        if PackedLinear.fits(model.output.weight):
            assert torch.equal(logits[batch][1], logits[1][1])
    assert len(set(map(tuple, logits[1][0].tolist()))) == 6


def test_interval_changes_only_what_follows_it():
    model, labels = golden_model(), torch.tensor([1, 4])
    always = generate(model, labels, uniforms(3, 2, 64), cfg_scale=4.0)
    some = generate(model, labels, uniforms(3, 2, 64), cfg_scale=4.0, cfg_interval=10)
    assert torch.equal(always[:, :12], some[:, :12])
    assert not torch.equal(always, some)
