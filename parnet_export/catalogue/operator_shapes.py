"""Shapes of what operators return, where nothing is computed.

On the ``meta`` device torch works most shapes out in Python, through layers of general code
that take longer than the arithmetic of a small network would, and that first load its
compiler. Here are the rules for the operators that the catalogue's networks consist of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Shape = Sequence[int]

_aten = torch.ops.aten


def result_without_values(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> Tensor | tuple[Tensor, ...] | None:
    """Return what an operator gives on the ``meta`` device, or None where no rule covers it.

    Parameters
    ----------
    func
        An operator of ``torch.ops.aten``.
    args
        Its positional arguments, as a dispatch mode gets them.
    """
    rule = _RULES.get(func)
    first = args[0][0] if func is _aten.cat.default else args[0]
    if rule is None or not first.is_meta:
        return None
    shape = rule(*args)
    if shape is None:
        return None
    result: Tensor = first.new_empty(tuple(shape))
    if func is _aten.max_pool2d_with_indices.default:
        return result, result.new_empty(tuple(shape), dtype=torch.int64)
    if func is _aten.native_batch_norm.default:
        statistics = first.new_empty(0)  # of training; evaluation has none
        return result, statistics, statistics
    return result


def _same(x: Tensor, *_: object) -> Shape:
    return tuple(x.shape)


def _broadcast(x: Tensor, other: Tensor | float) -> Shape:
    if not isinstance(other, torch.Tensor) or other.shape == x.shape:
        return tuple(x.shape)
    return np.broadcast_shapes(x.shape, other.shape)  # torch's own loads its compiler


def _convolution(  # noqa: PLR0917 - the operator's own order
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    transposed: bool,
    *_: object,
) -> Shape | None:
    if transposed:
        return None
    kernel = [step * (size - 1) + 1 for step, size in zip(dilation, weight.shape[2:], strict=True)]
    return (x.shape[0], weight.shape[0], *_places(x.shape[2:], kernel, stride, padding))


def _average_pool(
    x: Tensor,
    kernel: Shape,
    stride: Shape = (),
    padding: Shape = (0, 0),
    ceil_mode: bool = False,
    *_: object,
) -> Shape | None:
    if ceil_mode:
        return None
    return (*x.shape[:2], *_places(x.shape[2:], kernel, stride or kernel, padding))


def _max_pool(  # noqa: PLR0917
    x: Tensor,
    kernel: Shape,
    stride: Shape = (),
    padding: Shape = (0, 0),
    dilation: Shape = (1, 1),
    ceil_mode: bool = False,
) -> Shape | None:
    window = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    return _average_pool(x, window, stride or kernel, padding, ceil_mode)


def _places(size: Shape, window: Shape, stride: Shape, padding: Shape) -> list[int]:
    """Return how many places a window takes along each side."""
    sides = zip(size, window, stride, padding, strict=True)
    return [(side + 2 * pad - width) // step + 1 for side, width, step, pad in sides]


def _mean(x: Tensor, dims: Shape | None, keep: bool = False) -> Shape | None:
    if not dims:
        return None
    averaged = {dim % x.dim() for dim in dims}
    sides = [1 if dim in averaged else side for dim, side in enumerate(x.shape)]
    return sides if keep else [side for dim, side in enumerate(sides) if dim not in averaged]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Shape:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return shape


def _addmm(_bias: Tensor, x: Tensor, weight: Tensor) -> Shape:
    return (x.shape[0], weight.shape[1])


def _resized(x: Tensor, size: Shape, *_: object) -> Shape:
    return (*x.shape[:2], *size)


_RULES: dict[Callable[..., Any], Callable[..., Shape | None]] = {
    _aten._softmax.default: _same,  # noqa: SLF001 - torch's own name of the operator
    _aten.channel_shuffle.default: _same,
    _aten.mish.default: _same,
    _aten.native_batch_norm.default: _same,
    _aten.relu.default: _same,
    _aten.sigmoid.default: _same,
    _aten.silu.default: _same,
    _aten.add.Tensor: _broadcast,
    _aten.div.Tensor: _broadcast,
    _aten.mul.Tensor: _broadcast,
    _aten.addmm.default: _addmm,
    _aten.avg_pool2d.default: _average_pool,
    _aten.cat.default: _cat,
    _aten.convolution.default: _convolution,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.mean.dim: _mean,
    _aten.upsample_nearest2d.default: _resized,
}
