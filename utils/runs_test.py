"""Run folders: the same command continues, another one is told what differs, checkpoints are kept, dropped and copied."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from utils import checkpoint
from utils.cli import InputError
from utils.log import RunLog
from utils.runs import Keeper, open_run
from utils.testing import ROOT

ARGS = {"lr": 1e-4, "betas": [0.9, 0.95], "epochs": 300, "log_every": 10}
FIXED = ("lr", "betas", "epochs")


def content(step: int) -> dict:
    return {"model": {"w": torch.full((2,), float(step))}, "steps": step}


def opened(results, args=ARGS, name="GPT-B", **options):
    """A run that was opened and let go of, as by a process that has ended."""
    run = open_run(results, name, args, FIXED, **options)
    run._lock.close()
    return run


def test_a_new_run(tmp_path):
    run = opened(tmp_path / "results")
    assert run.folder == tmp_path / "results" / "000-GPT-B"
    assert (run.checkpoints, run.finished, run.changed) == ([], False, [])
    assert json.loads((run.folder / "run.json").read_text()) == {"id": run.id, "args": ARGS, "finished": False}
    assert run.id and opened(tmp_path / "results").id == run.id != opened(tmp_path / "results", fresh=True).id


def test_the_same_arguments_continue_from_the_newest_checkpoint(tmp_path):
    first = opened(tmp_path)
    keeper = Keeper(first.folder, RunLog(first.folder))
    saved = [keeper.save(step, content(step)) for step in (5, 10, 9_999_999, 10_000_000)]
    remains = saved[0].parent / ".10000001.1.part.pt"
    remains.write_text("left by a killed run")
    again = opened(tmp_path)
    assert (again.folder, again.checkpoints, again.finished) == (first.folder, saved[::-1], False)
    assert not remains.exists()
    assert checkpoint.load(again.checkpoints[0])["steps"] == 10_000_000
    again.finish()
    assert opened(tmp_path).finished


def test_arguments_that_may_change_are_named(tmp_path):
    opened(tmp_path)
    run = opened(tmp_path, ARGS | {"log_every": 20, "a_new_flag": True})
    assert (run.folder.name, run.changed) == ("000-GPT-B", ["log_every 10, now 20"])


def test_arguments_that_matter_are_refused_until_the_run_is_finished(tmp_path):
    first = opened(tmp_path)
    with pytest.raises(InputError, match=r"000-GPT-B is unfinished .* lr 0.0001, now 0.0002: .* --fresh"):
        opened(tmp_path, ARGS | {"lr": 2e-4})
    assert len(list(tmp_path.iterdir())) == 1
    first.finish()
    other = opened(tmp_path, ARGS | {"lr": 2e-4})
    assert other.folder.name == "001-GPT-B"
    assert opened(tmp_path).finished  # the first one's arguments


def test_another_model_and_fresh_start_a_new_run(tmp_path):
    opened(tmp_path)
    assert opened(tmp_path, name="GPT-L").folder.name == "001-GPT-L"
    fresh = opened(tmp_path, fresh=True)
    assert fresh.folder.name == "002-GPT-B"
    assert opened(tmp_path).folder == fresh.folder  # the newest of the two


def test_a_folder_without_run_json_is_left_alone(tmp_path):
    (tmp_path / "1007-GPT-B").mkdir()
    assert opened(tmp_path).folder.name == "1008-GPT-B"


def test_two_runs_that_start_at_once_get_two_numbers(tmp_path, monkeypatch):
    """The second one's number is taken between its look and its mkdir."""
    mkdir, taken = Path.mkdir, []

    def slow(path, *args, **options):
        if path.name == "000-GPT-B" and not taken:
            taken.append(path)
            mkdir(path, parents=True)
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", slow)
    assert opened(tmp_path).folder.name == "001-GPT-B"


def test_a_run_that_another_process_trains_is_not_touched(tmp_path):
    code = f"""
from pathlib import Path
from utils.runs import open_run
run = open_run(Path({str(tmp_path)!r}), "GPT-B", {ARGS!r}, {FIXED!r})
print("held", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="000-GPT-B is being trained by another process"):
            opened(tmp_path)
        assert opened(tmp_path, ARGS | {"lr": 2e-4}).folder.name == "001-GPT-B"
        other.kill()
    assert opened(tmp_path).folder.name == "000-GPT-B"


def test_old_checkpoints_are_dropped_but_for_those_to_keep(tmp_path):
    keeper = Keeper(tmp_path, RunLog(tmp_path), keep_last=2, kept={10, 40})
    for step in range(5, 45, 5):
        keeper.save(step, content(step))
    assert sorted(int(path.stem) for path in (tmp_path / "checkpoints").iterdir()) == [10, 30, 35, 40]


def test_checkpoints_are_copied_to_the_cloud(tmp_path):
    folder = tmp_path / "results" / "000-GPT-B"
    keeper = Keeper(folder, RunLog(folder), cloud=tmp_path / "cloud")
    paths = [keeper.save(step, content(step)) for step in (5, 10)]
    keeper.close()
    copies = sorted(path for path in (tmp_path / "cloud").rglob("*") if path.is_file())
    assert copies == [tmp_path / "cloud" / "checkpoints" / path.name for path in paths]
    assert [copy.read_bytes() for copy in copies] == [path.read_bytes() for path in paths]


def test_a_slow_cloud_neither_blocks_nor_loses_a_checkpoint(tmp_path, monkeypatch):
    """Training goes on while the first copy hangs; what waits for its copy is not dropped before."""
    go, copy = threading.Event(), __import__("shutil").copyfile
    monkeypatch.setattr("utils.runs.shutil.copyfile", lambda *args: go.wait(10) and copy(*args))
    keeper = Keeper(tmp_path / "run", RunLog(tmp_path / "run"), keep_last=1, cloud=tmp_path / "cloud")
    for step in (1, 2, 3):
        keeper.save(step, content(step))
    assert not list((tmp_path / "cloud").rglob("*.pt"))
    go.set()
    keeper.close()
    assert len(list((tmp_path / "cloud").rglob("*.pt"))) == 3
    keeper.save(4, content(4))
    keeper.close()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000004.pt"]


def test_waiting_for_copies_has_an_end(tmp_path, monkeypatch):
    """A mount that hangs does not hold a pre-empted run; what is not copied can be asked for again."""
    go, copy = threading.Event(), __import__("shutil").copyfile
    monkeypatch.setattr("utils.runs.shutil.copyfile", lambda *args: go.wait(10) and copy(*args))
    keeper = Keeper(tmp_path / "run", RunLog(tmp_path / "run"), cloud=tmp_path / "cloud")
    path = keeper.save(1, content(1))
    keeper.close(lambda: False)
    assert not list((tmp_path / "cloud").rglob("*.pt"))
    go.set()
    later = Keeper(tmp_path / "run", RunLog(tmp_path / "run"), cloud=tmp_path / "cloud")
    later.copy(path)
    later.close()
    assert next((tmp_path / "cloud").rglob("*.pt")).read_bytes() == path.read_bytes()


def test_a_cloud_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "cloud").write_text("a file, not a folder")
    keeper = Keeper(tmp_path / "run", RunLog(tmp_path / "run"), cloud=tmp_path / "cloud")
    path = keeper.save(5, content(5))
    keeper.close()
    assert checkpoint.load(path)["steps"] == 5
    warnings = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "warning:" in line]
    assert len(warnings) == 1 and "no copy of 0000005.pt" in warnings[0] and warnings[0].endswith("local file is whole")
    assert "warning: no copy of 0000005.pt" in capsys.readouterr().out
