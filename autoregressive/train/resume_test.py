"""A run that is killed, asked to stop or moved to another number of processes resumes as if nothing had happened."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from autoregressive.train.testing import SCRIPT, completed, flags, rows, save_tokenizer, write_codes
from dataset.codes import toy
from utils import checkpoint
from utils.files import sha256
from utils.log import read_metrics
from utils.testing import (
    PATIENCE,
    ROOT,
    assert_refused,
    run_on_machines,
    run_script,
    start_forks,
    wait_for,
    wait_for_forks,
)

STEPS = 72  # 6 an epoch, 36 on patches of side 2
KILLS = int(os.environ.get("KILLS", "3"))  # at random moments


@pytest.fixture(scope="module")
def code_path(tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes"))


def command(code_path, results, *more) -> list[str]:
    schedule = ("--epochs", "12", "--ema", "--ckpt-every", "7", "--keep-last", "2")
    return [*flags(code_path, results), *schedule, *map(str, more)]


# Trains as the command does, but after one step the first process waits for a signal.
PAUSED = """
import os, time
from pathlib import Path
from autoregressive.train import train_c2i
from utils import cli, engine, stop

ask, after_step, asked = stop.StopRequest.ask, engine.Trainer.after_step, []

def noted_ask(self, *signal):
    asked.append(signal)
    ask(self, *signal)

def paused_after_step(self, epoch):
    after_step(self, epoch)
    if self.world.is_main and self.step == int(os.environ["PAUSE_AT"]):
        Path(os.environ["PAUSED"]).touch()
        deadline = time.monotonic() + 900
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)

