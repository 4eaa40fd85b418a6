"""The simulator: plays a program against a cost table and a link.

A discrete-event interpreter of the same steps that a session executes, for machines that
are not at hand. Its rules for one inference are those of `parnet_engines.planning.evaluate`, with
which it agrees to the picosecond on every program that is lowered from a placement:

* a lane executes its steps one after another; a run takes its latency in the cost table
  while all lanes of the device are busy, a copy the link's latency and its bytes divided
  by the bandwidth, and a wait lasts until its event is recorded;
* a copy occupies its lane and the directed link between the two devices, which carries
  the copies of one inference in issue order.

With several inferences in flight, each slot starts its next inference when its last one
has ended. Slots share lanes and links, each of which does one thing at a time: of the
steps that are ready the one of the oldest inference goes first, and a lane that waits in
one inference may work for another one meanwhile.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from parnet_engines.planning.scenario import PS_PER_MS
from parnet_engines.schedule.program import Copy, Program, Record, Run, Step, Wait
from parnet_engines.schedule.recording import Recording, Span, StepKind, span_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from parnet_engines.planning.cost_table import CostTable
    from parnet_engines.planning.links import Link

_PS_PER_NS = 1000
_PS_PER_US = 1_000_000

_LEAST_REPEATS = 3
"""How often a rhythm has to come in a row to be taken for one."""

Directed = tuple[str, str]
"""A link by the devices that it leads from and to."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a program is predicted to do.

    Parameters
    ----------
    recording
        Every step of every inference, rounded to nanoseconds.
    starts_ms, ends_ms
        When each inference starts and ends.
    interval_ms
        Time from one inference to the next once the lanes have settled into a rhythm: the
        mean of a rhythm that repeats, or of what comes nearest to one, and the mean latency
        where too few inferences are played. A rhythm that is shorter than the work of the
        busiest lane or link cannot last, so it is never less than that.
    """

    recording: Recording
    starts_ms: tuple[float, ...]
    ends_ms: tuple[float, ...]
    interval_ms: float

    @property
    def latency_ms(self) -> float:
        """From an inference's start to its end, on average."""
        latencies = [end - start for start, end in zip(self.starts_ms, self.ends_ms, strict=True)]
        return sum(latencies) / len(latencies)


def simulate(
    program: Program,
    costs: CostTable,
    link: Link,
    *,
    dimensions: Mapping[str, int] | None = None,
    inferences: int = 1,
    alone: bool = False,
    overhead_us: Mapping[StepKind, float] | None = None,
) -> Simulation:
    """Predict when every step of a program begins and ends.

    Parameters
    ----------
    program
        What to play; `Program.inferences_in_flight` of its inferences overlap.
    costs
        The latency of each segment on the program's lanes.
    link
        What connects any two devices.
    dimensions
        Sizes of symbolic dimensions, such as the batch; 1 where not given.
    inferences
        How many to play. The caller reads outputs and writes inputs in no time.
    alone
        Take the latencies of segments that run alone, as if lanes did not disturb each
        other.
    overhead_us
        Microseconds that every step of a kind takes beyond its cost; none by default.

    Raises
    ------
    InputError
        When the cost table lacks a segment on a lane.
    ValueError
        When there is no inference to play, or the program never ends.
    """
    if inferences < 1:
        raise ValueError(f"{inferences} inferences are too few")
    extra_ps: dict[str, int] = {
        kind: round(us * _PS_PER_US) for kind, us in (overhead_us or {}).items()
    }
    durations_ps = tuple(
        _cost_ps(program, step, costs, link, dimensions, alone=alone) + extra_ps.get(step.kind, 0)
        for step in program.steps
    )
    player = _Player(program, durations_ps, inferences)
    player.play()
    played = player.inferences
    return Simulation(
        Recording(program.lanes, tuple(player.spans), "simulated"),
        tuple(inference.start_ps / PS_PER_MS for inference in played),
        tuple(inference.end_ps / PS_PER_MS for inference in played),
        max(player.busiest_ps, _rhythm_ps(played, program.inferences_in_flight)) / PS_PER_MS,
    )


