"""Read ONNX graphs and bring them into the one form that the rest works on.

A *prepared* graph is flat and fully described: no local functions, constants
only as initializers, every node and tensor named once, nodes in a topological
order, and a type and shape on every tensor. Tensor names are those of the
source. Weights are never copied; external data stays on disk.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import PreconditionError, Sequential, common

from parnet_export.errors import InputError, name_some
from parnet_export.stream_graph import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PATH = "path"  # key of `ir.Model.meta` under which `load_onnx` keeps the file for messages
_EXPORT_AGAIN = "Export the network to ONNX again"
_LARGE_BYTES = 1024  # larger constants are weights; shape inference needs only their shapes


def load_onnx(path: Path) -> ir.Model:
    """Read an ONNX file; external weights are found and measured, but not read.

    Parameters
    ----------
    path
        A binary ONNX file. External data lies in the same folder, or below it.

    Returns
    -------
    ir.Model
        The graph as it stands in the file; see `prepare`.

    Raises
    ------
    InputError
        When the file is missing, unreadable, damaged or not ONNX, or its external
        data is missing or too short.
    """
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise InputError(path, "does not exist", "Check the path of the ONNX file") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", "Give an ONNX file") from error
    except DecodeError as error:
        raise InputError(path, "is damaged or not an ONNX file", _EXPORT_AGAIN) from error
    if not proto.ir_version or not proto.HasField("graph"):
        raise InputError(path, "is empty or not an ONNX file", _EXPORT_AGAIN)
    if any(graph.sparse_initializer for graph in _graph_protos(proto.graph)):
        raise InputError(path, "holds sparse weights", "Export the network with dense weights")
    try:
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise InputError(path, f"is damaged ({_root_cause(error)})", _EXPORT_AGAIN) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    _check_external_data(path, model)
    model.meta[_PATH] = str(path)
    return model


def prepare(model: ir.Model) -> ir.Model:
    """Return a flat, fully named, typed and shaped version of a graph.

    Parameters
    ----------
    model
        Any ONNX graph. It is not changed.

    Returns
    -------
    ir.Model
        A new graph that shares the constant tensors of `model`. Network inputs
        and outputs keep their names and order; dimensions whose size is unknown have a name.

    Raises
    ------
    InputError
        When the graph has no nodes or no outputs, is not valid ONNX, or has
        tensors whose type or shape cannot be inferred.
    """
    subject = source_of(model)
    if not len(model.graph) or not model.graph.outputs:
        raise InputError(subject, "has no operators or no outputs", _EXPORT_AGAIN)
    prepared = _clone_in_order(model, subject)
    flatten = Sequential(
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(_NodeNames()),
    )
    try:
        common.InlinePass()(prepared)
        prepared.functions.clear()  # what is left is called by nobody
        flatten(prepared)
    except (PreconditionError, ValueError, ir.passes.PassError) as error:
        raise InputError(
            subject, f"cannot be flattened ({_root_cause(error)})", _EXPORT_AGAIN
        ) from error
    _give_constant_outputs_a_producer(prepared.graph)
    _infer_shapes(prepared, subject)
    _name_unknown_dimensions(prepared.graph)
    prepared.meta.update(model.meta)
    return prepared


def source_of(model: ir.Model) -> str:
    """Return the file that a graph was loaded from, or its name, for messages."""
    return str(model.meta.get(_PATH) or model.graph.name or "the graph")


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Describe a tensor of a prepared graph.

    Raises
    ------
    InputError
        When the value is not a dense tensor of a type that can cross between segments.
    """
    shape = value.shape
    if shape is None or value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise InputError(
            f"tensor {value.name!r}",
            f"has type {value.type} and shape {shape}, so its size is not known",
            _EXPORT_AGAIN,
        )
    dimensions = tuple(d if isinstance(d, int) else str(d.value) for d in shape)
    try:
        return TensorSpec(str(value.name), value.dtype.numpy().name, dimensions)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"tensor {value.name!r}",
            f"has the type {value.dtype.name}, which cannot cross between segments",
            "Cast it to a floating-point, integer or boolean type",
        ) from error


