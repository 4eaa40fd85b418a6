"""The costs that lie in a bundle's folder, beside what its manifest lists.

They are measurements of one machine, and of one version of the bundle: others are as good
as none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.planning.cost_table import (
    COSTS_NAME,
    DEVICE_MODELS,
    CostTable,
    DeviceModel,
    estimate_costs,
    lane_threads,
    load_costs,
    save_costs,
)
from parnet_engines.planning.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from parnet_engines.planning.cost_table import SegmentCost
    from parnet_engines.schedule.placement import Lane
    from parnet_export.bundle import Bundle

TYPICAL_CORE = DeviceModel("typical CPU core", "cpu", 80e9, 20e9, 3.0)
"""A CPU core to plan by as long as nothing is measured.

The rates have the order of magnitude that ParNet-L reaches with ONNX Runtime on a core of
a server; no publication states them. What a plan depends on is how segments compare.
"""

TYPICAL_GPU = DEVICE_MODELS["a100", "fp16"]
"""A GPU to plan by as long as nothing is measured: which one matters little to a plan."""


def network_of(bundle: Bundle) -> str:
    """Return the name under which costs of a bundle are kept: it changes with the bundle."""
    return f"{bundle.manifest.provenance.network} {bundle.manifest.manifest_sha256[:16]}"


def load_bundle_costs(bundle: Bundle) -> CostTable:
    """Return what was measured for a bundle on this machine; an empty table if nothing was.

    Raises
    ------
    InputError
        When the file with the costs is damaged.
    """
    path, network = bundle.path / COSTS_NAME, network_of(bundle)
    if path.exists():
        costs = load_costs(path)
        if costs.network == network:
            return costs.of_environment(describe_machine())
    return CostTable((), network)


def add_bundle_costs(bundle: Bundle, measured: Iterable[SegmentCost]) -> CostTable:
    """Add measurements of this machine to those of a bundle, and return all of them.

    Raises
    ------
    InputError
        When the bundle's folder cannot be written to.
    """
    costs = load_bundle_costs(bundle).updated(measured)
    save_costs(bundle.path / COSTS_NAME, costs)
    return costs


def costs_for(bundle: Bundle, lane_sets: Sequence[Sequence[Lane]]) -> CostTable:
    """Return the costs of a bundle's segments on lanes of CPU cores.

    They are measured ones if all segments were measured on lanes as wide as these, and
    estimates by `TYPICAL_CORE` otherwise: the two do not mix well.

    Parameters
    ----------
    bundle
        The bundle.
    lane_sets
        Lanes that may work at the same time, for each of several plans.

    Raises
    ------
    InputError
        When the file with the bundle's costs is damaged.
    """
    graph = bundle.stream_graph
    measured = load_bundle_costs(bundle)
    widths = {lane_threads(lane) for lanes in lane_sets for lane in lanes}
    if widths <= set(measured.widths((segment.name for segment in graph.segments), "cpu")):
        return measured
    return estimated_costs(bundle, lane_sets)


def estimated_costs(bundle: Bundle, lane_sets: Sequence[Sequence[Lane]]) -> CostTable:
    """Return estimates by `TYPICAL_CORE` of a bundle's segments and whole graph.

    Parameters
    ----------
    bundle, lane_sets
        As for `costs_for`.
    """
    return estimate_costs(
        bundle.stream_graph,
        TYPICAL_CORE,
        whole=bundle.manifest.whole_cost,
        threads=sorted({lane_threads(lane) for lanes in lane_sets for lane in lanes}),
        max_busy_lanes=max(map(len, lane_sets)),
        network=network_of(bundle),
    )
