"""Run folders: run.json, log.txt, metrics.jsonl and checkpoints/. The same command continues the newest run.

GPTs are trained in numbered folders, RESULTS/000-NAME/; a tokenizer or classifier in one folder of its own.
"""

import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, TextIO

from utils import checkpoint
from utils.cli import InputError
from utils.files import check_folder, hold, remove_remains
from utils.log import RunLog
from utils.records import Record
from utils.settings import differences

CHECKPOINT = re.compile(r"\d{7,}\.pt")


class RunRecord(Record):
    """run.json: a run's name for its copies, its arguments as plain data, and whether nothing is left to do."""

    id: str
    args: dict[str, Any]
    finished: bool = False


@dataclass
class Run:
    """A run's folder, held by this process: no other one opens it. `notes` are lines for its log."""

    folder: Path
    record: RunRecord
    notes: list[str] = field(default_factory=list)
    _lock: TextIO | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return self.record.finished

    def finish(self) -> None:
        """Mark the run as done."""
        self.record = self.record.model_copy(update={"finished": True})
        self.record.write(self.folder / "run.json")

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock:
            self._lock.close()

    def __getstate__(self) -> dict[str, Any]:
        """The run as other processes get it: without the lock."""
        return {**vars(self), "_lock": None}


def open_run(
    results: Path,
    name: str | None,
    args: Mapping[str, Any],
    free: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    *,
    fresh: bool = False,
    start_flag: str = "",
) -> Run:
    """The run that these arguments (plain data) continue, or a new one, in RESULTS/000-NAME; in RESULTS without a name.

    Two runs are the same if their arguments agree but for those in `free`. The newest such run is continued. If there is
    none and the newest run of this name is unfinished, InputError says what differs. defaults: of arguments that older runs
    did not record. fresh: a new folder in any case. start_flag: the flag that starts a run from given weights, named where a
    longer run than a finished one is asked for.
    Raises InputError, too, if another process holds the run.
    """
    check_folder(results)
    if name is None:
        known = [(results, record)] if (record := RunRecord.read_if_present(results / "run.json")) else []
    else:
        known = [
            (folder, record)
            for folder in numbered_folders(results, name)
            if (record := RunRecord.read_if_present(folder / "run.json"))
        ]
    notes: list[str] = []
    defaults = {"precision": "float32", **defaults}  # recorded by all trainings since CPUs may take another
    for folder, record in known if not fresh else ():
        changed = differences(record.args, args, free, defaults)
        if not changed:
            lock = hold(folder / "lock", str(folder), "wait for it, or start another run with --fresh")
            remove_remains(folder)
            remove_remains(folder / "checkpoints")
            notes = [
                f"changed since the run was started: {text}"
                for text in differences(record.args, args, defaults=defaults)
            ]
            return Run(folder, RunRecord.read(folder / "run.json"), notes, lock)
    if known and not fresh:
        folder, record = known[0]
        changed = differences(record.args, args, free, defaults)
        if not record.finished or name is None:
            advice = "give it the old values to continue it, or --fresh to start another run"
            if name is None:
                advice = "give it the old values to continue it, or another folder"
            if any(text.startswith("precision ") for text in changed):
                advice += " (--mixed-precision fp32, bf16 or fp16: what auto is depends on the machine)"
            state = "finished" if record.finished else "unfinished"
            if not _held(folder) or name is None:
                raise InputError(f"{folder} is {state} and was started with {', '.join(changed[:4])}: {advice}")
        elif start_flag:
            newest = next(iter(checkpoints_of(folder)), None)
            notes.append(
                f"note: {folder} is finished and was trained with {', '.join(changed[:4])}: this run starts from nothing"
                + (f"; {start_flag} {newest} starts from its weights" if newest else "")
            )
    folder = results if name is None else _new_folder(results, name)
    lock = hold(folder / "lock", str(folder))  # held before run.json makes it a run
    record = RunRecord(id=uuid.uuid4().hex[:8], args=dict(args))
    record.write(folder / "run.json")
    return Run(folder, record, notes, lock)


