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
from torch._dynamo.testing import CompileCounterWithBackend

from autoregressive.models.cpu import PackedLinear
from autoregressive.models.generate import Decoder, generate
from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from autoregressive.models.guidance import SCHEDULES, guidance_scales, probabilities
from autoregressive.models.sampler import ImageSampler
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils import streams
from utils.fake_gpu import GPU, fake_gpu
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
        args["cond"],
        seed=None,
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
    tuned=st.booleans(),
)
def test_cached_decoding_equals_the_full_forward(
    batch, layers, kv_heads, head_dim, scale, schedule, interval, seed, tuned
):  # fmt: skip
    """Guidance that starts late fills the unconditional half's cache in one pass, one that ends early drops it."""
    model = small_model(layers, kv_heads, head_dim)
    scales = guidance_scales(16, scale, schedule, interval=interval)
    check_against_full_forward(model, Decoder(model, batch, tuned=tuned), torch.arange(batch), scales, seed)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_compiled_step_draws_the_same(kv_heads, monkeypatch):
    """Static shapes: caches are read in buckets behind a mask. Here the compiler is left out, but not its step."""
    graphs = set()

    def compile(step, **_):
        def run(caches, *options):
            graphs.add((len(caches[0][0]), *options))
            return step(caches, *options)

        return run

    monkeypatch.setattr("autoregressive.models.generate.MIN_BUCKET", 6)
    monkeypatch.setattr(torch, "compile", compile)
    model = small_model(2, kv_heads, 8)
    static, plain = Decoder(model, 3, compiled=True), Decoder(model, 3)
    scales = guidance_scales(16, 2.0, "linear", interval=(2, 13))
    check_against_full_forward(model, static, torch.arange(3), scales, 0)
    assert len(graphs) == 5  # buckets of 6: guided and not in the first and the last, guided in the middle
    for labels in ([0, 3, 1], [4, 4]):
        draws = [d(torch.tensor(labels), uniforms(1, len(labels), 16), scales, top_k=30) for d in (static, plain)]
        assert torch.equal(*draws)
    assert len(graphs) == 10  # other filters, other graphs


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")],
        ),
    ],
)
def test_torch_compile_takes_the_step_whole(backend, monkeypatch):
    """fullgraph=True: a break of the graph is an error. Filters and guidance are in it; a second batch needs no other."""
    compile, counter = torch.compile, CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", lambda f, *, mode, **options: compile(f, backend=counter, **options))
    model = small_model(1, 4, 8)
    compiled, plain = Decoder(model, 2, compiled=True), Decoder(model, 2)
    scales = guidance_scales(16, 3.0)
    for seed in (5, 6):
        options = {"top_k": 20, "top_p": 0.9, "temperature": 0.8}
        draws = [d(torch.tensor([1, 2]), uniforms(seed, 2, 16), scales, **options) for d in (compiled, plain)]
        assert torch.equal(*draws)
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_decoding_waits_once_a_batch(compiled, monkeypatch):
    """For whether all was finite, at its end. Guidance that begins late has a pass over many positions (prefill)."""
    monkeypatch.setattr("autoregressive.models.generate.MIN_BUCKET", 4)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, scales = small_model(1, 2, 8), guidance_scales(6, 2.0, interval=(2, 5))
    with fake_gpu() as gpu:
        decoder = Decoder(model, 2, torch.bfloat16, compiled, GPU)
        labels, numbers = torch.tensor([1, 2]), uniforms(0, 2, 6)
        assert decoder(labels, numbers, scales, temperature=0.9, top_k=5, top_p=0.9).device == GPU
        decoder(labels, None, scales[:2])
    assert len(gpu.waits) == 2 and all("self.finite" in line for line in gpu.waits)


def test_on_a_gpu_that_cannot_compile_images_are_drawn_in_bf16(monkeypatch):
    monkeypatch.setattr("utils.machine.can_compile", lambda device: False)
    config = VQConfig(
        ch=4, encoder_ch_mult=(1,), decoder_ch_mult=(1,), num_res_blocks=1, z_channels=4, codebook_size=40
    )
    gpt, tokenizer = small_model(1, 4, 8), VQModel(config)
    with fake_gpu() as gpu:
        sampler = ImageSampler(gpt, tokenizer, device="cuda")
        assert sampler([0, 3], size=6).shape == (2, 6, 6, 3)
    assert sampler.dtype == torch.bfloat16 and not sampler.compiled
    assert len(gpu.waits) == 2  # finite, and the pixels


