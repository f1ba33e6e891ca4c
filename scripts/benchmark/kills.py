"""Kill a training with kill -9 at random moments, again and again: no checkpoint may be lost, no loss may change.

    python scripts/benchmark/kills.py --kills 100 --seconds 900

Each life of the run is a fork of this process (so that it does not import everything anew), killed after a random part
of a second of training; the same command then continues it. After each kill every checkpoint must be whole. When a run is
finished, its losses, validation losses and last weights must equal those of an uninterrupted run, bit for bit, and another
run begins. Exit status 1 where they don't.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 (loaded here, once for all lives)
import torch
from card import card, finish

from autoregressive.train import train_c2i
from autoregressive.train.toy import flags, write_codes
from utils import checkpoint, cli
from utils.log import progress, read_metrics

SCHEDULE = ("--epochs", "40", "--ema", "--ckpt-every", "7", "--keep-last", "2")


def start(arguments: list[str], output: Path) -> int:
    """A child that trains; returns its process id."""
    if pid := os.fork():
        return pid
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train_c2i.py", *arguments]
    with contextlib.suppress(BaseException):
        train_c2i.main()
        os._exit(0)
    os._exit(1)


def result(folder: Path) -> tuple[list, dict]:
    """What must not change: every loss by step, and the last checkpoint's tensors."""
    kept = ("step", "loss", "grad_norm", "lr", "val_loss", "val_loss_ema")
    rows = [{key: row[key] for key in kept if key in row} for row in read_metrics(folder)]
    last = checkpoint.load(max((folder / "checkpoints").glob("[0-9]*.pt")))
    return rows, {**last["model"], **{f"ema.{name}": value for name, value in last["ema"].items()}}


def differences(folder: Path, expected: tuple[list, dict]) -> list[str]:
    """What is not as in the uninterrupted run."""
    rows, weights = result(folder)
    found = [] if rows == expected[0] else ["losses"]
    return found + [name for name, value in expected[1].items() if not torch.equal(weights[name], value)]


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--kills", type=cli.positive_int, default=100)
    parser.add_argument("--seconds", type=cli.positive, default=900.0, help="stop after this long in any case")
    parser.add_argument("--longest-life", type=cli.positive, default=4.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=cli.count, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork keeps no threads
    dice, began = random.Random(args.seed), time.monotonic()
    work = Path(tempfile.mkdtemp())
    codes = write_codes(work / "codes")
    output = work / "output.txt"
    os.waitpid(start([*flags(codes, work / "whole"), *SCHEDULE], output), 0)
    expected = result(work / "whole" / "000-GPT-XXS")
    kills, checked, runs, wrong = 0, 0, 0, []
    bar = progress(total=args.kills, unit=" kills")
    while kills < args.kills and time.monotonic() - began < args.seconds and not wrong:
        arguments = [*flags(codes, work / f"run{runs}"), *SCHEDULE]
        folder = work / f"run{runs}" / "000-GPT-XXS"
        pid = start(arguments, output)
        end = time.monotonic() + dice.uniform(0, args.longest_life)
        status = None
        while time.monotonic() < end and status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            status = code if done else None
            time.sleep(0.001)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            bar.update()
            for path in (folder / "checkpoints").glob("[0-9]*.pt"):
                checkpoint.load(path)
                checked += 1
        elif status == 0:
            wrong = [f"run {runs}: {what} differ" for what in differences(folder, expected)]
            runs += 1
        else:
            wrong = [f"a life ended with status {status}: {output.read_text()[-2000:]}"]
    bar.close()
    print(
        f"{kills} kills, {checked} checkpoints read after them, {runs} runs finished with the losses of the whole one"
    )
    print("\n".join(wrong))
    shutil.rmtree(work)
    machine = card(torch.device("cpu"))
    finish(
        {
            **machine,
            "benchmark": "kills",
            **vars(args),
            "killed": kills,
            "checked": checked,
            "runs": runs,
            "wrong": wrong,
        }
    )
    sys.exit(1 if wrong or kills < args.kills or not runs else 0)


if __name__ == "__main__":
    cli.run(main)