def is_transferable(value: ir.Value) -> bool:
    """Whether a value is a tensor that `tensor_spec` can describe."""
    try:
        tensor_spec(value)
    except InputError:
        return False
    return True


def node_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """Return every value a node reads, once, in order.

    This includes the values that the subgraphs of an ``If``, ``Loop`` or ``Scan``
    capture from the graph around them, at any depth.
    """
    reads = dict.fromkeys(value for value in node.inputs if value is not None)
    bodies = tuple(subgraphs(node))
    if bodies:
        inner = [n for body in bodies for n in ir.traversal.RecursiveGraphIterator(body)]
        scopes = [*bodies, *(graph for n in inner for graph in subgraphs(n))]
        own = {value for n in inner for value in n.outputs}
        for scope in scopes:
            own.update(scope.inputs, scope.initializers.values())
        for value in (v for n in inner for v in n.inputs):
            if value is not None and value not in own:
                reads[value] = None
        for value in (v for scope in scopes for v in scope.outputs if v not in own):
            reads[value] = None
    return tuple(reads)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the bodies of a control-flow node, none for other nodes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _graph_protos(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graph_protos(attribute.g)
            for body in attribute.graphs:
                yield from _graph_protos(body)


def _check_external_data(path: Path, model: ir.Model) -> None:
    sizes: dict[str, int] = {}
    tensors = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    for tensor in tensors:
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        data = path.parent / tensor.location
        try:
            if tensor.path not in sizes:
                sizes[tensor.path] = data.stat().st_size
                tensor.numpy()  # maps the file, which refuses locations outside the folder
                tensor.release()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                data, f"holds weights of {path} and cannot be read ({reason})", _KEEP_TOGETHER
            ) from error
        except ValueError as error:
            raise InputError(
                data, f"holds weights of {path} and is refused ({error})", _KEEP_TOGETHER
            ) from error
        end = (tensor.offset or 0) + tensor.nbytes
        if end > sizes[tensor.path]:
            raise InputError(
                data,
                f"holds weights of {path} and is too short: {tensor.name!r} ends at byte {end}, "
                f"the file at {sizes[tensor.path]}",
                _KEEP_TOGETHER,
            )


_KEEP_TOGETHER = "Keep the ONNX file and its data file together as the exporter wrote them"


def _clone_in_order(model: ir.Model, subject: str) -> ir.Model:
    """Clone a graph with its nodes in a topological order, as close to theirs as possible."""
    graph = model.graph
    known = {*graph.inputs, *graph.initializers.values()}
    known.update(value for node in graph for value in node.outputs)
    undefined = {
        str(value.name) for node in graph for value in node_inputs(node) if value not in known
    }
    undefined |= {str(value.name) for value in graph.outputs if value not in known}
    if undefined:
        raise InputError(
            subject, f"reads tensors nobody provides: {name_some(sorted(undefined))}", _EXPORT_AGAIN
        )
    view = ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=_in_topological_order(graph, subject),
        initializers=tuple(graph.initializers.values()),
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    return ir.Model(
        view.clone(),
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=[function.clone() for function in model.functions.values()],
        metadata_props=dict(model.metadata_props),
    )


def _in_topological_order(graph: ir.Graph, subject: str) -> list[ir.Node]:
    ordered: dict[ir.Node, None] = {}
    for first in graph:
        opened: set[ir.Node] = set()
        stack = [first]
        while stack:
            node = stack[-1]
            producers = (value.producer() for value in node_inputs(node))
            missing = [p for p in producers if p is not None and p not in ordered]
            if node in ordered or not missing:
                ordered[stack.pop()] = None
            elif node in opened:
                raise InputError(subject, f"has a cycle through {node.name!r}", _EXPORT_AGAIN)
            else:
                opened.add(node)
                stack.extend(reversed(missing))
    return list(ordered)


