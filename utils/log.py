"""What a run says: lines to the terminal and `log.txt`, numbers to `metrics.jsonl`, a progress bar with an ETA."""

import json
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.cli import InputError
from utils.files import atomic_path


def progress(items: Iterable | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on stderr; one line every half minute where stderr is a file, nothing where show is False."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(items, disable=not show, mininterval=interval, dynamic_ncols=True, **options)


def duration(seconds: float) -> str:
    """2:03, 1:02:03, or 2 d 3 h for what takes days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunLog:
    """Lines and metrics of a run in `folder`; silent (and writing nothing) where `active` is False.

    tensorboard: write metrics as events into folder/tensorboard too. Raises InputError where that is not installed.
    """

    def __init__(self, folder: str | Path, active: bool = True, tensorboard: bool = False) -> None:
        self.folder, self.active = Path(folder), active
        if active:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_writer() if active and tensorboard else None
        self._events = None

    def line(self, text: str) -> None:
        """Print a line (above any progress bar) and append it, with the time, to log.txt."""
        if self.active:
            tqdm.write(text)
            self.note(text)

    def note(self, text: str) -> None:
        """Append a line, with the time, to log.txt."""
        if self.active:
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, **values: Any) -> None:
        """Append one JSON object to metrics.jsonl; `step` is among the values."""
        if self.active:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")
        if self.active and self._writer:
            if self._events is None:  # from this step on, what a run that was cut off has written is void
                self._events = self._writer(self.folder / "tensorboard", purge_step=values["step"])
            for key in values.keys() - {"step"}:
                self._events.add_scalar(key, values[key], values["step"])
            self._events.flush()


def event_writer() -> type:
    """TensorBoard's writer. Raises InputError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, since it is optional and slow to import
    except ImportError:
        raise InputError("TensorBoard is not installed: pip install tensorboard, or leave --tensorboard out") from None
    return SummaryWriter


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl, in order; lines that are none, such as one cut short by a kill, are left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def forget_after(folder: str | Path, step: int) -> None:
    """Drop the metrics of steps that a continued run will do again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    with atomic_path(Path(folder) / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
