"""Stages: order, marks, failures, and requests to end."""

import os
import signal
import subprocess
import sys

import pytest

from scripts.pipeline.runner import Runner, Stage
from utils.testing import ROOT, wait_for

# A stage that waits for a request to end.
PROGRAM = """
import sys
from pathlib import Path
from scripts.pipeline.runner import Runner, Stage

here = Path(sys.argv[1])
script = "trap 'echo stopped >> asked; exit 0' TERM; touch waiting; for _ in $(seq 600); do sleep 0.1; done"
with Runner(here / "done", here) as runner:
    runner.run(Stage("waits", ["bash", "-c", script]))
"""


def stages(output: str) -> list[str]:
    """`one` for a stage that ran, `(one)` for one that was done before."""
    lines = [line.removeprefix("== ").split(": ", 1) for line in output.splitlines() if line.startswith("== ")]
    return [f"({name})" if what == "done before" else name for name, what in lines]


def test_it_resumes_at_the_stage_that_failed_and_repeats_what_changed(tmp_path, capfd):
    def run(first: str = "one") -> list[str]:
        scripts = {"one": f"# {first}", "two": "true", "three": "exit 3"}
        with Runner(tmp_path / "done", tmp_path) as runner, pytest.raises(SystemExit) as error:
            for name, script in scripts.items():
                runner.run(Stage(name, ["bash", "-c", script]))
        assert error.value.code == 3
        return stages(capfd.readouterr().out)

    assert run() == ["one", "two", "three"]
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == ["one.json", "two.json"]
    assert run() == ["(one)", "(two)", "three"]
    (tmp_path / "done" / "one.json").write_bytes(b"\0\xff")
    assert run() == ["one", "(two)", "three"]
    assert run("another") == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("number", "status", "env"),
    [
        (signal.SIGTERM, 143, {}), (signal.SIGHUP, 129, {}), (signal.SIGINT, 130, {}),
        (signal.SIGUSR1, 138, {"SLURM_JOB_ID": "1"}),
    ],
)  # fmt: skip
def test_a_request_to_end_reaches_the_stage_and_is_waited_for(tmp_path, number, status, env):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT), **env}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    wait_for("the stage waits", (tmp_path / "waiting").is_file, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == status, output
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "stopped"
    assert not (tmp_path / "done" / "waits.json").exists()
    assert "the same command continues" in output


def test_a_training_that_saved_and_ended_is_not_done(tmp_path, capsys):
    """A training that is itself sent SIGTERM saves and ends with status 0."""
    stage = Stage("train", ["true"], run_folder=lambda: tmp_path)
    for finished, done in (("false", False), ("true", True)):
        (tmp_path / "run.json").write_text(f'{{"id": "a", "args": {{}}, "finished": {finished}}}')
        with Runner(tmp_path / "done", tmp_path) as runner:
            if done:
                runner.run(stage)
            else:
                with pytest.raises(SystemExit) as error:
                    runner.run(stage)
                assert error.value.code == 143 and "the same command continues" in capsys.readouterr().err
            assert ("train" in runner.took(["train"])) == done


def test_a_stage_that_a_signal_ended_has_the_shells_status(tmp_path):
    with Runner(tmp_path / "done", tmp_path) as runner, pytest.raises(SystemExit) as error:
        runner.run(Stage("train", ["bash", "-c", "kill -KILL $$"]))
    assert error.value.code == 137 and not runner.took(["train"])
