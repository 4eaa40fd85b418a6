"""``--plan auto``: what is quickest on this machine, found by measuring.

The candidates are the whole graph with one to all threads, and the planner's best plans
of the segments, for whatever division of the cores it finds them. Rounds of all of them
pick the best of either kind. If the segments come near the whole graph, fresh rounds of
these two decide: the whole graph is left only if the lower end of the ratio's interval
says that it pays. The decision is kept in the bundle's folder, for this machine and these
devices.
"""

from __future__ import annotations

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from parnet_engines.clock import Clock, MonotonicClock
from parnet_engines.planning.bundle_costs import (
    add_bundle_costs,
    estimated_costs,
    load_bundle_costs,
    network_of,
)
from parnet_engines.planning.bundle_program import program_of
from parnet_engines.planning.cost_measure import measure_costs
from parnet_engines.planning.cost_table import CostTable, SegmentCost, lane_threads
from parnet_engines.planning.decision import Decision, Trial, best, load_decisions, save_decisions
from parnet_engines.planning.devices import divide
from parnet_engines.planning.lane_sets import default_lanes, lane_sets
from parnet_engines.planning.layouts import place_whole
from parnet_engines.planning.links import MEMORY
from parnet_engines.planning.machine import describe_machine
from parnet_engines.planning.plan import default_in_flight, rank_streams, shortlist
from parnet_engines.planning.rounds import run_rounds
from parnet_engines.planning.scenario import Scenario
from parnet_engines.schedule.placement import Lane
from parnet_export.errors import InputError
from parnet_export.samples import make_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.planning.devices import Device
    from parnet_engines.planning.evaluate import Objective
    from parnet_engines.schedule.open_program import OpenProgram, Runner
    from parnet_export.bundle import Bundle

    Tensors = dict[str, NDArray[Any]]

NOT_WORTH_A_FINAL = 1.15
"""Segments that take so many times as long as the whole graph get no final rounds."""

_MOST_STREAMS = 3
"""How many plans of segments are measured."""

_MOST_DIVISIONS = 4
"""For how many divisions of the cores costs are measured, to plan for."""

_BATCHES = 3
"""For throughput, how many inferences of each slot make a run."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What is to be decided: the parameters of `decide`."""

    bundle: Bundle
    devices: tuple[Device, ...]
    lanes: int | None
    objective: Objective
    in_flight: int | None


def decide(
    bundle: Bundle,
    devices: Sequence[Device],
    lanes: int | None = None,
    *,
    open_program: OpenProgram,
    objective: Objective = "latency",
    in_flight: int | None = None,
    again: bool = False,
    clock: Clock | None = None,
) -> Decision:
    """Return the plan for a bundle on devices, from an earlier decision where there is one.

    Measuring takes from seconds to a minute. A bundle's folder that cannot be written to
    only means that it is measured again next time.

    Parameters
    ----------
    bundle
        The bundle. Where it leaves sizes open, they are those of the first sample.
    devices
        What may be used.
    lanes
        The most lanes to place the segments on; by default as many as can be of use.
    open_program
        Opens a session that runs a program.
    objective
        Whether the latency of one inference is compared, or the time from one to the next
        when several are in flight.
    in_flight
        How many inferences overlap; by default one for latency, and for throughput as many
        as a candidate has lanes.
    again
        Measure even if there is an earlier decision.
    clock
        By which candidates are timed.

    Raises
    ------
    InputError
        When there are more lanes than cores, or fewer than devices.
    MissingBackendError
        When `open_program` lacks its runtime.
    """
    asked = _Question(bundle, tuple(devices), lanes, objective, in_flight)
    network, machine = network_of(bundle), describe_machine()
    question = Decision(
        network, machine, asked.devices, lanes, (), objective=objective, in_flight=in_flight
    )
    earlier = load_decisions(bundle)
    for decision in earlier:
        if not again and replace(decision, trials=(), final=()) == question:
            return decision
    trials, final = _measure(asked, open_program, clock or MonotonicClock())
    decision = replace(question, trials=trials, final=final)
    others = [d for d in earlier if replace(d, trials=(), final=()) != question]
    with contextlib.suppress(InputError):  # the folder cannot be written to
        save_decisions(bundle, [*others, decision])
    return decision


def _measure(
    asked: _Question, open_program: OpenProgram, clock: Clock
) -> tuple[tuple[Trial, ...], tuple[Trial, ...]]:
    """Return the trials of all candidates, and the final ones."""
    candidates = [*_whole_graphs(asked), *_streams(asked, open_program)]
    inputs = next(make_samples(asked.bundle.stream_graph.inputs)).inputs
    with contextlib.ExitStack() as stack:
        runs: dict[str, Callable[[], object]] = {}
        for trial in candidates:
            program = program_of(asked.bundle, trial.placement, trial.inferences_in_flight)
            runner = stack.enter_context(open_program(program, record=False))
            runs[trial.name] = partial(runner.run, inputs)
            if asked.objective == "throughput":
                callers = ThreadPoolExecutor(trial.inferences_in_flight)
                stack.enter_context(callers)
                runs[trial.name] = partial(_run_all, runner, inputs, callers, _batch(trial))
        compare = partial(
            _compare,
            runs=runs,
            objective=asked.objective,
            clock=clock,
            order=random.Random(0),  # noqa: S311
        )
        trials = compare(candidates, budget_s=2.0, min_rounds=5, max_rounds=15)
        whole = best(trial for trial in trials if trial.is_whole)
        others = [trial for trial in trials if not trial.is_whole]
        if not others or best(others).median_ms > NOT_WORTH_A_FINAL * whole.median_ms:
            return trials, ()
        finalists = whole, best(others)
        return trials, compare(finalists, budget_s=4.0, min_rounds=12, max_rounds=60)


