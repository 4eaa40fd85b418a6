"""Of plans that are predicted to be equally good, the one that hands over least.

The timing model (`parnet_engines.planning.evaluate`) lets a lane go on at once when another one has
done what it waits for. In a session it takes tens of microseconds to wake its thread, which
short segments notice: so the chain that takes longest had better stay on one lane, and
begin and end on the origin's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from parnet_engines.planning.cost_table import device_kind, lane_threads
from parnet_engines.planning.evaluate import predict
from parnet_engines.schedule.placement import Assignment, Placement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_engines.planning.scenario import Scenario

HAND_OVER_US = 50.0
"""Microseconds until the thread of a lane that sleeps goes on; seen on virtual machines.

What matters is only that it is more than nothing, and little against most segments.
"""

_MOST_SEGMENTS = 24
"""Larger stream graphs are left alone: trying every move would take too long."""


def latency_with_hand_overs_ms(
    scenario: Scenario, placement: Placement, hand_over_us: float = HAND_OVER_US
) -> float:
    """Return the latency of a placement on one device if lanes take time to go on.

    A lane that comes to a wait after what it waits for has ended goes on at once.

    Parameters
    ----------
    scenario
        The stream graph and its costs.
    placement
        A placement whose lanes are on one device.
    hand_over_us
        Microseconds from the end of a segment until a lane that waits for it goes on.
    """
    later_ms = hand_over_us / 1000
    origin = placement.lanes[0].name
    lanes = {lane.name: lane for lane in placement.lanes}
    free_ms = {name: 0.0 if name == origin else later_ms for name in lanes}
    ended: dict[str, tuple[str, float]] = {}
    for assignment in placement.assignments:
        lane = assignment.lane
        arrivals_ms = [
            end_ms + (later_ms if where != lane else 0.0)
            for where, end_ms in (
                ended[before] for before in scenario.graph.predecessors[assignment.segment]
            )
        ]
        cost_ms = scenario.costs.latency_ms(assignment.segment, lanes[lane], len(lanes))
        free_ms[lane] = max(free_ms[lane], *arrivals_ms, 0.0) + cost_ms
        ended[assignment.segment] = lane, free_ms[lane]
    used = {where for where, _ in ended.values()}
    return max(free_ms[name] + (later_ms if name != origin else 0.0) for name in used)


def with_fewer_hand_overs(scenario: Scenario, placement: Placement) -> Placement:
    """Return a placement of no higher latency that hands over less, if one is found.

    It is looked for by exchanging lanes and moving single segments. Placements on several
    devices or with recomputed segments, and very large ones, are returned as they are.

    Parameters
    ----------
    scenario
        The stream graph and its costs.
    placement
        A placement of the stream graph, for the latency of one inference: with several in
        flight, work had better be spread over the lanes.
    """
    names = [assignment.segment for assignment in placement.assignments]
    if (
        len({lane.device for lane in placement.lanes}) > 1
        or device_kind(placement.lanes[0].device) != "cpu"
        or len(placement.lanes) == 1
        or not 1 < len(names) == len(set(names)) <= _MOST_SEGMENTS
    ):
        return placement
    best, best_ms = placement, latency_with_hand_overs_ms(scenario, placement)
    while True:
        found, found_ms = _improved(scenario, best)
        if found_ms >= best_ms:
            return best
        best, best_ms = found, found_ms


def _improved(scenario: Scenario, placement: Placement) -> tuple[Placement, float]:
    """Return the best that moves lead to from a placement, or from one with lanes exchanged."""
    limit_ms = predict(scenario, placement).latency_ms
    starts = (placement, *_exchanged(placement))
    fair = [start for start in starts if predict(scenario, start).latency_ms <= limit_ms]
    found = [_descend(scenario, start, limit_ms) for start in fair]
    return min(found, key=lambda entry: entry[1])


def _descend(scenario: Scenario, placement: Placement, limit_ms: float) -> tuple[Placement, float]:
    """Move one segment after another to another lane, each time the one that gains most."""
    best, best_ms = placement, latency_with_hand_overs_ms(scenario, placement)
    while True:
        moves = [(latency_with_hand_overs_ms(scenario, other), other) for other in _moved(best)]
        gaining = sorted((move for move in moves if move[0] < best_ms), key=lambda move: move[0])
        found = next(
            (move for move in gaining if predict(scenario, move[1]).latency_ms <= limit_ms), None
        )
        if found is None:
            return best, best_ms
        best_ms, best = found


def _exchanged(placement: Placement) -> Iterator[Placement]:
    """Yield placements in which the origin and another lane as wide do each other's work."""
    origin = placement.lanes[0]
    for lane in placement.lanes[1:]:
        if lane_threads(lane) == lane_threads(origin):
            names = {origin.name: lane.name, lane.name: origin.name}
            yield replace(
                placement,
                assignments=tuple(
                    Assignment(a.segment, names.get(a.lane, a.lane)) for a in placement.assignments
                ),
            )


def _moved(placement: Placement) -> Iterator[Placement]:
    """Yield placements in which one segment is on another lane; every lane keeps one."""
    assignments = placement.assignments
    for number, assignment in enumerate(assignments):
        rest = (*assignments[:number], *assignments[number + 1 :])
        if all(other.lane != assignment.lane for other in rest):
            continue
        for lane in placement.lanes:
            if lane.name != assignment.lane:
                moved = Assignment(assignment.segment, lane.name)
                yield replace(
                    placement,
                    assignments=(*assignments[:number], moved, *assignments[number + 1 :]),
                )
