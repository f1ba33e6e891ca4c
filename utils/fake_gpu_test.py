"""The GPU that is rehearsed on: it finds what would fail or wait on a real one, and its backward pass is autograd's."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from utils.fake_gpu import GPU, _run_backward, fake_gpu


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(3),
        lambda x: x[torch.arange(3)].addmm(torch.ones(3, 3), x[None].expand(3, 3)),
        lambda x: torch.cat((x, torch.ones(1))),
        lambda x: nn.Linear(3, 3)(x),
        lambda x: x.to(torch.bfloat16) @ torch.ones(3, device="cuda"),
    ],
    ids=["sum", "product", "concatenation", "weights", "dtypes"],
)
def test_mistakes_raise(mistake):
    with fake_gpu(), pytest.raises(RuntimeError, match=r"same device|dtype"):
        mistake(torch.ones(3, device="cuda"))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.max().cpu() > 0,
    ],
    ids=["item", "bool", "cpu", "mask", "equal"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_the_host_waits_for_is_noted(read: Callable[[Tensor], object], inference):
    with fake_gpu() as gpu, torch.inference_mode(inference):
        read(torch.ones(3, device="cuda") * 2)
    assert len(gpu.waits) == 1 and __file__ in gpu.waits[0]


def test_the_cpu_goes_on_computing():
    with fake_gpu() as gpu:
        on_cpu = torch.arange(3)
        on_gpu = on_cpu.to("cuda", non_blocking=True)
        on_gpu[:2] = on_cpu[1:]
        assert (on_cpu * 2).tolist() == [0, 2, 4] and on_gpu.device == GPU
    assert not gpu.waits


class Scaled(torch.autograd.Function):
    """x and y, twice and three times; the gradient of the second output may be missing."""

    @staticmethod
    def forward(ctx, x, y):
        return 2 * x, 3 * y

    @staticmethod
    def backward(ctx, dx, dy):
        return 2 * dx, 3 * dy


class Model(nn.Module):
    """Shared inputs, several outputs of a node, broadcasting, recomputation, another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False).split(3, dim=-1)
        c, _ = Scaled.apply(a * self.scale, b)
        return (c.bfloat16().float() * a.relu() + self.scale).square().mean()


def test_the_backward_pass_is_that_of_autograd():
    torch.manual_seed(0)
    model, x = Model(), torch.rand(5, 4, requires_grad=True)
    expected = torch.autograd.grad(model(x), [x, *model.parameters()])
    with mock.patch("torch.autograd._engine_run_backward", _run_backward):
        given = torch.autograd.grad(model(x), [x, *model.parameters()])
        assert x.grad is None
        for _ in range(2):
            model(x).backward()
    for gradient, other, leaf in zip(expected, given, [x, *model.parameters()], strict=True):
        torch.testing.assert_close(other, gradient)
        torch.testing.assert_close(leaf.grad, 2 * gradient)
