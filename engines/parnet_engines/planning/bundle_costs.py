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
from parnet_engines.planning.machine import describe_machine, is_of_gpu

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
    """Return what was measured for a bundle on this machine's CPU; an empty table if nothing was.

    Raises
    ------
    InputError
        When the file with the costs is damaged.
    """
    return _stored(bundle).of_environment(describe_machine())


def load_gpu_costs(bundle: Bundle, gpu: str) -> CostTable:
    """Return what was measured for a bundle on GPUs of a name, by whatever runtime was last.

    Raises
    ------
    InputError
        When the file with the costs is damaged.
    """
    stored = _stored(bundle)
    there = (e for e in stored.entries if e.device_kind == "cuda" and is_of_gpu(e.environment, gpu))
    return CostTable(tuple(there), stored.network)


def add_bundle_costs(bundle: Bundle, measured: Iterable[SegmentCost]) -> CostTable:
    """Add measurements to those of a bundle, and return all of them.

    Earlier ones on the same kind of device stay if they belong to the same machine and
    runtime; those on other kinds of device stay in any case.

    Raises
    ------
    InputError
        When the bundle's folder cannot be written to.
    """
    measured = tuple(measured)
    kinds = {entry.device_kind for entry in measured}
    environments = {entry.environment for entry in measured}
    stored = _stored(bundle)
    kept = tuple(
        entry
        for entry in stored.entries
        if entry.device_kind not in kinds or entry.environment in environments
    )
    costs = CostTable(kept, stored.network).updated(measured)
    save_costs(bundle.path / COSTS_NAME, costs)
    return costs


def _stored(bundle: Bundle) -> CostTable:
    """Return all that lies with a bundle; an empty table if that is of another version of it."""
    path, network = bundle.path / COSTS_NAME, network_of(bundle)
    costs = load_costs(path) if path.exists() else None
    return costs if costs is not None and costs.network == network else CostTable((), network)


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


def gpu_costs_for(bundle: Bundle, gpus: Iterable[str], lanes: int) -> CostTable:
    """Return the costs of a bundle's segments on GPUs.

    They are measured ones if all GPUs have one name and all segments were measured on such a
    one, and estimates by `TYPICAL_GPU` otherwise.

    Parameters
    ----------
    bundle
        The bundle.
    gpus
        Their names.
    lanes
        How many lanes there are.

    Raises
    ------
    InputError
        When the file with the bundle's costs is damaged.
    """
    kinds = set(gpus)
    if len(kinds) == 1:
        measured = load_gpu_costs(bundle, *kinds)
        segments = (segment.name for segment in bundle.stream_graph.segments)
        if measured.widths(segments, "cuda"):
            return measured
    return estimated_gpu_costs(bundle, lanes)


def estimated_gpu_costs(bundle: Bundle, lanes: int) -> CostTable:
    """Return estimates by `TYPICAL_GPU` of a bundle's segments and whole graph.

    Parameters
    ----------
    bundle, lanes
        As for `gpu_costs_for`.
    """
    return estimate_costs(
        bundle.stream_graph,
        TYPICAL_GPU,
        whole=bundle.manifest.whole_cost,
        max_busy_lanes=lanes,
        network=network_of(bundle),
    )


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
