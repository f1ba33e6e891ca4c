"""Which weights are published, where, and how their figures were drawn; `find_weights` turns a name into a file.

Names, FIDs and guidance scales are those of the READMEs of LlamaGen and of Next Patch Prediction; LlamaGen's scales are
those with which its paper (arXiv 2406.06525, tables 8 to 10) reports these FIDs. Sizes, hashes and revisions are not
listed here: a record beside the file holds them (utils.download).
"""

import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from utils.cli import InputError, note
from utils.download import check, hub_file, parse_address, record_of, weights_folder

LLAMAGEN, NPP = "FoundationVision/LlamaGen", "pytttttt/LlamaGen-NPP"


class Weights(NamedTuple):
    """A published file. fid: of 256 px images (rFID of a tokenizer), drawn with `cfg_scale` at `image_size`."""

    repo: str
    file: str
    model: str
    parameters: str
    fid: float
    image_size: int = 256
    cfg_scale: float | None = None
    remark: str = ""

    @property
    def path(self) -> Path:
        """Where it is kept once it is fetched."""
        return weights_folder() / self.repo / self.file


UNLINKED = "in the paper; its README links no such file"

CATALOGUE = {
    "vq_ds16_c2i": Weights(LLAMAGEN, "vq_ds16_c2i.pt", "VQ-16", "72M", 2.19),
    "vq_ds8_c2i": Weights(LLAMAGEN, "vq_ds8_c2i.pt", "VQ-8", "70M", 0.59),
    "c2i_B_256": Weights(NPP, "c2i_B_256.pt", "GPT-B", "111M", 4.47, cfg_scale=2.0),
    "c2i_L_256": Weights(NPP, "c2i_L_256.pt", "GPT-L", "343M", 2.76, cfg_scale=1.75),
    "c2i_XL_256": Weights(NPP, "c2i_XL_256.pt", "GPT-XL", "775M", 2.65, cfg_scale=1.70),
    "c2i_XXL_256": Weights(NPP, "c2i_XXL_256.pt", "GPT-XXL", "1.4B", 2.55, cfg_scale=1.65),
    "llamagen/c2i_B_256": Weights(LLAMAGEN, "c2i_B_256.pt", "GPT-B", "111M", 5.46, cfg_scale=2.0),
    "llamagen/c2i_L_256": Weights(LLAMAGEN, "c2i_L_256.pt", "GPT-L", "343M", 3.80, cfg_scale=1.75),
    "llamagen/c2i_XL_256": Weights(LLAMAGEN, "c2i_XL_256.pt", "GPT-XL", "775M", 3.39, cfg_scale=1.75, remark=UNLINKED),
    "llamagen/c2i_XXL_256": Weights(
        LLAMAGEN, "c2i_XXL_256.pt", "GPT-XXL", "1.4B", 3.09, cfg_scale=1.75, remark=UNLINKED
    ),
    "c2i_B_384": Weights(LLAMAGEN, "c2i_B_384.pt", "GPT-B", "111M", 6.09, 384, 2.25),
    "c2i_L_384": Weights(LLAMAGEN, "c2i_L_384.pt", "GPT-L", "343M", 3.07, 384, 2.0),
    "c2i_XL_384": Weights(LLAMAGEN, "c2i_XL_384.pt", "GPT-XL", "775M", 2.62, 384, 1.75),
    "c2i_XXL_384": Weights(LLAMAGEN, "c2i_XXL_384.pt", "GPT-XXL", "1.4B", 2.34, 384, 1.75),
    "c2i_3B_384": Weights(LLAMAGEN, "c2i_3B_384.pt", "GPT-3B", "3.1B", 2.18, 384, 1.65),
}


