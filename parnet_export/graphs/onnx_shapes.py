"""Types and shapes of all tensors of an ONNX graph, by ONNX's own inference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from parnet_export.errors import InputError, name_some

if TYPE_CHECKING:
    from collections.abc import Mapping

_LARGE_BYTES = 1024  # larger constants are weights, of which inference needs only the shapes
_EXPORT_AGAIN = "Export the network to ONNX again"


def infer_shapes(model: ir.Model, subject: str) -> None:
    """Set type and shape of every tensor of a graph, in place, and check the graph.

    Dimensions of unknown size get a name.

    Parameters
    ----------
    model
        A graph without functions whose values have unique names.
    subject
        What messages call the graph.

    Raises
    ------
    InputError
        When the graph is not valid ONNX, its shapes contradict each other, or some
        tensor has no type or shape.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(
            _skeleton(model), check_type=True, strict_mode=True, data_prop=True
        )
    except onnx.shape_inference.InferenceError as error:
        raise _invalid(subject, error) from error
    declared = {value: value.shape for node in model.graph for value in node.outputs}
    _adopt(model, ir.from_proto(inferred))
    unknown = [
        f"{value.name} ({node.op_type})"
        for node in model.graph
        for value in node.outputs
        if value.type is None or (isinstance(value.type, ir.TensorType) and value.shape is None)
    ]
    unknown += [str(v.name) for v in model.graph.inputs if v.type is None or v.shape is None]
    if unknown:
        raise InputError(
            subject,
            f"has tensors whose type or shape cannot be inferred: {name_some(unknown)}",
            "Export it again with shape information, or replace these operators",
        )
    try:
        onnx.checker.check_model(inferred)
    except onnx.checker.ValidationError as error:
        raise _invalid(subject, error) from error
    _name_dimensions(model.graph, declared)


def _invalid(subject: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(subject, f"is not a valid network ({reason})", _EXPORT_AGAIN)


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """Return the graph with its weights as inputs, so that their size does not matter.

    Small constants stay, in memory: they may be shapes. Symbols that the source gives
    to dimensions go, since inference would prefer them to the symbols of the inputs,
    and an exporter may call the batch of every tensor differently.
    """
    skeleton = model.clone()
    graph = skeleton.graph
    for value in (output for node in graph for output in node.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    for name, value in tuple(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes > _LARGE_BYTES:
            del graph.initializers[name]
            graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy().copy(), name=name)
            tensor.release()
    return ir.to_proto(skeleton)


def _adopt(model: ir.Model, inferred: ir.Model) -> None:
    for ours, theirs in zip(model.graphs(), inferred.graphs(), strict=True):
        found = ir.convenience.create_value_mapping(theirs, include_subgraphs=False)
        values = ir.convenience.create_value_mapping(ours, include_subgraphs=False)
        for name, value in values.items():
            if name not in found or value.is_initializer():
                continue
            if found[name].type is not None:
                value.type = found[name].type
            if found[name].shape is not None:
                value.shape = found[name].shape


def _name_dimensions(graph: ir.Graph, declared: Mapping[ir.Value, ir.Shape | None]) -> None:
    """Give every dimension of unknown size a name, the same for the same size where known.

    That is the name of an input's dimension if possible, else the first that the source
    declared. Inference invents symbols, also for the batch, in a ``Reshape`` to
    ``[-1, ...]``; but a reshape keeps the number of elements, so the only invented
    symbol of its output is the only symbol of its input.
    """
    names: dict[str, str] = {}
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is None:
            continue
        node, free = value.producer(), _free_dimension(value.shape)
        if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None and free:
            before = _free_dimension(node.inputs[0].shape)
            if before and before[1] == free[1]:
                names.setdefault(free[0], before[0])
        own = declared.get(value)
        dimensions: list[int | str] = []
        for index, dimension in enumerate(value.shape):
            if isinstance(dimension, int):
                dimensions.append(dimension)
                continue
            name = _symbol(own, index) or dimension.value or f"{value.name}_{index}"
            symbol = str(dimension.value or name)
            dimensions.append(names.setdefault(symbol, str(name)))
        value.shape = ir.Shape(dimensions)


def _symbol(shape: ir.Shape | None, index: int) -> str | None:
    if shape is None or index >= len(shape):
        return None
    dimension = shape[index]
    return None if isinstance(dimension, int) else dimension.value


def _free_dimension(shape: ir.Shape | None) -> tuple[str, int] | None:
    """Return the only symbol of a shape and the product of its other dimensions."""
    symbols = [d.value for d in shape or () if not isinstance(d, int)]
    if shape is None or len(symbols) != 1 or symbols[0] is None:
        return None
    return symbols[0], math.prod(d for d in shape if isinstance(d, int))
