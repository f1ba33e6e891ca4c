"""Stand-ins for tests and benchmarks: the Inception graph with seeded random weights, and features by formula.

The graph has the layout of classify_image_graph_def.pb, for where the real file is not at hand. Figures measured with it
mean nothing; two implementations that read it must agree. The weights depend on the seed
and their names only.

Each batch norm gets the moments that its input would have if the activations before it were independent normal
variables, so that no layer fades or explodes.
"""

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluations.c2i.graphdef import GraphDef
from utils.files import atomic_path

FLOAT, INT32, STRING, UINT8 = 1, 3, 7, 4  # TensorFlow's dtypes
PRODUCER = 8  # BatchNormWithGlobalNormalization loads from graphs older than version 9 only
EPSILON = 0.001


class Signal(NamedTuple):
    """A node's name, and the mean and variance of each of its channels."""

    node: str
    mean: np.ndarray
    var: np.ndarray


def write_stand_in(path: str | Path, seed: int = 0) -> Path:
    """Write the graph (95.7 MB), atomically; returns its path."""
    content = _Graph(seed).graph.SerializeToString()
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def drawn_features(kind: str, seed: int, n: int, dimensions: int, scale: float, offset: float) -> np.ndarray:
    """float32 (n, dimensions) from raw PCG64 words, so the same anywhere: `integer` ones have ties, `real` ones a factor
    that all values of an item share, and unequal spreads."""
    words = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(n * dimensions)
    uniform = ((words >> np.uint64(40)) * 2.0**-24).reshape(n, dimensions)
    if kind == "integer":
        return (np.floor(uniform * scale) + offset).astype(np.float32)
    spread = scale * (0.25 + 1.5 * np.arange(dimensions) / dimensions)
    return (offset + spread * (2 * uniform - 1) + scale * (uniform[:, :1] - 0.5)).astype(np.float32)


def _dtype(value: np.ndarray | bytes) -> int:
    return STRING if isinstance(value, bytes) else INT32 if value.dtype.kind == "i" else FLOAT


def _fill(tensor: Any, value: np.ndarray | bytes) -> None:
    """Fill a TensorProto: scalars in the typed fields, arrays as raw bytes."""
    tensor.dtype = _dtype(value)
    if isinstance(value, bytes):
        tensor.string_val.append(value)
        return
    for size in value.shape:
        tensor.tensor_shape.dim.add(size=size)
    if value.ndim:
        tensor.tensor_content = value.astype("<i4" if value.dtype.kind == "i" else "<f4").tobytes()
    else:
        (tensor.int_val if value.dtype.kind == "i" else tensor.float_val).append(value.item())


