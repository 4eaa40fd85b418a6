"""ParNet splits into its seven segments, at both fuse levels, in every size."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.tape import Tape

from parnet_export.graphs.cost import graph_cost
from parnet_export.splitting.split import split_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_export.splitting.split import Split

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
CIFAR = Config((16, 16, 32, 64, 80), resolution=32, blocks=(3, 4, 4), classes=10, tiny_images=True)


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
        """Random values, made only when read; kernels keep the scale of what they map."""
        number = next(self._numbers)
        scale = 1.5 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.2

        def values() -> ir.Tensor:
            random = np.random.default_rng(number)
            return ir.tensor((centre + scale * random.standard_normal(shape)).astype(np.float32))

        tensor = ir.LazyTensor(values, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name="w")
        return self._tape.initializer(tensor, name=f"weight_{number}")

    def integers(self, *values: int) -> ir.Value:
        return self._tape.initializer(
            ir.tensor(np.array(values, np.int64)), name=f"integers_{next(self._numbers)}"
        )

    def conv(
        self, x: ir.Value, ins: int, outs: int, *, stride: int = 1, groups: int = 1
    ) -> ir.Value:
        weights = (self.weight(outs, ins // groups, 3, 3), self.weight(outs))
        return self.op("Conv", x, *weights, pads=[1] * 4, strides=[stride] * 2, group=groups)

    def norm(self, x: ir.Value, width: int) -> ir.Value:
        affine = [self.weight(width, centre=c) for c in (1.0, 0.0, 0.0, 3.0)]
        return self.op("BatchNormalization", x, *affine)

    def act(self, x: ir.Value) -> ir.Value:
        if self.config.activation == "relu":
            return self.op("Relu", x)
        return self.op("Mul", x, self.op("Sigmoid", x))

    def pooled(self, x: ir.Value, ins: int, outs: int, groups: int = 1) -> ir.Value:
        w = self.weight(outs, ins // groups, 1, 1)
        return self.op("Conv", self.op("GlobalAveragePool", x), w, group=groups)

    def double_sigmoid(self, x: ir.Value) -> ir.Value:
        two = self._tape.initializer(ir.tensor(np.float32(2)), name=f"two_{next(self._numbers)}")
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

    def fusion_full(self, a: tuple[ir.Value, ir.Value], b: tuple[ir.Value, ir.Value]) -> ir.Value:
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
    block = net.block_full if level == "full" else net.block_repvgg
    first, *widths, last = config.widths
    image = ir.Value(
        name="image",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([config.batch, 3, config.resolution, config.resolution]),
    )
    net.part = "stem1"
    if config.tiny_images:
        size, stride_of_last = config.resolution, 1
        start = block(block(net.down(image, 3, first, stride=1), first), first)
    else:
        size, stride_of_last = config.resolution // 4, 2
        start = net.down(net.down(image, 3, first), first, widths[0])
    starts = [start]
    for name, ins, outs in (("stem2", *widths[:2]), ("stream3", *widths[1:])):
        net.part = name
        starts.append(net.down(starts[-1], ins, outs))

    ends = []
    for index, (x, width, count) in enumerate(zip(starts, widths, config.blocks, strict=True)):
        net.part = f"stream{index + 1}"
        end = x
        for _ in range(count):
            end = block(end, width)
        ends.append(net.down(end, *widths[:2]) if index == 0 else end)

    fuse = _fuse_full if level == "full" else _fuse_repvgg
    fused = fuse(net, {"stream2": ends[1], "stream1": ends[0]}, "fusion", widths[1:], size // 2, 2)
    widths = [widths[2], widths[2]]
    fused = fuse(net, {"stream3": ends[2], "fusion": fused}, "head", widths, size // 4, 1)
    y = net.op("GlobalAveragePool", net.down(fused, widths[1], last, stride_of_last))
    weights = (net.weight(config.classes, last), net.weight(config.classes))
    return net.model(image, net.op("Gemm", net.op("Flatten", y), *weights, transB=1))


def _fuse_repvgg(
    net: Builder, inputs: dict[str, ir.Value], name: str, widths: list[int], size: int, stride: int
) -> ir.Value:
    normed = []
    for net.part, value in inputs.items():
        normed.append(net.norm(value, widths[0]))
    net.part = name
    return net.fusion_repvgg(*normed, *widths, size, stride)


def _fuse_full(
    net: Builder, inputs: dict[str, ir.Value], name: str, widths: list[int], size: int, stride: int
) -> ir.Value:
    parts = []
    for net.part, value in inputs.items():
        parts.append(net.contribution(value, *widths, stride))
    net.part = name
    fused = net.fusion_full(*parts)
    if name == "head":
        return fused
    quarters = net.outputs("Split", fused, 4, axis=1, num_outputs=4)
    return net.op("Concat", *(quarters[i] for i in (0, 2, 1, 3)), axis=1)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Fusions differ between a graph and its parts; without them both run the same operators.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted), strict=True))


def run_segments(split: Split, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = dict(feeds)
    for segment in split.stream_graph.segments:
        tensors |= run(split.segments[segment.name], tensors)
    return {output.name: tensors[output.name] for output in split.stream_graph.outputs}


def parts_of(split: Split) -> dict[str, set[str]]:
    """Which parts of the builder's network ended up in each segment."""
    return {
        name: {str(node.name).partition("/")[0] for node in model.graph}
        for name, model in split.segments.items()
    }


