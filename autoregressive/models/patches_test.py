"""Patch-major codes and the patch loss, for any patch side."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from autoregressive.models.patches import head_loss, patch_loss, to_patches

GOLDEN = np.load(Path(__file__).parent / "testdata" / "gpt_small.npz")


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_targets_equal_the_published_ones(patch):
    assert np.array_equal(to_patches(torch.from_numpy(GOLDEN["idx"]), patch), GOLDEN[f"targets_p{patch}"])


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_trap_patches_are_blocks_of_the_grid(patch, rows, batch):
    """Not patch**2 consecutive codes of the raster. Ids are up to 16384, most of which would not survive bfloat16."""
    codes = torch.randint(16384, (batch, (patch * rows) ** 2))
    patches, grid = to_patches(codes, patch), codes.view(batch, patch * rows, patch * rows)
    assert (patches.shape, patches.dtype) == ((batch, rows**2, patch**2), torch.int64)
    for n, k in np.ndindex(rows**2, patch**2):
        row, column = patch * (n // rows) + k // patch, patch * (n % rows) + k % patch
        assert torch.equal(patches[:, n, k], grid[:, row, column])


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(2, 40))
def test_trap_loss_equals_the_mean_over_repeated_logits(batch, patches, codes, vocab):
    """logsumexp minus the gathered mean is the cross-entropy of every code against its patch's logits, without copies."""
    logits = torch.randn(batch, patches, vocab) * 3
    targets = torch.randint(vocab, (batch, patches, codes))
    repeated = logits[:, :, None].expand(-1, -1, codes, -1).reshape(-1, vocab)
    torch.testing.assert_close(patch_loss(logits, targets), F.cross_entropy(repeated, targets.flatten()))


def largest_kept(loss: Callable[..., torch.Tensor], *inputs: object) -> int:
    """Numbers in the largest tensor that loss(*inputs) keeps for the backward pass."""
    sizes = []
    pack = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(*inputs)
    return max(sizes)


def test_no_loss_keeps_more_for_the_backward_pass_than_it_must():
    """That of patches no copies of the logits for their codes, that of hidden states no logits."""
    logits = torch.randn(2, 4, 1000, requires_grad=True)
    assert largest_kept(patch_loss, logits, torch.randint(1000, (2, 4, 64))) <= logits.numel()
    h, weight = torch.randn(2, 64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    assert largest_kept(head_loss, h, weight, torch.randint(500, (2, 64, 4)), 16) <= weight.numel() < 2 * 64 * 500


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(2, 40), st.integers(1, 20))
def test_head_loss_is_the_patch_loss_of_its_logits(batch, patches, codes, vocab, block):
    """The loss and both gradients, for any number of rows at a time, and without gradients."""
    h, weight = torch.randn(batch, patches, 8), torch.randn(vocab, 8)
    targets = torch.randint(vocab, (batch, patches, codes))
    results = []
    for loss in (lambda h, w: patch_loss(h @ w.T, targets), lambda h, w: head_loss(h, w, targets, block)):
        inputs = h.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(*inputs)
        (3 * value).backward()
        results.append((value.detach(), *(tensor.grad for tensor in inputs)))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(head_loss(h, weight, targets, block), results[0][0])


def test_head_loss_under_autocast_is_that_of_bfloat16_logits():
    h, weight = torch.randn(2, 16, 32), torch.randn(100, 32) / 5
    targets = torch.randint(100, (2, 16, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head_loss(h, weight, targets)
    assert mixed.dtype == torch.float32
    naive = patch_loss(h.flatten(0, 1).bfloat16() @ weight.bfloat16().T, targets.flatten(0, 1))
    torch.testing.assert_close(mixed, naive)
    assert abs(mixed - head_loss(h, weight, targets)) < 2e-2


@pytest.mark.parametrize(
    ("codes", "patch", "message"),
    [
        (torch.zeros(1, 64, dtype=torch.int64), 3, "patch side 3 does not divide the grid of 8x8"),
        (torch.zeros(1, 64, dtype=torch.int64), 0, "patch side 0 does not divide"),
        (torch.zeros(1, 64, dtype=torch.int64), -2, "patch side -2 does not divide"),
        (torch.zeros(1, 63, dtype=torch.int64), 1, "square number of codes, got 63"),
        (torch.zeros(1, 64, dtype=torch.uint16), 1, "expected int64 codes, got torch.uint16"),
        (torch.zeros(1, 64), 1, "expected int64 codes, got torch.float32"),
    ],
)
def test_refusals(codes, patch, message):
    with pytest.raises(ValueError, match=message):
        to_patches(codes, patch)


def test_a_second_backward_pass_gives_the_same_gradients():
    h, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = head_loss(h, weight, torch.randint(50, (2, 16, 4)))
    first, second = (torch.autograd.grad(3 * loss, (h, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
