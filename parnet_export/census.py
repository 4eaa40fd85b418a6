"""Count what a PyTorch module costs, without weights or data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from parnet_export.models.catalog import CATALOG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping, Sequence

    from torch import nn

    from parnet_export.network import Level

_COUNTED: tuple[Level, ...] = ("none", "repvgg")
_LEVELS: tuple[Level, ...] = (*_COUNTED, "full")

_aten = torch.ops.aten

_LAYERS = {
    # Operator: which argument is the weight.
    _aten.convolution.default: 1,
    _aten.addmm.default: 2,
    _aten.mm.default: 1,
}

_SHAPED_LIKE_INPUT = frozenset(
    {
        _aten.relu.default,
        _aten.silu.default,
        _aten.sigmoid.default,
        _aten.mish.default,
        _aten.add.Tensor,
        _aten.mul.Tensor,
    }
)
"""Operators whose result has the first argument's shape, if no other argument broadcasts it.

Shapes are all that matters here. Without weights torch works them out in Python, for these
and for normalisations several times as slowly as for convolutions.
"""


@dataclass(frozen=True, slots=True)
class Census:
    """Size and work of a network.

    Parameters
    ----------
    parameters
        Elements of all parameters; BatchNorm statistics are not parameters.
    macs
        Multiply-accumulates of convolutions and linear layers for one image.
    depth
        Longest chain of convolutions and linear layers.
    """

    parameters: int
    macs: int
    depth: int

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply-accumulate."""
        return 2 * self.macs


def take_census(module: nn.Module, resolution: int) -> Census:
    """Count a module on one image ``(1, 3, resolution, resolution)``.

    Parameters
    ----------
    module
        Preferably on the ``meta`` device, where nothing is computed.
    resolution
        Height and width in pixels.
    """
    parameter = next(module.parameters())
    image = torch.zeros(1, 3, resolution, resolution, device=parameter.device)
    with torch.no_grad(), _Counter() as counter:
        module.eval()(image)
    return Census(sum(p.numel() for p in module.parameters()), counter.macs, counter.depth)


class _Counter(TorchDispatchMode):
    """Adds up multiply-accumulates, and follows the longest chain of layers to each tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.macs = 0
        self.depth = 0
        self._depths: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = _run(func, args, kwargs or {})
        depth = max((self._depths.get(tensor, 0) for tensor in _tensors(args)), default=0)
        if func in _LAYERS:
            weight = args[_LAYERS[func]]
            # Each output element of a convolution reads one filter; of a product, one column.
            reads = weight.shape[0] if weight.dim() == 2 else math.prod(weight.shape[1:])
            self.macs += result.numel() * reads
            depth += 1
            self.depth = max(self.depth, depth)
        for tensor in _tensors((result,)):
            self._depths[tensor] = depth
        return result


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator; where only shapes are known, take what they are from its input if it can."""
    first = args[0] if args else None
    if not isinstance(first, torch.Tensor) or not first.is_meta:
        return func(*args, **kwargs)
    if func is _aten.native_batch_norm.default:
        statistics = first.new_empty(0)  # of training; evaluation has none
        return torch.empty_like(first), statistics, statistics
    if func in _SHAPED_LIKE_INPUT and all(t.shape == first.shape for t in _tensors(args)):
        return torch.empty_like(first)
    return func(*args, **kwargs)


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _NoInitialisation(TorchFunctionMode):
    """Leaves weights as they are allocated, which on the ``meta`` device is not at all."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """What a network of the catalogue costs, in training form and fused.

    FLOPs are two per multiply-accumulate, of level ``repvgg``, for one image.
    """

    name: str
    title: str
    family: str
    origin: str
    source: str
    choices: str
    resolution: int
    parameters: int
    parameters_repvgg: int
    parameters_full: int
    flops_unfused: int
    flops: int
    depth: int


def list_catalogue() -> tuple[CatalogueRow, ...]:
    """Count every network of the catalogue, on the ``meta`` device: no weights are made."""
    rows = []
    for family, entry in CATALOG.values():
        with _NoInitialisation(), torch.device("meta"):
            forms = {level: family.build(entry.config, level, ()) for level in _LEVELS}
        unfused, repvgg = (take_census(forms[level], entry.resolution) for level in _COUNTED)
        rows.append(
            CatalogueRow(
                name=entry.name,
                title=entry.title,
                family=family.title,
                origin=entry.origin,
                source=entry.source,
                choices=entry.choices,
                resolution=entry.resolution,
                parameters=unfused.parameters,
                parameters_repvgg=repvgg.parameters,
                parameters_full=sum(p.numel() for p in forms["full"].parameters()),
                flops_unfused=unfused.flops,
                flops=repvgg.flops,
                depth=repvgg.depth,
            )
        )
    return tuple(rows)
