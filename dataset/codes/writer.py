"""Writes codes, whole shards at a time."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO

import numpy as np

from dataset.codes.manifest import Manifest, Place, SkippedImage, load_array, read_manifest, shard_digest
from utils.cli import InputError
from utils.files import atomic_path, check_space, remove_remains
from utils.records import Record

BLOCK = 4096  # bytes a small file takes on disk


class ShardRecord(Record):
    """What is known of a finished shard: its hash, "" for one of format 1, the images without codes, its largest code."""

    sha256: str
    skipped: list[SkippedImage]
    max: int | None = None


class Writer:
    """Writes codes shard by shard, from any number of processes; finish() comes last, once.

    A shard is complete when its files have the bytes that were recorded after them, so a run that was killed at any moment
    is completed by the same calls. before: the manifest of finished work. Raises InputError if the place holds codes of
    other settings or something else, and OSError for a file that cannot be written.
    """

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place, self.manifest = place, manifest
        self._checked: set[int] = set()
        self.before, begun = read_manifest(place.manifest), read_manifest(place.unfinished)
        for known in (begun, self.before):
            if known and (different := known.differences(manifest)):
                raise InputError(
                    f"{place.codes} holds codes of other settings ({'; '.join(different)}): "
                    "give another folder, or delete that one and its manifest"
                )
        if not (begun or self.before) and any(path.name[0] != "." for path in place.codes.glob("*.npy")):
            raise InputError(f"{place.codes} holds files of something else (there is no manifest): give another folder")

    def start(self) -> None:
        """Record the settings, so that a later run can tell whether it resumes this one; remove what a kill left."""
        self.manifest.write(self.place.unfinished)
        for folder in (self.place.codes, self.place.labels, self.place.records):
            remove_remains(folder)
        for path in (self.place.manifest, self.place.unfinished):
            remove_remains(self.place.root, path)

    @property
    def finished(self) -> bool:
        """Whether the manifest is written, and every shard is as it says."""
        return not self.under_way and all(map(self.has, self.manifest.own_shards))

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
        try:
            digest = shard_digest(self.place, self.manifest.layout, self._numbers(shard, record.skipped))
        except OSError:
            return False
        if record.sha256 in ("", digest):
            self._checked.add(shard)
        return shard in self._checked

    def check_space(self, shards: int) -> None:
        """Raise InputError if so many shards do not fit on the disk."""
        m = self.manifest
        image = m.views * m.tokens * m.dtype.itemsize
        image = -(-(image + 128) // BLOCK) * BLOCK + BLOCK if m.layout == "per-image" else image + 8
        check_space(self.place.root, image * min(m.images, shards * m.shard_size))

    def write(
        self, shard: int, codes_NVL: np.ndarray, labels_N: np.ndarray, skipped: Sequence[SkippedImage] = ()
    ) -> None:
        """Write the codes (n, views, tokens) and labels (n,) of a shard's images without those skipped; its record last."""
        m = self.manifest
        numbers = self._numbers(shard, skipped)
        expected = (len(m.rows(shard)) - len(skipped), m.views, m.tokens)
        if codes_NVL.shape != expected or labels_N.shape != expected[:1]:
            raise ValueError(f"shard {shard}: expected {expected}, got {codes_NVL.shape} and labels {labels_N.shape}")
        largest = int(codes_NVL.max()) if codes_NVL.size else -1
        codes_NVL, labels_N = codes_NVL.astype(m.dtype, copy=False), labels_N.astype(np.int64, copy=False)
        step = len(codes_NVL) if m.layout == "packed" else 1
        for i, number in enumerate(numbers):
            rows = slice(i * step, (i + 1) * step)
            self._save(number, codes_NVL[rows], labels_N[rows])
        for gap in skipped if m.layout == "per-image" else ():  # of another try, when the image could be read
            for path in self.place.files(gap["image"], m.layout):
                path.unlink(missing_ok=True)
        record = ShardRecord(sha256=shard_digest(self.place, m.layout, numbers), skipped=list(skipped), max=largest)
        record.write(self.place.records / f"{shard:05d}.json")
        self._checked.add(shard)

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes and labels of a finished shard as they lie on the disk. Raises InputError for a damaged file."""
        numbers = self._numbers(shard, self._finished(shard).skipped)
        m = self.manifest
        if not numbers:
            return np.empty((0, m.views, m.tokens), m.dtype), np.empty(0, np.int64)
        pairs = [[load_array(path) for path in self.place.files(number, m.layout)] for number in numbers]
        codes, labels = zip(*pairs, strict=True)
        return np.concatenate(codes), np.concatenate(labels)

    def finish(self) -> Manifest:
        """Write the manifest, which is returned: the codes are complete.

        Raises InputError if a shard was not written, or if no image has codes.
        """
        m = self.manifest
        records = {shard: self._finished(shard) for shard in m.own_shards}
        skipped = [row for record in records.values() for row in record.skipped]
        if len(skipped) == m.images:
            raise InputError(
                f"none of the {m.images} images can be read; {skipped[0]['path']}: {skipped[0]['reason']}. "
                f"Mend them, delete {self.place.records}, and run this again"
            )
        hashes, largest = [""] * m.shards, [-1] * m.shards
        for shard, record in records.items():
            numbers = self._numbers(shard, record.skipped)
            hashes[shard] = record.sha256 or shard_digest(self.place, m.layout, numbers)
            largest[shard] = record.max
        self.before = m.changed(shards_sha256=hashes, skipped=skipped, shards_max=[] if None in largest else largest)
        self.before.write(self.place.manifest)
        shutil.rmtree(self.place.records, ignore_errors=True)
        self.place.unfinished.unlink(missing_ok=True)
        return self.before

    def _numbers(self, shard: int, skipped: Sequence[SkippedImage]) -> list[int]:
        """The numbers of a shard's files: its own, or its images'."""
        if self.manifest.layout == "packed":
            return [shard]
        gaps = {row["image"] for row in skipped}
        return [i for i in self.manifest.rows(shard) if i not in gaps]

    def _finished(self, shard: int) -> ShardRecord:
        record = self._record(shard)
        if record is None:
            raise InputError(
                f"shard {shard} of {self.place.codes} was not written, or into another folder: let all processes share "
                f"{self.place.root}, and run the same command again"
            )
        return record

    def _record(self, shard: int) -> ShardRecord | None:
        """Of this or a killed run, else of a finished one; a damaged record counts as none."""
        with suppress(InputError):
            return ShardRecord.read(self.place.records / f"{shard:05d}.json")
        before = self.before
        if before is None:
            return None
        sha256, largest = dict(enumerate(before.shards_sha256)), dict(enumerate(before.shards_max))
        return ShardRecord(sha256=sha256.get(shard, ""), skipped=before.gaps(shard), max=largest.get(shard))

    def _save(self, number: int, codes: np.ndarray, labels: np.ndarray) -> None:
        layout = self.manifest.layout
        for path, array in zip(self.place.files(number, layout), (codes, labels), strict=True):
            content = BytesIO()  # written by Python, because numpy does not notice that a small file did not fit
            np.save(content, array)
            with atomic_path(path, sync=layout == "packed") as temporary:
                temporary.write_bytes(content.getbuffer())
