"""One process or many: ranks from torchrun's environment, the device and the precision that fit the machine."""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place: rank of size, on device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes (in place); the tensor itself for one process."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def share(self, n: int) -> slice:
        """This process's contiguous part of n items; parts differ by at most one item."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def world_size() -> int:
    """Number of processes torchrun started, before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world():
    """Join the process group if torchrun started several processes (NCCL on GPUs, gloo on CPUs); leave it at the end."""
    size, rank = world_size(), int(os.environ.get("RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        # Work between two meetings takes as long as it takes (whole shards, say): no timeout.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30))
    yield World(rank, size, device)
    # Not after an error: leaving would end the other processes before this one can say what is wrong.
    if size > 1:
        dist.destroy_process_group()


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `auto`, `fp32`, `bf16`, `fp16` or `none` (fp32, the published name); auto is bf16 on GPUs, else fp32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return PRECISIONS["fp32" if name == "none" else name]


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision for a forward pass; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
