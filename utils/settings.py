"""One class a stage is the only source of its settings: command line, range checks, record, comparison on resume.

    class SampleSettings(Settings):
        cfg_scale: AtLeastOne = setting(1.5, "classifier-free guidance; 1 is off")
        batch_size: PositiveInt = setting(32, "images at once", free=True)  # may change when the work is resumed

    settings = SampleSettings.from_command_line(__doc__)

Field names are flags with underscores. A list takes several values, `bool = False` is a switch, `bool | None = None`
has a --no- form, and a field with `positional=True` has no dashes.
"""

import argparse
import os
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Interval
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined
from typing_extensions import Self

from utils import cli

LARGEST = 2**31 - 1  # of a count: an upper limit of counts
LARGEST_SIDE = 8192  # of an image, in pixels; samples files hold no larger ones
LARGEST_SEED = 2**63 - 1
METAVARS = {int: "N", float: "X", Path: "PATH"}


def _existing(kind: str, test: Callable[[Path], bool]) -> AfterValidator:
    def check(path: Path) -> Path:
        try:
            found = test(path)
        except (OSError, ValueError):  # a name too long, a NUL byte
            found = False
        if not found:
            raise ValueError(f"there is no {kind} {path}")
        return path

    return AfterValidator(check)


PositiveInt = Annotated[int, Interval(ge=1, le=LARGEST), "a whole number from 1 to 2**31 - 1"]
ImageSize = Annotated[int, Interval(ge=1, le=LARGEST_SIDE), f"a whole number from 1 to {LARGEST_SIDE}"]
Count = Annotated[int, Interval(ge=0, le=LARGEST), "a whole number from 0 to 2**31 - 1"]
Seed = Annotated[int, Interval(ge=0, le=LARGEST_SEED), "a whole number from 0 to 2**63 - 1"]
Positive = Annotated[float, Interval(gt=0), "a number above 0"]
AtLeastOne = Annotated[float, Interval(ge=1), "a number of at least 1 (1 is off)"]
NonNegative = Annotated[float, Interval(ge=0), "a number of at least 0"]
Fraction = Annotated[float, Interval(ge=0, le=1), "a number in [0, 1]"]
FractionBelowOne = Annotated[float, Interval(ge=0, lt=1), "a number in [0, 1)"]
PositiveFraction = Annotated[float, Interval(gt=0, le=1), "a number in (0, 1]"]
ExistingFile = Annotated[Path, _existing("file", Path.is_file)]
ExistingFolder = Annotated[Path, _existing("folder", Path.is_dir)]


def one_of(names: Collection[str]) -> Any:
    """The type of a choice between names, such as the keys of a table of presets."""
    return Literal[tuple(names)]


