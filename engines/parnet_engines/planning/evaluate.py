"""The timing model: what a placement will take, predicted from costs and a link.

This module is the only definition of a placement's time: every search calls it, and
a simulation of the program lowered from a placement has to agree with it. The rules:

1. At time 0 the network inputs lie on the device of the origin lane (the first one)
   and nowhere else.
2. A lane does one thing at a time, in issue order, and nothing overtakes.
3. Before a segment runs, its lane *pulls* what the segment reads and its device does
   not hold: one copy for each such tensor, in the order of the segment's inputs. A
   copy occupies the lane that pulls (not the producer's), and starts as soon as that
   lane, its source and the link are free.
4. A copied tensor stays: later segments on the same device read it without a copy.
5. The source of a copy is the device of the first assignment, in issue order, that
   produces the tensor.
6. The directed link between two devices carries one copy at a time, in issue order.
   Within a device nothing is copied.
7. The segment starts as soon as its lane is free and everything it reads is ready on
   its device. It takes its latency in the cost table for the lane's kind of device
   and number of threads, while as many lanes are busy as the placement has there.
8. At the end the origin lane pulls the network outputs that its device does not
   hold, in their order. The inference is over when every lane is.

The *latency* is the end of rule 8. The *interval* counts when several inferences are
in flight: it is the longest total time of any lane or directed link. No two inferences
can start closer together, and lanes that never wait for one another come down to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parnet_engines.planning.scenario import PS_PER_MS, Instance, Scenario

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.schedule.placement import Placement
    from parnet_export.stream_graph import StreamGraph

Objective = Literal["latency", "throughput"]
"""What a plan is to make small: the latency, or the interval of several in flight."""

ABSENT = -1
"""When a tensor is ready on a device that does not hold it."""


@dataclass(frozen=True, slots=True)
class Span:
    """A segment's run or a tensor's copy, from start to end.

    Parameters
    ----------
    name
        The segment that runs or the tensor that is copied.
    lane
        The lane that is occupied.
    start_ms, end_ms
        Milliseconds since the inference started.
    source
        The device a tensor is copied from; empty for a run.
    """

    name: str
    lane: str
    start_ms: float
    end_ms: float
    source: str = ""

    @property
    def is_copy(self) -> bool:
        """Whether a tensor is copied, rather than a segment run."""
        return bool(self.source)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted timeline of one inference.

    Parameters
    ----------
    spans
        Every run and copy, in issue order.
    latency_ms
        From the inference's start to its end, with nothing else in flight.
    interval_ms
        Least time between two inferences when several are in flight.
    critical_path
        The chain of spans, each waiting for the one before, that ends last.
    """

    spans: tuple[Span, ...]
    latency_ms: float
    interval_ms: float
    critical_path: tuple[Span, ...]


class Play:
    """The rules of the timing model, applied to one assignment after the other.

    Attributes
    ----------
    lane_free_ps
        When each lane has done all it was given.
    lane_load_ps
        How long each lane was busy.
    ready_ps
        When each tensor is ready on each device, at ``tensor * devices + device``;
        `ABSENT` where a device does not hold it.
    home
        For each tensor the device that copies come from, -1 before there is one.
    link_free_ps, link_load_ps
        As for lanes, of each directed link at ``source * devices + target``.
    """

    __slots__ = (
        "home",
        "instance",
        "lane_free_ps",
        "lane_load_ps",
        "link_free_ps",
        "link_load_ps",
        "ready_ps",
    )

    def __init__(self, instance: Instance) -> None:
        devices = len(instance.device_names)
        self.instance = instance
        self.lane_free_ps = [0] * len(instance.lanes)
        self.lane_load_ps = [0] * len(instance.lanes)
        self.ready_ps = [ABSENT] * (len(instance.tensor_names) * devices)
        self.home = [-1] * len(instance.tensor_names)
        self.link_free_ps = [0] * (devices * devices)
        self.link_load_ps = [0] * (devices * devices)
        for tensor in instance.network_inputs:
            self.home[tensor] = 0
            self.ready_ps[tensor * devices] = 0

    def copy(self) -> Play:
        """Return an independent play at the same point."""
        twin = object.__new__(Play)
        twin.instance = self.instance
        twin.lane_free_ps = self.lane_free_ps.copy()
        twin.lane_load_ps = self.lane_load_ps.copy()
        twin.ready_ps = self.ready_ps.copy()
        twin.home = self.home.copy()
        twin.link_free_ps = self.link_free_ps.copy()
        twin.link_load_ps = self.link_load_ps.copy()
        return twin

    def accepts(self, segment: int, lane: int) -> bool:
        """Tell whether a search need consider the segment as this lane's next one.

        Everything it reads must have been produced. Nothing it produces may lie on the
        lane's device yet: a second run there is no placement, and a run after a copy
        only costs time.
        """
        instance = self.instance
        devices = len(instance.device_names)
        device = instance.lane_device[lane]
        home, ready_ps = self.home, self.ready_ps
        if any(home[tensor] < 0 for tensor in instance.reads[segment]):
            return False
        return all(ready_ps[t * devices + device] < 0 for t in instance.writes[segment])

    def run(self, segment: int, lane: int, spans: list[Span] | None = None) -> int:
        """Give a lane its next segment and return when the segment ends."""
        instance = self.instance
        ready_ps = self.ready_ps
        devices = len(instance.device_names)
        device = instance.lane_device[lane]
        start_ps = 0
        for tensor in instance.reads[segment]:
            there_ps = ready_ps[tensor * devices + device]
            if there_ps < 0:
                there_ps = self._pull(tensor, lane, spans)
            start_ps = max(start_ps, there_ps)
        start_ps = max(start_ps, self.lane_free_ps[lane])
        end_ps = start_ps + instance.latency_ps[segment][lane]
        self.lane_free_ps[lane] = end_ps
        self.lane_load_ps[lane] += instance.latency_ps[segment][lane]
        for tensor in instance.writes[segment]:
            ready_ps[tensor * devices + device] = end_ps
            if self.home[tensor] < 0:
                self.home[tensor] = device
        if spans is not None:
            name = instance.segment_names[segment]
            spans.append(_span(name, instance.lanes[lane].name, start_ps, end_ps))
        return end_ps

    def finish(self, spans: list[Span] | None = None) -> int:
        """Bring the network outputs to the origin and return when the inference is over."""
        devices = len(self.instance.device_names)
        for tensor in self.instance.network_outputs:
            if self.ready_ps[tensor * devices] < 0:
                self._pull(tensor, 0, spans)
        return max(self.lane_free_ps)

    @property
    def interval_ps(self) -> int:
        """The longest total time of any lane or directed link so far."""
        return max(*self.lane_load_ps, *self.link_load_ps)

    def _pull(self, tensor: int, lane: int, spans: list[Span] | None) -> int:
        instance = self.instance
        copy_ps = instance.copy_ps[tensor]
        devices = len(instance.device_names)
        device = instance.lane_device[lane]
        source = self.home[tensor]
        link = source * devices + device
        start_ps = max(
            self.lane_free_ps[lane],
            self.ready_ps[tensor * devices + source],
            self.link_free_ps[link],
        )
        end_ps = start_ps + copy_ps
        self.lane_free_ps[lane] = self.link_free_ps[link] = end_ps
        self.lane_load_ps[lane] += copy_ps
        self.link_load_ps[link] += copy_ps
        self.ready_ps[tensor * devices + device] = end_ps
        if spans is not None:
            name, where = instance.tensor_names[tensor], instance.device_names[source]
            spans.append(_span(name, instance.lanes[lane].name, start_ps, end_ps, where))
        return end_ps