def test_a_decoder_serves_batch_after_batch():
    """Nothing of one batch is seen by the next, also after other guidance and a shorter one."""
    model = golden_model()
    decoder = Decoder(model, 4)
    first = decoder(torch.tensor([1, 2, 3, 4]), uniforms(0, 4, 64), guidance_scales(64, 3.0))
    decoder(torch.tensor([7]), uniforms(1, 1, 64), guidance_scales(64, 1.0))
    decoder(torch.tensor([7, 8]), None, guidance_scales(64, 2.0, "linear"))
    assert torch.equal(decoder(torch.tensor([1, 2, 3, 4]), uniforms(0, 4, 64), guidance_scales(64, 3.0)), first)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("GPT-XXXL", "GPT-3B", "GPT-7B")])
def test_cached_decoding_of_every_preset_shape(name, guidance):
    model = fill_by_formula(Transformer(preset(name, n_layer=1, vocab_size=64, block_size=4, num_classes=3))).eval()
    check_against_full_forward(model, Decoder(model, 2), torch.tensor([0, 2]), [guidance] * 4, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_an_image_is_the_same_in_any_batch(dtype):
    """One stream an image, keyed by (seed, image index): batch size and order don't matter, on a CPU to the last bit."""
    model, labels = golden_model(), torch.arange(6)
    numbers, scales = uniforms(0, 6, 64), guidance_scales(64, 2.0)
    logits = {}
    for batch in (1, 2, 3, 6):
        decoder, steps, codes = Decoder(model, batch, dtype), [], []
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
        if PackedLinear.fits(model.output.weight.to(dtype)):
            assert torch.equal(logits[batch][1], logits[1][1])
    assert len(set(map(tuple, logits[1][0].tolist()))) == 6


def test_interval_changes_only_what_follows_it():
    model, labels = golden_model(), torch.tensor([1, 4])
    always = generate(model, labels, seed=3, cfg_scale=4.0)
    some = generate(model, labels, seed=3, cfg_scale=4.0, cfg_interval=10)
    assert torch.equal(always[:, :12], some[:, :12])
    assert not torch.equal(always, some)


@pytest.mark.parametrize(
    ("labels", "shape", "length", "message"),
    [
        *(([0] * count, None, 16, "expected 1 to 2 labels") for count in (0, 3, 5)),
        *(([0, 1], shape, 16, r"uniforms: expected \(2, 16\), got") for shape in ((1, 16), (2, 15), (2, 17), (16,))),
        *(([0, 1], None, length, f"expected 1 to 16 codes an image, got {length}") for length in (0, 17)),
        *((labels, None, 16, "expected 0 to 5") for labels in ([0, 6], [-1, 0])),
    ],
)
def test_wrong_inputs(labels, shape, length, message):
    """Nothing is filled up, cut or broadcast."""
    decoder, uniforms_BL = Decoder(small_model(1, 4, 8), 2), None if shape is None else torch.rand(shape)
    with pytest.raises(ValueError, match=message):
        decoder(torch.tensor(labels, dtype=torch.int64), uniforms_BL, [1.0] * length)


@pytest.mark.parametrize("length", [0, -1])
def test_no_codes_to_generate(length):
    with pytest.raises(ValueError, match="expected 1 to 16 codes an image, got 0"):
        generate(small_model(1, 4, 8), [0, 1], length=length)


@pytest.mark.parametrize("options", [{}, {"seed": None}, {"top_p": 0.9, "top_k": 3, "cfg_scale": 2.0}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite(value, options):
    model = small_model(1, 4, 8)
    model.output.weight.data[7, 3] = value
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, [0, 1], **options)


def test_a_seed_is_enough():
    model = golden_model()
    first = generate(model, [3, 1, 4])
    assert first.shape == (3, 64) and torch.equal(first, generate(model, torch.tensor([3, 1, 4]), seed=0))
    assert torch.equal(first, Decoder(model, 3)(torch.tensor([3, 1, 4]), uniforms(0, 3, 64), [1.0] * 64))
    assert torch.equal(first[:2], generate(model, [3, 1])) and not torch.equal(
        first, generate(model, [3, 1, 4], seed=1)
    )
