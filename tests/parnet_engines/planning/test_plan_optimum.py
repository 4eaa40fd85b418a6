"""The planner against optima that are found without it.

Up to eight segments the reference tries every placement: which lanes run a segment, on
how many devices it is computed again, and every issue order. For larger graphs it is a
constraint program whose optimum OR-tools proves.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from itertools import combinations

import pytest
from ortools.sat.python import cp_model

from parnet_engines.planning.cost_table import CostTable, SegmentCost, lane_threads
from parnet_engines.planning.links import Link
from parnet_engines.planning.plan import EXACT_SEGMENTS, plan_streams
from parnet_engines.planning.scenario import Scenario
from parnet_engines.schedule.placement import Lane
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

MB_LINK = Link("test", 0.0, 1.0)
"""One millisecond for each million bytes: all times are whole milliseconds."""

LANES = {
    "two lanes": (("gpu:0",), ("gpu:0",)),
    "three lanes": (("gpu:0",), ("gpu:0",), ("gpu:0",)),
    "wide and narrow": (("cpu", 0, 1), ("cpu", 2)),
    "two devices": (("gpu:0",), ("gpu:1",)),
    "three devices": (("gpu:0",), ("gpu:1",), ("gpu:2",)),
    "two kinds": (("gpu:0",), ("npu:0",)),
    "two and one": (("gpu:0",), ("gpu:0",), ("gpu:1",)),
    "two and two": (("gpu:0",), ("gpu:0",), ("gpu:1",), ("gpu:1",)),
}


def lanes_of(setup: str) -> list[Lane]:
    return [
        Lane(f"lane{n}", device, tuple(cores)) for n, (device, *cores) in enumerate(LANES[setup])
    ]


def random_scenario(
    seed: int, count: int, lanes: list[Lane], *, crowd: bool = False, grains: int = 1
) -> Scenario:
    """Return a random graph with costs of 1 to 9 grains on lanes, and copies of 0 to 4.

    A grain has `grains` milliseconds. With `crowd`, every further lane of a
    device that is in use makes all of them slower.
    """
    rng = random.Random(f"{seed} {count} {[lane.device for lane in lanes]}")

    def tensor(name: str) -> TensorSpec:
        return TensorSpec(name, "int8", (rng.randint(0, 4 * grains) * 1_000_000,))

    known, segments = [tensor("image")], []
    for n in range(count):
        reads = rng.sample(known[-4:], min(len(known), rng.choice((1, 1, 2, 2, 3))))
        writes = [tensor(f"t{n}")] + [tensor(f"u{n}")] * (rng.random() < 0.15)
        segments.append(Segment(f"s{n}", tuple(reads), tuple(writes), Cost(0, 1, 0, 0, 1, 1)))
        known += writes
    read = {t.name for s in segments for t in s.inputs}
    outputs = tuple(t for s in segments for t in s.outputs if t.name not in read)
    graph = StreamGraph((known[0],), outputs, tuple(segments))
    kinds = {(lane.device.partition(":")[0], lane_threads(lane)) for lane in lanes}
    entries = []
    for segment in segments:
        work_ms = rng.randint(grains, 9 * grains)
        for kind, threads in sorted(kinds):
            own_ms = (
                rng.randint(grains, 9 * grains)
                if len(kinds) > 1 and rng.random() < 0.3
                else work_ms
            )
            entries += [
                SegmentCost(
                    segment.name, kind, threads, busy, own_ms + crowd * (busy - 1), "measured", "m"
                )
                for busy in range(1, len(lanes) + 1)
            ]
    return Scenario(graph, CostTable(tuple(entries)), MB_LINK)


# --- The reference ------------------------------------------------------------------------


class Reference:
    """The rules of the timing model, written down a second time for the search below.

    Times are whole milliseconds. A state holds when lanes and links are free, how long
    they were busy, when each tensor is ready on each device, and where copies come from.
    """

    def __init__(self, scenario: Scenario, lanes: list[Lane]) -> None:
        self.graph = scenario.graph
        self.lanes = lanes
        crowds = [sum(x.device == lane.device for x in lanes) for lane in lanes]
        self.ms = {
            (s.name, n): round(scenario.costs.latency_ms(s.name, lane, crowd))
            for s in self.graph.segments
            for n, (lane, crowd) in enumerate(zip(lanes, crowds, strict=True))
        }
        tensors = (*self.graph.inputs, *(t for s in self.graph.segments for t in s.outputs))
        self.copy_ms = {t.name: round(scenario.link.copy_ms(t.size_bytes())) for t in tensors}
        self.least_ms = {
            s.name: min(self.ms[s.name, n] for n in range(len(lanes))) for s in self.graph.segments
        }
        self.after_ms: dict[str, int] = {}
        for segment in reversed(self.graph.segments):
            follow = (
                self.least_ms[name] + self.after_ms[name]
                for name in self.graph.successors[segment.name]
            )
            self.after_ms[segment.name] = max(follow, default=0)

    def start(self):
        origin = self.lanes[0].device
        ready = {(t.name, origin): 0 for t in self.graph.inputs}
        home = {t.name: origin for t in self.graph.inputs}
        return [0] * len(self.lanes), [0] * len(self.lanes), {}, {}, ready, home

    def pull(self, state, tensor, lane):
        free, load, link_free, link_load, ready, home = state
        device = self.lanes[lane].device
        if (tensor, device) in ready:
            return
        source, takes = home[tensor], self.copy_ms[tensor]
        link = source, device
        begin = max(free[lane], ready[tensor, source], link_free.get(link, 0))
        free[lane] = link_free[link] = ready[tensor, device] = begin + takes
        load[lane] += takes
        link_load[link] = link_load.get(link, 0) + takes

    def after(self, state, segment, lane):
        """Return the state after a lane was given a segment."""
        state = tuple(part.copy() for part in state)
        free, load, _, _, ready, home = state
        device = self.lanes[lane].device
        for tensor in dict.fromkeys(t.name for t in segment.inputs):
            self.pull(state, tensor, lane)
        begin = max([free[lane], *(ready[t.name, device] for t in segment.inputs)])
        free[lane] = begin + self.ms[segment.name, lane]
        load[lane] += self.ms[segment.name, lane]
        for tensor in segment.outputs:
            ready[tensor.name, device] = free[lane]
            home.setdefault(tensor.name, device)
        return state

    def value(self, state, objective):
        """Return the objective when the network outputs have been brought to the origin."""
        state = tuple(part.copy() for part in state)
        for tensor in self.graph.outputs:
            self.pull(state, tensor.name, 0)
        free, load, _, link_load, _, _ = state
        return max(free) if objective == "latency" else max([*load, *link_load.values()])

    def hopeless(self, state, ran, objective, limit):
        """Tell whether no way to go on from a state can stay below a limit."""
        free, load, _, link_load, ready, _ = state
        if objective == "throughput":
            return max([*load, *link_load.values()]) >= limit
        if max(free) >= limit:
            return True
        ready_ms = defaultdict(lambda: limit)
        for (tensor, _), at in ready.items():
            ready_ms[tensor] = min(ready_ms[tensor], at)
        for segment in self.graph.segments:
            if segment.name in ran or any(t.name not in ready_ms for t in segment.inputs):
                continue
            begin = max([min(free), *(ready_ms[t.name] for t in segment.inputs)])
            if begin + self.least_ms[segment.name] + self.after_ms[segment.name] >= limit:
                return True
        return False

    def best(self, objective, limit):
        """Return the least objective of all placements that use every lane, or a limit."""
        best = limit
        seen = set()

        def go_on(state, runs):
            nonlocal best
            ran = {name for name, _ in runs}
            if len(ran) == len(self.graph.segments):
                used = {0} | {lane for _, lane in runs}
                if len(used) == len(self.lanes):
                    best = min(best, self.value(state, objective))
                return
            for segment in self.graph.segments:
                if any(t.name not in state[5] for t in segment.inputs):
                    continue
                for lane in range(len(self.lanes)):
                    device = self.lanes[lane].device
                    if any(
                        name == segment.name and self.lanes[x].device == device for name, x in runs
                    ):
                        continue
                    then = self.after(state, segment, lane)
                    then_ran = ran | {segment.name}
                    key = (
                        frozenset([*runs, (segment.name, lane)]),
                        *map(tuple, then[:2]),
                        *(frozenset(part.items()) for part in then[2:]),
                    )
                    if key not in seen and not self.hopeless(then, then_ran, objective, best):
                        seen.add(key)
                        go_on(then, [*runs, (segment.name, lane)])

        go_on(self.start(), [])
        return best


def replayed(scenario: Scenario, plan) -> float:
    """Return what the reference says a plan takes."""
    lanes = list(plan.placement.lanes)
    reference = Reference(scenario, lanes)
    state, numbers = reference.start(), {lane.name: n for n, lane in enumerate(lanes)}
    for run in plan.placement.assignments:
        state = reference.after(state, scenario.graph[run.segment], numbers[run.lane])
    return reference.value(state, plan.objective)


def assert_optimal(scenario: Scenario, lanes: list[Lane], objective) -> None:
    plan = plan_streams(scenario, lanes, objective)
    assert plan.is_optimal
    assert plan.lower_bound_ms <= plan.objective_ms == replayed(scenario, plan)
    best_ms = min(
        Reference(scenario, [lanes[0], *others]).best(objective, int(plan.objective_ms) + 1)
        for count in range(len(lanes))
        for others in combinations(lanes[1:], count)
    )
    assert best_ms == plan.objective_ms


# --- Up to eight segments: every placement -------------------------------------------------


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize(
    ("setup", "most"),
    [
        ("two lanes", 8),
        ("three lanes", 6),
        ("wide and narrow", 7),
        ("two devices", 5),
        ("three devices", 4),
        ("two kinds", 5),
        ("two and one", 5),
        ("two and two", 4),
    ],
)
def test_small_graphs_are_planned_as_well_as_they_can_be(setup, most, objective):
    lanes = lanes_of(setup)
    for count in range(1, most + 1):
        assert_optimal(random_scenario(count, count, lanes), lanes, objective)


@pytest.mark.parametrize("seed", range(4))
def test_lanes_that_slow_each_other_down_are_left_out_as_they_should_be(seed):
    lanes = lanes_of("three lanes")
    scenario = random_scenario(seed, 5, lanes, crowd=True)
    assert_optimal(scenario, lanes, "latency")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize(
    ("setup", "count"),
    [
        ("two lanes", EXACT_SEGMENTS),
        ("three lanes", 7),
        ("wide and narrow", EXACT_SEGMENTS),
        ("two devices", EXACT_SEGMENTS),
        ("three devices", 6),
        ("two kinds", 7),
        ("two and one", 6),
        ("two and two", 5),
    ],
)
def test_many_small_graphs_are_planned_as_well_as_they_can_be(setup, count, crowd, objective):
    lanes = lanes_of(setup)
    for seed in range(100, 105):
        assert_optimal(random_scenario(seed, count, lanes, crowd=crowd), lanes, objective)


# --- 12 to 20 segments: a proven optimum ---------------------------------------------------


def proven_optimum(scenario: Scenario, lanes: list[Lane], objective, known_ms: int) -> int:
    """Return the least objective of a constraint program that allows every placement.

    A lane does one task at a time: the copies that a segment needs, in any order, and then
    the segment. The model also allows some placements that are none (a copy may come from
    any one device that computes the tensor, whichever is issued first), so that no
    placement is below its optimum.

    Parameters
    ----------
    known_ms
        The objective of some placement.
    """
    graph, reference = scenario.graph, Reference(scenario, lanes)
    model = cp_model.CpModel()
    horizon = 4 * (sum(reference.least_ms.values()) + sum(reference.copy_ms.values()))
    devices = list(dict.fromkeys(lane.device for lane in lanes))
    on_device = {d: [n for n, lane in enumerate(lanes) if lane.device == d] for d in devices}
    producer = {t.name: s.name for s in graph.segments for t in s.outputs}
    tasks, copies = [[] for _ in lanes], [[] for _ in lanes]
    lane_work, carried, link_work = [[] for _ in lanes], defaultdict(list), defaultdict(list)
    runs, homes, ways = {}, {}, defaultdict(list)

    def moment():
        return model.new_int_var(0, horizon, "")

    def add_run(name, n, length, chosen):
        """A task on a lane: what is pulled from its start, then the run."""
        start, begin = moment(), moment()
        model.add(start <= begin)
        task = model.new_optional_interval_var(
            start, model.new_int_var(0, horizon, ""), begin + length, chosen, ""
        )
        tasks[n].append(task)
        lane_work[n].append(length * chosen)
        runs[name, n] = start, begin, begin + length, chosen

    for segment in graph.segments:
        for n in range(len(lanes)):
            add_run(segment.name, n, reference.ms[segment.name, n], model.new_bool_var(""))
        model.add_at_least_one(runs[segment.name, n][3] for n in range(len(lanes)))
        for device in devices:
            model.add_at_most_one(runs[segment.name, n][3] for n in on_device[device])
            homes[segment.name, device] = model.new_bool_var("")
            there = [runs[segment.name, n][3] for n in on_device[device]]
            model.add_bool_or(there).only_enforce_if(homes[segment.name, device])
        model.add_exactly_one(homes[segment.name, device] for device in devices)
    always = model.new_constant(1)
    add_run("end", 0, 0, always)
    for segment in graph.segments:
        model.add(runs["end", 0][0] >= runs[segment.name, 0][2]).only_enforce_if(
            runs[segment.name, 0][3]
        )
    for tensor in reference.copy_ms:
        for device in devices:
            if tensor in producer:
                there = [runs[producer[tensor], n] for n in on_device[device]]
                ways[tensor, device] += [(end, chosen) for _, _, end, chosen in there]
            elif device == devices[0]:
                ways[tensor, device].append((0, always))
    readers = [(s.name, n, s.inputs) for s in graph.segments for n in range(len(lanes))]
    for name, n, inputs in (*readers, ("end", 0, graph.outputs)):
        start, begin, _, chosen_run = runs[name, n]
        device = lanes[n].device
        for tensor in dict.fromkeys(t.name for t in inputs):
            takes = reference.copy_ms[tensor]
            for source in devices:
                if source == device or (tensor not in producer and source != devices[0]):
                    continue
                at, chosen = moment(), model.new_bool_var("")
                interval = model.new_optional_fixed_size_interval_var(at, takes, chosen, "")
                copies[n].append(interval)
                carried[source, device].append(interval)
                lane_work[n].append(takes * chosen)
                link_work[source, device].append(takes * chosen)
                ways[tensor, device].append((at + takes, chosen))
                model.add_implication(chosen, chosen_run)
                model.add(at >= start).only_enforce_if(chosen)
                model.add(at + takes <= begin).only_enforce_if(chosen)
                if tensor in producer:
                    model.add_implication(chosen, homes[producer[tensor], source])
                    for x in on_device[source]:
                        _, _, end, made = runs[producer[tensor], x]
                        model.add(at >= end).only_enforce_if(chosen, made)
    for found in ways.values():
        model.add_at_most_one(chosen for _, chosen in found)
    for name, n, inputs in (*readers, ("end", 0, graph.outputs)):
        _, begin, _, chosen_run = runs[name, n]
        for tensor in inputs:
            found = ways[tensor.name, lanes[n].device]
            model.add_bool_or([chosen for _, chosen in found]).only_enforce_if(chosen_run)
            for end, chosen in found:
                model.add(begin >= end).only_enforce_if(chosen, chosen_run)
    for busy in (*tasks, *copies, *carried.values()):
        model.add_no_overlap(busy)
    over = model.new_int_var(0, known_ms, "")
    if objective == "latency":
        for _, _, end, chosen in runs.values():
            model.add(over >= end).only_enforce_if(chosen)
    else:
        for loads in (*lane_work, *link_work.values()):
            model.add(over >= sum(loads))
    model.minimize(over)
    solver = cp_model.CpSolver()
    # Else it leaves the system's own action for SIGINT behind, and Ctrl-C ends the process.
    solver.parameters.catch_sigint_signal = False
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_time_in_seconds = 120
    assert solver.solve(model) == cp_model.OPTIMAL
    return round(solver.objective_value)


def assert_near_optimal(scenario: Scenario, lanes: list[Lane], objective) -> None:
    plan = plan_streams(scenario, lanes, objective)
    reached_ms = round(plan.objective_ms)
    assert replayed(scenario, plan) == reached_ms
    least_ms = proven_optimum(scenario, lanes, objective, reached_ms)
    assert plan.lower_bound_ms <= least_ms <= reached_ms <= 1.05 * least_ms
    assert not plan.is_optimal or reached_ms == least_ms


@pytest.mark.parametrize(
    ("setup", "count", "objective"),
    [
        ("three lanes", 20, "latency"),
        ("two devices", 12, "latency"),
        ("two devices", 16, "throughput"),
    ],
)
def test_larger_graphs_are_planned_within_5_percent_of_the_optimum(setup, count, objective):
    lanes = lanes_of(setup)
    assert_near_optimal(random_scenario(0, count, lanes, grains=10), lanes, objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize(
    ("setup", "count"),
    [
        ("two lanes", 20),
        ("three lanes", 16),
        ("wide and narrow", 18),
        ("two devices", 12),
        ("two devices", 16),
        ("three devices", 12),
        ("two kinds", 14),
        ("two and one", 12),
    ],
)
def test_many_larger_graphs_are_planned_within_5_percent(setup, count, objective):
    lanes = lanes_of(setup)
    for seed in range(1, 4):
        assert_near_optimal(random_scenario(seed, count, lanes, grains=10), lanes, objective)


# --- Any size ------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", ["three lanes", "three devices", "two and two"])
def test_two_hundred_segments_are_planned_at_once(setup):
    lanes = lanes_of(setup)
    scenario = random_scenario(0, 200, lanes, grains=10)
    begin_s = time.process_time()
    plan = plan_streams(scenario, lanes)
    assert time.process_time() - begin_s < 5  # it is about 0.4 s; machines differ
    assert replayed(scenario, plan) == plan.objective_ms
    alone_ms = sum(scenario.costs.latency_ms(s.name, lanes[0]) for s in scenario.graph.segments)
    assert plan.lower_bound_ms <= plan.objective_ms < alone_ms
