"""Clusters of abstract graphs, and the graph algorithms behind them."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.splitting.cluster_graph import ClusterGraph, bits
from parnet_export.splitting.clustering import cluster
from parnet_export.splitting.parallel_regions import _immediate_dominators, _PostDominators
from parnet_export.splitting.work_graph import ClusteringOptions, DeviceModel, WorkGraph, WorkTensor

INPUT = -1
KB = 1000


def graph(times: list[float], edges: dict[int, list[int]], sizes: dict[int, int] | None = None):
    """Build a work graph in which each node writes one tensor; `INPUT` is the network's input."""
    sizes = sizes or {}
    consumers: dict[int, list[int]] = {node: [] for node in (INPUT, *range(len(times)))}
    for reader, producers in edges.items():
        for producer in producers:
            consumers[producer].append(reader)
    return WorkGraph(
        tuple(map(float, times)),
        tuple(
            WorkTensor(sizes.get(node, KB), None if node == INPUT else node, tuple(sorted(found)))
            for node, found in consumers.items()
        ),
    )


def clusters_of(work: WorkGraph, **options: float) -> list[list[int]]:
    return [list(members) for members in cluster(work, ClusteringOptions(**options)).clusters]


EXACT = ClusteringOptions(
    min_gain=0, min_region_gain=0, device=DeviceModel(launch_us=0, crossing_us=0)
)
"""Keeps whatever gains anything at all."""


# ------------------------------------------------------------------ shapes


def test_a_chain_is_one_cluster():
    assert clusters_of(graph([100, 200, 300], {0: [INPUT], 1: [0], 2: [1]})) == [[0, 1, 2]]


def test_heavy_branches_stay_apart():
    work = graph([500] * 4, {0: [INPUT], 1: [0], 2: [0], 3: [1, 2]})
    assert clusters_of(work) == [[0], [1], [2], [3]]


def test_a_gate_beside_a_convolution_is_absorbed():
    # 0 convolution; 1 pooling, 2 product, 3 sigmoid; 4 multiplication
    work = graph([1000, 10, 5, 5, 30], {0: [INPUT], 1: [INPUT], 2: [1], 3: [2], 4: [0, 3]})
    found = cluster(work)
    assert found.clusters == ((0, 1, 2, 3, 4),)
    (region,) = found.regions
    assert (region.exit, region.kept) == (4, False)
    assert region.gain_us == pytest.approx(20)
    assert region.work_us == pytest.approx(1050)


def test_a_gate_that_feeds_two_multiplications_is_absorbed_with_both():
    # 0 convolution, 1-3 gate, 4 scale * x, 5 first addition, 6 shift, 7 second addition
    edges = {0: [INPUT], 1: [INPUT], 2: [1], 3: [2], 4: [3, INPUT], 5: [0, 4], 6: [3], 7: [5, 6]}
    assert clusters_of(graph([1000, 10, 5, 5, 30, 30, 5, 30], edges)) == [list(range(8))]


def test_a_pooled_input_that_two_blocks_share_stays_with_its_producer():
    # 0 stem, 1 pooling of it; two blocks of a convolution, a gate and a multiplication; 8 join
    edges = {0: [INPUT], 1: [0], 2: [0], 3: [1], 4: [2, 3], 5: [0], 6: [1], 7: [5, 6], 8: [4, 7]}
    work = graph([900, 25, 800, 30, 30, 700, 30, 30, 500], edges, {0: 4000 * KB, 1: 1})
    assert clusters_of(work) == [[0, 1], [2, 3, 4], [5, 6, 7], [8]]


def test_streams_keep_their_own_part_of_a_distributed_fusion():
    # Each stream, 0 and 1, ends with a convolution (2, 4) and a gate (3, 5) of its own output;
    # 6 adds the maps, 7 the gates, 8 multiplies, 9 is the tail.
    edges = {0: [INPUT], 1: [INPUT], 2: [0], 3: [0], 4: [1], 5: [1]}
    edges |= {6: [2, 4], 7: [3, 5], 8: [6, 7], 9: [8]}
    sizes = {0: 2000 * KB, 1: 2000 * KB, 2: 1000 * KB, 4: 1000 * KB}
    work = graph([3000, 3000, 150, 25, 150, 25, 10, 5, 10, 1000], edges, sizes)
    assert clusters_of(work) == [[0, 2, 3], [1, 4, 5], [6, 7, 8, 9]]


