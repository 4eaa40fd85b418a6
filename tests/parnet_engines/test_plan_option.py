from __future__ import annotations

import pytest

from parnet_engines.check import checked
from parnet_engines.devices import Device
from parnet_engines.lowering import lower
from parnet_engines.placement import Assignment
from parnet_engines.plan_option import default_lanes, place_authors
from parnet_export.errors import InputError
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


def devices(count: int) -> list[Device]:
    return [Device(f"cpu:{core}", (core,)) for core in range(count)]


def test_the_authors_run_a_stream_on_each_device_and_recompute_the_stem():
    placement = place_authors(PARNET, devices(3))
    assert [(lane.name, lane.device, lane.cores) for lane in placement.lanes] == [
        ("lane0", "cpu:0", (0,)),
        ("lane1", "cpu:1", (1,)),
        ("lane2", "cpu:2", (2,)),
    ]
    on = {
        lane.name: [a.segment for a in placement.assignments if a.lane == lane.name]
        for lane in placement.lanes
    }
    assert on == {
        "lane0": ["stem1", "stream1", "fusion", "head"],
        "lane1": ["stem1", "stem2", "stream2"],
        "lane2": ["stem1", "stem2", "stream3"],
    }
    checked(lower(PARNET, placement), PARNET)


def test_wide_devices_run_the_authors_layout_with_all_their_cores():
    wide = [Device("cpu:0-1", (0, 1)), Device("cpu:2-3", (2, 3)), Device("cpu:4", (4,))]
    assert [lane.cores for lane in place_authors(PARNET, wide).lanes] == [(0, 1), (2, 3), (4,)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_authors_layout_needs_as_many_devices_as_streams(count):
    with pytest.raises(InputError) as caught:
        place_authors(PARNET, devices(count))
    assert str(caught.value) == (
        "plan 'authors': runs each of the network's 3 streams on a device of its own, and "
        f"there {'is 1' if count == 1 else f'are {count}'}. "
        "Name as many devices, such as 'cpu:0,cpu:1,cpu:2', or use plan 'streams'."
    )


def test_a_network_without_streams_is_all_on_the_authors_only_device():
    chain = parse("one: image -> a\n two: a -> b")
    placement = place_authors(chain, devices(1))
    assert placement.assignments == (Assignment("one", "lane0"), Assignment("two", "lane0"))


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        ([(0,)], 1),
        ([(0, 1)], 2),
        ([(0, 1, 2)], 3),
        ([tuple(range(64))], 3),
        ([(0,), (1,)], 2),
        ([(0,), (1,), (2,), (3,)], 4),
    ],
)
def test_by_default_there_are_as_many_lanes_as_can_be_busy(available, expected):
    found = default_lanes(PARNET, [Device(f"cpu:{cores[0]}", cores) for cores in available])
    assert found == expected
