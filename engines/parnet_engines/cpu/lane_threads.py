"""Threads that execute the lanes of a program, inference after inference.

Every thread goes through its lane's steps over and over. The wait that every lane but
the origin starts with holds it until the origin starts the next inference, so that the
events of the program hand out all work, and nothing else has to.

An event is one queue for each of its waits: the record puts a token into each, a wait
takes one out. When a lane fails or the caller is interrupted, a last token goes into
every queue. The threads end where they are, and nobody uses these queues again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from parnet_engines.schedule.program import Copy, Record, Run, Wait
from parnet_engines.segment_errors import SegmentFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from parnet_engines.clock import Clock
    from parnet_engines.schedule.program import Program

    Action = Callable[[], object]
    Timing = tuple[int, int, int]


class GivenUpError(Exception):
    """A lane has failed or the caller was interrupted, and every lane stops."""


class LaneThreads:
    """The threads of one slot of a program, until one of them fails.

    Parameters
    ----------
    program
        A program without faults.
    work
        For each run and copy, by the index of its step, what carries it out.
    pin
        Whether threads are pinned to the first core of their lanes; one that executes a
        wide lane finds the rest of its cores in the engine's own pool.
    timeout_s
        Time limit of an inference in seconds. Without one the origin's steps run in the
        thread that calls `run`; with one the origin has a thread of its own as well, so
        that a segment that hangs there does not take the caller along.
    clock
        If given, the times of all steps are recorded by it.
    """

    def __init__(
        self,
        program: Program,
        work: Mapping[int, Action],
        *,
        pin: bool,
        timeout_s: float | None,
        clock: Clock | None,
    ) -> None:
        self._program = program
        self._clock = clock
        self._tokens: dict[int, SimpleQueue[bool]] = {
            index: SimpleQueue()
            for index, step in enumerate(program.steps)
            if isinstance(step, Wait)
        }
        self._start: SimpleQueue[bool] = SimpleQueue()
        self._end: SimpleQueue[bool] = SimpleQueue()
        self._running = {lane.name: "" for lane in program.lanes}
        self._timings: dict[str, list[Timing]] = {lane.name: [] for lane in program.lanes}
        self._errors: list[SegmentFailedError] = []
        self._given_up = [True]
        actions = {
            lane: [self._action(index, work) for index in indices]
            for lane, indices in program.steps_by_lane.items()
        }
        origin = program.origin
        self._caller_core: tuple[int, ...] = ()
        if timeout_s is None:
            self._callers_actions = actions.pop(origin.name)
            if pin:
                self._caller_core = origin.cores[:1]
        else:
            actions[origin.name] = [
                partial(_take, self._start),
                *actions[origin.name],
                partial(self._end.put, True),
            ]
            self._callers_actions = [
                partial(self._start.put, True),
                partial(_take, self._end, timeout_s),
            ]
        self._threads = [
            threading.Thread(
                target=self._serve,
                args=(actions[lane.name], lane.cores[:1] if pin else ()),
                name=f"parnet-lane {lane.name}",
                daemon=True,  # one that hangs must not keep the interpreter from ending
            )
            for lane in program.lanes
            if actions.get(lane.name)
        ]

    def start(self) -> None:
        """Start the threads. Interrupted, it leaves them given up."""
        for thread in self._threads:
            thread.start()
        self._given_up.clear()

    @property
    def has_given_up(self) -> bool:
        """Whether threads have ended or are about to, so that new ones are needed."""
        return bool(self._given_up)

    @property
    def running(self) -> tuple[str, ...]:
        """The segments whose engines are running now."""
        return tuple(segment for segment in self._running.values() if segment)

    @property
    def error(self) -> Exception:
        """Why the lanes have given up."""
        if self._errors:
            return self._errors[0]
        return RuntimeError("a lane's thread has ended; see its traceback above")

    def run(self) -> None:
        """Execute the program once.

        Raises
        ------
        SegmentFailedError
            When a segment fails in this thread.
        GivenUpError
            When another lane fails; `error` says why.
        queue.Empty
            When the time limit is over.
        """
        with _pinned(self._caller_core):
            for act in self._callers_actions:
                act()

    def give_up(self) -> None:
        """Let every thread end as soon as its segment has; `run` may not be called again."""
        self._given_up.append(True)
        for tokens in (self._start, self._end, *self._tokens.values()):
            tokens.put(False)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the threads have ended, and return whether they have."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            thread.join(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in started)

    def take_timings(self) -> list[Timing]:
        """Return index, begin and end in ns of every step since the last call.

        To be called between inferences.
        """
        taken = [timing for timings in self._timings.values() for timing in timings]
        for timings in self._timings.values():
            timings.clear()
        return taken

    def _serve(self, actions: list[Action], cores: tuple[int, ...]) -> None:
        """Execute a lane until it fails or everything is given up."""
        try:
            if cores:
                os.sched_setaffinity(0, cores)
            while True:
                for act in actions:
                    act()
        except GivenUpError:
            pass
        except SegmentFailedError as error:
            self._errors.append(error)
        finally:
            self.give_up()

    def _action(self, index: int, work: Mapping[int, Action]) -> Action:
        """Return what carries a step out, and notes the time if times are recorded."""
        step = self._program.steps[index]
        match step:
            case Wait():
                action: Action = partial(_take, self._tokens[index])
            case Record():
                action = partial(_put_into_each, self._tokens_of(step.event))
            case Run():
                action = self._guarded(step, work[index])
            case Copy():
                action = work[index]
        return self._timed(index, action, self._clock) if self._clock else action

    def _tokens_of(self, event: str) -> tuple[SimpleQueue[bool], ...]:
        steps = enumerate(self._program.steps)
        return tuple(
            self._tokens[i] for i, step in steps if isinstance(step, Wait) and step.event == event
        )

    def _guarded(self, step: Run, run: Action) -> Action:
        # Nothing here refers to this object, so that engines go with the last reference.
        given_up, running, lane, segment = self._given_up, self._running, step.lane, step.segment

        def action() -> None:
            if given_up:
                raise GivenUpError
            running[lane] = segment
            try:
                run()
            except Exception as error:
                raise SegmentFailedError(segment, error) from error
            finally:
                running[lane] = ""

        return action

    def _timed(self, index: int, act: Action, clock: Clock) -> Action:
        step = self._program.steps[index]
        timings, now_ns = self._timings[step.lane], clock.now_ns

        def action() -> None:
            begin_ns = now_ns()
            act()
            timings.append((index, begin_ns, now_ns()))

        def record() -> None:
            # Noted first: as soon as the event is recorded, the inference may be over.
            moment_ns = now_ns()
            timings.append((index, moment_ns, moment_ns))
            act()

        return record if isinstance(step, Record) else action


def _take(tokens: SimpleQueue[bool], timeout_s: float | None = None) -> None:
    if not tokens.get(timeout=timeout_s):
        raise GivenUpError


def _put_into_each(queues: tuple[SimpleQueue[bool], ...]) -> None:
    for tokens in queues:
        tokens.put(True)


@contextlib.contextmanager
def _pinned(cores: tuple[int, ...]) -> Iterator[None]:
    """Keep this thread on some cores meanwhile; none leave it where it is."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, before)