def test_the_branches_of_a_wheatstone_bridge_stay_apart():
    edges = {0: [INPUT], 1: [0], 2: [0], 3: [1], 4: [1, 2], 5: [3, 4]}
    assert clusters_of(graph([400] * 6, edges)) == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize(
    ("large", "expected"),
    [(0, {frozenset({0, 2}), frozenset({3})}), (2, {frozenset({0}), frozenset({2, 3})})],
    ids=["a shrinking step stays with its producer", "a growing step goes to its reader"],
)
def test_a_leftover_joins_the_side_from_which_less_has_to_cross(large, expected):
    # A small step, 2, leads from 0, which 4 reads too, to 3, which joins it with 1.
    edges = {0: [INPUT], 1: [INPUT], 2: [0], 3: [1, 2], 4: [0]}
    work = graph([3000, 3000, 30, 2000, 2000], edges, {large: 9000 * KB})
    assert set(map(frozenset, clusters_of(work))) == expected | {frozenset({1}), frozenset({4})}


def test_a_constant_expression_joins_its_only_reader():
    work = graph([100, 500, 500, 500], {1: [INPUT], 2: [INPUT, 0], 3: [1, 2]})
    assert clusters_of(work) == [[0, 2], [1], [3]]


def test_a_shape_computation_that_many_branches_read_joins_what_runs_beside_it():
    # 0 computes a shape from the image; 1 is the stem; 2 and 3 are branches that read both.
    edges = {0: [INPUT], 1: [INPUT], 2: [0, 1], 3: [0, 1], 4: [2, 3]}
    assert clusters_of(graph([3, 900, 800, 700, 600], edges)) == [[0, 1], [2], [3], [4]]


def test_independent_networks_stay_apart():
    assert clusters_of(graph([500] * 4, {0: [INPUT], 1: [0], 2: [INPUT], 3: [2]})) == [
        [0, 1],
        [2, 3],
    ]


def test_several_outputs_of_one_node_bound_a_region():
    # Node 0 splits its input in two; 1 and 2 take a part each; 3 joins them.
    tensors = (
        WorkTensor(KB, None, (0,)),
        WorkTensor(KB, 0, (1,)),
        WorkTensor(KB, 0, (2,)),
        WorkTensor(KB, 1, (3,)),
        WorkTensor(KB, 2, (3,)),
    )
    assert cluster(WorkGraph((5.0, 15.0, 15.0, 5.0), tensors)).clusters == ((0, 1, 2, 3),)
    heavy = cluster(WorkGraph((5.0, 900.0, 900.0, 5.0), tensors)).clusters
    assert {frozenset(members) for members in heavy} >= {frozenset({1}), frozenset({2})}


# ----------------------------------------------------------------- options


def test_min_gain_decides_whether_a_branch_is_worth_a_segment():
    # The branches 1 and 2 save 400 of 10,000 microseconds: 4 %.
    work = graph([8800, 600, 400, 200], {0: [INPUT], 1: [0], 2: [0], 3: [1, 2]})
    assert len(clusters_of(work, min_gain=0.03)) == 4
    assert len(clusters_of(work, min_gain=0.05)) == 1


def test_a_region_that_gains_less_than_a_crossing_costs_is_absorbed():
    work = graph([15, 19, 25, 5], {0: [INPUT], 1: [0], 2: [0], 3: [1, 2]})
    assert len(clusters_of(work)) == 1
    cheap = ClusteringOptions(device=DeviceModel(crossing_us=1))
    assert len(cluster(work, cheap).clusters) > 1


def test_inner_regions_are_decided_before_outer_ones():
    # Two branches of 1000, one of which holds a little gate of its own.
    edges = {0: [INPUT], 1: [0], 2: [1], 3: [1], 4: [2, 3], 5: [0], 6: [4, 5]}
    found = cluster(graph([500, 500, 450, 20, 30, 1000, 500], edges))
    assert found.clusters == ((0,), (1, 2, 3, 4), (5,), (6,))
    assert [(region.exit, region.kept) for region in found.regions] == [(4, False), (6, True)]


def test_times_add_up():
    found = cluster(graph([500, 400, 300, 200], {0: [INPUT], 1: [0], 2: [0], 3: [1, 2]}))
    assert found.times_us == (500, 400, 300, 200)
    assert found.total_us == 1400


@pytest.mark.parametrize(
    "settings_",
    [{"min_gain": -0.1}, {"min_gain": 1.5}, {"min_region_gain": 2.0}],
)
def test_gains_are_fractions(settings_: dict[str, float]):
    with pytest.raises(ValueError, match="fractions"):
        ClusteringOptions(**settings_)


