"""The splitter on graphs that are not ParNet, each judged by running it."""

from __future__ import annotations

import graphlib
import itertools
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.tape import Tape

from parnet_export.graphs.onnx_graph import node_inputs
from parnet_export.splitting.split import split_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_export.splitting.split import Split

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


def conv(net: Tape, x: ir.Value, ins: int, outs: int, kernel: int = 3, stride: int = 1) -> ir.Value:
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
    # Fusions differ between a graph and its parts; without them both run the same operators.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
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


def reads(split: Split) -> dict[str, set[str]]:
    """Who reads from whom."""
    return {name: set(before) for name, before in split.stream_graph.predecessors.items()}


def ancestors(split: Split, name: str) -> set[str]:
    direct = reads(split)[name]
    return direct.union(*(ancestors(split, before) for before in direct))


# --------------------------------------------------------------------- zoo


def blocks(net: Tape, x: ir.Value, width: int, count: int = 2) -> ir.Value:
    for _ in range(count):
        x = conv(net, x, width, width)
    return x


def upsample(net: Tape, x: ir.Value) -> ir.Value:
    scales = ir.tensor(np.array([1, 1, 2, 2], np.float32))
    constant = net.initializer(scales, name=f"scales{len(net.initializers)}")
    return op(net, "Resize", x, None, constant, mode="nearest")


