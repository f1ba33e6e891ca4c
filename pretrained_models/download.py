"""Fetch published weights: python -m pretrained_models.download vq_ds16_c2i c2i_B_256

The revision, sha256 and size of each file are recorded beside the file and checked at each use. `--list` shows the names.
"""

from pydantic import model_validator
from typing_extensions import Self

from pretrained_models.catalogue import CATALOGUE, Weights, fetched
from utils import cli
from utils.download import record_of
from utils.settings import Settings, setting


class DownloadSettings(Settings):
    """The settings of this command; see --help."""

    names: list[str] = setting([], "names of --list", positional=True)
    revision: str | None = setting(None, "a branch, a tag or a commit of the repository instead of main")
    list: bool = setting(False, "show the names and what is published of them, and stop")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        unknown = [name for name in self.names if name not in CATALOGUE]
        if unknown or not (self.names or self.list):
            given = f"there are no weights {', '.join(unknown)}" if unknown else "no names given"
            raise ValueError(f"{given}; expected some of {', '.join(CATALOGUE)}")
        return self


def megabytes(path_bytes: int) -> str:
    return f"{path_bytes / 1e6:,.0f} MB"


def row_of(name: str, row: Weights) -> tuple[str, ...]:
    """The cells of --list. The size is that of the file that is there: none is published."""
    here = row.path.is_file()
    record = record_of(row.path) if here else None
    return (
        name,
        row.model,
        row.parameters,
        f"{'rFID' if row.cfg_scale is None else 'FID'} {row.fid:.2f}",
        "-" if row.cfg_scale is None else f"{row.cfg_scale:g}",
        f"{row.image_size} px",
        megabytes(row.path.stat().st_size) if here else "not here",
        record.revision[:12] if record else "-",
        f"{row.repo}/{row.file}" + (f" ({row.remark})" if row.remark else ""),
    )


def listing() -> str:
    """A line a name: model, parameters, FID, guidance, image size, size here, revision here, source."""
    heads = ("name", "model", "size", "FID at 256 px", "cfg", "draws", "on disk", "revision", "source")
    rows = [heads, *(row_of(name, row) for name, row in CATALOGUE.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> None:
    s = DownloadSettings.from_command_line(__doc__)
    if s.list:
        print(listing())
        return
    for name in s.names:
        path = fetched(name, s.revision)
        record = record_of(path)
        came = f"revision {record.revision}, sha256 {record.sha256}" if record else "put there by hand, no record"
        print(f"{name}: {path}, {megabytes(path.stat().st_size)}, {came}")


if __name__ == "__main__":
    cli.run(main)