def test_a_device_has_positive_rates_and_no_negative_costs():
    with pytest.raises(ValueError, match="positive rates"):
        DeviceModel(bytes_per_us=0)
    with pytest.raises(ValueError, match="non-negative"):
        DeviceModel(launch_us=-1)


def test_an_operator_is_bound_by_arithmetic_or_by_memory():
    device = DeviceModel(flops_per_us=100, bytes_per_us=10, launch_us=3)
    assert device.operator_us(flops=1000, moved_bytes=10) == 13
    assert device.operator_us(flops=10, moved_bytes=1000) == 103


@pytest.mark.parametrize(
    ("times", "tensor", "message"),
    [
        ((-1.0,), WorkTensor(1, None, (0,)), "negative"),
        ((1.0, 1.0), WorkTensor(1, 1, (0,)), "topological"),
        ((1.0, 1.0), WorkTensor(1, 0, (0,)), "topological"),
        ((1.0, 1.0), WorkTensor(1, None, (1, 0)), "ascending"),
        ((1.0,), WorkTensor(1, None, (0, 3)), "does not exist"),
    ],
)
def test_an_inconsistent_work_graph_is_refused(times, tensor, message):
    with pytest.raises(ValueError, match=message):
        WorkGraph(times, (tensor,))


# -------------------------------------------------------------- properties


@st.composite
def work_graphs(draw: st.DrawFn, max_nodes: int = 14) -> WorkGraph:
    count = draw(st.integers(1, max_nodes))
    times = draw(st.lists(st.sampled_from([0, 3, 15, 80, 400]), min_size=count, max_size=count))
    edges = {
        node: draw(st.lists(st.integers(INPUT, node - 1), max_size=3, unique=True))
        for node in range(count)
    }
    sizes = {node: draw(st.sampled_from([1, KB, 5000 * KB])) for node in range(INPUT, count)}
    return graph(times, edges, sizes)


def reachable(work: WorkGraph) -> list[set[int]]:
    """For each node all that depend on it, by definition."""
    after: list[set[int]] = [set() for _ in work.times_us]
    for node in reversed(range(len(after))):
        for tensor in work.writes[node]:
            for consumer in work.tensors[tensor].consumers:
                after[node] |= {consumer} | after[consumer]
    return after


options = st.sampled_from(
    [ClusteringOptions(), EXACT, ClusteringOptions(min_gain=0), ClusteringOptions(min_gain=0.2)]
)


@settings(deadline=None, max_examples=300)
@given(work_graphs(), options)
def test_clusters_partition_the_nodes_into_convex_sets_in_a_topological_order(work, chosen):
    found = cluster(work, chosen)
    nodes = sorted(itertools.chain.from_iterable(found.clusters))
    assert nodes == list(range(len(work.times_us)))
    after = reachable(work)
    place = {node: i for i, members in enumerate(found.clusters) for node in members}
    for first, second in itertools.product(nodes, nodes):
        if second in after[first]:
            assert place[first] <= place[second]
            between = after[first] & {n for n in nodes if second in after[n]}
            if place[first] == place[second]:
                assert {place[n] for n in between} <= {place[first]}


@settings(deadline=None, max_examples=60)
@given(work_graphs(), options)
def test_the_same_graph_always_gives_the_same_clusters(work, chosen):
    again = WorkGraph(work.times_us, work.tensors)
    assert cluster(work, chosen) == cluster(again, chosen)


@settings(deadline=None, max_examples=100)
@given(work_graphs())
def test_a_region_gains_at_most_what_it_works(work):
    for region in cluster(work, EXACT).regions:
        assert 0 < region.gain_us <= region.work_us
        assert region.kept


def paths_to(work: WorkGraph, node: int) -> list[set[int]]:
    """All paths from the network's inputs to a node: tensors, then nodes offset by their number."""
    found: list[set[int]] = []
    for tensor in work.reads[node]:
        producer = work.tensors[tensor].producer
        if producer is None:
            found.append({tensor})
        else:
            vertex = len(work.tensors) + producer
            found += [{tensor, vertex, *path} for path in paths_to(work, producer)]
    return found


@settings(deadline=None, max_examples=150)
@given(work_graphs(max_nodes=8))
def test_dominators_are_what_every_path_passes(work):
    dominators = _immediate_dominators(work)
    offset = len(work.tensors)
    for node, live in enumerate(work.live):
        paths = paths_to(work, node)
        assert live == bool(paths)
        if live:
            common = set.intersection(*paths)
            chain = []
            above = dominators[node]
            while above != -1:
                chain.append(above)
                producer = work.tensors[above].producer if above < offset else None
                if above >= offset:
                    above = dominators[above - offset]
                else:
                    above = -1 if producer is None else offset + producer
            assert set(chain) == common


