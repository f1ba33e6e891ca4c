"""Pack, unpack and check folders of codes.

    python -m dataset.codes pack SRC DST       one file an image (published) -> packed shards and a manifest
    python -m dataset.codes unpack SRC DST     the other way
    python -m dataset.codes check PATH --vq-ckpt vq_ds16_c2i.pt --out codes.png

pack and unpack continue where they were cut off and compare what they wrote with its source. check exits with status 1
when something is wrong with the codes.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

from dataset.codes.manifest import SHARD_SIZE, Place, find_place
from dataset.codes.reader import Folder, open_folder
from dataset.codes.repack import PUBLISHED_CODEBOOK, repack, repacked
from dataset.codes.survey import survey
from dataset.codes.writer import Writer
from pretrained_models.catalogue import weights_file
from utils import cli
from utils.files import sha256
from utils.log import progress


class Parser(cli.Parser):
    """cli.Parser under the name that the module is called by, and as argparse makes one for a command."""

    def __init__(self, description: str = "", prog: str = "python -m dataset.codes", **_: object) -> None:
        super().__init__(description)
        self.prog = prog

    def error(self, message: str) -> None:
        cli.fail(f"{message} (see {self.prog} --help)")


def parse() -> Namespace:
    parser = Parser(__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack|unpack|check")
    for name, what in (
        ("pack", "one file an image -> packed shards and a manifest"),
        ("unpack", "packed shards -> one file an image, as published"),
        ("check", "what a folder holds, whether it is sound, and a picture of it"),
    ):
        command = commands.add_parser(name, description=what, help=what)
        add = command.add_argument
        if name == "check":
            add("path", type=Path, help="folder that holds {dataset}{size}_codes")
        else:
            add("src", type=Path, help="folder that holds {dataset}{size}_codes")
            add("dst", type=Path, help="folder to write to")
        add("--dataset", help="name of the data set; default: the only one there")
        add("--image-size", type=cli.positive_int, help="default: the only one there")
        if name != "unpack":
            add(
                "--codebook-size",
                type=cli.positive_int,
                help=f"of codes without a manifest; default: {PUBLISHED_CODEBOOK}, the published tokenizers'",
            )
        if name == "check":
            add("--vq-ckpt", type=weights_file, help="decode some images by this tokenizer")
            add("--vq-model", help="insist on this tokenizer preset")
            add("--out", type=Path, default=Path("codes.png"), help="the picture")
            add("--rows", type=cli.positive_int, default=10, help="classes in the picture")
            add(
                "--columns",
                type=cli.positive_int,
                default=8,
                help="images a class; of codes with several views, all views of one image",
            )
        elif name == "pack":
            add(
                "--shard-size",
                type=cli.positive_int,
                help=f"images a shard; default: the manifest's, {SHARD_SIZE} without",
            )
    return parser.parse_args()


def convert(args: Namespace, layout: str) -> None:
    """pack and unpack."""
    source = open_folder(find_place(args.src, args.dataset, args.image_size))
    options = (args.shard_size, args.codebook_size) if args.command == "pack" else ()
    manifest = repacked(source, layout, *options)
    place = Place(args.dst, manifest.dataset, manifest.image_size)
    done = repack(source, Writer(place, manifest))
    what = f"{source.images} images, {manifest.views} views of {manifest.tokens} codes"
    print(f"wrote {place.codes}, equal to its source: {what}" if done else f"{place.codes} is complete already: {what}")


def check(args: Namespace) -> int:
    """Print what there is and draw it; 1 if something is wrong with it."""
    place = find_place(args.path, args.dataset, args.image_size)
    try:
        folder = open_folder(place)
        known = folder.manifest.codebook_size if folder.manifest else PUBLISHED_CODEBOOK
        result = survey(folder, args.codebook_size or known)
    except cli.InputError as error:
        print(f"wrong: {error}", file=sys.stderr)
        return 1
    print("\n".join(result.lines()))
    for problem in result.problems:
        print(f"wrong: {problem}", file=sys.stderr)
    if result.problems:
        return 1
    if args.vq_ckpt:
        draw(folder, args)
    print("nothing is wrong")
    return 0


def draw(folder: Folder, args: Namespace) -> None:
    """A picture of decoded codes: a class a row, images of it in the columns, or all views of one."""
    import torch  # here, so that pack and a check without a picture don't wait for it

    from tokenizer.tokenizer_image.load import load_tokenizer
    from utils.draw import image_grid, save_image
    from utils.pixels import to_uint8

    tokenizer, _ = load_tokenizer(args.vq_ckpt, args.vq_model)
    wanted = folder.manifest.codebook_size if folder.manifest else 0
    if tokenizer.config.codebook_size < wanted:
        raise cli.InputError(
            f"{args.vq_ckpt} has a codebook of {tokenizer.config.codebook_size}, the codes are of one of {wanted}"
        )
    if folder.manifest and folder.manifest.tokenizer_sha256 not in ("", sha256(args.vq_ckpt)):
        print(f"note: {args.vq_ckpt} is not the file that the codes were made by; the picture may show that")
    keys, names = choose(folder, args.rows, args.columns)
    codes = np.concatenate([folder.gather(np.array([i]), np.array([view])) for i, view in keys])
    images = []
    with torch.inference_mode():
        for part in progress(range(0, len(codes), 8), desc="decoding", unit=" batches"):
            images.append(to_uint8(tokenizer.decode_code(torch.from_numpy(codes[part : part + 8]))).numpy())
    pictures = np.concatenate(images)
    scale = max(1, 64 // pictures.shape[1])
    save_image(args.out, image_grid(pictures, len(keys) // len(names), names, scale))
    print(f"wrote {args.out}")


def choose(folder: Folder, rows: int, columns: int) -> tuple[list[tuple[int, int]], list[str]]:
    """(image, view) of each picture, row by row, and the rows' names: classes spread over those there are."""
    labels, names = folder.labels, folder.manifest.classes if folder.manifest else []
    classes = np.unique(labels)
    classes = classes[np.linspace(0, len(classes) - 1, min(rows, len(classes))).astype(int)]
    keys = []
    for label in classes:
        images = np.flatnonzero(labels == label)
        if folder.views > 1:
            keys += [(int(images[0]), view) for view in range(folder.views)]
        else:
            keys += [(int(images[i]), 0) for i in np.linspace(0, len(images) - 1, columns).astype(int)]
    return keys, [names[i] if i < len(names) else f"class {i}" for i in classes]


def main() -> None:
    args = parse()
    if args.command == "check":
        sys.exit(check(args))
    convert(args, "packed" if args.command == "pack" else "per-image")


if __name__ == "__main__":
    cli.run(main)
