"""What all sessions have in common: slots, their interpreters, recordings, and the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import numpy as np

from parnet_engines.clock import MonotonicClock
from parnet_engines.network_inputs import checked_inputs
from parnet_engines.schedule.check import CheckedProgram
from parnet_engines.schedule.interpreter import Interpreter
from parnet_engines.schedule.program import Run
from parnet_engines.schedule.recording import Recording, Span
from parnet_engines.segment_errors import SegmentHungError
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from parnet_engines.schedule.execution import Execution
    from parnet_export.stream_graph import TensorSpec

_KEPT_SHAPES = 4
"""How many combinations of input shapes keep their memory and lanes, per slot."""


class _Closable(Protocol):
    def close(self) -> None: ...


EngineT = TypeVar("EngineT", bound=_Closable)
InterpreterT = TypeVar("InterpreterT", bound=Interpreter)


class BaseSession(ABC, Generic[EngineT, InterpreterT]):
    """Runs a checked program; several threads may share it.

    Parameters
    ----------
    program
        What to run, proven free of races and deadlocks. As many calls of `run` are under
        way at once as it has inferences in flight; further calls wait their turn.
    engines
        An engine for each segment and lane that runs it. The session owns them: `close`
        closes them.
    engine
        Name of the engines' runtime.
    timeout_s
        Time limit of an inference in seconds.
    record
        Whether to note when each step begins and ends, for `take_recording`.

    Raises
    ------
    TypeError
        When the program is not a `CheckedProgram`.
    ValueError
        When a segment has no engine.
    InputError
        When the time limit is not positive.
    """

    def __init__(
        self,
        program: CheckedProgram,
        engines: Mapping[tuple[str, str], EngineT],
        *,
        engine: str = "",
        timeout_s: float | None = None,
        record: bool = False,
    ) -> None:
        if not isinstance(program, CheckedProgram):
            raise TypeError(
                "a session runs a CheckedProgram; parnet_engines.schedule.check makes one"
            )
        runs = [step for step in program.program.steps if isinstance(step, Run)]
        missing = [step.segment for step in runs if (step.segment, step.lane) not in engines]
        if missing:
            raise ValueError(f"no engine for {missing}")
        if timeout_s is not None and not timeout_s > 0:
            raise InputError(
                f"time limit {timeout_s}", "is not positive", "Use seconds, or none for no limit"
            )
        self._checked_program = program
        self._engines = dict(engines)
        self._engine_name = engine
        self._timeout_s = timeout_s
        self._clock = MonotonicClock() if record else None
        buffers = program.program.buffers_by_name
        self._inputs = tuple(buffers[name].tensor for name in program.program.inputs)
        self._outputs = tuple(buffers[name].tensor for name in program.program.outputs)
        self._slots = tuple(
            Slot[InterpreterT]() for _ in range(program.program.inferences_in_flight)
        )
        self._numbers = itertools.count()
        self._spans: list[Span] = []
        self._recording = threading.Lock()
        self._hung: SegmentHungError | None = None
        self._closed = False
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _give_up, self._slots)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` takes."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` returns."""
        return self._outputs

    @property
    def program(self) -> CheckedProgram:
        """What the session runs."""
        return self._checked_program

    @property
    def engines(self) -> tuple[EngineT, ...]:
        """The engines that are open, each once."""
        return tuple(dict.fromkeys(self._engines.values()))

    @property
    def engine(self) -> str:
        """The runtime of the engines."""
        return self._engine_name

    @property
    @abstractmethod
    def execution(self) -> Execution:
        """How the program is carried out."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the network once.

        Parameters
        ----------
        inputs
            An array for each network input, of exactly its type and shape. A symbolic
            dimension takes any size, the same one in all inputs. Each shape that is new
            to the session costs time for memory of its own.

        Returns
        -------
        dict
            A new array for each network output, which belongs to the caller: it shares
            memory with nothing else. Nothing besides them is allocated.

        Raises
        ------
        InputError
            When an input is missing, unknown, or of another type or shape; or when this
            process was forked from the one that opened the session.
        SegmentFailedError
            When an engine fails. Segments that have not started are not run, and those
            under way end before the error is raised; the session stays usable.
        SegmentHungError
            When the inference takes longer than the time limit, or an earlier one did.
        ValueError
            When the session is closed.
        """
        self._require_own_process()
        arrays = checked_inputs(self._inputs, inputs)
        with self._in_slot() as (slot, number):
            host = self._host(slot, arrays)
            for buffer, array in zip(host.inputs, arrays, strict=True):
                np.copyto(buffer, array)
            self._keep(host.run(number))
            named = zip(self._outputs, host.outputs, strict=True)
            return {spec.name: buffer.copy() for spec, buffer in named}

    @abstractmethod
    def inspect(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the network once, and return every tensor that a segment produces, by name.

        For looking into what is wrong, not for speed. Raises what `run` raises.
        """

    def take_recording(self) -> Recording:
        """Return what was recorded since the last call, and forget it.

        Without `record` it is empty. Inferences that failed leave nothing in it.
        """
        with self._recording:
            spans, self._spans = self._spans, []
        return Recording(self._checked_program.program.lanes, tuple(spans))

    def close(self) -> None:
        """Wait for calls of `run` under way, then release threads, engines and memory.

        Neither waits for a segment that hangs nor closes its engine. Closing twice does no
        harm; in a forked process it does nothing.
        """
        if os.getpid() != self._process:
            return
        self._closed = True
        for slot in self._slots:
            with slot.lock:
                pass  # a call under way may need the engines for a shape that is new to it
        running: set[str] = set()
        engines, self._engines = self._engines, {}
        with contextlib.ExitStack() as ending:  # an error of one keeps none of the others open
            for (segment, _), engine in engines.items():
                ending.callback(_close_engine, engine, segment, running)
            for slot in self._slots:
                with slot.lock:
                    for host in slot.hosts.values():
                        ending.callback(_close_host, host, running)
                    slot.hosts.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise InputError(
                "session",
                "was opened before this process was forked, and its threads are not here",
                "Open a session in each process, after the fork",
            )

    @contextlib.contextmanager
    def _in_slot(self) -> Iterator[tuple[Slot[InterpreterT], int]]:
        """Have the next slot to oneself, and the number of the inference."""
        number = next(self._numbers)
        slot = self._slots[number % len(self._slots)]
        with slot.lock:
            if self._closed:
                raise ValueError("the session is closed")
            if self._hung is not None:
                raise SegmentHungError(self._hung.segments, self._hung.timeout_s)
            try:
                yield slot, number
            except SegmentHungError as error:
                self._hung = error
                raise

    def _keep(self, spans: tuple[Span, ...]) -> None:
        if spans:
            with self._recording:
                self._spans += spans

    def _host(self, slot: Slot[InterpreterT], arrays: Sequence[NDArray[Any]]) -> InterpreterT:
        """Return the slot's host for the shapes of the inputs, the last used ones kept."""
        shapes = tuple(array.shape for array in arrays)
        host = slot.hosts.get(shapes)
        if host is None:
            if len(slot.hosts) == _KEPT_SHAPES:
                _, oldest = slot.hosts.popitem(last=False)
                oldest.close()
            host = slot.hosts[shapes] = self._new_host(arrays)
        slot.hosts.move_to_end(shapes)
        return host

    @abstractmethod
    def _new_host(self, arrays: Sequence[NDArray[Any]]) -> InterpreterT:
        """Return an interpreter for inputs of these shapes."""


AnySession = BaseSession[Any, Any]
"""A session on whatever devices."""


class Slot(Generic[InterpreterT]):
    """What one inference in flight has to itself."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hosts: OrderedDict[tuple[tuple[int, ...], ...], InterpreterT] = OrderedDict()


def _close_host(host: Interpreter, running: set[str]) -> None:
    try:
        host.close()
    finally:
        running.update(host.running)


def _close_engine(engine: _Closable, segment: str, running: set[str]) -> None:
    """Close the engine of a segment, unless it is known to hang by then."""
    if segment not in running:
        engine.close()


def _give_up(slots: Sequence[Slot[Any]]) -> None:
    """Let a session end that nobody has closed and nobody has any more."""
    for slot in slots:
        for host in slot.hosts.values():
            host.give_up()
