"""A user's mistake is one line and exit status 2."""

import os
import subprocess
import sys

import pytest

from utils import cli
from utils.testing import ROOT


def refusal(capsys, call) -> str:
    """What a call that ends the process with status 2 printed to stderr; nothing went to stdout."""
    with pytest.raises(SystemExit) as exit:
        call()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    return err


def test_fail_prints_one_line(capsys):
    assert (
        refusal(capsys, lambda: cli.fail("no such\n  thing:\tgive another")) == "error: no such thing: give another\n"
    )


def test_a_note_comes_from_the_first_process_only(capsys, monkeypatch):
    cli.note("loaded")
    monkeypatch.setenv("RANK", "1")
    cli.note("loaded")
    assert capsys.readouterr() == ("", "loaded\n")


def test_input_errors_become_one_line_and_bugs_keep_their_traceback(capsys):
    def mistake():
        raise cli.InputError("there is no x")

    def bug():
        raise ValueError("not the user's fault")

    assert refusal(capsys, lambda: cli.run(mistake)) == "error: there is no x\n"
    with pytest.raises(ValueError, match="not the user's fault"):
        cli.run(bug)


def test_ctrl_c_is_status_130_without_a_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        cli.run(interrupted)
    assert exit.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--epoch", "1", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_arguments_are_one_line_that_points_to_help(capsys, monkeypatch, arguments, line):
    monkeypatch.setattr("sys.argv", ["some/train.py"])
    parser = cli.Parser("Trains.")
    parser.add_argument("--epochs", type=int, default=300, help="passes over the data")
    assert refusal(capsys, lambda: parser.parse_args(arguments)) == f"error: {line} (see train.py --help)\n"
    assert "passes over the data (default: 300)" in parser.format_help()


def test_another_process_of_the_machine_lets_the_first_speak(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    assert refusal(capsys, lambda: cli.fail("no")) == "error: no\n"
    assert waited and waited[0] > 1


@pytest.mark.parametrize(
    ("ending", "status", "err"),
    [
        ("pass", 0, ""),
        ("raise SystemExit('stopped')", 1, "stopped\n"),
        ("raise cli.InputError('there is no x')", 2, "error: there is no x\n"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug\n"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_without_the_interpreters_farewell(ending, status, err, processes):
    """Where gloo's threads could abort it; its output and its other threads' work are not lost."""
    code = f"""
import atexit, threading, time
from utils import cli

def late():
    time.sleep(0.2)
    print("copied")

def main():
    atexit.register(print, "farewell")
    threading.Thread(target=late).start()
    {ending}

cli.run(main)
"""
    environment = {**os.environ, "WORLD_SIZE": str(processes)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (status, "copied\nfarewell\n" if processes == 1 else "copied\n")
    assert result.stderr.endswith(err)
