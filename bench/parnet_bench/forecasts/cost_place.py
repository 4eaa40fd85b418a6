"""Where costs of segments are measured: on cores of this machine, or on one of its GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from parnet_engines.cuda.devices import lanes_on, open_driver, ordinal_of, parse_gpus
from parnet_engines.cuda.session import CudaSession
from parnet_engines.planning.bundle_costs import (
    estimated_costs,
    estimated_gpu_costs,
    load_bundle_costs,
    load_gpu_costs,
)
from parnet_engines.planning.cost_measure import measure_costs, measure_whole
from parnet_engines.planning.cost_table import WHOLE, CostTable, lane_threads
from parnet_engines.planning.devices import divide, parse_devices
from parnet_engines.planning.lane_sets import default_lanes
from parnet_engines.planning.machine import describe_gpu_machine, describe_machine
from parnet_engines.session import Session
from parnet_export.errors import InputError
from parnet_export.splitting.antichain import parallel_width

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parnet_engines.cuda.driver import CudaDriver, Gpu
    from parnet_engines.planning.cost_table import SegmentCost
    from parnet_engines.schedule.open_program import OpenProgram
    from parnet_engines.schedule.placement import Lane
    from parnet_export.bundle import Bundle

    LaneSets = Sequence[Sequence[Lane]]
    """Lanes that may work at the same time, for each number of them."""


@dataclass(frozen=True, slots=True)
class CostPlace:
    """Lanes of one device, and the costs of a bundle's segments there.

    Parameters
    ----------
    known
        What was measured there before.
    estimates
        What stands in for what was not, in the situations that `measure` is about.
    measure
        Times every segment alone and beside busy lanes, and the whole graph alone. Raises
        `MissingBackendError` when the runtime is not installed, and `InputError` when it
        cannot load a segment.
    """

    known: CostTable
    estimates: CostTable
    measure: Callable[[], list[SegmentCost]]


def on_cores(
    bundle: Bundle, devices: str, *, lanes: int | None = None, threads: int | None = None
) -> CostPlace:
    """Return a place on cores, divided evenly among lanes.

    Parameters
    ----------
    bundle
        The bundle.
    devices
        As for `Session.open`.
    lanes
        How many lanes; by default each number from one to as many as can be of use.
    threads
        CPU threads in all.

    Raises
    ------
    InputError
        When there are no such cores, or more lanes than cores.
    """
    cores = parse_devices(devices, threads=threads)
    most = default_lanes(bundle.stream_graph, cores)
    counts = range(len(cores), most + 1) if lanes is None else [lanes]
    offered = tuple(tuple(divide(cores, count)) for count in counts)
    estimates = _in_situations(estimated_costs(bundle, offered), offered)
    measure = partial(_measure_on_cores, bundle, offered)
    return CostPlace(load_bundle_costs(bundle), estimates, measure)


def on_gpu(
    bundle: Bundle, devices: str, *, lanes: int | None = None, engine: str = "auto"
) -> CostPlace:
    """Return a place on a GPU.

    Parameters
    ----------
    bundle, lanes
        As for `on_cores`.
    devices
        One GPU: costs on others of the same kind are the same.
    engine
        As for `Session.open`.

    Raises
    ------
    InputError
        When it is no single GPU of this machine.
    MissingBackendError
        When ``cuda-bindings`` is not installed.
    """
    names = parse_gpus(devices)
    if len(names) > 1:
        problem = "names several GPUs, and what a segment takes is measured on one"
        raise InputError(f"devices {devices!r}", problem, "Give the number of one, such as '0'")
    driver = open_driver(names)
    gpu = driver.gpus()[ordinal_of(names[0])]
    counts = range(1, parallel_width(bundle.stream_graph) + 1) if lanes is None else [lanes]
    offered = tuple(lanes_on(names, count) for count in counts)
    estimates = _in_situations(estimated_gpu_costs(bundle, max(counts)), offered)
    measure = partial(_measure_on_gpu, bundle, offered, driver, gpu, engine=engine)
    return CostPlace(load_gpu_costs(bundle, gpu.name), estimates, measure)


def _measure_on_cores(bundle: Bundle, offered: LaneSets) -> list[SegmentCost]:
    return _measure(bundle, offered, partial(Session.load, bundle), describe_machine())


def _measure_on_gpu(
    bundle: Bundle, offered: LaneSets, driver: CudaDriver, gpu: Gpu, *, engine: str
) -> list[SegmentCost]:
    device = str(gpu.ordinal)
    # Which runtime "auto" is shows when it loads the segments; the whole graph has the same.
    with CudaSession.open_on_gpus(bundle, device, lanes=1, engine=engine) as session:
        engine = session.engine
    load = partial(CudaSession.load_on_gpus, bundle, driver=driver, engine=engine)
    return _measure(bundle, offered, load, describe_gpu_machine(gpu.name, engine))


def _measure(
    bundle: Bundle, offered: LaneSets, open_program: OpenProgram, environment: str
) -> list[SegmentCost]:
    measured: list[SegmentCost] = []
    by_width = {lane_threads(lane): lane for lanes in offered for lane in lanes}
    for lanes in offered:
        measured += measure_costs(bundle, lanes, open_program, environment)
    for lane in by_width.values():
        measured += measure_whole(bundle, lane, open_program, environment)
    return measured


def _in_situations(costs: CostTable, offered: LaneSets) -> CostTable:
    """Return the costs in those situations that are measured on lanes."""
    beside = {
        (lane_threads(lane), sum(other.device == lane.device for other in lanes))
        for lanes in offered
        for lane in lanes
    }
    kept = (
        entry
        for entry in costs.entries
        if entry.busy_lanes == 1
        or (entry.segment != WHOLE and (entry.threads, entry.busy_lanes) in beside)
    )
    return CostTable(tuple(kept), costs.network)
