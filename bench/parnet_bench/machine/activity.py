"""What a machine is doing at one moment: for us, for others, and at which clocks.

Two readings tell what happened in between: how much of the processors' time others had,
other processes on this machine or other machines on the same host, and whether clocks fell.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from parnet_bench.machine.state import GpuState, gpu_states

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_engines.cuda.driver import Gpu

_CPU_FOLDER = Path("/sys/devices/system/cpu")

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Activity:
    """One reading of the machine's counters.

    Parameters
    ----------
    moment_s
        Seconds on the monotonic clock.
    total_s
        Processor time of all cores since the machine started, idle time included.
    idle_s
        The part in which nothing ran.
    steal_s
        The part that the host of a virtual machine gave to others.
    own_s
        Processor time of this process and of its workers that have ended.
    load_average
        Runnable processes over the last minute.
    available_memory_bytes
        Main memory that can be used without swapping.
    throttle_events
        How often cores have lowered their clock because they were too hot; None where the
        system does not count it.
    gpus
        The GPUs that rows run on, at the lowest clock and the highest temperature and power
        that were seen under load before.
    """

    moment_s: float
    total_s: float
    idle_s: float
    steal_s: float
    own_s: float
    load_average: float
    available_memory_bytes: int
    throttle_events: int | None = None
    gpus: tuple[GpuState, ...] = ()


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Who had the processors between two readings, as shares of the time of all cores.

    Parameters
    ----------
    steal
        What the host of a virtual machine gave to others.
    others
        What other processes of this machine took.
    """

    steal: float
    others: float


def read_activity(gpus: tuple[GpuState, ...] = ()) -> Activity:
    """Read the counters now; what was seen of the GPUs is added to them."""
    times = psutil.cpu_times()
    return Activity(
        moment_s=time.monotonic(),
        # Guests' time is part of user time already.
        total_s=sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0),
        idle_s=times.idle + getattr(times, "iowait", 0.0),
        steal_s=getattr(times, "steal", 0.0),
        own_s=_own_s(),
        load_average=psutil.getloadavg()[0],
        available_memory_bytes=psutil.virtual_memory().available,
        throttle_events=throttle_events(),
        gpus=gpus,
    )


class GpuWatch:
    """Looks at GPUs again and again, and remembers what held them down.

    Parameters
    ----------
    nvml
        The module ``pynvml``, initialised; None where there is none.
    gpus
        Those to watch: what else there is may do as it likes.
    """

    def __init__(self, nvml: Any = None, gpus: Iterable[Gpu] = ()) -> None:
        self._nvml = nvml
        self._gpus = tuple(gpus)
        self._seen: dict[int, GpuState] = {}

    def look(self) -> None:
        """Look now; under load, for idle GPUs lower their clocks."""
        if self._nvml is None:
            return
        for state in gpu_states(self._nvml, self._gpus):
            self._seen[state.index] = extremes(self._seen.get(state.index, state), state)

    def take(self) -> tuple[GpuState, ...]:
        """Return the extremes and all reasons since the last call, and forget them.

        Clocks are the lowest ones that were seen, temperature and power the highest.
        """
        seen, self._seen = tuple(self._seen.values()), {}
        return seen


def _known(*values: Number | None) -> list[Number]:
    return [value for value in values if value is not None]


def extremes(before: GpuState, after: GpuState) -> GpuState:
    """Return a GPU's lowest clock, highest temperature and power, and all that slowed it."""
    return replace(
        after,
        clock_mhz=min(_known(before.clock_mhz, after.clock_mhz), default=None),
        temperature_c=max(_known(before.temperature_c, after.temperature_c), default=None),
        power_w=max(_known(before.power_w, after.power_w), default=None),
        slowed_by=tuple(dict.fromkeys((*before.slowed_by, *after.slowed_by))),
    )


def throttle_events(cpu_folder: Path = _CPU_FOLDER) -> int | None:
    """Return how often cores have been too hot, as Linux counts it on some processors."""
    total: int | None = None
    for counter in cpu_folder.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        try:
            total = (total or 0) + int(counter.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return total


def disturbance(before: Activity, after: Activity) -> Disturbance:
    """Return who else had the processors between two readings."""
    total_s = after.total_s - before.total_s
    if total_s <= 0:
        return Disturbance(0.0, 0.0)
    steal_s = after.steal_s - before.steal_s
    idle_s = after.idle_s - before.idle_s
    own_s = after.own_s - before.own_s
    others_s = total_s - idle_s - steal_s - own_s
    return Disturbance(max(0.0, steal_s / total_s), max(0.0, others_s / total_s))


def _own_s() -> float:
    """Return the processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
