"""What this machine can do: its matmul rate, whether it can compile, and the memory a process has used."""

import ctypes
import math
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from utils.cli import note
from utils.kernels import product


def durations(
    call: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 2, limit: float = math.inf
) -> list[float]:
    """Wall time of each of so many calls, in seconds, after some unmeasured ones.

    limit: after so many seconds no call is added; then one that was to be unmeasured may be all there is.
    """
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        if sum(times) > limit:
            break
    return times[warmup:] or times[-1:]


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 10) -> float:
    """Measured FLOP/s of a square matrix product: the best of `repeats`, since whatever else runs only slows it down.

    side: by default 2,048 on a CPU, and on a GPU 8,192, so that starting the product does not count. It ends after two
    seconds: a CPU that emulates bfloat16 takes eight for one product of side 1,024.
    """
    side = side or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(durations(lambda: product(a, b), repeats, device, limit=2.0))


def use_compile(choice: bool | None, device: torch.device) -> bool:
    """Whether to call torch.compile: `choice`, by default on GPUs; False, with one line, on a machine that cannot compile."""
    return (device.type == "cuda" if choice is None else choice) and can_compile(device)


@cache
def can_compile(device: torch.device) -> bool:
    """Compile an addition. It fails without a C compiler, Python's headers or Triton, and on GPUs that are too old."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # InductorError around a compiler's or Triton's own, mostly
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        note(
            f"warning: torch.compile does not work on this machine ({reason[:200]}), so the run continues without it, which is "
            "slower: install a C++ compiler and Python's headers (python3-dev), or give --no-compile"
        )
        return False
    return True


def copy_rate(device: torch.device, size: int | None = None, repeats: int = 10) -> float:
    """Measured bytes/s, read and written, of copying `size` bytes: the best of `repeats`.

    size: by default 256 MB on a CPU, well beyond its caches, and 1 GB on a GPU.
    """
    size = size or (1 << 28 if device.type == "cpu" else 1 << 30)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(durations(lambda: target.copy_(source), repeats, device))


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next allocations, where the C library is glibc; otherwise do nothing.

    By default glibc gives blocks above some size back to the system at once. A training step on a CPU frees and allocates
    gigabytes, and each new page costs a fault and a zeroing: most of all in coarse steps, which compute little.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mmap_max, trim_threshold = -4, -1  # names of malloc.h without their M_
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch held on a GPU, or that this process had resident on a CPU, since reset_peak_memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):  # not Linux: since the start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let peak_memory start from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
