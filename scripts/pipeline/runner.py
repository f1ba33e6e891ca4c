"""Runs stages one after the other: what is done stays done; what is asked to end saves, ends, and resumes next time."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.cli import InputError
from utils.records import Record
from utils.runs import RunRecord
from utils.stop import stop_signals


@dataclass(frozen=True)
class Stage:
    """A command. command: gives it when the stage's turn has come, as it may name what an earlier one made.

    run_folder: gives the folder of a training, or None. Its record says whether an end with status 0 was the end of the
    training: one that is asked to stop saves, and ends with status 0, too.
    """

    name: str
    title: str
    command: Callable[[], Sequence[str]]
    run_folder: Callable[[], Path | None] = lambda: None

    def unfinished(self) -> bool:
        folder = self.run_folder()
        record = RunRecord.read_if_present(folder / "run.json") if folder else None
        return record is not None and not record.finished


class Mark(Record):
    """DONE/STAGE.json: the seconds that a stage took, and a digest of all commands up to it."""

    seconds: float
    commands: str


class Runner:
    """Runs stages and leaves a mark for each that has succeeded. Use as a context: it then listens to signals.

    A signal that asks to end goes to the stage as SIGTERM, is waited for, and ends this process with 128 and its number.
    """

    def __init__(self, done: Path, cwd: Path) -> None:
        """done: folder of the marks. cwd: where the commands run."""
        self.done, self.cwd, self.digest = done, cwd, ""
        self.asked: signal.Signals | None = None
        self.child: subprocess.Popen | None = None

    def __enter__(self) -> "Runner":
        self.former = {number: signal.signal(number, self._ask) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object = None) -> None:
        self.asked = self.asked or signal.Signals(number)
        self._pass_on()

    def _pass_on(self) -> None:
        if self.child:
            with suppress(ProcessLookupError):
                self.child.terminate()

    def _end_if_asked(self) -> None:
        if self.asked:
            print("stopped; the same command continues", file=sys.stderr, flush=True)
            raise SystemExit(128 + self.asked)

    def mark(self, name: str) -> Mark | None:
        """The mark of a stage; a damaged one is none."""
        with suppress(InputError):
            return Mark.read(self.done / f"{name}.json")
        return None

    def run(self, stage: Stage) -> None:
        """Run a stage, unless it and all before it have succeeded with the commands that they have now.

        Raises SystemExit where it fails, with its status, or where this process is asked to end.
        """
        self._end_if_asked()
        command = list(stage.command())
        self.digest = hashlib.sha256("\0".join([self.digest, *command]).encode(errors="surrogateescape")).hexdigest()
        known = self.mark(stage.name)
        if known and known.commands == self.digest:
            print(f"== {stage.name}: done before", flush=True)
            return
        print(f"== {stage.name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        status = self._call(command)
        self._end_if_asked()
        if status:
            print(f"{stage.name} ended with status {status}; the same command begins there again", file=sys.stderr)
            raise SystemExit(status)
        if stage.unfinished():
            print(f"{stage.name} was stopped before its end; the same command continues", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
        Mark(seconds=round(time.monotonic() - start, 1), commands=self.digest).write(self.done / f"{stage.name}.json")

    def _call(self, command: Sequence[str]) -> int:
        """The exit status of a command; 128 and the number for a signal, as shells have it.

        It is a process group of its own, so that Ctrl-C reaches it by way of this process only.
        """
        options = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
        self.child = subprocess.Popen(command, cwd=self.cwd, stdin=subprocess.DEVNULL, **options)
        try:
            if self.asked:  # while it was being started
                self._pass_on()
            status = self.child.wait()
        finally:
            self.child = None
        return status if status >= 0 else 128 - status