@settings(deadline=None, max_examples=150)
@given(work_graphs(max_nodes=8))
def test_post_dominators_are_what_every_path_to_the_end_passes(work):
    after = _PostDominators(work)

    def ends(node: int) -> list[set[int]]:
        readers = {c for t in work.writes[node] for c in work.tensors[t].consumers}
        return [{node, *path} for reader in readers for path in ends(reader)] or [{node}]

    for node in range(len(work.times_us)):
        common = set.intersection(*ends(node))
        assert {n for n in range(len(work.times_us)) if after(n, node)} == common


@settings(deadline=None, max_examples=150)
@given(work_graphs(), st.randoms(use_true_random=False))
def test_the_cluster_graph_stays_consistent_while_clusters_merge(work, choices: random.Random):
    clusters = ClusterGraph(work, tuple(range(len(work.times_us))))
    after = reachable(work)
    while True:
        alive = list(bits(clusters.alive))
        owner = {node: c for c in alive for node in clusters.members[c]}
        assert sorted(owner) == list(range(len(work.times_us)))
        below = {c: {owner[m] for n in clusters.members[c] for m in after[n]} - {c} for c in alive}
        for _ in alive:  # clusters merge two by two, so reachability closes over all of them
            below = {c: found.union(*(below[d] for d in found)) for c, found in below.items()}
        for c in alive:
            assert set(bits(clusters.descendants[c] & clusters.alive)) == below[c]
            assert set(bits(clusters.ancestors[c] & clusters.alive)) == {
                d for d in alive if c in below[d]
            }
        for index, tensor in enumerate(work.tensors):
            own = None if tensor.producer is None else owner[tensor.producer]
            readers = {owner[consumer] for consumer in tensor.consumers} - {own}
            assert clusters.readers[index] == readers
            assert {c for c in alive if index in clusters.reads[c]} == readers
            for reader in readers if own is not None else ():
                assert own in clusters.predecessors[reader]
                assert reader in clusters.successors[own]
        finish: dict[int, float] = {}
        for c in sorted(alive, key=lambda c: -len(below[c])):
            before = clusters.ancestors[c] & clusters.alive
            start = max((finish[d] for d in bits(before)), default=0.0)
            assert clusters.heaviest_chain_us(before, math.inf) == pytest.approx(start)
            finish[c] = start + clusters.time_us[c]
        if choices.random() < 0.5:
            clusters.forget_merged()
        mergeable = [
            (u, v)
            for u, v in itertools.combinations(alive, 2)
            if not clusters.descendants[u] & clusters.ancestors[v] & clusters.alive
            and not clusters.descendants[v] & clusters.ancestors[u] & clusters.alive
        ]
        if not mergeable:
            return
        clusters.merge(*choices.choice(mergeable))


@settings(deadline=None, max_examples=100)
@given(work_graphs(max_nodes=10), st.sampled_from([0.0, 20.0, 300.0, math.inf]))
def test_the_heaviest_chain_is_the_heaviest_of_all_chains(work, limit_us):
    clusters = ClusterGraph(work, tuple(range(len(work.times_us))))
    after = reachable(work)
    count = len(work.times_us)
    chains = (
        chosen
        for size in range(count + 1)
        for chosen in itertools.combinations(range(count), size)
        if all(b in after[a] for a, b in itertools.pairwise(chosen))
    )
    heaviest = max(sum(work.times_us[node] for node in chain) for chain in chains)
    expected = heaviest if heaviest <= limit_us else math.inf
    assert clusters.heaviest_chain_us(clusters.alive, limit_us) == pytest.approx(expected)


# ------------------------------------------------------------------- speed


def random_graph(count: int, reach: int, seed: int) -> WorkGraph:
    choose = random.Random(seed)
    edges = {
        node: sorted({choose.randint(max(INPUT, node - reach), node - 1) for _ in range(2)})
        for node in range(count)
    }
    times = [choose.choice([3, 5, 10, 200, 1000]) for _ in range(count)]
    return graph(times, edges, {node: choose.randint(1, 10**6) for node in range(count)})


@pytest.mark.parametrize("reach", [3, 30, 3000])
def test_three_thousand_nodes_without_structure_take_seconds(reach):
    work = random_graph(3000, reach, seed=0)
    started = time.process_time()
    cluster(work)
    assert time.process_time() - started < 5
