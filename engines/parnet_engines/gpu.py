"""The GPUs of this machine, as far as building and loading engines needs them."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from parnet_export.errors import InputError, MissingBackendError

_INSTALL = "pip install 'parnet-export[gpu]'"
_NO_DRIVER = frozenset({"cudaErrorInsufficientDriver", "cudaErrorNoDevice"})
_ORDINALS = re.compile(r"\d+(,\d+)*")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Parameters
    ----------
    ordinal
        CUDA's number of the device.
    name
        NVIDIA's name of it, such as ``"NVIDIA A100-SXM4-80GB"``.
    compute_capability
        Its architecture, such as ``"8.0"``.
    cuda_driver
        The newest CUDA version that the installed driver supports, such as ``"12.8"``.
    """

    ordinal: int
    name: str
    compute_capability: str
    cuda_driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


def parse_ordinals(text: str) -> tuple[int, ...]:
    """Return the GPUs that an option names, such as ``"0,1"``, each once.

    Raises
    ------
    InputError
        When the text is no list of numbers.
    """
    if not _ORDINALS.fullmatch(text.replace(" ", "")):
        problem = "is not a list of GPUs"
        raise InputError(f"devices {text!r}", problem, "Give CUDA's numbers, such as '0' or '0,1'")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def find_gpu(ordinal: int) -> Gpu:
    """Return a GPU of this machine.

    Raises
    ------
    InputError
        When there is no NVIDIA driver, or no such GPU.
    MissingBackendError
        When the CUDA bindings are not installed.
    """
    runtime = _import_runtime()
    error, count = runtime.cudaGetDeviceCount()
    subject = f"device {ordinal}"
    if error.name in _NO_DRIVER:
        problem = "this machine has no NVIDIA GPU, or no driver for it that suits the CUDA runtime"
        raise InputError(subject, problem, "Install NVIDIA's driver, or use another device")
    _require_success(error, "cudaGetDeviceCount")
    if ordinal >= count:
        there = "is 1 GPU, number 0" if count == 1 else f"are {count} GPUs, 0 to {count - 1}"
        raise InputError(subject, f"does not exist: there {there}", "Name one of these")
    error, properties = runtime.cudaGetDeviceProperties(ordinal)
    _require_success(error, "cudaGetDeviceProperties")
    error, version = runtime.cudaDriverGetVersion()
    _require_success(error, "cudaDriverGetVersion")
    return Gpu(
        ordinal=ordinal,
        name=properties.name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{properties.major}.{properties.minor}",
        cuda_driver=f"{version // 1000}.{version % 1000 // 10}",
    )


def use_gpu(ordinal: int) -> None:
    """Make a GPU the current one of the calling thread, as CUDA's runtime understands it.

    Raises
    ------
    RuntimeError
        When CUDA refuses.
    """
    (error,) = _import_runtime().cudaSetDevice(ordinal)
    _require_success(error, f"cudaSetDevice({ordinal})")


def _import_runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        if error.name not in {"cuda", "cuda.bindings"}:
            raise
        raise MissingBackendError("cuda.bindings", "Finding GPUs", _INSTALL) from error


def _require_success(error: Any, call: str) -> None:
    if error.name != "cudaSuccess":
        raise RuntimeError(f"{call} failed: {error.name}")
