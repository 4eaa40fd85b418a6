from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parnet_engines.cuda.lane_priorities import lane_priorities, lane_slack
from parnet_engines.cuda.memory import Region, from_layout
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

NO_COST = Cost(0, 0, 0, 0, 0, 0)


def tensor(name):
    return TensorSpec(name, "float32", (3,))


def segment(name, reads, writes):
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, NO_COST)


GRAPH = StreamGraph(
    (tensor("image"),),
    (tensor("y"),),
    (
        segment("stem", "image", "x"),
        segment("a", "x", "l"),
        segment("b", "x", "m"),
        segment("c", "m", "r"),
        segment("head", "l r", "y"),
    ),
)
CHAINS = (("stem", "a", "head"), ("stem", "b", "c", "head"))
LANE_OF = {"stem": 0, "a": 0, "b": 1, "c": 2, "head": 0}


@given(st.tuples(*[st.integers(0, 9)] * 5))
def test_slack_is_what_the_longest_chain_through_a_lane_lacks(weights):
    named = dict(zip(LANE_OF, weights, strict=True))
    lanes = tuple(Lane(f"lane{i}", "cuda:0") for i in range(3))
    placement = Placement(lanes, tuple(Assignment(s, f"lane{n}") for s, n in LANE_OF.items()))
    found = lane_slack(lower(GRAPH, placement), named)
    # Chains by hand; lane0 also keeps `a` behind `stem`, which it is anyway.
    length = {chain: sum(named[s] for s in chain) for chain in CHAINS}
    longest = max(length.values())
    for lane, _ in itertools.groupby(sorted(set(LANE_OF.values()))):
        through = [c for c in CHAINS if any(LANE_OF[s] == lane for s in c)]
        assert found[f"lane{lane}"] == longest - max(length[c] for c in through)


@pytest.mark.parametrize(
    ("slack", "expected"),
    [
        ({"a": 0.0, "b": 2.0, "c": 1.0}, {"a": -2, "b": 0, "c": -1}),
        ({"a": 0.0, "b": 0.0}, {"a": -2, "b": -2}),
        ({"a": 0, "b": 1, "c": 2, "d": 3}, {"a": -2, "b": -1, "c": 0, "d": 0}),
    ],
)
def test_less_slack_is_a_greater_priority(slack, expected):
    assert lane_priorities(slack, 0, -2) == expected


def test_a_device_with_one_priority_gives_it_to_all():
    assert lane_priorities({"a": 0.0, "b": 2.0}, 0, 0) == {"a": 0, "b": 0}


@pytest.mark.parametrize("layout", TensorLayout)
def test_a_tensor_is_the_same_in_every_layout(layout):
    shape = (2, 37, 3, 5)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    region = Region(0, 0, shape, "float16", layout)
    memory = np.zeros(region.size_bytes // 2, np.float16)
    vector, vectors = layout.vector, -(-37 // layout.vector)
    for n, c, h, w in np.ndindex(shape):
        where = {
            TensorLayout.LINEAR: ((n * 37 + c) * 3 + h) * 5 + w,
            TensorLayout.HWC8: ((n * 3 + h) * 5 + w) * vectors * vector + c,
            TensorLayout.CHW32: (
                (((n * vectors + c // vector) * 3 + h) * 5 + w) * vector + c % vector
            ),
        }[layout]
        memory[where] = values[n, c, h, w]
    np.testing.assert_array_equal(from_layout(memory.view(np.uint8), region), values)
