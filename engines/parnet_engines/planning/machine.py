"""The machine and runtime that a measured latency belongs to, in one line."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from parnet_engines.planning.devices import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterable

_CPU_INFO = Path("/proc/cpuinfo")
_RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "torch": ("torch",),
}
"""The distributions that a runtime for the CPU comes in."""

_GPU_RUNTIMES = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt-rtx"),
    "torch": ("torch",),
}
"""The distributions that a runtime for GPUs comes in."""


def describe_machine(engine: str = "onnxruntime") -> str:
    """Return processor, number of usable cores, and runtime with its version.

    Latencies measured where this line differs are not comparable. Nothing is imported.

    Parameters
    ----------
    engine
        The runtime for the CPU, such as ``"openvino"``.
    """
    parts = [_processor(), f"{len(usable_cores())} cores", platform.machine()]
    return ", ".join([*parts, *_versions(_RUNTIMES[engine])])


def describe_gpu_machine(gpu: str, engine: str) -> str:
    """Return a GPU's name, and runtime with its version; nothing is imported.

    Parameters
    ----------
    gpu
        The GPU's name.
    engine
        The runtime for GPUs, such as ``"torch"``.
    """
    return ", ".join([gpu, *_versions(_GPU_RUNTIMES[engine])])


def is_of_gpu(environment: str, gpu: str) -> bool:
    """Return whether `describe_gpu_machine` has said this of a GPU, whatever the runtime."""
    return environment.startswith(f"{gpu}, ")


def _versions(distributions: Iterable[str]) -> list[str]:
    found = []
    for name in distributions:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Return the processor's name, from Linux's table of processors where there is one."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = (line.partition(":") for line in lines)
    names = [value.strip() for field, _, value in fields if field.strip() == "model name"]
    return names[0] if names else platform.processor() or "unknown processor"