def link_of(program: Program, step: Copy) -> Directed:
    """Return the devices that a copy leads from and to."""
    source, target = program.buffers_by_name[step.source], program.buffers_by_name[step.target]
    return source.device, target.device


def _cost_ps(
    program: Program,
    step: Step,
    costs: CostTable,
    link: Link,
    dimensions: Mapping[str, int] | None,
    *,
    alone: bool,
) -> int:
    match step:
        case Run():
            lane = program.lanes_by_name[step.lane]
            neighbours = sum(other.device == lane.device for other in program.lanes)
            cost_ms = costs.latency_ms(step.segment, lane, 1 if alone else neighbours)
        case Copy():
            tensor = program.buffers_by_name[step.target].tensor
            cost_ms = link.copy_ms(tensor.size_bytes(dimensions))
        case Record() | Wait():
            return 0
    return round(cost_ms * PS_PER_MS)


@dataclass(slots=True)
class _Inference:
    """How far one inference has come.

    Parameters
    ----------
    number
        Counted from 0 in the order in which they start.
    ahead
        The steps that each lane has yet to begin, the next one last.
    unfinished
        How many steps have not ended.
    start_ps, end_ps
        When it starts and ends.
    occupied
        The lanes on which one of its steps is under way.
    arrived_ps
        When each lane came to its next step.
    recorded
        The events that have been recorded.
    carried
        How many copies each link has carried.
    """

    number: int
    ahead: dict[str, list[int]]
    unfinished: int
    start_ps: int = 0
    end_ps: int = 0
    occupied: set[str] = field(default_factory=set)
    arrived_ps: dict[str, int] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    carried: Counter[Directed] = field(default_factory=Counter)


