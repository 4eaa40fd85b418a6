"""GPUs to run on: what ``--devices 0,1,2`` names, and the lanes on them.

A GPU may be named several times: ``0,0,0`` is the program for three devices, copies
included, on one GPU. Programs call these devices ``cuda:0``, ``cuda:0#1``, ``cuda:0#2``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from parnet_engines.cuda.driver import CudaError
from parnet_engines.schedule.placement import Lane
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.cuda.driver import CudaDriver

_GPU = re.compile(r"(?:(?:cuda|gpu):)?(\d{1,3})|cuda|gpu", re.IGNORECASE)
_NAME = re.compile(r"cuda:(\d+)(?:#\d+)?")
_SYNTAX = "Use numbers of GPUs such as '0' or '0,1,2', or 'cpu'"


def names_gpus(text: str) -> bool:
    """Return whether an option names GPUs, or tries to: anything else is for `parse_devices`."""
    first = text.split(",", maxsplit=1)[0].strip()
    return _GPU.fullmatch(first) is not None


def parse_gpus(text: str) -> tuple[str, ...]:
    """Return the names of the devices that an option stands for.

    Parameters
    ----------
    text
        Ordinals such as ``"0"``, ``"0,1,2"`` or ``"0,0,0"``; ``"cuda:0"`` is as good as
        ``"0"``, and ``"cuda"`` too.

    Raises
    ------
    InputError
        When an entry is no GPU.
    """
    counts: dict[int, int] = {}
    names = []
    for entry in (part.strip() for part in text.split(",")):
        match = _GPU.fullmatch(entry)
        if match is None:
            problem = f"{entry!r} is no GPU" if entry else "an entry is missing"
            raise InputError(f"devices {text!r}", problem, _SYNTAX)
        ordinal = int(match[1] or 0)
        copy = counts.get(ordinal, 0)
        counts[ordinal] = copy + 1
        names.append(f"cuda:{ordinal}#{copy}" if copy else f"cuda:{ordinal}")
    return tuple(names)


def is_gpu(device: str) -> bool:
    """Return whether a device of a program is a GPU."""
    return _NAME.fullmatch(device) is not None


def ordinal_of(device: str) -> int:
    """Return the CUDA ordinal of a program's device.

    Raises
    ------
    ValueError
        When it is no GPU.
    """
    match = _NAME.fullmatch(device)
    if match is None:
        raise ValueError(f"{device!r} is no GPU")
    return int(match[1])


def lanes_on(devices: Sequence[str], lanes: int) -> tuple[Lane, ...]:
    """Return lanes on devices, the first ones having one more where they do not come out even.

    The lanes of a device follow each other.

    Raises
    ------
    InputError
        When there are fewer lanes than devices.
    """
    if lanes < len(devices):
        there = f"is {len(devices)}" if len(devices) == 1 else f"are {len(devices)}"
        raise InputError(
            f"lanes {lanes}",
            f"every device has a lane, and there {there}",
            f"Use {len(devices)} or more",
        )
    found: list[Lane] = []
    for position, device in enumerate(devices):
        share = lanes // len(devices) + (position < lanes % len(devices))
        found += [Lane(f"lane{len(found) + number}", device) for number in range(share)]
    return tuple(found)


def open_driver(devices: Sequence[str]) -> CudaDriver:
    """Return this machine's CUDA driver, with a GPU for every device.

    Raises
    ------
    InputError
        When there is no driver, or there are fewer GPUs.
    MissingBackendError
        When ``cuda-bindings`` is not installed.
    """
    from parnet_engines.cuda.bindings import BindingsDriver

    ordinals = [ordinal_of(device) for device in devices]
    subject = f"devices {','.join(map(str, ordinals))!r}"
    try:
        driver = BindingsDriver()
        available = len(driver.gpus())
    except CudaError as error:
        raise InputError(
            subject,
            f"this machine has no NVIDIA driver that works ({error.code})",
            "Use 'cpu', or 'cpu:0,cpu:1,cpu:2' for a program of several devices",
        ) from error
    require_gpus(ordinals, available)
    return driver


def require_gpus(ordinals: Sequence[int], available: int) -> None:
    """Require that a machine has these GPUs.

    Raises
    ------
    InputError
        When it has not; says what to use instead.
    """
    if max(ordinals) < available:
        return
    subject = f"devices {','.join(map(str, ordinals))!r}"
    if not available:
        raise InputError(subject, "this machine has no GPU", "Use 'cpu'")
    there = "1 GPU, number 0" if available == 1 else f"{available} GPUs, 0 to {available - 1}"
    same = ",".join(str(position % available) for position in range(len(ordinals)))
    instead = f"'{same}'" + (
        ", which runs the program of as many devices on the GPUs that there are"
        if len(ordinals) > available
        else ""
    )
    raise InputError(subject, f"this machine has {there}", f"Use {instead}")
