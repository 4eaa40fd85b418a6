"""Turn a float32 graph into a float16 graph.

Weights and activations become float16, for ONNX has no other way to ask a
strongly typed runtime for half precision. What sums many values stays in
float32: pooling over whole feature maps, and the classifier.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from parnet_export.errors import InputError, name_some
from parnet_export.graphs.onnx_graph import prepare, source_of, subgraphs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

HALF_MAX = float(np.finfo(np.float16).max)
"""Largest finite float16, 65504."""

_FULL = ir.DataType.FLOAT
_HALF = ir.DataType.FLOAT16
_HALF_TYPE = "tensor(float16)"

_SUMMING_OPERATORS = frozenset(
    {"GlobalAveragePool", "GlobalLpPool", "ReduceL1", "ReduceL2", "ReduceLogSum"}
    | {"ReduceLogSumExp", "ReduceMean", "ReduceSum", "ReduceSumSquare"}
)
_PRODUCTS = frozenset({"Gemm", "MatMul"})
_WEIGHTED_OPERATORS = _PRODUCTS | {"Conv", "ConvTranspose"}
_MOVING_OPERATORS = frozenset(
    {"Dropout", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that compute nothing: they keep the precision of what they move."""

_INDIFFERENT_OPERATORS = frozenset({"Cast", "Shape", "Size"})
"""Operators that take any precision as it is, and whose output does not depend on it."""


def to_fp16(model: ir.Model, *, keep: Collection[str] = ()) -> ir.Model:
    """Return a copy of `model` that computes in float16.

    Network inputs and outputs keep their types; casts stand at the borders. Sums
    over feature maps, the last Gemm or MatMul before an output, and whatever follows
    it compute in float32. So do operators for which ONNX defines no float16 form.

    Parameters
    ----------
    model
        Any ONNX graph. It is left as it is.
    keep
        Names of modules whose operators compute in float32 as well. An operator belongs to
        ``c`` when its own name starts with a path such as ``"a.c.b/"``.

    Returns
    -------
    ir.Model
        A prepared graph, see `parnet_export.graphs.onnx_graph.prepare`.

    Raises
    ------
    InputError
        When the graph has control flow, a weight is outside of float16's range, or the
        graph cannot be prepared.
    """
    converted = prepare(model)
    controlled = sorted({node.op_type for node in converted.graph if list(subgraphs(node))})
    if controlled:
        raise InputError(
            source_of(model),
            f"has control flow ({name_some(controlled)}), which cannot be converted to fp16",
            "Export the network without it, or use --precision fp32",
        )
    out_of_range = _Conversion(converted.graph, keep).run()
    if out_of_range:
        raise InputError(
            source_of(model),
            f"has weights beyond fp16's range of {HALF_MAX:g}: {name_some(out_of_range)}",
            "Use --precision fp32",
        )
    return converted


