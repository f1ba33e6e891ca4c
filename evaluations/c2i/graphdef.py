"""Read a TensorFlow graph (GraphDef, protobuf's wire format) without TensorFlow: nodes, attributes, constants.

Only what frozen graphs of inference use: `tensorflow/core/framework/{graph,node_def,attr_value,tensor}.proto`.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.cli import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8")}
STRING = 7  # a dtype that has no array


class Node(NamedTuple):
    """A node: `inputs` are names of other nodes without control inputs; a constant's value is `attrs["value"]`."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: dict[str, Any]


def read_graph(path: str | Path) -> dict[str, Node]:
    """All nodes of a GraphDef by name, in the order of the file. Raises InputError for a file that is none."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no graph {path}; expected a GraphDef (.pb)")
    try:
        content = memoryview(path.read_bytes())
        nodes = [_node(value) for field, _, value in _fields(content) if field == 1]
        if not nodes:
            raise ValueError("no nodes")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path} is damaged, truncated or no TensorFlow graph ({error})") from None
    return {node.name: node for node in nodes}


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number and where the next thing starts."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value) of a message; a value is an int, or a view of bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(kind)
            if size is None:
                if kind != BYTES:
                    raise ValueError(f"wire type {kind}")
                size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("ends early")
            value, at = data[at : at + size], at + size
        yield field, kind, value


def _text(data: memoryview) -> str:
    return bytes(data).decode()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _ints(kind: int, value: Any) -> list[int]:
    """Whole numbers of a repeated field: one of them, or all packed into bytes."""
    if kind == VARINT:
        return [_signed(value)]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(_signed(number))
    return found


def _node(data: memoryview) -> Node:
    name = op = ""
    inputs, attrs = [], {}
    for field, _, value in _fields(data):
        if field == 1:
            name = _text(value)
        elif field == 2:
            op = _text(value)
        elif field == 3:
            inputs.append(_text(value))
        elif field == 5:
            entry = {key: part for key, _, part in _fields(value)}
            attrs[_text(entry[1])] = _attribute(entry[2])
    return Node(name, op, tuple(i.removesuffix(":0") for i in inputs if not i.startswith("^")), attrs)


def _attribute(data: memoryview) -> Any:
    """A list of ints, bytes, an int, a float, a bool, a dtype's number, or a tensor; None for what is none of these."""
    for field, kind, value in _fields(data):
        if field == 1:
            return [number for key, k, part in _fields(value) if key == 3 for number in _ints(k, part)]
        if field == 2:
            return bytes(value)
        if field == 3:
            return _signed(value)
        if field == 4 and kind == FIXED32:
            return struct.unpack("<f", value)[0]
        if field in (5, 6):
            return bool(value) if field == 5 else value
        if field == 8:
            return _tensor(value)
    return None


def _tensor(data: memoryview) -> np.ndarray | bytes:
    """A constant; values given one by one may be fewer than the shape holds, and then the last one is repeated."""
    dtype, shape, raw, listed, text = 0, (), None, [], b""
    for field, kind, value in _fields(data):
        if field == 1:
            dtype = value
        elif field == 2:
            shape = tuple(_dim(part) for key, _, part in _fields(value) if key == 2)
        elif field == 4:
            raw = value
        elif field == 5:
            listed.extend(np.frombuffer(value, "<f4").tolist())
        elif field in (7, 10):
            listed.extend(_ints(kind, value))
        elif field == 8:
            text = bytes(value)
    if dtype == STRING:
        return text
    kind = DTYPES[dtype]
    if raw is not None and len(raw):
        return np.frombuffer(raw, kind).reshape(shape)
    size = int(np.prod(shape))
    if not listed and size:
        raise ValueError("a constant without values")
    return np.array(listed + listed[-1:] * (size - len(listed)), kind).reshape(shape)


def _dim(data: memoryview) -> int:
    return next((_signed(value) for field, _, value in _fields(data) if field == 1), 0)
