"""Programs of a bundle: they run its segments, or its whole graph as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.planning.layouts import whole_graph
from parnet_engines.schedule.check import CheckedProgram, checked
from parnet_engines.schedule.lowering import lower

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_engines.schedule.placement import Placement
    from parnet_export.bundle import Bundle
    from parnet_export.stream_graph import StreamGraph


def graph_of(bundle: Bundle, segments: Iterable[str]) -> StreamGraph:
    """Return the stream graph that segments belong to: the bundle's, or the whole as one."""
    graph = bundle.stream_graph
    return whole_graph(graph, bundle.manifest.whole_cost) if set(segments) == {WHOLE} else graph


def program_of(
    bundle: Bundle, placement: Placement, inferences_in_flight: int = 1
) -> CheckedProgram:
    """Lower a placement of the bundle's segments, or of its whole graph, and prove it.

    Raises
    ------
    ValueError
        When the placement is not one of this bundle.
    """
    graph = graph_of(bundle, (assignment.segment for assignment in placement.assignments))
    return checked(lower(graph, placement, inferences_in_flight), graph)
