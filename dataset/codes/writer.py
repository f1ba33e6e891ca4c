"""Writes codes, whole shards at a time."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dataset.codes.manifest import Manifest, Place, differences, load_array, read_manifest
from utils.cli import InputError
from utils.files import atomic_path, write_json

BLOCK = 4096  # bytes a small file takes on disk


class Writer:
    """Writes codes shard by shard, each atomically, from any number of processes; finish() comes last, once.

    Raises InputError if the place holds codes of other settings, and for a file that cannot be written.
    """

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place, self.manifest = place, manifest
        for path in (place.manifest, place.unfinished):
            if path.is_file():
                different = differences(read_manifest(path), manifest)
                if different:
                    raise InputError(
                        f"{place.codes} holds codes of other settings ({'; '.join(different)}): "
                        "give another folder, or delete that one and its manifest"
                    )

    def start(self) -> None:
        """Record the settings, so that a later run can tell whether it continues this one."""
        try:
            write_json(self.place.unfinished, asdict(self.manifest))
        except OSError as error:
            raise InputError(f"cannot write to {self.place.root} ({error.strerror or error})") from None

    @property
    def finished(self) -> bool:
        """Whether the manifest and every file is there."""
        return self.place.manifest.is_file() and all(map(self.has, range(self.manifest.shards)))

    def has(self, shard: int) -> bool:
        """Whether a shard is complete."""
        if self.manifest.layout == "per-image":
            return all(self._paths(i)[1].is_file() for i in self.manifest.rows(shard))
        return all(path.is_file() for path in self._paths(shard))

    def needs(self) -> int:
        """Bytes on disk of the shards that are not there yet."""
        m = self.manifest
        image = m.views * m.tokens * m.dtype.itemsize
        image = -(-(image + 128) // BLOCK) * BLOCK + BLOCK if m.layout == "per-image" else image + 8
        return image * sum(len(m.rows(shard)) for shard in range(m.shards) if not self.has(shard))

    def check_space(self) -> None:
        """Raise InputError if the missing shards do not fit on the disk."""
        folder = next(path for path in (self.place.root, *self.place.root.absolute().parents) if path.is_dir())
        needed, free = self.needs(), shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{self.place.root} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: "
                "free some or give another folder"
            )

    def write(self, shard: int, codes_NVL: np.ndarray, labels_N: np.ndarray) -> None:
        """Write the codes (n, views, tokens) and labels (n,) of a whole shard; its labels last."""
        m = self.manifest
        if codes_NVL.shape != (len(m.rows(shard)), m.views, m.tokens):
            raise ValueError(
                f"shard {shard}: expected {(len(m.rows(shard)), m.views, m.tokens)}, got {codes_NVL.shape}"
            )
        codes_NVL, labels_N = codes_NVL.astype(m.dtype, copy=False), labels_N.astype(np.int64, copy=False)
        if m.layout == "packed":
            self._save(shard, codes_NVL, labels_N)
            return
        for row, i in enumerate(m.rows(shard)):
            self._save(i, codes_NVL[row : row + 1], labels_N[row : row + 1])

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes and labels of a shard as they lie on the disk. Raises InputError for a damaged file."""
        numbers = self.manifest.rows(shard) if self.manifest.layout == "per-image" else (shard,)
        codes, labels = zip(*([load_array(path) for path in self._paths(number)] for number in numbers), strict=True)
        return np.concatenate(codes), np.concatenate(labels)

    def finish(self) -> None:
        """Write the manifest: the codes are complete."""
        write_json(self.place.manifest, asdict(self.manifest))
        self.place.unfinished.unlink(missing_ok=True)

    def _paths(self, number: int) -> tuple[Path, Path]:
        name = f"{number}.npy" if self.manifest.layout == "per-image" else f"{number:05d}.npy"
        return self.place.codes / name, self.place.labels / name

    def _save(self, number: int, codes: np.ndarray, labels: np.ndarray) -> None:
        for path, array in zip(self._paths(number), (codes, labels), strict=True):
            try:
                with atomic_path(path) as temporary:
                    np.save(temporary, array)
            except OSError as error:  # numpy's own, of a full disk, has no strerror
                raise InputError(f"cannot write {path} ({error.strerror or error}); is the disk full?") from None
