"""The machine and runtime that a measured latency belongs to, in one line."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from parnet_engines.planning.devices import usable_cores

_CPU_INFO = Path("/proc/cpuinfo")
_RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "torch": ("torch",),
}
"""The distributions that a runtime for the CPU comes in."""


def describe_machine(engine: str = "onnxruntime") -> str:
    """Return processor, number of usable cores, and runtime with its version.

    Latencies measured where this line differs are not comparable. Nothing is imported.

    Parameters
    ----------
    engine
        The runtime for the CPU, such as ``"openvino"``.
    """
    parts = [_processor(), f"{len(usable_cores())} cores", platform.machine()]
    for name in _RUNTIMES[engine]:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def _processor() -> str:
    """Return the processor's name, from Linux's table of processors where there is one."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = (line.partition(":") for line in lines)
    names = [value.strip() for field, _, value in fields if field.strip() == "model name"]
    return names[0] if names else platform.processor() or "unknown processor"
