"""The launcher and the scripts: this clone's code from any folder, the right Python, exit statuses, one line for mistakes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import launch
from utils.testing import PATIENCE, ROOT, assert_refused, run_script, wait_for

SCRIPT = """
import os, sys
from pathlib import Path
import utils.cli
Path(sys.argv[2], os.environ.get("RANK", "none")).write_text(" ".join([*sys.argv[3:], utils.cli.__file__]))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def launch_here(script, *arguments: str, monkeypatch, **env: str) -> int:
    """Call the launcher in this process with only these of torchrun's variables; its exit status."""
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["utils/launch.py", str(script), *arguments])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    return exit.value.code


def test_one_process_runs_in_place(script, tmp_path, monkeypatch):
    """Also where another launcher's variables are left over."""
    status = launch_here(
        script, "3", str(tmp_path), "two words", monkeypatch=monkeypatch, NPROC_PER_NODE="1", WORLD_SIZE="4", RANK="1"
    )
    assert status == 3
    assert (tmp_path / "none").read_text() == f"two words {ROOT / 'utils' / 'cli.py'}"


def test_two_processes_their_modules_and_their_exit_status(script, tmp_path):
    """Another `utils` on PYTHONPATH does not win."""
    (tmp_path / "other" / "utils").mkdir(parents=True)
    (tmp_path / "other" / "utils" / "__init__.py").write_text("")
    result = run_script(script, 2, tmp_path, "--flag", processes=2, PYTHONPATH=str(tmp_path / "other"), WORLD_SIZE="7")
    assert result.returncode == 2, result.stderr
    written = [path.read_text() for path in (tmp_path / "0", tmp_path / "1") if path.is_file()]
    assert written and set(written) == {f"--flag {ROOT / 'utils' / 'cli.py'}"}  # the first to end stops the other


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (
            {"NPROC_PER_NODE": "gpu"},
            "NPROC_PER_NODE in the environment is 'gpu'; expected a whole number of at least 1: unset it, or give one",
        ),
        (
            {"NNODES": "0"},
            "NNODES in the environment is '0'; expected a whole number of at least 1: unset it, or give one",
        ),
        ({"NNODES": "2"}, "NNODES is 2, so NODE_RANK and MASTER_ADDR must be in the environment, as torchrun has it"),
        (
            {"NNODES": "2", "NODE_RANK": "0"},
            "NNODES is 2, so MASTER_ADDR must be in the environment, as torchrun has it",
        ),
    ],
)
def test_a_wrong_environment_is_refused(script, monkeypatch, capsys, env, line):
    assert launch_here(script, "0", monkeypatch=monkeypatch, **env) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_script_reads_paths_from_the_users_folder(tmp_path):
    """With another project's `utils` and `dataset` there and on PYTHONPATH, and without HOME."""
    for name in ("utils", "dataset"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "my images").mkdir()
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "NPROC_PER_NODE": "1"}
    for name in ("HOME", "NPP_PYTHON_SAID"):
        env.pop(name, None)
    command = ["bash", ROOT / "scripts/tokenizer/train_vq.sh", "--data-path", "my images", "--results-dir", "out"]
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert_refused(result, "my images")
    assert "there is no folder" not in result.stderr and result.stderr.count("using ") == 1


def environment(tmp_path: Path, root: Path, **env: str) -> str:
    """The Python that scripts/env.sh chooses in a clone at `root`."""
    (root / "scripts").mkdir(parents=True, exist_ok=True)
    (root / "scripts/env.sh").write_bytes((ROOT / "scripts/env.sh").read_bytes())
    command = f'set -euo pipefail; source \'{root}/scripts/env.sh\' 2> /dev/null; echo "$PYTHON"; echo "$PYTHONPATH"'
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    python, path = result.stdout.splitlines()
    assert path.split(":")[0] == str(root)
    return python


