"""For tests only: weights that are a function of their names and shapes (as in the golden data); run commands, and wait."""

import math
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
PATIENCE = 900  # seconds for what takes some seconds on an idle machine: a limit for hangs only


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
    *command: str | Path, processes: int = 1, timeout: float = PATIENCE, **env: str
) -> subprocess.CompletedProcess:
    """Run a Python entry point (path from the root, then arguments) as the bash scripts do; output captured as text.

    Where nothing in the environment matters to imports, they are forks (see start_forks), which takes a tenth of the time
    of a small run.
    """
    command = tuple(map(str, command))
    if env.keys() - {"OMP_NUM_THREADS", "NPP_TIMEOUT", "PRETRAINED_MODELS"}:
        return subprocess.run(
            [sys.executable, "utils/launch.py", *command], cwd=ROOT,
            env={**os.environ, "NPROC_PER_NODE": str(processes), **env},
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        with start_forks(command, processes, outputs, **env) as forks:
            code = wait_for_forks(forks, timeout)
        return subprocess.CompletedProcess(command, code, *(path.read_text() for path in outputs))


@contextmanager
def start_forks(
    command: Sequence[str], processes: int = 1, outputs: Sequence[Path] = (Path(os.devnull),) * 2, **env: str
) -> Iterator[list[BaseProcess]]:
    """An entry point in forks of a server that has imported PyTorch; they meet in this process, as they do in torchrun.

    Their stdout and stderr are appended to `outputs`. Those that still run when the block ends are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "autoregressive.train.train_c2i", "matplotlib.figure", "utils.testing"]
    )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    forks = []
    for rank in range(processes):
        ranks = {} if store is None else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        forks.append(context.Process(target=_life, args=(command, {**env, **ranks}, outputs)))
        forks[-1].start()
    try:
        yield forks
    finally:
        for fork in forks:
            fork.kill()
            fork.join()


def wait_for_forks(forks: list[BaseProcess], timeout: float = PATIENCE, patience: float = 5) -> int:
    """The exit status of the first that ends with an error; the others are then asked to end, and killed `patience`
    seconds later. 0 without an error. Raises TimeoutError."""
    deadline, code = time.monotonic() + timeout, 0
    while running := [fork for fork in forks if fork.exitcode is None]:
        wait([fork.sentinel for fork in running], max(0, deadline - time.monotonic()))
        failed = [fork.exitcode for fork in forks if fork.exitcode]
        if failed and not code:
            code, deadline = failed[0], time.monotonic() + patience
            for fork in running:
                fork.terminate()
        elif time.monotonic() >= deadline:
            for fork in running:
                fork.kill()
            if not code:
                raise TimeoutError(f"still running after {timeout} s")
    return code


def _life(command: tuple[str, ...], env: dict[str, str], outputs: Sequence[Path]) -> None:
    """What a forked process does in place of `python utils/launch.py COMMAND`."""
    os.chdir(ROOT)
    os.environ.update(env)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    for number, path in enumerate(outputs, 1):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["utils/launch.py", *command] if "RANK" not in env else list(command)
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_on_machines(
    *command: str | Path, machines: int = 2, processes: int = 1, timeout: float = PATIENCE
) -> list[str]:
    """Run an entry point as on several machines: launchers that meet on loopback. What each printed, once all ended with 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def machine(rank: int) -> subprocess.Popen:
        environment = {
            **os.environ, "NNODES": str(machines), "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "NPROC_PER_NODE": str(processes), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "utils/launch.py", *map(str, command)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    launchers = [machine(rank) for rank in range(machines)]
    try:
        with ThreadPoolExecutor(machines) as pool:
            printed = list(pool.map(lambda one: one.communicate(timeout=timeout)[0], launchers))
    finally:
        for one in launchers:
            one.kill()
    assert [one.returncode for one in launchers] == [0] * machines, printed
    return printed


def wait_for(what: str, happened: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Wait until happened(). AssertionError naming `what` after PATIENCE, or where `process` has ended without it."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if process and process.poll() is not None:
            assert happened(), f"the process ended with status {process.returncode} before this: {what}"
            return
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.01)


def assert_refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Assert exit status 2 and one `error:` line that contains every part, with no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], f"{part!r} not in {lines[0]!r}"
