"""Forecasts: what a network would take on machines with 1, 2 and more devices.

Every row plans the network for so many devices, lowers the plan to a program, and plays
the program in the simulator. Nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.planning.layouts import streams_of, whole_scenario
from parnet_engines.planning.plan import (
    default_in_flight,
    lower_bound_ms,
    plan_authors,
    plan_candidates,
    plan_streams,
    plan_whole,
)
from parnet_engines.planning.plan_file import read_plan
from parnet_engines.planning.scenario import Scenario
from parnet_engines.planning.simulate import simulate
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.program import Copy, Run
from parnet_engines.timeline.analysis import analyse
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_bench.forecasts.hypothetical import Sketch
    from parnet_bench.forecasts.inputs import Basis, Costs
    from parnet_engines.planning.evaluate import Objective
    from parnet_engines.planning.links import Link
    from parnet_engines.planning.plan import Plan
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.placement import Lane
    from parnet_engines.schedule.program import Program
    from parnet_engines.schedule.recording import Recording
    from parnet_engines.timeline.analysis import Bottleneck, TimelineAnalysis
    from parnet_engines.timeline.verdict import Verdict

PLANS = ("auto", "whole", "streams", "authors")

_INFERENCES_PER_SLOT = 16
"""How many inferences of each slot are played until the interval has settled."""


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What the forecast assumes of the links between devices."""

    name: str
    latency_us: float
    gb_per_s: float


@dataclass(frozen=True, slots=True)
class PlacedSegment:
    """One execution of a segment, and where it is."""

    segment: str
    lane: str
    device: str


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
    lower_bound_ms
        What no placement on the same lanes can be below, in the objective.
    is_optimal
        Whether it is proven that no placement is better.
    overlap
        Time with two or more lanes at work / time with any, for a single inference.
    copied_bytes
        What crosses between devices in one inference.
    bottleneck, verdict
        Of a single inference.
    placed
        Which segment runs where, in issue order.
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
    placed: tuple[PlacedSegment, ...]


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
    whole_is_sum
        Whether that is the sum of its segments, for want of a cost of its own.
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
    whole_is_sum: bool
    rows: tuple[ForecastRow, ...]


@dataclass(frozen=True, slots=True)
class Detail:
    """The timeline behind one row of a forecast, for a single inference.

    Parameters
    ----------
    plan
        Where the program comes from; None if from a file.
    program, recording, analysis
        What was played, and when each step began and ended.
    """

    plan: Plan | None
    program: Program
    recording: Recording
    analysis: TimelineAnalysis


