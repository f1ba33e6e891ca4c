"""What a benchmark ran on, and what that machine can do at most."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def card(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(call: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 2) -> float:
    """Median wall time of a call after some unmeasured ones."""
    times = []
    for i in range(warmup + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Measured FLOP/s of a square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, 10, device)


def finish(result: dict[str, Any]) -> None:
    """The last line: everything as JSON."""
    print(json.dumps(result))
