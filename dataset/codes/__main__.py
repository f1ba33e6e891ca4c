"""Pack, unpack, merge and check folders of codes.

    python -m dataset.codes pack SRC DST       one file an image (published) -> packed shards and a manifest
    python -m dataset.codes unpack SRC DST     the other way
    python -m dataset.codes merge OUT PART...  parts from several machines -> what one machine would have written
    python -m dataset.codes check PATH --vq-ckpt vq_ds16_c2i.pt --out codes.png

pack, unpack and merge resume where they were cut off and compare what they wrote with its source. check exits with status 1
when something is wrong with the codes. Each has --help.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.codes.folders import Folder, open_folder
from dataset.codes.manifest import SHARD_SIZE, Manifest, Place, find_place
from dataset.codes.repack import PUBLISHED_CODEBOOK, merged, repack, repacked
from dataset.codes.survey import Survey, class_name, survey
from dataset.codes.writer import Writer
from pretrained_models.catalogue import WeightsFile
from utils import checkpoint, cli
from utils.draw import SUFFIXES, image_grid, save_image
from utils.files import check_folder, check_output, file_lock
from utils.log import progress
from utils.settings import PositiveInt, Settings, setting

CODEBOOK = f"of codes without a manifest; default: {PUBLISHED_CODEBOOK}, the published tokenizers'"


class CodesSettings(Settings):
    """Which codes, of those that a folder holds."""

    dataset: str | None = setting(None, "name of the data set; default: the only one there")
    image_size: PositiveInt | None = setting(None, "default: the only one there")


class UnpackSettings(CodesSettings):
    src: Path = setting(help="folder that holds {dataset}{size}_codes", positional=True)
    dst: Path = setting(help="folder to write to", positional=True)


class PackSettings(UnpackSettings):
    codebook_size: PositiveInt | None = setting(None, CODEBOOK)
    shard_size: PositiveInt | None = setting(None, f"images a shard; default: the manifest's, {SHARD_SIZE} without")


class MergeSettings(CodesSettings):
    out: Path = setting(help="folder to write to", positional=True)
    parts: list[Path] = setting(help="folders that extractions with --part wrote to", positional=True)


class CheckSettings(CodesSettings):
    path: Path = setting(help="folder that holds {dataset}{size}_codes", positional=True)
    codebook_size: PositiveInt | None = setting(None, CODEBOOK)
    vq_ckpt: WeightsFile | None = setting(None, "decode some images by this tokenizer", metavar="WEIGHTS")
    vq_model: str | None = setting(None, "insist on this tokenizer preset")
    out: Path = setting(Path("codes.png"), "the picture")
    rows: PositiveInt = setting(10, "classes in the picture")
    columns: PositiveInt = setting(8, "images a class; of codes with several views, all views of one image")


def pack(arguments: Sequence[str]) -> None:
    """One file an image -> packed shards and a manifest."""
    s = PackSettings.from_command_line(pack.__doc__, arguments)
    convert(s, "packed", s.shard_size, s.codebook_size)


def unpack(arguments: Sequence[str]) -> None:
    """Packed shards -> one file an image, as published."""
    convert(UnpackSettings.from_command_line(unpack.__doc__, arguments), "per-image")


def convert(s: UnpackSettings, layout: str, *options: int | None) -> None:
    """What pack and unpack do."""
    check_folder(s.dst)
    source = open_folder(find_place(s.src, s.dataset, s.image_size))
    manifest = repacked(source, layout, *options)
    what = f"{source.images} images, {manifest.views} views of {manifest.tokens} codes, equal to its source"
    write(s.dst, manifest, [source], what)


def merge(arguments: Sequence[str]) -> None:
    """Parts of the codes from several machines -> what one machine would have written."""
    s = MergeSettings.from_command_line(merge.__doc__, arguments)
    check_folder(s.out)
    parts = [open_folder(find_place(root, s.dataset, s.image_size), part=True) for root in s.parts]
    manifest = merged(parts)
    write(s.out, manifest, parts, f"{manifest.images} images of {len(parts)} parts")


def write(root: Path, manifest: Manifest, sources: Sequence[Folder], what: str) -> None:
    """Write the sources' codes below root, unless they are there, and say what they are."""
    place = Place(root, manifest.dataset, manifest.image_size)
    for source in sources:
        if place.codes.resolve() == source.place.codes.resolve():
            raise cli.InputError(f"{source.place.root} and {root} are the same folder: give another one to write to")
    with file_lock(place.manifest, "wait for it, or give another folder"):
        done = repack(sources, Writer(place, manifest))
    print(f"{place.codes} {'is written' if done else 'is complete already'}: {what}")