def _rectified(mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of max(x, 0) for normal x."""
    sd = np.sqrt(var)
    z = mean / sd
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z])
    first = mean * below + sd * density
    second = (mean * mean + var) * below + mean * sd * density
    return first, np.maximum(second - first * first, 1e-6)


class _Graph:
    """The nodes, written one after the other while the moments of the signal are carried along."""

    def __init__(self, seed: int) -> None:
        self.seed, self.graph = seed, GraphDef()
        self.graph.versions.producer = PRODUCER
        x = self._head()
        x = self._conv("conv", x, (3, 3), 32, 2, "VALID")
        x = self._conv("conv_1", x, (3, 3), 32, 1, "VALID")
        x = self._conv("conv_2", x, (3, 3), 64)
        x = self._max_pool("pool", x, 2, "VALID")
        x = self._conv("conv_3", x, (1, 1), 80, 1, "VALID")
        x = self._conv("conv_4", x, (3, 3), 192, 1, "VALID")
        x = self._max_pool("pool_1", x, 2, "VALID")
        for block, width in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            x = self._block_of_35(block, x, width)
        x = self._to_17("mixed_3", x)
        for block, width in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            x = self._block_of_17(block, x, width)
        x = self._to_8("mixed_8", x)
        x = self._block_of_8("mixed_9", x, largest=False)
        x = self._block_of_8("mixed_10", x, largest=True)
        self._tail(x)

    def _uniform(self, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        entropy = np.random.SeedSequence([self.seed, zlib.crc32(name.encode())])
        words = np.random.PCG64(entropy).random_raw(math.prod(shape))
        unit = ((words >> np.uint64(40)).astype(np.float64) + 0.5) * 2.0**-24
        return (low + (high - low) * unit).reshape(shape)

    def _node(self, name: str, op: str, *inputs: str, **attrs: Any) -> str:
        """Append a node. Attributes `T`, `dtype` and the like are TensorFlow's numbers of dtypes."""
        node = self.graph.node.add(name=name, op=op, input=inputs)
        for key, given in attrs.items():
            value = node.attr.add(key=key).value
            if key in ("T", "dtype", "SrcT", "DstT"):
                value.type = given
            elif isinstance(given, list):
                value.list.i.extend(given)
            elif isinstance(given, np.ndarray | np.generic | bytes):
                _fill(value.tensor, given)
            else:
                field = {bool: "b", int: "i", float: "f", str: "s"}[type(given)]
                setattr(value, field, given.encode() if isinstance(given, str) else given)
        return name

    def _float(self, name: str, op: str, *inputs: str, **attrs: Any) -> str:
        return self._node(name, op, *inputs, T=FLOAT, **attrs)

    def _const(self, name: str, value: np.ndarray | bytes) -> str:
        return self._node(name, "Const", dtype=_dtype(value), value=value)

    def _guarded(self, name: str, source: str) -> str:
        check = self._float(f"{name}/CheckNumerics", "CheckNumerics", source, message=f"{name} has inf or nan")
        return self._float(f"{name}/control_dependency", "Identity", source, f"^{check}")

    def _conv(
        self, name: str, x: Signal, kernel: tuple[int, int], width: int, stride: int = 1, padding: str = "SAME"
    ) -> Signal:
        """Convolution, batch norm, ReLU."""
        fan_in = kernel[0] * kernel[1] * len(x.mean)
        bound = math.sqrt(6 / fan_in)
        w = self._uniform(f"{name}/conv2d_params", (*kernel, len(x.mean), width), -bound, bound)
        beta = self._uniform(f"{name}/batchnorm/beta", (width,), -0.2, 1.0)
        values = {
            "beta": beta, "gamma": np.ones(width),
            "moving_mean": (w.sum(axis=(0, 1)) * x.mean[:, None]).sum(axis=0),
            "moving_variance": (np.square(w).sum(axis=(0, 1)) * x.var[:, None]).sum(axis=0),
        }  # fmt: skip
        weights = self._const(f"{name}/conv2d_params", w)
        conv = self._float(f"{name}/Conv2D", "Conv2D", x.node, weights, strides=[1, stride, stride, 1], padding=padding)
        names = {key: self._const(f"{name}/batchnorm/{key}", value) for key, value in values.items()}
        order = ("moving_mean", "moving_variance", "beta", "gamma")
        norm = self._float(
            f"{name}/batchnorm", "BatchNormWithGlobalNormalization", conv, *(names[key] for key in order),
            variance_epsilon=EPSILON, scale_after_normalization=False,
        )  # fmt: skip
        self._float(name, "Relu", self._guarded(name, norm))
        return Signal(name, *_rectified(beta, np.ones(width)))

    def _max_pool(self, name: str, x: Signal, stride: int, padding: str) -> Signal:
        shape = {"ksize": [1, 3, 3, 1], "strides": [1, stride, stride, 1], "padding": padding}
        self._node(name, "MaxPool", self._guarded(name, x.node), **shape)
        return Signal(name, x.mean + 0.5 * np.sqrt(x.var), x.var)

    def _average_pool(self, name: str, x: Signal, side: int = 3, padding: str = "SAME") -> Signal:
        self._float(name, "AvgPool", x.node, ksize=[1, side, side, 1], strides=[1, 1, 1, 1], padding=padding)
        return Signal(name, x.mean, x.var)

    def _join(self, block: str, *branches: Signal) -> Signal:
        name = f"{block}/join"
        axis = self._const(f"{name}/concat_dim", np.int32(3))
        self._float(name, "Concat", axis, *(branch.node for branch in branches), N=len(branches))
        return Signal(name, *(np.concatenate([getattr(b, part) for b in branches]) for part in ("mean", "var")))

    def _tower(self, scope: str, x: Signal, *layers: tuple) -> Signal:
        """Convolutions scope/conv, scope/conv_1, ..., each (kernel, width, stride and padding if not 1 and SAME)."""
        for i, layer in enumerate(layers):
            x = self._conv(f"{scope}/conv" + f"_{i}" * (i > 0), x, *layer)
        return x

    def _block_of_35(self, name: str, x: Signal, pooled: int) -> Signal:
        one, three, five = (1, 1), (3, 3), (5, 5)
        return self._join(
            name,
            self._tower(name, x, (one, 64)),
            self._tower(f"{name}/tower", x, (one, 48), (five, 64)),
            self._tower(f"{name}/tower_1", x, (one, 64), (three, 96), (three, 96)),
            self._tower(f"{name}/tower_2", self._average_pool(f"{name}/tower_2/pool", x), (one, pooled)),
        )

    def _to_17(self, name: str, x: Signal) -> Signal:
        three, down = (3, 3), (2, "VALID")
        return self._join(
            name,
            self._tower(name, x, (three, 384, *down)),
            self._tower(f"{name}/tower", x, ((1, 1), 64), (three, 96), (three, 96, *down)),
            self._max_pool(f"{name}/pool", x, *down),
        )

    def _block_of_17(self, name: str, x: Signal, width: int) -> Signal:
        one, row, column = (1, 1), (1, 7), (7, 1)
        return self._join(
            name,
            self._tower(name, x, (one, 192)),
            self._tower(f"{name}/tower", x, (one, width), (row, width), (column, 192)),
            self._tower(f"{name}/tower_1", x, (one, width), (column, width), (row, width), (column, width), (row, 192)),
            self._tower(f"{name}/tower_2", self._average_pool(f"{name}/tower_2/pool", x), (one, 192)),
        )

    def _to_8(self, name: str, x: Signal) -> Signal:
        one, three, down = (1, 1), (3, 3), (2, "VALID")
        return self._join(
            name,
            self._tower(f"{name}/tower", x, (one, 192), (three, 320, *down)),
            self._tower(f"{name}/tower_1", x, (one, 192), ((1, 7), 192), ((7, 1), 192), (three, 192, *down)),
            self._max_pool(f"{name}/pool", x, *down),
        )

    def _block_of_8(self, name: str, x: Signal, largest: bool) -> Signal:
        """The network's last block pools by the largest value, the one before by the average."""
        branches = [self._tower(name, x, ((1, 1), 320))]
        for scope, stem in (("tower", [((1, 1), 384)]), ("tower_1", [((1, 1), 448), ((3, 3), 384)])):
            y = self._tower(f"{name}/{scope}", x, *stem)
            branches += [
                self._conv(f"{name}/{scope}/mixed/conv", y, (1, 3), 384),
                self._conv(f"{name}/{scope}/mixed/conv_1", y, (3, 1), 384),
            ]
        pool = f"{name}/tower_2/pool"
        pooled = self._max_pool(pool, x, 1, "SAME") if largest else self._average_pool(pool, x)
        return self._join(name, *branches, self._tower(f"{name}/tower_2", pooled, ((1, 1), 192)))

    def _head(self) -> Signal:
        """From a JPEG to a standardised image."""
        contents = self._const("DecodeJpeg/contents", b"")
        self._node(
            "DecodeJpeg", "DecodeJpeg", contents, channels=3, ratio=1, fancy_upscaling=True,
            try_recover_truncated=False, acceptable_fraction=1.0,
        )  # fmt: skip
        self._node("Cast", "Cast", "DecodeJpeg", SrcT=UINT8, DstT=FLOAT)
        self._float("ExpandDims", "ExpandDims", "Cast", self._const("ExpandDims/dim", np.int32(0)))
        size = self._const("ResizeBilinear/size", np.array([299, 299], np.int32))
        self._float("ResizeBilinear", "ResizeBilinear", "ExpandDims", size, align_corners=False)
        self._float("Sub", "Sub", "ResizeBilinear", self._const("Sub/y", np.float32(128)))
        self._float("Mul", "Mul", "Sub", self._const("Mul/y", np.float32(1 / 128)))
        return Signal("Mul", np.zeros(3), np.full(3, 0.25))

    def _tail(self, x: Signal) -> None:
        """Pooled features, and a softmax whose weights are orthogonal to their mean, or one class would always win."""
        self._average_pool("pool_3", x, 8, "VALID")
        shape = self._const("pool_3/_reshape/shape", np.array([1, 2048], np.int32))
        self._float("pool_3/_reshape", "Reshape", "pool_3", shape)
        w = self._uniform("softmax/weights", (2048, 1008), -0.4, 0.4)
        along = (w * x.mean[:, None]).sum(axis=0) / np.square(x.mean).sum()
        weights = self._const("softmax/weights", w - x.mean[:, None] * along)
        biases = self._const("softmax/biases", self._uniform("softmax/biases", (1008,), -0.5, 0.5))
        flags = {"transpose_a": False, "transpose_b": False}
        self._float("softmax/logits/MatMul", "MatMul", "pool_3/_reshape", weights, **flags)
        self._float("softmax/logits", "BiasAdd", "softmax/logits/MatMul", biases)
        self._float("softmax", "Softmax", "softmax/logits")
