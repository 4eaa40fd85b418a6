"""Forecasts: what a network would take on machines with 1, 2 and more devices.

Every row plans the network for so many devices, lowers the plan to a program, and plays
the program in the simulator. Nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from parnet_engines.check import checked
from parnet_engines.evaluate import predict
from parnet_engines.lowering import lower
from parnet_engines.placement import Assignment, Placement
from parnet_engines.program import Copy
from parnet_engines.scenario import Scenario
from parnet_engines.simulate import simulate
from parnet_engines.timeline import analyse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_bench.forecast_inputs import Costs
    from parnet_bench.hypothetical import Sketch
    from parnet_engines.evaluate import Objective
    from parnet_engines.links import Link
    from parnet_engines.placement import Lane
    from parnet_engines.program import Program
    from parnet_engines.recording import Recording
    from parnet_engines.timeline import Bottleneck, TimelineAnalysis
    from parnet_engines.verdict import Verdict

_INFERENCES_PER_SLOT = 8
"""How many inferences of each slot are played until the interval has settled."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A placement, and how much better another one could be.

    Parameters
    ----------
    scenario
        What is placed: the segments, or the whole network as one.
    placement
        Which lane runs which segment.
    lower_bound_ms
        What no placement can be below, in the objective.
    is_optimal
        Whether it is proven that no placement is better.
    """

    scenario: Scenario
    placement: Placement
    lower_bound_ms: float
    is_optimal: bool


class Planner(Protocol):
    """Places a network on lanes."""

    def __call__(self, scenario: Scenario, lanes: Sequence[Lane]) -> Choice:
        """Return a placement on all or some of `lanes`."""


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What the forecast assumes of the links between devices."""

    name: str
    latency_us: float
    gb_per_s: float


@dataclass(frozen=True, slots=True)
class Basis:
    """Where the costs of segments come from.

    Parameters
    ----------
    source
        Whether they were measured or are estimated from FLOPs and bytes.
    device
        The kind of device.
    environment
        What a measurement belongs to, or the device model of an estimate.
    """

    source: Literal["measured", "estimated"]
    device: str
    environment: str


@dataclass(frozen=True, slots=True)
class ForecastRow:
    """The forecast for one number of devices.

    Parameters
    ----------
    devices, lanes
        How many there are; lanes without work count.
    latency_ms
        Of one inference with nothing else in flight.
    interval_ms
        Time from one inference to the next, with `in_flight` of them under way.
    in_flight
        How many inferences overlap.
    speedup
        Against the whole network on one lane, in the objective.
    lower_bound_ms, is_optimal
        See `Choice`.
    overlap
        Time with two or more lanes at work / time with any, for a single inference.
    copied_bytes
        What crosses between devices in one inference.
    bottleneck, verdict
        Of a single inference.
    assignments
        Which segment runs on which lane, in issue order.
    """

    devices: int
    lanes: int
    latency_ms: float
    interval_ms: float
    in_flight: int
    speedup: float
    lower_bound_ms: float
    is_optimal: bool
    overlap: float
    copied_bytes: int
    bottleneck: Bottleneck
    verdict: Verdict
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a network would take on machines of different sizes.

    Parameters
    ----------
    network, description
        The network's name, and a line about its structure.
    plan, objective
        How segments were placed, and what for.
    basis, link
        What is known or assumed.
    one_lane_ms
        The whole network on one lane: what speed-ups refer to.
    rows
        One for each number of devices, in increasing order.
    """

    network: str
    description: str
    plan: str
    objective: Objective
    basis: Basis
    link: LinkFacts
    one_lane_ms: float
    rows: tuple[ForecastRow, ...]


@dataclass(frozen=True, slots=True)
class Detail:
    """The timeline behind one row of a forecast, for a single inference."""

    program: Program
    recording: Recording
    analysis: TimelineAnalysis


def forecast(
    network: Sketch,
    costs: Costs,
    link: Link,
    planner: Planner,
    *,
    plan: str,
    objective: Objective,
    num_devices: int,
    lanes_per_device: int = 1,
    in_flight: int | None = None,
) -> tuple[Forecast, Detail]:
    """Forecast a network on 1 to `num_devices` devices.

    Parameters
    ----------
    network
        What to forecast.
    costs
        Its costs, and the kind of device.
    link
        What connects any two devices.
    planner
        Places the network on lanes.
    plan
        The planner's name.
    objective
        What a plan is to make small.
    num_devices, lanes_per_device
        The largest machine.
    in_flight
        How many inferences overlap; by default one for latency, and as many as there are
        lanes for throughput.

    Returns
    -------
    forecast, detail
        The detail is that of the last row.
    """
    scenario = Scenario(network.graph, costs.table, link)
    one_lane_ms = costs.whole_ms
    if one_lane_ms is None:
        lane = costs.lanes(1, 1)
        order = tuple(Assignment(segment.name, lane[0].name) for segment in network.graph.segments)
        one_lane_ms = predict(scenario, Placement(lane, order)).latency_ms
    rows: list[ForecastRow] = []
    for devices in range(1, num_devices + 1):
        lanes = costs.lanes(devices, lanes_per_device)
        choice = planner(scenario, lanes)
        overlapping = in_flight or (1 if objective == "latency" else len(lanes))
        row, detail = _play(choice, devices, objective, overlapping, one_lane_ms)
        rows.append(row)
    found = Forecast(
        network=network.name,
        description=network.description,
        plan=plan,
        objective=objective,
        basis=costs.basis,
        link=LinkFacts(link.name, link.latency_us, link.gb_per_s),
        one_lane_ms=one_lane_ms,
        rows=tuple(rows),
    )
    return found, detail


def _play(
    choice: Choice, devices: int, objective: Objective, in_flight: int, one_lane_ms: float
) -> tuple[ForecastRow, Detail]:
    scenario = choice.scenario
    alone = lower(scenario.graph, choice.placement)
    single = simulate(alone, scenario.costs, scenario.link)
    interval_ms = single.latency_ms
    if in_flight > 1:
        interval_ms = simulate(
            checked(lower(scenario.graph, choice.placement, in_flight), scenario.graph).program,
            scenario.costs,
            scenario.link,
            inferences=_INFERENCES_PER_SLOT * in_flight,
        ).interval_ms
    analysis = analyse(alone, single.recording, scenario.costs)
    reached_ms = single.latency_ms if objective == "latency" else interval_ms
    row = ForecastRow(
        devices=devices,
        lanes=len(choice.placement.lanes),
        latency_ms=single.latency_ms,
        interval_ms=interval_ms,
        in_flight=in_flight,
        speedup=one_lane_ms / reached_ms if reached_ms else 1.0,
        lower_bound_ms=choice.lower_bound_ms,
        is_optimal=choice.is_optimal,
        overlap=analysis.overlap,
        copied_bytes=_copied_bytes(alone),
        bottleneck=analysis.bottleneck,
        verdict=analysis.verdict,
        assignments=choice.placement.assignments,
    )
    return row, Detail(alone, single.recording, analysis)


def _copied_bytes(program: Program) -> int:
    """Add up what the copies of a program carry in one inference."""
    return sum(
        program.buffers_by_name[step.target].tensor.size_bytes()
        for step in program.steps
        if isinstance(step, Copy)
    )
