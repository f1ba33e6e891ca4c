"""Fetch published weights: python -m pretrained_models.download vq_ds16_c2i c2i_B_256

A download that was cut off goes on where it stopped. What came (revision, sha256, bytes) is recorded beside the file and
checked at each use. `--list` shows the names.
"""

from argparse import Namespace

from pretrained_models.catalogue import CATALOGUE, Weights, fetched
from utils import cli
from utils.hub import record_of


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="names of --list")
    add("--revision", help="a branch, a tag or a commit of the repository instead of main")
    add("--list", action="store_true", help="show the names and what is published of them, and stop")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CATALOGUE]
    if unknown or (not args.names and not args.list):
        given = f"there are no weights {', '.join(unknown)}" if unknown else "no names given"
        parser.error(f"{given}; expected some of {', '.join(CATALOGUE)}")
    return args


def megabytes(path_bytes: int) -> str:
    return f"{path_bytes / 1e6:,.0f} MB"


def row_of(name: str, row: Weights) -> tuple[str, ...]:
    """The cells of --list. The size is that of the file that is there: none is published."""
    here = row.path.is_file()
    record = record_of(row.path) if here else {}
    return (
        name,
        row.model,
        row.parameters,
        f"{'rFID' if row.cfg_scale is None else 'FID'} {row.fid:.2f}",
        "-" if row.cfg_scale is None else f"{row.cfg_scale:g}",
        f"{row.image_size} px",
        megabytes(row.path.stat().st_size) if here else "not here",
        record["revision"][:12] if record else "-",
        f"{row.repo}/{row.file}" + (f" ({row.remark})" if row.remark else ""),
    )


def listing() -> str:
    """A line a name: model, parameters, FID, guidance, image size, size here, revision here, source."""
    heads = ("name", "model", "size", "FID at 256 px", "cfg", "draws", "on disk", "revision", "source")
    rows = [heads, *(row_of(name, row) for name, row in CATALOGUE.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> None:
    args = parse()
    if args.list:
        print(listing())
        return
    for name in args.names:
        path = fetched(name, args.revision)
        record = record_of(path)
        came = f"revision {record['revision']}, sha256 {record['sha256']}" if record else "put there by hand, no record"
        print(f"{name}: {path}, {megabytes(path.stat().st_size)}, {came}")


if __name__ == "__main__":
    cli.run(main)
