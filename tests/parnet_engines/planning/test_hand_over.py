"""Plans that are equally good but for handing over from lane to lane."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.planning.cost_table import CostTable, SegmentCost
from parnet_engines.planning.evaluate import predict
from parnet_engines.planning.hand_over import latency_with_hand_overs_ms, with_fewer_hand_overs
from parnet_engines.planning.scenario import Scenario
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

NO_COST = Cost(0, 0, 0, 0, 0, 0)
EDGES = {
    "stem1": ["image"],
    "stem2": ["stem1"],
    "stream1": ["stem1"],
    "stream2": ["stem2"],
    "stream3": ["stem2"],
    "fusion": ["stream1", "stream2"],
    "head": ["fusion", "stream3"],
}
COSTS_MS = {
    "stem1": 0.16,
    "stem2": 0.05,
    "stream1": 0.31,
    "stream2": 0.31,
    "stream3": 0.5,
    "fusion": 0.08,
    "head": 0.25,
}


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", (1,))


def scenario_of(edges, costs_ms, widths=(1,)) -> Scenario:
    graph = StreamGraph(
        (tensor("image"),),
        (tensor(list(edges)[-1]),),
        tuple(
            Segment(name, tuple(map(tensor, reads)), (tensor(name),), NO_COST)
            for name, reads in edges.items()
        ),
    )
    entries = (
        SegmentCost(name, "cpu", width, 1, ms / width, "measured", "a test")
        for name, ms in costs_ms.items()
        for width in widths
    )
    return Scenario(graph, CostTable(tuple(entries)))


def placement(text: str, lanes=(1, 1), device="cpu") -> Placement:
    first = itertools.count()
    found = tuple(
        Lane(f"lane{i}", device, tuple(next(first) for _ in range(width)))
        for i, width in enumerate(lanes)
    )
    pairs = (entry.split(":") for entry in text.split())
    return Placement(found, tuple(Assignment(name, f"lane{lane}") for name, lane in pairs))


PLANNED = "stem1:0 stem2:0 stream1:1 stream3:0 stream2:1 fusion:1 head:1"


def test_hand_overs_are_paid_where_a_lane_sleeps_and_nowhere_else():
    scenario = scenario_of(EDGES, COSTS_MS)
    # stem1, over to stream1, stream2, fusion, head (stem2 and stream3 are done by then), back.
    planned = latency_with_hand_overs_ms(scenario, placement(PLANNED), 50)
    assert planned == pytest.approx(0.16 + 0.05 + 0.31 + 0.31 + 0.08 + 0.25 + 0.05)
    assert latency_with_hand_overs_ms(scenario, placement(PLANNED), 0) == pytest.approx(
        predict(scenario, placement(PLANNED)).latency_ms
    )


def test_the_critical_path_comes_to_lie_on_the_origin():
    scenario = scenario_of(EDGES, COSTS_MS)
    found = with_fewer_hand_overs(scenario, placement(PLANNED))
    lane_of = {a.segment: a.lane for a in found.assignments}
    path = ("stem1", "stream1", "stream2", "fusion", "head")
    assert {lane_of[name] for name in path} == {"lane0"}
    assert lane_of["stream3"] == "lane1"
    assert latency_with_hand_overs_ms(scenario, found, 50) == pytest.approx(
        sum(COSTS_MS[name] for name in path)
    )


@pytest.mark.parametrize(
    "given_placement",
    [
        placement("stem1:0 stem2:0 stream1:0 stream2:0 stream3:0 fusion:0 head:0", lanes=(1,)),
        placement(PLANNED, device="cuda:0"),
        Placement(
            (Lane("lane0", "cpu:0", (0,)), Lane("lane1", "cpu:1", (1,))),
            placement(PLANNED).assignments,
        ),
    ],
    ids=["one lane", "no threads to wake", "two devices"],
)
def test_what_has_no_hand_overs_between_threads_of_a_device_stays(given_placement):
    scenario = scenario_of(EDGES, COSTS_MS)
    assert with_fewer_hand_overs(scenario, given_placement) is given_placement


@settings(deadline=None, max_examples=60)
@given(st.integers(min_value=0))
def test_nothing_gets_worse_and_what_is_found_cannot_be_bettered_again(seed):
    rng = random.Random(seed)
    edges: dict[str, list[str]] = {}
    for number in range(rng.randint(1, 7)):
        earlier = ["image", *edges]
        edges[f"s{number}"] = rng.sample(earlier, rng.randint(1, min(3, len(earlier))))
    widths = [rng.choice([1, 1, 2]) for _ in range(rng.randint(1, 3))]
    costs_ms = {name: rng.choice([0.1, 0.2, 0.5, rng.random()]) for name in edges}
    scenario = scenario_of(edges, costs_ms, {1, 2})
    text = " ".join(f"{name}:{rng.randrange(len(widths))}" for name in edges)
    before = placement(text, widths)
    after = with_fewer_hand_overs(scenario, before)
    assert after.lanes == before.lanes
    assert [a.segment for a in after.assignments] == [a.segment for a in before.assignments]
    assert predict(scenario, after).latency_ms <= predict(scenario, before).latency_ms
    best_ms = latency_with_hand_overs_ms(scenario, after)
    assert best_ms <= latency_with_hand_overs_ms(scenario, before)
    assert with_fewer_hand_overs(scenario, after) == after
