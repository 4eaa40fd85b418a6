"""An ONNX graph as a list of torch calls, on any of torch's devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from parnet_engines.runtimes.torch_calls import Call, merge, with_releases
from parnet_engines.runtimes.torch_operators import OPERATORS, Operator, UnsupportedFormError
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_OTHER_ENGINE = "Use another engine for this network, such as onnxruntime"


class TorchGraph:
    """A graph with its weights on one device.

    Parameters
    ----------
    path
        The ONNX file, whose external weights lie in the same folder.
    name
        Name of the segment, for messages.
    device
        Torch's name of the device.
    channels_last
        Whether images lie with their channels last, which convolutions of half precision on
        tensor cores want.
    in_float32
        Whether what the graph computes in half precision is computed in float32 instead, to
        have a reference. Inputs are then given in float32, too.

    Raises
    ------
    InputError
        When the file cannot be read, or an operator is not here: node and segment are named.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        device: str = "cpu",
        *,
        channels_last: bool = False,
        in_float32: bool = False,
    ) -> None:
        try:
            model = onnx.load(path)
        except (OSError, ValueError) as error:
            raise InputError(path, f"cannot be read ({error})", "Make the bundle again") from error
        graph = model.graph
        self._channels_last = channels_last
        self.outputs = tuple(value.name for value in graph.output)
        constants = {
            tensor.name: np.asarray(numpy_helper.to_array(tensor)) for tensor in graph.initializer
        }
        if in_float32:
            constants = {n: _widened(array) for n, array in constants.items()}
            for node in graph.node:
                _widen_casts(node)
        self.inputs = tuple(v.name for v in graph.input if v.name not in constants)
        opset = max((o.version for o in model.opset_import if not o.domain), default=1)
        calls = []
        for node in graph.node:
            if node.op_type == "Constant":
                constants[node.output[0]] = _constant_of(node)
            else:
                calls.append(_call(node, constants, opset, name, path))
        calls = merge(calls, self.outputs)
        self._calls = with_releases(calls, (*self.outputs, *constants))
        used = {operand for call in calls for operand in call.inputs} | set(self.outputs)
        self._weights = {
            weight: self._laid_out(torch.from_numpy(value.copy()).to(device))
            for weight, value in constants.items()
            if weight in used
        }

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Compute the outputs, in the order of `outputs`."""
        tensors = {name: self._laid_out(inputs[name]) for name in self.inputs}
        tensors.update(self._weights)
        for call in self._calls:
            operands = [tensors[name] if name else None for name in call.inputs]
            found = call.compute(*operands)
            if len(call.outputs) == 1:
                tensors[call.outputs[0]] = found
            else:
                tensors.update(zip(call.outputs, found, strict=True))
            for name in call.released:
                del tensors[name]
        return tuple(tensors[name] for name in self.outputs)

    def _laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._channels_last and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _widen_casts(node: onnx.NodeProto) -> None:
    """Let a cast to half precision be one to float32."""
    for attribute in node.attribute:
        to_half = attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT16
        if node.op_type == "Cast" and to_half:
            attribute.i = onnx.TensorProto.FLOAT


def _constant_of(node: onnx.NodeProto) -> NDArray[Any]:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if attribute.name == "value" else np.asarray(value)


def _call(
    node: onnx.NodeProto,
    constants: Mapping[str, NDArray[Any]],
    opset: int,
    segment: str,
    path: Path,
) -> Call:
    label = f"node {(node.name or node.output[0])!r} of segment {segment!r}"
    builder = OPERATORS.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    if builder is None:
        problem = f"{label} is the operator {node.op_type}, which the torch engine does not have"
        raise InputError(path, problem, _OTHER_ENGINE)
    operator = Operator(
        {a.name: _plain_value(helper.get_attribute_value(a)) for a in node.attribute},
        {i: constants[name] for i, name in enumerate(node.input) if name in constants},
        sum(1 for name in node.output if name),
        opset,
    )
    try:
        compute = builder(operator)
    except UnsupportedFormError as error:
        problem = f"{label} is a {node.op_type} with {error}, which the torch engine does not have"
        raise InputError(path, problem, _OTHER_ENGINE) from error
    return Call(compute, tuple(node.input), tuple(name for name in node.output if name))


def _plain_value(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
