"""What a run says can be read again, also after a kill."""

import json
import math

from utils.log import RunLog, forget_after, progress, read_metrics


def test_metrics_round_trip(tmp_path):
    log = RunLog(tmp_path / "run")
    rows = [{"step": 1, "loss": 9.5}, {"step": 2, "loss": math.inf, "note": "ä\u2028"}]
    for row in rows:
        log.metrics(**row)
    assert read_metrics(tmp_path / "run") == rows
    RunLog(tmp_path / "run").metrics(step=3)
    assert read_metrics(tmp_path / "run") == [*rows, {"step": 3}]


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(step=1, loss=9.5)
    log.metrics(step=2, loss=9.25)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for size in range(len(json.dumps({"step": 1, "loss": 9.5})) + 1, len(whole) - 2):
        path.write_text(whole[:size])
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 9.5}]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "nowhere") == []


def test_lines_go_to_the_terminal_and_with_the_time_to_the_file(tmp_path, capsys):
    RunLog(tmp_path).line("saved a")
    RunLog(tmp_path).line("saved b")
    assert capsys.readouterr().out == "saved a\nsaved b\n"
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["saved a", "saved b"]


def test_processes_other_than_the_first_are_silent(tmp_path, capsys):
    log = RunLog(tmp_path / "run", active=False)
    log.line("saved")
    log.metrics(step=1)
    assert list(progress(range(3), show=False)) == [0, 1, 2]
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


def test_metrics_of_steps_that_will_be_done_again_are_dropped(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics(step=step, loss=1 / step)
    forget_after(tmp_path, 2)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    forget_after(tmp_path, 0)
    assert read_metrics(tmp_path) == []
