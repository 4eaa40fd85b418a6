"""Find the regions of a work graph in which paths run side by side, and absorb the small ones.

Where paths part at one tensor and meet again at one node, the nodes between form a
*region*: a squeeze-excite gate beside its convolution, the branches of an Inception
block, the streams of a network. Running its paths side by side gains the region's
work minus its longest path. A region whose gain is small becomes one node, from the
innermost outwards, so that the gain of an outer region counts only what inner
regions leave parallel.

Nothing outside may read what a region computes before its end. Little leftovers that
something outside does read, such as a pooled input that two blocks share, are left
out of the region and come before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from parnet_export.splitting.work_graph import ClusteringOptions, WorkGraph


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes with parallel paths that all end in one of them.

    Parameters
    ----------
    exit
        Index of the node in which all paths end. It belongs to the region.
    work_us
        Time of all nodes one after another.
    gain_us
        What running the paths side by side would save.
    kept
        Whether the region stays parallel.
    """

    exit: int
    work_us: float
    gain_us: float
    kept: bool


def absorb_small_regions(
    graph: WorkGraph, options: ClusteringOptions
) -> tuple[tuple[int, ...], tuple[Region, ...]]:
    """Contract every region that is not worth running in parallel.

    Parameters
    ----------
    graph
        Nodes in a topological order.
    options
        What is worth running in parallel.

    Returns
    -------
    leaders
        For each node the node it was contracted into: the exit of the outermost
        absorbed region around it, or itself.
    regions
        Every region with a gain, inner ones first.
    """
    entries = _immediate_dominators(graph)
    contraction = _Contraction(graph)
    regions: list[Region] = []
    for node, entry in enumerate(entries):
        inner = contraction.between(entry, node)
        work_us = sum(contraction.work_us[member] for member in inner)
        limit_us = options.negligible_us(work_us)
        if len(inner) > 1 and contraction.left_out_us(entry, inner, limit_us) <= limit_us:
            gain_us = contraction.finish_us(inner) - contraction.finish_us([node])
            small = gain_us <= options.small_gain_us(work_us, graph.total_us)
            if gain_us > 0:
                regions.append(Region(node, work_us, gain_us, kept=not small))
            if small:
                contraction.absorb(inner, node)
        contraction.schedule(node)
    return tuple(map(contraction.leader, range(len(entries)))), tuple(regions)


class _Contraction:
    """A work graph in which regions have become nodes.

    A region is led by its exit. Only the exit's outputs are read from outside, and
    leaders in ascending order remain a topological order. Nodes are scheduled in that
    order, each as soon as its inputs are there.
    """

    def __init__(self, graph: WorkGraph) -> None:
        self._graph = graph
        self._post_dominates = _PostDominators(graph)
        self._leaders = list(range(len(graph.times_us)))
        self._reads = [set(tensors) for tensors in graph.reads]
        self._finish_us = [0.0] * len(graph.times_us)
        self.work_us = list(graph.times_us)

    def leader(self, node: int) -> int:
        """Return the node into which `node` was contracted."""
        leaders = self._leaders
        while leaders[node] != node:
            leaders[node] = leaders[leaders[node]]
            node = leaders[node]
        return node

    def between(self, entry: int, node: int) -> list[int]:
        """Return the leaders on paths from an entry to a node that lead nowhere else.

        They are convex: every path from one of them to another one leads nowhere else
        either. Constant expressions lie on no path.
        """
        found = {node}
        stack = [node]
        entry_node = entry - len(self._graph.tensors)
        while stack:
            for producer in self._producers(stack.pop(), but=entry):
                if (
                    producer not in found
                    and producer != entry_node
                    and self._graph.live[producer]
                    and self._post_dominates(node, producer)
                ):
                    found.add(producer)
                    stack.append(producer)
        return sorted(found)

    def left_out_us(self, entry: int, inner: Iterable[int], limit_us: float) -> float:
        """Return the time of all nodes between an entry and a region, or something above a limit.

        They precede the region because they also lead elsewhere.
        """
        entry_node = entry - len(self._graph.tensors)
        members = set(inner)
        found: set[int] = set()
        stack = list(members)
        total_us = 0.0
        while stack and total_us <= limit_us:
            for producer in self._producers(stack.pop(), but=entry) - members - found:
                if producer != entry_node and self._graph.live[producer]:
                    found.add(producer)
                    stack.append(producer)
                    total_us += self.work_us[producer]
        return total_us

    def finish_us(self, members: Iterable[int]) -> float:
        """Return when nodes finish that start together, one after another."""
        inner = set(members)
        outer = {p for member in inner for p in self._producers(member)} - inner
        start_us = max((self._finish_us[producer] for producer in outer), default=0.0)
        return start_us + sum(self.work_us[member] for member in sorted(inner))

    def schedule(self, node: int) -> None:
        """Note when a node finishes; all that it reads from must be scheduled."""
        self._finish_us[node] = self.finish_us([node])

    def absorb(self, members: Iterable[int], node: int) -> None:
        """Contract nodes into the last of them."""
        for member in members:
            self._leaders[member] = node
            if member != node:
                self.work_us[node] += self.work_us[member]
                self._reads[node] |= self._reads[member]
        self._reads[node] = {
            tensor
            for tensor in self._reads[node]
            if (producer := self._graph.tensors[tensor].producer) is None
            or self.leader(producer) != node
        }

    def _producers(self, node: int, but: int | None = None) -> set[int]:
        producers = (
            self._graph.tensors[tensor].producer for tensor in self._reads[node] if tensor != but
        )
        return {self.leader(producer) for producer in producers if producer is not None}


