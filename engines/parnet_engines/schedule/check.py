"""The checker: proves that a program cannot go wrong, or says where it does.

`parnet_engines.schedule.program` defines what a program means and which executions its lanes
allow. A program without faults reads the same values in all of them, also while the
next inferences are under way (`parnet_engines.schedule.memory_order`), cannot deadlock, and can
be captured into a CUDA graph.

Faults of structure are told apart from faults of memory. They also name programs that
work by luck on one kind of lane only, such as a wait before its record in issue order,
which delays a CPU thread but does nothing to a CUDA stream.
"""

from __future__ import annotations

import graphlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from parnet_engines.schedule.fault import Fault, FaultKind
from parnet_engines.schedule.happens_before import timeline_of
from parnet_engines.schedule.memory_order import content_faults, order_faults
from parnet_engines.schedule.program import Copy, Program, Record, Run, Wait
from parnet_export.errors import CheckFailedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from parnet_export.stream_graph import StreamGraph, TensorSpec

_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class CheckedProgram:
    """A program without faults: nothing else can be wrapped. `checked` makes one.

    Parameters
    ----------
    program
        The proven program.
    graph
        The stream graph it is proven to compute; without one only its order is proven.

    Raises
    ------
    CheckFailedError
        When the program has faults; the message holds the first ones.
    """

    program: Program
    graph: StreamGraph | None = None

    def __post_init__(self) -> None:
        faults = find_faults(self.program, self.graph)
        if not faults:
            return
        shown = "; ".join(fault.message for fault in faults[:_MAX_SHOWN])
        rest = len(faults) - _MAX_SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        raise CheckFailedError(f"The program must not run: {shown}{more}.")


def checked(program: Program, graph: StreamGraph | None = None) -> CheckedProgram:
    """Prove a program, and return it as one that a session accepts.

    Raises
    ------
    CheckFailedError
        When the program has faults; the message holds the first ones.
    """
    return CheckedProgram(program, graph)


def find_faults(program: Program, graph: StreamGraph | None = None) -> tuple[Fault, ...]:
    """Return everything that is wrong with a program, faults of structure first.

    Parameters
    ----------
    program
        The program to check.
    graph
        Where given, the segments and interface of the program are compared with it, too.
    """
    faults = chain(
        _event_faults(program),
        _deadlock_faults(program),
        _lane_faults(program),
        _interface_faults(program),
        _device_faults(program),
        _graph_faults(program, graph) if graph else (),
        content_faults(program),
        order_faults(program),
    )
    return tuple(faults)


def _records(program: Program) -> Mapping[str, int]:
    """Return the step that records each event, the first one if there are more."""
    found: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        if isinstance(step, Record):
            found.setdefault(step.event, index)
    return found


def _event_faults(program: Program) -> Iterator[Fault]:
    name = program.describe
    records = _records(program)
    for index, step in enumerate(program.steps):
        if isinstance(step, Record) and records[step.event] != index:
            first = records[step.event]
            text = f"{name(first)} and {name(index)} record the same event"
            yield Fault(FaultKind.RECORDED_TWICE, (first, index), text)
        if not isinstance(step, Wait):
            continue
        record = records.get(step.event)
        if record is None:
            text = f"{name(index)} never ends, because no step records its event"
            yield Fault(FaultKind.NEVER_RECORDED, (index,), text)
        elif record > index:
            text = (
                f"{name(index)} comes before {name(record)} in issue order, "
                "so that a CUDA stream would not wait"
            )
            yield Fault(FaultKind.RECORDED_LATER, (index, record), text)
        elif program.steps[record].lane == step.lane:
            text = f"{name(index)} waits for {name(record)}, which its own lane has passed anyway"
            yield Fault(FaultKind.OWN_EVENT, (record, index), text)


def _deadlock_faults(program: Program) -> Iterator[Fault]:
    records = _records(program)
    before: dict[int, list[int]] = defaultdict(list)
    for indices in program.steps_by_lane.values():
        for earlier, later in pairwise(indices):
            before[later].append(earlier)
    for index, step in enumerate(program.steps):
        if isinstance(step, Wait) and step.event in records:
            before[index].append(records[step.event])
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError as error:
        cycle = sorted(set(error.args[1]))
        waits = [index for index in cycle if isinstance(program.steps[index], Wait)]
        names = " and ".join(program.describe(index) for index in waits)
        text = (
            f"{names} wait for each other, so that none of them ever ends"
            if len(waits) > 1
            else f"{names} waits for an event that its own lane records only afterwards"
        )
        yield Fault(FaultKind.DEADLOCK, tuple(waits), text)


