"""What about this machine, at this moment, can make latencies differ from run to run.

Linux tells most of it through small files below ``/proc`` and ``/sys``; what it does not
tell, or another system, is None or empty here. GPUs tell through NVML.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from parnet_bench.machine.environment import cpu_model, governors, usable_cores
from parnet_bench.machine.nvml import board_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from parnet_engines.cuda.driver import Gpu

_ROOT = Path("/")
_STEAL_COLUMN = (
    7  # of the lines of /proc/stat, after user, nice, system, idle, iowait, irq, softirq
)
_STEAL_COLUMNS = 8  # guest times, which follow, are part of user times
_SAMPLE_S = 1.0
_MW_PER_W = 1000


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU.

    Parameters
    ----------
    index
        Its CUDA ordinal, of a GPU that rows run on; of all boards of a machine, NVML's number,
        which is also that of ``nvidia-smi``.
    name, driver
        The board, and the version of its driver.
    persistent
        Whether the driver stays loaded while nobody uses the GPU.
    clock_mhz, max_clock_mhz
        Clock of the multiprocessors now, and the highest there is.
    slowed_by
        What holds the clocks down: power, heat, or the like; empty while nothing does.
    processes
        How many processes use the GPU.
    temperature_c
        Of the chip, in degrees Celsius.
    power_w
        What the board takes, in watts.
    bus_id
        Where the board is plugged in, such as ``"0000:3B:00.0"``; empty where that is not told.
    """

    index: int
    name: str
    driver: str
    persistent: bool | None
    clock_mhz: int | None
    max_clock_mhz: int | None
    slowed_by: tuple[str, ...]
    processes: int | None
    temperature_c: int | None = None
    power_w: float | None = None
    bus_id: str = ""


@dataclass(frozen=True, slots=True)
class MachineState:
    """What the machine is set to, and what else it does.

    Parameters
    ----------
    cpu_model
        The processor's own name.
    logical_cores
        Cores of the machine.
    usable_cores
        Logical cores that this process may use.
    siblings
        Usable cores that share a physical core, in groups of two or more.
    governors
        Frequency governors of the usable cores, without repeats.
    turbo
        Whether cores may clock above their nominal frequency.
    load
        Runnable processes over the last minute.
    steal_share
        Part of the usable cores' time that the hypervisor gave to others, between 0 and 1.
    busy_share
        Part of the usable cores' time that went into anything at all meanwhile.
    sampled_s
        How long both were sampled.
    cpu_quota
        Cores' worth of time that the container may use; None without a limit.
    swap_used_bytes
        Memory that has been swapped out.
    huge_pages
        Whether the kernel merges memory into huge pages: ``"always"``, ``"madvise"`` or
        ``"never"``; empty where it does not tell.
    gpus
        The boards that NVML sees, by its numbers.
    """

    cpu_model: str
    logical_cores: int
    usable_cores: tuple[int, ...]
    siblings: tuple[tuple[int, ...], ...]
    governors: tuple[str, ...]
    turbo: bool | None
    load: float
    steal_share: float | None
    busy_share: float | None
    sampled_s: float
    cpu_quota: float | None
    swap_used_bytes: int
    huge_pages: str
    gpus: tuple[GpuState, ...]


def read_machine(
    root: Path = _ROOT,
    *,
    cores: Sequence[int] | None = None,
    nvml: Any = None,
    sleep: Callable[[float], None] = time.sleep,
    sample_s: float = _SAMPLE_S,
) -> MachineState:
    """Look at the machine for a moment.

    Parameters
    ----------
    root
        The folder that holds ``proc`` and ``sys``.
    cores
        Logical cores to look at; by default those that this process may use.
    nvml
        The module ``pynvml``, initialised; None where there is none.
    sleep
        Lets time pass between two looks at the cores' times.
    sample_s
        How long.
    """
    used = usable_cores() if cores is None else tuple(cores)
    cpu = root / "sys/devices/system/cpu"
    before = _core_times(root, used)
    sleep(sample_s)
    steal, busy = _shares(before, _core_times(root, used))
    return MachineState(
        cpu_model=cpu_model(root / "proc/cpuinfo"),
        logical_cores=psutil.cpu_count(logical=True) or len(used),
        usable_cores=used,
        siblings=_siblings(cpu, used),
        governors=governors(used, cpu),
        turbo=_turbo(cpu),
        load=_load(root),
        steal_share=steal,
        busy_share=busy,
        sampled_s=sample_s,
        cpu_quota=_cpu_quota(root),
        swap_used_bytes=_swap_used_bytes(root),
        huge_pages=_chosen(root / "sys/kernel/mm/transparent_hugepage/enabled"),
        gpus=() if nvml is None else all_boards(nvml),
    )


# -------------------------------------------------------------------------------- the CPU