def _immediate_dominators(graph: WorkGraph) -> list[int]:
    """Return what every path from the network inputs to each node passes last.

    Tensors are vertices of their own, since the paths of a region part at a tensor
    rather than at its producer. Vertices are numbered: tensors first, then nodes;
    -1 stands for the outside. In a directed acyclic graph one pass in topological
    order suffices: the dominator of a vertex is the nearest common ancestor of its
    predecessors in the dominator tree so far (Cooper, Harvey and Kennedy, "A Simple,
    Fast Dominance Algorithm").
    """
    outside, offset = -1, len(graph.tensors)
    above = {outside: outside}
    depth = {outside: 0}

    def hang(vertex: int, parent: int) -> None:
        above[vertex], depth[vertex] = parent, depth[parent] + 1

    for index, tensor in enumerate(graph.tensors):
        if tensor.producer is None:
            hang(index, outside)
    for node, live in enumerate(graph.live):
        if live:
            hang(
                offset + node,
                _nearest_common((t for t in graph.reads[node] if t in above), above, depth),
            )
            for index in graph.writes[node]:
                hang(index, offset + node)
    return [above.get(offset + node, outside) for node in range(len(graph.times_us))]


class _PostDominators:
    """Which nodes every path from a node to the end of the network passes."""

    def __init__(self, graph: WorkGraph) -> None:
        count = len(graph.times_us)
        above, depth = {count: count}, {count: 0}
        for node in reversed(range(count)):
            readers = {c for t in graph.writes[node] for c in graph.tensors[t].consumers}
            above[node] = _nearest_common(readers, above, depth) if readers else count
            depth[node] = depth[above[node]] + 1
        self._size = [1] * (count + 1)
        for node in range(count):
            self._size[above[node]] += self._size[node]
        self._start = [0] * (count + 1)
        free = [1] * (count + 1)
        for node in reversed(range(count)):
            self._start[node] = free[above[node]]
            free[above[node]] += self._size[node]
            free[node] = self._start[node] + 1

    def __call__(self, later: int, node: int) -> bool:
        """Whether every path from `node` to the end passes `later`."""
        return 0 <= self._start[node] - self._start[later] < self._size[later]


def _nearest_common(
    vertices: Iterable[int], above: Mapping[int, int], depth: Mapping[int, int]
) -> int:
    """Return the nearest common ancestor in a tree given by parents and depths."""
    common, *others = vertices
    for other in others:
        a, b = common, other
        while a != b:
            if depth[a] >= depth[b]:
                a = above[a]
            else:
                b = above[b]
        common = a
    return common
