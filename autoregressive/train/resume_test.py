"""A run that is killed, asked to stop or moved to another number of processes goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from autoregressive.train.toy import SCRIPT, flags, rows, write_codes
from utils import checkpoint
from utils.log import read_metrics
from utils.testing import ROOT, assert_refused, run_script

STEPS = 72  # 6 an epoch, 36 on patches of side 2


@pytest.fixture(scope="module")
def code_path(tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes"))


def command(code_path, results, *more) -> list[str]:
    schedule = ("--epochs", "12", "--ema", "--ckpt-every", "7", "--keep-last", "2")
    return [*flags(code_path, results), *schedule, *map(str, more)]


def end_at(step: int, number: int, arguments: list[str], folder: Path, processes: int) -> int:
    """Run until the metrics have a row of this step, send a signal to all of it, and return the exit status."""
    environment = {**os.environ, "NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "utils/launch.py", SCRIPT, *arguments], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not ((folder / "metrics.jsonl").is_file() and (rows(folder, "step") or [0])[-1] >= step):
            assert process.poll() is None and time.monotonic() < deadline, "ended before its time"
            time.sleep(0.002)
        if number == signal.SIGKILL:
            for worker in children(process.pid):
                os.kill(worker, signal.SIGKILL)
        process.send_signal(number)
        return process.wait(60)


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.fixture(scope="module")
def whole(code_path, tmp_path_factory):
    """whole(processes): the folder of an uninterrupted run."""

    @cache
    def run(processes: int) -> Path:
        results = tmp_path_factory.mktemp("whole")
        result = run_script(SCRIPT, *command(code_path, results), processes=processes, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
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


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_in_the_middle_of_an_epoch_and_across_a_level(whole, code_path, tmp_path, processes):
    """Killed at steps 10 and 40 (of 72), and the newest checkpoint damaged on top of it."""
    folder, arguments = tmp_path / "000-GPT-XXS", command(code_path, tmp_path)
    for step in (10, 40):
        assert end_at(step, signal.SIGKILL, arguments, folder, processes) != 0
        assert all(checkpoint.load(path)["steps"] <= STEPS for path in (folder / "checkpoints").glob("[0-9]*.pt"))
    newest = max((folder / "checkpoints").glob("[0-9]*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    result = run_script(SCRIPT, *arguments, processes=processes, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert f"warning: {newest}" in result.stdout and "is truncated" in result.stdout and "set aside" in result.stdout
    assert f"of {STEPS} from " in result.stdout
    assert_same(folder, whole(processes))
    assert (
        len(list((folder / "checkpoints").glob("[0-9]*.pt"))) == 4
    )  # the ends of both levels and the two newest others


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
    result = run_script(SCRIPT, *arguments, processes=processes, OMP_NUM_THREADS="1")
    assert f"continuing at step {stopped} of {STEPS}" in result.stdout, result.stderr
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


def test_another_number_of_processes_goes_on_with_the_same_data(code_path, tmp_path):
    """One process, killed, then two: the losses of one, but for rounding (dropout is off, its masks are a process's own)."""
    off = ("--dropout-p", "0", "--token-dropout-p", "0")
    arguments = command(code_path, tmp_path / "a", *off)
    folder = tmp_path / "a" / "000-GPT-XXS"
    end_at(40, signal.SIGKILL, arguments, folder, processes=1)
    assert run_script(SCRIPT, *arguments, processes=2).returncode == 0
    assert run_script(SCRIPT, *command(code_path, tmp_path / "b", *off)).returncode == 0
    whole = tmp_path / "b" / "000-GPT-XXS"
    assert rows(folder, "loss") == pytest.approx(rows(whole, "loss"), rel=1e-4)
    assert rows(folder, "val_loss") == pytest.approx(rows(whole, "val_loss"), rel=1e-4)


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
        result = run_script(SCRIPT, *command(moved, tmp_path), "--log-every", "3")
    finally:
        moved.rename(code_path)
    assert result.returncode == 0, result.stderr
    assert "changed since the run was started: log_every 1, now 3" in result.stdout
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"]
