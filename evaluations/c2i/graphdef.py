"""Read a TensorFlow graph (GraphDef, a protobuf message) without TensorFlow: nodes, attributes, constants.

Only what frozen graphs of inference use: `tensorflow/core/framework/{graph,node_def,attr_value,tensor}.proto`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from utils.cli import InputError

# message: its fields, each with number, name, and type; `*` marks repeated ones. A map is a repeated pair.
SCHEMA = {
    "GraphDef": ((1, "node", "NodeDef*"), (4, "versions", "Versions")),
    "Versions": ((1, "producer", "int32"),),
    "NodeDef": ((1, "name", "string"), (2, "op", "string"), (3, "input", "string*"), (5, "attr", "Attr*")),
    "Attr": ((1, "key", "string"), (2, "value", "AttrValue")),
    "AttrValue": (
        (1, "list", "ListValue"), (2, "s", "bytes"), (3, "i", "int64"), (4, "f", "float"), (5, "b", "bool"),
        (6, "type", "int32"), (8, "tensor", "TensorProto"),
    ),
    "ListValue": ((3, "i", "int64*"),),
    "TensorProto": (
        (1, "dtype", "int32"), (2, "tensor_shape", "Shape"), (4, "tensor_content", "bytes"), (5, "float_val", "float*"),
        (7, "int_val", "int32*"), (8, "string_val", "bytes*"), (10, "int64_val", "int64*"),
    ),
    "Shape": ((2, "dim", "Dim*"),),
    "Dim": ((1, "size", "int64"),),
}  # fmt: skip
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8")}
STRING = 7  # a dtype that has no array
LARGEST = 1 << 26  # values of a constant; Inception's largest has two million


def _graph_class() -> type[Message]:
    """Python's class of the message GraphDef."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="graph", syntax="proto2")
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, field_name, kind in fields:
            label = types.LABEL_REPEATED if kind.endswith("*") else types.LABEL_OPTIONAL
            field, plain = message.field.add(name=field_name, number=number, label=label), kind.removesuffix("*")
            if plain in SCHEMA:
                field.type, field.type_name = types.TYPE_MESSAGE, f".graph.{plain}"
            else:
                field.type = types.Type.Value(f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("graph.GraphDef"))


GraphDef = _graph_class()


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
        nodes = [_node(node) for node in GraphDef.FromString(path.read_bytes()).node]
        if not nodes:
            raise ValueError("no nodes")
    except (DecodeError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged, truncated or no TensorFlow graph ({error})") from None
    return {node.name: node for node in nodes}


def _node(node: Message) -> Node:
    inputs = tuple(name.removesuffix(":0") for name in node.input if not name.startswith("^"))
    return Node(node.name, node.op, inputs, {attr.key: _attribute(attr.value) for attr in node.attr})


def _attribute(value: Message) -> Any:
    """A list of ints, bytes, an int, a float, a bool, a dtype's number, or a tensor; None for what is none of these."""
    for field, content in value.ListFields():
        if field.name == "list":
            return list(content.i)
        return _tensor(content) if field.name == "tensor" else content
    return None


def _tensor(tensor: Message) -> np.ndarray | bytes:
    """A constant; values given one by one may be fewer than the shape holds, and then the last one is repeated."""
    if tensor.dtype == STRING:
        return b"".join(tensor.string_val)
    kind, shape = DTYPES[tensor.dtype], tuple(dim.size for dim in tensor.tensor_shape.dim)
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, kind).reshape(shape)
    values = [*tensor.float_val, *tensor.int_val, *tensor.int64_val]
    size = int(np.prod(shape, dtype=object))
    if (size and not values) or not len(values) <= size <= LARGEST:
        raise ValueError(f"a constant of shape {shape} with {len(values)} values")
    return np.array(values + values[-1:] * (size - len(values)), kind).reshape(shape)