stop.StopRequest.ask, engine.Trainer.after_step = noted_ask, paused_after_step
cli.run(train_c2i.main)
"""


def end_at(step: int, number: int, arguments: list[str], folder: Path, processes: int) -> int:
    """Run until this step is done, send a signal to all processes of it, and return the exit status."""
    script, paused = folder.parent / "paused.py", folder.parent / "paused"
    folder.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(PAUSED)
    paused.unlink(missing_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "PAUSE_AT": str(step), "PAUSED": str(paused)}
    if processes == 1 or number == signal.SIGKILL:
        with start_forks([str(script), *arguments], processes, **environment) as forks:
            wait_for(f"step {step} is done", lambda: paused.is_file() or any(fork.exitcode for fork in forks))
            for fork in forks:
                os.kill(fork.pid, number)
            return wait_for_forks(forks)
    with subprocess.Popen(
        [sys.executable, "utils/launch.py", str(script), *arguments], cwd=ROOT,
        env={**os.environ, **environment, "NPROC_PER_NODE": str(processes)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_for(f"step {step} is done", paused.is_file, process)
        process.send_signal(number)
        return process.wait(PATIENCE)


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.fixture(scope="module")
def whole(code_path, tmp_path_factory):
    """whole(processes): the folder of an uninterrupted run."""

    @cache
    def run(processes: int, precision: str = "auto") -> Path:
        results = tmp_path_factory.mktemp("whole")
        flags = ("--mixed-precision", precision)
        completed(*command(code_path, results, *flags), processes=processes)
        return results / "000-GPT-XXS"

    return run


def assert_same(folder: Path, whole: Path) -> None:
    """Bit for bit: losses, gradient norms, validation, and the last weights, averages and moments."""
    for key in ("loss", "grad_norm", "lr", "step", "val_loss", "val_loss_ema"):
        assert rows(folder, key) == rows(whole, key), key
    mine, theirs = (checkpoint.load(f / "checkpoints" / f"{STEPS:07d}.pt") for f in (folder, whole))
    for key in ("model", "ema"):
        assert all(torch.equal(mine[key][name], value) for name, value in theirs[key].items())
    states = mine["optimizer"]["state"], theirs["optimizer"]["state"]
    assert all(torch.equal(states[0][i][k], v) for i, row in states[1].items() for k, v in row.items())


@pytest.mark.parametrize(("processes", "precision"), [(1, "fp32"), (1, "bf16"), (2, "auto")])
def test_kill_9_in_the_middle_of_an_epoch_and_across_a_level(whole, code_path, tmp_path, processes, precision):
    """Killed at steps 10 and 40 (of 72), and the newest checkpoint damaged on top of it."""
    folder = tmp_path / "000-GPT-XXS"
    arguments = command(code_path, tmp_path, "--mixed-precision", precision)
    for step in (10, 40):
        assert end_at(step, signal.SIGKILL, arguments, folder, processes) != 0
        assert all(checkpoint.load(path)["steps"] <= STEPS for path in (folder / "checkpoints").glob("[0-9]*.pt"))
    newest = max((folder / "checkpoints").glob("[0-9]*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    printed = completed(*arguments, processes=processes)
    for part in (f"warning: {newest}", "is truncated", "set aside", f"of {STEPS} from "):
        assert part in printed
    assert_same(folder, whole(processes, precision))
    kept = list((folder / "checkpoints").glob("[0-9]*.pt"))
    assert len(kept) == 4  # the ends of both levels and the two newest others


@pytest.mark.slow
def test_kill_9_at_random_moments(whole, code_path, tmp_path):
    """Every checkpoint that a kill leaves is whole, and a run that is killed again and again ends as an uninterrupted one."""
    dice = random.Random(0)
    kills = runs = 0
    while kills < KILLS or not runs:
        results, output = tmp_path / f"run{runs}", tmp_path / "output.txt"
        folder = results / "000-GPT-XXS"
        # A moment after some step; after one that was reached before, while it is starting; or not at all.
        step = dice.randrange(3 * STEPS // 2) if kills < KILLS else STEPS + 1
        with start_forks([SCRIPT, *command(code_path, results)], 1, [output] * 2, OMP_NUM_THREADS="1") as (fork,):
            wait_for(
                f"step {step} is done, or the run",
                lambda step=step, folder=folder, fork=fork: (
                    fork.exitcode is not None or (rows(folder, "step") or [0])[-1] >= step
                ),
            )
            fork.join(dice.uniform(0, 0.2))
            if fork.exitcode is None:
                fork.kill()
                kills += 1
            else:
                assert fork.exitcode == 0, output.read_text()[-2000:]
                assert_same(folder, whole(1))
                runs += 1
        for path in (folder / "checkpoints").glob("[0-9]*.pt"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("number", "status", "processes"), [(signal.SIGTERM, 0, 1), (signal.SIGTERM, 0, 2), (signal.SIGINT, 130, 2)]
)
def test_a_signal_saves_and_ends_cleanly(whole, code_path, tmp_path, number, status, processes):
    """Losses are logged every 10 steps here, so the run ends between two reports; their means are not touched."""
    folder = tmp_path / "000-GPT-XXS"
    arguments = command(code_path, tmp_path, "--log-every", "10", "--ckpt-every", "50")
    assert end_at(20, number, arguments, folder, processes) == status
    line = (folder / "log.txt").read_text().splitlines()[-1]
    assert f"by {number.name}; the same command continues" in line
    stopped = int(line.split("stopped at step ")[1].split()[0])
    assert max((folder / "checkpoints").iterdir()).name == f"{stopped:07d}.pt"
    assert f"continuing at step {stopped} of {STEPS}" in completed(*arguments, processes=processes)
    losses = rows(whole(processes), "loss")
    found = {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}
    assert list(found) == [1, 10, 20, 30, 36, 40, 50, 60, 70, 72]
    for start, step in pairwise(found):
        part = losses[start:step]
        assert found[step] == pytest.approx(sum(part) / len(part), rel=1e-6)
    assert rows(folder, "val_loss_ema") == rows(whole(processes), "val_loss_ema")


def test_a_signal_does_not_save_what_is_not_finite(code_path, tmp_path):
    """Between two reports nothing has looked at the losses yet."""
    arguments = command(code_path, tmp_path, "--lr", "1e30", "--max-grad-norm", "0", "--epochs", "1000")
    arguments += ["--log-every", "100000", "--ckpt-every", "100000"]
    assert end_at(6, signal.SIGTERM, arguments, tmp_path / "000-GPT-XXS", processes=1) == 1
    assert not list((tmp_path / "000-GPT-XXS").glob("checkpoints/*"))
    assert "the run stops" in (tmp_path / "000-GPT-XXS" / "log.txt").read_text()
    assert (tmp_path / "000-GPT-XXS" / "loss.png").is_file()


def test_another_number_of_processes_resumes_with_the_same_data(code_path, tmp_path):
    """One process, killed, then two: the losses of one, but for rounding (dropout is off, its masks are a process's own)."""
    off = ("--dropout-p", "0", "--token-dropout-p", "0", "--mixed-precision", "fp32")
    arguments = command(code_path, tmp_path / "a", *off)
    folder = tmp_path / "a" / "000-GPT-XXS"
    end_at(40, signal.SIGKILL, arguments, folder, processes=1)
    completed(*arguments, processes=2)
    completed(*command(code_path, tmp_path / "b", *off))
    whole = tmp_path / "b" / "000-GPT-XXS"
    assert rows(folder, "loss") == pytest.approx(rows(whole, "loss"), rel=1e-4)
    assert rows(folder, "val_loss") == pytest.approx(rows(whole, "val_loss"), rel=1e-4)


def test_sharded_training_is_that_of_one_process(tmp_path):
    """Two shards, killed; four, killed in the next level; one process: losses, validation, weights and moments of one."""
    vq_ckpt = save_tokenizer(tmp_path / "vq.pt", codebook_size=64)
    toy.write_codes(tmp_path, images=48, tokens=64, codebook=64, tokenizer_sha256=sha256(vq_ckpt))
    same = (
        "--dropout-p",
        "0",
        "--token-dropout-p",
        "0",
        "--mixed-precision",
        "fp32",
        "--epochs",
        "4",
        "--ckpt-every",
        "5",
    )
    same += ("--vq-ckpt", vq_ckpt, "--sample-every", "3")
    arguments = command(tmp_path, tmp_path / "a", *same)
    folder, whole = (tmp_path / name / "000-GPT-XXS" for name in "ab")
    sharded = [*arguments, "--data-parallel", "fsdp"]
    end_at(8, signal.SIGKILL, [*sharded, "--activation-checkpointing"], folder, processes=2)
    end_at(17, signal.SIGKILL, [*sharded, "--gradient-accumulation-steps", "2"], folder, processes=4)
    assert (folder / "checkpoints" / "0000015.pt").is_file()
    completed(*arguments)
    completed(*command(tmp_path, tmp_path / "b", *same))
    for key in ("loss", "grad_norm", "val_loss", "val_loss_ema", "val_loss_p2"):
        assert rows(folder, key) == pytest.approx(rows(whole, key), rel=1e-5), key
    mine, theirs = (checkpoint.load(f / "checkpoints" / "0000024.pt") for f in (folder, whole))
    for key in ("model", "ema"):
        for name, value in theirs[key].items():
            torch.testing.assert_close(mine[key][name], value, rtol=0, atol=2e-6)
    for i, state in theirs["optimizer"]["state"].items():
        torch.testing.assert_close(mine["optimizer"]["state"][i], state, rtol=1e-3, atol=1e-6)
    drawn = [sorted(path.name for path in (run / "samples").iterdir()) for run in (folder, whole)]
    assert drawn == [["epoch-0003.png", "epoch-0004.png"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("way", "precision", "off"), [("hsdp", "fp32", 1e-5), ("fsdp", "bf16", 2e-3)])
def test_sharded_training_on_two_machines_of_two_processes_is_that_of_one_process(
    code_path, tmp_path, way, precision, off
):
    """In bf16 the whole weights are rounded, the moments and the sums of gradients are not."""
    same = ("--dropout-p", "0", "--token-dropout-p", "0", "--epochs", "2")
    completed(*command(code_path, tmp_path / "one", *same, "--mixed-precision", "fp32"))
    flags = (*same, "--data-parallel", way, "--mixed-precision", precision)
    run_on_machines(SCRIPT, *command(code_path, tmp_path / "four", *flags), processes=2)
    one, four = (tmp_path / name / "000-GPT-XXS" for name in ("one", "four"))
    for key in ("loss", "val_loss", "val_loss_ema"):
        assert rows(four, key) == pytest.approx(rows(one, key), rel=off), key


def test_two_machines_resume_by_themselves_when_a_worker_and_then_a_whole_machine_is_lost(whole, code_path, tmp_path):
    """Two launchers that meet on loopback; the second one is killed with its worker and started again, as a cluster does."""
    folder, arguments = tmp_path / "000-GPT-XXS", command(code_path, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def machine(rank: int) -> subprocess.Popen:
        environment = {
            **os.environ, "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "NPROC_PER_NODE": "1", "MAX_RESTARTS": "3", "OMP_NUM_THREADS": "1", "NPP_TIMEOUT": "120",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "utils/launch.py", SCRIPT, *arguments], cwd=ROOT, env=environment, start_new_session=True,
            stdout=(tmp_path / f"machine{rank}.txt").open("a"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def reach(step: int) -> None:
        deadline = time.monotonic() + 300
        while not ((folder / "metrics.jsonl").is_file() and (rows(folder, "step") or [0])[-1] >= step):
            assert time.monotonic() < deadline, [path.read_text()[-2000:] for path in tmp_path.glob("machine*.txt")]
            time.sleep(0.01)

    machines = [machine(0), machine(1)]
    try:
        reach(12)
        os.kill(children(machines[1].pid)[0], signal.SIGKILL)
        reach(30)
        for pid in (*children(machines[1].pid), machines[1].pid):
            os.kill(pid, signal.SIGKILL)
        machines[1].wait()
        machines[1] = machine(1)
        assert [one.wait(300) for one in machines] == [0, 0], [
            p.read_text()[-2000:] for p in tmp_path.glob("machine*.txt")
        ]
    finally:
        for one in machines:
            one.kill()
    assert_same(folder, whole(2))


def test_changed_arguments(code_path, tmp_path):
    """Those that matter are refused, naming them; others are noted."""
    folder, arguments = tmp_path / "000-GPT-XXS", command(code_path, tmp_path)
    end_at(8, signal.SIGKILL, arguments, folder, processes=1)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}
    assert_refused(run_script(SCRIPT, *arguments, "--lr", "0.5"), "is unfinished", "lr 0.001, now 0.5", "--fresh")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"} == before
    other = write_codes(tmp_path / "other", seed=1)
    assert_refused(run_script(SCRIPT, *command(other, tmp_path)), "is unfinished", "data ")
    moved = tmp_path / "moved"
    code_path.rename(moved)
    try:
        printed = completed(*command(moved, tmp_path), "--log-every", "3")
    finally:
        moved.rename(code_path)
    assert "changed since the run was started: log_every 1, now 3" in printed
    assert json.loads((folder / "run.json").read_text())["finished"]
