"""Energy of inferences, from the counters of processors (RAPL) and of boards (NVML).

Both count all that their package or board takes, other programs included. What they
give is the energy of the machine's part per inference, not of the network alone.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from parnet_bench.machine.nvml import board_of, open_nvml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from parnet_engines.cuda.driver import Gpu

_POWERCAP = Path("/sys/class/powercap")
_UJ_PER_J = 1_000_000
_MJ_PER_J = 1_000


@dataclass(frozen=True, slots=True)
class Energy:
    """What one inference takes.

    Parameters
    ----------
    j_per_inference
        Joules; None where nothing counts them.
    source
        What has counted; empty where nothing has.
    missing
        Why there is no figure, as a clause; empty where there is one.
    """

    j_per_inference: float | None
    source: str = ""
    missing: str = ""


class Meter(Protocol):
    """A counter of joules."""

    @property
    def source(self) -> str:
        """What counts, for people; empty where nothing does."""

    @property
    def missing(self) -> str:
        """Why nothing counts, as a clause; empty where something does."""

    def read_j(self) -> float | None:
        """Return the joules since some fixed moment; None where nothing counts them."""


@dataclass(frozen=True, slots=True)
class NoMeter:
    """Stands where nothing counts.

    Parameters
    ----------
    missing
        Why, as a clause.
    """

    missing: str
    source: str = ""

    def read_j(self) -> float | None:
        """Return None."""
        return None


@dataclass(slots=True)
class RaplMeter:
    """The processor packages' own counters, through Linux's powercap files.

    Parameters
    ----------
    packages
        Folders of the packages.
    """

    packages: tuple[Path, ...]
    source: str = field(init=False)
    missing: str = ""
    _last_uj: dict[Path, int] = field(default_factory=dict)
    _total_uj: int = 0

    def __post_init__(self) -> None:
        names = (_text(package / "name") for package in self.packages)
        self.source = f"RAPL {', '.join(names)}"

    def read_j(self) -> float | None:
        """Return the joules of all packages since the first call.

        A counter that has run over between two calls counts once more than it shows: at
        200 W the usual one runs over after 20 minutes.
        """
        for package in self.packages:
            try:
                now_uj = int(_text(package / "energy_uj"))
                range_uj = int(_text(package / "max_energy_range_uj"))
            except (OSError, ValueError):
                return None
            difference = now_uj - self._last_uj.setdefault(package, now_uj)
            self._total_uj += difference if difference >= 0 else difference + range_uj
            self._last_uj[package] = now_uj
        return self._total_uj / _UJ_PER_J


@dataclass(frozen=True, slots=True)
class NvmlMeter:
    """The boards' own counters, through NVML.

    Parameters
    ----------
    nvml
        The module ``pynvml``, initialised.
    gpus
        The GPUs whose boards count.
    """

    nvml: Any
    gpus: tuple[Gpu, ...]
    missing: str = ""

    @property
    def source(self) -> str:
        """The GPUs' CUDA ordinals for people."""
        return f"NVML GPU {', '.join(str(gpu.ordinal) for gpu in self.gpus)}"

    def read_j(self) -> float | None:
        """Return the joules of all boards since their driver was loaded."""
        # Parts of one board (MIG) share its counter.
        boards = {gpu.pci_bus_id: board_of(self.nvml, gpu) for gpu in self.gpus}
        if any(board is None for board in boards.values()):
            return None
        try:
            total_mj = sum(map(self.nvml.nvmlDeviceGetTotalEnergyConsumption, boards.values()))
        except self.nvml.NVMLError:
            return None
        return float(total_mj / _MJ_PER_J)


class EnergyTally:
    """Adds up, row by row, what turns take.

    Parameters
    ----------
    meter
        What counts.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._joules: defaultdict[str, float] = defaultdict(float)
        self._runs: defaultdict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def turn(self, row: str, runs: int) -> Iterator[None]:
        """Count what the block takes for `runs` inferences of a row, all that it runs.

        A block that is left by an error counts for nothing.
        """
        before = self._meter.read_j()
        yield
        after = self._meter.read_j()
        if before is not None and after is not None:
            self._joules[row] += after - before
            self._runs[row] += runs

    def of(self, row: str) -> Energy:
        """Return what one inference of a row has taken so far."""
        meter = self._meter
        if meter.missing:
            return Energy(None, missing=meter.missing)
        if not self._runs[row]:
            return Energy(None, missing=f"{meter.source} could not be read")
        if not self._joules[row]:
            return Energy(None, missing=f"{meter.source} does not count on this machine")
        return Energy(self._joules[row] / self._runs[row], meter.source)


def find_meter(gpus: Iterable[Gpu] = (), powercap: Path = _POWERCAP) -> Meter:
    """Return what counts the energy of a row's devices.

    Parameters
    ----------
    gpus
        The GPUs that rows run on; empty where they run on the CPU.
    powercap
        Linux's folder of power counters.
    """
    used = tuple(gpus)
    return _nvml_meter(used) if used else _rapl_meter(powercap)


def _rapl_meter(powercap: Path) -> Meter:
    # A package is intel-rapl:N, also on AMD; intel-rapl:N:M are parts of it.
    packages = tuple(
        sorted(
            folder
            for folder in powercap.glob("intel-rapl:*")
            if folder.name.count(":") == 1 and _name_of(folder).startswith("package")
        )
    )
    if not packages:
        return NoMeter("this machine shows no RAPL counters, as most virtual machines do not")
    for package in packages:
        try:
            _text(package / "energy_uj")
        except PermissionError:
            return NoMeter(f"{package / 'energy_uj'} may be read by root alone")
        except OSError as error:
            return NoMeter(f"{package / 'energy_uj'} cannot be read ({error.strerror})")
    return RaplMeter(packages)


def _nvml_meter(gpus: tuple[Gpu, ...]) -> Meter:
    nvml, missing = open_nvml()
    if missing:
        return NoMeter(missing)
    hidden = [str(gpu.ordinal) for gpu in gpus if board_of(nvml, gpu) is None]
    if hidden:
        return NoMeter(f"NVML does not show the board of GPU {', '.join(hidden)}")
    meter = NvmlMeter(nvml, gpus)
    if meter.read_j() is None:
        return NoMeter(f"{meter.source} counts no energy")
    return meter


def _name_of(folder: Path) -> str:
    try:
        return _text(folder / "name")
    except OSError:
        return ""


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
