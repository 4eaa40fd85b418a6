"""Which GPUs engines are built for, and on which of them: what the options stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parnet_engines.gpu import find_gpu, parse_ordinals
from parnet_engines.tensorrt_module import LABELS, choose_backend
from parnet_engines.tensorrt_options import Target, parse_capabilities, target_of
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_engines.gpu import Gpu
    from parnet_engines.tensorrt_module import Backend


@dataclass(frozen=True, slots=True)
class BuildPlace:
    """Where engines are for, and where they are built.

    Parameters
    ----------
    target
        The GPUs that they are for.
    gpu
        One of them in this machine, which builds and audits them; TensorRT-RTX needs none.
    """

    target: Target
    gpu: Gpu | None = None


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
        When ``"auto"`` finds no backend, or GPUs cannot be found without the CUDA bindings.
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
    places: dict[Target, BuildPlace] = {}
    for ordinal in parse_ordinals("0" if devices is None else devices):
        gpu = find_gpu(ordinal)
        target = target_of(chosen, gpu)
        places.setdefault(target, BuildPlace(target, gpu))
    return tuple(places.values())
