"""One layout of codes into the other, and parts into the whole, shard by shard; and the packed copy of a published folder."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from dataset.codes.folders import Folder, Packed, PerImage, alteration
from dataset.codes.manifest import FORMAT, Manifest, Place, read_manifest
from dataset.codes.writer import Writer
from utils.cli import InputError, note
from utils.files import check_folder, file_lock
from utils.log import progress
from utils.settings import LARGEST

PUBLISHED_CODEBOOK = 16384


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


def merged(parts: Sequence[Folder]) -> Manifest:
    """The manifest of all codes. Raises InputError unless these are all parts of them, each once, made alike."""
    manifests = [part.manifest for part in parts]
    skipped = [row for manifest in manifests for row in manifest.skipped]
    wanted = manifests[0].changed(part="", skipped=skipped, shards_sha256=[], shards_max=[])
    count = manifests[0].part.partition("/")[2]
    seen: dict[str, Folder] = {}
    for part, manifest in zip(parts, manifests, strict=True):
        number, _, of = manifest.part.partition("/")
        different = wanted.differences(manifest.changed(part=""))
        different += [f"parts {count}, now {of}"] if of != count else []
        codes = part.place.codes
        if different:
            raise InputError(f"{codes} was extracted otherwise than {parts[0].place.codes}: {'; '.join(different)}")
        if number in seen:
            raise InputError(
                f"{seen[number].place.codes} and {codes} are both part {manifest.part}: give each part once"
            )
        seen[number] = part
    if missing := [f"{i}/{count}" for i in range(1, int(count) + 1) if str(i) not in seen]:
        raise InputError(f"part {', '.join(missing[:9])} is missing: expected {count} parts, got {len(parts)}")
    return wanted


def repack(sources: Sequence[Folder], writer: Writer, show: bool = True, what: str = "writing") -> bool:
    """Write codes by a writer of another place; False if they are complete there already. sources: the codes, or all
    parts of them.

    A shard that is complete is not written again. Every shard is read back and compared with its source. Raises InputError
    for an unreadable source, ids outside the codebook, negative labels, a shard that differs, or too small a disk.
    """
    if writer.finished:
        return False
    m = writer.manifest
    writer.check_space(sum(not writer.has(shard) for shard in range(m.shards)))
    total = sum(source.images for source in sources)
    with progress(total=total, unit=" images", desc=f"{what} {m.layout}", show=show) as bar:
        for source in sources:
            part = bool(source.manifest and source.manifest.part)
            shards = source.manifest.own_shards if part else range(m.shards)
            for shard in shards:
                if part and (text := alteration(source, shard)):
                    raise InputError(text)
                rows = range(m.starts[shard] - m.starts[shards.start], m.starts[shard + 1] - m.starts[shards.start])
                _copy(source, rows, writer, shard)
                bar.update(len(rows))
    writer.finish()
    return True


def _copy(source: Folder, rows: range, writer: Writer, shard: int) -> None:
    """Write these images of a source as a shard, if it is not there, and compare what is there with them."""
    codes, labels = source.read(rows)
    codebook_size = writer.manifest.codebook_size
    if codes.size and (codes.min() < 0 or codes.max() >= codebook_size):
        image, view, position = np.argwhere((codes < 0) | (codes >= codebook_size))[0]
        code = codes[image, view, position]
        raise (InputError if code < 0 else OutsideCodebook)(
            f"{source.file_of(rows[image])}: code {code} of image {source.numbers[rows[image]]} is "
            f"outside the codebook of {codebook_size}: extract it again, or pack it with --codebook-size"
        )
    if (labels < 0).any():
        image = int(labels.argmin())
        raise InputError(
            f"{source.place.labels}: image {source.numbers[rows[image]]} has label {labels[image]}; expected 0 or more"
        )
    if not writer.has(shard):
        writer.start()  # not before: what is wrong with the first shard or the options leaves nothing behind
        writer.write(shard, codes, labels, writer.manifest.gaps(shard))
    written, written_labels = writer.read(shard)
    if not (np.array_equal(written, codes) and np.array_equal(written_labels, labels)):
        raise InputError(
            f"shard {shard} of {writer.place.codes} differs from its source: delete that folder and "
            f"{writer.place.unfinished}, and run this again"
        )


def packed_form(source: Folder) -> Packed:
    """Codes in packed form: as they are, or a copy of a published folder, made at its first use.

    The copy lies in `{name}_packed/` beside the codes or, where nothing can be written there, in the user's cache folder.
    It is made again when a file of its source changes. Processes that come while another one packs wait for it.
    """
    if isinstance(source, Packed):
        return source
    place, last = source.place, int(source.numbers[-1])
    if not source.manifest and (holes := last + 1 - source.images):
        first = int((source.numbers != np.arange(source.images)).argmax())
        note(
            f"{place.codes}: {source.images} images numbered up to {last}, {holes} numbers have no file, the first is {first}"
        )
    root = place.packed
    if not os.access(root if root.is_dir() else place.root, os.W_OK):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = cache / "next-patch-prediction" / f"{root.name}-{source.state}"
    copy = Place(check_folder(root), place.dataset, place.image_size)
    if packed := _open_copy(copy, source):
        return packed
    with file_lock(copy.manifest, wait=True):
        return _open_copy(copy, source) or _make_copy(copy, source)


def _open_copy(copy: Place, source: PerImage) -> Packed | None:
    """The copy if it exists, is whole, and was made of the source's files as they are now."""
    with suppress(InputError):
        manifest = read_manifest(copy.manifest)
        if manifest and manifest.source_id == source.state and not copy.unfinished.is_file():
            return Packed(copy, manifest, source)
    return None


def _make_copy(copy: Place, source: PerImage) -> Packed:
    note(f"{source.place.codes} has one file an image: packing it into {copy.root}, once")
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
            repack([source], writer, os.environ.get("RANK", "0") == "0", "packing")
            break
        except OutsideCodebook:
            if source.manifest or codebook_size == LARGEST:
                raise
    return Packed(copy, writer.before, source)
