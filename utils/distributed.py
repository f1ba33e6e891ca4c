"""One process or many: ranks from torchrun's environment, the device and the precision that fit the machine."""

import ctypes
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.cli import InputError, leave
from utils.kernels import cpu_computes_in_bf16

HEARTBEAT = 2.0  # seconds between two signs of life of a process


@dataclass(frozen=True)
class World:
    """This process's place: rank of size, on device."""

    rank: int
    size: int
    device: torch.device
    _barriers: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Processes on this machine."""
        return from_environment("LOCAL_WORLD_SIZE", self.size, least=1)

    def barrier(self) -> None:
        """Wait until all processes are here, however long their work takes; if one ends meanwhile, so does this one."""
        if self.size == 1:
            return
        number, self._barriers[0] = self._barriers[0], self._barriers[0] + 1
        _meet(f"npp/barrier/{number}", self.size)
        # The first process may hold the store that the others still look at: it continues last.
        _meet(f"npp/barrier/{number}/left", self.size, wait=self.is_main)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes (in place); the tensor itself for one process."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def from_main(self, make: Callable[[], Any], slow: bool = False) -> Any:
        """What make() gives on the first process, on all of them. An InputError of it is raised on all.

        slow: it may take longer than processes wait for each other in a broadcast.
        """
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = make()
            except InputError as error:
                answer[1] = str(error)
        if slow:
            self.barrier()
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise InputError(answer[1])
        return answer[0]

    def share(self, n: int) -> slice:
        """This process's contiguous part of n items; parts differ by at most one item."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def check_shared(self, folder: Path) -> None:
        """Raise InputError, on all processes, unless all of them see the same folder (made if missing)."""
        if self.size == 1:
            return
        name = self.from_main(lambda: _mark(folder))
        missing = torch.tensor([int(not (folder / name).is_file())])
        self.sum(missing := missing.to(self.device))
        if self.is_main:
            (folder / name).unlink(missing_ok=True)
        if missing.item():
            raise InputError(
                f"{folder} is another folder for {int(missing.item())} of {self.size} processes: "
                "give a folder that all machines share"
            )


