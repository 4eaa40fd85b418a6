"""A row inside its worker process: a session that is run as turns ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from parnet_bench.results.result import RowTimeline, SplitTimes
from parnet_bench.targets.row_devices import gpu_ordinals
from parnet_bench.workers.cache_flush import CacheFlush
from parnet_bench.workers.device_figures import DeviceFigures
from parnet_bench.workers.job import open_session
from parnet_bench.workers.row_gpus import RowGpus
from parnet_bench.workers.turn import one_at_a_time, several_in_flight
from parnet_engines.cuda.devices import names_gpus, open_driver, parse_gpus
from parnet_engines.cuda.session import CudaSession
from parnet_engines.engine import NullEngine
from parnet_engines.schedule import program_file
from parnet_engines.schedule import recording as recording_file
from parnet_engines.schedule.check import CheckedProgram, checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.session import Session
from parnet_export.bundle import open_bundle
from parnet_export.samples import make_samples
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from parnet_bench.workers.job import Job
    from parnet_bench.workers.turn import Turn, TurnRequest
    from parnet_engines.base_session import AnySession
    from parnet_engines.cuda.parts import PartTimes

_TIMELINE_WARM_UP = 3


class LoadedRow:
    """A row that is ready to run; it has run once when the constructor returns.

    Parameters
    ----------
    job
        What to run.

    Raises
    ------
    ParnetError
        When the row cannot be loaded or run.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bundle = open_bundle(Path(job.bundle)) if job.bundle else None
        self._in_flight = 1
        self._flush: CacheFlush | None = None
        self._gpus = _gpus(job)
        self._session = self._open()
        sample = next(make_samples(self._session.inputs, sizes=job.sizes))
        self._inputs = sample.inputs
        self._session.run(self._inputs)
        self._runner: Callable[[], object] | None = None
        if self._gpus is not None:
            self._gpus.look()  # before other rows are loaded

    def take_turn(self, request: TurnRequest) -> Turn:
        """Run as often as asked; see `parnet_bench.workers.turn.Worker.take_turn`."""
        if self._gpus is not None:
            self._gpus.begin()
        if request.in_flight != self._in_flight:
            self._session.close()
            self._in_flight = request.in_flight
            self._session = self._open(request.in_flight)
            self._runner = None
        run = self._ready()
        if request.in_flight > 1:
            turn = several_in_flight(run, request)
        else:
            turn = one_at_a_time(run, request, prepare=self._preparation(request))
        if self._gpus is not None:
            self._gpus.look()
        return turn

    def device_figures(self, request: TurnRequest) -> DeviceFigures:
        """Time inferences part by part, and return this and what else GPUs tell.

        Raises
        ------
        TypeError
            When the row does not run on GPUs.
        """
        session, gpus = self._session, self._gpus
        if not isinstance(session, CudaSession) or gpus is None:
            raise TypeError("only rows on GPUs have figures of GPUs")
        gpus.begin()
        self._ready()
        prepare = self._preparation(request)
        times: list[PartTimes] = []
        for _ in range(request.lead_in + request.runs):
            if prepare is not None:
                prepare()
            times.append(session.time_parts(self._inputs if self._job.data_transfers else None))
        gpus.look()
        recorded = times[request.lead_in :]
        sizes = [file.size_bytes for file in session.engine_files]
        return DeviceFigures(
            split=SplitTimes(
                **{
                    part: (tuple(getattr(one, part) for one in recorded),)
                    for part in SplitTimes.__slots__
                }
            ),
            peak_device_bytes=gpus.peak_bytes,
            engine_bytes=sum(sizes) if sizes else None,
            engine=session.engine,
            execution=str(session.execution),
        )

    def timeline(self, runs: int) -> RowTimeline:
        """Record some inferences step by step, and return the one of median latency."""
        with self._open(record=True) as session:
            program = session.program.program
            for _ in range(_TIMELINE_WARM_UP):
                session.run(self._inputs)
            session.take_recording()
            for _ in range(runs):
                session.run(self._inputs)
            recording = session.take_recording()
        alone = [recording.only(inference) for inference in recording.inferences]
        alone.sort(key=lambda one: one.end_ns - one.begin_ns)
        chosen = alone[(len(alone) - 1) // 2]
        return RowTimeline(
            program=msgspec.json.decode(program_file.encode(program)),
            recording=msgspec.json.decode(recording_file.encode(chosen)),
        )

    def close(self) -> None:
        """Close the session."""
        self._session.close()
        if self._gpus is not None:
            self._gpus.close()

    def _ready(self) -> Callable[[], object]:
        """Return what runs one inference as the row is to be measured."""
        session, inputs = self._session, self._inputs
        if self._runner is None:
            if isinstance(session, CudaSession) and not self._job.data_transfers:
                session.upload(inputs)
                self._runner = session.run_resident
            else:
                self._runner = lambda: session.run(inputs)
        return self._runner

    def _preparation(self, request: TurnRequest) -> Callable[[], object] | None:
        """Return what comes before each inference, if anything does."""
        if not request.l2_flush:
            return None
        if self._gpus is not None:
            return self._gpus.empty_caches
        if self._flush is None:
            self._flush = CacheFlush()
        return self._flush

    def _open(self, in_flight: int = 1, *, record: bool = False) -> AnySession:
        if self._bundle is None:
            engines = {("null", "lane0"): NullEngine(null_graph()["null"])}
            return Session(null_program(in_flight), engines, pin=False)
        return open_session(self._job, self._bundle, in_flight=in_flight, record=record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _gpus(job: Job) -> RowGpus | None:
    if not names_gpus(job.devices):
        return None
    driver = open_driver(parse_gpus(job.devices))
    return RowGpus(driver, gpu_ordinals([job.devices]))


def null_graph() -> StreamGraph:
    """Return a network of one segment that takes a number and gives a number."""
    inputs = (TensorSpec("x", "float32", (1,)),)
    outputs = (TensorSpec("y", "float32", (1,)),)
    return StreamGraph(inputs, outputs, (Segment("null", inputs, outputs, Cost(0, 0, 0, 0, 1, 0)),))


def null_program(in_flight: int = 1) -> CheckedProgram:
    """Return the program that runs `null_graph` on one lane."""
    placement = Placement((Lane("lane0", "cpu", ()),), (Assignment("null", "lane0"),))
    return checked(lower(null_graph(), placement, in_flight), null_graph())
