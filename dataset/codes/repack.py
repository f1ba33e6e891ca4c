"""One layout of codes into the other, shard by shard, compared with its source before the manifest is written."""

from dataclasses import replace

import numpy as np

from dataset.codes.manifest import FORMAT, Manifest
from dataset.codes.reader import Folder
from dataset.codes.writer import Writer
from utils.cli import InputError
from utils.log import progress

PUBLISHED_CODEBOOK = 16384


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
        source.place.dataset, source.place.image_size, source.images, source.views, source.tokens,
        codebook_size or PUBLISHED_CODEBOOK, view_mode="unknown",
    )  # fmt: skip
    return replace(
        manifest, layout=layout, shard_size=shard_size or manifest.shard_size, format=FORMAT, shards_sha256=[]
    )  # fmt: skip


def repack(source: Folder, writer: Writer, show: bool = True) -> bool:
    """Write a source's codes by a writer of another place; False if they are complete there already.

    A shard that is there is not written again. Every shard is read back and compared with its source. Raises InputError
    for an unreadable source, ids outside the codebook, negative labels, a shard that differs, or too small a disk.
    """
    if writer.finished:
        return False
    m = writer.manifest
    writer.check_space(sum(not writer.has(shard) for shard in range(m.shards)))
    with progress(total=source.images, unit=" images", desc=f"writing {m.layout}", show=show) as bar:
        for shard in range(m.shards):
            rows = range(m.starts[shard], m.starts[shard + 1])
            skipped = [row for row in m.skipped if row["image"] in m.rows(shard)]
            codes, labels = source.read(rows), source.labels_of(np.arange(rows.start, rows.stop))
            _refuse_bad_values(source, rows, codes, labels, m.codebook_size)
            if not writer.has(shard):
                writer.start()  # not before: what is wrong with the first shard or the options leaves nothing behind
                writer.write(shard, codes, labels, skipped)
            _compare(writer, shard, codes, labels)
            bar.update(len(rows))
    writer.finish()
    return True


def _refuse_bad_values(source: Folder, rows: range, codes: np.ndarray, labels: np.ndarray, codebook_size: int) -> None:
    wrong = (codes < 0) | (codes >= codebook_size)
    if wrong.any():
        image, view, position = np.argwhere(wrong)[0]
        raise InputError(
            f"{source.file_of(rows[image])}: code {codes[image, view, position]} of image {source.numbers[rows[image]]} is "
            f"outside the codebook of {codebook_size}: extract it again, or give --codebook-size"
        )
    if (labels < 0).any():
        image = int(labels.argmin())
        raise InputError(
            f"{source.place.labels}: image {source.numbers[rows[image]]} has label {labels[image]}; expected 0 or more"
        )


def _compare(writer: Writer, shard: int, codes: np.ndarray, labels: np.ndarray) -> None:
    """Raise InputError unless a shard on the disk is its source."""
    written, written_labels = writer.read(shard)
    same = np.array_equal(written, codes) and np.array_equal(written_labels, labels)
    if not same or written.dtype != writer.manifest.dtype:
        raise InputError(
            f"shard {shard} of {writer.place.codes} differs from its source: delete that folder and "
            f"{writer.place.unfinished}, and run this again"
        )
