from __future__ import annotations

import pytest

from parnet_engines.planning.cost_table import WHOLE, CostTable, SegmentCost
from parnet_engines.planning.layouts import (
    place_authors,
    place_whole,
    streams_of,
    whole_graph,
    whole_scenario,
)
from parnet_engines.planning.scenario import Scenario
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane
from parnet_engines.schedule.program import Copy, Run
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

GRAPH_TEXT = """
    stem1: image -> a
    stem2: a -> b
    stream1: a -> c
    stream2: b -> d
    stream3: b -> e
    fusion: c d -> f
    head: f e -> logits
"""
WORK = {"stem1": 10, "stem2": 5, "stream1": 50, "stream2": 60, "stream3": 63}


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", (1,))


def tensors(names: str) -> tuple[TensorSpec, ...]:
    return tuple(map(tensor, names.split()))


def parse(text: str) -> StreamGraph:
    """Read a stream graph from lines such as ``stem: image -> x``."""
    segments = []
    for line in text.strip().splitlines():
        name, _, ends = line.strip().partition(": ")
        reads, _, writes = ends.partition(" -> ")
        cost = Cost(0, WORK.get(name, 1) * 10**9, 0, 0, 1, 1)
        segments.append(Segment(name, tensors(reads), tensors(writes), cost))
    return StreamGraph(tensors("image"), segments[-1].outputs, tuple(segments))


PARNET = parse(GRAPH_TEXT)


def places(count: int, kind: str = "cuda") -> list[Lane]:
    return [Lane(f"lane{n}", f"{kind}:{n}") for n in range(count)]


def runs_by_lane(placement) -> dict[str, list[str]]:
    return {
        lane.name: [a.segment for a in placement.assignments if a.lane == lane.name]
        for lane in placement.lanes
    }


def test_streams_are_the_independent_segments_with_the_most_work():
    assert streams_of(PARNET) == ("stream1", "stream2", "stream3")
    assert len(streams_of(parse("one: image -> a\n two: a -> b"))) == 1


def test_the_authors_run_a_stream_on_each_device_and_recompute_the_stem():
    # The released script: rank 0 runs its stream and all that follows; rank 1 recomputes
    # the first part of the stem, and rank 2 all of it, so that only streams are sent.
    placement = place_authors(PARNET, places(3))
    assert runs_by_lane(placement) == {
        "lane0": ["stem1", "stream1", "fusion", "head"],
        "lane1": ["stem1", "stem2", "stream2"],
        "lane2": ["stem1", "stem2", "stream3"],
    }
    program = checked(lower(PARNET, placement), PARNET).program
    carried = [
        program.buffers_by_name[step.target].tensor.name
        for step in program.steps
        if isinstance(step, Copy)
    ]
    assert sorted(carried) == ["d", "e", "image", "image"]


def test_the_first_lane_of_each_device_has_the_authors_stream():
    lanes = [Lane("a", "x"), Lane("b", "x"), Lane("c", "y"), Lane("d", "z")]
    placement = place_authors(PARNET, lanes)
    assert [lane.name for lane in placement.lanes] == ["a", "c", "d"]


def test_streams_are_dealt_out_in_turn_to_fewer_devices():
    assert runs_by_lane(place_authors(PARNET, places(2))) == {
        "lane0": ["stem1", "stem2", "stream1", "stream3", "fusion", "head"],
        "lane1": ["stem1", "stem2", "stream2"],
    }


def test_lanes_of_one_device_recompute_nothing():
    lanes = [Lane(name, "cpu") for name in "abcd"]
    placement = place_authors(PARNET, lanes)
    assert [a.segment for a in placement.assignments] == [s.name for s in PARNET.segments]
    assert [lane.name for lane in placement.lanes] == ["a", "b", "c"]
    assert len({a.lane for a in placement.assignments if a.segment.startswith("stream")}) == 3


def test_a_network_without_streams_is_all_on_one_device():
    chain = parse("one: image -> a\n two: a -> b")
    placement = place_authors(chain, places(1))
    assert placement.assignments == (Assignment("one", "lane0"), Assignment("two", "lane0"))


def test_the_whole_graph_has_the_interface_and_the_work_of_its_segments():
    whole = whole_graph(PARNET)
    (segment,) = whole.segments
    assert (segment.name, segment.inputs, segment.outputs) == (WHOLE, PARNET.inputs, PARNET.outputs)
    assert segment.cost.macs == sum(s.cost.macs for s in PARNET.segments)
    assert segment.cost.nodes == len(PARNET.segments)
    assert segment.cost.depth == 5  # stem1, stem2, a stream, fusion, head
    measured = Cost(1, 2, 3, 4, 5, 6)
    assert whole_graph(PARNET, measured).segments[0].cost == measured
    program = checked(lower(whole, place_whole(Lane("only", "cpu"))), whole).program
    assert [step.segment for step in program.steps if isinstance(step, Run)] == [WHOLE]


@pytest.mark.parametrize("known_ms", [None, 5.0])
def test_the_whole_graph_takes_the_sum_of_its_segments_unless_it_was_measured(known_ms):
    entries = [
        SegmentCost(s.name, "cuda", 1, busy, float(n * busy), "measured", "here")
        for n, s in enumerate(PARNET.segments)
        for busy in (1, 2)
    ]
    if known_ms is not None:
        entries.append(SegmentCost(WHOLE, "cuda", 1, 1, known_ms, "measured", "here"))
    # Of another kind of device one segment only is known: that is no sum.
    entries.append(SegmentCost("stem1", "cpu", 1, 1, 9.0, "measured", "here"))
    scenario = whole_scenario(Scenario(PARNET, CostTable(tuple(entries))))
    entry = scenario.costs.find(WHOLE, "cuda")
    assert entry.latency_ms == (21.0 if known_ms is None else known_ms)
    assert entry.source == ("estimated" if known_ms is None else "measured")
    assert scenario.costs.find(WHOLE, "cpu") is None
    assert [s.name for s in scenario.graph.segments] == [WHOLE]
