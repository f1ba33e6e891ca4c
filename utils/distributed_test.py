"""Several processes: what they share, one line for a wrong environment, and an end that does not hang."""

import socket
from types import SimpleNamespace

import pytest
import torch

from utils.cli import InputError
from utils.distributed import join_world
from utils.testing import assert_refused, run_script

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 .* RANK and MASTER_ADDR and MASTER_PORT is not there"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not there"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two'; expected a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment is '0'; expected a whole number of at least 1"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK is 2 in the environment, but WORLD_SIZE is 2",
        ),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE in the environment is '-2'; expected a whole number"),
        ({"RANK": "x"}, "RANK in the environment is 'x'"),
    ],
)
def test_a_left_over_environment_is_one_line(monkeypatch, env, message):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), join_world():
        pass


def test_a_worker_whose_launcher_ended_before_it_was_ready(monkeypatch):
    for name, value in zip(VARIABLES, ("2", "0", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NPP_LAUNCHER", "1")
    monkeypatch.setattr("utils.distributed.ctypes.CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    with pytest.raises(InputError, match="launcher of this process has ended"), join_world():
        pass


@pytest.mark.parametrize("size", ["", "1"])
def test_one_process(monkeypatch, tmp_path, size):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with join_world() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        world.barrier()
        world.check_shared(tmp_path / "not made")
        assert world.from_main(lambda: 3) == 3 and world.sum(torch.tensor(2)) == 2 and world.share(5) == slice(0, 5)
    assert not list(tmp_path.iterdir())


SHARED = """
import os, signal, sys, time
from pathlib import Path
import torch
from utils import cli
from utils.distributed import join_world

def wrong():
    raise cli.InputError("the first process says no")

def main():
    folder = Path(sys.argv[1])
    with join_world() as world:
        world.check_shared(folder / "ours")
        assert world.sum(torch.tensor(world.rank + 1.0)) == 3
        assert world.from_main(lambda: world.rank) == 0
        time.sleep(world.rank)
        (folder / f"before-{world.rank}").touch()
        world.barrier()
        assert (folder / "before-0").is_file() and (folder / "before-1").is_file()
        for check in (lambda: world.from_main(wrong), lambda: world.check_shared(folder / str(world.rank))):
            try:
                check()
            except cli.InputError as error:
                with open(folder / f"said-{world.rank}", "a") as file:
                    file.write(f"{error}\\n")
        if sys.argv[2:] == ["wrong"] and world.rank == 1:
            raise cli.InputError("only the second process is wrong")
        if sys.argv[2:] == [f"hang {world.rank}"]:
            os.kill(os.getpid(), signal.SIGSTOP)
    raise AssertionError("after the block only one process continues")

cli.run(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "shared.py"
    path.write_text(SHARED)
    return path


def test_two_processes_share_results_errors_and_a_folder(script, tmp_path):
    result = run_script(script, tmp_path, processes=2, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    said = [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0][0] == said[1][0] == "the first process says no"
    assert all("is another folder for 1 of 2 processes" in lines[1] for lines in said)
    assert not list((tmp_path / "ours").iterdir())


def test_one_that_is_wrong_ends_both_with_its_line(script, tmp_path):
    """The first waits for it at the end of the block, without a time limit of its own."""
    result = run_script(script, tmp_path, "wrong", processes=2, OMP_NUM_THREADS="1")
    assert_refused(result, "only the second process is wrong")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_hangs_ends_the_run_and_is_named(script, tmp_path, rank):
    """A stopped process takes part in nothing, and does not end by itself."""
    result = run_script(
        script, tmp_path, f"hang {rank}", processes=2, OMP_NUM_THREADS="1", timeout=120, NPP_TIMEOUT="5"
    )
    assert result.returncode == 1
    assert (
        f"error: process {rank} of 2 (on {socket.gethostname()}) has ended or hangs: no sign of life for 5 s"
        in result.stderr
    )


@pytest.mark.slow
def test_many_runs_end(script, tmp_path):
    """The end once hung, rarely, in the destructor of gloo's group."""
    for _ in range(10):
        (tmp_path / "said-0").unlink(missing_ok=True)
        assert run_script(script, tmp_path, processes=2, OMP_NUM_THREADS="1").returncode == 0
