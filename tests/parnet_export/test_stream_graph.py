from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

NO_COST = Cost(parameters=0, macs=0, weight_bytes=0, activation_bytes=0, nodes=0, depth=0)


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", (1, 2))


def segment(name: str, reads: list[str], writes: list[str]) -> Segment:
    return Segment(name, tuple(map(tensor, reads)), tuple(map(tensor, writes)), NO_COST)


def bridge() -> StreamGraph:
    """A Wheatstone bridge: a feeds b and c, b also feeds c, both feed d."""
    return StreamGraph(
        (tensor("x"),),
        (tensor("d"),),
        (
            segment("a", ["x"], ["a"]),
            segment("b", ["a"], ["b"]),
            segment("c", ["a", "b"], ["c"]),
            segment("d", ["b", "c"], ["d"]),
        ),
    )


def test_edges_predecessors_and_successors_of_a_bridge():
    graph = bridge()
    assert [(edge.producer, edge.consumer) for edge in graph.edges] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
        ("b", "d"),
        ("c", "d"),
    ]
    assert graph.predecessors == {"a": (), "b": ("a",), "c": ("a", "b"), "d": ("b", "c")}
    assert graph.successors == {"a": ("b", "c"), "b": ("c", "d"), "c": ("d",), "d": ()}
    assert graph["c"].name == "c"
    with pytest.raises(KeyError):
        graph["e"]


def test_two_tensors_between_two_segments_are_one_predecessor():
    graph = StreamGraph(
        (tensor("x"),),
        (tensor("z"),),
        (segment("a", ["x"], ["y1", "y2"]), segment("b", ["y1", "y2"], ["z"])),
    )
    assert len(graph.edges) == 2
    assert graph.predecessors["b"] == ("a",)


@pytest.mark.parametrize(
    ("segments", "outputs", "message"),
    [
        ([("a", ["x"], ["y"]), ("a", ["y"], ["z"])], ["z"], "two segments are named 'a'"),
        ([("a", ["y"], ["z"]), ("b", ["x"], ["y"])], ["z"], "'a' reads 'y'"),
        ([("a", ["x"], ["y"]), ("b", ["x"], ["y"])], ["y"], "'y' is produced twice"),
        ([("a", ["x"], ["x"])], ["x"], "'x' is produced twice"),
        ([("a", ["x"], ["y"])], ["z"], "nothing produces the network output 'z'"),
    ],
)
def test_an_inconsistent_graph_says_what_is_wrong(segments, outputs, message):
    with pytest.raises(ValueError, match=message):
        StreamGraph(
            (tensor("x"),),
            tuple(map(tensor, outputs)),
            tuple(segment(*arguments) for arguments in segments),
        )


def test_shapes_resolve_symbols_to_the_given_sizes_or_one():
    spec = TensorSpec("x", "float16", ("batch", 3, "height"))
    assert spec.is_dynamic
    assert spec.resolve() == (1, 3, 1)
    assert spec.resolve({"batch": 2, "height": 5}) == (2, 3, 5)
    assert spec.size_bytes({"batch": 2, "height": 5}) == 2 * 3 * 5 * 2
    assert not tensor("y").is_dynamic


def test_an_unknown_element_type_is_refused():
    with pytest.raises(ValueError, match="'x' has the unsupported type 'complex64'"):
        TensorSpec("x", "complex64", (1,))


def test_flops_are_two_per_multiply_accumulate():
    assert (
        Cost(parameters=1, macs=21, weight_bytes=4, activation_bytes=8, nodes=1, depth=1).flops
        == 42
    )


def test_the_critical_path_of_a_bridge_and_its_speedup():
    weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert bridge().critical_path(weights) == ("a", "b", "c", "d")
    assert bridge().ideal_speedup(weights) == 1.0


@st.composite
def weighted_graphs(draw):
    """A random graph, the edges by index, and a weight for every segment."""
    count = draw(st.integers(1, 7))
    edges = [(i, j) for i, j in itertools.combinations(range(count), 2) if draw(st.booleans())]
    graph = StreamGraph(
        (tensor("x"),),
        tuple(tensor(f"t{i}") for i in range(count)),
        tuple(
            segment(f"s{j}", ["x", *(f"t{i}" for i, k in edges if k == j)], [f"t{j}"])
            for j in range(count)
        ),
    )
    weights = {f"s{i}": draw(st.integers(0, 9)) for i in range(count)}
    return graph, edges, weights


@settings(deadline=None, max_examples=60)
@given(weighted_graphs())
def test_the_critical_path_is_the_heaviest_of_all_chains(drawn):
    graph, edges, weights = drawn
    names = [s.name for s in graph.segments]
    chains = (
        chain
        for length in range(1, len(names) + 1)
        for chain in itertools.combinations(range(len(names)), length)
        if all(pair in edges for pair in itertools.pairwise(chain))
    )
    heaviest = max(sum(weights[names[i]] for i in chain) for chain in chains)
    path = graph.critical_path(weights)
    assert all((names.index(a), names.index(b)) in edges for a, b in itertools.pairwise(path))
    assert sum(weights[name] for name in path) == heaviest
    if heaviest:
        assert graph.ideal_speedup(weights) == pytest.approx(sum(weights.values()) / heaviest)