def _core_times(root: Path, cores: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Return total, idle and stolen clock ticks of each core."""
    rows = {}
    for line in _text(root / "proc/stat").splitlines():
        name, *columns = line.split()
        if name.startswith("cpu") and name != "cpu":
            rows[name] = [int(column) for column in columns[:_STEAL_COLUMNS]]
    found = [rows.get(f"cpu{core}", []) for core in cores]
    if not found or any(len(columns) <= _STEAL_COLUMN for columns in found):
        return None
    return [(sum(row), row[3] + row[4], row[_STEAL_COLUMN]) for row in found]


def _shares(
    before: list[tuple[int, int, int]] | None, after: list[tuple[int, int, int]] | None
) -> tuple[float | None, float | None]:
    """Return which parts of the time between two looks were stolen, and not idle."""
    if before is None or after is None:
        return None, None
    total, idle, stolen = (sum(b[i] for b in after) - sum(a[i] for a in before) for i in range(3))
    if total <= 0:
        return None, None
    return stolen / total, 1 - idle / total


def _siblings(cpu: Path, cores: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    groups: dict[str, list[int]] = {}
    for core in cores:
        shared = _text(cpu / f"cpu{core}/topology/thread_siblings_list")
        groups.setdefault(shared or str(core), []).append(core)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _turbo(cpu: Path) -> bool | None:
    forbidden = _text(cpu / "intel_pstate/no_turbo")
    if forbidden:
        return forbidden == "0"
    boost = _text(cpu / "cpufreq/boost")
    return boost == "1" if boost else None


def _load(root: Path) -> float:
    words = _text(root / "proc/loadavg").split()
    return float(words[0]) if words else psutil.getloadavg()[0]


def _cpu_quota(root: Path) -> float | None:
    """Return the limit of the control group, of either version of the interface."""
    groups = root / "sys/fs/cgroup"
    words = _text(groups / "cpu.max").split()
    if len(words) != 2:
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [_text(groups / "cpu" / name) for name in files]
    with contextlib.suppress(ValueError, ZeroDivisionError):
        quota = int(words[0]) / int(words[1])
        return quota if quota > 0 else None
    return None


def _swap_used_bytes(root: Path) -> int:
    fields = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.split()
    try:
        total_kb, free_kb = (int(fields[name][0]) for name in ("SwapTotal", "SwapFree"))
    except (KeyError, IndexError, ValueError):
        return 0
    return (total_kb - free_kb) * 1024


def _chosen(path: Path) -> str:
    """Return the word in brackets of a file such as ``always [madvise] never``."""
    words = [word for word in _text(path).split() if word.startswith("[")]
    return words[0].strip("[]") if words else ""


def _text(path: Path) -> str:
    """Return the content of a small file, empty where there is none to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# ------------------------------------------------------------------------------- the GPUs


def all_boards(nvml: Any) -> tuple[GpuState, ...]:
    """Return what the initialised module ``pynvml`` tells of all boards, by its numbers, now.

    Boards that it does not let this process see are left out.
    """
    driver = _driver(nvml)
    count = _asked(nvml, nvml.nvmlDeviceGetCount) or 0
    found = (
        (index, _asked(nvml, partial(nvml.nvmlDeviceGetHandleByIndex, index)))
        for index in range(count)
    )
    return tuple(
        _state(nvml, board, index, _bus_id(nvml, board), driver)
        for index, board in found
        if board is not None
    )


def gpu_states(nvml: Any, gpus: Iterable[Gpu]) -> tuple[GpuState, ...]:
    """Return what the initialised module ``pynvml`` tells of some GPUs, by CUDA ordinal, now.

    Those whose boards it does not show are left out.
    """
    driver = _driver(nvml)
    found = ((gpu, board_of(nvml, gpu)) for gpu in gpus)
    return tuple(
        _state(nvml, board, gpu.ordinal, gpu.pci_bus_id, driver)
        for gpu, board in found
        if board is not None
    )


def heat_of(gpu: GpuState) -> tuple[str, ...]:
    """Return a GPU's temperature and power for people, as far as they are known."""
    facts = []
    if gpu.temperature_c is not None:
        facts.append(f"{gpu.temperature_c} \N{DEGREE SIGN}C")
    if gpu.power_w is not None:
        facts.append(f"{gpu.power_w:.0f} W")
    return tuple(facts)


def _driver(nvml: Any) -> str:
    return _asked(nvml, lambda: str(nvml.nvmlSystemGetDriverVersion())) or ""


def _bus_id(nvml: Any, device: Any) -> str:
    """Return a board's bus id as CUDA writes it: NVML has more digits for the domain."""
    found = _asked(nvml, lambda: nvml.nvmlDeviceGetPciInfo(device).busId)
    text = found.decode() if isinstance(found, bytes) else found or ""
    domain, colon, rest = text.partition(":")
    return f"{domain.lstrip('0'):0>4}{colon}{rest}" if colon else ""


def _state(nvml: Any, device: Any, index: int, bus_id: str, driver: str) -> GpuState:
    persistence = _asked(nvml, lambda: nvml.nvmlDeviceGetPersistenceMode(device))
    processes = _asked(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(device))
    reasons = _asked(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)) or 0
    power_mw = _asked(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(device))
    slowing = {
        "its power limit": nvml.nvmlClocksThrottleReasonSwPowerCap,
        "heat": nvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "the power supply": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    return GpuState(
        index=index,
        name=_asked(nvml, lambda: str(nvml.nvmlDeviceGetName(device))) or "GPU",
        driver=driver,
        persistent=None if persistence is None else bool(persistence),
        clock_mhz=_asked(nvml, lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
        max_clock_mhz=_asked(
            nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM)
        ),
        slowed_by=tuple(name for name, mask in slowing.items() if reasons & mask),
        processes=None if processes is None else len(processes),
        temperature_c=_asked(
            nvml, lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
        ),
        power_w=None if power_mw is None else power_mw / _MW_PER_W,
        bus_id=bus_id,
    )


def _asked(nvml: Any, question: Callable[[], Any]) -> Any:
    """Return the answer of NVML; None for what this board or driver does not tell."""
    try:
        return question()
    except nvml.NVMLError:
        return None