def numbered_folders(results: Path, name: str | None = None) -> list[Path]:
    """The folders 000-NAME of results (of any name for None), newest first; others are passed over."""
    pattern = re.compile(r"(\d{3,})-" + (re.escape(name) if name else ".+"))
    found = [(int(m[1]), path) for path in results.glob("*-*") if (m := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _new_folder(results: Path, name: str) -> Path:
    while True:
        newest = next(iter(numbered_folders(results)), None)
        number = 1 + int(newest.name.partition("-")[0]) if newest else 0
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.exists():  # it is something else than a folder that another run has just made
                raise


def _held(folder: Path) -> bool:
    try:
        hold(folder / "lock", str(folder)).close()
    except InputError:
        return True
    return False


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; files of other names are passed over."""
    paths = [path for path in (folder / "checkpoints").glob("*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


class CheckpointManager:
    """Writes a run's checkpoints, copies them to a second folder, drops old ones and finds the newest whole one.

    keep_last: the newest so many stay (0: all), and those of the steps in `kept`. cloud: a folder of this run alone where
    copies go, in the background; what goes wrong there is a line in the log.
    """

    def __init__(
        self, folder: Path, log: RunLog, keep_last: int = 0, kept: Collection[int] = (), cloud: Path | None = None
    ) -> None:
        self.folder, self.log, self.cloud = folder, log, cloud
        self.keep_last, self.kept = keep_last, kept
        self._queue: SimpleQueue[Path] = SimpleQueue()
        self._uncopied: set[Path] = set()
        self._worker: threading.Thread | None = None

    def checkpoints(self) -> list[Path]:
        """The checkpoints, newest first."""
        return checkpoints_of(self.folder)

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write {step:07d}.pt, ask for its copy, and drop what need not be kept."""
        path = self.folder / "checkpoints" / f"{step:07d}.pt"
        checkpoint.save(path, content)
        self.log.line(f"saved {path}")
        if self.cloud:
            self.copy(path)
        self._drop(path)
        return path

    def newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its content; damaged newer ones are set aside.

        Raises InputError if there are checkpoints and none of them is whole.
        """
        damaged: list[tuple[Path, str]] = []
        for path in self.checkpoints():
            try:
                content = checkpoint.load(path, mmap=True)
            except InputError as error:
                damaged.append((path, str(error)))
                continue
            for other, error in damaged:  # it must not count as one of the newest
                self.log.line(f"warning: {error}; it is set aside")
                other.rename(other.with_suffix(".damaged"))
            return path, content
        if damaged:
            raise InputError(f"no checkpoint is whole: {damaged[0][1]}; or start another run with --fresh")
        return None

    def copy(self, path: Path) -> None:
        """Ask for a copy of a checkpoint in the cloud folder, unless this run has left one of its size there."""
        if self._worker is None:  # a daemon: a mount that hangs must not keep a pre-empted run from ending
            self._worker = threading.Thread(target=self._copy_queued, daemon=True)
            self._worker.start()
        self._uncopied.add(path)
        self._queue.put(path)

    def close(self, *, deadline: float | None = None, until: Callable[[], bool] = lambda: False) -> None:
        """Wait for the copies, `deadline` seconds at most and until until(); the next start makes those that are missing."""
        if self._uncopied:
            self.log.line(f"waiting for copies to {self.cloud}")
        start = time.monotonic()
        while self._uncopied and not until() and (deadline is None or time.monotonic() < start + deadline):
            time.sleep(0.05)

    def _drop(self, newest: Path) -> None:
        if not self.keep_last:
            return
        others = [path for path in self.checkpoints() if int(path.stem) not in self.kept]
        for path in others[self.keep_last :]:
            if path not in self._uncopied and path != newest:
                path.unlink(missing_ok=True)

    def _copy_queued(self) -> None:
        while True:
            path = self._queue.get()
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
