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

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

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
        self.size = [int(n) for n in nodes["ResizeBilinear/size"].attrs["value"]]
        self.shift, self.scale = (float(nodes[name].attrs["value"]) for name in ("Sub/y", "Mul/y"))
        self.layers = _layers(nodes)
        self.register_buffer("weights_PC", torch.tensor(nodes[WEIGHTS].attrs["value"]))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize_tf1(images_BHWC, *self.size) - self.shift) * self.scale
        spatial_BCHW, pool_BP11 = self.layers(x.permute(0, 3, 1, 2))  # channels last in memory
        pool_BP = pool_BP11.flatten(1)
        return pool_BP, pool_BP @ self.weights_PC, spatial_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _layers(nodes: dict[str, Node]) -> GraphModule:
    """The layers from INPUT to SPATIAL and POOL. A GraphModule frees each value after its last use."""
    graph, layers = Graph(), {}
    values = {INPUT: graph.placeholder("x")}

    def source(name: str) -> Node:
        """The node behind Identity and CheckNumerics."""
        node = nodes[name]
        return source(node.inputs[0]) if node.op in PASSED_ON else node

    def value(name: str) -> torch.fx.Node:
        """The value of a node; what it needs is appended to the graph."""
        node = source(name)
        if node.name in values:
            return values[node.name]
        if node.op == "Concat":
            parts = [value(part) for part in node.inputs[1:]]
            values[node.name] = graph.call_function(torch.cat, (parts, 1))
        else:
            if node.op == "Relu":
                norm = source(node.inputs[0])
                conv = source(norm.inputs[0])
                weights, *moments = (source(key).attrs["value"] for key in (conv.inputs[1], *norm.inputs[1:]))
                layers[node.name], before = _convolution(conv, norm, weights, moments), conv.inputs[0]
            else:
                layers[node.name], before = _pool(node), node.inputs[0]
            values[node.name] = graph.call_module(node.name, (value(before),))
        return values[node.name]

    graph.output((value(SPATIAL), value(POOL)))
    return GraphModule(layers, graph)


def _convolution(conv: Node, norm: Node, weights: np.ndarray, moments: list[np.ndarray]) -> nn.Module:
    """Convolution and ReLU; the batch norm, with mean, variance, beta and gamma, is folded in."""
    mean, var, beta, gamma = (part.astype(np.float64) for part in moments)
    factor = 1 / np.sqrt(var + norm.attrs["variance_epsilon"])
    if norm.attrs.get("scale_after_normalization"):
        factor = factor * gamma
    height, width, channels_in, channels = weights.shape
    padding = conv.attrs["padding"].decode().lower()
    layer = nn.Conv2d(channels_in, channels, (height, width), tuple(conv.attrs["strides"][1:3]), padding)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy((weights * factor).transpose(3, 2, 0, 1)))
        layer.bias.copy_(torch.from_numpy(beta - mean * factor))
    return nn.Sequential(layer, nn.ReLU(inplace=True))


def _pool(node: Node) -> nn.Module:
    kernel, stride = (tuple(node.attrs[key][1:3]) for key in ("ksize", "strides"))
    padding = kernel[0] // 2 if node.attrs["padding"] == b"SAME" else 0
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
