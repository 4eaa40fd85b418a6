"""The most work that a stream graph can have under way at the same time."""

from __future__ import annotations

from collections import defaultdict, deque
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_export.stream_graph import StreamGraph

# Every segment appears twice in the flow network: as one that others depend on ("before")
# and as one that depends on others ("after"). The source and the sink have no segment.
_Node = tuple[str, Literal["source", "before", "after", "sink"]]
_Capacities = dict[_Node, dict[_Node, int]]

_SOURCE: _Node = ("", "source")
_SINK: _Node = ("", "sink")


def heaviest_antichain(graph: StreamGraph, weights: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mutually independent segments with the largest total weight.

    By the weighted form of Dilworth's theorem, the total weight minus that of the heaviest
    antichain is a maximum flow from segments to those that depend on them, in which every
    segment may send and receive its weight. The minimum cut tells the antichain.

    Parameters
    ----------
    graph
        The stream graph.
    weights
        A non-negative integer for every segment. Segments that weigh nothing are left out.

    Returns
    -------
    tuple of str
        Names in the graph's order.
    """
    residual = _flow_network(graph, weights)
    came_from = _reachable(residual)
    while _SINK in came_from:
        path = [_SINK]
        while path[-1] != _SOURCE:
            path.append(came_from[path[-1]])
        steps = list(pairwise(reversed(path)))
        amount = min(residual[a][b] for a, b in steps)
        for a, b in steps:
            residual[a][b] -= amount
            residual[b][a] = residual[b].get(a, 0) + amount
        came_from = _reachable(residual)
    return tuple(
        segment.name
        for segment in graph.segments
        if (segment.name, "before") in came_from and (segment.name, "after") not in came_from
    )


def parallel_width(graph: StreamGraph) -> int:
    """Return how many segments can run at the same time, at most."""
    return len(heaviest_antichain(graph, {segment.name: 1 for segment in graph.segments}))


def _flow_network(graph: StreamGraph, weights: Mapping[str, int]) -> _Capacities:
    unlimited = 1 + sum(weights.values())
    capacities: _Capacities = defaultdict(dict)
    ancestors: dict[str, set[str]] = {}
    for segment in graph.segments:
        name = segment.name
        direct = graph.predecessors[name]
        ancestors[name] = set(direct).union(*(ancestors[before] for before in direct))
        capacities[_SOURCE][name, "before"] = weights[name]
        capacities[name, "after"][_SINK] = weights[name]
        for before in sorted(ancestors[name]):
            capacities[before, "before"][name, "after"] = unlimited
    return capacities


def _reachable(residual: _Capacities) -> dict[_Node, _Node]:
    """Return how each node can be reached from the source with capacity left, breadth first."""
    came_from: dict[_Node, _Node] = {_SOURCE: _SOURCE}
    queue = deque([_SOURCE])
    while queue:
        node = queue.popleft()
        for neighbour, capacity in residual[node].items():
            if capacity > 0 and neighbour not in came_from:
                came_from[neighbour] = node
                queue.append(neighbour)
    return came_from
