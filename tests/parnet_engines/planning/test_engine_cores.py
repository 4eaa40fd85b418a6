from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from parnet_engines.planning.engine_cores import engine_cores, serial_segments, shared_segments
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

LONG = Cost(parameters=0, macs=10**9, weight_bytes=0, activation_bytes=0, nodes=1, depth=1)
SHORT = replace(LONG, macs=10**6)


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", (1,))


def graph_of(edges: dict[str, list[str]]) -> StreamGraph:
    """Make a stream graph in which every segment produces the tensor of its own name."""
    segments = tuple(
        Segment(name, tuple(map(tensor, reads)), (tensor(name),), LONG)
        for name, reads in edges.items()
    )
    return StreamGraph((tensor("x"),), (tensor(next(reversed(edges))),), segments)


PARNET = graph_of(
    {
        "stem1": ["x"],
        "stem2": ["stem1"],
        "stream1": ["stem1"],
        "stream2": ["stem2"],
        "stream3": ["stem2"],
        "fusion": ["stream1", "stream2"],
        "head": ["fusion", "stream3"],
    }
)


def test_only_stem_and_head_of_parnet_are_serial():
    assert serial_segments(PARNET) == {"stem1", "head"}


def test_short_serial_segments_are_not_worth_sharing():
    stem, *others = PARNET.segments
    graph = replace(PARNET, segments=(replace(stem, cost=SHORT), *others))
    assert shared_segments(PARNET) == {"stem1", "head"}
    assert shared_segments(graph) == {"head"}
    assert engine_cores(program_of(PLACES), graph)["stem1", "a"] == (0, 1)


@st.composite
def graphs(draw):
    edges: dict[str, list[str]] = {}
    for index in range(draw(st.integers(1, 7))):
        reads = [f"s{other}" for other in range(index) if draw(st.booleans())]
        edges[f"s{index}"] = reads or ["x"]
    return edges


@given(graphs())
def test_a_segment_is_serial_if_every_order_keeps_all_others_on_its_sides(edges):
    orders = [
        order
        for order in itertools.permutations(edges)
        if all(
            order.index(read) < order.index(name)
            for name, reads in edges.items()
            for read in reads
            if read != "x"
        )
    ]
    before = {name: {frozenset(o[: o.index(name)]) for o in orders} for name in edges}
    expected = {name for name, sides in before.items() if len(sides) == 1}
    assert serial_segments(graph_of(edges)) == expected


def program_of(assignments: dict[str, list[str]], in_flight: int = 1):
    lanes = (
        Lane("a", "cpu:0-2", (0, 1)),
        Lane("b", "cpu:0-2", (2,)),
        Lane("c", "cpu:4", (4,)),
    )
    placed = [Assignment(name, lane) for name, on in assignments.items() for lane in on]
    return lower(PARNET, Placement(lanes, tuple(placed)), in_flight)


PLACES = {
    "stem1": ["a", "c"],
    "stem2": ["a"],
    "stream1": ["b"],
    "stream2": ["c"],
    "stream3": ["a"],
    "fusion": ["b"],
    "head": ["b"],
}


def test_a_shared_segment_has_all_cores_of_its_device_and_its_own_first():
    assert engine_cores(program_of(PLACES), PARNET) == {
        ("stem1", "a"): (0, 1, 2),
        ("stem1", "c"): (4,),
        ("stem2", "a"): (0, 1),
        ("stream1", "b"): (2,),
        ("stream2", "c"): (4,),
        ("stream3", "a"): (0, 1),
        ("fusion", "b"): (2,),
        ("head", "b"): (2, 0, 1),
    }


def test_with_several_inferences_in_flight_every_segment_keeps_to_its_lane():
    found = engine_cores(program_of(PLACES, in_flight=2), PARNET)
    assert found["stem1", "a"] == (0, 1)
    assert found["head", "b"] == (2,)
