"""The Inception network of 2015 that published figures are measured with, from its graph file, without TensorFlow.

`classify_image_graph_def.pb` (Szegedy et al., arXiv 1512.00567, as used by FID's authors and ADM) is read node by node;
the layout is checked, the weights are the file's. What a port gets wrong easily is as in the graph: TensorFlow 1's
bilinear resize (no half-pixel centres), (x - 128) / 128, averages that leave the padding out, a maximum in the last
block's pool, epsilon 0.001, logits without biases. Batch norms are folded into the convolutions in float64.

B batch, H, W image, P = 2048 pooled features, S = 2023 spatial features, C = 1008 classes.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.c2i.features import FeatureNetwork
from evaluations.c2i.graphdef import Node, read_graph
from utils.cli import InputError
from utils.files import sha256

PARAMETERS = 23_885_411  # TensorFlow's summarize_graph says so of the real file, and these counts
OPS = {
    "Const": 489, "CheckNumerics": 99, "Identity": 99, "Conv2D": 94, "Relu": 94, "BatchNormWithGlobalNormalization": 94,
    "Concat": 11, "AvgPool": 9, "MaxPool": 5, "DecodeJpeg": 1, "Cast": 1, "ExpandDims": 1, "ResizeBilinear": 1,
    "Sub": 1, "Mul": 1, "Reshape": 1, "MatMul": 1, "BiasAdd": 1, "Softmax": 1,
}  # fmt: skip
INPUT, POOL, SPATIAL, WEIGHTS = "Mul", "pool_3", "mixed_6/conv", "softmax/weights"
SPATIAL_CHANNELS = 7
POOL_SIZE, SPATIAL_SIZE, CLASSES = 2048, 17 * 17 * SPATIAL_CHANNELS, 1008
PASSED_ON = ("Identity", "CheckNumerics")
BACKENDS = ("torch", "tensorflow")


def read_inception(path: str | Path) -> dict[str, Node]:
    """The graph's nodes. Raises InputError for a file that does not have the layout of the Inception graph of 2015."""
    nodes = read_graph(path)
    ops = dict(Counter(node.op for node in nodes.values()))
    parameters = sum(np.size(node.attrs.get("value")) for node in nodes.values() if node.op == "Const")
    if ops != OPS or parameters != PARAMETERS or not {INPUT, POOL, SPATIAL, WEIGHTS} <= set(nodes):
        raise InputError(
            f"{path} is not the Inception graph of 2015: {len(nodes)} nodes and {parameters:,} parameters, expected "
            f"{sum(OPS.values())} and {PARAMETERS:,}; get classify_image_graph_def.pb again"
        )
    return nodes


def resize_tf1(images_BHWC: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize as TensorFlow 1 does it (align_corners and half_pixel_centers off), bit for bit; float32."""
    x = images_BHWC.float()
    for axis, size in ((2, width), (1, height)):
        low, high, fraction = _taps(x.shape[axis], size, x.device)
        first = x.index_select(axis, low)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        x = first + (x.index_select(axis, high) - first) * fraction.view(shape)
    return x


def _taps(size_in: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output position the two input positions beside it, and how far it is from the first (float32)."""
    position = np.arange(size, dtype=np.float32) * (np.float32(size_in) / np.float32(size))
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, size_in - 1)
    return tuple(torch.from_numpy(part).to(device) for part in (low, high, position - low.astype(np.float32)))


