"""Cluster a work graph into the pieces that are worth a lane of their own.

Clustering starts from single nodes and merges, in three steps:

1. Regions that gain little by running their paths side by side become one node
   (`parnet_export.splitting.parallel_regions`).
2. Chains become one node: where v reads from u alone and nobody else reads from u.
3. Pairs of neighbours merge as long as little parallelism is lost, first where
   merging keeps most traffic off the boundaries. This is how a leftover too small
   for a lane of its own, such as the gate of a fusion, joins the side from which
   less has to cross.

Clusters stay convex and the graph of clusters acyclic throughout: two clusters
merge only when no third one lies on a path between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_export.splitting.cluster_graph import ClusterGraph, bits
from parnet_export.splitting.parallel_regions import Region, absorb_small_regions
from parnet_export.splitting.work_graph import ClusteringOptions

if TYPE_CHECKING:
    from parnet_export.splitting.work_graph import WorkGraph

    _Rank = tuple[float, int, int, int, int, int]

_EXACT_CLUSTERS = 45
"""Up to this many clusters every merge is the best of all; above, the best few go together."""


@dataclass(frozen=True, slots=True)
class Clustering:
    """Clusters of a work graph, and what was decided on the way.

    Parameters
    ----------
    clusters
        Node indices of each cluster, ascending. Clusters are in a topological order.
        Of those that are ready, those come first whose producers come first; then
        those with the longer chain of clusters after them; then by their first nodes.
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
    """Cluster a work graph; the same arguments always give the same clusters.

    Some hundred operators take milliseconds, thousands without any structure seconds.
    """
    options = options or ClusteringOptions()
    leaders, regions = absorb_small_regions(graph, options)
    merger = _Merger(ClusterGraph(graph, _contract_chains(graph, leaders)), options, graph.total_us)
    clusters = merger.run().in_order()
    times_us = tuple(sum(graph.times_us[node] for node in members) for members in clusters)
    return Clustering(clusters, times_us, regions, graph.total_us)


def _contract_chains(graph: WorkGraph, leaders: tuple[int, ...]) -> tuple[int, ...]:
    """Merge u into v where v reads from u alone and nobody else reads from u.

    A constant expression joins its only reader, whatever else that reads.
    """
    into = list(leaders)

    def leader(node: int) -> int:
        while into[node] != node:
            into[node] = into[into[node]]
            node = into[node]
        return node

    readers: dict[int, set[int]] = {}
    producers: dict[int, set[int]] = {}
    for tensor in graph.tensors:
        if tensor.producer is not None:
            u = leaders[tensor.producer]
            for v in {leaders[consumer] for consumer in tensor.consumers} - {u}:
                readers.setdefault(u, set()).add(v)
                producers.setdefault(v, set()).add(u)
    for v in sorted(producers):
        joining = {u for u in producers[v] if not graph.live[u] and readers[u] == {v}}
        others = {leader(u) for u in producers[v] - joining}
        if len(others) == 1:
            (u,) = others
            if readers[u] == {v}:
                joining.add(u)
        for u in joining:
            into[u] = v
    return tuple(map(leader, range(len(into))))


class _Merger:
    """Merges clusters greedily, the most profitable pair first."""

    def __init__(self, clusters: ClusterGraph, options: ClusteringOptions, total_us: float) -> None:
        self._clusters = clusters
        self._options = options
        self._device = options.device
        self._total_us = total_us

    def run(self) -> ClusterGraph:
        """Merge until no merge is worth it."""
        while self._merge_neighbours() or self._merge_leftovers():
            pass
        return self._clusters

    def _merge_neighbours(self) -> bool:
        """Merge clusters with readers of theirs until no pair is left; return whether any did.

        A merge changes what other pairs lose. Small graphs are weighed anew after every
        merge; in large ones, for speed, the best few pairs merge at a time, each only
        if it has not become worse.
        """
        clusters = self._clusters
        merged = False
        while True:
            clusters.forget_merged()
            pairs = ((u, v) for u in bits(clusters.alive) for v in clusters.successors[u])
            ranks = sorted(rank for pair in pairs if (rank := self._rank_neighbours(*pair)))
            if not ranks:
                return merged
            merged = True
            count = clusters.alive.bit_count()
            for rank in ranks[: max(1, count**2 // _EXACT_CLUSTERS**2)]:
                u, v = rank[-2:]
                again = self._rank_neighbours(u, v) if v in clusters.successors[u] else None
                if again and again <= rank:
                    clusters.merge(u, v)

    def _merge_leftovers(self) -> bool:
        """Merge clusters too small for a lane with a cluster beside them; return whether any did.

        A shape computation that several branches read can join none of them, since the
        others would have to wait. It joins what runs beside it instead.
        """
        clusters = self._clusters
        merged = False
        for u in tuple(bits(clusters.alive)):
            if clusters.time_us[u] > self._device.crossing_us or not clusters.alive >> u & 1:
                continue
            beside = {r for tensor in clusters.reads[u] for r in clusters.readers[tensor]}
            beside |= {p for s in clusters.successors[u] for p in clusters.predecessors[s]}
            related = clusters.ancestors[u] | clusters.descendants[u] | 1 << u
            ranks = (
                self._rank(u, v, self._device.crossing_us) for v in beside if not related >> v & 1
            )
            best = min((rank for rank in ranks if rank), default=None)
            if best:
                clusters.merge(best[-1], u)
                merged = True
        return merged

    def _rank_neighbours(self, u: int, v: int) -> _Rank | None:
        clusters = self._clusters
        if clusters.descendants[u] & clusters.ancestors[v] & clusters.alive:
            return None
        pair_us = clusters.time_us[u] + clusters.time_us[v]
        return self._rank(u, v, self._options.tolerated_loss_us(pair_us, self._total_us))

    def _rank(self, u: int, v: int, tolerated_us: float) -> _Rank | None:
        """Return a key that sorts profitable merges first, None when too much is lost.

        Between equals, one that makes nobody wait for other producers goes first.
        """
        clusters = self._clusters
        loss_us = self._loss_us(u, v, tolerated_us)
        if loss_us > tolerated_us:
            return None
        saved_us = clusters.traffic_saved_bytes(u, v) / self._device.bytes_per_us
        return (
            round(loss_us - saved_us, 3),
            len(clusters.predecessors[v]),
            clusters.members[u][0],
            clusters.members[v][0],
            u,
            v,
        )

    def _loss_us(self, u: int, v: int, limit_us: float) -> float:
        """Return the most parallel work that merging two clusters puts in sequence.

        What v waits for now comes before u and before all that reads u only; u and v
        themselves come before all that reads either. Of two things put in sequence the
        shorter one is lost. Infinity when above the limit.
        """
        clusters = self._clusters
        mask = clusters.alive & ~(1 << u | 1 << v)
        loss_us = 0.0
        if v not in clusters.successors[u]:
            loss_us = min(clusters.time_us[u], clusters.time_us[v])
        for a, b in ((u, v), (v, u)):
            waited_for = clusters.ancestors[b] & ~clusters.ancestors[a] & mask
            waiting = clusters.descendants[a] & ~clusters.descendants[b] & mask
            before_us = clusters.heaviest_chain_us(waited_for, limit_us)
            after_us = clusters.heaviest_chain_us(waiting, limit_us)
            loss_us = max(
                loss_us,
                min(before_us, clusters.time_us[a] + after_us),
                min(before_us + clusters.time_us[b], after_us),
            )
        return loss_us