# ------------------------------------------------------------------ ParNet


def pairwise_networks() -> list[Config]:
    """Every pair of size and resolution, batch and activation, once or more."""
    batches, activations = itertools.cycle([1, 7, "batch", 2]), itertools.cycle(["silu", "relu"])
    return [
        dataclasses.replace(
            size, resolution=pixels, batch=next(batches), activation=next(activations)
        )
        for size in (S, M, L, XL)
        for pixels in (224, 256, 320)
    ]


def all_networks() -> list[Config]:
    return [
        dataclasses.replace(size, resolution=pixels, batch=batch, activation=activation)
        for size in (S, M, L, XL)
        for pixels in (224, 256, 320)
        for batch in (1, 2, 7, "batch")
        for activation in ("silu", "relu")
    ]


def tiny_networks() -> list[Config]:
    sizes = (SMALL, CIFAR, dataclasses.replace(CIFAR, widths=(112, 112, 224, 448, 560)))
    return [dataclasses.replace(size, batch=batch) for size in sizes for batch in (1, 7, "batch")]


def assert_seven_segments(config: Config, level: str) -> Split:
    split = split_model(build(config, level))
    assert parts_of(split) == {name: {name} for name in SEVEN}
    assert tuple(s.name for s in split.stream_graph.segments) == SEVEN
    assert split.stream_graph.predecessors == {
        "stem1": (),
        "stem2": ("stem1",),
        "stream1": ("stem1",),
        "stream2": ("stem2",),
        "stream3": ("stem2",),
        "fusion": ("stream2", "stream1"),
        "head": ("stream3", "fusion"),
    }
    return split


@pytest.mark.parametrize("level", ["repvgg", "full"])
@pytest.mark.parametrize("config", pairwise_networks() + tiny_networks(), ids=str)
def test_parnet_splits_into_its_seven_segments(config: Config, level: str):
    assert_seven_segments(config, level)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["repvgg", "full"])
@pytest.mark.parametrize("config", all_networks(), ids=str)
def test_parnet_splits_into_its_seven_segments_in_every_combination(config: Config, level: str):
    assert_seven_segments(config, level)


def test_streams_hold_their_own_part_of_a_distributed_fusion():
    split = assert_seven_segments(M, "full")
    shapes = {
        (edge.producer, edge.consumer, edge.tensor.shape) for edge in split.stream_graph.edges
    }
    for producer, consumer in (
        ("stream1", "fusion"),
        ("stream2", "fusion"),
        ("stream3", "head"),
        ("fusion", "head"),
    ):
        # The downsampled map and its gate cross, not the stream's wider output.
        assert (producer, consumer, (1, 512, 14, 14)) in shapes
        assert (producer, consumer, (1, 512, 1, 1)) in shapes
    assert len(split.stream_graph.edges) == 4 * 2 + 4


@pytest.mark.parametrize(
    ("config", "parameters", "gflops"),
    [
        (S, 19_177_032, 9.674),
        (M, 35_576_616, 17.164),
        (L, 54_914_824, 26.648),
        (XL, 84_962_784, 41.431),
    ],
    ids=["S", "M", "L", "XL"],
)
def test_counts_are_the_published_ones(config: Config, parameters: int, gflops: float):
    split = split_model(build(config, "repvgg"))
    cost = graph_cost(split.whole)
    assert cost.parameters == parameters
    assert cost.flops / 1e9 == pytest.approx(gflops, abs=1e-3)
    assert cost.depth == 12
    segments = [segment.cost for segment in split.stream_graph.segments]
    assert sum(c.parameters for c in segments) == cost.parameters
    assert sum(c.macs for c in segments) == cost.macs
    assert sum(c.nodes for c in segments) == cost.nodes
    depths = {segment.name: segment.cost.depth for segment in split.stream_graph.segments}
    path = ("stem1", "stem2", "stream3", "head")
    assert sum(depths[name] for name in path) == cost.depth


@pytest.mark.parametrize("level", ["repvgg", "full"])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_segments_run_one_after_another_are_the_whole(level: str, batch: int, activation: str):
    config = dataclasses.replace(SMALL, batch="batch", activation=activation, blocks=(1, 2, 2))
    split = assert_seven_segments(config, level)
    random = np.random.default_rng(batch)
    feeds = {"image": random.standard_normal((batch, 3, 64, 64)).astype(np.float32)}
    expected, actual = run(split.whole, feeds)["logits"], run_segments(split, feeds)["logits"]
    assert expected.std() > 1e-3
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()


def test_a_dynamic_batch_keeps_its_name_on_every_boundary():
    for level in ("repvgg", "full"):
        split = split_model(build(dataclasses.replace(S, batch="batch"), level))
        tensors = [t for s in split.stream_graph.segments for t in (*s.inputs, *s.outputs)]
        assert {tensor.shape[0] for tensor in tensors} == {"batch"}
        assert {d for t in tensors for d in t.shape[1:] if isinstance(d, str)} == set()


def test_a_split_of_parnet_takes_less_than_a_second():
    model = build(L, "full")
    started = time.process_time()
    split_model(model)
    assert time.process_time() - started < 1
