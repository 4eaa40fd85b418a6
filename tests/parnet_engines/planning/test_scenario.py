from __future__ import annotations

import pytest

from parnet_engines.planning.cost_table import CostTable, SegmentCost
from parnet_engines.planning.links import Link
from parnet_engines.planning.scenario import PS_PER_MS, Instance, Scenario
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_export.errors import InputError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int8", shape or (1_000_000,))


def segment(name: str, reads: str, writes: str) -> Segment:
    inputs, outputs = (tuple(TENSORS[t] for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, Cost(0, 1, 0, 0, 1, 1))


TENSORS = {name: tensor(name) for name in ("image", "y", "z")} | {
    "x": tensor("x", "batch", 1_000_000),
    "u": tensor("u", 3_000_000),
}
GRAPH = StreamGraph(
    (TENSORS["image"],),
    (TENSORS["z"], TENSORS["x"]),
    (segment("a", "image", "x u"), segment("b", "x u x", "y"), segment("c", "y image", "z")),
)
COSTS = CostTable(
    tuple(
        SegmentCost(name, "gpu", 1, busy, float(ms * busy), "measured", "m")
        for ms, name in enumerate("abc", start=1)
        for busy in (1, 2)
    )
)
LANES = (Lane("first", "gpu:1"), Lane("second", "gpu:0"), Lane("third", "gpu:1"))


def instance(**options) -> Instance:
    return Instance.of(Scenario(GRAPH, COSTS, Link("l", 0.0, 1.0), **options), LANES)


def test_names_become_numbers_and_times_whole_picoseconds():
    found = instance()
    assert found.segment_names == ("a", "b", "c")
    assert found.tensor_names == ("image", "x", "u", "y", "z")
    assert found.device_names == ("gpu:1", "gpu:0")  # that of the origin first
    assert found.lane_device == (0, 1, 0)
    assert found.lanes_on == ((0, 2), (1,))
    # Two lanes of gpu:1 are busy beside each other, one of gpu:0 is alone.
    assert found.latency_ps == tuple(
        tuple(factor * ms * PS_PER_MS for factor in (2, 1, 2)) for ms in (1, 2, 3)
    )
    assert found.copy_ps == tuple(ms * PS_PER_MS for ms in (1, 1, 3, 1, 1))
    assert found.fastest_ps == tuple(ms * PS_PER_MS for ms in (1, 2, 3))


def test_sizes_of_symbolic_dimensions_count():
    assert instance(dimensions={"batch": 8}).copy_ps[1] == 8 * PS_PER_MS


def test_who_feeds_whom_and_through_what():
    found = instance()
    assert found.reads == ((0,), (1, 2), (3, 0))  # x is read twice and copied once
    assert found.writes == ((1, 2), (3,), (4,))
    assert found.network_inputs == (0,)
    assert found.network_outputs == (4, 1)
    assert found.producer == (-1, 0, 0, 1, 2)
    assert found.predecessors == ((), (0,), (1,))
    assert found.successors == ((1,), (2,), ())
    assert found.between(0, 1) == [1, 2]
    assert found.followers == (((1, 3 * PS_PER_MS),), ((2, PS_PER_MS),), ())


@pytest.mark.parametrize(
    ("devices", "matter"),
    [(["x", "x"], False), (["x", "y"], False), (["x", "y", "y"], True)],
)
def test_links_matter_where_lanes_meet_at_one(devices, matter):
    costs = CostTable(
        tuple(
            SegmentCost(n, kind, 1, 1, 1.0, "measured", "m") for n in "abc" for kind in ("x", "y")
        )
    )
    lanes = [Lane(f"lane{n}", device) for n, device in enumerate(devices)]
    assert Instance.of(Scenario(GRAPH, costs), lanes).links_matter is matter


def test_a_placement_becomes_steps():
    runs = (Assignment("a", "third"), Assignment("a", "second"), Assignment("b", "first"))
    assert instance().steps(Placement(LANES, runs)) == [(0, 2), (0, 1), (1, 0)]


def test_a_segment_without_a_cost_is_named():
    with pytest.raises(InputError, match="no latency of segment 'a' on npu"):
        Instance.of(Scenario(GRAPH, COSTS), [Lane("lane0", "npu:0")])