def test_the_branches_of_inception_blocks_are_streams():
    net, x = Tape(), image("x", 2, 64, 28, 28)
    width, y = 192, conv(net, x, 64, 192)
    for _ in range(2):
        pooled = op(net, "MaxPool", y, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
        branches = [
            conv(net, y, width, 64, 1),
            conv(net, conv(net, y, width, 96, 1), 96, 128, 3),
            conv(net, conv(net, y, width, 16, 1), 16, 32, 5),
            conv(net, pooled, width, 32, 1),
        ]
        width, y = 256, op(net, "Concat", *branches, axis=1)
    split = split_model(build(net, [x], [op(net, "GlobalAveragePool", y)]))
    first, second = {f"stream{i}" for i in (1, 2, 3, 4)}, {f"stream{i}" for i in (5, 6, 7, 8)}
    assert reads(split) == {
        "stem": set(),
        **{name: {"stem"} for name in first},
        "fusion": first,
        **{name: {"fusion"} for name in second},
        "head": second,
    }
    operators = [[n.op_type for n in model.graph] for model in split.segments.values()]
    assert operators.count(["MaxPool", "Conv", "Relu"]) == 2
    assert_sound(split)


def test_the_heads_of_a_feature_pyramid_run_in_parallel():
    width = 64
    net, x = Tape(), image("x", 1, 3, 128, 128)
    levels = [conv(net, conv(net, x, 3, 32, stride=2), 32, width, stride=2)]
    for i in range(3):
        down = conv(net, levels[-1], width << i, width << i + 1, stride=2)
        levels.append(conv(net, down, width << i + 1, width << i + 1))
    _, c3, c4, c5 = levels
    p5 = conv(net, c5, 8 * width, 128, 1)
    p4 = conv(net, op(net, "Add", conv(net, c4, 4 * width, 128, 1), upsample(net, p5)), 128, 128)
    p3 = conv(net, op(net, "Add", conv(net, c3, 2 * width, 128, 1), upsample(net, p4)), 128, 128)
    n4 = op(net, "Concat", conv(net, p3, 128, 128, stride=2), p4, axis=1)
    n4 = conv(net, n4, 256, 128)
    n5 = conv(net, op(net, "Concat", conv(net, n4, 128, 128, stride=2), p5, axis=1), 256, 128)
    outputs = [
        op(net, "Conv", blocks(net, level, 128), weight(net, 85, 128, 1, 1))
        for level in (p3, n4, n5)
    ]
    split = split_model(build(net, [x], outputs))
    heads = [segment for segment in split.stream_graph.segments if segment.name.startswith("head")]
    assert sorted(head.name for head in heads) == ["head1", "head2", "head3"]
    for head in heads:  # numbered like the outputs of the network
        assert [tensor.name for tensor in head.outputs] == [f"out{int(head.name[-1]) - 1}"]
    for one in heads:
        assert not {other.name for other in heads} & set(ancestors(split, one.name))
    assert_sound(split)


def test_the_resolutions_of_an_exchange_run_in_parallel():
    width, count = 32, 3
    net, x = Tape(), image("x", 1, 3, 112, 112)
    maps = [conv(net, conv(net, x, 3, width, stride=2), width, width)]
    for i in range(1, count):
        maps.append(conv(net, maps[-1], width << i - 1, width << i, stride=2))
    for _ in range(2):
        for i, y in enumerate(maps):
            for _ in range(4):
                inner = conv(net, conv(net, y, width << i, width << i), width << i, width << i)
                y = op(net, "Relu", op(net, "Add", y, inner))  # noqa: PLW2901 - residual blocks
            maps[i] = y
        maps = [exchange(net, maps, width, i) for i in range(count)]
    pooled = [op(net, "GlobalAveragePool", y) for y in maps]
    split = split_model(build(net, [x], [op(net, "Concat", *pooled, axis=1)]))

    def width_of_work(name: str) -> int:
        """Most common number of output channels among a segment's convolutions."""
        convs = [n for n in split.segments[name].graph if n.op_type == "Conv"]
        return Counter(n.outputs[0].shape[1] for n in convs).most_common(1)[0][0]

    macs = {s.name: s.cost.macs for s in split.stream_graph.segments}
    heavy = [name for name, count in macs.items() if count > sum(macs.values()) / 10]
    # Three resolutions before the first exchange and three after it.
    assert sorted(map(width_of_work, heavy)) == [32, 32, 64, 64, 128, 128]
    before, after = heavy[:3], heavy[3:]
    for stage in (before, after):
        assert len(set(map(width_of_work, stage))) == 3
        for one, other in itertools.permutations(stage, 2):
            assert other not in ancestors(split, one)
    for name in after:
        assert set(before) <= ancestors(split, name)
    assert_sound(split)


def exchange(net: Tape, maps: list[ir.Value], width: int, target: int) -> ir.Value:
    """Sum all maps at the resolution of one of them."""
    total = maps[target]
    for i, y in enumerate(maps):
        part = y
        if i > target:
            part = op(net, "Conv", part, weight(net, width << target, width << i, 1, 1))
            for _ in range(i - target):
                part = upsample(net, part)
        for k in range(i, target):
            part = conv(net, part, width << k, width << k + 1, stride=2)
        if i != target:
            total = op(net, "Add", total, part)
    return op(net, "Relu", total)


def test_a_plain_chain_is_one_segment_and_says_so():
    net, x = Tape(), image("x", "batch", 3, 32, 32)
    split = split_model(build(net, [x], [blocks(net, conv(net, x, 3, 16), 16, 5)]))
    assert reads(split) == {"trunk": set()}
    assert split.notes == ("no parallel branch found: the network stays in one segment",)
    assert_sound(split)


def resnet(counts: tuple[int, ...], *, bottleneck: bool, pixels: int = 224) -> ir.Model:
    net, x = Tape(), image("x", 1, 3, pixels, pixels)
    y = conv(net, x, 3, 64, 7, stride=2)
    y = op(net, "MaxPool", y, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    ins = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        outs = 4 * width if bottleneck else width
        for index in range(count):
            stride = 2 if stage and not index else 1
            if bottleneck:
                inner = conv(net, conv(net, y, ins, width, 1), width, width, 3, stride)
                inner = op(net, "Conv", inner, weight(net, outs, width, 1, 1), weight(net, outs))
            else:
                inner = conv(net, y, ins, width, 3, stride)
                w = weight(net, outs, width, 3, 3)
                inner = op(net, "Conv", inner, w, weight(net, outs), pads=[1] * 4)
            if ins != outs or stride != 1:
                w = weight(net, outs, ins, 1, 1)
                y = op(net, "Conv", y, w, weight(net, outs), strides=[stride] * 2)
            y, ins = op(net, "Relu", op(net, "Add", inner, y)), outs
    y = op(net, "Flatten", op(net, "GlobalAveragePool", y))
    return build(
        net, [x], [op(net, "Gemm", y, weight(net, 1000, ins), weight(net, 1000), transB=1)]
    )


@pytest.mark.parametrize(
    ("counts", "bottleneck", "depth", "gflops"),
    [((3, 4, 6, 3), False, 34, 7.33), ((3, 4, 6, 3), True, 50, 8.18)],
    ids=["ResNet-34", "ResNet-50"],
)
def test_a_residual_network_is_one_segment_of_its_published_size(
    counts: tuple[int, ...], bottleneck: bool, depth: int, gflops: float
):
    split = split_model(resnet(counts, bottleneck=bottleneck))
    (segment,) = split.stream_graph.segments
    assert segment.name == "trunk"
    assert segment.cost.depth == depth
    assert segment.cost.flops / 1e9 == pytest.approx(gflops, abs=0.005)
    assert split.notes[0].startswith("no parallel branch is worth a segment of its own")
    assert split.notes[0].endswith("branches are kept from 3.0% on")
    assert_sound(split)


def test_nested_forks_give_stems_within_stems():
    net, x = Tape(), image("x", "batch", 64, 28, 28)
    start = conv(net, x, 64, 64)
    halves = []
    for _ in range(2):
        fork = blocks(net, start, 64)
        leaves = [blocks(net, fork, 64) for _ in range(2)]
        halves.append(conv(net, op(net, "Add", *leaves), 64, 64))
    split = split_model(build(net, [x], [conv(net, op(net, "Concat", *halves, axis=1), 128, 64)]))
    assert reads(split) == {
        "stem1": set(),
        "stem2": {"stem1"},
        "stem3": {"stem1"},
        "stream1": {"stem2"},
        "stream2": {"stem2"},
        "stream3": {"stem3"},
        "stream4": {"stem3"},
        "fusion1": {"stream1", "stream2"},
        "fusion2": {"stream3", "stream4"},
        "head": {"fusion1", "fusion2"},
    }
    assert_sound(split)


def test_a_wheatstone_bridge_keeps_its_five_resistors():
    net, x = Tape(), image("x", 1, 64, 28, 28)
    start = blocks(net, x, 64)
    left, right = blocks(net, start, 64), blocks(net, start, 64)
    upper = blocks(net, left, 64)
    lower = blocks(net, op(net, "Add", left, right), 64)
    split = split_model(build(net, [x], [blocks(net, op(net, "Add", upper, lower), 64)]))
    assert reads(split) == {
        "stem1": set(),
        "stem2": {"stem1"},
        "stream1": {"stem1"},
        "stream2": {"stem2"},
        "fusion": {"stem2", "stream1"},
        "head": {"stream2", "fusion"},
    }
    assert_sound(split)


def test_a_weight_shared_by_two_streams_is_in_both_and_stored_once():
    net, x = Tape(), image("x", 1, 64, 28, 28)
    shared, y = weight(net, 64, 64, 3, 3), blocks(net, x, 64, 1)
    ends = [
        blocks(net, op(net, "Conv", y if i else op(net, "Neg", y), shared, pads=[1] * 4), 64)
        for i in range(2)
    ]
    split = split_model(build(net, [x], [blocks(net, op(net, "Add", *ends), 64, 1)]))
    holders = [m for m in split.segments.values() if shared.name in m.graph.initializers]
    assert len(holders) == 2
    first, second = (model.graph.initializers[shared.name].const_value for model in holders)
    assert first is second is shared.const_value
    assert_sound(split)


def test_a_tensor_that_is_output_and_inner_edge_is_provided_once():
    net, x = Tape(), image("x", 1, 64, 28, 28)
    y = blocks(net, x, 64)
    ends = [blocks(net, y, 64) for _ in range(2)]
    joined = blocks(net, op(net, "Add", *ends), 64, 1)
    split = split_model(build(net, [x], [joined, ends[0], y]))
    assert reads(split) == {
        "stem": set(),
        "stream1": {"stem"},
        "stream2": {"stem"},
        "head": {"stream1", "stream2"},
    }
    outputs = [t.name for s in split.stream_graph.segments for t in s.outputs]
    assert len(outputs) == len(set(outputs)) == 4
    assert [t.name for t in split.stream_graph.outputs] == ["out0", "out1", "out2"]
    assert split.stream_graph["stem"].outputs[0].name == "out2"
    assert_sound(split)


def test_branches_may_start_at_the_input_itself():
    net, x = Tape(), image("x", "batch", 64, 28, 28)
    ends = [blocks(net, x, 64) for _ in range(3)]
    split = split_model(build(net, [x], [blocks(net, op(net, "Sum", *ends), 64, 1)]))
    streams = {"stream1", "stream2", "stream3"}
    assert reads(split) == {**{name: set() for name in streams}, "head": streams}
    assert_sound(split)


def test_each_input_goes_to_the_segments_that_read_it():
    net, x, z = Tape(), image("x", 1, 64, 28, 28), image("z", 1, 64, 14, 14)
    ends = [blocks(net, x, 64), upsample(net, blocks(net, z, 64))]
    split = split_model(build(net, [x, z], [blocks(net, op(net, "Add", *ends), 64, 1)]))
    assert [t.name for t in split.stream_graph["stream1"].inputs] == ["x"]
    assert [t.name for t in split.stream_graph["stream2"].inputs] == ["z"]
    assert_sound(split)


def test_independent_networks_in_one_graph_are_heads_of_their_own():
    net, x, z = Tape(), image("x", 1, 64, 28, 28), image("z", 1, 64, 28, 28)
    split = split_model(build(net, [x, z], [blocks(net, z, 64), blocks(net, x, 64)]))
    assert reads(split) == {"head1": set(), "head2": set()}
    assert [t.name for t in split.stream_graph["head1"].inputs] == ["z"]
    assert_sound(split)


def test_a_leftover_beside_the_network_gets_no_segment_of_its_own():
    net, x = Tape(), image("x", 1, 64, 28, 28)
    ends = [blocks(net, x, 64) for _ in range(2)]
    peak = op(net, "ReduceMax", x, keepdims=0)
    split = split_model(build(net, [x], [blocks(net, op(net, "Add", *ends), 64, 1), peak]))
    assert len(split.segments) == 3
    assert_sound(split)


def test_a_branch_of_an_if_captures_what_another_segment_computes():
    net, x = Tape(), image("x", 1, 64, 28, 28)
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    left, right = blocks(net, x, 64), blocks(net, x, 64)
    shared = weight(net, 64, 64, 3, 3)
    bodies = []
    for kind, captured in (("Conv", left), ("Abs", right)):
        inner = Tape()
        factors = [captured, shared] if kind == "Conv" else [captured]
        y = op(inner, kind, *factors, **({"pads": [1] * 4} if kind == "Conv" else {}))
        y.name, y.shape = f"{kind}_out", ir.Shape([1, 64, 28, 28])
        y.type = ir.TensorType(ir.DataType.FLOAT)
        bodies.append(ir.Graph([], [y], nodes=inner.nodes, name=kind))
    chosen = op(net, "If", flag, then_branch=bodies[0], else_branch=bodies[1])
    split = split_model(build(net, [x, flag], [blocks(net, chosen, 64, 1)]))
    assert reads(split) == {"stream1": set(), "stream2": set(), "head": {"stream1", "stream2"}}
    assert shared.name in split.segments["head"].graph.initializers
    for value in (True, False):
        assert_sound(split, random_feeds(split) | {"flag": np.array(value)})