def forecast(
    network: Sketch,
    costs: Costs,
    link: Link,
    *,
    plan: str = "auto",
    objective: Objective = "latency",
    num_devices: int = 3,
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
    plan
        One of `PLANS`, or the path of a plan or program. A file, the whole network, and
        the authors' layout give one row only: that for the devices they use.
    objective
        What a plan is to make small.
    num_devices, lanes_per_device
        The largest machine. Plans may do with fewer lanes.
    in_flight
        How many inferences overlap; by default one for latency, and as many as there are
        lanes for throughput.

    Returns
    -------
    forecast, detail
        The detail is that of the last row.

    Raises
    ------
    InputError
        When the plan cannot be read, is for more devices, or a cost is missing.
    CheckFailedError
        When a program from a file has faults.
    """
    scenario = Scenario(network.graph, costs.table, link)
    saved = None if plan in PLANS else _read(plan, scenario)
    one_lane = costs.lanes(1, 1)[0]
    one_lane_ms = plan_whole(scenario, one_lane).latency_ms
    played: list[tuple[ForecastRow, Detail]] = []
    for devices in range(1, num_devices + 1):
        lanes = costs.lanes(devices, lanes_per_device)
        choice = (
            _choose(plan, scenario, lanes, one_lane, objective)
            if saved is None
            else _saved(saved, scenario, devices, objective)
        )
        if choice is not None:
            overlapping = in_flight or default_in_flight(objective, choice.program.lanes)
            played.append(_play(choice, devices, objective, overlapping, one_lane_ms))
    if not played:
        problem = f"is not a plan for 1 to {num_devices} devices of this network"
        raise InputError(f"--plan {plan}", problem, "Change --num-devices, or plan with auto")
    rows, details = zip(*played, strict=True)
    found = Forecast(
        network=network.name,
        description=network.description,
        plan=plan,
        objective=objective,
        basis=costs.basis,
        link=LinkFacts(link.name, link.latency_us, link.gb_per_s),
        one_lane_ms=one_lane_ms,
        whole_is_sum=not costs.table.widths([WHOLE], costs.basis.device),
        rows=rows,
    )
    return found, details[-1]


@dataclass(frozen=True, slots=True)
class _Choice:
    """What to play for one number of devices; `plan` is None for what a file says."""

    scenario: Scenario
    program: Program
    plan: Plan | None
    lower_bound_ms: float
    is_optimal: bool


def _choose(
    kind: str, scenario: Scenario, lanes: Sequence[Lane], one_lane: Lane, objective: Objective
) -> _Choice | None:
    """Return what one of `PLANS` is on some lanes; None where it is not for so many devices."""
    devices = len({lane.device for lane in lanes})
    match kind:
        case "whole" if devices == 1:
            plan = plan_whole(scenario, one_lane, objective)
        case "streams":
            plan = plan_streams(scenario, lanes, objective)
        case "authors" if devices == len(streams_of(scenario.graph)):
            plan = plan_authors(scenario, lanes, objective)
        case "auto":
            plans = plan_candidates(scenario, [[one_lane], lanes], objective)
            bound_ms = min(plan.lower_bound_ms for plan in plans)
            is_optimal = all(plan.is_optimal for plan in plans)
            plan = replace(plans[0], lower_bound_ms=bound_ms, is_optimal=is_optimal)
        case _:
            return None
    of = whole_scenario(scenario) if plan.kind == "whole" else scenario
    program = lower(of.graph, plan.placement)
    return _Choice(of, program, plan, plan.lower_bound_ms, plan.is_optimal)


def _read(plan: str, scenario: Scenario) -> CheckedProgram:
    if not Path(plan).is_file():
        remedy = f"Use one of {', '.join(PLANS)}, or the path of a plan"
        raise InputError(f"--plan {plan}", "is no plan's name, and no file", remedy)
    return read_plan(Path(plan), scenario.graph, inferences_in_flight=1)


def _saved(
    saved: CheckedProgram, scenario: Scenario, devices: int, objective: Objective
) -> _Choice | None:
    """Return what a file says, None where that is not for so many devices."""
    program = saved.program
    if len({lane.device for lane in program.lanes}) != devices:
        return None
    is_whole = {step.segment for step in program.steps if isinstance(step, Run)} == {WHOLE}
    of = whole_scenario(scenario) if is_whole else scenario
    bound_ms = lower_bound_ms(of, program.lanes, objective)
    return _Choice(of, program, None, bound_ms, is_optimal=False)


def _play(
    choice: _Choice, devices: int, objective: Objective, in_flight: int, one_lane_ms: float
) -> tuple[ForecastRow, Detail]:
    scenario, program = choice.scenario, choice.program
    single = simulate(program, scenario.costs, scenario.link)
    interval_ms = single.latency_ms
    if in_flight > 1:
        interval_ms = simulate(
            checked(replace(program, inferences_in_flight=in_flight), scenario.graph).program,
            scenario.costs,
            scenario.link,
            inferences=_INFERENCES_PER_SLOT * in_flight,
        ).interval_ms
    analysis = analyse(program, single.recording, scenario.costs)
    reached_ms = single.latency_ms if objective == "latency" else interval_ms
    row = ForecastRow(
        devices=devices,
        lanes=len(program.lanes),
        latency_ms=single.latency_ms,
        interval_ms=interval_ms,
        in_flight=in_flight,
        speedup=one_lane_ms / reached_ms if reached_ms else 1.0,
        lower_bound_ms=choice.lower_bound_ms,
        is_optimal=choice.is_optimal,
        overlap=analysis.overlap,
        copied_bytes=_copied_bytes(program),
        bottleneck=analysis.bottleneck,
        verdict=analysis.verdict,
        placed=tuple(
            PlacedSegment(step.segment, step.lane, program.lanes_by_name[step.lane].device)
            for step in program.steps
            if isinstance(step, Run)
        ),
    )
    return row, Detail(choice.plan, program, single.recording, analysis)


def _copied_bytes(program: Program) -> int:
    """Add up what the copies of a program carry in one inference."""
    return sum(
        program.buffers_by_name[step.target].tensor.size_bytes()
        for step in program.steps
        if isinstance(step, Copy)
    )
