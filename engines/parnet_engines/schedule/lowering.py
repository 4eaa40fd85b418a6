"""Lowering: from segments on lanes to the steps that lanes execute.

First every tensor is routed. A segment reads each tensor from a buffer on its own
lane's device. Where an earlier segment (or the caller) has put the tensor there,
that buffer serves; a recomputed segment thus feeds the readers of its own device.
Otherwise a `Copy` brings it from the device that produced it first. The copy runs
on the lane of its first reader, just before that reader, and serves all later
readers on the device. A network output that is not on the origin's device is
copied there on the origin lane. No two buffers share memory.

Then the steps are synchronised. A step needs a wait for each step that writes
what it reads; the first step of a lane needs the start of the inference; the end
needs the last step of every lane. Of these waits only those are kept that follow
neither from the order of the lane nor from another wait (a transitive reduction),
so that the program is wrong without any one of them. An event is recorded right
after the step it marks, and only if something waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.schedule.happens_before import LaneClocks
from parnet_engines.schedule.program import Buffer, Copy, Program, Record, Run, Step, Wait

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.schedule.placement import Placement
    from parnet_export.stream_graph import Segment, StreamGraph, TensorSpec

_START = -1
"""Stands for the start of the inference among the indices of steps."""


def lower(graph: StreamGraph, placement: Placement, inferences_in_flight: int = 1) -> Program:
    """Return the program that runs a stream graph as placed.

    Parameters
    ----------
    graph
        The segments and the tensors between them.
    placement
        Which lane runs which segment; its order becomes the issue order.
    inferences_in_flight
        How many inferences may be under way at once.

    Raises
    ------
    ValueError
        When the placement is not one of this graph: a segment is unknown or runs
        nowhere, or runs before the segments it reads from.
    """
    routing = _Routing(graph, placement)
    steps = _synchronise(routing.steps, [lane.name for lane in placement.lanes])
    return Program(
        lanes=placement.lanes,
        buffers=tuple(routing.buffers.values()),
        inputs=routing.inputs,
        outputs=routing.outputs,
        steps=steps,
        inferences_in_flight=inferences_in_flight,
    )


class _Routing:
    """The runs and copies of one inference, and the buffers between them."""

    def __init__(self, graph: StreamGraph, placement: Placement) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Run | Copy] = []
        self._first: dict[str, str] = {}
        self._local: dict[tuple[str, str], str] = {}
        self._devices = {lane.name: lane.device for lane in placement.lanes}
        origin = placement.lanes[0]
        self.inputs = tuple(self._write(tensor, origin.device) for tensor in graph.inputs)
        segments = {segment.name: segment for segment in graph.segments}
        for assignment in placement.assignments:
            if assignment.segment not in segments:
                raise ValueError(f"the placement runs the unknown segment {assignment.segment!r}")
            self._run(segments[assignment.segment], assignment.lane)
        missing = segments.keys() - {assignment.segment for assignment in placement.assignments}
        if missing:
            raise ValueError(f"the placement runs segment {min(missing)!r} nowhere")
        self.outputs = tuple(self._read(tensor, origin.name) for tensor in graph.outputs)

    def _run(self, segment: Segment, lane: str) -> None:
        device = self._devices[lane]
        inputs = tuple(self._read(tensor, lane, segment.name) for tensor in segment.inputs)
        outputs = tuple(self._write(tensor, device) for tensor in segment.outputs)
        self.steps.append(Run(lane, segment.name, inputs, outputs))

    def _read(self, tensor: TensorSpec, lane: str, reader: str = "") -> str:
        """Return the tensor's buffer on the lane's device, after copying it there if need be."""
        device = self._devices[lane]
        local = self._local.get((tensor.name, device))
        if local is not None:
            return local
        if tensor.name not in self._first:
            raise ValueError(
                f"the placement runs segment {reader!r} before the one that produces "
                f"{tensor.name!r}"
            )
        target = self._write(tensor, device)
        self.steps.append(Copy(lane, self._first[tensor.name], target))
        return target

    def _write(self, tensor: TensorSpec, device: str) -> str:
        """Return a new buffer for the tensor, which later readers on the device will use."""
        name = f"{tensor.name}@{device}"
        if name in self.buffers:  # recomputed where an earlier reader already had it copied
            name += "#2"
        self.buffers[name] = Buffer(name, tensor, device)
        self._first.setdefault(tensor.name, name)
        self._local[tensor.name, device] = name
        return name


def _synchronise(steps: Sequence[Run | Copy], lanes: Sequence[str]) -> tuple[Step, ...]:
    """Put the necessary waits, and the records they need, between the steps."""
    origin = lanes[0]
    clocks = LaneClocks(lanes)
    moments = {_START: clocks.advance(origin)}
    writers: dict[str, int] = {}
    last: dict[str, int] = {}
    awaited: list[list[int]] = []

    def wait(lane: str, needed: set[int]) -> None:
        # Order never points backwards in issue order, so a later step may imply an
        # earlier one but not the reverse: taking the latest first leaves none too many.
        kept: list[int] = []
        for index in sorted(needed, reverse=True):
            if not clocks.knows(lane, moments[index]):
                clocks.learn(lane, moments[index])
                kept.append(index)
        awaited.append(kept[::-1])

    for index, step in enumerate(steps):
        needed = {writers.get(buffer, _START) for buffer in step.reads}
        wait(step.lane, needed if step.lane in last else needed | {_START})
        moments[index] = clocks.advance(step.lane)
        writers.update(dict.fromkeys(step.writes, index))
        last[step.lane] = index
    wait(origin, set(last.values()))

    marked = {index for indices in awaited for index in indices}
    ordered: list[Step] = [Record(origin, "start")] if _START in marked else []
    for index, step in enumerate(steps):
        ordered += [Wait(step.lane, _event(steps, before)) for before in awaited[index]]
        ordered.append(step)
        if index in marked:
            ordered.append(Record(step.lane, _event(steps, index)))
    ordered += [Wait(origin, _event(steps, before)) for before in awaited[-1]]
    return tuple(ordered)


def _event(steps: Sequence[Run | Copy], index: int) -> str:
    """Name the event that marks the end of a step, or the start of the inference."""
    if index == _START:
        return "start"
    step = steps[index]
    return f"{step.lane}/{step.segment if isinstance(step, Run) else step.target}"
