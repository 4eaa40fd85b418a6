"""Costs: what each segment takes, on which device, with how many threads.

A *measured* entry belongs to the environment it was measured in. Where there is no
measurement, an *estimated* entry comes from the segment's FLOPs and bytes through a
`DeviceModel`. Both kinds live side by side in one table, and say which they are.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import msgspec

from parnet_export import files
from parnet_export.errors import InputError
from parnet_export.schema_version import require_readable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from parnet_engines.schedule.placement import Lane
    from parnet_export.stream_graph import Cost, StreamGraph

COSTS_NAME = "costs.json"
"""File name of the cost table in a bundle's folder."""

SCHEMA_VERSION = 1

WHOLE = "whole"
"""Stands for the graph of the whole network where a segment's name is expected."""

Source = Literal["measured", "estimated"]


def device_kind(device: str) -> str:
    """Return what a device's number does not change: ``"cuda"`` for ``"cuda:1"``."""
    return device.partition(":")[0]


def lane_threads(lane: Lane) -> int:
    """Return the lane's width: its number of pinned cores, 1 for other devices."""
    return max(1, len(lane.cores))


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """The latency of one segment in one situation.

    Parameters
    ----------
    segment
        The segment's name, or `WHOLE`.
    device_kind
        ``"cpu"`` for ``"cpu:0"``, ``"cuda"`` for ``"cuda:1"``.
    threads
        Width of the lane: the threads that work on the segment; 1 except on CPUs.
    busy_lanes
        How many lanes of the same device were at work, this one included: 1 when the
        segment ran alone.
    latency_ms
        Milliseconds from the segment's start to its end.
    source
        ``"measured"`` or ``"estimated"``.
    environment
        The environment a measurement belongs to (machine and runtime, as a sentence
        or a digest), or the name of the device model behind an estimate.
    """

    segment: str
    device_kind: str
    threads: int
    busy_lanes: int
    latency_ms: float
    source: Source
    environment: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_ms) and self.latency_ms >= 0):
            raise ValueError(f"segment {self.segment!r} has a latency of {self.latency_ms} ms")
        if self.threads < 1 or self.busy_lanes < 1:
            raise ValueError(f"segment {self.segment!r} needs at least one thread and one lane")

    @property
    def situation(self) -> tuple[str, str, int, int]:
        """What tells entries of a table apart."""
        return self.segment, self.device_kind, self.threads, self.busy_lanes


@dataclass(frozen=True)
class CostTable:
    """Latencies of segments, one entry for each situation.

    Parameters
    ----------
    entries
        At most one for each segment, device kind, number of threads and busy lanes.
    network
        What the entries were made for, such as the file name of the whole graph in
        the bundle, which holds its digest; empty if that does not matter.

    Raises
    ------
    ValueError
        When two entries describe the same situation.
    """

    entries: tuple[SegmentCost, ...] = ()
    network: str = ""

    def __post_init__(self) -> None:
        counts = Counter(entry.situation for entry in self.entries)
        for (segment, kind, threads, busy), count in counts.items():
            if count > 1:
                raise ValueError(
                    f"segment {segment!r} has {count} entries for {kind} with {threads} "
                    f"threads and {busy} busy lanes"
                )

    @cached_property
    def _by_width(self) -> dict[tuple[str, str, int], dict[int, SegmentCost]]:
        found: dict[tuple[str, str, int], dict[int, SegmentCost]] = {}
        for entry in self.entries:
            width = (entry.segment, entry.device_kind, entry.threads)
            found.setdefault(width, {})[entry.busy_lanes] = entry
        return found

    def find(
        self, segment: str, kind: str, threads: int = 1, busy_lanes: int = 1
    ) -> SegmentCost | None:
        """Return the entry for a situation, or the nearest one.

        Segment, device kind and threads have to match. Of the entries for other
        numbers of busy lanes the nearest one stands in, of two as near the one with
        fewer.
        """
        entries = self._by_width.get((segment, kind, threads))
        if not entries:
            return None
        return entries[min(entries, key=lambda lanes: (abs(lanes - busy_lanes), lanes))]

    def latency_ms(self, segment: str, lane: Lane, busy_lanes: int = 1) -> float:
        """Return what a segment takes on a lane while `busy_lanes` of its device work.

        Raises
        ------
        InputError
            When the table has no entry for the segment on such a lane.
        """
        kind, threads = device_kind(lane.device), lane_threads(lane)
        entry = self.find(segment, kind, threads, busy_lanes)
        if entry is None:
            raise InputError(
                f"cost table{f' of {self.network}' if self.network else ''}",
                f"has no latency of segment {segment!r} on {kind} with {threads} thread(s)",
                "Measure the bundle on this device, or plan with estimated costs",
            )
        return entry.latency_ms

    def widths(self, segments: Iterable[str], kind: str) -> tuple[int, ...]:
        """Return the thread counts for which every one of `segments` has an entry."""
        common: set[int] | None = None
        for segment in segments:
            known = {t for s, k, t in self._by_width if s == segment and k == kind}
            common = known if common is None else common & known
        return tuple(sorted(common or ()))

    @property
    def is_measured(self) -> bool:
        """Whether there are entries and none of them is an estimate."""
        return bool(self.entries) and all(e.source == "measured" for e in self.entries)

    def updated(self, newer: Iterable[SegmentCost]) -> CostTable:
        """Return a table in which `newer` entries take the place of those they match.

        An estimate never takes the place of a measurement.
        """
        kept = {entry.situation: entry for entry in self.entries}
        for entry in newer:
            old = kept.get(entry.situation)
            if old is None or old.source == "estimated" or entry.source == "measured":
                kept[entry.situation] = entry
        return CostTable(tuple(kept.values()), self.network)

    def of_environment(self, environment: str) -> CostTable:
        """Return only the measurements that belong to an environment."""
        return CostTable(
            tuple(
                e for e in self.entries if e.source == "measured" and e.environment == environment
            ),
            self.network,
        )


