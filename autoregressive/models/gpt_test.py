"""The GPT against the published code's numbers, and the traps that break published weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from autoregressive.models.patches import patch_loss, to_patches
from utils.testing import close, fill_by_formula

DATA = Path(__file__).parent / "testdata"
STATE_DICTS = json.loads((DATA / "gpt_state_dicts.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return np.load(DATA / "gpt_small.npz")


def small_model(**changes) -> Transformer:
    config = GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=64, block_size=64, num_classes=10, **changes)
    return fill_by_formula(Transformer(config))


@pytest.mark.parametrize("name", STATE_DICTS)
def test_published_names_and_shapes(name):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    expected = STATE_DICTS[name]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert sum(p.numel() for p in model.parameters() if p.dim() >= 2) == expected["decayed_parameters"]


@pytest.mark.parametrize("whole", [True, False], ids=["loss of the logits", "model.loss"])
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_small_model_logits_loss_and_gradients(golden, patch, whole):
    model = small_model().train()
    patches = to_patches(torch.from_numpy(golden["idx"]), patch)
    labels = torch.from_numpy(golden["cls"])
    logits = model(patches, labels)
    loss = patch_loss(logits, patches) if whole else model.loss(patches, labels)
    loss.backward()
    close(logits, golden[f"logits_p{patch}"])
    close(loss, golden[f"loss_p{patch}"])
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == list(golden["grad_names"])
    norms = [parameters[name].grad.double().norm().item() for name in golden["grad_names"]]
    dots = [(parameters[n].grad.double() * parameters[n].double()).sum().item() for n in golden["grad_names"]]
    close(np.array(norms), golden[f"gradnorm_p{patch}"], rtol=1e-4, atol=1e-6)
    close(np.array(dots), golden[f"graddot_p{patch}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_gpt_b_logits_loss_and_gradients(patch):
    golden = np.load(DATA / "gpt_b.npz")
    model = fill_by_formula(Transformer(PRESETS["GPT-B"])).train()
    patches = to_patches(torch.from_numpy(golden["idx"].astype(np.int64)), patch)
    logits = model(patches, torch.from_numpy(golden["cls"].astype(np.int64)))
    loss = patch_loss(logits, patches)
    positions = torch.from_numpy(golden[f"positions_p{patch}"].astype(np.int64))
    close(logits[:, positions][..., torch.from_numpy(golden["vocab"])], golden[f"logits_p{patch}"])
    close(logits[:, positions].logsumexp(-1), golden[f"logsumexp_p{patch}"])
    close(logits.std(), golden[f"logits_std_p{patch}"])
    close(loss, golden[f"loss_p{patch}"])
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = np.array([parameters[name].grad.double().norm().item() for name in golden["grad_names"]])
    close(norms, golden[f"gradnorm_p{patch}"], rtol=1e-4, atol=1e-6)
    close(math.sqrt((norms**2).sum()), golden[f"gradnorm_total_p{patch}"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_trap_coarse_tables_are_fresh_integer_grids(golden, patch):
    """The class token's cosine is 0 as well as its sine, so its query and key vanish; an identity would break weights."""
    table = small_model().rope_table(64 // patch**2)
    close(table, golden[f"rope_p{patch}"], atol=1e-6)
    assert table[0].abs().max() == 0 and np.abs(golden[f"rope_p{patch}"][0]).max() == 0


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_input_is_the_mean_embedding_of_the_patch(golden, patch):
    model = small_model()
    patches = to_patches(torch.from_numpy(golden["idx"]), patch)
    h = model.embed(patches, torch.from_numpy(golden["cls"]))
    close(h[:, 1:], golden[f"patch_embeddings_p{patch}"], atol=1e-6)


def test_trap_loss_in_eval_mode_and_forward_changes_nothing(golden):
    """The token-level validation loss is to be had at any time, between steps of any level."""
    model = small_model().eval()
    before = {name: value.clone() for name, value in [*model.state_dict().items(), *model.named_buffers()]}
    codes, labels = torch.from_numpy(golden["idx"]), torch.from_numpy(golden["cls"])
    for patch in (4, 1, 2, 1):
        patches = to_patches(codes, patch)
        close(patch_loss(model(patches, labels), patches), golden[f"loss_p{patch}"])
        close(model.loss(patches, labels), golden[f"loss_p{patch}"])
    after = dict([*model.state_dict().items(), *model.named_buffers()])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logits_behind_the_last_code(golden):
    model = small_model().eval()
    h = model.embed(torch.from_numpy(golden["idx"])[..., None], torch.from_numpy(golden["cls"]))
    logits = model.output(model.hidden(h, model.rope_table(64)))
    close(logits[:, -1], golden["eval_logits_last"])
    close(logits[:, :-1], golden["logits_p1"])


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_trap_first_loss_is_ln_vocab(patch):
    torch.manual_seed(0)
    model = Transformer(preset("GPT-XXS", vocab_size=512, block_size=64)).train()
    patches = to_patches(torch.randint(512, (3, 64)), patch)
    assert patch_loss(model(patches, torch.tensor([0, 5, 1000])), patches).item() == pytest.approx(
        math.log(512), rel=1e-6
    )


@pytest.mark.parametrize(
    "kind", ["token_dropout_p", "resid_dropout_p", "ffn_dropout_p", "attn_dropout_p", "drop_path_rate"]
)
def test_trap_dropout_is_active_in_training_only(kind):
    model = fill_by_formula(Transformer(preset("GPT-XXS", vocab_size=64, block_size=16, **{kind: 0.5})))
    codes, labels = torch.arange(16).view(1, 16, 1).expand(4, -1, -1), torch.zeros(4, dtype=torch.int64)
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))
    model.eval()
    assert torch.equal(model(codes, labels), model(codes, labels))


