"""Where segments run: devices, lanes, and which lane runs what.

A *lane* is an ordered execution queue: a CUDA stream on a device, or a pinned
thread (pool) on the CPU. A *placement* says, in one total order, which segment
runs on which lane. A segment may appear on several devices: a cheap stem is
often recomputed rather than copied.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lane:
    """An ordered execution queue on one device.

    Parameters
    ----------
    name
        Unique within a placement, such as ``"lane0"``.
    device
        The device's name, such as ``"cpu:0"`` or ``"cuda:1"``. Lanes of one device
        share its memory; tensors cross between devices by copies.
    cores
        CPU cores the lane's threads are pinned to; empty for lanes of other devices.
    """

    name: str
    device: str
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignment:
    """One execution of one segment per inference, on one lane."""

    segment: str
    lane: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Lanes, and the segments they run in issue order.

    Parameters
    ----------
    lanes
        The first lane is the origin: inference starts there and ends there.
    assignments
        A total order in which the host hands the segments out. It is topological:
        by the time a segment appears, every segment it reads from has appeared.
        A segment appears at most once per device, and at least once in all.
    """

    lanes: tuple[Lane, ...]
    assignments: tuple[Assignment, ...]

    def __post_init__(self) -> None:
        names = {lane.name for lane in self.lanes}
        if len(names) != len(self.lanes) or not names:
            raise ValueError("lanes need unique names, and there must be at least one")
        devices = {lane.name: lane.device for lane in self.lanes}
        seen: set[tuple[str, str]] = set()
        for assignment in self.assignments:
            if assignment.lane not in devices:
                raise ValueError(f"segment {assignment.segment!r} is on no lane of the placement")
            place = (assignment.segment, devices[assignment.lane])
            if place in seen:
                raise ValueError(f"segment {place[0]!r} runs twice on device {place[1]!r}")
            seen.add(place)
