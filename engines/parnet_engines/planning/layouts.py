"""Layouts known by name: the whole graph on one lane, and the paper's streams on devices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from parnet_engines.planning.cost_table import WHOLE, SegmentCost
from parnet_engines.schedule.placement import Assignment, Placement
from parnet_export.splitting.antichain import heaviest_antichain
from parnet_export.stream_graph import Cost, Segment, StreamGraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.planning.scenario import Scenario
    from parnet_engines.schedule.placement import Lane


def whole_graph(graph: StreamGraph, cost: Cost | None = None) -> StreamGraph:
    """Return the stream graph with the whole network as its one segment, named `WHOLE`.

    A program that runs the network as one engine is lowered from a placement of it.

    Parameters
    ----------
    graph
        The stream graph of the network's segments.
    cost
        Cost of the whole network; by default the sum over the segments.
    """
    return StreamGraph(
        graph.inputs,
        graph.outputs,
        (Segment(WHOLE, graph.inputs, graph.outputs, cost or _sum_of_costs(graph)),),
    )


def _sum_of_costs(graph: StreamGraph) -> Cost:
    depths = {segment.name: float(segment.cost.depth) for segment in graph.segments}
    costs = [segment.cost for segment in graph.segments]
    return Cost(
        parameters=sum(cost.parameters for cost in costs),
        macs=sum(cost.macs for cost in costs),
        weight_bytes=sum(cost.weight_bytes for cost in costs),
        activation_bytes=sum(cost.activation_bytes for cost in costs),
        nodes=sum(cost.nodes for cost in costs),
        depth=sum(graph[name].cost.depth for name in graph.critical_path(depths)),
    )


def whole_scenario(scenario: Scenario) -> Scenario:
    """Return the scenario in which the whole network is the one segment.

    Where the cost table has no entry for the whole network, it is estimated as the sum
    of its segments when they run alone.
    """
    graph, costs = scenario.graph, scenario.costs
    known = {(entry.device_kind, entry.threads) for entry in costs.entries}
    missing = []
    for kind, threads in sorted(known):
        found = [costs.find(segment.name, kind, threads) for segment in graph.segments]
        if costs.find(WHOLE, kind, threads) is None and all(found):
            total_ms = sum(entry.latency_ms for entry in found if entry)
            missing.append(
                SegmentCost(WHOLE, kind, threads, 1, total_ms, "estimated", "sum of the segments")
            )
    return replace(scenario, graph=whole_graph(graph), costs=costs.updated(missing))


def place_whole(lane: Lane) -> Placement:
    """Place the one segment of `whole_graph` on a lane."""
    return Placement((lane,), (Assignment(WHOLE, lane.name),))


def streams_of(graph: StreamGraph) -> tuple[str, ...]:
    """Return the streams of any stream graph: independent segments that hold the most work."""
    work = {segment.name: max(1, segment.cost.macs) for segment in graph.segments}
    return tuple(heaviest_antichain(graph, work))


def place_authors(graph: StreamGraph, lanes: Sequence[Lane]) -> Placement:
    """Place a network the way ParNet's authors do on three GPUs (section 3.4 of the paper).

    Each device has one stream (see `streams_of`), and recomputes what leads to it. The
    first device also has everything else: the fusions and the head. If there are more
    streams than devices, they are dealt out in turn; a device without a stream is left out.

    Parameters
    ----------
    graph
        The stream graph.
    lanes
        The first lane of each device is used. Lanes of a single device take the place of
        devices; what several of them need is then run once.
    """
    on_device = {lane.device: lane for lane in reversed(lanes)}
    places = [lane for lane in lanes if lane is on_device[lane.device]]
    if len(places) == 1:
        places = list(lanes)
    wanted: dict[str, list[Lane]] = {segment.name: [] for segment in graph.segments}
    for stream, lane in zip(streams_of(graph), itertools.cycle(places)):
        for name in _leading_to(graph, stream):
            if all(lane.device != other.device for other in wanted[name]):
                wanted[name].append(lane)
    assignments = tuple(
        Assignment(segment.name, lane.name)
        for segment in graph.segments
        for lane in wanted[segment.name] or places[:1]
    )
    used = {assignment.lane for assignment in assignments}
    kept = tuple(lane for lane in places if lane is places[0] or lane.name in used)
    return Placement(kept, assignments)


def _leading_to(graph: StreamGraph, name: str) -> set[str]:
    """Return a segment and all that it depends on."""
    found = {name}
    for segment in reversed(graph.segments):
        if segment.name in found:
            found.update(graph.predecessors[segment.name])
    return found
