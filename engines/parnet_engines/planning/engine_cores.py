"""Which cores each engine of a program works on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.planning.bundle_costs import TYPICAL_CORE
from parnet_engines.schedule.program import Run

if TYPE_CHECKING:
    from parnet_engines.schedule.program import Program
    from parnet_export.stream_graph import StreamGraph

WORTH_SHARING_MS = 0.2
"""Shorter segments are not worth waking another lane's cores for, which takes about half of it.

By the estimate for `TYPICAL_CORE`, so that a program always runs with the same threads.
"""


def shared_segments(graph: StreamGraph) -> frozenset[str]:
    """Return the segments that are worth the cores of all lanes, such as a large head.

    Nothing can run beside them, since all other segments come before or after them, and
    they take long enough.
    """
    return frozenset(
        name
        for name in serial_segments(graph)
        if TYPICAL_CORE.latency_ms(graph[name].cost) >= WORTH_SHARING_MS
    )


def serial_segments(graph: StreamGraph) -> frozenset[str]:
    """Return the segments that nothing can run beside: all others come before or after."""
    before: dict[str, set[str]] = {}
    for segment in graph.segments:
        direct = graph.predecessors[segment.name]
        before[segment.name] = set(direct).union(*(before[name] for name in direct))
    related = {name: set(ancestors) for name, ancestors in before.items()}
    for name, ancestors in before.items():
        for ancestor in ancestors:
            related[ancestor].add(name)
    return frozenset(name for name, others in related.items() if len(others) == len(before) - 1)


def engine_cores(program: Program, graph: StreamGraph) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the cores that each segment has on each lane that runs it.

    They are those of its lane. A segment of `shared_segments` has those of the device's
    other lanes too, which wait meanwhile, unless another inference is in flight.

    Parameters
    ----------
    program
        A program of CPU lanes on disjoint cores.
    graph
        The stream graph that it runs.

    Returns
    -------
    dict
        The lane's own cores come first.
    """
    shared = shared_segments(graph) if program.inferences_in_flight == 1 else frozenset()
    found = {}
    for step in program.steps:
        if isinstance(step, Run):
            own = program.lanes_by_name[step.lane]
            others = [lane for lane in program.lanes if lane.device == own.device and lane != own]
            idle = [core for lane in others for core in lane.cores if step.segment in shared]
            found[step.segment, step.lane] = (*own.cores, *idle)
    return found
