"""What a latency depends on besides the network: the machine and the software.

Reading it loads none of the libraries whose versions it names.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

LIBRARIES = (
    "parnet-export",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
)
"""Distributions whose versions can change a latency or a graph."""

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_FOLDER = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine, the software and the moment.

    Parameters
    ----------
    created
        UTC time at which this was read, ISO 8601.
    command
        The command line, program name first.
    cpu_model
        The processor's own name.
    logical_cores, physical_cores
        Cores of the machine; None where the system does not tell.
    affinity
        Logical cores that this process may use.
    governors
        Frequency governors of those cores, without repeats; empty where there are none,
        as in most virtual machines.
    load_average
        Runnable processes over the last 1, 5 and 15 minutes, this one included.
    memory_bytes, available_memory_bytes
        Main memory, and how much of it can be used without swapping.
    system
        Operating system, kernel and architecture.
    python
        Implementation and version.
    libraries
        Versions of the installed ones among `LIBRARIES`.
    """

    created: str
    command: tuple[str, ...]
    cpu_model: str
    logical_cores: int | None
    physical_cores: int | None
    affinity: tuple[int, ...]
    governors: tuple[str, ...]
    load_average: tuple[float, float, float]
    memory_bytes: int
    available_memory_bytes: int
    system: str
    python: str
    libraries: dict[str, str]


def read_environment() -> Environment:
    """Read the environment of this process, now."""
    memory = psutil.virtual_memory()
    affinity = usable_cores()
    return Environment(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=(Path(sys.argv[0]).name, *sys.argv[1:]),
        cpu_model=cpu_model(),
        logical_cores=psutil.cpu_count(logical=True),
        physical_cores=psutil.cpu_count(logical=False),
        affinity=affinity,
        governors=governors(affinity),
        load_average=psutil.getloadavg(),
        memory_bytes=memory.total,
        available_memory_bytes=memory.available,
        system=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        libraries=library_versions(),
    )


def usable_cores() -> tuple[int, ...]:
    """Return the logical cores that this process may use, ascending."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS has no affinity masks
        return tuple(sorted(process.cpu_affinity()))
    return tuple(range(os.cpu_count() or 1))


def cpu_model(cpu_info: Path = _CPU_INFO) -> str:
    """Return the processor's name, from Linux's table of processors where there is one."""
    try:
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = (line.partition(":") for line in lines)
    names = [value.strip() for field, _, value in fields if field.strip() == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def governors(cores: Iterable[int], cpu_folder: Path = _CPU_FOLDER) -> tuple[str, ...]:
    """Return the frequency governors of some cores, without repeats."""
    found: dict[str, None] = {}
    for core in cores:
        try:
            text = (cpu_folder / f"cpu{core}" / "cpufreq" / "scaling_governor").read_text("utf-8")
        except OSError:
            continue
        found[text.strip()] = None
    return tuple(found)


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