class _Player:
    """The state of all lanes and links at one moment."""

    def __init__(self, program: Program, durations_ps: Sequence[int], inferences: int) -> None:
        self.program = program
        self.durations_ps = durations_ps
        self.inferences = [
            _Inference(
                number,
                {lane: list(reversed(steps)) for lane, steps in program.steps_by_lane.items()},
                len(program.steps),
            )
            for number in range(inferences)
        ]
        self.spans: list[Span] = []
        self._now_ps = 0
        self._to_start = deque(self.inferences)
        self._active: list[_Inference] = []
        self._under_way: list[tuple[int, int, int]] = []
        """When a step ends, its inference and the step itself; a heap."""
        self._busy_lanes: set[str] = set()
        self._busy_links: set[Directed] = set()
        self._links: dict[int, Directed] = {}
        self._turns: dict[int, int] = {}
        """For each copy, how many copies of its inference use the link before it."""
        turns: Counter[Directed] = Counter()
        for index, step in enumerate(program.steps):
            if isinstance(step, Copy):
                link = self._links[index] = link_of(program, step)
                self._turns[index] = turns[link]
                turns[link] += 1

    @property
    def busiest_ps(self) -> int:
        """What one inference asks of the lane or link that it asks the most of."""
        loads_ps: Counter[str | Directed] = Counter()
        for index, step in enumerate(self.program.steps):
            loads_ps[step.lane] += self.durations_ps[index]
            if index in self._links:
                loads_ps[self._links[index]] += self.durations_ps[index]
        return max(loads_ps.values(), default=0)

    def play(self) -> None:
        for _ in range(self.program.inferences_in_flight):
            self._start_next()
        self._begin_all()
        while self._under_way:
            self._now_ps = self._under_way[0][0]
            while self._under_way and self._under_way[0][0] == self._now_ps:
                _, number, index = heapq.heappop(self._under_way)
                self._end(self.inferences[number], index)
            self._begin_all()
        if self._active:
            ahead = self._active[0].ahead.values()
            stuck = self.program.describe(min(steps[-1] for steps in ahead if steps))
            raise ValueError(f"the program never ends, because {stuck} cannot begin")

    def _start_next(self) -> None:
        while self._to_start:
            inference = self._to_start.popleft()
            inference.start_ps = inference.end_ps = self._now_ps
            if inference.unfinished:  # a program without steps is over as it starts
                inference.arrived_ps = dict.fromkeys(inference.ahead, self._now_ps)
                self._active.append(inference)
                return

    def _begin_all(self) -> None:
        """Begin whatever can, the steps of older inferences first.

        Marks come before them all: what a record releases at this moment may be older.
        """
        while True:
            ready = [candidate for candidate in self._candidates() if self._can_begin(*candidate)]
            if not ready:
                return
            inference, index = next(
                (candidate for candidate in ready if not self._occupies_lane(candidate[1])),
                ready[0],
            )
            self._begin(inference, index)

    def _candidates(self) -> Iterator[tuple[_Inference, int]]:
        for inference in self._active:
            indices = (
                steps[-1]
                for lane, steps in inference.ahead.items()
                if steps and lane not in inference.occupied
            )
            yield from ((inference, index) for index in sorted(indices))

    def _occupies_lane(self, index: int) -> bool:
        return isinstance(self.program.steps[index], Run | Copy) or self.durations_ps[index] > 0

    def _can_begin(self, inference: _Inference, index: int) -> bool:
        step = self.program.steps[index]
        if self._occupies_lane(index) and step.lane in self._busy_lanes:
            return False
        if isinstance(step, Wait):
            return step.event in inference.recorded
        if isinstance(step, Copy):
            link = self._links[index]
            return link not in self._busy_links and inference.carried[link] == self._turns[index]
        return True

    def _begin(self, inference: _Inference, index: int) -> None:
        step = self.program.steps[index]
        inference.ahead[step.lane].pop()
        inference.occupied.add(step.lane)
        # A wait begins when its lane comes to it, although it is known only at its end.
        is_wait = isinstance(step, Wait)
        begin_ps = inference.arrived_ps[step.lane] if is_wait else self._now_ps
        end_ps = self._now_ps + self.durations_ps[index]
        begin_ns, end_ns = _to_ns(begin_ps), _to_ns(end_ps)
        self.spans.append(span_of(self.program, index, begin_ns, end_ns, inference.number))
        if not self._occupies_lane(index):
            self._end(inference, index)
            return
        self._busy_lanes.add(step.lane)
        if index in self._links:
            self._busy_links.add(self._links[index])
        heapq.heappush(self._under_way, (end_ps, inference.number, index))

    def _end(self, inference: _Inference, index: int) -> None:
        step = self.program.steps[index]
        inference.occupied.remove(step.lane)
        inference.arrived_ps[step.lane] = self._now_ps
        if self._occupies_lane(index):
            self._busy_lanes.remove(step.lane)
        if index in self._links:
            self._busy_links.remove(self._links[index])
            inference.carried[self._links[index]] += 1
        if isinstance(step, Record):
            inference.recorded.add(step.event)
        inference.unfinished -= 1
        if inference.unfinished == 0:
            inference.end_ps = self._now_ps
            self._active.remove(inference)
            self._start_next()


def _rhythm_ps(inferences: Sequence[_Inference], in_flight: int) -> float:
    """Return the mean time from one end to the next when the first ones have passed.

    The last ones are left out, because no others follow that keep lanes from them.
    """
    ends_ps = sorted(inference.end_ps for inference in inferences)
    settled = ends_ps[: len(ends_ps) - in_flight]
    gaps_ps = [later - earlier for earlier, later in pairwise(settled)]
    for length in range(1, len(gaps_ps) // _LEAST_REPEATS + 1):
        rhythm = gaps_ps[-length:]
        if gaps_ps[-length * _LEAST_REPEATS :] == rhythm * _LEAST_REPEATS:
            return sum(rhythm) / length
    second_half = gaps_ps[len(gaps_ps) // 2 :]
    if second_half:
        return sum(second_half) / len(second_half)
    return sum(i.end_ps - i.start_ps for i in inferences) / len(inferences)


def _to_ns(time_ps: int) -> int:
    return (time_ps + _PS_PER_NS // 2) // _PS_PER_NS
