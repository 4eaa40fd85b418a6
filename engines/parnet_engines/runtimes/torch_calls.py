"""The calls of torch that a graph is made of: merged where one call does, with what they release.

On a GPU every call is a kernel or more, which takes microseconds whatever it computes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from parnet_engines.runtimes.torch_operators import Cast, Mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Pair = tuple["Call", "Call", "Call"]
    """Two calls, the earlier one first, and what does for both in the place of the later one."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator.

    Parameters
    ----------
    compute
        The function.
    inputs, outputs
        Names of tensors; an empty one is an operand that is left out.
    released
        Tensors that nobody needs afterwards.
    """

    compute: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...] = ()


def merge(calls: Sequence[Call], kept: Iterable[str]) -> list[Call]:
    """Return calls that compute the same by fewer kernels.

    Parameters
    ----------
    calls
        In the order in which they run.
    kept
        Tensors that are needed after the last call.
    """
    kept = tuple(kept)
    for pairs in (_silu, _mean_in_float32, _scaled_sum):
        calls = _replaced(calls, pairs(_Chains(calls, kept)))
    return list(calls)


def with_releases(calls: Sequence[Call], kept: Iterable[str]) -> tuple[Call, ...]:
    """Note after each call which tensors nobody needs any more.

    Parameters
    ----------
    calls, kept
        As for `merge`.
    """
    needed = set(kept)
    found: list[Call] = []
    for call in reversed(calls):
        last = [n for n in dict.fromkeys((*call.inputs, *call.outputs)) if n and n not in needed]
        needed.update(call.inputs)
        found.append(replace(call, released=tuple(last)))
    return tuple(reversed(found))


class _Chains:
    """Calls whose result one other call reads, and nobody else."""

    def __init__(self, calls: Sequence[Call], kept: Iterable[str]) -> None:
        self.calls = calls
        uses = Counter(name for call in calls for name in call.inputs)
        uses.update(kept)
        self._by_result = {
            call.outputs[0]: call
            for call in calls
            if len(call.outputs) == 1 and uses[call.outputs[0]] == 1
        }

    def before(self, call: Call, operand: int) -> Call | None:
        """Return the call that made an operand, if nobody else reads it."""
        name = call.inputs[operand] if operand < len(call.inputs) else ""
        return self._by_result.get(name)


def _replaced(calls: Sequence[Call], pairs: Iterator[Pair]) -> list[Call]:
    dropped: set[tuple[str, ...]] = set()
    instead: dict[tuple[str, ...], Call] = {}
    for earlier, later, both in pairs:
        dropped.add(earlier.outputs)
        instead[later.outputs] = both
    return [instead.get(c.outputs, c) for c in calls if c.outputs not in dropped]


def _silu(chains: _Chains) -> Iterator[Pair]:
    """``x * sigmoid(x)``."""
    for call in chains.calls:
        if call.compute is not torch.mul:
            continue
        for gate, other in ((0, 1), (1, 0)):
            sigmoid = chains.before(call, gate)
            if (
                sigmoid is not None
                and sigmoid.compute is torch.sigmoid
                and sigmoid.inputs[0] == call.inputs[other]
            ):
                yield sigmoid, call, Call(functional.silu, sigmoid.inputs, call.outputs)
                break


def _mean_in_float32(chains: _Chains) -> Iterator[Pair]:
    """``mean(float32(x))``: no float32 map is written."""
    for call in chains.calls:
        cast = chains.before(call, 0)
        if (
            isinstance(call.compute, Mean)
            and cast is not None
            and isinstance(cast.compute, Cast)
            and cast.compute.dtype is torch.float32
        ):
            mean = replace(call.compute, dtype=torch.float32)
            yield cast, call, Call(mean, (*cast.inputs, *call.inputs[1:]), call.outputs)


def _scaled_sum(chains: _Chains) -> Iterator[Pair]:
    """``y + x * s``."""
    taken: set[tuple[str, ...]] = set()
    for call in chains.calls:
        if call.compute is not torch.add:
            continue
        for product, other in ((0, 1), (1, 0)):
            scaled = chains.before(call, product)
            if scaled is not None and scaled.compute is torch.mul and scaled.outputs not in taken:
                taken.add(scaled.outputs)
                operands = (call.inputs[other], *scaled.inputs)
                yield scaled, call, Call(torch.addcmul, operands, call.outputs)
                break