def test_grouped_query_attention_equals_repeated_heads():
    config = GPTConfig(dim=64, n_layer=2, n_head=4, n_kv_head=2, vocab_size=32, block_size=16, num_classes=3)
    grouped = fill_by_formula(Transformer(config)).eval()
    full = Transformer(GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=32, block_size=16, num_classes=3)).eval()
    state = grouped.state_dict()
    for i in range(2):
        q, k, v = state[f"layers.{i}.attention.wqkv.weight"].split((64, 32, 32))
        k, v = (t.view(2, 16, 64).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))
        state[f"layers.{i}.attention.wqkv.weight"] = torch.cat((q, k, v))
    full.load_state_dict(state)
    codes, labels = torch.randint(32, (2, 16, 1)), torch.tensor([0, 3])
    torch.testing.assert_close(grouped(codes, labels), full(codes, labels))


@pytest.mark.parametrize("name", list(PRESETS))
def test_training_flops_are_those_that_pytorch_counts(name):
    """Forward and backward of a preset at small depth; causal attention counts half of what the counter says."""
    config = preset(name, n_layer=1, vocab_size=1000, block_size=16)
    with torch.device("meta"):
        model = Transformer(config)
        patches, labels = torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(patches, labels).sum().backward()
    attention = 6.0 * 2 * 4 * 2 * 2 * config.dim
    assert counter.get_total_flops() == pytest.approx(2 * config.training_flops(patch=2) + attention, rel=0.01)


def test_recomputing_activations_changes_nothing_but_memory(golden):
    """Gradients of a training step with dropout, bit for bit."""
    gradients, kept = [], []
    codes, labels = torch.from_numpy(golden["idx"]), torch.from_numpy(golden["cls"])
    for recompute in (False, True):
        model = small_model(token_dropout_p=0.1, resid_dropout_p=0.1, ffn_dropout_p=0.1, drop_path_rate=0.1).train()
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(codes[..., None], labels, recompute)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_recomputing_takes_the_attention_that_it_is_given():
    model = small_model().eval()
    inputs = model.inputs(torch.zeros(1, 4, 1, dtype=torch.int64), torch.tensor([0]))
    nothing = [lambda q, k, v: torch.zeros_like(q)] * 2
    assert torch.equal(model.hidden(*inputs, nothing, recompute=True), model.hidden(*inputs, nothing))
    assert not torch.equal(model.hidden(*inputs, nothing), model.hidden(*inputs))


def test_a_branch_that_is_always_dropped_is_zero():
    model = small_model(drop_path_rate=1.0).train()  # of the last layer; 0 of the first
    loss = model.loss(torch.zeros(2, 16, 4, dtype=torch.int64), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "patch", "recompute", "backend"),
    [
        (torch.bfloat16, 1, True, "aot_eager"),
        (torch.bfloat16, 2, False, "aot_eager"),
        (torch.bfloat16, 4, True, "aot_eager"),
        (torch.float32, 2, False, "aot_eager"),
        pytest.param(torch.bfloat16, 1, True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_training_step_has_the_gradients_of_an_eager_one(dtype, patch, recompute, backend):
    """At every patch side. 8,192 rows of the head, in eight blocks, since what inductor fuses depends on it.

    aot_eager fuses nothing: a first, a second and a shorter last block are all that there is.
    """
    images = (8192 if backend == "inductor" else 2560) // 16
    config = GPTConfig(
        dim=32, n_layer=1, n_head=2, multiple_of=32, vocab_size=48, block_size=16 * patch**2, num_classes=3
    )
    gradients = []
    for compiled in (False, True):
        model = fill_by_formula(Transformer(config)).train()
        loss_of = torch.compile(model.loss, fullgraph=True, dynamic=False, backend=backend) if compiled else model.loss
        codes = torch.arange(images * config.block_size).view(images, -1) * 7 % 48
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(to_patches(codes, patch), torch.arange(images) % 4, recompute)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch._dynamo.reset()
    for eager, other in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(eager - other) <= 1e-2 * torch.linalg.vector_norm(eager)
