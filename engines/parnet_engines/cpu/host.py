"""The host interpreter: executes a checked program on the CPU lanes of one machine.

Memory is allocated and engines are bound to it once; an inference allocates no arrays.
`parnet_engines.cpu.lane_threads` has the threads.
"""

from __future__ import annotations

import queue
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_engines.cpu.buffers import allocate
from parnet_engines.cpu.lane_threads import GivenUpError, LaneThreads
from parnet_engines.schedule.program import Copy, Run
from parnet_engines.schedule.recording import span_of
from parnet_engines.segment_errors import SegmentHungError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from parnet_engines.clock import Clock
    from parnet_engines.cpu.lane_threads import Action
    from parnet_engines.engine import Engine
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.recording import Span


class Host:
    """One slot of a program: its memory, engines bound to it, and a thread for each lane.

    One thread at a time may use it. Threads are started by the first inference, and again
    after one that has failed.

    Parameters
    ----------
    checked_program
        What to execute.
    engines
        An engine for each segment and lane that runs it. They stay the caller's.
    shapes
        The shape of every buffer in use, see `parnet_engines.cpu.buffers.find_shapes`.
    pin
        Whether threads are pinned to the first core of their lanes.
    timeout_s
        Time limit of an inference in seconds.
    clock
        If given, the times of all steps are recorded by it.
    """

    def __init__(
        self,
        checked_program: CheckedProgram,
        engines: Mapping[tuple[str, str], Engine],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        pin: bool = True,
        timeout_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._program = checked_program.program
        self._pin = pin
        self._timeout_s = timeout_s
        self._clock = clock
        buffers = allocate(self._program, shapes)
        self._inputs = tuple(buffers[name] for name in self._program.inputs)
        self._outputs = tuple(buffers[name] for name in self._program.outputs)
        self._work: dict[int, Action] = {}
        for index, step in enumerate(self._program.steps):
            if isinstance(step, Run):
                reads = [buffers[name] for name in step.inputs]
                writes = [buffers[name] for name in step.outputs]
                self._work[index] = engines[step.segment, step.lane].bind(reads, writes)
            elif isinstance(step, Copy):
                self._work[index] = partial(np.copyto, buffers[step.target], buffers[step.source])
        self._threads: LaneThreads | None = None
        self._hung: tuple[str, ...] | None = None

    @property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        """The network's inputs: write them before `run`, which leaves them as they are."""
        return self._inputs

    @property
    def outputs(self) -> tuple[NDArray[Any], ...]:
        """The network's outputs: valid from the end of `run` to its next start."""
        return self._outputs

    @property
    def running(self) -> tuple[str, ...]:
        """The segments whose engines are running now."""
        return self._threads.running if self._threads else ()

    def run(self, inference: int = 0) -> tuple[Span, ...]:
        """Execute the program once.

        Parameters
        ----------
        inference
            The number under which it is recorded.

        Returns
        -------
        tuple
            If times are recorded, a span for each step. A wait that its lane arrived at
            before this inference began, begins with it.

        Raises
        ------
        SegmentFailedError
            When an engine fails. No segment starts after it, and those under way end
            before the error is raised. The host stays usable.
        SegmentHungError
            When the time limit is over, now or in an earlier run.
        """
        threads = self._ready_threads()
        begin_ns = self._clock.now_ns() if self._clock else 0
        try:
            threads.run()
        except queue.Empty:
            self._hung = threads.running
            threads.give_up()
            raise self._hung_error() from None
        except GivenUpError:
            self._stop(threads)
            error = threads.error
            raise error from error.__cause__
        except BaseException:  # an engine in this thread, or Ctrl-C
            self._stop(threads)
            raise
        return tuple(
            span_of(self._program, index, max(start_ns, begin_ns), end_ns, inference)
            for index, start_ns, end_ns in threads.take_timings()
        )

    def give_up(self) -> None:
        """Let the threads end as soon as their segments have, without waiting for them."""
        if self._threads is not None:
            self._threads.give_up()

    def close(self) -> None:
        """End the threads and wait for all but those that hang. Closing twice does no harm."""
        if self._threads is None:
            return
        if self._hung is None:
            self._stop(self._threads)
        elif self._threads.join(0):
            self._threads = None

    def _ready_threads(self) -> LaneThreads:
        """Return threads that can run, new ones where the last ones have given up."""
        if self._hung is None and self._threads is not None and self._threads.has_given_up:
            self._stop(self._threads)  # waiting for them may have been interrupted
            self._threads = None
        if self._hung is not None:
            raise self._hung_error()
        if self._threads is None:
            self._threads = LaneThreads(
                self._program,
                self._work,
                pin=self._pin,
                timeout_s=self._timeout_s,
                clock=self._clock,
            )
            self._threads.start()
        return self._threads

    def _stop(self, threads: LaneThreads) -> None:
        """End the threads; a segment that outlasts the time limit counts as hanging."""
        threads.give_up()
        if not threads.join(self._timeout_s):
            self._hung = threads.running

    def _hung_error(self) -> SegmentHungError:
        return SegmentHungError(self._hung or (), self._timeout_s or 0.0)