def _give_constant_outputs_a_producer(graph: ir.Graph) -> None:
    """Let an ``Identity`` provide a network output that is itself a constant."""
    names = {str(value.name) for value in ir.convenience.create_value_mapping(graph).values()}
    for index, constant in enumerate(graph.outputs):
        if not constant.is_initializer():
            continue
        node = ir.node("Identity", [constant], name=f"provide_{constant.name}")
        output = node.outputs[0]
        output.name, output.type, output.shape = constant.name, constant.type, constant.shape
        graph.outputs[index] = output
        constant.name = next(
            name
            for suffix in ("", *range(len(names)))
            if (name := f"{output.name}_constant{suffix}") not in names
        )
        graph.append(node)


def _infer_shapes(model: ir.Model, subject: str) -> None:
    """Set type and shape of every value, by ONNX's own inference.

    Inference sees a skeleton whose weights are inputs, so that neither its size
    limit nor memory matters.
    """
    skeleton = model.clone()
    graph = skeleton.graph
    for name, value in tuple(graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _LARGE_BYTES:
            del graph.initializers[name]
            graph.inputs.append(value)
    try:
        inferred = onnx.shape_inference.infer_shapes(
            ir.to_proto(skeleton), check_type=True, strict_mode=True, data_prop=True
        )
    except onnx.shape_inference.InferenceError as error:
        raise _invalid(subject, error) from error
    for ours, theirs in zip(model.graphs(), ir.from_proto(inferred).graphs(), strict=True):
        found = ir.convenience.create_value_mapping(theirs, include_subgraphs=False)
        for name, value in ir.convenience.create_value_mapping(
            ours, include_subgraphs=False
        ).items():
            if name in found and not value.is_initializer():
                value.type = found[name].type or value.type
                value.shape = found[name].shape or value.shape
    unknown = [
        f"{value.name} ({node.op_type})"
        for node in model.graph
        for value in node.outputs
        if value.type is None or (isinstance(value.type, ir.TensorType) and value.shape is None)
    ]
    unknown += [str(v.name) for v in model.graph.inputs if v.dtype is None or v.shape is None]
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


def _invalid(subject: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(subject, f"is not a valid network ({reason})", _EXPORT_AGAIN)


def _name_unknown_dimensions(graph: ir.Graph) -> None:
    """Give every dimension of unknown size a name, the same for the same size where known.

    ONNX's inference loses a symbolic batch in a ``Reshape`` to ``[-1, ...]``. A
    reshape keeps the number of elements, so the one new symbol is the one old one.
    """
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    given = {
        str(d.value) for value in graph.inputs for d in value.shape or () if not isinstance(d, int)
    }
    same: dict[str, str] = {}
    for value in values:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [
                d if isinstance(d, int) else same.get(str(d.value), d.value or f"{value.name}_{i}")
                for i, d in enumerate(value.shape)
            ]
        )
        node = value.producer()
        if node is None or node.op_type != "Reshape" or node.domain or node.inputs[0] is None:
            continue
        before, after = _free_dimension(node.inputs[0].shape), _free_dimension(value.shape)
        if before and after and before[1] == after[1] and after[0] not in given:
            same[after[0]] = before[0]
            value.shape = ir.Shape([d if isinstance(d, int) else before[0] for d in value.shape])


def _free_dimension(shape: ir.Shape | None) -> tuple[str, int] | None:
    """Return the only symbol of a shape and the product of its other dimensions."""
    symbols = [str(d.value) for d in shape or () if not isinstance(d, int)]
    if len(symbols) != 1 or shape is None:
        return None
    return symbols[0], math.prod(d for d in shape if isinstance(d, int))


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


class _NodeNames:
    """Names for what has none: the operator's, numbered where it repeats."""

    def generate_node_name(self, node: ir.Node) -> str:
        return node.name or node.op_type

    def generate_value_name(self, value: ir.Value) -> str:
        return value.name or "tensor"