def setting(
    default: Any = PydanticUndefined,
    help: str = "",
    *,
    free: bool = False,
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """A field of a Settings class; without a default the flag is required.

    free: the setting may change when work is resumed, because it does not change what is made.
    """
    extra = {"free": free, "positional": positional, "metavar": metavar}
    return Field(default, description=help, json_schema_extra=extra, validate_default=False)


class Settings(BaseModel):
    """The settings of a stage, immutable and checked. Equal settings make equal work."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_command_line(cls, doc: str, arguments: Sequence[str] | None = None) -> Self:
        """Parse the command line (or `arguments`); doc: a module's docstring, its first line describes the command.

        A wrong value ends the process with one line and exit status 2.
        """
        parser = cli.Parser(doc.strip().splitlines()[0])
        cls.add_flags(parser)
        return cls.from_namespace(parser, parser.parse_args(arguments))

    @classmethod
    def from_namespace(cls, parser: argparse.ArgumentParser, given: argparse.Namespace) -> Self:
        """The settings of a parsed command line; a wrong value is an error of the parser."""
        values = {name: value for name, value in vars(given).items() if name in cls.model_fields}
        for name, value in values.items():
            texts = value if isinstance(value, list) else [value]
            if texts == [] and not cls._is_positional(name):  # argparse makes an empty list of `--flag=--`
                parser.error(f"argument {cls._flag(name)}: expected one argument")
            if "" in texts:
                parser.error(
                    f"argument {cls._flag(name)}: expected a value, got an empty text (an unset shell variable?)"
                )
            if any(str(text).startswith("~/") for text in texts):  # no shell expands it in --flag=~/folder
                texts = [os.path.expanduser(text) for text in texts]  # noqa: PTH111 (text stays text)
                values[name] = texts if isinstance(value, list) else texts[0]
        try:
            return cls.checked(**values)
        except cli.InputError as error:
            parser.error(str(error))
        except UnicodeEncodeError as error:
            parser.error(f"{error.object!r} is not UTF-8 text: give another name")
        except OSError as error:  # such as a name that is too long
            parser.error(cli.explain(error))

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """The settings of these values. Raises InputError: the line that a command line would give."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise cli.InputError(cls._one_line(error)) from None

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for each field to a parser. Values stay text; the class checks them."""
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra or {}
            kind, _ = _plain_type(field.annotation)
            help = field.description or ""
            options: dict[str, Any] = {"help": help.replace("%", "%%"), "default": argparse.SUPPRESS}
            if not field.is_required() and field.default not in (None, False, []):
                shown = field.default
                shown = " ".join(map(str, shown)) if isinstance(shown, list) else shown
                options["help"] += f"{' ' if help else ''}(default: {str(shown).replace('%', '%%')})"
            if kind is bool:
                switch = field.default is False
                options["action"] = "store_true" if switch else argparse.BooleanOptionalAction
            else:
                if get_origin(kind) is list:
                    options["nargs"] = "*" if extra.get("positional") and not field.is_required() else "+"
                    kind, _ = _plain_type(get_args(kind)[0])
                if get_origin(kind) is Literal:
                    options["choices"] = get_args(kind)
                elif metavar := extra.get("metavar"):
                    options["metavar"] = metavar
                elif kind in METAVARS and not extra.get("positional"):
                    options["metavar"] = METAVARS[kind]
            if extra.get("positional"):
                if "nargs" not in options and not field.is_required():
                    options["nargs"] = "?"
                parser.add_argument(name, **options)
            else:
                required = {"required": True} if field.is_required() else {}
                parser.add_argument(f"--{name.replace('_', '-')}", **options, **required)

    @classmethod
    def _one_line(cls, error: ValidationError) -> str:
        """The first mistake: which flag, what was expected, what was given."""
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            return message
        name = str(first["loc"][0])
        field = cls.model_fields.get(name)
        if first["type"] != "value_error":
            _, metadata = _plain_type(field.annotation) if field else (None, ())
            kinds = (*(field.metadata if field else ()), *metadata)
            wanted = next((text for text in kinds if isinstance(text, str)), None)
            message = f"expected {wanted}" if wanted else message.replace("Input should be", "expected", 1)
            given = first["input"]
            message += f", got {given}" if isinstance(given, int | float) or _is_number(given) else f", got {given!r}"
        return f"argument {cls._flag(name)}: {message}"

    @classmethod
    def _is_positional(cls, name: str) -> bool:
        field = cls.model_fields.get(name)
        return bool(field and (field.json_schema_extra or {}).get("positional"))

    @classmethod
    def _flag(cls, name: str) -> str:
        """What the command line calls a field."""
        return name if cls._is_positional(name) else f"--{name.replace('_', '-')}"

    @classmethod
    def free(cls) -> frozenset[str]:
        """The names of the settings that may change when work is resumed."""
        return frozenset(name for name, f in cls.model_fields.items() if (f.json_schema_extra or {}).get("free"))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The defaults of the fields that have one, as plain data: what work was done with that was recorded without them."""
        fields = {
            name: f.default for name, f in cls.model_fields.items() if not f.is_required() and f.default is not None
        }
        return cls.model_construct(**fields).model_dump(mode="json", include=fields.keys())

    def plain(self) -> dict[str, Any]:
        """The settings as plain data: numbers, strings, lists and None; paths are strings."""
        return self.model_dump(mode="json")


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    ignore: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """`lr 0.0001, now 0.0002` for each value that is recorded otherwise than it is now.

    ignore: names that may differ. defaults: the values of names that an older version did not record. Other values that only
    one side has are passed over.
    """
    old = {**defaults, **old}
    keys = [key for key in new if key in old and key not in ignore and old[key] != new[key]]
    return [f"{key} {_short(old[key])}, now {_short(new[key])}" for key in keys]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def _plain_type(annotation: Any) -> tuple[Any, tuple]:
    """A field's type without `| None` and Annotated, and what Annotated says of it, or of a list's items."""
    metadata: tuple = ()
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += tuple(more)
        elif get_origin(annotation) in (Union, types.UnionType):
            kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
            if len(kinds) != 1:
                return str, metadata
            annotation = kinds[0]
        elif get_origin(annotation) is list:
            return annotation, metadata + _plain_type(get_args(annotation)[0])[1]
        else:
            return annotation, metadata
