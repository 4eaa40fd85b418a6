"""Split any ONNX graph into segments that can run in parallel.

The splitter knows no network. It counts what each operator costs, clusters the
operators (`parnet_export.splitting.clustering`), and makes one graph of each cluster. Segments
keep the tensor names of the whole graph and share its weights.
"""

from __future__ import annotations

import graphlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from parnet_export.graphs.cost import graph_cost, node_cost, size_bytes
from parnet_export.graphs.onnx_graph import (
    constant_values,
    is_transferable,
    node_inputs,
    prepare,
    tensor_spec,
)
from parnet_export.splitting.clustering import cluster
from parnet_export.splitting.segment_names import name_segments
from parnet_export.splitting.work_graph import ClusteringOptions, WorkGraph, WorkTensor
from parnet_export.stream_graph import Segment, StreamGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from parnet_export.splitting.clustering import Clustering
    from parnet_export.splitting.work_graph import DeviceModel

SplitOptions = ClusteringOptions
"""Options of `split_model`."""

_DATA_DEPENDENT_OPERATORS = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Operators with outputs whose sizes depend on the values of their inputs."""

_FREE_OPERATORS = frozenset(
    {"Constant", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"}
)
"""Operators that move no data: every runtime turns them into another view of the same bytes."""


@dataclass(frozen=True, slots=True)
class Split:
    """A network and its segments.

    Parameters
    ----------
    stream_graph
        The segments, what crosses between them, and what each costs.
    whole
        The prepared graph of the whole network.
    segments
        One graph per segment, in the order of the stream graph. They share the
        constant tensors of `whole`.
    notes
        What the splitter found and decided, as sentences.
    """

    stream_graph: StreamGraph
    whole: ir.Model
    segments: Mapping[str, ir.Model]
    notes: tuple[str, ...]


def split_model(model: ir.Model, options: SplitOptions | None = None) -> Split:
    """Split a network into segments.

    Parameters
    ----------
    model
        Any ONNX graph. It is not changed.
    options
        What is worth running in parallel.

    Returns
    -------
    Split
        A network output that is a network input belongs to no segment; a constant
        output is provided by the segment of an added ``Identity``.

    Raises
    ------
    InputError
        When the graph is empty or invalid, has tensors of unknown shape, or has inputs
        or outputs that are not dense tensors.
    """
    whole = prepare(model)
    inputs = tuple(map(tensor_spec, whole.graph.inputs))
    outputs = tuple(map(tensor_spec, whole.graph.outputs))
    options = options or SplitOptions()
    atoms = _inseparable(whole.graph)
    clustering = cluster(_work_graph(whole.graph, atoms, options.device), options)
    pieces = [
        _cut_out(whole.graph, [node for atom in members for node in atoms[atom]])
        for members in clustering.clusters
    ]
    names = _names(whole.graph, pieces)
    stream_graph = StreamGraph(
        inputs,
        outputs,
        tuple(
            Segment(
                name,
                tuple(map(tensor_spec, piece.inputs)),
                tuple(map(tensor_spec, piece.outputs)),
                graph_cost(piece.nodes),
            )
            for name, piece in zip(names, pieces, strict=True)
        ),
    )
    return Split(
        stream_graph,
        whole,
        {name: _to_model(piece, whole, name) for name, piece in zip(names, pieces, strict=True)},
        _notes(clustering, stream_graph, options),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Nodes of a graph in its order, and the tensors that cross their boundary."""

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]


def _cut_out(graph: ir.Graph, nodes: Iterable[ir.Node]) -> _Piece:
    """Return the boundary of some nodes; network outputs come first, in the network's order."""
    members = set(nodes)
    ordered = tuple(node for node in graph if node in members)
    made = {value for node in ordered for value in node.outputs}
    reads = dict.fromkeys(value for node in ordered for value in node_inputs(node))
    outside = {value for node in graph if node not in members for value in node_inputs(node)} | set(
        graph.outputs
    )
    outputs = dict.fromkeys(value for value in graph.outputs if value in made)
    outputs |= dict.fromkeys(
        value for node in ordered for value in node.outputs if value in outside
    )
    return _Piece(
        nodes=ordered,
        inputs=tuple(v for v in reads if v not in made and not v.is_initializer()),
        outputs=tuple(outputs),
        constants=tuple(v for v in reads if v.is_initializer()),
    )


def _to_model(piece: _Piece, whole: ir.Model, name: str) -> ir.Model:
    """Make a graph of its own from a piece. Constants are shared, nodes and tensors copied."""
    graph = ir.GraphView(
        piece.inputs,
        piece.outputs,
        nodes=piece.nodes,
        initializers=piece.constants,
        opset_imports=whole.graph.opset_imports,
        name=name,
    ).clone()
    used = {node.domain for node in graph.all_nodes()} | {""}
    for domain in set(graph.opset_imports) - used:
        del graph.opset_imports[domain]
    return ir.Model(
        graph,
        ir_version=whole.ir_version,
        producer_name=whole.producer_name,
        producer_version=whole.producer_version,
        metadata_props={
            **whole.metadata_props,
            "parnet.network": str(whole.graph.name),
            "parnet.segment": name,
        },
    )


