"""One layout of codes into the other, shard by shard; and the packed copy that training reads a published folder from."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from dataset.codes.folders import Folder, Packed, PerImage
from dataset.codes.manifest import FORMAT, Manifest, Place, read_manifest
from dataset.codes.writer import Writer
from utils.cli import InputError, note
from utils.files import InUse, check_folder, file_lock
from utils.log import progress
from utils.settings import LARGEST

PUBLISHED_CODEBOOK = 16384
PATIENCE = 1800  # seconds without a new shard, after which another process's packing is no longer waited for


class OutsideCodebook(InputError):
    """A code that the codebook does not have."""


def repacked(source: Folder, layout: str, shard_size: int | None = None, codebook_size: int | None = None) -> Manifest:
    """The manifest of a source's codes in another layout.

    shard_size: by default as in the source's manifest. codebook_size: of a source without a manifest; by default the
    published tokenizers'. Raises InputError if it contradicts the source's manifest.
    """
    known = source.manifest
    if known and codebook_size not in (None, known.codebook_size):
        raise InputError(
            f"--codebook-size {codebook_size}: the manifest of {source.place.codes} says {known.codebook_size}"
        )
    manifest = known or Manifest(
        dataset=source.place.dataset, image_size=source.place.image_size, images=source.images, views=source.views,
        tokens=source.tokens, codebook_size=codebook_size or PUBLISHED_CODEBOOK, view_mode="unknown",
    )  # fmt: skip
    return manifest.changed(
        dataset=source.place.dataset, image_size=source.place.image_size, layout=layout, format=FORMAT,
        shard_size=shard_size or manifest.shard_size, shards_sha256=[], shards_max=[],
    )  # fmt: skip


def repack(source: Folder, writer: Writer, show: bool = True, what: str = "writing") -> bool:
    """Write a source's codes by a writer of another place; False if they are complete there already.

    A shard that is complete is not written again. Every shard is read back and compared with its source. Raises InputError
    for an unreadable source, ids outside the codebook, negative labels, a shard that differs, or too small a disk.
    """
    if writer.finished:
        return False
    m = writer.manifest
    writer.check_space(sum(not writer.has(shard) for shard in range(m.shards)))
    with progress(total=source.images, unit=" images", desc=f"{what} {m.layout}", show=show) as bar:
        for shard in range(m.shards):
            rows = range(m.starts[shard], m.starts[shard + 1])
            codes, labels = source.read(rows)
            _refuse_bad_values(source, rows, codes, labels, m.codebook_size)
            if not writer.has(shard):
                writer.start()  # not before: what is wrong with the first shard or the options leaves nothing behind
                writer.write(shard, codes, labels, m.gaps(shard))
            written, written_labels = writer.read(shard)
            if not (np.array_equal(written, codes) and np.array_equal(written_labels, labels)):
                raise InputError(
                    f"shard {shard} of {writer.place.codes} differs from its source: delete that folder and "
                    f"{writer.place.unfinished}, and run this again"
                )
            bar.update(len(rows))
    writer.finish()
    return True


def _refuse_bad_values(source: Folder, rows: range, codes: np.ndarray, labels: np.ndarray, codebook_size: int) -> None:
    if codes.size and (codes.min() < 0 or codes.max() >= codebook_size):
        image, view, position = np.argwhere((codes < 0) | (codes >= codebook_size))[0]
        code = codes[image, view, position]
        raise (InputError if code < 0 else OutsideCodebook)(
            f"{source.file_of(rows[image])}: code {code} of image {source.numbers[rows[image]]} is "
            f"outside the codebook of {codebook_size}: extract it again, or give --codebook-size"
        )
    if (labels < 0).any():
        image = int(labels.argmin())
        raise InputError(
            f"{source.place.labels}: image {source.numbers[rows[image]]} has label {labels[image]}; expected 0 or more"
        )


def packed_form(source: Folder) -> Packed:
    """Codes in packed form: as they are, or a copy of a published folder, made at its first use.

    The copy lies in `{name}_packed/` beside the codes or, where nothing can be written there, in the user's cache folder.
    It is made again when a file of its source changes. Processes that come while another one packs wait for it.
    """
    if isinstance(source, Packed):
        return source
    if not source.manifest and (holes := int(source.numbers[-1]) + 1 - source.images):
        note(
            f"{source.place.codes}: {source.images} images numbered up to {source.numbers[-1]}, {holes} numbers have no file"
        )
    copy = _copy_place(source)
    check_folder(copy.root)
    last, since, said = -1, time.monotonic(), False
    while True:
        if packed := _open_copy(copy, source):
            return packed
        with suppress(InUse), file_lock(copy.manifest):
            return _open_copy(copy, source) or _make_copy(copy, source)
        if not said:
            note(f"{copy.root} is being packed by another process: waiting for it")
            said = True
        done = len(list(copy.records.glob("*.json")))
        if done != last:
            last, since = done, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            raise InputError(f"{copy.root} is in use, and nothing was packed for {PATIENCE // 60} minutes")
        time.sleep(0.5)


def _copy_place(source: PerImage) -> Place:
    place = source.place
    root = place.packed
    if not os.access(root if root.is_dir() else place.root, os.W_OK):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = cache / "next-patch-prediction" / f"{root.name}-{source.state}"
    return Place(root, place.dataset, place.image_size)


def _open_copy(copy: Place, source: PerImage) -> Packed | None:
    """The copy if it exists, is whole, and was made of the source's files as they are now."""
    with suppress(InputError):
        manifest = read_manifest(copy.manifest)
        if manifest and manifest.source_id == source.state and not copy.unfinished.is_file():
            return Packed(copy, manifest, source)
    return None


def _make_copy(copy: Place, source: PerImage) -> Packed:
    note(f"{source.place.codes} has one file an image{source.gaps()}: packing it into {copy.root}, once")
    wanted = repacked(source, "packed").changed(source_id=source.state)
    # Without a manifest nothing tells of the codebook: codes take 16 bits, or 32 where one of them does not fit.
    for codebook_size in [wanted.codebook_size] if source.manifest else [1 << 16, LARGEST]:
        wanted = wanted.changed(codebook_size=codebook_size)
        try:
            writer = Writer(copy, wanted)
        except InputError:  # of another state of the source
            for path in (copy.manifest, copy.unfinished):
                path.unlink(missing_ok=True)
            for folder in (copy.codes, copy.labels, copy.records):
                shutil.rmtree(folder, ignore_errors=True)
            writer = Writer(copy, wanted)
        try:
            repack(source, writer, os.environ.get("RANK", "0") == "0", "packing")
            break
        except OutsideCodebook:
            if source.manifest or codebook_size == LARGEST:
                raise
    return Packed(copy, writer.before, source)
