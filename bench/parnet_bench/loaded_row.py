"""A row inside its worker process: a session that is run as turns ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from parnet_bench.cache_flush import CacheFlush
from parnet_bench.result import RowTimeline
from parnet_bench.turn import one_at_a_time, several_in_flight
from parnet_engines import program as program_file
from parnet_engines import recording as recording_file
from parnet_engines.check import CheckedProgram, checked
from parnet_engines.cuda_devices import names_gpus
from parnet_engines.engine import NullEngine
from parnet_engines.lowering import lower
from parnet_engines.placement import Assignment, Lane, Placement
from parnet_engines.session import PLANS, Session
from parnet_export.bundle import open_bundle
from parnet_export.samples import make_samples
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from types import TracebackType

    from parnet_bench.job import Job
    from parnet_bench.turn import Turn, TurnRequest
    from parnet_engines.base_session import AnySession

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
        self._session = self._open()
        sample = next(make_samples(self._session.inputs, sizes=job.sizes))
        self._inputs = sample.inputs
        self._flush: CacheFlush | None = None
        self._session.run(self._inputs)

    def take_turn(self, request: TurnRequest) -> Turn:
        """Run as often as asked; see `parnet_bench.turn.Worker.take_turn`."""
        if request.in_flight != self._in_flight:
            self._session.close()
            self._in_flight = request.in_flight
            self._session = self._open(request.in_flight)
        session, inputs = self._session, self._inputs
        if request.in_flight > 1:
            return several_in_flight(lambda: session.run(inputs), request)
        if request.l2_flush and self._flush is None:
            self._flush = CacheFlush()
        prepare = self._flush if request.l2_flush else None
        return one_at_a_time(lambda: session.run(inputs), request, prepare=prepare)

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

    def _open(self, in_flight: int = 1, *, record: bool = False) -> AnySession:
        job = self._job
        if self._bundle is None:
            engines = {("null", "lane0"): NullEngine(null_graph()["null"])}
            return Session(null_program(in_flight), engines, pin=False)
        return Session.open(
            self._bundle,
            job.devices,
            plan=job.plan if job.plan in PLANS else Path(job.plan),
            lanes=job.lanes,
            threads=None if names_gpus(job.devices) else len(job.cores),
            in_flight=in_flight,
            record=record,
            boundary=job.boundary,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def null_graph() -> StreamGraph:
    """Return a network of one segment that takes a number and gives a number."""
    inputs = (TensorSpec("x", "float32", (1,)),)
    outputs = (TensorSpec("y", "float32", (1,)),)
    return StreamGraph(inputs, outputs, (Segment("null", inputs, outputs, Cost(0, 0, 0, 0, 1, 0)),))


def null_program(in_flight: int = 1) -> CheckedProgram:
    """Return the program that runs `null_graph` on one lane."""
    placement = Placement((Lane("lane0", "cpu", ()),), (Assignment("null", "lane0"),))
    return checked(lower(null_graph(), placement, in_flight), null_graph())
