"""Which GPUs engines are built for, and on which of them: what the options stand for."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from parnet_engines.cuda.devices import open_driver, ordinal_of, parse_gpus
from parnet_engines.cuda.driver import on_device
from parnet_engines.tensorrt.module import LABELS, choose_backend
from parnet_engines.tensorrt.options import Target, parse_capabilities, target_of
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_engines.cuda.driver import CudaDriver, Gpu
    from parnet_engines.tensorrt.module import Backend


@dataclass(frozen=True, slots=True)
class BuildDevice:
    """A GPU of this machine that builds and audits engines.

    Parameters
    ----------
    driver
        The driver.
    gpu
        Its GPU.
    """

    driver: CudaDriver
    gpu: Gpu

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Have the GPU's primary context current in this thread meanwhile."""
        self.driver.retain_context(self.gpu.ordinal)
        try:
            with on_device(self.driver, self.gpu.ordinal):
                yield
        finally:
            self.driver.release_context(self.gpu.ordinal)


@dataclass(frozen=True, slots=True)
class BuildPlace:
    """Where engines are for, and where they are built.

    Parameters
    ----------
    target
        The GPUs that they are for.
    device
        One of them in this machine; TensorRT-RTX needs none.
    """

    target: Target
    device: BuildDevice | None = None


def choose_places(
    backend: Backend | Literal["auto"], devices: str | None, capabilities: str | None
) -> tuple[BuildPlace, ...]:
    """Return the places that options stand for, each target once.

    Parameters
    ----------
    backend
        The backend, or ``"auto"``.
    devices
        GPUs of this machine, such as ``"0,1"``. By default, TensorRT builds for GPU 0, and
        TensorRT-RTX for all GPUs that it supports.
    capabilities
        Compute capabilities, such as ``"8.9"``, instead of devices.

    Raises
    ------
    InputError
        When the options contradict each other, or there is no such GPU.
    MissingBackendError
        When a backend is not installed, or GPUs cannot be found without the CUDA bindings.
    """
    chosen = choose_backend(backend, other_gpus=capabilities is not None)
    if capabilities is not None:
        option = "--compute-capability"
        if devices is not None:
            raise InputError(option, "the devices tell it already", "Leave one of both out")
        if chosen == "tensorrt":
            problem = f"{LABELS[chosen]} builds for the GPU that it runs on"
            raise InputError(option, problem, "Use --devices, or --backend tensorrt-rtx")
        return (BuildPlace(Target(chosen, parse_capabilities(capabilities))),)
    if devices is None and chosen == "tensorrt-rtx":
        return (BuildPlace(Target(chosen)),)
    remedy = "Give CUDA's numbers of GPUs, such as '0' or '0,1'"
    try:
        names = parse_gpus("0" if devices is None else devices)
        remedy = "Use --backend tensorrt-rtx without --devices, which needs no GPU"
        driver = open_driver(names)
    except InputError as error:
        # What those messages advise is for running, which a CPU can do as well.
        raise InputError(error.subject, error.problem, remedy) from error
    gpus = driver.gpus()
    places: dict[Target, BuildPlace] = {}
    for name in names:
        gpu = gpus[ordinal_of(name)]
        target = target_of(chosen, gpu)
        places.setdefault(target, BuildPlace(target, BuildDevice(driver, gpu)))
    return tuple(places.values())


def describe_driver() -> str:
    """Return the versions of the installed NVIDIA driver and of CUDA in it; empty if unknown."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return ""
    try:
        nvml.nvmlInit()
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        driver = nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError:
        return ""
    return f"{driver}, CUDA {cuda // 1000}.{cuda % 1000 // 10}"
