"""Writes codes, whole shards at a time."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.codes.manifest import Manifest, Place, differences, load_array, read_manifest, shard_digest
from utils.cli import InputError
from utils.files import atomic_path, write_json

BLOCK = 4096  # bytes a small file takes on disk


class Record(NamedTuple):
    """What is known of a finished shard; no hash for one of format 1."""

    sha256: str
    skipped: list[dict[str, Any]]


class Writer:
    """Writes codes shard by shard, from any number of processes; finish() comes last, once.

    A shard is there when its files have the bytes that were recorded after them, so a run that was killed at any moment
    is completed by the same calls. Raises InputError if the place holds codes of other settings or something else, and
    for a file that cannot be written.
    """

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place, self.manifest = place, manifest
        self._checked: set[int] = set()
        self.before = read_manifest(place.manifest) if place.manifest.is_file() else None  # a finished run's
        begun = read_manifest(place.unfinished) if place.unfinished.is_file() else None
        for known in (begun, self.before):
            if known:
                different = differences(known, manifest)
                if different:
                    raise InputError(
                        f"{place.codes} holds codes of other settings ({'; '.join(different)}): "
                        "give another folder, or delete that one and its manifest"
                    )
        if not (begun or self.before) and place.codes.is_dir() and any(place.codes.iterdir()):
            raise InputError(f"{place.codes} holds files of something else (there is no manifest): give another folder")

    def start(self) -> None:
        """Record the settings, so that a later run can tell whether it continues this one; remove what a kill left."""
        try:
            write_json(self.place.unfinished, asdict(self.manifest))
        except OSError as error:
            raise InputError(f"cannot write to {self.place.root} ({error.strerror or error})") from None
        for folder in (self.place.codes, self.place.labels, self.place.records):
            _unlink(folder.glob(".*.part.*"))
        _unlink(self.place.root.glob(f".{self.place.name}.*.part.json"))

    @property
    def finished(self) -> bool:
        """Whether the manifest is written, and every shard is as it says."""
        return not self.under_way and all(map(self.has, range(self.manifest.shards)))

    @property
    def under_way(self) -> bool:
        """Whether finish() is still to be called, whatever shards there are."""
        return not self.place.manifest.is_file() or self.place.unfinished.is_file() or self.place.records.is_dir()

    def has(self, shard: int) -> bool:
        """Whether a shard is complete: its bytes have the recorded hash."""
        if shard in self._checked:
            return True
        record = self._record(shard)
        if record is None:
            return False
        numbers, layout = self._numbers(shard, record.skipped), self.manifest.layout
        try:
            if record.sha256:
                whole = shard_digest(self.place, layout, numbers) == record.sha256
            else:
                whole = all(path.is_file() for number in numbers for path in self.place.files(number, layout))
        except OSError:
            return False
        if whole:
            self._checked.add(shard)
        return whole

    def check_space(self, shards: int) -> None:
        """Raise InputError if so many shards do not fit on the disk."""
        m = self.manifest
        image = m.views * m.tokens * m.dtype.itemsize
        image = -(-(image + 128) // BLOCK) * BLOCK + BLOCK if m.layout == "per-image" else image + 8
        needed = image * min(m.images, shards * m.shard_size)
        folder = next(path for path in (self.place.root, *self.place.root.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{self.place.root} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: "
                "free some or give another folder"
            )

    def write(
        self, shard: int, codes_NVL: np.ndarray, labels_N: np.ndarray, skipped: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Write the codes (n, views, tokens) and labels (n,) of a shard's images without those skipped; its record last."""
        m = self.manifest
        numbers = self._numbers(shard, skipped)
        expected = (len(m.rows(shard)) - len(skipped), m.views, m.tokens)
        if codes_NVL.shape != expected or labels_N.shape != expected[:1]:
            raise ValueError(f"shard {shard}: expected {expected}, got {codes_NVL.shape} and labels {labels_N.shape}")
        codes_NVL, labels_N = codes_NVL.astype(m.dtype, copy=False), labels_N.astype(np.int64, copy=False)
        if m.layout == "packed":
            self._save(shard, codes_NVL, labels_N)
        else:
            for row, i in enumerate(numbers):
                self._save(i, codes_NVL[row : row + 1], labels_N[row : row + 1])
            for gap in skipped:  # of another try, when the image could be read
                _unlink(self.place.files(gap["image"], m.layout))
        record = Record(shard_digest(self.place, m.layout, numbers), list(skipped))
        try:
            write_json(self._record_path(shard), record._asdict())
        except OSError as error:
            raise InputError(f"cannot write {self._record_path(shard)} ({error.strerror or error})") from None
        self._checked.add(shard)

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes and labels of a finished shard as they lie on the disk. Raises InputError for a damaged file."""
        numbers = self._numbers(shard, self._record(shard).skipped)
        m = self.manifest
        if not numbers:
            return np.empty((0, m.views, m.tokens), m.dtype), np.empty(0, np.int64)
        pairs = [[load_array(path) for path in self.place.files(number, m.layout)] for number in numbers]
        codes, labels = zip(*pairs, strict=True)
        return np.concatenate(codes), np.concatenate(labels)

    def finish(self) -> Manifest:
        """Write the manifest, which is returned: the codes are complete. Every shard must be there.

        Raises InputError if no image has codes.
        """
        m = self.manifest
        hashes, skipped = [], []
        for shard in range(m.shards):
            record = self._record(shard)
            numbers = self._numbers(shard, record.skipped)
            hashes.append(record.sha256 or shard_digest(self.place, m.layout, numbers))
            skipped += record.skipped
        if len(skipped) == m.images:
            raise InputError(
                f"none of the {m.images} images can be read; {skipped[0]['path']}: {skipped[0]['reason']}. "
                f"Mend them, delete {self.place.records}, and run this again"
            )
        self.before = replace(m, shards_sha256=hashes, skipped=skipped)
        write_json(self.place.manifest, asdict(self.before))
        shutil.rmtree(self.place.records, ignore_errors=True)
        self.place.unfinished.unlink(missing_ok=True)
        return self.before

    def _numbers(self, shard: int, skipped: Sequence[dict[str, Any]]) -> list[int]:
        """The numbers of a shard's files: its own, or its images'."""
        if self.manifest.layout == "packed":
            return [shard]
        gaps = {row["image"] for row in skipped}
        return [i for i in self.manifest.rows(shard) if i not in gaps]

    def _record_path(self, shard: int) -> Path:
        return self.place.records / f"{shard:05d}.json"

    def _record(self, shard: int) -> Record | None:
        """Of this or a killed run, else of a finished one."""
        try:
            return Record(**json.loads(self._record_path(shard).read_text()))
        except (OSError, ValueError, TypeError):
            pass
        before, rows = self.before, self.manifest.rows(shard)
        if before is None:
            return None
        sha256 = dict(enumerate(before.shards_sha256)).get(shard, "")
        return Record(sha256, [row for row in before.skipped if row["image"] in rows])

    def _save(self, number: int, codes: np.ndarray, labels: np.ndarray) -> None:
        for path, array in zip(self.place.files(number, self.manifest.layout), (codes, labels), strict=True):
            try:
                with atomic_path(path) as temporary:
                    np.save(temporary, array)
            except OSError as error:  # numpy's own, of a full disk, has no strerror
                raise InputError(f"cannot write {path} ({error.strerror or error}); is the disk full?") from None


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
