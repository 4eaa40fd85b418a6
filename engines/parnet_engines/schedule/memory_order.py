"""The order of memory: whether every read surely finds the tensor it is meant for.

Proven in two parts. In issue order, every read finds its own buffer's tensor. And any
two uses of the same memory, of which at least one writes, are ordered: within an
inference by happens-before, and against the next inference of the slot by way of the
origin's end and start. The second part makes every execution equal to the first one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import TYPE_CHECKING, Literal

from parnet_engines.schedule.fault import Fault, FaultKind
from parnet_engines.schedule.happens_before import timeline_of
from parnet_engines.schedule.program import Program, Run

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from parnet_engines.schedule.happens_before import Moment

_START = -1
"""Stands for the start of the inference, where the caller has written the inputs."""


@dataclass(frozen=True, slots=True)
class _Use:
    """One use of one piece of memory at one point of an inference.

    Parameters
    ----------
    point
        Index of a step; `_START`, or the number of steps for the end of the inference.
    memory
        Identifies a storage or the workspace of an engine.
    name
        What a message calls it.
    verb
        A run both reads and writes its engine's workspace: it "uses" it.
    """

    point: int
    memory: Hashable
    name: str
    verb: Literal["reads", "writes", "uses"]


def content_faults(program: Program) -> Iterator[Fault]:
    """Yield the reads that do not find their tensor even in issue order."""
    end = len(program.steps)
    latest: dict[Hashable, _Use] = {}
    for use in _buffer_uses(program):
        if use.verb == "writes":
            latest[use.memory] = use
            continue
        writer = latest.get(use.memory)
        if writer is not None and writer.name == use.name:
            continue
        text = f"{_name(program, use.point)} reads {use.name}, " + (
            "which nothing earlier in issue order writes"
            if writer is None
            else f"but {_name(program, writer.point)} has put {writer.name} there"
        )
        kind = FaultKind.MISSING_OUTPUT if use.point == end else FaultKind.WRONG_CONTENT
        yield Fault(kind, _steps(program, use.point), text)


def order_faults(program: Program) -> Iterator[Fault]:
    """Yield the conflicting uses of memory that nothing orders, one fault for two steps."""
    moments = _moments(program)
    start, end = moments[_START], moments[len(program.steps)]
    uses: dict[Hashable, list[_Use]] = defaultdict(list)
    for use in chain(_buffer_uses(program), _engine_uses(program)):
        uses[use.memory].append(use)
    for (before, after), (first, second) in _conflicts(uses.values()).items():
        steps = _steps(program, before, after)
        clash = _clash(program, first, second)
        if before < after and not moments[before].precedes(moments[after]):
            missing = f"{_short(program, before)} before {_short(program, after)}"
            text = f"{clash}, but nothing orders {missing}"
            yield Fault(FaultKind.UNORDERED, steps, text)
        gaps = []
        if not moments[before].precedes(end):
            gaps.append(f"{_short(program, before)} before the end of its inference")
        if not start.precedes(moments[after]):
            gaps.append(f"{_short(program, after)} after the start of its inference")
        if gaps:
            text = f"in the slot's next inference {clash} in this one, but nothing orders "
            yield Fault(FaultKind.UNORDERED_NEXT, steps, text + " or ".join(gaps))
    for first, second in chain.from_iterable(combinations(group, 2) for group in uses.values()):
        if first.point == second.point and {first.verb, second.verb} != {"reads"}:
            text = (
                f"{_name(program, first.point)} {first.verb} {first.name} and "
                f"{second.verb} {second.name} in the same memory"
            )
            yield Fault(FaultKind.ONE_STEP, _steps(program, first.point), text)


def _buffer_uses(program: Program) -> Iterator[_Use]:
    """Yield every use of a buffer in issue order, the reads of a step before its writes."""

    def use(point: int, name: str, verb: Literal["reads", "writes"]) -> _Use:
        return _Use(point, program.buffers_by_name[name].storage, repr(name), verb)

    for name in program.inputs:
        yield use(_START, name, "writes")
    for index, step in enumerate(program.steps):
        for name in step.reads:
            yield use(index, name, "reads")
        for name in step.writes:
            yield use(index, name, "writes")
    for name in program.outputs:
        yield use(len(program.steps), name, "reads")


def _engine_uses(program: Program) -> Iterator[_Use]:
    for index, step in enumerate(program.steps):
        if isinstance(step, Run):
            device = program.lanes_by_name[step.lane].device
            name = f"the engine of {step.segment!r} on {device}"
            yield _Use(index, (step.segment, device), name, "uses")


def _moments(program: Program) -> Mapping[int, Moment]:
    timeline = timeline_of(program)
    return {
        _START: timeline.start,
        **dict(enumerate(timeline.steps)),
        len(program.steps): timeline.end,
    }


def _conflicts(groups: Iterable[list[_Use]]) -> Mapping[tuple[int, int], tuple[_Use, _Use]]:
    """Return one conflict for every two points that have any, a point and itself included."""
    found: dict[tuple[int, int], tuple[_Use, _Use]] = {}
    for group in groups:
        for first, second in product(group, repeat=2):
            if {first.verb, second.verb} != {"reads"}:
                found.setdefault((first.point, second.point), (first, second))
    return found


def _clash(program: Program, first: _Use, second: _Use) -> str:
    shared = f" in the memory of {first.name}" if second.name != first.name else ""
    return (
        f"{_name(program, second.point)} {second.verb} {second.name}{shared}, "
        f"which {_name(program, first.point)} {first.verb}"
    )


def _name(program: Program, point: int) -> str:
    inside = 0 <= point < len(program.steps)
    return program.describe(point) if inside else _short(program, point)


def _short(program: Program, point: int) -> str:
    if point == _START:
        return "the start of the inference"
    return "the end of the inference" if point == len(program.steps) else f"step {point}"


def _steps(program: Program, *points: int) -> tuple[int, ...]:
    return tuple(sorted({point for point in points if 0 <= point < len(program.steps)}))
