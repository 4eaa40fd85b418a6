"""Random networks of real operators: every split computes what the whole computes."""

from __future__ import annotations

import dataclasses
import graphlib
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.graphs.onnx_graph import node_inputs
from parnet_export.splitting.split import SplitOptions, split_model
from parnet_export.splitting.work_graph import DeviceModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_export.splitting.split import Split

SIZE = 6
"""Height and width of every map."""


@dataclasses.dataclass
class Text:
    """An ONNX graph as text, with the width of every map it computes."""

    lines: list[str] = dataclasses.field(default_factory=list)
    widths: dict[str, int] = dataclasses.field(default_factory=lambda: {"x": 4})
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def add(self, width: int, operator: str, *reads: str) -> str:
        name = f"t{len(self.widths)}"
        self.lines.append(f"{name} = {operator} ({', '.join(reads)})")
        self.widths[name] = width
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        random = np.random.default_rng(len(self.weights)).standard_normal(shape)
        self.weights[name] = (random / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        return name

    def step(self, kind: str, x: str, y: str) -> None:
        """Add an operator, or a few, that read `x`, and `y` if they take two maps."""
        width = self.widths[x]
        if kind == "Conv":
            self.add(4, "Conv <pads = [1, 1, 1, 1]>", x, self.weight(4, width, 3, 3))
        elif kind == "MaxPool":
            self.add(width, "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>", x)
        elif kind == "Concat":
            self.add(width + self.widths[y], "Concat <axis = 1>", x, y)
        elif kind in {"Add", "Mul"}:
            self.add(width, kind, x, y if self.widths[y] == width else x)
        elif kind == "Split" and width > 1:
            first, second = f"t{len(self.widths)}", f"t{len(self.widths) + 1}"
            halves = [width // 2, width - width // 2]
            self.weights[f"w{len(self.weights)}"] = np.array(halves, np.int64)
            self.lines.append(f"{first}, {second} = Split <axis = 1> ({x}, {[*self.weights][-1]})")
            self.widths |= dict(zip((first, second), halves, strict=True))
        elif kind == "Gate":
            pooled = self._vector("GlobalAveragePool", x)
            gate = self._vector(
                "Sigmoid", self._vector("Conv", pooled, self.weight(width, width, 1, 1))
            )
            self.add(width, "Mul", x, gate)
        else:
            self.add(width, "Relu" if kind == "Split" else kind, x)

    def _vector(self, operator: str, *reads: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {operator} ({', '.join(reads)})")
        return name

    def model(self, outputs: list[str]) -> ir.Model:
        maps = ", ".join(f"float[batch, {self.widths[o]}, {SIZE}, {SIZE}] {o}" for o in outputs)
        proto = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 18]> random '
            f"(float[batch, 4, {SIZE}, {SIZE}] x) => ({maps}) {{ {' '.join(self.lines)} }}"
        )
        proto.graph.initializer.extend(
            onnx.numpy_helper.from_array(values, name) for name, values in self.weights.items()
        )
        return ir.from_proto(proto)


KINDS = ("Add", "Concat", "Conv", "Gate", "MaxPool", "Mul", "Relu", "Sigmoid", "Split")


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    text = Text()
    for _ in range(draw(st.integers(1, 20))):
        names = st.sampled_from([*text.widths])
        text.step(draw(st.sampled_from(KINDS)), draw(names), draw(names))
    computed = [*text.widths][1:]
    chosen = draw(st.sets(st.sampled_from(computed), max_size=3)) | {computed[-1]}
    return text.model(sorted(chosen))


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


def describe(node: ir.Node) -> tuple[str, ...]:
    return (node.op_type, *(str(v and v.name) for v in (*node.inputs, *node.outputs)))


def reads(split: Split) -> dict[str, set[str]]:
    """Who reads from whom, by the nodes of the whole graph."""
    owner = {n.name: name for name, model in split.segments.items() for n in model.graph}
    found: dict[str, set[str]] = {name: set() for name in split.segments}
    for node in split.whole.graph:
        producers = [p for v in node_inputs(node) if (p := v.producer()) is not None]
        found[owner[node.name]] |= {owner[p.name] for p in producers} - {owner[node.name]}
    return found


# Everything costs something, and handing tensors over nothing: all parallelism is worth it.
GREEDY = DeviceModel(flops_per_us=1e3, bytes_per_us=1e3, launch_us=0.5, crossing_us=0)
KEEP_ALL = SplitOptions(min_gain=0, min_region_gain=0, device=GREEDY)

any_options = st.builds(
    SplitOptions,
    min_gain=st.sampled_from([0.0, 0.03]),
    min_region_gain=st.sampled_from([0.0, 0.1]),
    device=st.sampled_from([GREEDY, dataclasses.replace(GREEDY, crossing_us=1), DeviceModel()]),
)


@settings(deadline=None, max_examples=80)
@given(networks(), any_options)
def test_segments_partition_any_network_convexly(model: ir.Model, options: SplitOptions):
    split = split_model(model, options)
    parts = Counter(describe(n) for segment in split.segments.values() for n in segment.graph)
    assert parts == Counter(map(describe, split.whole.graph))
    # A partition of an acyclic graph is convex if and only if its quotient is acyclic.
    assert len([*graphlib.TopologicalSorter(reads(split)).static_order()]) == len(split.segments)
    assert reads(split) == {k: set(v) for k, v in split.stream_graph.predecessors.items()}


@settings(deadline=None, max_examples=50)
@given(networks(), any_options, st.sampled_from([1, 3]))
def test_segments_of_any_network_compute_what_the_whole_computes(
    model: ir.Model, options: SplitOptions, batch: int
):
    split = split_model(model, options)
    random = np.random.default_rng(batch)
    tensors = {"x": random.standard_normal((batch, 4, SIZE, SIZE)).astype(np.float32)}
    expected = run(split.whole, tensors)
    for segment in split.stream_graph.segments:
        tensors |= run(split.segments[segment.name], tensors)
    for name, reference in expected.items():
        difference = np.abs(tensors[name] - reference).max()
        assert difference <= 1e-6 * np.abs(reference).max()


@settings(deadline=None, max_examples=50)
@given(networks())
def test_nothing_but_chains_merges_when_every_gain_counts(model: ir.Model):
    split = split_model(model, KEEP_ALL)
    assert len(split.segments) >= len(split_model(model).segments)
    found = reads(split)
    for name, before in found.items():
        for producer in before:
            readers = {other for other, producers in found.items() if producer in producers}
            assert not (readers == {name} and before == {producer})
