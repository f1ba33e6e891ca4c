"""Run an entry point on one process or many: `python utils/launch.py SCRIPT.py ARGS...`.

From the environment, as torchrun has it: NPROC_PER_NODE (default: the number of GPUs, 1 without), NNODES, NODE_RANK,
MASTER_ADDR, MASTER_PORT. MAX_RESTARTS (default 0): how often all processes start again, and resume, after one has died or a
machine was lost. A single process runs in place. Exit status: the script's own, also behind torchrun.
SIGTERM, SIGHUP, Ctrl-C and Slurm's SIGUSR1 are passed on to the processes.
"""

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import get_args_parser
from torch.distributed.run import run as torchrun

from utils.cli import InputError, fail
from utils.distributed import address_towards, collective_timeout, cores, from_environment
from utils.stop import stop_signals

ROOT = str(Path(__file__).resolve().parent.parent)


def pass_on(number: int, _frame: object) -> None:
    """Signal handler: hand a signal to this process's children, the workers."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)


def launch(script: str, arguments: Sequence[str]) -> None:
    """Run the script, on as many processes as the environment says. Raises InputError for what is wrong in it."""
    env = os.environ
    processes = from_environment("NPROC_PER_NODE", max(1, torch.cuda.device_count()), least=1)
    nodes = from_environment("NNODES", 1, least=1)
    env["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [env.get("PYTHONPATH")])])
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # left over from another launcher
        env.pop(name, None)
    if processes * nodes == 1:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return
    timeout = int(collective_timeout().total_seconds())
    where = ["--nnodes", str(nodes), "--nproc-per-node", str(processes)]
    if nodes > 1:
        if missing := [name for name in ("NODE_RANK", "MASTER_ADDR") if not env.get(name)]:
            raise InputError(
                f"NNODES is {nodes}, so {' and '.join(missing)} must be in the environment, as torchrun has it"
            )
        try:
            own = address_towards(env["MASTER_ADDR"])
        except OSError as error:
            raise InputError(f"MASTER_ADDR in the environment is {env['MASTER_ADDR']!r}: {error.strerror}") from None
        meeting = f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT', '29500')}"
        first = "true" if env["NODE_RANK"] == "0" else "false"
        # Otherwise workers meet under a number of restarts, in which machines differ after one has lost a worker.
        env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        where += ["--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--rdzv-id", env.get("SLURM_JOB_ID", "npp")]
        where += ["--rdzv-conf", f"is_host={first},join_timeout={timeout},read_timeout={timeout}", "--local-addr", own]
    else:
        where += ["--standalone"]
    where += ["--max-restarts", str(from_environment("MAX_RESTARTS", 0))]
    env["NPP_LAUNCHER"] = str(os.getpid())
    # torchrun gives each process one thread unless told; share the cores instead.
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    options = get_args_parser().parse_args([*where, script, *arguments])
    if hasattr(options, "signals_to_handle"):  # versions without it end the workers themselves
        options.signals_to_handle = "SIGQUIT"
        for number in stop_signals():
            signal.signal(number, pass_on)
    try:
        torchrun(options)
    except RendezvousError as error:
        raise InputError(
            f"the {nodes} machines did not meet at {meeting} within {timeout} s ({' '.join(str(error).split())[:120]}): "
            "start the command on each of them, with the same MASTER_ADDR and NODE_RANK 0 on that one"
        ) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)


def main() -> None:
    try:
        launch(sys.argv[1], sys.argv[2:])
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
