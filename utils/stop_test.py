"""Signals ask, processes agree."""

import signal

import pytest

from utils.stop import StopRequest, stop_on_signals
from utils.testing import run_script


def test_a_signal_asks_and_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals(1) as stop:
        assert not stop.agreed()
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() and stop.exit_status() == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_ctrl_c_is_130_and_a_second_one_ends_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.stop.time.monotonic", lambda: now[0])
    stop = StopRequest(1)
    stop.ask(signal.SIGINT)
    stop.ask(signal.SIGINT)  # the same keystroke, by another way
    assert stop.exit_status() == 130
    now[0] += 3
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT)


def test_processes_agree_on_the_step_when_one_is_asked(tmp_path):
    """The second process is asked at its third step; both stop at one step, soon after."""
    script = tmp_path / "steps.py"
    script.write_text(f"""
import signal
from pathlib import Path
from utils import cli
from utils.distributed import join_world
from utils.stop import stop_on_signals

def main():
    with join_world() as world, stop_on_signals(world.size) as stop:
        for step in range(100):
            if world.rank == 1 and step == 3:
                signal.raise_signal(signal.SIGTERM)
            if stop.agreed():
                break
        Path({str(tmp_path)!r}, str(world.rank)).write_text(str(step))

cli.run(main)
""")
    result = run_script(script, processes=2, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "4"
