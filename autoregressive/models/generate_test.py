"""Decoding against the published code's tokens, and against the full forward pass."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.models.generate import draw, filter_logits, generate, probabilities
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
    uniforms = torch.cat((torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53])))
    codes = draw(probs.expand(len(uniforms), -1), uniforms)
    assert (probs[codes] > 0).all()
    share = torch.bincount(codes, minlength=vocab) / len(uniforms)
    assert (share - probs).abs().max() < 2e-4


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([8, 12]),
    st.sampled_from([1.0, 2.5]),
)
def test_cached_decoding_equals_the_full_forward(batch, layers, kv_heads, head_dim, cfg_scale):
    config = GPTConfig(
        dim=4 * head_dim, n_layer=layers, n_head=4, n_kv_head=kv_heads, vocab_size=40, block_size=16, num_classes=5
    )
    model = fill_by_formula(Transformer(config)).eval()
    labels = torch.arange(batch)
    steps = []
    codes = generate(model, labels, None, cfg_scale=cfg_scale, on_step=lambda t, logits: steps.append(logits.clone()))
    with torch.no_grad():
        full = model(codes[..., None], labels)
        if cfg_scale > 1:
            null = model(codes[..., None], torch.full_like(labels, 5))
            full = null + (full - null) * cfg_scale
    torch.testing.assert_close(torch.stack(steps, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("GPT-XXXL", "GPT-3B", "GPT-7B")])
def test_cached_decoding_of_every_preset_shape(name):
    model = fill_by_formula(Transformer(preset(name, n_layer=1, vocab_size=64, block_size=4, num_classes=3))).eval()
    labels, steps = torch.tensor([0, 2]), []
    codes = generate(model, labels, None, on_step=lambda t, logits: steps.append(logits.clone()))
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(steps, 1), model(codes[..., None], labels), rtol=1e-4, atol=1e-4)


def test_trap_an_image_is_the_same_in_any_batch():
    """One stream an image, keyed by (seed, image index): batch size and order don't matter."""
    model, labels = golden_model(), torch.arange(6)
    uniforms = torch.from_numpy(streams.uniform(0, streams.SAMPLE, np.arange(6)[:, None], np.arange(64)))
    together = generate(model, labels, uniforms, cfg_scale=2.0, top_k=16)
    apart = torch.cat(
        [generate(model, labels[i : i + 2], uniforms[i : i + 2], cfg_scale=2.0, top_k=16) for i in (0, 2, 4)]
    )
    assert torch.equal(together, apart)
    assert len(set(map(tuple, together.tolist()))) == 6


def test_interval_changes_only_what_follows_it():
    model, labels = golden_model(), torch.tensor([1, 4])
    uniforms = torch.from_numpy(streams.uniform(3, streams.SAMPLE, np.arange(2)[:, None], np.arange(64)))
    always = generate(model, labels, uniforms, cfg_scale=4.0)
    some = generate(model, labels, uniforms, cfg_scale=4.0, cfg_interval=10)
    assert torch.equal(always[:, :12], some[:, :12])
    assert not torch.equal(always, some)
