"""Measure planned rows: a process for each, interleaved rounds, one result."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from parnet_bench.machine.activity import Activity, GpuWatch, read_activity
from parnet_bench.machine.energy import EnergyTally, find_meter
from parnet_bench.machine.footprint import Footprint, graph_sizes, peak_host_bytes
from parnet_bench.machine.nvml import open_nvml
from parnet_bench.measuring.measure import measure
from parnet_bench.results.result import FailedRow, Recording, Result, Row, RowTimeline
from parnet_bench.targets.row_devices import gpus_of
from parnet_bench.workers.job import Job, job_of
from parnet_bench.workers.row_process import RowFailedError, RowProcess
from parnet_bench.workers.turn import TurnRequest
from parnet_engines.clock import MonotonicClock
from parnet_engines.cuda.devices import names_gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parnet_bench.machine.environment import Environment
    from parnet_bench.machine.peaks import Peaks
    from parnet_bench.measuring.measurement import Measurement, NextTurn
    from parnet_bench.results.procedure import Procedure
    from parnet_bench.results.result import ProcessRecording, RowDescription
    from parnet_bench.targets.planned_row import PlannedRow
    from parnet_bench.workers.device_figures import DeviceFigures
    from parnet_bench.workers.turn import Turn, Worker
    from parnet_export.errors import ParnetError

Answer = TypeVar("Answer")

_TIMELINE_RUNS = 10
_SPLIT_RUNS = 50
_SPLIT_LEAD_IN = 5
_OVERHEAD_RUNS = 2000


def measure_rows(
    rows: Sequence[PlannedRow],
    procedure: Procedure,
    environment: Environment,
    *,
    notes: tuple[str, ...] = (),
    peaks: tuple[Peaks, ...] = (),
    observe: Callable[[NextTurn], object] = lambda _: None,
) -> Result:
    """Load every row in processes of its own and measure them all in turns.

    Parameters
    ----------
    rows
        What to measure; each row is compared with the first one of its batch size.
    procedure
        How long and in what order.
    environment
        As it was before the processes were started.
    notes
        Sentences to keep with the result.
    peaks
        What the rows' cores can do at most, to keep with the result.
    observe
        Told before each turn.

    Returns
    -------
    Result
        Without the rows that failed, whose reasons it gives.

    Raises
    ------
    RowFailedError
        When no row could be measured.
    KeyboardInterrupt
        After Ctrl-C before the first round was complete. Later, the result is partial.
    """
    run = _Run(rows, procedure)
    overhead_ns = harness_overhead_ns(rows[0].description.cores)
    measurement = measure(
        {row.description.name: row.description.batch for row in rows},
        run.launch,
        procedure,
        MonotonicClock(),
        observe=observe,
        finish=run.finish,
        between=run.note_activity,
    )
    if not measurement.recordings:
        if measurement.stopped == "interrupted":
            raise KeyboardInterrupt
        raise measurement.failures[0].error
    result = run.result(measurement, environment)
    notes = (*notes, *run.notes)
    return replace(result, overhead_ns=overhead_ns, notes=notes, peaks=peaks)


def harness_overhead_ns(cores: tuple[int, ...], runs: int = _OVERHEAD_RUNS) -> tuple[int, ...]:
    """Time an engine that does nothing, in a process and a session as rows have them.

    Parameters
    ----------
    cores
        Logical CPU cores that the process may use.
    runs
        How many latencies to return.
    """
    job = Job(bundle="", plan="whole", devices="cpu", cores=cores, sizes={})
    with RowProcess("harness", job) as process:
        return process.take_turn(TurnRequest(runs, lead_in=runs // 10)).latencies_ns


class _Run:
    """The rows while they are measured, and what is noted besides their latencies."""

    def __init__(self, rows: Sequence[PlannedRow], procedure: Procedure) -> None:
        self._procedure = procedure
        self._rows = {row.description.name: row for row in rows}
        self._activities: list[Activity] = []
        self._peak_bytes: dict[str, int] = {}
        self._figures: defaultdict[str, list[DeviceFigures | None]] = defaultdict(list)
        self._untold: dict[str, str] = {}
        self._timelines: dict[str, RowTimeline] = {}
        gpus = gpus_of(row.description.devices for row in rows)
        self._energy = EnergyTally(find_meter(gpus))
        self._watch = GpuWatch(open_nvml()[0] if gpus else None, gpus)

    def launch(self, name: str, _: int) -> Worker:
        job = job_of(self._rows[name], data_transfers=self._procedure.data_transfers)
        return _WatchedRow(name, job, self._energy, self._watch)

    def finish(self, name: str, worker: Worker) -> None:
        """Look at a row before its process ends.

        A row that cannot tell parts or a timeline has its latencies all the same.
        """
        if not isinstance(worker, RowProcess):
            raise TypeError("rows run in processes")
        peak = peak_host_bytes(worker.pid)
        if peak is not None:
            self._peak_bytes[name] = max(peak, self._peak_bytes.get(name, 0))
        if names_gpus(self._rows[name].description.devices):
            runs = TurnRequest(_SPLIT_RUNS, _SPLIT_LEAD_IN, l2_flush=self._procedure.l2_flush)
            self._figures[name].append(self._asked(name, partial(worker.device_figures, runs)))
        if name not in self._timelines:
            timeline = self._asked(name, partial(worker.timeline, _TIMELINE_RUNS))
            if timeline is not None:
                self._timelines[name] = timeline

    def _asked(self, name: str, question: Callable[[], Answer]) -> Answer | None:
        try:
            return question()
        except RowFailedError as error:
            # The process has ended with it: the first reason is the one.
            self._untold.setdefault(name, error.problem)
            return None

    def note_activity(self) -> None:
        self._activities.append(read_activity(self._watch.take()))

    def result(self, measurement: Measurement, environment: Environment) -> Result:
        names = list(measurement.recordings)
        rows = []
        for name, processes in measurement.recordings.items():
            recording = Recording(self._with_split(name, processes))
            figures, description = self._told(name), self._rows[name].description
            rows.append(
                Row(
                    description,
                    recording,
                    timeline=self._timelines.get(name),
                    footprint=self._footprint(name, recording),
                    energy=self._energy.of(name),
                    engine=figures[0].engine if figures else _engine_on_cpu(description),
                    execution=figures[0].execution if figures else "",
                )
            )
        return Result(
            environment=environment,
            procedure=self._procedure,
            stopped=measurement.stopped,
            orders=tuple(
                tuple(tuple(names.index(name) for name in order) for order in orders)
                for orders in measurement.orders
            ),
            rows=tuple(rows),
            failed=tuple(
                FailedRow(
                    self._rows[failure.name].description,
                    failure.stage,
                    failure.process,
                    _reason(failure.error),
                )
                for failure in measurement.failures
            ),
            activities=tuple(self._activities),
        )

    def _with_split(
        self, name: str, processes: tuple[ProcessRecording, ...]
    ) -> tuple[ProcessRecording, ...]:
        """Return the processes with parts of inferences, where one has got so far."""
        figures = self._figures[name]
        return tuple(
            replace(process, split=found.split) if found is not None else process
            for process, found in itertools.zip_longest(processes, figures[: len(processes)])
        )

    def _told(self, name: str) -> list[DeviceFigures]:
        return [found for found in self._figures[name] if found is not None]

    @property
    def notes(self) -> tuple[str, ...]:
        """What rows could not tell besides their latencies."""
        return tuple(
            f"{name} could not tell everything besides its latencies: {problem}"
            for name, problem in self._untold.items()
        )

    def _footprint(self, name: str, recording: Recording) -> Footprint:
        row = self._rows[name]
        figures = self._told(name)
        sizes = graph_sizes(row.bundle, row.form_of_graph, row.description.batch)
        return Footprint(
            weights_bytes=sizes.weights_bytes,
            activation_bytes=sizes.activation_bytes,
            graph_bytes=sizes.graph_bytes,
            engine_bytes=figures[0].engine_bytes if figures else None,
            load_ms=median(p.load_ms for p in recording.processes if p.load_ms is not None),
            peak_host_bytes=self._peak_bytes.get(name),
            peak_device_bytes=max((one.peak_device_bytes for one in figures), default=None),
        )


class _WatchedRow(RowProcess):
    """A row whose energy and boards are looked at turn by turn."""

    def __init__(self, name: str, job: Job, tally: EnergyTally, watch: GpuWatch) -> None:
        super().__init__(name, job)
        self._tally, self._watch = tally, watch

    def take_turn(self, request: TurnRequest) -> Turn:
        with self._tally.turn(self.name, request.lead_in + request.runs):
            turn = super().take_turn(request)
        self._watch.look()
        return turn


def _reason(error: ParnetError) -> str:
    return error.problem if isinstance(error, RowFailedError) else str(error)


def _engine_on_cpu(row: RowDescription) -> str:
    """Return what a row on the CPU runs with; empty for one on GPUs, which tells it itself."""
    if names_gpus(row.devices):
        return ""
    return "onnxruntime" if row.wanted_engine == "auto" else row.wanted_engine
