"""Runs stages one after the other: what is done stays done; what is asked to end saves, ends, and resumes next time."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.cli import InputError
from utils.records import Record
from utils.runs import RunRecord
from utils.stop import stop_signals


@dataclass(frozen=True)
class Stage:
    """A command. run_folder: gives the folder of a training, or None.

    Its record says whether an end with status 0 was the end of the training: one that is asked to stop saves, and ends with
    status 0, too.
    """

    name: str
    command: Sequence[str]
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
        self.asked: int | None = None
        self.child: subprocess.Popen | None = None

    def __enter__(self) -> "Runner":
        self.former = {number: signal.signal(number, self._ask) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = self.asked or number
        if self.child:
            self.child.terminate()

    def _end_if_asked(self) -> None:
        if self.asked:
            print("stopped; the same command continues", file=sys.stderr, flush=True)
            raise SystemExit(128 + self.asked)

    def _mark(self, name: str) -> Mark | None:
        """The mark of a stage; a damaged one is none."""
        with suppress(InputError):
            return Mark.read(self.done / f"{name}.json")
        return None

    def took(self, names: Iterable[str]) -> dict[str, float]:
        """Seconds of each of these stages that is done."""
        return {name: mark.seconds for name in names if (mark := self._mark(name))}

    def run(self, stage: Stage) -> None:
        """Run a stage, unless it and all before it have succeeded with the commands that they have now.

        Raises SystemExit where it fails, with its status, or where this process is asked to end.
        """
        self._end_if_asked()
        commands = "\0".join([self.digest, *stage.command])
        self.digest = hashlib.sha256(commands.encode(errors="surrogateescape")).hexdigest()
        known = self._mark(stage.name)
        if known and known.commands == self.digest:
            print(f"== {stage.name}: done before", flush=True)
            return
        print(f"== {stage.name}: {' '.join(stage.command)}", flush=True)
        start = time.monotonic()
        # In a session of its own, so that Ctrl-C reaches it by way of this process only.
        self.child = subprocess.Popen(stage.command, cwd=self.cwd, stdin=subprocess.DEVNULL, start_new_session=True)
        if self.asked:  # while it was being started
            self.child.terminate()
        status = self.child.wait()
        self._end_if_asked()
        if status:
            status = status if status > 0 else 128 - status  # of a signal, as shells have it
            print(f"{stage.name} ended with status {status}; the same command begins there again", file=sys.stderr)
            raise SystemExit(status)
        if stage.unfinished():
            print(f"{stage.name} was stopped before its end; the same command continues", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
        Mark(seconds=round(time.monotonic() - start, 1), commands=self.digest).write(self.done / f"{stage.name}.json")
