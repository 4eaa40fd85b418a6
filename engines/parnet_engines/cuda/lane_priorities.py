"""Which lanes matter most: how far each lies from the critical path."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from parnet_engines.schedule.program import Run
from parnet_engines.timeline.critical_path import Dependencies

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_engines.schedule.program import Program


def lane_slack(program: Program, weights: Mapping[str, float]) -> dict[str, float]:
    """Return how much longer each lane's work could take without delaying the end.

    Lanes of the critical path have a slack of 0. Copies take no time here.

    Parameters
    ----------
    program
        A program without faults.
    weights
        What each segment takes, in any unit; 0 where not given.

    Returns
    -------
    dict
        For each lane the least slack of its runs, in the unit of the weights; a lane
        without runs has the length of the critical path.
    """
    across = Dependencies(program).across_lanes
    weight = {
        index: weights.get(step.segment, 0.0) if isinstance(step, Run) else 0.0
        for index, step in enumerate(program.steps)
        if index in across
    }
    before: dict[int, list[int]] = {index: list(across[index]) for index in weight}
    for indices in program.steps_by_lane.values():
        busy = [index for index in indices if index in weight]
        for earlier, later in pairwise(busy):
            before[later].append(earlier)
    after: dict[int, list[int]] = {index: [] for index in weight}
    for later, earlier_ones in before.items():
        for earlier in earlier_ones:
            after[earlier].append(later)
    until: dict[int, float] = {}
    for index, own in weight.items():  # issue order is topological
        until[index] = own + max((until[b] for b in before[index]), default=0.0)
    rest: dict[int, float] = {}
    for index in reversed(list(weight)):
        rest[index] = weight[index] + max((rest[a] for a in after[index]), default=0.0)
    longest = max(until.values(), default=0.0)
    return {
        lane: min(
            (
                longest - (until[index] + rest[index] - weight[index])
                for index in indices
                if index in weight and isinstance(program.steps[index], Run)
            ),
            default=longest,
        )
        for lane, indices in program.steps_by_lane.items()
    }


def lane_priorities(slack: Mapping[str, float], least: int, greatest: int) -> dict[str, int]:
    """Give the greatest priority to the lanes with the least slack.

    Parameters
    ----------
    slack
        As `lane_slack` returns it.
    least, greatest
        The range of priorities, of which CUDA's greater ones are lower numbers.

    Returns
    -------
    dict
        Lanes of equal slack have the same priority. Where there are more different ones
        than priorities, the lanes with most slack share the least.
    """
    ranks = sorted({round(value, 9) for value in slack.values()})
    step = 1 if least >= greatest else -1
    return {
        lane: greatest + step * min(ranks.index(round(value, 9)), abs(least - greatest))
        for lane, value in slack.items()
    }
