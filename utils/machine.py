"""What this machine can do: its matmul rate, and the memory a process has used."""

import ctypes
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def durations(call: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 2) -> list[float]:
    """Wall time of each of so many calls, in seconds, after some unmeasured ones."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[warmup:]


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, repeats: int = 10) -> float:
    """Measured FLOP/s of a square matrix product: the best of `repeats`, since whatever else runs only slows it down.

    side: by default 2,048 on a CPU, and on a GPU 8,192, so that starting the product does not count.
    """
    side = side or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(durations(lambda: a @ b, repeats, device))


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