def test_the_environment_that_is_chosen(tmp_path):
    """A named Python, an active environment, the repository's own, conda's base, any; never one that is not there."""
    root = tmp_path / "a clone"
    pythons = {name: tmp_path / name / "bin" / "python" for name in ("active", "conda", "base", "a clone/.venv")}
    for python in pythons.values():
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
    base = {"CONDA_PREFIX": str(tmp_path / "base"), "CONDA_DEFAULT_ENV": "base"}
    conda = {"CONDA_PREFIX": str(tmp_path / "conda"), "CONDA_DEFAULT_ENV": "mine"}
    assert environment(tmp_path, root, **base, VIRTUAL_ENV=str(tmp_path / "active")) == str(pythons["active"])
    assert environment(tmp_path, root, **conda) == str(pythons["conda"])
    assert environment(tmp_path, root, **base) == str(pythons["a clone/.venv"])
    assert environment(tmp_path, root, **base, VIRTUAL_ENV=str(tmp_path / "gone")) == str(pythons["a clone/.venv"])
    assert environment(tmp_path, root, PYTHON="active/bin/python") == str(pythons["active"])  # relative, then a cd
    pythons["a clone/.venv"].unlink()
    assert environment(tmp_path, root, **base) == str(pythons["base"])
    assert environment(tmp_path, root) == "python3"


WAITING = """
import os, signal, sys, time
from pathlib import Path
from utils import cli
from utils.distributed import join_world
from utils.stop import stop_on_signals

def main():
    with join_world() as world, stop_on_signals(world.size) as stop:
        note = Path(sys.argv[1], f"worker-{world.rank}")
        note.with_suffix(".part").write_text(str(os.getpid()))
        note.with_suffix(".part").rename(note)
        deadline = time.monotonic() + 900
        while not stop.agreed() and time.monotonic() < deadline:
            time.sleep(0.02)
        Path(sys.argv[1], f"stopped-{world.rank}").write_text(stop.asked.name if stop.asked else "none")

cli.run(main)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def two_workers(tmp_path):
    """start(PREFIX...): a launcher in a session of its own with two workers that wait to be stopped, and their ids."""
    (tmp_path / "waiting.py").write_text(WAITING)
    started: list[subprocess.Popen] = []
    pids: list[int] = []

    def start(*prefix: str) -> tuple[subprocess.Popen, list[int]]:
        env = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*prefix, sys.executable, str(ROOT / "utils/launch.py"), "waiting.py", "."]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, **quiet))
        notes = [tmp_path / f"worker-{rank}" for rank in (0, 1)]
        wait_for("both workers have started", lambda: all(note.is_file() for note in notes), started[0])
        pids.extend(int(note.read_text()) for note in notes)
        return started[0], pids

    yield start
    for process in started:
        process.kill()
        process.wait()
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)


def test_a_closed_terminal_does_not_end_two_processes_under_nohup_and_a_stop_request_does(two_workers, tmp_path):
    launcher, workers = two_workers("nohup")
    os.killpg(launcher.pid, signal.SIGHUP)  # what the kernel does when the terminal goes
    time.sleep(1)
    assert launcher.poll() is None and all(map(alive, workers))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(PATIENCE) == 0
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2


def test_a_closed_terminal_stops_two_processes_in_good_order(two_workers, tmp_path):
    launcher, _ = two_workers()
    os.killpg(launcher.pid, signal.SIGHUP)
    assert launcher.wait(PATIENCE) == 0
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["SIGHUP"] * 2


def test_workers_end_when_their_launcher_is_killed(two_workers):
    launcher, workers = two_workers()
    launcher.kill()
    launcher.wait()
    wait_for("both workers have ended", lambda: not any(map(alive, workers)))


def test_the_launcher_ends_when_a_worker_is_killed(two_workers):
    launcher, workers = two_workers()
    os.kill(workers[1], signal.SIGKILL)
    assert launcher.wait(PATIENCE) == 128 + signal.SIGKILL
    assert not any(map(alive, workers))
