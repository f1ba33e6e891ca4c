"""The reader of graphs: every way to write a value, and files that are none."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluations.c2i.graphdef import read_graph
from utils.cli import InputError


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = b""
    while value >= 128:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def message(*fields: tuple[int, object]) -> bytes:
    """Fields (number, value): ints as varints, floats as 4 bytes, bytes and text with their length."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number * 8 + 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number * 8) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number * 8 + 2) + varint(len(value)) + value
    return out


def node(name: str, op: str, *inputs: str, **attrs: bytes) -> bytes:
    entries = [(5, message((1, key), (2, value))) for key, value in attrs.items()]
    return message((1, message((1, name), (2, op), *((3, i) for i in inputs), *entries)))


def constant(dtype: int, shape: tuple[int, ...], *values: tuple[int, object]) -> bytes:
    dims = [(2, message((1, size))) for size in shape]
    return node("c", "Const", value=message((8, message((1, dtype), (2, message(*dims)), *values))))


@pytest.fixture
def read(tmp_path):
    def call(content: bytes):
        (tmp_path / "graph.pb").write_bytes(content)
        return read_graph(tmp_path / "graph.pb")

    return call


def test_nodes_and_attributes(read):
    content = node("a", "Placeholder", T=message((6, 1)))
    content += node(
        "b/c", "Conv", "a:0", "^a", "d", strides=message((1, message((3, varint(1) + varint(2))))),
        ksize=message((1, message((3, 3), (3, 4)))), padding=message((2, "SAME")), n=message((3, -5)),
        epsilon=message((4, 0.5)), flag=message((5, 1)),
    )  # fmt: skip
    nodes = read(content + message((4, message((1, 8)))))
    assert list(nodes) == ["a", "b/c"]
    assert nodes["a"].attrs == {"T": 1}
    found = nodes["b/c"]
    assert (found.op, found.inputs) == ("Conv", ("a", "d"))
    assert found.attrs == {
        "strides": [1, 2], "ksize": [3, 4], "padding": b"SAME", "n": -5, "epsilon": 0.5, "flag": True,
    }  # fmt: skip


@given(st.integers(-(2**63), 2**63 - 1))
def test_whole_numbers(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "number.pb"
    path.write_bytes(node("a", "X", n=message((3, value))))
    assert read_graph(path)["a"].attrs["n"] == value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (constant(1, (2, 3), (4, np.arange(6, dtype="<f4").tobytes())), np.arange(6, dtype=np.float32).reshape(2, 3)),
        (constant(3, (2,), (4, np.array([-7, 9], "<i4").tobytes())), np.array([-7, 9], np.int32)),
        (constant(1, (), (5, 2.5)), np.float32(2.5)),
        (constant(1, (3,), (5, 2.5)), np.full(3, 2.5, np.float32)),  # the last value is repeated
        (constant(1, (4,), (5, np.array([1, 2], "<f4").tobytes())), np.array([1, 2, 2, 2], np.float32)),
        (constant(3, (), (7, -4)), np.int32(-4)),
        (constant(3, (3,), (7, varint(1) + varint(-2))), np.array([1, -2, -2], np.int32)),
        (constant(1, (0,)), np.zeros(0, np.float32)),
    ],
)  # fmt: skip
def test_constants(read, content, expected):
    found = read(content)["c"].attrs["value"]
    assert found.dtype == np.asarray(expected).dtype and found.shape == np.shape(expected)
    assert np.array_equal(found, expected)


def test_a_constant_of_text(read):
    assert read(constant(7, (), (8, b"abc")))["c"].attrs["value"] == b"abc"


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"\x0a\xff", node("a", "X")[:-1], constant(1, (2,)), constant(99, (), (5, 1.0)), b"\x0b\x01"],
)
def test_what_is_no_graph(read, content):
    with pytest.raises(InputError, match=r"graph\.pb is damaged, truncated or no TensorFlow graph"):
        read(content)


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"there is no graph .*x\.pb"):
        read_graph(tmp_path / "x.pb")
