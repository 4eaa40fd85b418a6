"""ParNet splits into its seven segments, and what a split promises about its graphs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.tape import Tape

from parnet_export.cost import graph_cost
from parnet_export.errors import InputError
from parnet_export.split import SplitOptions, split_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_export.split import Split

SEVEN = ("stem1", "stem2", "stream1", "stream2", "stream3", "fusion", "head")


@dataclasses.dataclass(frozen=True)
class Config:
    """A ParNet-shaped network; widths of the first block, the streams and the last block."""

    widths: tuple[int, int, int, int, int]
    resolution: int = 224
    blocks: tuple[int, int, int] = (4, 5, 5)
    classes: int = 1000
    batch: int | str = 1
    activation: str = "silu"
    tiny_images: bool = False


S = Config((64, 96, 192, 384, 1280))
M = Config((64, 128, 256, 512, 2048))
L = Config((64, 160, 320, 640, 2560))
XL = Config((64, 200, 400, 800, 3200))
SMALL = Config((32, 32, 64, 128, 256), resolution=64, classes=10)
CIFAR = Config(
    (16, 16, 32, 64, 80), resolution=32, blocks=(3, 4, 4), classes=10, tiny_images=True
)


class Builder:
    """Writes operators one after another; node names start with the part they belong to."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.part = ""
        self._tape = Tape()
        self._numbers = itertools.count()

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        name = f"{self.part}/{kind}_{next(self._numbers)}"
        value = self._tape.op(kind, inputs, attributes, name=name)
        value.name = f"{name}:0"
        return value

    def outputs(self, kind: str, x: ir.Value, count: int, **attributes: object) -> list[ir.Value]:
        name = f"{self.part}/{kind}_{next(self._numbers)}"
        values = self._tape.op_multi_out(kind, [x], attributes, num_outputs=count, name=name)
        for index, value in enumerate(values):
            value.name = f"{name}:{index}"
        return list(values)

    def weight(self, *shape: int, centre: float = 0.0) -> ir.Value:
        number = next(self._numbers)
        scale = 1.5 / np.sqrt(max(1, np.prod(shape[1:])))

        def values() -> ir.Tensor:
            random = np.random.default_rng(number)
            return ir.tensor((centre + scale * random.standard_normal(shape)).astype(np.float32))

        tensor = ir.LazyTensor(values, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name="w")
        return self._tape.initializer(tensor, name=f"weight_{number}")

    def integers(self, *values: int) -> ir.Value:
        return self._tape.initializer(
            ir.tensor(np.array(values, np.int64)), name=f"integers_{next(self._numbers)}"
        )

    def conv(self, x: ir.Value, ins: int, outs: int, k: int = 3, stride: int = 1, groups: int = 1):
        weights = (self.weight(outs, ins // groups, k, k), self.weight(outs))
        pads, strides = [k // 2] * 4, [stride] * 2
        return self.op("Conv", x, *weights, pads=pads, strides=strides, group=groups)

    def norm(self, x: ir.Value, width: int) -> ir.Value:
        affine = [self.weight(width, centre=c) for c in (1.0, 0.0, 0.0, 3.0)]
        return self.op("BatchNormalization", x, *affine)

    def act(self, x: ir.Value) -> ir.Value:
        if self.config.activation == "relu":
            return self.op("Relu", x)
        return self.op("Mul", x, self.op("Sigmoid", x))

    def pooled(self, x: ir.Value, ins: int, outs: int, groups: int = 1) -> ir.Value:
        return self.conv(self.op("GlobalAveragePool", x), ins, outs, 1, groups=groups)

    def double_sigmoid(self, x: ir.Value) -> ir.Value:
        two = self._tape.initializer(
            ir.tensor(np.float32(2)), name=f"two_{next(self._numbers)}"
        )
        return self.op("Mul", self.op("Sigmoid", x), two)

    def down(self, x: ir.Value, ins: int, outs: int, stride: int = 2) -> ir.Value:
        y = self.conv(x, ins, outs, stride=stride)
        return self.act(self.op("Mul", y, self.double_sigmoid(self.pooled(x, ins, outs))))

    def block_repvgg(self, x: ir.Value, width: int) -> ir.Value:
        y, u = self.conv(x, width, width), self.norm(x, width)
        gate = self.op("Sigmoid", self.pooled(u, width, width))
        return self.act(self.op("Add", y, self.op("Mul", u, gate)))

    def block_full(self, x: ir.Value, width: int) -> ir.Value:
        y = self.conv(x, width, width)
        gate = self.op("Sigmoid", self.pooled(x, width, width))
        scale = self.op("Mul", gate, self.weight(1, width, 1, 1, centre=1.0))
        shift = self.op("Mul", gate, self.weight(1, width, 1, 1))
        return self.act(self.op("Add", self.op("Add", y, self.op("Mul", scale, x)), shift))

    def interleave(self, x: ir.Value, width: int, size: int) -> ir.Value:
        x = self.op("Reshape", x, self.integers(-1, 2, width // 2, size, size))
        x = self.op("Transpose", x, perm=[0, 2, 1, 3, 4])
        return self.op("Reshape", x, self.integers(-1, width, size, size))

    def fusion_repvgg(
        self, a: ir.Value, b: ir.Value, ins: int, outs: int, size: int, stride: int
    ) -> ir.Value:
        x = self.interleave(self.op("Concat", a, b, axis=1), 2 * ins, size)
        y = self.conv(x, 2 * ins, outs, stride=stride, groups=2)
        y = self.op("Mul", y, self.double_sigmoid(self.pooled(x, 2 * ins, outs, groups=2)))
        return self.interleave(self.act(y), outs, size // stride)

    def contribution(
        self, y: ir.Value, ins: int, outs: int, stride: int
    ) -> tuple[ir.Value, ir.Value]:
        shifted = self.op("Add", y, self.weight(1, ins, 1, 1))
        gate = self.pooled(y, ins, outs, groups=2)
        return self.conv(shifted, ins, outs, stride=stride, groups=2), gate

    def fusion_full(
        self, a: tuple[ir.Value, ir.Value], b: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        gate = self.double_sigmoid(self.op("Add", a[1], b[1]))
        return self.act(self.op("Mul", self.op("Add", a[0], b[0]), gate))

    def model(self, image: ir.Value, logits: ir.Value) -> ir.Model:
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [image],
            [logits],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": 18},
            name="parnet",
        )
        return ir.Model(graph, ir_version=10)


def build(config: Config, level: str) -> ir.Model:
    """Build a network whose node names start with the segment they should end up in."""
    net = Builder(config)
    full = level == "full"
    block = net.block_full if full else net.block_repvgg
    first, *widths, last = config.widths
    image = ir.Value(
        name="image",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([config.batch, 3, config.resolution, config.resolution]),
    )

    net.part = "stem1"
    size = config.resolution
    if config.tiny_images:
        x = net.down(image, 3, first, stride=1)
        for _ in range(2):
            x = block(x, first)
    else:
        x = net.down(net.down(image, 3, first), first, widths[0])
        size //= 4
    starts = [x]
    for name, before, after in zip(("stem2", "stream3"), widths, widths[1:], strict=False):
        net.part = name
        starts.append(net.down(starts[-1], before, after))

    ends = []
    for index, (x, width, count) in enumerate(zip(starts, widths, config.blocks, strict=True)):
        net.part = f"stream{index + 1}"
        for _ in range(count):
            x = block(x, width)  # noqa: PLW2901 - the stream's running tensor
        if index == 0:
            x = net.down(x, widths[0], widths[1])  # noqa: PLW2901
        ends.append(x)
    lower, upper, deep = ends

    fused = None
    for a, b, names, width, size, stride in (
        (upper, lower, ("stream2", "stream1", "fusion"), widths[1], size // 2, 2),
        (deep, None, ("stream3", "fusion", "head"), widths[2], size // 4, 1),
    ):
        b = fused if b is None else b  # noqa: PLW2901
        parts = []
        for name, value in zip(names, (a, b), strict=False):
            net.part = name
            if full:
                parts.append(net.contribution(value, width, widths[2], stride))
            else:
                parts.append(net.norm(value, width))
        net.part = names[2]
        if full:
            fused = net.fusion_full(*parts)
            if stride == 2:
                quarters = net.outputs("Split", fused, 4, axis=1, num_outputs=4)
                order = [quarters[i] for i in (0, 2, 1, 3)]
                fused = net.op("Concat", *order, axis=1)
        else:
            fused = net.fusion_repvgg(*parts, width, widths[2], size, stride)

    stride = 1 if config.tiny_images else 2
    y = net.op("GlobalAveragePool", net.down(fused, widths[2], last, stride))
    weights = (net.weight(config.classes, last), net.weight(config.classes))
    return net.model(image, net.op("Gemm", net.op("Flatten", y), *weights, transB=1))


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted), strict=True))


def parts_of(split: Split) -> dict[str, set[str]]:
    """Which parts of the builder's network ended up in each segment."""
    return {
        name: {str(node.name).partition("/")[0] for node in model.graph}
        for name, model in split.segments.items()
    }