class Inception(nn.Module):
    """Images (B, H, W, 3), 0..255 -> pooled features (B, P), logits without biases (B, C), spatial features (B, S).

    Spatial features are the first 7 channels of mixed_6/conv, flattened in (y, x, channel) order.
    """

    def __init__(self, nodes: dict[str, Node]) -> None:
        super().__init__()
        self.nodes, self.layers = nodes, nn.ModuleList()
        self.steps: list[tuple[str, list[str], nn.Module | None]] = []  # output, inputs, a layer or None to join them
        self._planned = {INPUT}
        for name in (SPATIAL, POOL):
            self._plan(name)
        self.last_use = {name: i for i, (_, inputs, _) in enumerate(self.steps) for name in inputs}
        self.size = [int(n) for n in nodes["ResizeBilinear/size"].attrs["value"]]
        self.shift, self.scale = (float(nodes[name].attrs["value"]) for name in ("Sub/y", "Mul/y"))
        self.register_buffer("weights_PC", torch.tensor(nodes[WEIGHTS].attrs["value"]))
        del self.nodes, self._planned
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize_tf1(images_BHWC, *self.size) - self.shift) * self.scale
        values = {INPUT: x.permute(0, 3, 1, 2)}  # channels last in memory
        for i, (name, inputs, layer) in enumerate(self.steps):
            found = [values[key] for key in inputs]
            values[name] = torch.cat(found, dim=1) if layer is None else layer(found[0])
            if name == SPATIAL:
                spatial_BS = values[name][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            for key in inputs:
                if self.last_use[key] == i:
                    values.pop(key, None)
        pool_BP = values[POOL].flatten(1)
        return pool_BP, pool_BP @ self.weights_PC, spatial_BS

    def _plan(self, name: str) -> str:
        """Append the steps that a node's value needs; returns the name that the value goes by."""
        node = self.nodes[name]
        while node.op in PASSED_ON:
            node = self.nodes[node.inputs[0]]
        if node.name in self._planned:
            return node.name
        if node.op == "Relu":
            norm = self._behind(node.inputs[0], "BatchNormWithGlobalNormalization")
            conv = self._behind(norm.inputs[0], "Conv2D")
            layer, sources = self._convolution(conv, norm), conv.inputs[:1]
        elif node.op in ("MaxPool", "AvgPool"):
            layer, sources = _pool(node), node.inputs
        elif node.op == "Concat":
            layer, sources = None, node.inputs[1:]
        else:
            raise InputError(f"the Inception graph has a {node.op} node {node.name} where none is expected")
        inputs = [self._plan(source) for source in sources]
        if layer is not None:
            self.layers.append(layer)
        self.steps.append((node.name, inputs, layer))
        self._planned.add(node.name)
        return node.name

    def _behind(self, name: str, op: str) -> Node:
        """The node behind Identity and CheckNumerics; InputError if it is another than expected."""
        node = self.nodes[name]
        while node.op in PASSED_ON:
            node = self.nodes[node.inputs[0]]
        if node.op != op:
            raise InputError(f"the Inception graph has a {node.op} node {node.name} where {op} is expected")
        return node

    def _value(self, name: str) -> np.ndarray:
        return np.asarray(self._behind(name, "Const").attrs["value"], np.float64)

    def _convolution(self, conv: Node, norm: Node) -> nn.Module:
        """Convolution and ReLU, the batch norm folded in."""
        weights = self._value(conv.inputs[1])  # (height, width, in, out)
        mean, var, beta, gamma = (self._value(name) for name in norm.inputs[1:])
        factor = 1 / np.sqrt(var + norm.attrs["variance_epsilon"])
        if norm.attrs.get("scale_after_normalization"):
            factor = factor * gamma
        kernel, stride = weights.shape[:2], conv.attrs["strides"][1:3]
        layer = ConvReLU(weights.shape[2], weights.shape[3], kernel, stride, _padding(conv, kernel, stride))
        folded = (weights * factor).transpose(3, 2, 0, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(folded))
            layer.bias.copy_(torch.from_numpy(beta - mean * factor))
        return layer


class ConvReLU(nn.Conv2d):
    """A convolution and a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


def _padding(node: Node, kernel: Any, stride: Any) -> tuple[int, int]:
    """Rows and columns of padding on each side; SAME is symmetric where kernels are odd and the stride is 1."""
    if node.attrs["padding"] == b"VALID":
        return 0, 0
    if any(k % 2 == 0 for k in kernel) or any(s != 1 for s in stride):
        raise InputError(f"the Inception graph has SAME padding in {node.name} where none is expected")
    return kernel[0] // 2, kernel[1] // 2


def _pool(node: Node) -> nn.Module:
    kernel, stride = (tuple(node.attrs[key][1:3]) for key in ("ksize", "strides"))
    padding = _padding(node, kernel, stride)
    if node.op == "MaxPool":
        return nn.MaxPool2d(kernel, stride, padding)
    return nn.AvgPool2d(kernel, stride, padding, count_include_pad=False)


def load_inception(path: str | Path, device: torch.device | str = "cpu", backend: str = "torch") -> FeatureNetwork:
    """The network, run by one of two backends: torch, or TensorFlow, which runs the graph itself on the CPU.

    It takes images of any size. Raises InputError for a wrong file, and for `tensorflow` where it is not installed.
    """
    path, device = Path(path), torch.device(device)
    nodes = read_inception(path)
    run = Inception(nodes).to(device) if backend == "torch" else _in_tensorflow(path, nodes[WEIGHTS].attrs["value"])
    return FeatureNetwork(
        name="Inception", path=path, sha256=sha256(path), dimensions=POOL_SIZE, classes=CLASSES, device=device, run=run,
        spatial_dimensions=SPATIAL_SIZE, backend=backend, batch_size=32 if device.type == "cpu" else 128,
    )  # fmt: skip


def _in_tensorflow(path: Path, weights_PC: np.ndarray) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A session on the CPU: TensorFlow and torch do not share a GPU well."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow.compat.v1 as tf
    except ImportError as error:
        raise InputError(f"--backend tensorflow needs TensorFlow: pip install tensorflow ({error})") from None
    graph, definition = tf.Graph(), tf.GraphDef()
    definition.ParseFromString(path.read_bytes())
    with graph.as_default():
        images = tf.placeholder(tf.float32, (None, None, None, 3))  # the file says a batch of 1
        outputs = tf.import_graph_def(
            definition, {"ExpandDims:0": images}, return_elements=[f"{POOL}:0", f"{SPATIAL}:0"], name=""
        )
    threads = torch.get_num_threads()
    config = tf.ConfigProto(
        device_count={"GPU": 0}, intra_op_parallelism_threads=threads, inter_op_parallelism_threads=1
    )
    session = tf.Session(graph=graph, config=config)

    def run(images_NHWC: Tensor) -> tuple[Tensor, ...]:
        pool, spatial = session.run(outputs, {images: images_NHWC.cpu().numpy().astype(np.float32)})
        pool_NP = pool.reshape(len(pool), -1)
        spatial_NS = spatial[..., :SPATIAL_CHANNELS].reshape(len(spatial), -1)
        return tuple(torch.from_numpy(part) for part in (pool_NP, pool_NP @ weights_PC, spatial_NS))

    return run
