"""For tests only: weights that are a function of their names and shapes (as in the golden data), and run a command."""

import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """float32 weights by formula: N(offset, scale) from PCG64(crc32(name)); None for entries that stay as they are."""
    if name.endswith("codebook_used"):
        return np.zeros(shape, np.float32)
    if name.endswith("quantize.embedding.weight"):
        offset, scale = 0.0, 1.0
    elif name.endswith(("tok_embeddings.weight", "embedding_table.weight")):
        offset, scale = 0.0, 0.5
    elif len(shape) < 2:
        offset, scale = float(name.endswith("weight")), 0.02
    else:
        offset, scale = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    normal = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    return (offset + scale * normal).astype(np.float32)


@torch.no_grad()
def fill_by_formula(model: nn.Module) -> nn.Module:
    """Fill every floating-point entry of the model's state dict by formula, in place; returns the model."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(formula(name, tuple(tensor.shape))))
    return model


def close(
    actual: Tensor | np.ndarray | float, expected: np.ndarray | float, rtol: float = 1e-4, atol: float = 1e-4
) -> None:
    """Assert closeness of a tensor or number to golden data."""
    if isinstance(actual, Tensor):
        actual = actual.detach().float().cpu().numpy()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def run_script(
    *command: str | Path, processes: int = 1, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess:
    """Run a Python entry point (path from the root, then arguments) as the bash scripts do; output captured as text."""
    variables = {**os.environ, "NPROC_PER_NODE": str(processes), "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(
        [sys.executable, "utils/launch.py", *map(str, command)],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Assert exit status 2 and one `error:` line that contains every part, with no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], f"{part!r} not in {lines[0]!r}"
