"""The critical path of a recording: which chain of steps made it take as long as it did."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from parnet_engines.planning.simulate import link_of
from parnet_engines.schedule.program import Copy, Record, Run, Wait

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from parnet_engines.schedule.program import Program
    from parnet_engines.schedule.recording import Recording, Span

Cause = Literal["start", "data", "link", "lane", "slot"]
"""What a step waits for: the start of the recording, an event of another lane, a copy over
the same link, the step before on its lane, or the last inference of its slot."""


@dataclass(frozen=True, slots=True)
class PathPart:
    """One run or copy of a critical path.

    Parameters
    ----------
    span
        The run or copy.
    cause
        What it waited for longest: of several things that ended at the same moment, the
        first in the order of `Cause`.
    delay_ns
        Nanoseconds from that moment until the step began. A prediction has none; in a
        session it is the time it takes to hand a step over.
    """

    span: Span
    cause: Cause
    delay_ns: int


class Dependencies:
    """What the runs and copies of a program's steps wait for.

    Parameters
    ----------
    program
        The program; steps are given by their indices.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._records = {
            step.event: index
            for index, step in enumerate(program.steps)
            if isinstance(step, Record)
        }
        self._before: dict[int, int | None] = dict.fromkeys(range(len(program.steps)))
        for indices in program.steps_by_lane.values():
            self._before.update(zip(indices[1:], indices[:-1], strict=True))

    @cached_property
    def across_lanes(self) -> Mapping[int, tuple[int, ...]]:
        """For each run and copy, those of other lanes whose end it waits for directly."""
        found = {}
        for index, step in enumerate(self._program.steps):
            if isinstance(step, Run | Copy):
                ended = self._ended_before(index)
                found[index] = tuple(
                    sorted(other for other in ended if self._program.steps[other].lane != step.lane)
                )
        return found

    def _ended_before(self, index: int) -> set[int]:
        """Return the nearest runs and copies that have surely ended when a step begins."""
        found: set[int] = set()
        seen: set[int] = set()
        points = [index]
        while points:
            before = self._before[points.pop()]
            if before is None or before in seen:
                continue
            seen.add(before)
            step = self._program.steps[before]
            if isinstance(step, Run | Copy):
                found.add(before)
                continue
            points.append(before)
            if isinstance(step, Wait) and step.event in self._records:
                points.append(self._records[step.event])
        return found


def critical_path(program: Program, recording: Recording) -> tuple[PathPart, ...]:
    """Walk back from the last end, each time to what was waited for longest.

    Parameters
    ----------
    program
        What was executed.
    recording
        One inference or several; with several the path may lead from one to the next.

    Returns
    -------
    tuple of PathPart
        In the order of time; empty for a recording without runs and copies. Durations
        and delays add up to the time from the recording's begin to its last end.
    """
    last = max(
        (span for spans in recording.busy_by_lane.values() for span in spans),
        key=lambda span: (span.end_ns, span.inference, span.step),
        default=None,
    )
    candidates = _Candidates(program, recording)
    path: list[PathPart] = []
    while last is not None:
        cause: Cause = "start"
        since_ns, before = recording.begin_ns, None
        for why, candidate in candidates.of(last):
            ended_ns = candidate.end_ns
            if ended_ns <= last.begin_ns and (before is None or ended_ns > since_ns):
                cause, since_ns, before = why, ended_ns, candidate
        path.append(PathPart(last, cause, last.begin_ns - since_ns))
        last = before
    return tuple(reversed(path))


class _Candidates:
    """The runs and copies that a run or copy may have waited for."""

    def __init__(self, program: Program, recording: Recording) -> None:
        self._across_lanes = Dependencies(program).across_lanes
        self._in_flight = program.inferences_in_flight
        self._found = {
            (span.inference, span.step): span
            for spans in recording.busy_by_lane.values()
            for span in spans
        }
        self._before_on_lane: dict[Span, Span] = {}
        for spans in recording.busy_by_lane.values():
            self._before_on_lane.update(zip(spans[1:], spans[:-1], strict=True))
        by_link = defaultdict(list)
        for span in sorted(self._found.values(), key=lambda s: (s.begin_ns, s.end_ns)):
            step = program.steps[span.step]
            if isinstance(step, Copy):
                by_link[link_of(program, step)].append(span)
        self._before_on_link: dict[Span, Span] = {}
        for copies in by_link.values():
            self._before_on_link.update(zip(copies[1:], copies[:-1], strict=True))
        self._last_of: dict[int, Span] = {}
        for span in self._found.values():
            known = self._last_of.setdefault(span.inference, span)
            if (span.end_ns, span.step) > (known.end_ns, known.step):
                self._last_of[span.inference] = span

    def of(self, span: Span) -> Iterator[tuple[Cause, Span]]:
        """Yield them in the order of `Cause`."""
        for step in self._across_lanes[span.step]:
            if (span.inference, step) in self._found:
                yield "data", self._found[span.inference, step]
        if span in self._before_on_link:
            yield "link", self._before_on_link[span]
        if span in self._before_on_lane:
            yield "lane", self._before_on_lane[span]
        if span.inference - self._in_flight in self._last_of:
            yield "slot", self._last_of[span.inference - self._in_flight]
