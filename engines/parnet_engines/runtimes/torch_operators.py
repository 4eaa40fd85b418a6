"""ONNX operators as torch functions: those of the catalogue's graphs.

`OPERATORS` has a builder for each. A builder reads attributes and constant operands once and
returns a function of tensors, which never waits for a GPU, so that it can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from onnx import helper
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Tensor = torch.Tensor
    Compute = Callable[..., Any]


class UnsupportedFormError(Exception):
    """A form of an operator that is not here; says which."""


@dataclass(frozen=True, slots=True)
class Operator:
    """What a builder knows of a node.

    Parameters
    ----------
    attributes
        By name, as Python values.
    constants
        Constant operands by position.
    outputs
        How many outputs are used.
    opset
        Version of the operator set.
    """

    attributes: Mapping[str, Any]
    constants: Mapping[int, NDArray[Any]]
    outputs: int = 1
    opset: int = 20

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or what ONNX says it is when left out."""
        return self.attributes.get(name, default)

    def integers(self, position: int, attribute: str = "") -> list[int] | None:
        """Return a constant operand of integers, or the attribute that older versions have.

        Raises
        ------
        UnsupportedFormError
            When neither is there, but an operand that is computed.
        """
        if position in self.constants:
            return [int(value) for value in self.constants[position].reshape(-1)]
        if attribute in self.attributes:
            return [int(value) for value in self.attributes[attribute]]
        return None

    def require(self, name: str, *allowed: object, default: object) -> None:
        """Refuse values of an attribute other than those allowed.

        Raises
        ------
        UnsupportedFormError
            When it has another value.
        """
        value = self.get(name, default)
        if value not in allowed:
            raise UnsupportedFormError(f"{name} = {value!r}")


@dataclass(frozen=True, slots=True)
class Cast:
    """A tensor in another type.

    Parameters
    ----------
    dtype
        The type.
    """

    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return the tensor in that type."""
        return x.to(self.dtype)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over some axes.

    Parameters
    ----------
    axes
        The axes; none stands for all.
    keep
        Whether they stay, of length 1.
    dtype
        The type to compute in and to return; None for the tensor's own.
    """

    axes: tuple[int, ...]
    keep: bool
    dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        """Return the mean; further operands, the axes, are known already."""
        axes = self.axes or tuple(range(x.dim()))
        return x.mean(dim=axes, keepdim=self.keep, dtype=self.dtype)


def _symmetric(pads: Sequence[int]) -> list[int] | None:
    """Return padding that is the same on both ends of each axis, if it is."""
    half = len(pads) // 2
    return list(pads[:half]) if list(pads[:half]) == list(pads[half:]) else None


def _to_torch(pads: Sequence[int]) -> list[int]:
    """Return ONNX's begins and ends as torch's pairs, last axis first."""
    half = len(pads) // 2
    return [n for axis in reversed(range(half)) for n in (pads[axis], pads[half + axis])]


def _window(operator: Operator) -> tuple[list[int], list[int]]:
    """Return kernel and strides of a pooling operator."""
    operator.require("auto_pad", "NOTSET", "VALID", default="NOTSET")
    kernel = [int(n) for n in operator.get("kernel_shape")]
    if len(kernel) != 2:
        raise UnsupportedFormError(f"{len(kernel)} spatial axes")
    return kernel, [int(n) for n in operator.get("strides", [1] * 2)]


def _conv(operator: Operator) -> Compute:
    operator.require("auto_pad", "NOTSET", "VALID", default="NOTSET")
    axes = len(operator.get("kernel_shape", (1, 1)))
    convolve: Compute = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[axes]
    strides = list(operator.get("strides", [1] * axes))
    dilations = list(operator.get("dilations", [1] * axes))
    group = operator.get("group", 1)
    pads = list(operator.get("pads", [0] * 2 * axes))
    same = _symmetric(pads)
    around = _to_torch(pads)

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if same is None:
            x = functional.pad(x, around)
        return cast(
            "Tensor", convolve(x, weight, bias, strides, same or [0] * axes, dilations, group)
        )

    return compute


def _average_pool(operator: Operator) -> Compute:
    kernel, strides = _window(operator)
    operator.require("dilations", [1, 1], default=[1, 1])
    padding = _symmetric(operator.get("pads", [0] * 4))
    if padding is None:
        raise UnsupportedFormError("pads that are not symmetric")
    ceil = bool(operator.get("ceil_mode", 0))
    counted = bool(operator.get("count_include_pad", 0))
    return lambda x: functional.avg_pool2d(x, kernel, strides, padding, ceil, counted)


