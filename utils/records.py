"""The JSON files beside others (run, manifest, samples, download): one validated type each, one reader, one writer."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from utils.cli import InputError
from utils.files import write_json

LARGEST = 1 << 28  # bytes of a record; a manifest of ImageNet has under 1 MB


class Record(BaseModel):
    """Base of what is recorded beside a file. Fields that this version does not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The record in a file. Raises InputError for one that is missing, damaged or of another form."""
        path = Path(path)
        try:
            if path.stat().st_size > LARGEST:
                raise InputError(f"{path} has {path.stat().st_size} bytes; expected a small JSON record: delete it")
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path} is damaged or not a record of this kind ({f'{place}: ' if place else ''}{first['msg']}): "
                "delete it, or restore it from a copy"
            ) from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error})") from None

    @classmethod
    def read_if_present(cls, path: str | Path) -> Self | None:
        """The record in a file; None if there is no file. Raises InputError as read does."""
        return cls.read(path) if Path(path).is_file() else None

    def write(self, path: str | Path) -> None:
        """Write the record as indented JSON, atomically."""
        write_json(path, self.plain())

    def plain(self) -> dict[str, Any]:
        """The record as plain data."""
        return self.model_dump(mode="json")


def read_json(path: str | Path) -> Any:
    """Any JSON file of others, such as a model's config. Raises InputError for one that is missing or damaged."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} has {path.stat().st_size} bytes; expected a small JSON file")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