def check(arguments: Sequence[str]) -> None:
    """What a folder holds, whether it is sound, and a picture of it; status 1 if something is wrong."""
    s = CheckSettings.from_command_line(check.__doc__, arguments)
    place = find_place(s.path, s.dataset, s.image_size)
    if s.vq_ckpt:
        check_output(s.out, SUFFIXES)
    try:
        folder = open_folder(place)
        known = folder.manifest.codebook_size if folder.manifest else PUBLISHED_CODEBOOK
        result = survey(folder, s.codebook_size or known)
    except cli.InputError as error:
        print(f"wrong: {error}", file=sys.stderr)
        sys.exit(1)
    print("\n".join(result.lines()))
    for problem in result.problems:
        print(f"wrong: {problem}", file=sys.stderr)
    if result.problems:
        sys.exit(1)
    if s.vq_ckpt:
        draw(result, s)
    print("nothing is wrong")


def draw(result: Survey, s: CheckSettings) -> None:
    """A picture of decoded codes: a class a row, images of it in the columns, or all views of one."""
    import torch  # here, so that pack and a check without a picture don't wait for it

    from tokenizer.tokenizer_image.vq_model import Tokenizer
    from utils.pixels import to_uint8

    folder, manifest = result.folder, result.folder.manifest
    tokenizer = Tokenizer.from_pretrained(s.vq_ckpt, s.vq_model)
    needed, held = manifest.codebook_size if manifest else result.high + 1, tokenizer.config.codebook_size
    if held < needed:
        raise cli.InputError(f"{s.vq_ckpt} has a codebook of {held}, the codes are of one of {needed}")
    if manifest and not checkpoint.is_tokenizer(s.vq_ckpt, manifest.tokenizer_sha256):
        print(f"note: {s.vq_ckpt} is not the tokenizer that the codes were made by; the picture may show that")
    keys, names = choose(folder, result.labels, s.rows, s.columns)
    codes = np.concatenate([folder.read(range(i, i + 1))[0][:, view] for i, view in keys]).astype(np.int64)
    images = []
    with torch.inference_mode():
        for part in progress(range(0, len(codes), 8), desc="decoding", unit=" batches"):
            images.append(to_uint8(tokenizer.decode_code(torch.from_numpy(codes[part : part + 8]))).numpy())
    pictures = np.concatenate(images)
    scale = max(1, 64 // pictures.shape[1])
    save_image(s.out, image_grid(pictures, len(keys) // len(names), names, scale))
    print(f"wrote {s.out}")


def choose(folder: Folder, labels: np.ndarray, rows: int, columns: int) -> tuple[list[tuple[int, int]], list[str]]:
    """(image, view) of each picture, row by row, and the rows' names: classes spread over those there are."""
    classes = np.unique(labels)
    classes = classes[np.linspace(0, len(classes) - 1, min(rows, len(classes))).astype(int)]
    keys = []
    for label in classes:
        images = np.flatnonzero(labels == label)
        if folder.views > 1:
            keys += [(int(images[0]), view) for view in range(folder.views)]
        else:
            keys += [(int(images[i]), 0) for i in np.linspace(0, len(images) - 1, columns).astype(int)]
    return keys, [class_name(folder, i) for i in classes]


def main() -> None:
    commands = {"pack": pack, "unpack": unpack, "merge": merge, "check": check}
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name in commands:
        sys.argv[0] = f"python -m dataset.codes {name}"  # what messages and --help call it
        commands[name](arguments)
    else:
        cli.fail(f"expected pack, unpack, merge or check, got {name!r} (see python -m dataset.codes --help)")


if __name__ == "__main__":
    cli.run(main)
