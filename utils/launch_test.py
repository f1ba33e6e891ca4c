"""The launcher: the script's own arguments and exit status, and one line for a wrong environment."""

import pytest

from utils import launch
from utils.testing import run_script

SCRIPT = """
import os, sys
print("rank", os.environ.get("RANK", "none"), *sys.argv[1:])
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
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["utils/launch.py", str(script), *arguments])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    return exit.value.code


def test_one_process_runs_in_place(script, monkeypatch, capsys):
    assert launch_here(script, "3", "--flag", "two words", monkeypatch=monkeypatch, NPROC_PER_NODE="1") == 3
    assert capsys.readouterr().out == "rank none 3 --flag two words\n"


def test_two_processes_and_their_exit_status(script):
    result = run_script(script, 2, "--flag", processes=2)
    assert result.returncode == 2, result.stderr
    assert "rank 0 2 --flag" in result.stdout or "rank 1 2 --flag" in result.stdout


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (
            {"NPROC_PER_NODE": "gpu"},
            "NPROC_PER_NODE in the environment: expected a whole number of at least 1, got 'gpu'",
        ),
        ({"NNODES": "0"}, "NNODES in the environment: expected a whole number of at least 1, got 0"),
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