def fetched(name: str, revision: str | None = None) -> Path:
    """The file of a name of the catalogue: as a download left it, as a user put it, or fetched now.

    A user's own copy is looked for in the folder of weights itself, too, under its file name. Raises InputError.
    """
    row = CATALOGUE[name]
    by_hand = weights_folder() / row.file
    if revision is None and "/" not in name and not row.path.is_file() and by_hand.is_file():
        if len(named(row.file)) > 1:
            repos = " or ".join(CATALOGUE[other].repo for other in named(row.file))
            note(f"{name}: taking {by_hand}, put there by hand; whether it is that of {repos} is not recorded")
        return check(by_hand)
    return hub_file(row.repo, row.file, revision)


def named(file: str) -> list[str]:
    """The names of the catalogue whose file is called so; two repositories have files of the same name."""
    return [name for name, row in CATALOGUE.items() if row.file == file]


def find_weights(text: str) -> Path:
    """A path, a name of the catalogue, or hf://user/repo[@revision]/file -> a file (or a folder of weights) that is there.

    Downloaded files are compared with their record. Raises InputError for what is not there and cannot be fetched.
    """
    path = Path(text)
    if text.startswith("hf://"):
        return hub_file(*parse_address(text))
    if path.is_file():
        return check(path)
    if path.is_dir():
        return path
    if text in CATALOGUE:
        return fetched(text)
    published = named(path.name)
    if published and path.parent.resolve() == weights_folder().resolve() and CATALOGUE[published[0]].path.is_file():
        return check(CATALOGUE[published[0]].path)  # where the published commands look
    hint = f"; python -m pretrained_models.download {published[0]} fetches the published one" if published else ""
    names = "" if published else f", nor is it one of {', '.join(CATALOGUE)} or an hf://user/repo/file"
    raise InputError(f"there is no file {text}{names}{hint}")


WeightsFile = Annotated[Path, BeforeValidator(find_weights)]  # the type of a setting: what find_weights takes


def published_sampling(name_or_path: str | Path) -> dict[str, Any]:
    """How the figures of published weights were drawn: some of gpt_model, image_size, image_size_eval and cfg_scale, and
    `why`, a line that says whose setting it is and how the weights were recognised. Empty for any others.

    A file is recognised by its name in the catalogue, by the record of its download, or by its parts' checksums, which are
    those of a download. Else its file name alone must do: then what the published files of that name agree on is given.
    """
    names, how = _recognise(name_or_path)
    settings = [_sampling(CATALOGUE[name]) for name in names]
    if not settings:
        return {}
    agreed = {key: value for key, value in settings[0].items() if all(other[key] == value for other in settings)}
    whose = " and ".join(f"{CATALOGUE[name].repo}'s {CATALOGUE[name].file}" for name in names)
    return {**agreed, "why": f"as published for {whose} ({how})"}


def _sampling(row: Weights) -> dict[str, Any]:
    shared = {"gpt_model": row.model, "image_size": row.image_size, "image_size_eval": 256, "cfg_scale": row.cfg_scale}
    return {} if row.cfg_scale is None else shared


def _recognise(name_or_path: str | Path) -> tuple[list[str], str]:
    """Names of the catalogue that a file may be, only GPTs, and how that is known."""
    path = Path(name_or_path)
    if str(name_or_path) in CATALOGUE:
        return _gpts([str(name_or_path)]), "by name"
    if not path.is_file():
        return [], ""
    if record := record_of(path):
        of_record = [name for name, row in CATALOGUE.items() if (row.repo, row.file) == (record.repo, record.file)]
        return _gpts(of_record), "by the record of its download"
    parts = _parts(path)
    if copied := [
        name for name, row in CATALOGUE.items() if parts and record_of(row.path) and _parts(row.path) == parts
    ]:
        return _gpts(copied), "it is a copy of the download"
    return _gpts(named(path.name)), "by its file name only; it has no record of a download"


def _gpts(names: Iterable[str]) -> list[str]:
    return [name for name in names if CATALOGUE[name].cfg_scale is not None]


def _parts(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and checksums of what is in a .pt file, as its end lists them; empty for the older form."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        return [(part.filename, part.file_size, part.CRC) for part in file.infolist()]
    return []
