"""What is planned for: a stream graph with its costs, and lanes to run it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from parnet_engines.planning.links import FREE_LINK, Link

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from parnet_engines.planning.cost_table import CostTable
    from parnet_engines.schedule.placement import Lane, Placement
    from parnet_export.stream_graph import StreamGraph

Step = tuple[int, int]
"""An assignment by position: segment of the graph, lane of the placement."""

PS_PER_MS = 10**9
"""Picoseconds in a millisecond."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is to be planned for.

    Parameters
    ----------
    graph
        The segments and who feeds whom.
    costs
        What each segment takes on each kind of device.
    link
        What connects any two devices.
    dimensions
        Sizes of the symbolic dimensions, such as the batch; 1 where not given.
    """

    graph: StreamGraph
    costs: CostTable
    link: Link = FREE_LINK
    dimensions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Instance:
    """A scenario on given lanes, with positions in place of names.

    Segments, lanes, devices and tensors are numbered from 0; device 0 is the origin's.
    Times are whole picoseconds: sums of integers do not depend on their order, so that
    equal schedules compare equal.

    Parameters
    ----------
    lanes
        The lanes, the origin first.
    segment_names, tensor_names, device_names
        What the numbers stand for.
    lane_device
        The device of each lane.
    latency_ps
        The latency of each segment on each lane: ``latency_ps[segment][lane]``.
    copy_ps
        What a copy of each tensor takes.
    reads, writes
        The tensors that each segment reads and produces.
    network_inputs, network_outputs
        The tensors that are there from the start, and those wanted in the end.
    predecessors, successors
        The segments that each segment reads from and feeds.
    """

    lanes: tuple[Lane, ...]
    segment_names: tuple[str, ...]
    tensor_names: tuple[str, ...]
    device_names: tuple[str, ...]
    lane_device: tuple[int, ...]
    latency_ps: tuple[tuple[int, ...], ...]
    copy_ps: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    network_inputs: tuple[int, ...]
    network_outputs: tuple[int, ...]
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, scenario: Scenario, lanes: Sequence[Lane]) -> Instance:
        """Look everything up once that a search would look up over and over.

        Raises
        ------
        InputError
            When the cost table lacks a segment on a lane.
        """
        graph = scenario.graph
        specs = {t.name: t for t in graph.inputs}
        specs |= {t.name: t for segment in graph.segments for t in segment.outputs}
        tensors = {name: number for number, name in enumerate(specs)}
        segments = {s.name: number for number, s in enumerate(graph.segments)}
        on_device = [lane.device for lane in lanes]
        devices = tuple(dict.fromkeys(on_device))
        return cls(
            lanes=tuple(lanes),
            segment_names=tuple(segments),
            tensor_names=tuple(tensors),
            device_names=devices,
            lane_device=tuple(devices.index(device) for device in on_device),
            latency_ps=tuple(
                tuple(
                    _to_ps(scenario.costs.latency_ms(name, lane, on_device.count(lane.device)))
                    for lane in lanes
                )
                for name in segments
            ),
            copy_ps=tuple(
                _to_ps(scenario.link.copy_ms(tensor.size_bytes(scenario.dimensions)))
                for tensor in specs.values()
            ),
            reads=tuple(
                tuple(dict.fromkeys(tensors[t.name] for t in s.inputs)) for s in graph.segments
            ),
            writes=tuple(tuple(tensors[t.name] for t in s.outputs) for s in graph.segments),
            network_inputs=tuple(tensors[t.name] for t in graph.inputs),
            network_outputs=tuple(dict.fromkeys(tensors[t.name] for t in graph.outputs)),
            predecessors=tuple(
                tuple(segments[before] for before in graph.predecessors[name]) for name in segments
            ),
            successors=tuple(
                tuple(segments[after] for after in graph.successors[name]) for name in segments
            ),
        )

    @cached_property
    def lanes_on(self) -> tuple[tuple[int, ...], ...]:
        """The lanes of each device."""
        return tuple(
            tuple(lane for lane, where in enumerate(self.lane_device) if where == device)
            for device in range(len(self.device_names))
        )

    @cached_property
    def producer(self) -> tuple[int, ...]:
        """The segment that produces each tensor, -1 for network inputs."""
        found = [-1] * len(self.tensor_names)
        for segment, tensors in enumerate(self.writes):
            for tensor in tensors:
                found[tensor] = segment
        return tuple(found)

    @cached_property
    def fastest_ps(self) -> tuple[int, ...]:
        """The least latency of each segment on any lane."""
        return tuple(min(latencies) for latencies in self.latency_ps)

    @cached_property
    def followers(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each segment those that read from it, and the longest copy between the two."""
        return tuple(
            tuple(
                (after, max(self.copy_ps[tensor] for tensor in self.between(segment, after)))
                for after in successors
            )
            for segment, successors in enumerate(self.successors)
        )

    @cached_property
    def links_matter(self) -> bool:
        """Whether a link can be busy for one lane while another lane waits for it."""
        return 1 < len(self.device_names) < len(self.lanes)

    def between(self, segment: int, after: int) -> list[int]:
        """Return the tensors that one segment produces and another one reads."""
        return [tensor for tensor in self.reads[after] if self.producer[tensor] == segment]

    def steps(self, placement: Placement) -> list[Step]:
        """Return the assignments of a placement on these lanes by position."""
        segments = {name: number for number, name in enumerate(self.segment_names)}
        lanes = {lane.name: number for number, lane in enumerate(self.lanes)}
        return [(segments[a.segment], lanes[a.lane]) for a in placement.assignments]


def _to_ps(milliseconds: float) -> int:
    return round(milliseconds * PS_PER_MS)
