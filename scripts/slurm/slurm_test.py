"""The Slurm scripts, run as Slurm would by stand-ins for srun and scontrol: their variables, and when they requeue."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from utils.testing import PATIENCE, ROOT, wait_for

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do SLURM_NODEID=$i "$@" & tasks+=($!); done
trap 'asked=yes; kill -USR1 "${tasks[@]}"' USR1
status=0
for task in "${tasks[@]}"; do
    while :; do before=$asked; code=0; wait "$task" || code=$?; [ "$asked" != "$before" ] || break; done
    [ "$code" = 0 ] || status=$code
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then [ "$3" = "gpu[7-8]" ] && printf 'gpu7\\ngpu8\\n'; else echo "$*" >> requeued; fi
"""
STAGE = """#!/usr/bin/env bash
echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $*" > "task-$NODE_RANK"
trap 'kill $!; exit "$STOPPED"' USR1
if [ -n "$STOPPED" ]; then sleep 600 & touch "ready-$NODE_RANK"; wait; fi
exit "$ENDED"
"""


@pytest.fixture
def job(tmp_path):
    """job(STAGE, flags, stopped=, ended=): its exit status, whether it was requeued, and what the tasks were given.

    stopped: the status that the stage ends with when it gets a warning; without one none is sent, and it ends with `ended`.
    """
    shutil.copytree(ROOT / "scripts" / "slurm", tmp_path / "scripts" / "slurm")
    programs = {"bin/srun": SRUN, "bin/scontrol": SCONTROL}
    for name in ("train_c2i", "extract_codes_c2i", "sample_c2i"):
        programs[f"scripts/autoregressive/{name}.sh"] = STAGE
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(stage: str, *flags: str, stopped: int | None = None, ended: int = 0) -> tuple[int, bool, list[str]]:
        env = {
            **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "40007",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[7-8]", "SLURM_SUBMIT_DIR": str(tmp_path),
            "STOPPED": "" if stopped is None else str(stopped), "ENDED": str(ended),
        }  # fmt: skip
        for name in ("NPP_ROOT", "MASTER_PORT", "NODE_RANK"):
            env.pop(name, None)
        copy = tmp_path / "slurm_script"  # Slurm runs a copy from its spool folder
        shutil.copy(tmp_path / f"scripts/slurm/{stage}.sbatch", copy)
        with subprocess.Popen(["bash", copy, *flags], cwd=tmp_path, env=env) as process:
            if stopped is not None:
                wait_for("both run", lambda: all((tmp_path / f"ready-{i}").exists() for i in (0, 1)), process)
                process.send_signal(signal.SIGUSR1)
            status = process.wait(PATIENCE)
        tasks = [(tmp_path / f"task-{i}").read_text().rstrip("\n") for i in (0, 1)]
        requeued = tmp_path / "requeued"
        assert not requeued.exists() or requeued.read_text() == "requeue 40007\n"
        return status, requeued.exists(), tasks

    return run


@pytest.mark.parametrize("stage", ["train", "extract", "sample"])
def test_each_machine_is_told_its_place_and_a_finished_job_is_not_requeued(job, stage):
    tasks = [f"2 {rank} gpu7 20007 --flag two words" for rank in (0, 1)]
    assert job(stage, "--flag", "two words") == (0, False, tasks)


@pytest.mark.parametrize("status", [1, 2, 137])
def test_a_failure_is_the_jobs_and_is_not_requeued(job, status):
    assert job("train", ended=status)[:2] == (status, False)


@pytest.mark.parametrize(
    ("stage", "status", "requeued"),
    [("extract", 138, True), ("sample", 143, True), ("extract", 0, False), ("sample", 2, False)],
)
def test_a_warning_requeues_what_has_not_finished(job, stage, status, requeued):
    assert job(stage, stopped=status)[:2] == (0 if requeued else status, requeued)


@pytest.mark.parametrize("flags", [(), ("--results-dir", "my runs"), ("--results-dir=my runs",)])
@pytest.mark.parametrize("finished", [True, False])
def test_a_stopped_training_is_requeued_if_its_record_says_that_it_is_unfinished(job, tmp_path, flags, finished):
    """It has saved, and ended with status 0, as a finished one does."""
    record = tmp_path / ("my runs" if flags else "results") / "000-GPT-B" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"finished": finished}, indent=1))
    assert job("train", *flags, stopped=0)[:2] == (0, not finished)
