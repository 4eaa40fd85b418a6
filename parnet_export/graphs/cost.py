"""Count what a graph costs: parameters, multiply-accumulates, bytes and depth.

Counts follow the field's habit: only convolutions and matrix products have
multiply-accumulates (MACs), biases and elementwise operators have none, and
symbolic dimensions count as 1. Shapes must be known (`parnet_export.graphs.onnx_graph.prepare`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from parnet_export.graphs.onnx_graph import constant_values, node_inputs, subgraphs
from parnet_export.stream_graph import Cost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

_FLOATING = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
    }
)

_SETTINGS: Mapping[str, frozenset[int]] = {
    # Running statistics are buffers, not parameters, in every framework's count.
    "BatchNormalization": frozenset({3, 4}),
    "Resize": frozenset({1, 2, 3}),
    "Upsample": frozenset({1}),
}
"""Inputs by operator that hold floating-point constants which are not parameters."""


def node_cost(node: ir.Node) -> Cost:
    """Return what one operator costs.

    An ``If`` costs as many MACs as its dearer branch. The bodies of ``Loop`` and
    ``Scan`` count once, since their trip count is data.
    """
    return graph_cost((node,))


def graph_cost(graph: ir.Model | Iterable[ir.Node]) -> Cost:
    """Return what a graph, or any part of one, costs.

    Parameters
    ----------
    graph
        A prepared graph, or some of its nodes in a topological order.

    Returns
    -------
    Cost
        Every constant counts once, also when several nodes read it or a subgraph
        captures it. Parameters are the elements of floating-point constants, without
        scalars, running statistics and resize settings, so that the count is the
        framework's own. Depth is the longest chain of layers: convolutions and matrix
        products with a factor that depends on constants alone, possibly through casts,
        reshapes or dequantisation. Products of two activations, as in attention, have
        MACs but are no layers.
    """
    nodes = tuple(graph.graph if isinstance(graph, ir.Model) else graph)
    constants: dict[ir.Value, bool] = {}
    for node in nodes:
        _collect_constants(node, constants)
    sizes = {value: element_count(value) for value in constants}
    return Cost(
        parameters=sum(sizes[value] for value, counted in constants.items() if counted),
        macs=sum(_macs(node) for node in nodes),
        weight_bytes=sum(size_bytes(value) for value in constants),
        activation_bytes=sum(_activation_bytes(node) for node in nodes),
        nodes=len(nodes),
        depth=_depth(nodes),
    )


def size_bytes(value: ir.Value) -> int:
    """Return the bytes of a dense tensor; values of other kinds count as nothing."""
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        return 0
    return math.ceil(element_count(value) * value.dtype.itemsize)


def element_count(value: ir.Value | None) -> int:
    """Return the number of elements of a tensor, symbolic dimensions counting as 1."""
    return math.prod(_dimensions(value))


def _dimensions(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        return ()
    return tuple(d if isinstance(d, int) else 1 for d in value.shape)


def _collect_constants(node: ir.Node, found: dict[ir.Value, bool]) -> None:
    """Add the constants a node reads, and whether they are parameters."""
    settings = _SETTINGS.get(node.op_type, frozenset())
    for index, value in enumerate(node.inputs):
        if value is not None and value.is_initializer():
            parameter = value.dtype in _FLOATING and bool(value.shape) and index not in settings
            found[value] = found.get(value, False) or parameter
    for body in subgraphs(node):
        for inner in body:
            _collect_constants(inner, found)


def _activation_bytes(node: ir.Node) -> int:
    reads = (value for value in node_inputs(node) if not value.is_initializer())
    return sum(map(size_bytes, (*reads, *node.outputs)))


def _macs(node: ir.Node) -> int:
    bodies = [sum(map(_macs, body)) for body in subgraphs(node)]
    if bodies:
        return max(bodies) if node.op_type == "If" else sum(bodies)
    count = _MACS.get(node.op_type) if node.domain == "" else None
    return count(node) if count else 0


def _depth(nodes: Sequence[ir.Node], outer_constants: AbstractSet[ir.Value] = frozenset()) -> int:
    constants = outer_constants | constant_values(nodes)
    chains: dict[ir.Value, int] = {}
    for node in nodes:
        bodies = (_depth(tuple(body), constants) for body in subgraphs(node))
        own = max(bodies, default=int(_is_layer(node, constants)))
        chain = own + max((chains.get(value, 0) for value in node_inputs(node)), default=0)
        chains.update(dict.fromkeys(node.outputs, chain))
    return max(chains.values(), default=0)


def _is_layer(node: ir.Node, constants: AbstractSet[ir.Value]) -> bool:
    indices = _FACTORS.get(node.op_type, ()) if node.domain == "" else ()
    factors = (node.inputs[index] for index in indices if index < len(node.inputs))
    return any(f is not None and (f.is_initializer() or f in constants) for f in factors)


def _conv_macs(weight: int) -> Callable[[ir.Node], int]:
    # A weight is (out channels, in channels / groups, *kernel): each output element
    # takes one product for every weight of its channel.
    return lambda node: (
        element_count(node.outputs[0]) * math.prod(_dimensions(node.inputs[weight])[1:])
    )


def _conv_transpose_macs(node: ir.Node) -> int:
    # A weight is (in channels, out channels / groups, *kernel): each input element
    # is multiplied by every weight of its channel.
    return element_count(node.inputs[0]) * math.prod(_dimensions(node.inputs[1])[1:])


def _gemm_macs(node: ir.Node) -> int:
    transposed = node.attributes.get("transA")
    rows_first = transposed is None or not transposed.as_int()
    return element_count(node.outputs[0]) * _dimensions(node.inputs[0])[1 if rows_first else 0]


def _matmul_macs(node: ir.Node) -> int:
    # (..., M, K) x (..., K, N), leading dimensions broadcast; K is always the last of the first.
    return element_count(node.outputs[0]) * _dimensions(node.inputs[0])[-1]


_MACS: Mapping[str, Callable[[ir.Node], int]] = {
    "Conv": _conv_macs(weight=1),
    "ConvInteger": _conv_macs(weight=1),
    "QLinearConv": _conv_macs(weight=3),
    "ConvTranspose": _conv_transpose_macs,
    "Gemm": _gemm_macs,
    "MatMul": _matmul_macs,
    "MatMulInteger": _matmul_macs,
    "QLinearMatMul": _matmul_macs,
}

_FACTORS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvInteger": (1,),
    "QLinearConv": (3,),
    "ConvTranspose": (1,),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
}
"""Inputs by operator of which one must be a weight for the operator to be a layer."""