def _mark(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".shared-{os.getpid()}-{time.time_ns()}"
    (folder / name).touch()
    return name


def _meet(key: str, size: int, wait: bool = True) -> None:
    """Count this process under a key of the store, and wait until all are counted."""
    store, pause = _store(), 0.02
    count = store.add(key, 1)
    while wait and count < size:
        time.sleep(pause)
        pause = min(0.2, 1.2 * pause)
        count = store.add(key, 0)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def world_size() -> int:
    """Number of processes torchrun started, before anything is initialised."""
    return from_environment("WORLD_SIZE", 1, least=1)


def from_environment(name: str, default: int, least: int = 0) -> int:
    """A number from the environment, such as that of processes. Raises InputError for what is none."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) >= least):
        raise InputError(
            f"{name} in the environment is {text[:60]!r}; expected a whole number of at least {least}: "
            "unset it, or give one"
        )
    return int(text)


@contextmanager
def join_world() -> Iterator[World]:
    """Join the process group if torchrun started several processes (NCCL on GPUs, gloo on CPUs).

    One of several processes ends with the block: objects of the group are then still referenced, as their destructors can
    block. Raises InputError for an environment that says there are several processes, but not where.
    """
    size, rank = world_size(), from_environment("RANK", 0)
    if size > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]):
        raise InputError(
            f"WORLD_SIZE is {size} in the environment, but {' and '.join(missing)} is not there: unset WORLD_SIZE, or use "
            "torchrun (the scripts do, by NPROC_PER_NODE)"
        )
    if size > 1 and rank >= size:
        raise InputError(f"RANK is {rank} in the environment, but WORLD_SIZE is {size}: unset both, or use torchrun")
    if torch.cuda.is_available():
        local = from_environment("LOCAL_RANK", 0)
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU, as it has {torch.cuda.device_count()}: lower NPROC_PER_NODE"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        yield World(rank, size, device)
        return
    _end_with_parent()
    _name_interface()
    gpu = {"device_id": device} if device.type == "cuda" else {}
    try:
        dist.init_process_group("nccl" if gpu else "gloo", timeout=collective_timeout(), **gpu)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"process {rank} of {size} did not meet the others at {where} ({' '.join(str(error).split())[:120]}): "
            "check MASTER_ADDR, MASTER_PORT and that all machines have started; or unset WORLD_SIZE"
        ) from None
    store = _store().clone() if hasattr(_store(), "clone") else _store()
    store.set(f"npp/host/{rank}", socket.gethostname())
    threading.Thread(target=_watch, args=(store, rank, size), daemon=True).start()
    world = World(rank, size, device)
    yield world
    # Not after an error: leaving would end the other processes before this one can say what is wrong.
    world.barrier()
    leave(0)


def collective_timeout() -> timedelta:
    """How long processes wait for each other in a sum or broadcast: NPP_TIMEOUT seconds, ten minutes by default."""
    return timedelta(seconds=from_environment("NPP_TIMEOUT", 600, least=5))


def _watch(store: dist.Store, rank: int, size: int) -> None:
    """A thread that gives signs of life, and ends this process with one line if those of another stop.

    The first process watches all others, they watch the first. A process that was stopped itself, with its whole machine
    perhaps, begins anew.
    """
    limit = min(120.0, collective_timeout().total_seconds())
    watched = range(1, size) if rank == 0 else range(1)
    seen: dict[int, tuple[bytes, float]] = {}
    number, last = 0, time.monotonic()
    with suppress(RuntimeError):  # the store ends with the run
        while True:
            number += 1
            store.set(f"npp/alive/{rank}", str(number))
            now = time.monotonic()
            if now - last > HEARTBEAT + limit / 2:
                seen.clear()
            last = now
            for other in watched:
                key = f"npp/alive/{other}"
                beat = store.get(key) if store.check([key]) else b""
                if other not in seen or seen[other][0] != beat:
                    seen[other] = beat, now
                elif now - seen[other][1] > limit:
                    host = store.get(f"npp/host/{other}").decode()
                    print(
                        f"error: process {other} of {size} (on {host}) has ended or hangs: no sign of life for "
                        f"{limit:.0f} s; the same command resumes",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                    os._exit(1)
            time.sleep(HEARTBEAT)


def address_towards(host: str, port: int = 9) -> str:
    """This machine's address on the way to another one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def _name_interface() -> None:
    """Tell gloo which network leads to the other machines where the host's own name leads to loopback (as on Debian)."""
    if "GLOO_SOCKET_IFNAME" in os.environ or from_environment("LOCAL_WORLD_SIZE", 1) == world_size():
        return
    with suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    with suppress(OSError):
        mine = socket.inet_aton(address_towards(os.environ["MASTER_ADDR"]))
        siocgifaddr = 0x8915
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with suppress(OSError):
                    if fcntl.ioctl(probe, siocgifaddr, name.encode().ljust(256, b"\0"))[20:24] == mine:
                        os.environ["GLOO_SOCKET_IFNAME"] = name


def _end_with_parent() -> None:
    """Have the kernel end this process by SIGTERM when its launcher dies (Linux; elsewhere nothing happens).

    Raises InputError if utils/launch.py started it and has died already.
    """
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
    if os.environ.get("NPP_LAUNCHER", str(os.getppid())) != str(os.getppid()):
        raise InputError("the launcher of this process has ended; the same command starts again")


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `auto`, `fp32`, `bf16`, `fp16` or `none` (fp32, the published name).

    auto is bf16 on GPUs and CPUs that compute in it (GPUs: compute capability 8 and later), fp32 elsewhere.
    """
    if name == "auto":
        gpu = device.type == "cuda"
        native = torch.cuda.get_device_capability(device)[0] >= 8 if gpu else cpu_computes_in_bf16()
        return torch.bfloat16 if native else torch.float32
    return PRECISIONS["fp32" if name == "none" else name]


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision for a forward pass; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