def _inseparable(graph: ir.Graph) -> list[list[ir.Node]]:
    """Return groups of nodes that must stay together, in a topological order.

    Sequences, maps, strings and packed types cannot cross between segments, so whoever
    reads such a value stays with its producer, and so does all that lies between them.
    The same holds for a tensor whose size depends on data: there is memory for what
    crosses before an inference starts. Most graphs have none, and every node is a group.
    """
    nodes = list(graph)
    free = _data_dependent_sizes(graph)
    group = {node: index for index, node in enumerate(nodes)}
    glued: list[tuple[ir.Node, ...]] = [
        (producer, node)
        for node in nodes
        for value in node_inputs(node)
        if (producer := value.producer()) is not None
        and (not is_transferable(value) or not free.isdisjoint(_symbols(value)))
    ]
    while glued:
        for first, *others in glued:
            merged = {group[other] for other in others}
            group.update({n: group[first] for n in nodes if group[n] in merged})
        before: dict[int, set[int]] = {group[node]: set() for node in nodes}
        for node in nodes:
            producers = (value.producer() for value in node_inputs(node))
            before[group[node]] |= {group[p] for p in producers if p is not None} - {group[node]}
        try:
            order = tuple(graphlib.TopologicalSorter(before).static_order())
        except graphlib.CycleError as error:
            cycle = set(error.args[1])
            glued = [tuple(node for node in nodes if group[node] in cycle)]
        else:
            return [[node for node in nodes if group[node] == index] for index in order]
    return [[node] for node in nodes]


def _data_dependent_sizes(graph: ir.Graph) -> set[str]:
    """Return the names of dimensions whose sizes depend on data."""
    sizes = {
        symbol
        for node in graph
        if node.op_type in _DATA_DEPENDENT_OPERATORS and node.domain == ""
        for value in node.outputs
        for symbol in _symbols(value)
    }
    return sizes - {symbol for value in graph.inputs for symbol in _symbols(value)}


def _symbols(value: ir.Value) -> set[str]:
    return {str(d.value) for d in value.shape or () if not isinstance(d, int)}


def _work_graph(
    graph: ir.Graph, atoms: Sequence[Sequence[ir.Node]], device: DeviceModel
) -> WorkGraph:
    place = {node: index for index, atom in enumerate(atoms) for node in atom}
    consumers: dict[ir.Value, set[int]] = {value: set() for value in graph.inputs}
    for node in graph:
        for value in node_inputs(node):
            if not value.is_initializer():
                consumers[value].add(place[node])
        consumers.update((value, set()) for value in node.outputs)
    tensors: list[WorkTensor] = []
    for value, readers in consumers.items():
        producer = value.producer()
        index = None if producer is None else place[producer]
        tensors.append(WorkTensor(size_bytes(value), index, tuple(sorted(readers - {index}))))
    constants = constant_values(graph)  # runtimes evaluate them once, ahead of time
    times = (
        sum(_operator_us(node, device) for node in atom if node.outputs[0] not in constants)
        for atom in atoms
    )
    return WorkGraph(tuple(times), tuple(tensors))


def _operator_us(node: ir.Node, device: DeviceModel) -> float:
    if node.op_type in _FREE_OPERATORS and node.domain == "":
        return 0.0
    cost = node_cost(node)
    return device.operator_us(cost.flops, cost.activation_bytes + cost.weight_bytes)


def _names(graph: ir.Graph, pieces: Sequence[_Piece]) -> tuple[str, ...]:
    producers = {value: index for index, piece in enumerate(pieces) for value in piece.outputs}
    places = {value: index for index, value in enumerate(graph.outputs)}
    return name_segments(
        [frozenset(producers[v] for v in piece.inputs if v in producers) for piece in pieces],
        [min((places[v] for v in piece.outputs if v in places), default=-1) for piece in pieces],
    )


def _notes(
    clustering: Clustering, stream_graph: StreamGraph, options: SplitOptions
) -> tuple[str, ...]:
    """Say what was found, with gains as fractions of the network's estimated time."""
    total_us = clustering.total_us or 1.0
    gains = [region.gain_us / total_us for region in clustering.regions]
    if len(stream_graph.segments) == 1:
        if not gains:
            return ("no parallel branch found: the network stays in one segment",)
        enough = (
            f"branches are kept from {options.min_gain:.1%} on"
            if max(gains) < options.min_gain
            else "too little for what another lane costs"
        )
        alone = (
            f"no parallel branch is worth a segment of its own: the largest of {len(gains)} "
            f"would shorten the network by an estimated {max(gains):.1%}, {enough}"
        )
        return (alone,)
    inside = [
        gain for gain, region in zip(gains, clustering.regions, strict=True) if not region.kept
    ]
    if not inside:
        return ()
    small = (
        f"{len(inside)} parallel branches stay inside their segments: "
        f"the largest would shorten the network by an estimated {max(inside):.1%}"
    )
    return (small,)
