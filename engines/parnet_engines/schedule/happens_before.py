"""Happens-before by vector clocks: which steps have surely ended when another one starts.

A vector clock counts, for every lane, how many of its points have surely been
reached (Fidge 1988, Mattern 1989). One point is known to lie before another
exactly when the clock of the later one includes it. Lowering asks this to leave
out waits that would add nothing; the checker asks it to find the orders that are
missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_engines.schedule.program import Program, Record, Wait

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Moment:
    """A point on a lane, and what has surely happened by then.

    Parameters
    ----------
    lane
        Index of the lane.
    clock
        For every lane, how many of its points have been reached, this one included.
    """

    lane: int
    clock: tuple[int, ...]

    def precedes(self, other: Moment) -> bool:
        """Return whether this point is surely reached by `other`; a point precedes itself."""
        return self.clock[self.lane] <= other.clock[self.lane]


class LaneClocks:
    """One vector clock per lane, advanced from point to point in issue order.

    Parameters
    ----------
    lanes
        Names of the lanes.
    """

    def __init__(self, lanes: Iterable[str]) -> None:
        self._indices = {name: index for index, name in enumerate(lanes)}
        self._clocks = [(0,) * len(self._indices) for _ in self._indices]

    def knows(self, lane: str, moment: Moment) -> bool:
        """Return whether `moment` surely precedes whatever `lane` does next."""
        return moment.clock[moment.lane] <= self._clocks[self._indices[lane]][moment.lane]

    def learn(self, lane: str, moment: Moment) -> None:
        """Let `lane` go on only after `moment`."""
        index = self._indices[lane]
        self._clocks[index] = tuple(map(max, self._clocks[index], moment.clock))

    def advance(self, lane: str) -> Moment:
        """Move `lane` to its next point and return it."""
        index = self._indices[lane]
        clock = self._clocks[index]
        self._clocks[index] = (*clock[:index], clock[index] + 1, *clock[index + 1 :])
        return Moment(index, self._clocks[index])


@dataclass(frozen=True, slots=True)
class Timeline:
    """When every step of one inference happens, as far as the program says.

    Parameters
    ----------
    start
        The origin starts the inference; the inputs have been written.
    steps
        One moment per step of the program.
    end
        The origin has ended its last step; the outputs may be read.
    """

    start: Moment
    steps: tuple[Moment, ...]
    end: Moment


def timeline_of(program: Program) -> Timeline:
    """Return the moments of one inference of a program.

    A wait whose event has not been recorded earlier in issue order gives no order,
    which is what it means to a CUDA stream.
    """
    clocks = LaneClocks(lane.name for lane in program.lanes)
    start = clocks.advance(program.origin.name)
    recorded: dict[str, Moment] = {}
    moments: list[Moment] = []
    for step in program.steps:
        if isinstance(step, Wait) and step.event in recorded:
            clocks.learn(step.lane, recorded[step.event])
        moments.append(clocks.advance(step.lane))
        if isinstance(step, Record):
            recorded[step.event] = moments[-1]
    return Timeline(start, tuple(moments), clocks.advance(program.origin.name))
