"""Phases: a program for several GPUs, cut where they wait for each other.

Where one graph may not reach over devices, each device gets a graph of its own for each
phase, launched in order of the phases; between launches, devices wait for each other by
events. A phase ends where its device waits for another one, and after what another device
waits for, so that what can run side by side still does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_engines.schedule.program import Copy, Record, Run, Wait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_engines.schedule.program import Program


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one device that are launched together.

    Parameters
    ----------
    device
        The device's ordinal.
    lanes
        Lanes that have steps in it, in the order of the program.
    steps
        Indices of runs, copies, and of those records and waits that order them among each
        other, in issue order.
    after
        Positions of earlier phases of other devices that must have ended before it starts.
        Earlier phases of its own device have ended anyway.
    """

    device: int
    lanes: tuple[str, ...]
    steps: tuple[int, ...]
    after: tuple[int, ...]


def cut_into_phases(program: Program, ordinals: Mapping[str, int]) -> tuple[Phase, ...]:
    """Return the phases of a program in the order in which they are launched.

    Parameters
    ----------
    program
        A program without faults.
    ordinals
        The ordinal of each lane's device.
    """
    records = {s.event: i for i, s in enumerate(program.steps) if isinstance(s, Record)}
    awaited_elsewhere = {
        records[step.event]
        for step in program.steps
        if isinstance(step, Wait)
        and ordinals[step.lane] != ordinals[program.steps[records[step.event]].lane]
    }
    reached = dict.fromkeys(ordinals, 0)
    number: dict[int, int] = {}
    for index, step in enumerate(program.steps):
        lane = step.lane
        if isinstance(step, Wait):
            record = records[step.event]
            crosses = ordinals[program.steps[record].lane] != ordinals[lane]
            reached[lane] = max(reached[lane], number[record] + crosses)
        number[index] = reached[lane]
        if index in awaited_elsewhere:
            reached[lane] += 1
    places = [(number[i], ordinals[step.lane]) for i, step in enumerate(program.steps)]
    keys = sorted(set(places))
    found = []
    for key in keys:
        inside = [index for index, place in enumerate(places) if place == key]
        kept = _ordering(program, inside, records, places)
        after = {
            places[records[step.event]]
            for step in (program.steps[index] for index in inside)
            if isinstance(step, Wait) and places[records[step.event]][1] != key[1]
        }
        used = {program.steps[index].lane for index in kept}
        lanes = tuple(lane.name for lane in program.lanes if lane.name in used)
        position = tuple(sorted(keys.index(place) for place in after))
        found.append(Phase(key[1], lanes, tuple(kept), position))
    return tuple(found)


def _ordering(
    program: Program,
    inside: list[int],
    records: Mapping[str, int],
    places: list[tuple[int, int]],
) -> list[int]:
    """Return the steps of a phase without what only orders it against other phases."""
    waits = {
        index
        for index in inside
        if isinstance(wait := program.steps[index], Wait)
        and places[records[wait.event]] == places[index]
    }
    events = {program.steps[index].event for index in waits}  # type: ignore[union-attr]
    return [
        index
        for index in inside
        if isinstance(step := program.steps[index], Run | Copy)
        or index in waits
        or (isinstance(step, Record) and step.event in events)
    ]
