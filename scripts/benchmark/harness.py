"""What all benchmarks share: the machine, seconds, a table, and a last line of JSON.

    python -m scripts.benchmark.train | sample | data | evaluate        # from the repository's folder; --help lists the flags

Each has several measurements, chosen by --measure. A last line of JSON holds everything that was measured.
"""

import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from utils.settings import Settings

CPU = torch.device("cpu")


def card(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def start(device: torch.device) -> dict[str, Any]:
    """Print the card, and return it."""
    machine = card(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    return machine


def finish(benchmark: str, machine: Mapping[str, Any], settings: Settings, **results: Any) -> None:
    """Print the last line: everything as JSON."""
    print(json.dumps({"benchmark": benchmark, **machine, "settings": settings.plain(), **results}))


def seconds_now(device: torch.device) -> float:
    """A clock that waits for what the device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(call: Callable[[], Any], device: torch.device = CPU) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    begin = seconds_now(device)
    result = call()
    return seconds_now(device) - begin, result


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows; columns: keys of a row, which are the headings, and the format of each."""
    lines = [list(columns), *([format(row[key], form) for key, form in columns.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def noise(images: range, size: int) -> np.ndarray:
    """Images of noise, uint8 (N, size, size, 3); other ones for each first number."""
    return np.random.default_rng(images.start).integers(0, 256, (len(images), size, size, 3), np.uint8)
