"""For tests only: a GPU to rehearse on where there is none, by PyTorch's fake tensors.

The GPU's tensors have a shape, a dtype and a device, but no values; nothing is computed. Those of the CPU are real. What
would be an error on a GPU raises: tensors on two devices, and kernels that do not take a dtype or shape. So does whatever has
the host wait for values of the GPU: `.item()`, `bool()`, `.tolist()`, a shape that depends on values. Code that asks for
`device.type == "cuda"` takes the GPU's way.
"""

import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from utils.distributed import World
from utils.engine import Trainer
from utils.task import EngineSettings, Task
from utils.testing import ROOT

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
TRUE_OR_FALSE = (aten.is_nonzero.default, aten.equal.default)
READS = (*TRUE_OR_FALSE, aten.item.default, aten._local_scalar_dense.default, aten.nonzero.default)


class FakeGPU(FakeTensorMode):
    """Fake tensors, except for what concerns CPU tensors alone. What the host reads from the GPU is ones.

    waits: the lines of ours that did so, by `.item()`, `bool()`, `.cpu()` or a shape that depends on values.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self._within = False  # an operation on fake tensors, which may be made up of others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        of_gpu = any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves)
        if not self._within and not of_gpu:
            return func(*args, **kwargs)
        if func in READS:
            self.waits.append(line_of_ours())
            if func is aten.nonzero.default:
                return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.int64)
            return func in TRUE_OR_FALSE or torch.ones((), dtype=args[0].dtype).item()
        within, self._within = self._within, True
        try:
            args, kwargs = tree_map_only(Tensor, self.from_tensor, (args, kwargs))
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._within = within
        if not within and isinstance(result, FakeTensor) and result.device.type == "cpu":
            self.waits.append(line_of_ours())
            return torch.ones(result.shape, dtype=result.dtype)
        return result


def line_of_ours() -> str:
    """The innermost line of this repository's, other than this file's, that is being executed."""
    frames = reversed(traceback.extract_stack())
    others = (__file__, sys.prefix + os.sep)  # the environment may be a folder of the repository
    ours = (f for f in frames if Path(f.filename).is_relative_to(ROOT) and not f.filename.startswith(others))
    return next((f"{f.filename}:{f.lineno}: {f.line}" for f in ours), "?")


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Within, `cuda` is a device, one of compute capability 9.0. Backward passes work, too; compiling does not.

    A PyTorch that was built without CUDA skips the test.
    """
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch was built without CUDA")
    with (
        warnings.catch_warnings(),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
        mock.patch("torch.cuda.is_bf16_supported", lambda: True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(nn.Module, "to", _to),
        mock.patch("torch.autograd._engine_run_backward", _run_backward),
        FakeGPU() as gpu,
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which copying does
        yield gpu


def train_steps(task: Task, settings: EngineSettings, batches: Sequence[Sequence[Tensor]]) -> None:
    """An update of a task on each of these batches, as the engine does it, without compiling.

    Its models must have been on the GPU before its optimizers were made.
    """
    settings = settings.model_copy(update={"compile": False})
    trainer = Trainer(task, settings, World(0, 1, GPU), run=None, log=None, manager=None)
    task.model.train()
    for batch in batches:
        trainer.train_step(batch)
    assert trainer.losses().device == trainer.grad_norm.device == GPU


def _to(module: nn.Module, *where: Any, move: Any = nn.Module.to, **how: Any) -> nn.Module:
    """nn.Module.to; but modules that are on the GPU stay as they are, since it would give them other (fake) weights."""
    tensors = [*module.parameters(), *module.buffers()]
    return module if tensors and all(tensor.device == GPU for tensor in tensors) else move(module, *where, **how)


_passes = itertools.count(1)


@torch.no_grad()
def _run_backward(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], keep: bool, create: bool, inputs: Sequence[Tensor],
    allow_unreachable: bool = False, accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What autograd's engine does, which needs a driver: call the nodes in order. No second derivatives, no hooks."""
    found: dict[tuple[Any, int], Tensor] = {}

    def add(node: Any, number: int, gradient: Tensor | None) -> None:
        if node is not None and gradient is not None:
            like = node._input_metadata[number]
            assert gradient.device == like.device, f"a gradient on {gradient.device} for {node} on {like.device}"
            gradient, before = gradient.sum_to_size(like.shape).to(like.dtype), found.get((node, number))
            found[node, number] = gradient if before is None else before + gradient

    edges, wanted = ([get_gradient_edge(tensor) for tensor in tensors] for tensors in (outputs, inputs))
    for edge, gradient in zip(edges, gradients, strict=True):
        add(edge.node, edge.output_nr, gradient)
    number_of_pass = next(_passes)  # activation checkpointing recomputes a block once in each
    with mock.patch("torch._C._current_graph_task_id", lambda: number_of_pass):
        for node in _in_order([edge.node for edge in edges]):
            given = [found.get((node, i)) for i in range(len(node._input_metadata))]
            accumulates = hasattr(node, "variable")
            if all(gradient is None for gradient in given) or (accumulates and not accumulate_grad):
                continue
            by_python = isinstance(node, torch.autograd.function.BackwardCFunction)
            if by_python:
                zeros = (torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in node._input_metadata)
                results = node.apply(*(zero if x is None else x for x, zero in zip(given, zeros, strict=True)))
            else:
                results = node(*given)
            results = results if isinstance(results, tuple) else (results,)
            for (behind, i), gradient in zip(node.next_functions, results, strict=False):
                add(behind, i, gradient)
    return tuple(found.get((edge.node, edge.output_nr)) for edge in wanted)


def _in_order(roots: Sequence[Any]) -> list[Any]:
    """The nodes that can be reached, each before those that it hands gradients to."""
    done: dict[Any, None] = {}
    stack = [(node, False) for node in roots]
    while stack:
        node, is_left = stack.pop()
        if is_left:
            done[node] = None
        elif node is not None and node not in done:
            stack += [(node, True), *((behind, False) for behind, _ in node.next_functions)]
    return list(reversed(done))
