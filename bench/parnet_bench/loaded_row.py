"""A row inside its worker process: a session that is run as turns ask for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from parnet_bench.cache_flush import CacheFlush
from parnet_bench.result import RowTimeline
from parnet_bench.turn import one_at_a_time, several_in_flight
from parnet_engines import program as program_file
from parnet_engines import recording as recording_file
from parnet_engines.check import CheckedProgram, checked
from parnet_engines.engine import NullEngine
from parnet_engines.lowering import lower
from parnet_engines.placement import Assignment, Lane, Placement
from parnet_engines.plan_option import choose_program, graph_of
from parnet_engines.program import Run
from parnet_engines.session import Session
from parnet_export.bundle import open_bundle
from parnet_export.samples import make_samples
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from types import TracebackType

    from parnet_bench.turn import Turn, TurnRequest
    from parnet_bench.worker import Job

_PLANS = ("whole", "streams", "authors")
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
        if job.bundle:
            self._bundle = open_bundle(Path(job.bundle))
            self._program = choose_program(
                self._bundle,
                job.devices,
                job.plan if job.plan in _PLANS else Path(job.plan),
                lanes=job.lanes,
                threads=len(job.cores),
            )
        else:
            self._program = null_program()
        self._in_flight = 1
        self._session = self._open(self._program)
        sample = next(make_samples(self._session.inputs, sizes=job.sizes))
        self._inputs = sample.inputs
        self._flush: CacheFlush | None = None
        self._session.run(self._inputs)

    def take_turn(self, request: TurnRequest) -> Turn:
        """Run as often as asked; see `parnet_bench.turn.Worker.take_turn`."""
        if request.in_flight != self._in_flight:
            self._session.close()
            self._in_flight = request.in_flight
            self._session = self._open(self._with_in_flight(request.in_flight))
        session, inputs = self._session, self._inputs
        if request.in_flight > 1:
            return several_in_flight(lambda: session.run(inputs), request)
        if request.l2_flush and self._flush is None:
            self._flush = CacheFlush()
        prepare = self._flush if request.l2_flush else None
        return one_at_a_time(lambda: session.run(inputs), request, prepare=prepare)

    def timeline(self, runs: int) -> RowTimeline:
        """Record some inferences step by step, and return the one of median latency."""
        with self._open(self._program, record=True) as session:
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
            program=msgspec.json.decode(program_file.encode(self._program.program)),
            recording=msgspec.json.decode(recording_file.encode(chosen)),
        )

    def close(self) -> None:
        """Close the session."""
        self._session.close()

    def _open(self, program: CheckedProgram, *, record: bool = False) -> Session:
        if self._job.bundle:
            return Session.load(self._bundle, program, record=record)
        return Session(program, {("null", "lane0"): NullEngine(null_graph()["null"])}, pin=False)

    def _with_in_flight(self, in_flight: int) -> CheckedProgram:
        program = replace(self._program.program, inferences_in_flight=in_flight)
        if not self._job.bundle:
            return checked(program, null_graph())
        segments = (step.segment for step in program.steps if isinstance(step, Run))
        return checked(program, graph_of(self._bundle, segments))

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


def null_program() -> CheckedProgram:
    """Return the program that runs `null_graph` on one lane."""
    placement = Placement((Lane("lane0", "cpu", ()),), (Assignment("null", "lane0"),))
    return checked(lower(null_graph(), placement), null_graph())