def _whole_graphs(asked: _Question) -> Iterator[Trial]:
    """Yield the whole graph with different numbers of threads."""
    first = asked.devices[0]
    for threads in _thread_counts(len(first.cores)):
        lane = Lane("lane0", first.name, first.cores[:threads])
        overlapping = asked.in_flight or default_in_flight(asked.objective, [lane])
        name = f"whole graph, {_count(threads, 'thread')}"
        yield Trial(name, place_whole(lane), overlapping)


def _streams(asked: _Question, open_program: OpenProgram) -> Iterator[Trial]:
    """Yield the best plans of segments on two or more lanes.

    Estimates say which divisions of the cores are worth measuring costs for, beside the
    even ones.
    """
    bundle, devices = asked.bundle, asked.devices
    graph = bundle.stream_graph
    most = default_lanes(graph, devices) if asked.lanes is None else asked.lanes
    divide(devices, most)  # refuses what cannot be
    counts = range(max(2, len(devices)), most + 1)
    offered = [lanes for count in counts for lanes in lane_sets(devices, count)]
    if not offered:
        return
    estimated = Scenario(graph, estimated_costs(bundle, offered), MEMORY)
    promising = shortlist(estimated, offered, asked.objective, _MOST_DIVISIONS)
    measured = list(dict.fromkeys([*(divide(devices, count) for count in counts), *promising]))
    costs = load_bundle_costs(bundle)
    for lanes in measured:
        costs = _measured_costs(bundle, costs, lanes, open_program)
    # What a single lane can do the whole graph does; so lanes stay, and rounds will tell.
    plans = rank_streams(
        Scenario(graph, costs, MEMORY),
        measured,
        asked.objective,
        _MOST_STREAMS,
        may_leave_lanes=False,
    )
    names = set()
    for plan in plans:
        lanes = plan.placement.lanes
        name = f"streams, {'+'.join(str(lane_threads(lane)) for lane in lanes)} threads"
        if len(lanes) > 1 and name not in names:
            names.add(name)
            overlapping = asked.in_flight or default_in_flight(asked.objective, lanes)
            yield Trial(
                name,
                plan.placement,
                overlapping,
                predicted_ms=plan.objective_ms,
                lower_bound_ms=plan.lower_bound_ms,
            )


def _thread_counts(cores: int) -> list[int]:
    """Return 1, 2, 4 and so on up to the number of cores, and that number."""
    return sorted({1 << power for power in range(cores.bit_length())} | {cores})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _measured_costs(
    bundle: Bundle, costs: CostTable, lanes: Sequence[Lane], open_program: OpenProgram
) -> CostTable:
    """Return costs with those for lanes that work side by side, measuring what is missing."""
    for lane in lanes:
        neighbours = sum(other.device == lane.device for other in lanes)
        for segment in bundle.stream_graph.segments:
            found = costs.find(segment.name, "cpu", lane_threads(lane), neighbours)
            if found is None or found.busy_lanes != neighbours:
                return _add_costs(bundle, costs, measure_costs(bundle, lanes, open_program))
    return costs


def _add_costs(bundle: Bundle, costs: CostTable, measured: Sequence[SegmentCost]) -> CostTable:
    """Return costs with measurements added, also to the bundle if it can be written to."""
    with contextlib.suppress(InputError):
        add_bundle_costs(bundle, measured)
    return costs.updated(measured)


def _batch(trial: Trial) -> int:
    """Return how many inferences are run at a time for throughput."""
    return _BATCHES * trial.inferences_in_flight


def _run_all(runner: Runner, inputs: Tensors, callers: ThreadPoolExecutor, count: int) -> None:
    """Run so many inferences, as many at a time as there are callers."""
    for call in [callers.submit(runner.run, inputs) for _ in range(count)]:
        call.result()


def _compare(
    trials: Sequence[Trial],
    *,
    runs: Mapping[str, Callable[[], object]],
    objective: Objective,
    clock: Clock,
    order: random.Random,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
) -> tuple[Trial, ...]:
    """Return the trials with what they took in new rounds."""
    rounds_ms = run_rounds(
        {trial.name: runs[trial.name] for trial in trials},
        # A session of one lane has the machine to itself, and its threads wait for work awake.
        spinners=[t.name for t in trials if t.is_whole and lane_threads(t.placement.lanes[0]) > 1],
        budget_s=budget_s,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        clock=clock,
        order=order,
    )
    each = {trial.name: 1 if objective == "latency" else _batch(trial) for trial in trials}
    return tuple(
        replace(trial, rounds_ms=tuple(ms / each[trial.name] for ms in rounds_ms[trial.name]))
        for trial in trials
    )
