"""Plans: a placement of segments on lanes, with its predicted timeline and a lower bound."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from parnet_engines.planning.cost_table import device_kind, lane_threads
from parnet_engines.planning.evaluate import Objective, Prediction, predict
from parnet_engines.planning.hand_over import with_fewer_hand_overs
from parnet_engines.planning.layouts import place_authors, place_whole, streams_of, whole_scenario
from parnet_engines.planning.plan_exact import search_exactly
from parnet_engines.planning.plan_search import EFFORT, Score, anneal, list_schedule, score
from parnet_engines.planning.scenario import PS_PER_MS, Instance, Scenario
from parnet_engines.schedule.placement import Assignment, Placement
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from parnet_engines.planning.scenario import Step
    from parnet_engines.schedule.placement import Lane

PlanKind = Literal["whole", "streams", "authors", "file"]

EXACT_SEGMENTS = 8
"""Stream graphs of up to so many segments are planned with proof."""

_EXACT_SHARE = 5
"""How much less effort goes into a placement that an exact search will start from."""

MAX_NODES = 100_000
"""Partial placements after which a proof is given up, so that planning takes seconds."""

_MEDIUM_SEGMENTS = 32
"""Graphs of up to so many segments are worth more effort: there, less is within 5 % of the best.

For throughput they are searched by branch and bound as well.
"""

_MEDIUM_EFFORT = 3
"""How many times as much effort that is."""

_BOUNDED_NODES = 20_000
"""After so many partial placements of such a graph, the best one so far is taken."""

_MOST_SEARCHED = 6
"""Of many sets of lanes only so many are searched, those that list scheduling does best on."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, and what it is predicted to take.

    Parameters
    ----------
    kind
        ``"whole"``: the whole network as one segment on one lane, see
        `parnet_engines.planning.layouts.whole_graph`. ``"streams"``: segments placed by search.
        ``"authors"``: the paper's layout. ``"file"``: a placement somebody wrote down.
    placement
        Which lane runs what, in issue order.
    prediction
        The timeline, with its critical path.
    objective
        What was made small.
    lower_bound_ms
        What the objective cannot be below on the lanes that were offered: for latency
        the critical path or total work / lanes, for throughput the longest segment or
        total work / lanes, each on the fastest lanes and without copies.
    is_optimal
        Whether it is proven that no placement of the same segments on the lanes that were
        offered is better.
    """

    kind: PlanKind
    placement: Placement
    prediction: Prediction
    objective: Objective
    lower_bound_ms: float
    is_optimal: bool

    @property
    def latency_ms(self) -> float:
        """Milliseconds from the start of an inference to its end."""
        return self.prediction.latency_ms

    @property
    def interval_ms(self) -> float:
        """Least milliseconds between two inferences when several are in flight."""
        return self.prediction.interval_ms

    @property
    def objective_ms(self) -> float:
        """The latency or the interval, whichever was to be small."""
        return self.latency_ms if self.objective == "latency" else self.interval_ms

    @property
    def gap(self) -> float:
        """How far the objective is above its lower bound, as a fraction of the bound."""
        return self.objective_ms / self.lower_bound_ms - 1 if self.lower_bound_ms else 0.0

    def __str__(self) -> str:
        lanes = len(self.placement.lanes)
        interval = f", one every {self.interval_ms:.3f} ms" if self.objective != "latency" else ""
        return (
            f"{self.kind} on {lanes} lane{'' if lanes == 1 else 's'}: predicted "
            f"{self.latency_ms:.3f} ms{interval}; no plan there takes less than "
            f"{self.lower_bound_ms:.3f} ms{', and none is better' if self.is_optimal else ''}"
        )


def default_in_flight(objective: Objective, lanes: Sequence[Lane]) -> int:
    """Return how many inferences overlap by default: for throughput, one for each lane."""
    return 1 if objective == "latency" else len(lanes)


def plan_whole(scenario: Scenario, lane: Lane, objective: Objective = "latency") -> Plan:
    """Plan to run the whole network as one segment.

    Parameters
    ----------
    scenario
        The stream graph and its costs. The entry for `WHOLE` counts, and in its absence
        the sum over the segments.
    lane
        The lane.
    objective
        What the plan is compared by; it leaves no choice here.

    Raises
    ------
    InputError
        When the cost table has no costs for such a lane.
    """
    prediction = predict(whole_scenario(scenario), place_whole(lane))
    return Plan("whole", place_whole(lane), prediction, objective, prediction.latency_ms, True)


def plan_authors(
    scenario: Scenario, lanes: Sequence[Lane], objective: Objective = "latency"
) -> Plan:
    """Plan the paper's layout, `parnet_engines.planning.layouts.place_authors`.

    Raises
    ------
    InputError
        When there are not as many devices as streams, or the cost table lacks a segment
        on a lane.
    """
    streams = len(streams_of(scenario.graph))
    devices = len({lane.device for lane in lanes})
    if streams != devices:
        raise InputError(
            "plan 'authors'",
            f"runs each of the network's {streams} streams on a device of its own, "
            f"and there {'is' if devices == 1 else 'are'} {devices}",
            "Name as many devices, such as 'cpu:0,cpu:1,cpu:2', or use plan 'streams'",
        )
    return evaluate_placement("authors", scenario, place_authors(scenario.graph, lanes), objective)


def evaluate_placement(
    kind: PlanKind, scenario: Scenario, placement: Placement, objective: Objective = "latency"
) -> Plan:
    """Return the plan that a given placement is.

    Raises
    ------
    ValueError
        When the placement does not fit the stream graph.
    InputError
        When the cost table lacks a segment on a lane.
    """
    prediction = predict(scenario, placement)
    bound_ms = lower_bound_ms(scenario, placement.lanes, objective)
    plan = Plan(kind, placement, prediction, objective, bound_ms, is_optimal=False)
    return replace(plan, is_optimal=plan.objective_ms <= bound_ms)


def lower_bound_ms(
    scenario: Scenario, lanes: Sequence[Lane], objective: Objective = "latency"
) -> float:
    """Return what no placement on these lanes, all of them busy, can be below.

    Parameters
    ----------
    scenario
        The stream graph and its costs.
    lanes
        The lanes.
    objective
        ``"latency"``: the critical path or total work / lanes. ``"throughput"``: the
        longest segment or total work / lanes.
    """
    return _bound_ps(Instance.of(scenario, lanes), objective) / PS_PER_MS


def _bound_ps(instance: Instance, objective: Objective) -> int:
    shared_ps = -(-sum(instance.fastest_ps) // len(instance.lanes))
    path_ps = [0] * len(instance.fastest_ps)
    for segment, fastest_ps in enumerate(instance.fastest_ps):
        before = instance.predecessors[segment] if objective == "latency" else ()
        path_ps[segment] = fastest_ps + max((path_ps[p] for p in before), default=0)
    return max(shared_ps, *path_ps)


def plan_streams(
    scenario: Scenario,
    lanes: Sequence[Lane],
    objective: Objective = "latency",
    *,
    may_leave_lanes: bool = True,
) -> Plan:
    """Plan the segments on some or all of the given lanes, the first being the origin.

    Up to `EXACT_SEGMENTS` segments the plan is optimal (unless that takes more than
    `MAX_NODES` partial placements). Beyond, list scheduling is followed by simulated
    annealing. Either way the plan is no worse than `plan_authors` on the same lanes, or
    all segments on the origin.

    Parameters
    ----------
    scenario
        The stream graph, its costs and the link between devices.
    lanes
        Lanes of any devices. Where busy lanes slow each other down, it is tried to use
        fewer of them.
    objective
        Whether latency or, with several inferences in flight, the interval between two
        of them is to be small.
    may_leave_lanes
        Whether it is tried to use fewer lanes. If not, costs are those of all lanes at
        work, so that lanes are used even where they seem to slow each other down too much.

    Raises
    ------
    InputError
        When the cost table lacks a segment on a lane.
    """
    layouts = _layouts(scenario, lanes) if may_leave_lanes else [Instance.of(scenario, lanes)]
    found = []
    for layout in layouts:
        steps, is_optimal = _search(scenario, layout, objective, EFFORT // len(layouts))
        placement = _placement(layout, steps)
        if objective == "latency":
            placement = with_fewer_hand_overs(scenario, placement)
        bound_ms = _bound_ps(layout, objective) / PS_PER_MS
        prediction = predict(scenario, placement)
        found.append(Plan("streams", placement, prediction, objective, bound_ms, is_optimal))
    best = min(found, key=lambda plan: (plan.objective_ms, len(plan.placement.lanes)))
    bound_ms = min(plan.lower_bound_ms for plan in found)
    return replace(
        best,
        lower_bound_ms=bound_ms,
        is_optimal=best.objective_ms <= bound_ms or all(plan.is_optimal for plan in found),
    )


def plan_candidates(
    scenario: Scenario,
    lane_sets: Iterable[Sequence[Lane]],
    objective: Objective = "latency",
    most: int = 3,
) -> tuple[Plan, ...]:
    """Return the most promising plans, best first, so that they can be measured.

    The best plan for the whole network is always among them: it is what the others have
    to be better than.

    Parameters
    ----------
    scenario
        The stream graph, its costs and the link between devices.
    lane_sets
        Sets of lanes to choose from, such as those of `parnet_engines.planning.lane_sets.lane_sets`
        or one lane for each device. The whole network may run on any one of their lanes.
    objective
        What is to be small.
    most
        How many plans to return, at most.

    Raises
    ------
    InputError
        When the cost table lacks a segment on a lane.
    """
    offered = [tuple(lanes) for lanes in lane_sets]
    alone = {
        (device_kind(lane.device), lane_threads(lane)): lane
        for lanes in reversed(offered)
        for lane in reversed(lanes)
    }
    wholes = [plan_whole(scenario, lane, objective) for lane in alone.values()]
    whole = min(wholes, key=lambda plan: plan.objective_ms)
    others = rank_streams(scenario, offered, objective, most - 1) if most > 1 else ()
    return tuple(sorted([whole, *others], key=lambda plan: plan.objective_ms))


def rank_streams(
    scenario: Scenario,
    lane_sets: Iterable[Sequence[Lane]],
    objective: Objective = "latency",
    most: int = 1,
    *,
    may_leave_lanes: bool = True,
) -> tuple[Plan, ...]:
    """Return the best different plans of segments on any of several sets of lanes.

    Parameters
    ----------
    scenario, lane_sets, objective, most
        As for `plan_candidates`.
    may_leave_lanes
        As for `plan_streams`.

    Raises
    ------
    InputError
        When the cost table lacks a segment on a lane.
    """
    found: dict[Placement, Plan] = {}
    for lanes in shortlist(scenario, lane_sets, objective, max(most, _MOST_SEARCHED)):
        ranked = sorted(plan.objective_ms for plan in found.values())
        if len(ranked) >= most and lower_bound_ms(scenario, lanes, objective) >= ranked[most - 1]:
            continue
        plan = plan_streams(scenario, lanes, objective, may_leave_lanes=may_leave_lanes)
        found.setdefault(plan.placement, plan)
    return tuple(sorted(found.values(), key=lambda plan: plan.objective_ms)[:most])


def shortlist(
    scenario: Scenario, lane_sets: Iterable[Sequence[Lane]], objective: Objective, most: int
) -> list[Sequence[Lane]]:
    """Return the sets of lanes that list scheduling does best on, best first.

    Raises
    ------
    InputError
        When the cost table lacks a segment on a lane.
    """

    def reached(lanes: Sequence[Lane]) -> Score:
        instance = Instance.of(scenario, lanes)
        return score(instance, list_schedule(instance), objective)

    return sorted(lane_sets, key=reached)[:most]


def _layouts(scenario: Scenario, lanes: Sequence[Lane]) -> list[Instance]:
    """Return the scenario on all lanes, and on fewer where busy lanes slow each other down."""
    groups: dict[tuple[str, int], list[Lane]] = {}
    for lane in lanes:
        groups.setdefault((lane.device, lane_threads(lane)), []).append(lane)
    counts = [range(group[0] is lanes[0], len(group) + 1) for group in groups.values()]
    everything = Instance.of(scenario, lanes)
    layouts = [everything]
    for chosen in itertools.product(*counts):
        kept = {x.name for group, n in zip(groups.values(), chosen, strict=True) for x in group[:n]}
        fewer = Instance.of(scenario, [lane for lane in lanes if lane.name in kept])
        numbers = [number for number, lane in enumerate(lanes) if lane.name in kept]
        as_before = tuple(tuple(row[n] for n in numbers) for row in everything.latency_ps)
        if fewer.latency_ps != as_before:
            layouts.append(fewer)
    return layouts


def _search(
    scenario: Scenario, instance: Instance, objective: Objective, effort: int
) -> tuple[Sequence[Step], bool]:
    """Return the best issue order found on all lanes, and whether it is proven to be that."""
    alone = [(segment, 0) for segment in range(len(instance.segment_names))]
    if len(instance.lanes) == 1:
        return alone, True
    authors = instance.steps(place_authors(scenario.graph, instance.lanes))
    starts = (alone, authors, list_schedule(instance))
    start = min(starts, key=lambda steps: score(instance, steps, objective))
    is_small = len(alone) <= EXACT_SEGMENTS
    is_medium = not is_small and len(alone) <= _MEDIUM_SEGMENTS
    if is_medium:
        effort *= _MEDIUM_EFFORT
    incumbent = anneal(instance, objective, start, effort // _EXACT_SHARE if is_small else effort)
    if not is_small and (objective == "latency" or not is_medium):
        return incumbent, False
    most = MAX_NODES if is_small else _BOUNDED_NODES
    found = search_exactly(instance, objective, incumbent, most)
    if objective == "latency":
        return found.steps, found.is_optimal
    # Of the placements with this interval, one of low latency is wanted.
    return anneal(instance, objective, found.steps, effort // _EXACT_SHARE), found.is_optimal


def _placement(instance: Instance, steps: Iterable[Step]) -> Placement:
    """Name the lanes and segments of an issue order, and drop lanes that run nothing."""
    assignments = tuple(
        Assignment(instance.segment_names[segment], instance.lanes[lane].name)
        for segment, lane in steps
    )
    used = {assignment.lane for assignment in assignments}
    lanes = tuple(x for x in instance.lanes if x is instance.lanes[0] or x.name in used)
    return Placement(lanes, assignments)
