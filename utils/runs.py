"""Run folders: `RESULTS/000-NAME/` with run.json, log.txt, metrics.jsonl and checkpoints/; the same command continues
the newest unfinished run."""

import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import checkpoint
from utils.files import write_json
from utils.log import RunLog


@dataclass
class Run:
    """A run's folder. `checkpoint` is the newest one to continue from, `finished` whether nothing is left to do."""

    folder: Path
    checkpoint: Path | None = None
    finished: bool = False
    cloud: Path | None = None
    _copies: list[threading.Thread] = field(default_factory=list)

    def save(self, step: int, content: dict[str, Any], log: RunLog) -> Path:
        """Write checkpoints/{step:07d}.pt; with a cloud folder, copy it there in the background (failures are logged)."""
        path = self.folder / "checkpoints" / f"{step:07d}.pt"
        checkpoint.save(path, content)
        log.line(f"saved {path}")
        if self.cloud:
            copy = threading.Thread(target=self._copy, args=(path, log))
            copy.start()
            self._copies.append(copy)
        return path

    def finish(self) -> None:
        """Mark the run as done, once its copies are."""
        for copy in self._copies:
            copy.join()
        record = json.loads((self.folder / "run.json").read_text())
        write_json(self.folder / "run.json", {**record, "finished": True})

    def _copy(self, path: Path, log: RunLog) -> None:
        target = self.cloud / self.folder.name / "checkpoints" / path.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target.with_suffix(".part"))
            target.with_suffix(".part").replace(target)
        except OSError as error:
            log.line(f"warning: no copy of {path.name} in {self.cloud} ({error}); the local file is whole")


def open_run(results: Path, name: str, args: dict[str, Any], fresh: bool = False, cloud: Path | None = None) -> Run:
    """The newest run of this name and these arguments (plain data), or a new folder if there is none or fresh is set."""
    numbered = sorted(results.glob(f"[0-9][0-9][0-9]-{name}"))
    for folder in [] if fresh else reversed(numbered):
        record = folder / "run.json"
        content = json.loads(record.read_text()) if record.is_file() else {}
        if content.get("args") == args:
            checkpoints = sorted((folder / "checkpoints").glob("[0-9]*.pt"))
            return Run(folder, checkpoints[-1] if checkpoints else None, content.get("finished", False), cloud)
    number = 1 + max((int(path.name[:3]) for path in results.glob("[0-9][0-9][0-9]-*")), default=-1)
    folder = results / f"{number:03d}-{name}"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"args": args, "finished": False})
    return Run(folder, cloud=cloud)
