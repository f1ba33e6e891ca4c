"""Run folders: `RESULTS/000-NAME/` with run.json, log.txt, metrics.jsonl and checkpoints/; the same command continues
the newest run."""

import fcntl
import json
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from utils import checkpoint
from utils.cli import InputError
from utils.files import write_json
from utils.log import RunLog


@dataclass
class Run:
    """A run's folder, held by this process: no other one opens it. `changed` says what is new in a continued one's
    arguments, `finished` whether nothing is left to do."""

    folder: Path
    id: str = ""
    finished: bool = False
    changed: list[str] = field(default_factory=list)
    _lock: TextIO | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints, newest first."""
        return numbered(self.folder / "checkpoints")

    def finish(self) -> None:
        """Mark the run as done."""
        record = json.loads((self.folder / "run.json").read_text())
        write_json(self.folder / "run.json", {**record, "finished": True})


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    return sorted(folder.glob("[0-9]*.pt"), key=lambda path: int(path.stem), reverse=True)


class Keeper:
    """Writes a run's checkpoints, copies them to a second folder and drops old ones.

    keep_last: the newest so many stay (0: all), and those of the steps in `kept`. cloud: a folder of this run alone where
    copies go, in the background; what goes wrong there is a line in the log.
    """

    def __init__(
        self, folder: Path, log: RunLog, keep_last: int = 0, kept: Collection[int] = (), cloud: Path | None = None
    ) -> None:
        self.folder, self.log, self.cloud = folder / "checkpoints", log, cloud
        self.keep_last, self.kept = keep_last, kept
        self._wanted: queue.Queue[Path] = queue.Queue()
        self._uncopied: set[Path] = set()
        self._worker: threading.Thread | None = None

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write {step:07d}.pt, ask for its copy, and drop what need not be kept."""
        path = self.folder / f"{step:07d}.pt"
        checkpoint.save(path, content)
        self.log.line(f"saved {path}")
        if self.cloud:
            self.copy(path)
        self._drop(path)
        return path

    def copy(self, path: Path) -> None:
        """Ask for a copy of a checkpoint in the cloud folder, unless this run has left one of its size there."""
        if self._worker is None:  # a daemon: a mount that hangs must not keep a pre-empted run from ending
            self._worker = threading.Thread(target=self._work, daemon=True)
            self._worker.start()
        self._uncopied.add(path)
        self._wanted.put(path)

    def close(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Wait for the copies, as long as go_on() is true; those that are not made are made when the run is opened again."""
        if self._uncopied:
            self.log.line(f"waiting for copies to {self.cloud}")
        while self._wanted.unfinished_tasks and go_on():
            time.sleep(0.05)

    def _drop(self, newest: Path) -> None:
        if not self.keep_last:
            return
        others = [path for path in numbered(self.folder) if int(path.stem) not in self.kept]
        for path in others[self.keep_last :]:
            if path not in self._uncopied and path != newest:
                path.unlink(missing_ok=True)

    def _work(self) -> None:
        while True:
            path = self._wanted.get()
            target = self.cloud / "checkpoints" / path.name
            part = target.with_suffix(".part")
            try:
                if not (target.is_file() and target.stat().st_size == path.stat().st_size):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, part)
                    part.replace(target)
            except OSError as error:
                self.log.line(f"warning: no copy of {path.name} in {self.cloud} ({error}); the local file is whole")
            finally:
                self._uncopied.discard(path)
                self._wanted.task_done()


def open_run(
    results: Path, name: str, args: Mapping[str, Any], fixed: Collection[str] = (), fresh: bool = False
) -> Run:
    """The run that these arguments (plain data) continue, or a new folder: RESULTS/000-NAME.

    Two runs are the same if the arguments named in `fixed` are equal. The newest such run is continued; if there is none
    and the newest run of this name is unfinished, InputError says what differs. fresh: a new folder in any case.
    Raises InputError, too, if another process holds the run.
    """
    numbered = sorted(results.glob(f"[0-9][0-9][0-9]*-{name}"), key=lambda path: int(path.name.partition("-")[0]))
    known = [(folder, _record(folder)) for folder in reversed(numbered) if (folder / "run.json").is_file()]
    if not fresh:
        for folder, record in known:
            if not _changes(record["args"], args, fixed):
                lock = _hold(folder)
                if lock is None:
                    raise InputError(
                        f"{folder} is being trained by another process; wait for it, or start another run with --fresh"
                    )
                for remains in (folder / "checkpoints").glob(".*.part.*"):  # of a save that was killed
                    remains.unlink()
                finished, changed = record.get("finished", False), _changes(record["args"], args)
                return Run(folder, record.get("id", ""), finished, changed, lock)
        if known and not known[0][1].get("finished", False):
            folder, record = known[0]
            lock = _hold(folder)
            if lock is not None:
                lock.close()
                raise InputError(
                    f"{folder} is unfinished and was started with {', '.join(_changes(record['args'], args, fixed))}: "
                    "give it the old values to continue it, or --fresh to start another run"
                )
    while True:
        number = 1 + max((int(path.name.partition("-")[0]) for path in results.glob("[0-9][0-9][0-9]*-*")), default=-1)
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run was quicker
            continue
    lock, run_id = _hold(folder), uuid.uuid4().hex[:8]  # held before run.json makes it a run
    write_json(folder / "run.json", {"id": run_id, "args": dict(args), "finished": False})
    return Run(folder, run_id, _lock=lock)


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "run.json").read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / 'run.json'} is damaged ({error}): delete the folder or mend it") from None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], names: Collection[str] | None = None) -> list[str]:
    """What differs: `lr 0.0001, now 0.0002`. An argument that an older version did not have is left out."""
    names = new.keys() if names is None else names
    return [f"{key} {old[key]}, now {new[key]}" for key in new if key in names and key in old and old[key] != new[key]]


def _hold(folder: Path) -> TextIO | None:
    """Lock a run's folder for as long as this process lives; None if another process has it."""
    file = open(folder / "lock", "a")  # noqa: SIM115 (held for the life of the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
