"""Read ONNX graphs and bring them into the one form that the rest works on.

A *prepared* graph is flat and fully described: no local functions, constants
only as initializers, every node and tensor named once, nodes in a topological
order, and a type and shape on every tensor. Tensor names are those of the
source. Weights are never copied; external data stays on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import PreconditionError, Sequential, common

from parnet_export.errors import InputError, name_some
from parnet_export.graphs.onnx_shapes import infer_shapes
from parnet_export.stream_graph import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_PATH = "path"  # key of `ir.Model.meta` under which `load_onnx` keeps the file for messages
_EXPORT_AGAIN = "Export the network to ONNX again"


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
        When the graph computes nothing, is not valid ONNX, or has tensors whose type
        or shape cannot be inferred.
    """
    subject = source_of(model)
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
    if not len(prepared.graph):
        raise InputError(subject, "has no operator that an output depends on", _EXPORT_AGAIN)
    infer_shapes(prepared, subject)
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


def constant_values(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Return what nodes, in a topological order, compute from constants alone."""
    found: set[ir.Value] = set()
    for node in nodes:
        reads = node_inputs(node)
        if all(value.is_initializer() or value in found for value in reads) and (
            reads or node.op_type == "Constant"  # others without inputs draw random numbers
        ):
            found.update(node.outputs)
    return found


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the bodies of a control-flow node, none for other nodes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _check_external_data(path: Path, model: ir.Model) -> None:
    """Check that every external tensor lies within its file, and the file in its folder."""
    together = "Keep the ONNX file and its data file together as the exporter wrote them"
    sizes: dict[Path, int] = {}
    for tensor in (v.const_value for g in model.graphs() for v in g.initializers.values()):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        data = path.parent / tensor.location
        try:
            size = sizes[data] if data in sizes else data.stat().st_size
            end = (tensor.offset or 0) + tensor.nbytes
            if end > size:
                raise InputError(
                    data,
                    f"holds weights of {path} and is too short: {tensor.name!r} ends at byte "
                    f"{end}, the file at {size}",
                    together,
                )
            if data not in sizes:
                tensor.numpy()  # mapping the file refuses locations outside the folder
                tensor.release()
                sizes[data] = size
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                data, f"holds weights of {path} and cannot be read ({reason})", together
            ) from error


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
        if constant.is_initializer():
            node = ir.node("Identity", [constant], name=f"provide_{constant.name}")
            output = node.outputs[0]
            output.type, output.shape = constant.type, constant.shape
            output.name, fresh_name = constant.name, f"{constant.name}_constant"
            while fresh_name in names:
                fresh_name += "_"
            constant.name = fresh_name
            graph.outputs[index] = output
            graph.append(node)


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
