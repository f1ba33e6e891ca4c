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
from utils.files import HOST
from utils.log import RunLog
from utils.runs import CheckpointManager, RunRecord, checkpoints_of, open_run
from utils.testing import PATIENCE, ROOT

ARGS = {"lr": 1e-4, "betas": [0.9, 0.95], "epochs": 300, "log_every": 10}
FREE = ("log_every",)


def content(step: int) -> dict:
    return {"model": {"w": torch.full((2,), float(step))}, "steps": step}


def opened(results, args=ARGS, name="GPT-B", **options):
    """A run that was opened and let go of, as by a process that has ended."""
    run = open_run(results, name, args, FREE, **options)
    run._lock.close()
    return run


def test_a_new_run(tmp_path):
    run = opened(tmp_path / "results")
    assert run.folder == tmp_path / "results" / "000-GPT-B"
    assert (checkpoints_of(run.folder), run.finished, run.notes) == ([], False, [])
    first = json.loads((run.folder / "run.json").read_text())
    assert first == {"id": run.record.id, "args": ARGS, "finished": False} and first["id"]
    assert opened(tmp_path / "results").record.id == first["id"]
    assert opened(tmp_path / "results", fresh=True).record.id != first["id"]


def test_the_same_arguments_continue_from_the_newest_checkpoint(tmp_path):
    first = opened(tmp_path)
    manager = CheckpointManager(first.folder, RunLog(first.folder))
    saved = [manager.save(step, content(step)) for step in (5, 10, 9_999_999, 10_000_000)]
    remains = saved[0].parent / f".10000001.{HOST}-{2**22 + 1}.part.pt"  # no process has this number
    remains.write_text("left by a killed run")
    for name in ("0000020-best.pt", "best.pt", ".0000030.pt", "0000040.damaged"):
        (saved[0].parent / name).touch()
    again = opened(tmp_path)
    assert (again.folder, checkpoints_of(again.folder), again.finished) == (first.folder, saved[::-1], False)
    assert not remains.exists()
    assert checkpoint.load(saved[-1])["steps"] == 10_000_000
    again.finish()
    assert opened(tmp_path).finished


def test_arguments_that_may_change_are_named(tmp_path):
    opened(tmp_path)
    run = opened(tmp_path, ARGS | {"log_every": 20, "a_new_flag": True})
    assert run.folder.name == "000-GPT-B"
    assert run.notes == ["changed since the run was started: log_every 10, now 20"]


def test_an_argument_that_an_older_version_did_not_record_had_its_default(tmp_path):
    opened(tmp_path)
    with pytest.raises(InputError, match=r"is unfinished .* z_loss 0.0, now 0.5: "):
        opened(tmp_path, ARGS | {"z_loss": 0.5}, defaults={"z_loss": 0.0})
    assert opened(tmp_path, ARGS | {"z_loss": 0.0}, defaults={"z_loss": 0.0}).folder.name == "000-GPT-B"


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


