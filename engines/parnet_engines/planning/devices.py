"""Devices to run on: what ``--devices`` names, and the lanes they are divided into."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from parnet_engines.schedule.placement import Lane
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_REMEDY = "Use 'cpu', or cores such as 'cpu:0,cpu:1' or 'cpu:0-3,cpu:4-7'"
_CORES = re.compile(r"cpu:(\d+)(?:-(\d+))?")
_GPU = re.compile(r"\d+|(cuda|gpu|tensorrt|trt)(:\d+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Device:
    """CPU cores that share one memory, as far as a plan is concerned.

    Parameters
    ----------
    name
        As given to `parse_devices`: ``"cpu"`` or ``"cpu:0-3"``.
    cores
        The logical cores, ascending; at least one.
    """

    name: str
    cores: tuple[int, ...]


def usable_cores() -> tuple[int, ...]:
    """Return the logical cores that this process may use, ascending."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def can_pin() -> bool:
    """Return whether this system lets threads be pinned to cores."""
    return hasattr(os, "sched_setaffinity")


def parse_devices(text: str, *, threads: int | None = None) -> tuple[Device, ...]:
    """Return the devices that an option names.

    Parameters
    ----------
    text
        ``"cpu"`` for all cores that this process may use, as one device. Or cores and
        ranges of cores, each a device of its own: ``"cpu:0,cpu:1"``, ``"cpu:0-3,cpu:4-7"``.
        Tensors are copied from one device to another.
    threads
        Use at most so many cores in all, which the devices share evenly.

    Raises
    ------
    InputError
        When the text names something else, such as a GPU, or a core that this process may
        not use, or a core twice; or when there are fewer threads than devices.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads {threads}", "is less than one", "Use at least one thread")
    subject = f"devices {text!r}"
    usable = usable_cores()
    if text.strip() == "cpu":
        devices: tuple[Device, ...] = (Device("cpu", usable),)
    else:
        names = [name.strip() for name in text.split(",")]
        devices = tuple(_parse_device(name, usable, subject) for name in names)
        _check_disjoint(devices, subject)
    if threads is None:
        return devices
    if threads < len(devices):
        problem = f"{len(devices)} devices need a thread each, and there are {threads}"
        raise InputError(f"threads {threads}", problem, "Use more threads or fewer devices")
    return tuple(
        replace(device, cores=device.cores[:share])
        for device, share in zip(devices, _shares(threads, len(devices)), strict=True)
    )


def divide(devices: Sequence[Device], lanes: int) -> tuple[Lane, ...]:
    """Return lanes on disjoint cores that use all cores of the devices, as evenly as possible.

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
    cores = sum(len(device.cores) for device in devices)
    remedy = f"Use {len(devices)} to {cores}" if cores > len(devices) else f"Use {cores}"
    for required, place, fits in (
        (len(devices), "every device has a lane", lanes >= len(devices)),
        (cores, "every lane needs a core", lanes <= cores),
    ):
        if not fits:
            problem = f"{place}, and there {'is' if required == 1 else 'are'} {required}"
            raise InputError(f"lanes {lanes}", problem, remedy)
    found: list[Lane] = []
    for device, count in zip(devices, _lanes_per_device(devices, lanes), strict=True):
        first = 0
        for share in _shares(len(device.cores), count):
            own = device.cores[first : first + share]
            found.append(Lane(f"lane{len(found)}", device.name, own))
            first += share
    return tuple(found)


def _parse_device(name: str, usable: Sequence[int], subject: str) -> Device:
    if _GPU.fullmatch(name):
        raise InputError(subject, "names a GPU where CPU cores are wanted", _REMEDY)
    match = _CORES.fullmatch(name)
    if match is None:
        problem = f"{name!r} is no device" if name else "it names no device, or one is missing"
        raise InputError(subject, problem, _REMEDY)
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise InputError(subject, f"the cores of {name!r} run backwards", _REMEDY)
    for core in (first, last, *range(first, min(last, max(usable)))):
        if core not in usable:
            problem = f"this process cannot use core {core}, only {', '.join(map(str, usable))}"
            raise InputError(subject, problem, _REMEDY)
    return Device(name, tuple(range(first, last + 1)))


def _check_disjoint(devices: Sequence[Device], subject: str) -> None:
    owner: dict[int, str] = {}
    for device in devices:
        for core in device.cores:
            if core in owner:
                problem = f"core {core} is in {owner[core]!r} and again in {device.name!r}"
                raise InputError(subject, problem, "Give every core to one device")
            owner[core] = device.name


def _shares(total: int, parts: int) -> list[int]:
    """Divide a number into parts as evenly as possible, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _lanes_per_device(devices: Sequence[Device], lanes: int) -> list[int]:
    """Give every device a lane, and each further lane to the device with the widest lanes."""
    counts = [1] * len(devices)
    for _ in range(lanes - len(devices)):
        widest = max(range(len(devices)), key=lambda i: (len(devices[i].cores) / counts[i], -i))
        counts[widest] += 1
    return counts
