"""A copy of an exported program (`.pt2`) that torch can load without running code that the file holds.

torch.export.load unpickles some entries of such a file, evaluates the formulas of its sizes and looks its operators up by
name, so a foreign file can run anything. Here the file is read as data: what a feature network needs is copied, every
name in it is compared with a list, and the rest is left out or refused.
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Entries that are copied.
KEPT = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|models/model\.json|extra/name|"
    r"data/(weights|constants)/(model_\w+_config\.json|(weight|tensor)_\d+)"
)
MODEL, SAMPLE_INPUTS = "models/model.json", "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
PAYLOAD = re.compile(r"(weight|tensor)_\d+")  # raw numbers; other entries are pickles
ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
OPERATORS = re.compile(
    r"torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)|"
    r"torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)|"
    r"_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
SIZE = re.compile(  # a formula of sizes, as sympy writes it
    r"([\s+\-*/%(),=]|\b\d{1,9}\b|'[a-z]+\d+'|\b(Symbol|Integer|Add|Mul|Pow|Mod|PythonMod|FloorDiv|CleanDiv|Min|Max|"
    r"ceiling|floor|positive|nonnegative|integer|real|finite|True|False|oo|int_oo|[a-z]\d+)\b)*"
)
POWER = re.compile(r"Pow\(|\*\*")  # a power of powers takes for ever
TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict")


class NotPlain(ValueError):
    """The file holds more than numbers and a graph of torch's own operators."""


def plain_copy(path: str | Path) -> io.BytesIO:
    """The file of an exported program with nothing in it that could run. Raises NotPlain for one that is not plain.

    A damaged file raises what zipfile and json raise.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source:
        entries = {info.filename.partition("/")[2]: info for info in source.infolist()}
        if MODEL not in entries:
            raise ValueError(f"it holds no {MODEL}")
        for name, info in entries.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise NotPlain(f"{name} is compressed")
            if info.file_size != info.compress_size:
                raise ValueError(f"{name} has two sizes")
        if SAMPLE_INPUTS in entries:
            _check_tensors(source.read(entries[SAMPLE_INPUTS]))
        with zipfile.ZipFile(copy, "w") as target:
            for name, info in entries.items():
                content = source.read(info)  # compares the checksum, which torch does not
                if not KEPT.fullmatch(name):
                    continue
                if name == MODEL:
                    content = _plain_model(json.loads(content))
                elif name in CONFIGS:
                    _check_payload(json.loads(content), {entry: part.file_size for entry, part in entries.items()})
                target.writestr(f"archive/{name}", content)
            target.writestr(f"archive/{SAMPLE_INPUTS}", b"")
    copy.seek(0)
    return copy


def _check_tensors(content: bytes) -> None:
    """Sample inputs are no part of the copy; a file with others than tensors is refused all the same."""
    if content:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:
            raise NotPlain("its sample inputs hold Python objects, which could run commands") from None


def _check_payload(config: Any, sizes: dict[str, int]) -> None:
    for name, value in config["config"].items():
        path = value["path_name"]
        if value["use_pickle"] is not False or not PAYLOAD.fullmatch(path):
            raise NotPlain(f"{path} holds a Python object, which could run commands")
        values = math.prod(size["as_int"] for size in value["tensor_meta"]["sizes"])
        if values > sizes[f"data/{'weights' if path.startswith('weight') else 'constants'}/{path}"]:
            raise ValueError(f"{name} has {values} values, more than {path} holds bytes")
    _check_names(config)


def _plain_model(model: Any) -> bytes:
    """model.json, checked, without notes on where a graph comes from and without checks in Python's text."""
    model["guards_code"] = []
    _check_names(model)
    return json.dumps(model).encode()


def _check_names(value: Any) -> None:
    for holder, key in _keys(value):
        item = holder[key]
        if key == "metadata":
            holder[key] = {}
        elif key in ("target", "as_operator") and isinstance(item, str) and not _is_plain_operator(item):
            raise NotPlain(f"it calls {item[:60]}, which is none of torch's operators on tensors")
        elif key == "expr_str" and not (isinstance(item, str) and _is_plain_size(item)):
            raise NotPlain(f"a size in it is {str(item)[:60]}")
        elif key in ("in_spec", "out_spec") and any(
            tree[name] not in TREE_TYPES for tree, name in _keys(json.loads(item or "null")) if name == "type"
        ):
            raise NotPlain("its inputs or outputs are of other types than tensors in tuples, lists and dicts")


def _is_plain_operator(name: str) -> bool:
    """Whether a name is that of an operator on numbers and tensors, which reads and writes no file."""
    if match := ATEN.fullmatch(name):
        operator = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
        return isinstance(operator, torch._ops.OpOverload) and all(
            argument.name != "filename" for argument in operator._schema.arguments
        )
    return bool(OPERATORS.fullmatch(name))


def _is_plain_size(formula: str) -> bool:
    return len(formula) < 2000 and bool(SIZE.fullmatch(formula)) and (
        len(POWER.findall(formula)) == 0 or (len(POWER.findall(formula)) == 1 and not re.search(r"\d{4}", formula))
    )  # fmt: skip


def _keys(value: Any) -> Iterator[tuple[dict, str]]:
    """Every dict in plain data, with each of its keys."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            for key in list(item):
                yield item, key
                waiting.append(item[key])
        elif isinstance(item, list):
            waiting.extend(item)