class _Conversion:
    """One pass over one graph, in topological order, that changes it in place."""

    def __init__(self, graph: ir.Graph, keep: Collection[str]) -> None:
        self._graph = graph
        self._opsets = graph.opset_imports
        self._kept = _full_precision_nodes(graph)
        self._kept |= {node for node in graph if not set(keep).isdisjoint(_modules(node))}
        self._names = {value.name for value in _values(graph)}
        # Only what was float32 is converted: a float16 tensor may have been one before.
        self._floats = {value for value in _values(graph) if value.dtype == _FULL}
        self._halved: dict[ir.Value, ir.Value] = {}
        self._out_of_range: list[str] = []

    def run(self) -> list[str]:
        """Convert the graph, and return the weights that float16 cannot hold."""
        for node in list(self._graph):
            inputs, outputs = self._wanted(node)
            for index, (value, wanted) in enumerate(zip(node.inputs, inputs, strict=True)):
                if value is not None and value in self._floats and value.dtype != wanted:
                    node.replace_input_with(index, self._version(value, wanted, node))
            for value, wanted in zip(node.outputs, outputs, strict=True):
                if value in self._floats:
                    value.type = ir.TensorType(wanted)
        self._restore_outputs()
        self._drop_unread_initializers()
        return self._out_of_range

    def _wanted(self, node: ir.Node) -> tuple[list[ir.DataType], list[ir.DataType]]:
        """Return the precision of each float input and output of a node."""
        full = [_FULL] * len(node.inputs), [_FULL] * len(node.outputs)
        if node in self._kept:
            return full
        if node.op_type in _MOVING_OPERATORS and not node.domain:
            moved = node.inputs[0]
            follows = moved.dtype if moved is not None and moved.dtype == _HALF else _FULL
            return [follows] * len(node.inputs), [follows] * len(node.outputs)
        if node.op_type in _INDIFFERENT_OPERATORS and not node.domain:
            given = [_FULL if value is None else value.dtype or _FULL for value in node.inputs]
            return given, [_FULL] * len(node.outputs)
        version = self._opsets.get(node.domain)
        try:
            schema = onnx.defs.get_schema(node.op_type, version or 1, node.domain)
        except onnx.defs.SchemaError:
            return full  # an operator of a runtime: nothing says that it takes float16
        inputs = [_parameter(schema.inputs, index) for index in range(len(node.inputs))]
        outputs = [_parameter(schema.outputs, index) for index in range(len(node.outputs))]
        # An output's type follows an input's only where both are the same type variable;
        # otherwise an attribute decides, as in Cast, and stays as it is.
        variables = {
            parameter.type_str
            for parameter, value in zip(inputs, node.inputs, strict=True)
            if value is not None and value in self._floats
        }
        return (
            [_HALF if _HALF_TYPE in parameter.types else _FULL for parameter in inputs],
            [
                _HALF
                if _HALF_TYPE in parameter.types and parameter.type_str in variables
                else _FULL
                for parameter in outputs
            ],
        )

    def _version(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """Return `value` in another precision for a node that reads it.

        All readers share the float16 version. A float32 version belongs to one reader:
        shared, it would tie streams together by a tensor of twice the size.
        """
        if dtype == _HALF and value in self._halved:
            return self._halved[value]
        made = ir.Value(
            name=self._new_name(value, dtype), type=ir.TensorType(dtype), shape=_shape(value)
        )
        if value.is_initializer() and not value.is_graph_input():
            made.const_value = self._halve(value)
            self._graph.register_initializer(made)
        else:
            self._graph.insert_before(reader, _cast(value, made))
        if dtype == _HALF:
            self._halved[value] = made
        return made

    def _new_name(self, value: ir.Value, dtype: ir.DataType) -> str:
        stem = f"{value.name}_fp16" if dtype == _HALF else f"{value.name}_fp32"
        candidates = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in candidates if name not in self._names)
        self._names.add(name)
        return name

    def _halve(self, value: ir.Value) -> ir.TensorProtocol:
        full = value.const_value.numpy() if value.const_value is not None else np.empty(0)
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if np.any(np.isinf(half) & np.isfinite(full)):
            self._out_of_range.append(str(value.name))
        return ir.Tensor(half, name=value.name)

    def _restore_outputs(self) -> None:
        """Give network outputs that were computed in float16 back as float32."""
        for index, output in enumerate(self._graph.outputs):
            if output in self._floats and output.dtype == _HALF:
                restored = ir.Value(
                    name=output.name, type=ir.TensorType(_FULL), shape=_shape(output)
                )
                output.name = self._new_name(output, _HALF)
                self._graph.append(_cast(output, restored))
                self._graph.outputs[index] = restored

    def _drop_unread_initializers(self) -> None:
        for full, half in self._halved.items():
            if half.is_initializer() and not full.uses() and not full.is_graph_output():
                name = str(full.name)
                self._graph.initializers.pop(name)
                half.name = name


def _full_precision_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return sums over feature maps, the classifiers, and what follows the classifiers."""
    kept: set[ir.Node] = set()
    before_weights: set[ir.Node] = set()
    classifiers: set[ir.Node] = set()
    for node in reversed(list(graph)):
        readers = [reader for value in node.outputs for reader, _ in value.uses()]
        if any(r.op_type in _WEIGHTED_OPERATORS or r in before_weights for r in readers):
            before_weights.add(node)
        elif node.op_type in _PRODUCTS:
            classifiers.add(node)
    for node in graph:
        sources = {value.producer() for value in node.inputs if value is not None}
        if node in classifiers or sources & classifiers:
            classifiers.add(node)
        if node in classifiers or node.op_type in _SUMMING_OPERATORS:
            kept.add(node)
    return kept


def _modules(node: ir.Node) -> list[str]:
    """Return the names of the modules that an operator is inside of."""
    path, separator, _ = (node.name or "").rpartition("/")
    return path.split(".") if separator else []


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _parameter(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """Return an operator's formal parameter; the last one of a variadic operator repeats."""
    return parameters[min(index, len(parameters) - 1)]


def _shape(value: ir.Value) -> ir.Shape | None:
    return value.shape.copy() if value.shape is not None else None


def _cast(source: ir.Value, target: ir.Value) -> ir.Node:
    return ir.node(
        "Cast",
        [source],
        attributes={"to": int(target.dtype or _FULL)},
        outputs=[target],
        name=f"cast_to_{target.name}",
    )
