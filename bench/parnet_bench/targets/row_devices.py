"""What ``--devices`` means for rows: CPU cores, or GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.cpu.engines import require_engine
from parnet_engines.cuda.devices import names_gpus, open_driver, parse_gpus
from parnet_engines.cuda.engines import require_cuda_engine
from parnet_engines.planning.devices import parse_devices, usable_cores
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.cuda.driver import Gpu


def check_devices(
    devices: str,
    *,
    threads: int | None,
    data_transfers: bool = True,
    engine: str = "auto",
    plan: str = "streams",
    boundary: Boundary | None = None,
) -> None:
    """Refuse what cannot be measured on some devices, before anything is exported.

    Raises
    ------
    InputError
        When the devices are not there, or an option is not one for them.
    MissingBackendError
        When GPUs are named and what drives them is not installed.
    """
    if names_gpus(devices):
        if engine != "auto":
            require_cuda_engine(engine)
        open_driver(parse_gpus(devices))
        return
    if engine != "auto":
        require_engine(engine)
    if plan == "auto" and engine not in {"auto", "onnxruntime"}:
        problem = f"chooses by what onnxruntime takes, and not {engine}"
        raise InputError("--plan auto", problem, "Use --plan streams, or leave --engine out")
    if boundary is not None:
        problem = "is between engines on GPUs, and the devices are none"
        raise InputError("--boundary", problem, "Leave it out, or use --devices 0")
    found = parse_devices(devices, threads=threads)
    cores = sum(len(device.cores) for device in found)
    if threads is not None and threads > cores:
        raise InputError("--threads", f"this process may use {cores} cores", "Use fewer")
    if not data_transfers:
        problem = "rows on the CPU read the caller's memory, so there are no transfers"
        raise InputError("--no-data-transfers", problem, "Leave it out")


def first_device(devices: str) -> str:
    """Return the first one of several devices."""
    return devices.split(",", 1)[0].strip()


def cores_of(devices: str, threads: int | None) -> tuple[int, ...]:
    """Return the logical cores of a row, ascending.

    Parameters
    ----------
    devices
        Where the row runs; on GPUs, its process may use all cores.
    threads
        No more cores than this. One device of several has no more than its own.
    """
    if names_gpus(devices):
        return usable_cores()[:threads]
    own = parse_devices(devices)
    if threads is not None:
        threads = min(threads, sum(len(device.cores) for device in own))
    shared = parse_devices(devices, threads=threads)
    return tuple(sorted(core for device in shared for core in device.cores))


def gpu_ordinals(devices: Iterable[str]) -> tuple[int, ...]:
    """Return the CUDA ordinals of the GPUs among the devices of some rows, ascending."""
    names = {name for text in devices if names_gpus(text) for name in parse_gpus(text)}
    # A GPU that is named twice stands for two devices: "cuda:0" and "cuda:0#1".
    return tuple(sorted({int(name.partition(":")[2].partition("#")[0]) for name in names}))


def gpus_of(devices: Iterable[str]) -> tuple[Gpu, ...]:
    """Return the GPUs among the devices of some rows, as CUDA describes them, by ordinal.

    Raises
    ------
    InputError, MissingBackendError
        When they are not there any more; see `check_devices`.
    """
    ordinals = gpu_ordinals(devices)
    if not ordinals:
        return ()
    driver = open_driver([f"cuda:{ordinal}" for ordinal in ordinals])
    return tuple(gpu for gpu in driver.gpus() if gpu.ordinal in ordinals)
