"""What is planned for: a stream graph with its costs, and lanes to run it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parnet_engines.links import FREE_LINK, Link

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from parnet_engines.cost_table import CostTable
    from parnet_engines.placement import Lane, Placement
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


def _to_ps(milliseconds: float) -> int:
    return round(milliseconds * PS_PER_MS)


@dataclass(frozen=True, slots=True)
class Instance:
    """A scenario on given lanes, with positions in place of names.

    Segments, lanes, devices and tensors are numbered from 0; device 0 is the origin's.
    Times are whole picoseconds: sums of integers do not depend on their order, so that
    equal schedules compare equal.

    Parameters
    ----------
    lane_device
        The device of each lane.
    latency_ps
        The latency of each segment on each lane: ``latency_ps[segment][lane]``.
    reads
        For each segment the tensors it reads and what a copy of each takes.
    writes
        For each segment the tensors it produces.
    exits
        The network outputs and what a copy of each takes.
    network_inputs
        The tensors that are there from the start.
    predecessors, successors
        The segments that each segment reads from and feeds.
    producer
        The segment that produces each tensor, -1 for network inputs.
    copy_ps
        What a copy of each tensor takes.
    lanes_on
        The lanes of each device.
    horizon_ps
        The time by which everything is done if nothing ever overlaps.
    """

    lanes: tuple[Lane, ...]
    segment_names: tuple[str, ...]
    tensor_names: tuple[str, ...]
    device_names: tuple[str, ...]
    lane_device: tuple[int, ...]
    latency_ps: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[tuple[int, int], ...], ...]
    writes: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[int, int], ...]
    network_inputs: tuple[int, ...]
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    producer: tuple[int, ...]
    copy_ps: tuple[int, ...]
    lanes_on: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, scenario: Scenario, lanes: Sequence[Lane]) -> Instance:
        """Look everything up once that a search would look up over and over."""
        graph = scenario.graph
        tensors = {t.name: t for t in graph.inputs}
        tensors |= {t.name: t for segment in graph.segments for t in segment.outputs}
        tensor_number = {name: number for number, name in enumerate(tensors)}
        segment_number = {s.name: number for number, s in enumerate(graph.segments)}
        devices = tuple(dict.fromkeys(lane.device for lane in lanes))
        lanes_of = {device: [x.device for x in lanes].count(device) for device in devices}

        def with_copies(names: Iterable[str]) -> tuple[tuple[int, int], ...]:
            return tuple(
                (
                    tensor_number[name],
                    _to_ps(scenario.link.copy_ms(tensors[name].size_bytes(scenario.dimensions))),
                )
                for name in dict.fromkeys(names)
            )

        return cls(
            lanes=tuple(lanes),
            segment_names=tuple(segment_number),
            tensor_names=tuple(tensor_number),
            device_names=devices,
            lane_device=tuple(devices.index(lane.device) for lane in lanes),
            latency_ps=tuple(
                tuple(
                    _to_ps(scenario.costs.latency_ms(name, lane, lanes_of[lane.device]))
                    for lane in lanes
                )
                for name in segment_number
            ),
            reads=tuple(with_copies(t.name for t in s.inputs) for s in graph.segments),
            writes=tuple(tuple(tensor_number[t.name] for t in s.outputs) for s in graph.segments),
            exits=with_copies(t.name for t in graph.outputs),
            network_inputs=tuple(tensor_number[t.name] for t in graph.inputs),
            predecessors=tuple(
                tuple(segment_number[p] for p in graph.predecessors[name])
                for name in segment_number
            ),
            successors=tuple(
                tuple(segment_number[c] for c in graph.successors[name]) for name in segment_number
            ),
        )

    def steps(self, placement: Placement) -> list[Step]:
        """Return the assignments of a placement on these lanes by position."""
        segments = {name: number for number, name in enumerate(self.segment_names)}
        lanes = {lane.name: number for number, lane in enumerate(self.lanes)}
        return [(segments[a.segment], lanes[a.lane]) for a in placement.assignments]
