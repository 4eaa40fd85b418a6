"""The graph of clusters while clusters merge.

Reachability is kept as integers used as bit sets, one bit per cluster, which makes
thousands of clusters a matter of microseconds.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_export.splitting.work_graph import WorkGraph


class ClusterGraph:
    """Clusters of a work graph and who reads from whom.

    A cluster is named by a number; a merged one keeps the first's. Bits of clusters
    that no longer exist stay in the bit sets and are masked by `alive`.

    Parameters
    ----------
    graph
        The nodes and tensors.
    leaders
        For each node the last node of its cluster. Clusters in the order of their
        leaders are in a topological order.

    Attributes
    ----------
    alive
        Bit set of the clusters there are.
    time_us
        Time of each cluster.
    members
        Nodes of each cluster.
    reads, writes
        Tensors that each cluster reads from outside, and all that it writes.
    readers
        Clusters that read each tensor, except the one that writes it.
    predecessors, successors
        Clusters that each cluster reads from directly, and that read from it.
    ancestors, descendants
        The same with all clusters between, as bit sets.
    """

    def __init__(self, graph: WorkGraph, leaders: Sequence[int]) -> None:
        number = {leader: index for index, leader in enumerate(sorted(set(leaders)))}
        count = len(number)
        self.alive = (1 << count) - 1
        self.time_us = [0.0] * count
        self.members: list[list[int]] = [[] for _ in number]
        self.reads: list[set[int]] = [set() for _ in number]
        self.writes: list[set[int]] = [set() for _ in number]
        self.readers: list[set[int]] = []
        self.predecessors: list[set[int]] = [set() for _ in number]
        self.successors: list[set[int]] = [set() for _ in number]
        self.ancestors = [0] * count
        self.descendants = [0] * count
        self._size_bytes = [tensor.size_bytes for tensor in graph.tensors]
        self._chains: dict[int, tuple[float, float]] = {}
        self._merged = 0
        for node, leader in enumerate(leaders):
            self.members[number[leader]].append(node)
            self.time_us[number[leader]] += graph.times_us[node]
        for index, tensor in enumerate(graph.tensors):
            readers = {number[leaders[consumer]] for consumer in tensor.consumers}
            if tensor.producer is not None:
                producer = number[leaders[tensor.producer]]
                readers.discard(producer)
                self.writes[producer].add(index)
                self.successors[producer] |= readers
                for reader in readers:
                    self.predecessors[reader].add(producer)
            for reader in readers:
                self.reads[reader].add(index)
            self.readers.append(readers)
        for cluster in range(count):
            for before in self.predecessors[cluster]:
                self.ancestors[cluster] |= self.ancestors[before] | 1 << before
        for cluster in reversed(range(count)):
            for after in self.successors[cluster]:
                self.descendants[cluster] |= self.descendants[after] | 1 << after

    def merge(self, u: int, v: int) -> None:
        """Merge v into u. No third cluster may lie on a path between them."""
        pair = 1 << u | 1 << v
        for reach, back in (
            (self.ancestors, self.descendants),
            (self.descendants, self.ancestors),
        ):
            either = (reach[u] | reach[v]) & ~pair
            for other in bits(either & ~(reach[u] & reach[v]) & self.alive):
                back[other] |= (back[u] | back[v]) & ~pair | 1 << u
            reach[u] = either
        for near, back_near in (
            (self.predecessors, self.successors),
            (self.successors, self.predecessors),
        ):
            for other in near[v] - {u}:
                back_near[other].discard(v)
                back_near[other].add(u)
            near[u] = (near[u] | near[v]) - {u, v}
            near[v] = set()
        self.writes[u] |= self.writes[v]
        self.reads[u] = (self.reads[u] | self.reads[v]) - self.writes[u]
        for tensor in self.reads[v] | self.writes[u]:
            self.readers[tensor] -= {u, v}
            if tensor in self.reads[u]:
                self.readers[tensor].add(u)
        self.members[u] += self.members[v]
        self.time_us[u] += self.time_us[v]
        self.alive &= ~(1 << v)
        self._merged |= pair

    def heaviest_chain_us(self, clusters: int, limit_us: float) -> float:
        """Return the time of the heaviest chain within a bit set, infinity above a limit.

        The set is convex, so that a chain within it is a path. Results are remembered
        until a cluster of the set merges.
        """
        known_us, known_limit_us = self._chains.get(clusters, (math.inf, -1.0))
        if clusters & self._merged or (math.isinf(known_us) and known_limit_us < limit_us):
            known_us = self._search_heaviest_chain_us(clusters, limit_us)
            self._chains[clusters] = known_us, limit_us
        return known_us

    def forget_merged(self) -> None:
        """Forget chains that merges have changed; worth its time after a few of them."""
        merged, self._merged = self._merged, 0
        self._chains = {key: value for key, value in self._chains.items() if not key & merged}

    def traffic_saved_bytes(self, u: int, v: int) -> int:
        """Return the bytes that no longer cross a boundary when two clusters merge."""
        shared = self.reads[u] & self.reads[v]
        between = (self.writes[u] & self.reads[v]) | (self.writes[v] & self.reads[u])
        return sum(self._size_bytes[tensor] for tensor in shared | between)

    def in_order(self) -> tuple[tuple[int, ...], ...]:
        """Return the nodes of every cluster, ascending, clusters in a topological order.

        Of clusters that are ready, those come first whose producers come first; then
        those with the longer chain of clusters after them; then by their first nodes.
        """
        alive = tuple(bits(self.alive))
        hops: dict[int, int] = {}
        for cluster in sorted(alive, key=lambda c: -(self.ancestors[c] & self.alive).bit_count()):
            hops[cluster] = max((hops[s] + 1 for s in self.successors[cluster]), default=0)
        place: dict[int, int] = {}
        waiting = {cluster: len(self.predecessors[cluster]) for cluster in alive}
        ready: list[tuple[tuple[int, ...], int, int, int]] = []

        def enqueue(cluster: int) -> None:
            producers = tuple(sorted(place[p] for p in self.predecessors[cluster]))
            first = min(self.members[cluster])
            heapq.heappush(ready, (producers, -hops[cluster], first, cluster))

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

    def _search_heaviest_chain_us(self, clusters: int, limit_us: float) -> float:
        """Search depth first, to stop at the first path above the limit."""
        finish: dict[int, float] = {}
        for last in bits(clusters):
            path = [last]
            path_us = self.time_us[last]
            while path:
                if path_us > limit_us:
                    return math.inf
                cluster = path[-1]
                before = [p for p in self.predecessors[cluster] if clusters >> p & 1]
                unknown = next((p for p in before if p not in finish), None)
                if unknown is None:
                    start_us = max((finish[p] for p in before), default=0.0)
                    finish[cluster] = start_us + self.time_us[cluster]
                    if finish[cluster] > limit_us:
                        return math.inf
                    path_us -= self.time_us[path.pop()]
                else:
                    path.append(unknown)
                    path_us += self.time_us[unknown]
        return max(finish.values(), default=0.0)


def bits(mask: int) -> Iterator[int]:
    """Yield the members of a bit set, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