def test_folders_of_others_are_left_alone(tmp_path):
    for name in ("1007-GPT-B", "000_old-GPT-B", "x-GPT-B", "-GPT-B"):
        (tmp_path / name).mkdir()
    assert opened(tmp_path).folder.name == "1008-GPT-B"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"id": 1, "args": []}', '{"id": "a"}', "\x00" * 10, "[" * 100_000]
)
def test_a_damaged_record_is_one_line(tmp_path, text):
    (opened(tmp_path).folder / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json is damaged or not a record of this kind"):
        opened(tmp_path)


def test_a_longer_run_than_a_finished_one_says_that_it_starts_from_nothing(tmp_path):
    first = opened(tmp_path)
    path = CheckpointManager(first.folder, RunLog(first.folder)).save(5, content(5))
    first.finish()
    run = opened(tmp_path, ARGS | {"epochs": 400}, start_flag="--gpt-ckpt")
    assert run.folder.name == "001-GPT-B"
    assert "epochs 300, now 400: this run starts from nothing" in run.notes[0] and f"--gpt-ckpt {path}" in run.notes[0]


def test_a_run_in_a_folder_of_its_own(tmp_path):
    """Without a name: the same arguments continue it, others are refused, finished or not."""
    first = opened(tmp_path / "vq", name=None)
    assert first.folder == tmp_path / "vq" and opened(tmp_path / "vq", name=None).record == first.record
    for state in ("unfinished", "finished"):
        with pytest.raises(InputError, match=f"is {state} and was started with lr 0.0001, now 0.1: .* another folder"):
            opened(tmp_path / "vq", ARGS | {"lr": 0.1}, name=None)
        first.finish()
    assert RunRecord.read(tmp_path / "vq" / "run.json").finished


def test_results_behind_a_link_to_nothing(tmp_path):
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    with pytest.raises(InputError, match="is a link to nothing"):
        opened(tmp_path / "disk" / "results")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is no folder"):
        opened(tmp_path / "file" / "results")


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
run = open_run(Path({str(tmp_path)!r}), "GPT-B", {ARGS!r}, {FREE!r})
print("held", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"000-GPT-B is in use by process \d+ on .* since .*: wait"):
            opened(tmp_path)
        assert opened(tmp_path, ARGS | {"lr": 2e-4}).folder.name == "001-GPT-B"
        other.kill()
    assert opened(tmp_path).folder.name == "000-GPT-B"


def test_old_checkpoints_are_dropped_but_for_those_to_keep(tmp_path):
    manager = CheckpointManager(tmp_path, RunLog(tmp_path), keep_last=2, kept={10, 40})
    for step in range(5, 45, 5):
        manager.save(step, content(step))
    assert sorted(int(path.stem) for path in (tmp_path / "checkpoints").iterdir()) == [10, 30, 35, 40]


def test_checkpoints_are_copied_to_the_cloud(tmp_path):
    folder = tmp_path / "results" / "000-GPT-B"
    manager = CheckpointManager(folder, RunLog(folder), cloud=tmp_path / "cloud")
    paths = [manager.save(step, content(step)) for step in (5, 10)]
    manager.close()
    copies = sorted(path for path in (tmp_path / "cloud").rglob("*") if path.is_file())
    assert copies == [tmp_path / "cloud" / "checkpoints" / path.name for path in paths]
    assert [copy.read_bytes() for copy in copies] == [path.read_bytes() for path in paths]


def test_a_slow_cloud_neither_blocks_nor_loses_a_checkpoint(tmp_path, monkeypatch):
    """Training continues while the first copy hangs; what waits for its copy is not dropped before."""
    go, copy = threading.Event(), __import__("shutil").copyfile
    monkeypatch.setattr("utils.runs.shutil.copyfile", lambda *args: go.wait(PATIENCE) and copy(*args))
    manager = CheckpointManager(tmp_path / "run", RunLog(tmp_path / "run"), keep_last=1, cloud=tmp_path / "cloud")
    for step in (1, 2, 3):
        manager.save(step, content(step))
    assert not list((tmp_path / "cloud").rglob("*.pt"))
    go.set()
    manager.close()
    assert len(list((tmp_path / "cloud").rglob("*.pt"))) == 3
    manager.save(4, content(4))
    manager.close()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000004.pt"]


def test_waiting_for_copies_has_an_end(tmp_path, monkeypatch):
    """A mount that hangs does not hold a pre-empted run; what is not copied can be asked for again."""
    go, copy = threading.Event(), __import__("shutil").copyfile
    monkeypatch.setattr("utils.runs.shutil.copyfile", lambda *args: go.wait(PATIENCE) and copy(*args))
    manager = CheckpointManager(tmp_path / "run", RunLog(tmp_path / "run"), cloud=tmp_path / "cloud")
    path = manager.save(1, content(1))
    manager.close(deadline=0)
    assert not list((tmp_path / "cloud").rglob("*.pt"))
    go.set()
    later = CheckpointManager(tmp_path / "run", RunLog(tmp_path / "run"), cloud=tmp_path / "cloud")
    later.copy(path)
    later.close()
    assert next((tmp_path / "cloud").rglob("*.pt")).read_bytes() == path.read_bytes()


def test_a_cloud_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "cloud").write_text("a file, not a folder")
    manager = CheckpointManager(tmp_path / "run", RunLog(tmp_path / "run"), cloud=tmp_path / "cloud")
    path = manager.save(5, content(5))
    manager.close()
    assert checkpoint.load(path)["steps"] == 5
    warnings = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "warning:" in line]
    assert len(warnings) == 1 and "no copy of 0000005.pt" in warnings[0] and warnings[0].endswith("local file is whole")
    assert "warning: no copy of 0000005.pt" in capsys.readouterr().out
