"""Run folders: the same command continues, another one starts anew, a broken backup never stops a training."""

import json

import pytest
import torch

from utils import checkpoint
from utils.log import RunLog
from utils.runs import open_run

ARGS = {"lr": 1e-4, "betas": [0.9, 0.95], "epochs": 300, "data": "codes"}


def content(step: int) -> dict:
    return {"model": {"w": torch.full((2,), float(step))}, "steps": step}


def test_a_new_run(tmp_path):
    run = open_run(tmp_path / "results", "GPT-B", ARGS)
    assert run.folder == tmp_path / "results" / "000-GPT-B"
    assert (run.checkpoint, run.finished) == (None, False)
    assert json.loads((run.folder / "run.json").read_text()) == {"args": ARGS, "finished": False}


def test_the_same_arguments_continue_from_the_newest_checkpoint(tmp_path):
    first = open_run(tmp_path, "GPT-B", ARGS)
    assert open_run(tmp_path, "GPT-B", dict(ARGS)).checkpoint is None
    for step in (5, 10, 9_999_999):
        saved = first.save(step, content(step), RunLog(first.folder))
    (saved.parent / ".10000000.1.part.pt").write_text("left by a killed run")
    again = open_run(tmp_path, "GPT-B", dict(ARGS))
    assert (again.folder, again.checkpoint, again.finished) == (first.folder, saved, False)
    assert saved.name == "9999999.pt" and checkpoint.load(saved)["steps"] == 9_999_999
    again.finish()
    assert open_run(tmp_path, "GPT-B", dict(ARGS)).finished


@pytest.mark.parametrize("change", [{"lr": 2e-4}, {"new_flag": True}])
def test_other_arguments_start_a_new_run(tmp_path, change):
    first = open_run(tmp_path, "GPT-B", ARGS)
    first.save(5, content(5), RunLog(first.folder))
    other = open_run(tmp_path, "GPT-B", ARGS | change)
    assert (other.folder.name, other.checkpoint) == ("001-GPT-B", None)
    assert open_run(tmp_path, "GPT-B", ARGS).folder == first.folder


def test_another_model_and_fresh_start_a_new_run(tmp_path):
    open_run(tmp_path, "GPT-B", ARGS)
    assert open_run(tmp_path, "GPT-L", ARGS).folder.name == "001-GPT-L"
    fresh = open_run(tmp_path, "GPT-B", ARGS, fresh=True)
    assert fresh.folder.name == "002-GPT-B"
    assert open_run(tmp_path, "GPT-B", ARGS).folder == fresh.folder  # the newest of the two


def test_a_folder_without_run_json_is_left_alone(tmp_path):
    (tmp_path / "007-GPT-B").mkdir()
    assert open_run(tmp_path, "GPT-B", ARGS).folder.name == "008-GPT-B"


def test_checkpoints_are_copied_to_the_cloud(tmp_path):
    run = open_run(tmp_path / "results", "GPT-B", ARGS, cloud=tmp_path / "cloud")
    paths = [run.save(step, content(step), RunLog(run.folder)) for step in (5, 10)]
    run.finish()
    copies = sorted(path for path in (tmp_path / "cloud").rglob("*") if path.is_file())
    assert copies == [tmp_path / "cloud" / "000-GPT-B" / "checkpoints" / path.name for path in paths]
    assert [copy.read_bytes() for copy in copies] == [path.read_bytes() for path in paths]


def test_a_cloud_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "cloud").write_text("a file, not a folder")
    run = open_run(tmp_path / "results", "GPT-B", ARGS, cloud=tmp_path / "cloud")
    path = run.save(5, content(5), RunLog(run.folder))
    run.finish()
    assert checkpoint.load(path)["steps"] == 5
    warnings = [line for line in (run.folder / "log.txt").read_text().splitlines() if "warning:" in line]
    assert len(warnings) == 1 and "no copy of 0000005.pt" in warnings[0] and warnings[0].endswith("local file is whole")
    assert "warning: no copy of 0000005.pt" in capsys.readouterr().out
    assert json.loads((run.folder / "run.json").read_text())["finished"]