def _lane_faults(program: Program) -> Iterator[Fault]:
    timeline = timeline_of(program)
    for lane in program.lanes[1:]:
        indices = program.steps_by_lane[lane.name]
        if not indices:
            continue
        first = indices[0]
        if not timeline.start.precedes(timeline.steps[first]):
            text = (
                f"{program.describe(first)} starts its lane, but nothing orders it after "
                f"the start of the inference on {program.origin.name}"
            )
            yield Fault(FaultKind.NOT_FORKED, (first,), text)
        # A record adds no work: whether the lane has come back depends on what precedes it.
        work = [index for index in indices if not isinstance(program.steps[index], Record)]
        last = work[-1] if work else first
        if not timeline.steps[last].precedes(timeline.end):
            text = (
                f"{program.describe(last)} ends its lane, but nothing orders it before "
                f"the end of the inference on {program.origin.name}"
            )
            yield Fault(FaultKind.NOT_JOINED, (last,), text)


def _interface_faults(program: Program) -> Iterator[Fault]:
    buffers = program.buffers_by_name
    origin = program.origin.device
    for name in dict.fromkeys((*program.inputs, *program.outputs)):
        if buffers[name].device != origin:
            text = f"the caller's buffer {name!r} is not on {origin}, the origin's device"
            yield Fault(FaultKind.WRONG_DEVICE, (), text)
    inputs = {buffers[name].storage for name in program.inputs}
    for index, step in enumerate(program.steps):
        for name in step.writes:
            if buffers[name].storage in inputs:
                text = f"{program.describe(index)} overwrites a network input by writing {name!r}"
                yield Fault(FaultKind.INPUT_OVERWRITTEN, (index,), text)


def _device_faults(program: Program) -> Iterator[Fault]:
    buffers = program.buffers_by_name
    for index, step in enumerate(program.steps):
        device = program.lanes_by_name[step.lane].device
        if isinstance(step, Run):
            for name in dict.fromkeys((*step.inputs, *step.outputs)):
                if buffers[name].device != device:
                    text = f"{program.describe(index)} runs on {device}, where {name!r} is not"
                    yield Fault(FaultKind.WRONG_DEVICE, (index,), text)
        elif isinstance(step, Copy):
            source, target = buffers[step.source], buffers[step.target]
            if device not in {source.device, target.device}:
                text = (
                    f"{program.describe(index)} is on a lane of {device}, "
                    f"but copies from {source.device} to {target.device}"
                )
                yield Fault(FaultKind.WRONG_DEVICE, (index,), text)
            if source.device == target.device or source.tensor != target.tensor:
                text = f"{program.describe(index)} does not bring one tensor to another device"
                yield Fault(FaultKind.WRONG_COPY, (index,), text)


def _graph_faults(program: Program, graph: StreamGraph) -> Iterator[Fault]:
    segments = {segment.name: segment for segment in graph.segments}

    def differ(buffers: Iterable[str], tensors: Iterable[TensorSpec]) -> bool:
        held = [program.buffers_by_name[name].tensor.name for name in buffers]
        return held != [tensor.name for tensor in tensors]

    for index, step in enumerate(program.steps):
        if not isinstance(step, Run):
            continue
        segment = segments.get(step.segment)
        if segment is None:
            text = f"{program.describe(index)} runs a segment that the stream graph does not have"
        elif differ(step.inputs, segment.inputs) or differ(step.outputs, segment.outputs):
            text = f"{program.describe(index)} uses other tensors than its segment"
        else:
            continue
        yield Fault(FaultKind.WRONG_SEGMENT, (index,), text)
    if differ(program.inputs, graph.inputs) or differ(program.outputs, graph.outputs):
        text = "the program's inputs or outputs are not those of the stream graph"
        yield Fault(FaultKind.WRONG_SEGMENT, (), text)