@dataclass(frozen=True, slots=True)
class _StoredCosts:
    schema_version: int
    network: str
    entries: tuple[SegmentCost, ...]


def save_costs(path: Path, costs: CostTable) -> None:
    """Write a cost table as JSON, whole or not at all.

    Raises
    ------
    InputError
        When the place cannot be written to.
    """
    stored = _StoredCosts(SCHEMA_VERSION, costs.network, costs.entries)
    content = msgspec.json.format(msgspec.json.encode(stored), indent=2)
    files.write_bytes(path, content + b"\n")


def load_costs(path: Path, network: str = "") -> CostTable:
    """Read a cost table.

    Parameters
    ----------
    path
        The JSON file, such as `COSTS_NAME` in a bundle's folder.
    network
        If given, the network whose costs are expected.

    Raises
    ------
    InputError
        When the file cannot be read, is damaged or newer, or its costs were made for
        another network.
    """
    again = "Measure the bundle again"
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", again) from error
    try:
        require_readable(content, SCHEMA_VERSION, path)
        stored = msgspec.json.decode(content, type=_StoredCosts)
        costs = CostTable(stored.entries, stored.network)
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(path, f"is no cost table ({error})", again) from error
    if network and costs.network != network:
        raise InputError(path, f"holds the costs of {costs.network or 'no network'}", again)
    return costs


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A device as a roofline with a price for each launch.

    An operator costs one launch; a segment besides takes the longer of its arithmetic
    and its memory traffic (every weight and activation once)::

        latency = nodes * launch + max(FLOPs / compute rate, bytes / bandwidth)

    On a CPU each thread has the compute rate, and the busy lanes share the bandwidth.
    On other devices the busy lanes share both: lanes do not make a full device
    faster, they only overlap each other's launches.

    Parameters
    ----------
    name
        Name for people; marks the estimates.
    device_kind
        ``"cpu"`` or ``"cuda"``.
    flops_per_s
        Floating-point operations per second, of one core or of the whole other device.
    bytes_per_s
        Bytes per second to and from memory, of the whole device.
    launch_us
        Microseconds from one operator to the next when there is nothing to compute.
    efficiency
        The fraction of both rates that real operators reach.
    """

    name: str
    device_kind: str
    flops_per_s: float
    bytes_per_s: float
    launch_us: float
    efficiency: float = 1.0

    def latency_ms(self, cost: Cost, threads: int = 1, busy_lanes: int = 1) -> float:
        """Return the estimated milliseconds for a graph of this cost."""
        workers = threads if self.device_kind == "cpu" else 1 / busy_lanes
        compute_s = cost.flops / (self.flops_per_s * self.efficiency * workers)
        memory_bytes = cost.weight_bytes + cost.activation_bytes
        memory_s = memory_bytes * busy_lanes / (self.bytes_per_s * self.efficiency)
        return cost.nodes * self.launch_us * 1e-3 + max(compute_s, memory_s) * 1e3


DEVICE_MODELS = {
    (name, precision): DeviceModel(f"{name} {precision}", "cuda", flops, bandwidth, 2.5, 0.5)
    for name, precision, flops, bandwidth in (
        ("rtx3090", "fp32", 35.6e12, 936e9),
        ("rtx3090", "fp16", 71.0e12, 936e9),
        ("a100", "fp32", 156e12, 1555e9),
        ("a100", "fp16", 312e12, 1555e9),
        ("h100", "fp32", 494.7e12, 3352e9),
        ("h100", "fp16", 989.4e12, 3352e9),
    )
}
"""GPUs by name and precision, to plan for machines that are not at hand.

Rates are the dense tensor-core peaks (TF32 for fp32, FP32 accumulation for fp16) and
memory bandwidths that NVIDIA's architecture white papers publish: GA102 (RTX 3090),
A100 40 GB, H100 SXM5. That operators reach half of them, and follow one another in
2.5 us inside a CUDA graph, is an assumption and no publication's; a measurement of
the device replaces all of it.
"""


def estimate_costs(
    graph: StreamGraph,
    model: DeviceModel,
    *,
    whole: Cost | None = None,
    threads: Iterable[int] = (1,),
    max_busy_lanes: int = 1,
    network: str = "",
) -> CostTable:
    """Estimate every segment with 1 to `max_busy_lanes` busy lanes.

    Parameters
    ----------
    graph
        The segments with their FLOPs and bytes.
    model
        The device.
    whole
        Cost of the whole network, to estimate `WHOLE` as well.
    threads
        The lane widths to estimate.
    max_busy_lanes
        The most lanes of one device that a plan may use.
    network
        What the table is for, as in `CostTable`.
    """
    costs = {segment.name: segment.cost for segment in graph.segments}
    if whole is not None:
        costs[WHOLE] = whole
    return CostTable(
        tuple(
            SegmentCost(
                name,
                model.device_kind,
                width,
                busy,
                model.latency_ms(cost, width, busy),
                "estimated",
                model.name,
            )
            for name, cost in costs.items()
            for width in threads
            for busy in range(1, max_busy_lanes + 1)
        ),
        network,
    )
