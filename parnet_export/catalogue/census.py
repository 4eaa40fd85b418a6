"""Count what a PyTorch module costs, without weights or data."""

from __future__ import annotations

import contextlib
import gc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from parnet_export.catalogue.operator_shapes import result_without_values
from parnet_export.catalogue.row import CatalogueRow
from parnet_export.models.catalog import CATALOG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping, Sequence

    from torch import nn

    from parnet_export.network import Level

_COUNTED: tuple[Level, ...] = ("none", "repvgg")
_LEVELS: tuple[Level, ...] = (*_COUNTED, "full")

_CREATORS = frozenset(_device_constructors())

_aten = torch.ops.aten

_LAYERS = {
    # Operator: which argument is the weight.
    _aten.convolution.default: 1,
    _aten.addmm.default: 2,
    _aten.mm.default: 1,
}


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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and skipping first loads the whole compiler

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result: Any = None if kwargs else result_without_values(func, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
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


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _WithoutValues(TorchFunctionMode):
    """Builds modules on the ``meta`` device and leaves out whatever only sets their values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CREATORS:
            return func(*args, **kwargs | {"device": "meta"})
        # Operations in place end in an underscore: Tensor.zero_, torch.nn.init.uniform_.
        if func.__name__.endswith("_") and not func.__name__.endswith("__"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def count_catalogue() -> tuple[CatalogueRow, ...]:
    """Count every network of the catalogue without making weights."""
    rows = []
    with _without_garbage_collection():
        for family, entry in CATALOG.values():
            with _WithoutValues():
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


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keep the collector from searching tens of thousands of live modules again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