def _span(name: str, lane: str, start_ps: int, end_ps: int, source: str = "") -> Span:
    return Span(name, lane, start_ps / PS_PER_MS, end_ps / PS_PER_MS, source)


def check_placement(graph: StreamGraph, placement: Placement) -> None:
    """Check that a placement runs the whole of a stream graph in a possible order.

    Raises
    ------
    ValueError
        With a clause that names the segment which is unknown, on no lane or issued
        before one that feeds it, or the two lanes which share a core.
    """
    names = {segment.name for segment in graph.segments}
    owner: dict[int, str] = {}
    for lane in placement.lanes:
        for core in lane.cores:
            if owner.setdefault(core, lane.name) != lane.name:
                raise ValueError(f"lanes {owner[core]!r} and {lane.name!r} share core {core}")
    issued: set[str] = set()
    for assignment in placement.assignments:
        name = assignment.segment
        if name not in names:
            raise ValueError(f"the network has no segment {name!r}")
        for producer in graph.predecessors[name]:
            if producer not in issued:
                raise ValueError(f"segment {name!r} is issued before {producer!r}, which feeds it")
        issued.add(name)
    missing = [segment.name for segment in graph.segments if segment.name not in issued]
    if missing:
        raise ValueError(f"no lane runs segment {missing[0]!r}")


def predict(scenario: Scenario, placement: Placement) -> Prediction:
    """Return the timeline of a placement under the rules of this module.

    Raises
    ------
    ValueError
        When the placement does not fit the stream graph (see `check_placement`).
    InputError
        When the cost table lacks a segment on a lane.
    """
    check_placement(scenario.graph, placement)
    instance = Instance.of(scenario, placement.lanes)
    play = Play(instance)
    spans: list[Span] = []
    for segment, lane in instance.steps(placement):
        play.run(segment, lane, spans)
    latency_ps = play.finish(spans)
    return Prediction(
        tuple(spans),
        latency_ps / PS_PER_MS,
        play.interval_ps / PS_PER_MS,
        _critical_path(scenario.graph, placement, spans),
    )


def _critical_path(
    graph: StreamGraph, placement: Placement, spans: Sequence[Span]
) -> tuple[Span, ...]:
    """Walk back from the last end, each time to the span whose end was waited for.

    Data counts before lanes and links, so that the path follows tensors where it can.
    """
    device = {lane.name: lane.device for lane in placement.lanes}
    reads = {s.name: {t.name for t in s.inputs} for s in graph.segments}
    writes = {s.name: {t.name for t in s.outputs} for s in graph.segments}

    def feeds(before: Span, after: Span) -> bool:
        tensors = {before.name} if before.is_copy else writes[before.name]
        if after.is_copy:
            return after.name in tensors and after.source == device[before.lane]
        return (
            not tensors.isdisjoint(reads[after.name]) and device[before.lane] == device[after.lane]
        )

    def shares_lane_or_link(before: Span, after: Span) -> bool:
        same_link = (
            bool(before.source)
            and before.source == after.source
            and device[before.lane] == device[after.lane]
        )
        return before.lane == after.lane or same_link

    if not spans:
        return ()
    last = max(range(len(spans)), key=lambda number: spans[number].end_ms)
    path = [spans[last]]
    while path[-1].start_ms > 0:
        after = path[-1]
        on_time = [b for b in spans[:last] if b.end_ms == after.start_ms]
        before = [b for b in on_time if feeds(b, after)] or [
            b for b in on_time if shares_lane_or_link(b, after)
        ]
        path.append(before[-1])
        last = spans.index(before[-1])
    return tuple(reversed(path))
