"""Run an entry point on one process or many: `python utils/launch.py SCRIPT.py ARGS...`.

From the environment, as torchrun has it: NPROC_PER_NODE (default: the number of GPUs, 1 without), NNODES, NODE_RANK,
MASTER_ADDR, MASTER_PORT. A single process runs in place. Exit status: the script's own, also behind torchrun.
SIGTERM and Ctrl-C go to the processes, which end as they see fit.
"""

import argparse
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import run as torchrun

from utils.cli import fail, positive_int


def from_environment(name: str, default: int) -> int:
    """A number of processes or machines; one line and exit status 2 for what is none."""
    try:
        return positive_int(os.environ.get(name) or str(default))
    except argparse.ArgumentTypeError as error:
        fail(f"{name} in the environment: {error}")


def pass_on(number: int, _frame: object) -> None:
    """Signal handler: hand a signal to this process's children, the workers."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)


def main() -> None:
    script, arguments = sys.argv[1], sys.argv[2:]
    env = os.environ
    processes = from_environment("NPROC_PER_NODE", max(1, torch.cuda.device_count()))
    nodes = from_environment("NNODES", 1)
    if processes * nodes == 1:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return
    where = ["--nnodes", str(nodes), "--nproc-per-node", str(processes)]
    if nodes > 1:
        if missing := [name for name in ("NODE_RANK", "MASTER_ADDR") if not env.get(name)]:
            fail(f"NNODES is {nodes}, so {' and '.join(missing)} must be in the environment, as torchrun has it")
        where += ["--node-rank", env["NODE_RANK"], "--master-addr", env["MASTER_ADDR"]]
        where += ["--master-port", env.get("MASTER_PORT", "29500")]
    else:
        where += ["--standalone"]
    # torchrun gives each process one thread unless told; share the cores instead.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    options = get_args_parser().parse_args([*where, script, *arguments])
    if hasattr(options, "signals_to_handle"):  # older versions end the workers themselves
        options.signals_to_handle = "SIGHUP,SIGQUIT"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
    try:
        torchrun(options)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
