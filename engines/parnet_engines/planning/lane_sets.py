"""Sets of lanes to plan for: devices divided into lanes, their cores evenly or not."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from parnet_engines.planning.devices import divide
from parnet_engines.schedule.placement import Lane
from parnet_export.splitting.antichain import parallel_width

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_engines.planning.devices import Device
    from parnet_export.stream_graph import StreamGraph

_FINE_CORES = 8
"""With more cores, lanes have only widths that lie well apart."""

_UNEVEN_LANES = 4
"""With more lanes on a device its cores are divided evenly only."""


def default_lanes(graph: StreamGraph, devices: Sequence[Device]) -> int:
    """Return how many lanes can be busy at once: no more than segments or cores allow."""
    cores = sum(len(device.cores) for device in devices)
    return max(len(devices), min(parallel_width(graph), cores))


def lane_sets(devices: Sequence[Device], lanes: int) -> Iterator[tuple[Lane, ...]]:
    """Yield ways to divide devices into so many lanes, the most even one first.

    All cores are used. Devices with as many cores and lanes are divided alike.

    Parameters
    ----------
    devices
        The devices; the first one gets the first lane, which is the origin.
    lanes
        How many lanes in all.

    Raises
    ------
    InputError
        When there are fewer lanes than devices, or more than cores.
    """
    even = divide(devices, lanes)
    yield even
    on_device = Counter(lane.device for lane in even)
    shapes = [(len(device.cores), on_device[device.name]) for device in devices]
    kinds = tuple(dict.fromkeys(shapes))
    for chosen in itertools.product(*(list(_divisions(*kind)) for kind in kinds)):
        widths = dict(zip(kinds, chosen, strict=True))
        found = _cut(devices, [widths[shape] for shape in shapes])
        if found != even:
            yield found


def _divisions(cores: int, lanes: int) -> Iterator[tuple[int, ...]]:
    """Yield widths of lanes that add up to all cores, the widest first."""
    even = [cores // lanes + (lane < cores % lanes) for lane in range(lanes)]
    if lanes > _UNEVEN_LANES:
        yield tuple(even)
        return
    allowed = set(range(1, cores + 1))
    if cores > _FINE_CORES:
        powers = {1 << power for power in range(cores.bit_length())}
        allowed = powers | {cores - power for power in powers if power < cores} | set(even)
    widest_first = sorted(allowed, reverse=True)
    for widths in itertools.combinations_with_replacement(widest_first, lanes):
        if sum(widths) == cores:
            yield widths


def _cut(devices: Sequence[Device], widths: Sequence[Sequence[int]]) -> tuple[Lane, ...]:
    """Return lanes of the given widths on each device."""
    found: list[Lane] = []
    for device, parts in zip(devices, widths, strict=True):
        cores = iter(device.cores)
        found += [
            Lane(f"lane{len(found) + number}", device.name, tuple(itertools.islice(cores, width)))
            for number, width in enumerate(parts)
        ]
    return tuple(found)
