"""Parts of one set of codes, extracted with --part on machines that share no folder, become what one machine would write."""

from collections.abc import Sequence

from dataset.codes.manifest import Manifest, Place, read_manifest
from dataset.codes.writer import Writer
from utils.cli import InputError
from utils.log import progress


def merged(parts: Sequence[Place]) -> tuple[Manifest, list[Manifest]]:
    """The manifest of all codes, and those of the parts. Raises InputError unless they are all parts, each once, made alike."""
    manifests = []
    for place in parts:
        manifest = read_manifest(place.manifest)
        if manifest is None or place.unfinished.is_file():
            raise InputError(f"{place.codes} is unfinished: run its extraction again to complete it")
        if not manifest.part:
            raise InputError(f"{place.codes} is no part of codes: its extraction had no --part")
        manifests.append(manifest)
    wanted = manifests[0].changed(part="", skipped=[], shards_sha256=[], shards_max=[])
    count = manifests[0].part.partition("/")[2]
    seen: dict[str, Place] = {}
    for place, manifest in zip(parts, manifests, strict=True):
        number, _, of = manifest.part.partition("/")
        different = wanted.differences(manifest.changed(part=""))
        different += [f"parts {count}, now {of}"] if of != count else []
        if different:
            raise InputError(f"{place.codes} was extracted otherwise than {parts[0].codes}: {'; '.join(different)}")
        if number in seen:
            raise InputError(
                f"{seen[number].codes} and {place.codes} are both part {manifest.part}: give each part once"
            )
        seen[number] = place
    if missing := [f"{i}/{count}" for i in range(1, int(count) + 1) if str(i) not in seen]:
        raise InputError(f"part {', '.join(missing[:9])} is missing: expected {count} parts, got {len(parts)}")
    return wanted, manifests


def merge(parts: Sequence[Place], manifests: Sequence[Manifest], writer: Writer) -> bool:
    """Write the parts' shards by a writer of another place; False if they are complete there already.

    Each shard is compared with its hash before and after. Raises InputError for one that differs, or too small a disk.
    """
    if writer.finished:
        return False
    m = writer.manifest
    writer.check_space(sum(not writer.has(shard) for shard in range(m.shards)))
    expected = [""] * m.shards
    with progress(total=m.shards, unit=" shards", desc="merging") as bar:
        for place, manifest in zip(parts, manifests, strict=True):
            source = Writer(place, manifest)
            for shard in manifest.own_shards:
                expected[shard] = manifest.shards_sha256[shard]
                if not source.has(shard):
                    raise InputError(
                        f"shard {shard} of {place.codes} was changed after it was written: extract it again"
                    )
                if not writer.has(shard):
                    writer.start()
                    writer.write(shard, *source.read(shard), manifest.gaps(shard))
                bar.update()
    for shard, sha256 in enumerate(writer.finish().shards_sha256):
        if sha256 != expected[shard]:
            raise InputError(f"shard {shard} of {writer.place.codes} differs from its part: delete that folder")
    return True
