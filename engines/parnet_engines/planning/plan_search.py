"""List scheduling and simulated annealing: good placements of graphs of any size."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from parnet_engines.planning.evaluate import Objective, Play

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.planning.scenario import Instance, Step

Score = tuple[int, int, int]

EFFORT = 200_000
"""How many assignments `anneal` plays in all by default: fewer placements of larger graphs."""

_WORST: Score = (2**63, 2**63, 2**63)
_RESTARTS = 4

_WORK_COUNTS = 0.5
"""For throughput: what work on all lanes counts while annealing, against the busiest lane."""

_MOVES_FOR_HEAT = 200
"""With fewer moves than this for each segment, annealing starts colder."""


def score(instance: Instance, steps: Sequence[Step], objective: Objective) -> Score:
    """Return what a search makes small; steps that are no placement score worst.

    The objective comes first. The rest tells better from worse where that is the same.
    """
    play = Play(instance)
    for segment, lane in steps:
        if not play.accepts(segment, lane):
            return _WORST
        play.run(segment, lane)
    latency_ps = play.finish()
    if objective == "latency":
        return latency_ps, sum(play.lane_free_ps), play.interval_ps
    return play.interval_ps, latency_ps, sum(play.lane_load_ps)


def list_schedule(instance: Instance) -> list[Step]:
    """Place the segment with the most to follow first, each where it ends first.

    Where what a segment reads would have to be copied, recomputing it on the segment's
    own lane is tried as well, with everything that takes.
    """
    rank = _upward_ranks(instance)
    play = Play(instance)
    steps: list[Step] = []
    for segment in sorted(range(len(rank)), key=lambda number: (-rank[number], number)):
        options = []
        for lane in range(len(instance.lanes)):
            for recompute in (False, True):
                trial, added = play.copy(), []
                if recompute:
                    added = _recompute(trial, segment, lane)
                if added or not recompute:
                    end_ps = trial.run(segment, lane)
                    options.append((end_ps, len(added), lane, trial, added))
        _, _, lane, play, added = min(options, key=lambda option: option[:3])
        steps += [*added, (segment, lane)]
    return steps


def _upward_ranks(instance: Instance) -> list[float]:
    """Return for each segment what follows from its start to the end of the inference.

    On average over lanes, with the copy to a successor as likely as two lanes are on
    different devices (the upward rank of HEFT; Topcuoglu, Hariri and Wu 2002).
    """
    lanes = len(instance.lanes)
    apart = 1 - sum(len(on) ** 2 for on in instance.lanes_on) / lanes**2
    rank = [0.0] * len(instance.segment_names)
    for segment in reversed(range(len(rank))):
        for after in instance.successors[segment]:
            copy_ps = sum(instance.copy_ps[t] for t in instance.between(segment, after))
            rank[segment] = max(rank[segment], apart * copy_ps + rank[after])
        rank[segment] += sum(instance.latency_ps[segment]) / lanes
    return rank


def _recompute(play: Play, segment: int, lane: int) -> list[Step]:
    """Run on the segment's own lane all that leads to it and is not on its device."""
    added: list[Step] = []
    for producer in play.instance.predecessors[segment]:
        if play.accepts(producer, lane):
            added += _recompute(play, producer, lane)
            play.run(producer, lane)
            added.append((producer, lane))
    return added


def anneal(
    instance: Instance, objective: Objective, start: Sequence[Step], effort: int = EFFORT
) -> list[Step]:
    """Improve a placement by simulated annealing, the same way every time.

    Parameters
    ----------
    instance
        The stream graph on its lanes.
    objective
        What to make small.
    start
        A placement; what is returned is never worse.
    effort
        How many assignments to play in all.
    """
    walk = _Walk(instance, objective, start)
    evaluations = effort // max(1, len(instance.segment_names))
    for _ in range(_RESTARTS):
        walk.cool(start, evaluations // _RESTARTS)
    return walk.best


class _Walk:
    """A walk through placements that remembers the best one."""

    def __init__(self, instance: Instance, objective: Objective, start: Sequence[Step]) -> None:
        self.instance = instance
        self.objective: Objective = objective
        # Not for secrets: the seed makes every plan reproducible.
        self.random = random.Random(0)  # noqa: S311
        self.best = list(start)
        self.best_score = self.start_score = score(instance, start, objective)

    def cool(self, start: Sequence[Step], evaluations: int) -> None:
        """Walk from `start`, less and less willing to get worse."""
        steps, value = list(start), self.start_score
        segments = len(self.instance.segment_names)
        typical_ps = sum(map(sum, self.instance.latency_ps)) / segments / len(self.instance.lanes)
        heat = min(1.0, evaluations / segments / _MOVES_FOR_HEAT)
        for number in range(evaluations):
            left = 1 - number / evaluations
            temperature_ps = 1 + typical_ps * (0.4 * heat * left**3 + 0.01)
            trial = self._neighbour(steps)
            if trial is None:
                continue
            trial_score = score(self.instance, trial, self.objective)
            worse_ps = self._energy_ps(trial_score) - self._energy_ps(value)
            if worse_ps <= 0 or self.random.random() < math.exp(-worse_ps / temperature_ps):
                steps, value = trial, trial_score
                if value < self.best_score:
                    self.best, self.best_score = steps, value

    def _energy_ps(self, value: Score) -> float:
        """Return what annealing makes small.

        The busiest lane alone does not tell a change that helps from one that does not:
        most of them concern other lanes.
        """
        if self.objective == "latency":
            return value[0]
        return value[0] + _WORK_COUNTS * value[2] / len(self.instance.lanes)

    def _neighbour(self, steps: list[Step]) -> list[Step] | None:
        """Return the placement after a small change, or None if this one cannot be made."""
        draw = self.random.random
        index = int(draw() * len(steps))
        segment, lane = steps[index]
        if len(self.instance.device_names) > 1:
            kind = draw()
            if kind < 0.3 and any(s == segment for s, _ in steps[:index] + steps[index + 1 :]):
                return steps[:index] + steps[index + 1 :]
            if kind < 0.45 and self.instance.predecessors[segment]:
                return self._with_recomputation(steps, index)
        rest = steps[:index] + steps[index + 1 :]
        before = self.instance.predecessors[segment]
        after = self.instance.successors[segment]
        low = high = index
        while low > 0 and rest[low - 1][0] not in before:
            low -= 1
        while high < len(rest) and rest[high][0] not in after:
            high += 1
        if draw() < 0.7:
            lane = int(draw() * len(self.instance.lanes))
        position = low + int(draw() * (high - low + 1))
        if (segment, lane) == steps[index] and position == index:
            return None
        return [*rest[:position], (segment, lane), *rest[position:]]

    def _with_recomputation(self, steps: list[Step], index: int) -> list[Step] | None:
        """Run one more of the segments that feed a step on the step's own device."""
        instance, draw = self.instance, self.random.random
        segment, lane = steps[index]
        lanes = instance.lanes_on[instance.lane_device[lane]]
        held = {s for s, x in steps if x in lanes}
        missing = [p for p in instance.predecessors[segment] if p not in held]
        if not missing:
            return None
        again = missing[int(draw() * len(missing))]
        position = index
        if draw() < 0.3:
            before = instance.predecessors[again]
            low = max((i + 1 for i, (s, _) in enumerate(steps[:index]) if s in before), default=0)
            position = low + int(draw() * (index - low + 1))
        there = lanes[int(draw() * len(lanes))]
        return [*steps[:position], (again, there), *steps[position:]]
