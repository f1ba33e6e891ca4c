"""What a benchmark ran on."""

import json
import platform
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


def finish(result: dict[str, Any]) -> None:
    """The last line: everything as JSON."""
    print(json.dumps(result))
