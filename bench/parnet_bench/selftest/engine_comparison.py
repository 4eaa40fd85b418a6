"""Comparing engines on one device: rows measured in turns, and the limits of the device."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from parnet_bench.machine.activity import GpuWatch
from parnet_bench.machine.environment import Environment, read_environment
from parnet_bench.machine.nvml import open_nvml
from parnet_bench.machine.peaks import measure_peaks
from parnet_bench.measuring.gpu_peaks import measure_gpu_peaks
from parnet_bench.selftest.comparison_findings import findings
from parnet_bench.selftest.device_limits import Limits, limits_of
from parnet_bench.selftest.engine_builds import build_all, choose_build_places
from parnet_bench.selftest.engine_rows import (
    WHOLE_ENGINE,
    EngineRow,
    open_session_row,
    session_rows,
)
from parnet_bench.selftest.failure import reason_of
from parnet_bench.selftest.measured_rows import MeasuredRow, measure_in_turns, summarise
from parnet_bench.selftest.prepared_network import prepare_network, torch_rows
from parnet_bench.targets.graphs import catalogue_name
from parnet_bench.targets.row_devices import first_device, gpus_of
from parnet_engines.cuda.devices import names_gpus, ordinal_of, parse_gpus
from parnet_engines.cuda.engines import require_cuda_engine
from parnet_engines.planning.devices import usable_cores
from parnet_engines.session import Session
from parnet_engines.tensorrt.build_place import describe_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from parnet_bench.machine.peaks import Peaks
    from parnet_bench.machine.state import GpuState
    from parnet_bench.selftest.prepared_network import PreparedNetwork
    from parnet_engines.clock import Clock
    from parnet_engines.cuda.driver import Gpu
    from parnet_engines.tensorrt.build_place import BuildPlace
    from parnet_export.bundle import Bundle, Precision

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What to compare.

    Parameters
    ----------
    networks
        Catalogue names that are run in every way.
    references
        Catalogue names that are run fused, by torch and as a whole engine only.
    devices, engine
        As for `Session.open`.
    precision
        Of everything.
    resolution
        Height and width in pixels.
    rounds, runs
        How many rounds, and how many timed runs each row has in a round.
    seed
        Of weights, and of the order of rows.
    """

    networks: tuple[str, ...]
    references: tuple[str, ...]
    devices: str = "0"
    engine: str = "auto"
    precision: Precision = "fp16"
    resolution: int = 224
    rounds: int = 30
    runs: int = 20
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """Everything that was measured, to be kept as JSON.

    Parameters
    ----------
    environment
        The machine and its software.
    device
        The first GPU, which all rows but the authors' layout run on; or ``"cpu"``.
    driver
        Versions of NVIDIA's driver and of CUDA in it; empty where they are not told.
    precision, resolution
        As for `Request`.
    rows
        All ways to run all networks, those that were not possible with the reason.
    limits
        Of the networks that are run in every way, as far as they could be prepared.
    bandwidth_gb_per_s, tflops
        What the device reaches at most; None where that could not be measured.
    peaks
        How that was measured, or why it was not.
    gpus
        The GPUs, each at the lowest clock and the highest temperature and power that were
        seen between turns.
    findings, notes
        Sentences about what was measured, and about what is not there.
    """

    schema_version: int
    environment: Environment
    device: str
    driver: str
    precision: str
    resolution: int
    rows: tuple[MeasuredRow, ...]
    limits: tuple[Limits, ...]
    bandwidth_gb_per_s: float | None
    tflops: float | None
    peaks: str
    gpus: tuple[GpuState, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def measured(self) -> bool:
        """Whether any row was measured at all."""
        return any(row.median_ms is not None for row in self.rows)


def compare_engines(
    request: Request, clock: Clock, progress: Callable[[str], None]
) -> EngineComparison:
    """Build bundles of the networks in a temporary folder, run every way, and compare.

    What fails on the way, for whatever reason, is a row with its reason or a note; everything
    else is measured all the same.

    Raises
    ------
    InputError
        When a network, the devices or the engine cannot be used.
    MissingBackendError
        When TensorRT is asked for, or GPUs are, and what drives them is not installed.
    """
    for name in (*request.networks, *request.references):
        catalogue_name(name)
    if names_gpus(request.devices) and request.engine != "auto":
        require_cuda_engine(request.engine)
    gpus = gpus_of([request.devices])
    places, no_engines = choose_build_places(request.devices, request.engine)
    notes = [no_engines] if no_engines else []
    watch = GpuWatch(open_nvml()[0] if gpus else None, gpus)
    with tempfile.TemporaryDirectory(prefix="parnet-engines-") as folder:
        preparation = _Preparation(request, Path(folder), places, progress)
        with contextlib.ExitStack() as sessions:
            rows = [_told(row, progress) for row in preparation.rows(sessions)]
            progress("measuring")
            turns = measure_in_turns(
                rows,
                clock,
                rounds=request.rounds,
                runs=request.runs,
                seed=request.seed,
                between=watch.look,
            )
            notes += preparation.notes
            notes += _closed(sessions)
        if turns.interrupted:
            notes.append("Interrupted: there are fewer rounds, and no limits.")
            preparation.bundles.clear()
            peaks, how = None, "interrupted"
        else:
            progress("measuring what the device can do at most")
            peaks, how = _peaks(request)
        engines = {row.network: row.engine for row in rows if row.name == WHOLE_ENGINE and row.run}
        limits = []
        for name, bundle in preparation.bundles.items():
            progress(f"recording the segments of {name}")
            engine = engines.get(name, request.engine)
            limits.append(limits_of(name, bundle, request.devices, engine, peaks))
    measured, seen = summarise(rows, turns), watch.take()
    flops_per_s = peaks.flops_per_s if peaks else None
    return EngineComparison(
        SCHEMA_VERSION,
        read_environment(),
        _device_name(request.devices, gpus),
        describe_driver() if gpus else "",
        request.precision,
        request.resolution,
        measured,
        tuple(limits),
        peaks.copy_bytes_per_s / 1e9 if peaks else None,
        flops_per_s / 1e12 if flops_per_s else None,
        how,
        seen,
        findings(measured, limits, seen),
        tuple(notes),
    )


class _Preparation:
    """Makes what rows run, and remembers what the limits need."""

    def __init__(
        self,
        request: Request,
        folder: Path,
        places: tuple[BuildPlace, ...],
        progress: Callable[[str], None],
    ) -> None:
        self._request, self._folder, self._places = request, folder, places
        self._progress = progress
        self.bundles: dict[str, Bundle] = {}
        self.notes: list[str] = []

    def rows(self, sessions: contextlib.ExitStack) -> Iterator[EngineRow]:
        request = self._request
        for name in (*request.networks, *request.references):
            self._progress(f"preparing {name}")
            try:
                network = prepare_network(
                    name,
                    self._folder,
                    precision=request.precision,
                    resolution=request.resolution,
                    seed=request.seed,
                )
            except Exception as error:  # noqa: BLE001 - the other networks are run all the same
                yield EngineRow(name, WHOLE_ENGINE, None, reason=reason_of(error))
                continue
            is_reference = name not in request.networks
            self._build(network.bundle, whole_only=is_reference)
            device = _torch_device(request.devices)
            yield from torch_rows(network, device, unfused=not is_reference)
            if not is_reference:
                self.bundles[name] = network.bundle
                yield from session_rows(
                    sessions, name, network.bundle, request.devices, request.engine
                )
            else:
                yield self._reference_row(sessions, network)

    def _build(self, bundle: Bundle, *, whole_only: bool) -> None:
        self.notes += build_all(
            bundle,
            self._places,
            self._progress,
            timing_cache=self._folder / "timing.cache",
            whole_only=whole_only,
        )

    def _reference_row(self, sessions: contextlib.ExitStack, network: PreparedNetwork) -> EngineRow:
        request = self._request
        first = first_device(request.devices)
        return open_session_row(
            sessions,
            network.name,
            WHOLE_ENGINE,
            lambda: Session.open(network.bundle, first, plan="whole", engine=request.engine),
        )


def _told(row: EngineRow, progress: Callable[[str], None]) -> EngineRow:
    progress(f"{row.network}, {row.name}: {row.reason or row.execution}")
    return row


def _closed(sessions: contextlib.ExitStack) -> Iterator[str]:
    """Close sessions; an error of one that has failed before must not cost what others gave."""
    try:
        sessions.close()
    except Exception as error:  # noqa: BLE001 - as above
        yield f"Sessions could not be closed: {reason_of(error)}"


def _peaks(request: Request) -> tuple[Peaks | None, str]:
    """Return what the device reaches, and how that was measured or why it was not."""
    try:
        if names_gpus(request.devices):
            peaks = measure_gpu_peaks(first_device(request.devices), request.precision)
        else:
            peaks = measure_peaks(usable_cores())
    except Exception as error:  # noqa: BLE001 - rows are worth keeping without it
        return None, reason_of(error)
    return peaks, peaks.how


def _device_name(devices: str, gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "cpu"
    first = ordinal_of(parse_gpus(devices)[0])
    return next(gpu.name for gpu in gpus if gpu.ordinal == first)


def _torch_device(devices: str) -> torch.device:
    if names_gpus(devices):
        return torch.device("cuda", ordinal_of(parse_gpus(devices)[0]))
    return torch.device("cpu")