def _max_pool(operator: Operator) -> Compute:
    kernel, strides = _window(operator)
    if operator.outputs > 1:
        raise UnsupportedFormError("indices as a second output")
    pads = operator.get("pads", [0] * 4)
    padding = _symmetric(pads)
    around = _to_torch(pads)
    dilations = list(operator.get("dilations", [1, 1]))
    ceil = bool(operator.get("ceil_mode", 0))

    def compute(x: Tensor) -> Tensor:
        if padding is None:
            x = functional.pad(x, around, value=-torch.inf)
        return functional.max_pool2d(x, kernel, strides, padding or 0, dilations, ceil)

    return compute


def _reduce_mean(operator: Operator) -> Compute:
    axes = operator.integers(1, "axes")
    if not axes and operator.get("noop_with_empty_axes", 0):
        return lambda x, *_: x
    return Mean(tuple(axes or ()), keep=bool(operator.get("keepdims", 1)))


def _batch_normalization(operator: Operator) -> Compute:
    operator.require("training_mode", 0, default=0)
    epsilon = operator.get("epsilon", 1e-5)

    def compute(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, variance, scale, bias, eps=epsilon)

    return compute


def _gemm(operator: Operator) -> Compute:
    alpha, beta = operator.get("alpha", 1.0), operator.get("beta", 1.0)
    trans_a, trans_b = operator.get("transA", 0), operator.get("transB", 0)

    def compute(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if trans_a else a, b.t() if trans_b else b
        return alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return compute


def _reshape(operator: Operator) -> Compute:
    wanted = operator.integers(1)
    if wanted is None:
        raise UnsupportedFormError("a shape that is computed")
    copies = not operator.get("allowzero", 0)

    def compute(x: Tensor, *_: object) -> Tensor:
        sizes = [
            x.shape[axis] if size == 0 and copies else size for axis, size in enumerate(wanted)
        ]
        return x.reshape(sizes)

    return compute


def _split(operator: Operator) -> Compute:
    axis = operator.get("axis", 0)
    sizes = operator.integers(1, "split")
    parts = operator.outputs

    def compute(x: Tensor, *_: object) -> tuple[Tensor, ...]:
        even = -(-x.shape[axis] // parts)
        return torch.split(x, sizes or even, dim=axis)

    return compute


def _resize(operator: Operator) -> Compute:
    operator.require("mode", "nearest", default="nearest")
    operator.require("coordinate_transformation_mode", "asymmetric", default="half_pixel")
    operator.require("nearest_mode", "floor", default="round_prefer_floor")
    scales = operator.constants.get(2)
    if scales is None or scales.size != 4 or scales[0] != 1 or scales[1] != 1:
        raise UnsupportedFormError("anything but two constant scales of the image")
    factors = [float(scale) for scale in scales[2:]]
    return lambda x, *_: functional.interpolate(x, scale_factor=factors, mode="nearest")


def _cast(operator: Operator) -> Compute:
    numpy_type = helper.tensor_dtype_to_np_dtype(operator.get("to"))
    return Cast(torch.from_numpy(np.zeros(1, numpy_type)).dtype)


def _concat(operator: Operator) -> Compute:
    axis = operator.get("axis")
    return lambda *tensors: torch.cat(tensors, dim=axis)


def _transpose(operator: Operator) -> Compute:
    order = operator.get("perm")
    return lambda x: x.permute(order or tuple(reversed(range(x.dim()))))


def _flatten(operator: Operator) -> Compute:
    axis = operator.get("axis", 1)

    def compute(x: Tensor) -> Tensor:
        before = axis + x.dim() if axis < 0 else axis
        return x.reshape(int(np.prod(x.shape[:before])), -1)

    return compute


def _softmax(operator: Operator) -> Compute:
    axis = operator.get("axis", -1)
    return lambda x: torch.softmax(x, dim=axis)


def _plain(function: Compute) -> Callable[[Operator], Compute]:
    """Return the builder of an operator without attributes."""
    return lambda _: function


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(dim=list(range(2, x.dim())), keepdim=True)


OPERATORS: dict[str, Callable[[Operator], Compute]] = {
    "Add": _plain(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _plain(torch.div),
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _plain(_global_average_pool),
    "Identity": _plain(lambda x: x),
    "MatMul": _plain(torch.matmul),
    "MaxPool": _max_pool,
    "Mish": _plain(functional.mish),
    "Mul": _plain(torch.mul),
    "ReduceMean": _reduce_mean,
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": _plain(torch.sigmoid),
    "Softmax": _softmax,
    "Softplus": _plain(functional.softplus),
    "Split": _split,
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
}
