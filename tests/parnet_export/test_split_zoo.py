"""The splitter on graphs that are not ParNet, each judged by running it."""

from __future__ import annotations

import graphlib
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.tape import Tape

from parnet_export.onnx_graph import node_inputs
from parnet_export.split import SplitOptions, split_model
from parnet_export.work_graph import DeviceModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from parnet_export.split import Split

# ---------------------------------------------------------------- building


def op(net: Tape, kind: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
    return net.op(kind, inputs, attributes)


def weight(net: Tape, *shape: int) -> ir.Value:
    """Random values of a size that keeps activations near one; made only when read."""
    number = len(net.initializers)
    scale = 1.5 / np.sqrt(max(1, np.prod(shape[1:])))

    def values() -> ir.Tensor:
        random = np.random.default_rng(number)
        return ir.tensor((random.standard_normal(shape) * scale).astype(np.float32))

    tensor = ir.LazyTensor(values, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name="w")
    return net.initializer(tensor, name=f"w{number}")


def conv(
    net: Tape, x: ir.Value, ins: int, outs: int, kernel: int = 3, stride: int = 1
) -> ir.Value:
    w = weight(net, outs, ins, kernel, kernel)
    pads = [kernel // 2] * 4
    y = op(net, "Conv", x, w, weight(net, outs), pads=pads, strides=[stride] * 2)
    return op(net, "Relu", y)


def image(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def build(net: Tape, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    for index, value in enumerate(outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.name = value.name or f"out{index}"
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=net.nodes,
        initializers=net.initializers,
        opset_imports={"": 18},
        name="zoo",
    )
    return ir.Model(graph, ir_version=10)


# ----------------------------------------------------------------- judging


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted), strict=True))


def run_segments(split: Split, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the segments one after another, wired by tensor names."""
    tensors = dict(feeds)
    for segment in split.stream_graph.segments:
        model = split.segments[segment.name]
        assert [v.name for v in model.graph.inputs] == [t.name for t in segment.inputs]
        assert [v.name for v in model.graph.outputs] == [t.name for t in segment.outputs]
        tensors |= run(model, tensors)
    return {output.name: tensors[output.name] for output in split.stream_graph.outputs}


def random_feeds(split: Split, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        tensor.name: random.standard_normal(
            [d if isinstance(d, int) else batch for d in tensor.shape]
        ).astype(tensor.dtype)
        for tensor in split.stream_graph.inputs
    }


def describe_node(node: ir.Node) -> tuple[str, ...]:
    names = [None if value is None else value.name for value in (*node.inputs, *node.outputs)]
    return (str(node.name), node.op_type, *map(str, names))


def assert_sound(split: Split, feeds: Mapping[str, np.ndarray] | None = None) -> None:
    """Segments partition the nodes convexly, and compute what the whole computes."""
    whole = Counter(map(describe_node, split.whole.graph))
    parts = Counter(describe_node(n) for model in split.segments.values() for n in model.graph)
    assert parts == whole

    owner = {n.name: name for name, model in split.segments.items() for n in model.graph}
    before: dict[str, set[str]] = {name: set() for name in split.segments}
    for node in split.whole.graph:
        producers = {v.producer() for v in node_inputs(node)} - {None}
        before[owner[node.name]] |= {owner[p.name] for p in producers} - {owner[node.name]}
    # A partition of an acyclic graph is convex if and only if its quotient is acyclic.
    order = {name: i for i, name in enumerate(graphlib.TopologicalSorter(before).static_order())}
    assert len(order) == len(split.segments)

    feeds = feeds or random_feeds(split)
    expected, actual = run(split.whole, feeds), run_segments(split, feeds)
    assert set(actual) == set(expected)
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape
        difference = np.abs(actual[name] - reference).max(initial=0)
        assert difference <= 1e-6 * np.abs(reference).max(initial=1e-30)


def shape_of(split: Split) -> dict[str, set[str]]:
    """Who reads from whom."""
    return {name: set(before) for name, before in split.stream_graph.predecessors.items()}


def heavy_branches(net: Tape, x: ir.Value, channels: int, kernels: list[int]) -> list[ir.Value]:
    return [conv(net, conv(net, x, channels, channels, k), channels, channels, k) for k in kernels]
