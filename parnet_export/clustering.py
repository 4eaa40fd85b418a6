"""Cluster a work graph into the pieces that are worth a lane of their own.

Clustering starts from single nodes and merges, in three steps:

1. Regions that gain little by running their paths side by side become one node
   (`parnet_export.parallel_regions`).
2. Chains become one node: where the only reader of u reads from u alone.
3. Pairs of neighbours merge as long as little parallelism is lost, first where
   merging keeps most traffic off the boundaries. This is how a leftover too small
   for a lane of its own, such as the gate of a fusion, joins the side from which
   less has to cross.

Clusters stay convex and the graph of clusters acyclic throughout: two neighbours
merge only when no third cluster lies on a path between them.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_export.parallel_regions import Region, absorb_small_regions
from parnet_export.work_graph import ClusteringOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_export.work_graph import WorkGraph

    _Rank = tuple[float, int, int, int, int, int]

_CLUSTERS_PER_MERGE = 25
"""Up to this many clusters, every merge is the best of all; above, the best few go together."""


@dataclass(frozen=True, slots=True)
class Clustering:
    """Clusters of a work graph, and what was decided on the way.

    Parameters
    ----------
    clusters
        Node indices of each cluster, ascending. Clusters are in a topological order:
        by the place of the clusters they read from, then those first that the longest
        chain of clusters hangs on, then by their first node.
    times_us
        Time of each cluster.
    regions
        Every parallel region that was looked at, inner ones first.
    total_us
        Time of the whole network, one node after another.
    """

    clusters: tuple[tuple[int, ...], ...]
    times_us: tuple[float, ...]
    regions: tuple[Region, ...]
    total_us: float


def cluster(graph: WorkGraph, options: ClusteringOptions | None = None) -> Clustering:
    """Cluster a work graph.

    The result depends on nothing but the arguments. It takes time proportional to the
    edges, and to the square of the number of clusters left after chains are contracted.
    """
    options = options or ClusteringOptions()
    leaders, regions = absorb_small_regions(graph, options)
    quotient = _Quotient(graph, _contract_chains(graph, leaders))
    merger = _Merger(quotient, options, graph.total_us)
    while merger.merge_neighbours() or merger.merge_leftovers():
        pass
    clusters = quotient.clusters()
    times_us = tuple(sum(graph.times_us[node] for node in members) for members in clusters)
    return Clustering(clusters, times_us, regions, graph.total_us)


def _contract_chains(graph: WorkGraph, leaders: tuple[int, ...]) -> tuple[int, ...]:
    """Merge u into v where v reads from u alone and nobody else reads from u.

    A constant expression joins its only reader, whatever else that reads.
    """
    into = list(leaders)

    def group(node: int) -> int:
        while into[node] != node:
            into[node] = into[into[node]]
            node = into[node]
        return node

    readers: dict[int, set[int]] = {}
    producers: dict[int, set[int]] = {}
    for tensor in graph.tensors:
        if tensor.producer is None:
            continue
        u = leaders[tensor.producer]
        for v in {leaders[consumer] for consumer in tensor.consumers} - {u}:
            readers.setdefault(u, set()).add(v)
            producers.setdefault(v, set()).add(u)
    for v in sorted(producers):
        constants = {u for u in producers[v] if not graph.live[u] and readers[u] == {v}}
        others = {group(u) for u in producers[v] - constants}
        if len(others) == 1 and graph.live[v]:
            (u,) = others
            if {group(w) for w in readers[u]} == {v}:
                constants.add(u)
        for u in constants:
            into[group(u)] = v
    return tuple(map(group, range(len(into))))


class _Quotient:
    """The graph of clusters. A cluster is named by a number; merging keeps the first's.

    Reachability is kept as integers used as bit sets. Bits of clusters that no longer
    exist stay in them and are masked by `alive`.
    """

    def __init__(self, graph: WorkGraph, leaders: tuple[int, ...]) -> None:
        number = {leader: index for index, leader in enumerate(sorted(set(leaders)))}
        count = len(number)
        self.alive = (1 << count) - 1
        self.members: list[list[int]] = [[] for _ in number]
        self.time_us = [0.0] * count
        for node, leader in enumerate(leaders):
            self.members[number[leader]].append(node)
            self.time_us[number[leader]] += graph.times_us[node]
        self.size_bytes = [tensor.size_bytes for tensor in graph.tensors]
        self.reads: list[set[int]] = [set() for _ in number]
        self.writes: list[set[int]] = [set() for _ in number]
        self.predecessors: list[set[int]] = [set() for _ in number]
        self.successors: list[set[int]] = [set() for _ in number]
        self.readers: list[set[int]] = []
        for index, tensor in enumerate(graph.tensors):
            readers = {number[leaders[consumer]] for consumer in tensor.consumers}
            if tensor.producer is not None:
                producer = number[leaders[tensor.producer]]
                readers.discard(producer)
                self.writes[producer].add(index)
                self.successors[producer] |= readers
            for reader in readers:
                self.reads[reader].add(index)
                if tensor.producer is not None:
                    self.predecessors[reader].add(producer)
            self.readers.append(readers)
        self.ancestors = [0] * count
        for cluster in range(count):
            for before in self.predecessors[cluster]:
                self.ancestors[cluster] |= self.ancestors[before] | 1 << before
        self.descendants = [0] * count
        for cluster in reversed(range(count)):
            for after in self.successors[cluster]:
                self.descendants[cluster] |= self.descendants[after] | 1 << after

    def merge(self, u: int, v: int) -> None:
        """Merge v into u. No third cluster may lie between them."""
        pair = 1 << u | 1 << v
        for reach, opposite in (
            (self.ancestors, self.descendants),
            (self.descendants, self.ancestors),
        ):
            union = (reach[u] | reach[v]) & ~pair
            for other in _bits(union & ~(reach[u] & reach[v]) & self.alive):
                opposite[other] |= (opposite[u] | opposite[v]) & ~pair | 1 << u
            reach[u] = union
        self.alive &= ~(1 << v)
        for edges, opposite_edges in (
            (self.predecessors, self.successors),
            (self.successors, self.predecessors),
        ):
            for other in edges[v]:
                opposite_edges[other].discard(v)
                opposite_edges[other].add(u)
            edges[u] = (edges[u] | edges[v]) - {u, v}
            edges[v] = set()
        self.writes[u] |= self.writes[v]
        self.reads[u] = (self.reads[u] | self.reads[v]) - self.writes[u]
        for tensor in self.reads[v] | self.writes[u]:
            self.readers[tensor].discard(v)
            if tensor in self.reads[u]:
                self.readers[tensor].add(u)
            else:
                self.readers[tensor].discard(u)
        self.members[u] += self.members[v]
        self.time_us[u] += self.time_us[v]

    def heaviest_chain_us(self, clusters: int, limit_us: float) -> float:
        """Return the time of the heaviest chain within a bit set, infinity above a limit.

        The set is convex, so that chains within it are paths. The search goes deep
        first and stops at the first path above the limit.
        """
        finish: dict[int, float] = {}
        for last in _bits(clusters):
            path = [last]
            path_us = self.time_us[last]
            while path:
                if path_us > limit_us:
                    return math.inf
                cluster = path[-1]
                before = [p for p in self.predecessors[cluster] if clusters >> p & 1]
                unknown = next((p for p in before if p not in finish), None)
                if unknown is None:
                    start = max((finish[p] for p in before), default=0.0)
                    finish[cluster] = start + self.time_us[cluster]
                    path_us -= self.time_us[path.pop()]
                    if finish[cluster] > limit_us:
                        return math.inf
                else:
                    path.append(unknown)
                    path_us += self.time_us[unknown]
        return max(finish.values(), default=0.0)

    def traffic_saved(self, u: int, v: int) -> int:
        """Return the bytes that no longer cross a boundary when two clusters merge."""
        shared = self.reads[u] & self.reads[v]
        between = (self.writes[u] & self.reads[v]) | (self.writes[v] & self.reads[u])
        return sum(self.size_bytes[tensor] for tensor in shared | between)

    def clusters(self) -> tuple[tuple[int, ...], ...]:
        """Return the members of every cluster, in the order that `Clustering` documents."""
        alive = tuple(_bits(self.alive))
        hops: dict[int, int] = {}
        for cluster in sorted(alive, key=lambda c: -(self.ancestors[c] & self.alive).bit_count()):
            hops[cluster] = max((hops[s] + 1 for s in self.successors[cluster]), default=0)
        place: dict[int, int] = {}
        waiting = {cluster: len(self.predecessors[cluster]) for cluster in alive}
        ready: list[tuple[tuple[int, ...], int, int, int]] = []

        def enqueue(cluster: int) -> None:
            producers = tuple(sorted(place[p] for p in self.predecessors[cluster]))
            heapq.heappush(ready, (producers, -hops[cluster], min(self.members[cluster]), cluster))

        for cluster in alive:
            if not waiting[cluster]:
                enqueue(cluster)
        while ready:
            *_, cluster = heapq.heappop(ready)
            place[cluster] = len(place)
            for successor in self.successors[cluster]:
                waiting[successor] -= 1
                if not waiting[successor]:
                    enqueue(successor)
        return tuple(tuple(sorted(self.members[cluster])) for cluster in place)


class _Merger:
    """Merges clusters greedily, the most profitable pair first."""

    def __init__(self, quotient: _Quotient, options: ClusteringOptions, total_us: float) -> None:
        self._quotient = quotient
        self._options = options
        self._device = options.device
        self._total_us = total_us

    def merge_neighbours(self) -> bool:
        """Merge clusters with readers of theirs until no pair is left; return whether any did.

        A merge changes what other pairs lose. Small graphs are weighed anew after every
        merge; in large ones, for speed, the best few pairs merge at a time, each only
        if it has not become worse.
        """
        quotient = self._quotient
        merged = False
        while True:
            pairs = ((u, v) for u in _bits(quotient.alive) for v in quotient.successors[u])
            ranks = sorted(rank for pair in pairs if (rank := self._rank_neighbours(*pair)))
            if not ranks:
                return merged
            merged = True
            for rank in ranks[: max(1, quotient.alive.bit_count() // _CLUSTERS_PER_MERGE)]:
                u, v = rank[-2:]
                again = self._rank_neighbours(u, v) if v in quotient.successors[u] else None
                if again and again <= rank:
                    quotient.merge(u, v)

    def merge_leftovers(self) -> bool:
        """Merge clusters too small for a lane with a cluster beside them.

        A shape computation that several branches read can join none of them, since the
        others would have to wait. It joins what runs beside it instead.
        """
        quotient = self._quotient
        merged = False
        for u in tuple(_bits(quotient.alive)):
            if quotient.time_us[u] > self._device.crossing_us or not quotient.alive >> u & 1:
                continue
            beside = {r for tensor in quotient.reads[u] for r in quotient.readers[tensor]}
            beside |= {p for s in quotient.successors[u] for p in quotient.predecessors[s]}
            related = quotient.ancestors[u] | quotient.descendants[u] | 1 << u
            ranks = [
                self._rank(u, v, self._device.crossing_us) for v in beside if not related >> v & 1
            ]
            best = min((rank for rank in ranks if rank), default=None)
            if best:
                quotient.merge(best[-1], u)
                merged = True
        return merged

    def _rank_neighbours(self, u: int, v: int) -> _Rank | None:
        quotient = self._quotient
        if quotient.descendants[u] & quotient.ancestors[v] & quotient.alive:
            return None
        pair_us = quotient.time_us[u] + quotient.time_us[v]
        return self._rank(u, v, self._options.tolerated_loss_us(pair_us, self._total_us))

    def _rank(self, u: int, v: int, tolerated_us: float) -> _Rank | None:
        """Return a key that sorts profitable merges first, None when too much is lost."""
        quotient = self._quotient
        loss_us = self._loss_us(u, v, tolerated_us)
        if loss_us > tolerated_us:
            return None
        saved_us = quotient.traffic_saved(u, v) / self._device.bytes_per_us
        return (
            round(loss_us - saved_us, 3),
            len(quotient.predecessors[v]),
            quotient.members[u][0],
            quotient.members[v][0],
            u,
            v,
        )

    def _loss_us(self, u: int, v: int, limit_us: float) -> float:
        """Return the most parallel work that merging two clusters puts in sequence.

        What v waits for now comes before u and before all that reads u only; u and v
        themselves come before all that read either. Of two things put in sequence the
        shorter one is lost. Infinity when above the limit.
        """
        quotient = self._quotient
        mask = quotient.alive & ~(1 << u | 1 << v)
        loss_us = 0.0
        if v not in quotient.successors[u]:
            loss_us = min(quotient.time_us[u], quotient.time_us[v])
        for a, b in ((u, v), (v, u)):
            waited_for = quotient.ancestors[b] & ~quotient.ancestors[a] & mask
            waiting = quotient.descendants[a] & ~quotient.descendants[b] & mask
            before_us = quotient.heaviest_chain_us(waited_for, limit_us)
            after_us = quotient.heaviest_chain_us(waiting, limit_us)
            loss_us = max(
                loss_us,
                min(before_us, quotient.time_us[a] + after_us),
                min(before_us + quotient.time_us[b], after_us),
            )
            if loss_us > limit_us:
                break
        return loss_us


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
