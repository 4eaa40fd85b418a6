"""How the edges of a stream graph's picture run: around boxes where there is a way.

An edge leaves and arrives horizontally. It changes rows in the gaps after its producer
and before its consumer, and crosses longer distances along a row or between two rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

from parnet_export.pictures.swimlanes import COLUMN_GAP, ROW_GAP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from parnet_export.pictures.swimlanes import Arc, Box

Point = tuple[float, float]

ENTRY_SPACING = 14.0
"""Distance between the places where edges enter a box, if there is room."""

_TRACKS = (0.0, -7.0, 7.0)  # where edges pass between two rows, from the middle
_CORNER = 10.0  # no edge enters a box closer than this to its top or bottom
_SAME_LINE = 4.0
_SAMPLES_PER_BEND = 16
_PER_BOX_PASSED = 1000.0
_PER_EDGE_COVERED = 100.0
_PER_BEND = 20.0
_PER_UNIT_OF_HEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Route:
    """An edge's way.

    Parameters
    ----------
    stations
        Points that the edge passes horizontally, from left to right. Between two of
        different height it is an S-shaped bend, else a straight line.
    """

    arc: Arc
    stations: tuple[Point, ...]

    def points(self) -> Iterator[Point]:
        """Yield points along the way, close enough that no box fits between two."""
        yield self.stations[0]
        for (x0, y0), (x1, y1) in pairwise(self.stations):
            steps = max(_SAMPLES_PER_BEND, int((x1 - x0) / COLUMN_GAP))
            for step in range(1, steps + 1):
                t = step / steps
                # A cubic Bezier curve whose control points are half-way, level with its ends.
                x = x0 + (x1 - x0) * (1.5 * t * (1 - t) + t**3)
                yield x, y0 + (y1 - y0) * (3 - 2 * t) * t * t


def route(boxes: Sequence[Box], arcs: Sequence[Arc]) -> list[Route]:
    """Find a way for every arc, in the order of `arcs`.

    Each one takes the way that passes the fewest boxes, then covers the fewest other
    edges, then has the fewest bends and the least height. Short edges choose first.
    """
    entries = _entries(boxes, arcs)
    found: dict[Arc, Route] = {}

    def length(arc: Arc) -> float:
        return boxes[arc.consumer].x - boxes[arc.producer].right

    for arc in sorted(arcs, key=length):
        start = boxes[arc.producer].output_port(arc.tensor)
        ways = [Route(arc, stations) for stations in _ways(start, entries[arc], boxes)]
        others = [other for other in found.values() if other.arc.tensor != arc.tensor]
        found[arc] = min(ways, key=lambda way: _cost(way, boxes, others))
    return [found[arc] for arc in arcs]


def _entries(boxes: Sequence[Box], arcs: Iterable[Arc]) -> dict[Arc, Point]:
    """Return where each arc enters its consumer, in the vertical order of where they come from.

    One that can run straight along its row does, and the others gather around it.
    """
    arriving: dict[int, list[tuple[float, bool, Arc]]] = {}
    for arc in arcs:
        producer, consumer = boxes[arc.producer], boxes[arc.consumer]
        _, y = producer.output_port(arc.tensor)
        blocked = any(
            box.row == consumer.row and producer.right < box.x < consumer.x for box in boxes
        )
        straight = producer.row == consumer.row and not blocked and consumer.y < y < consumer.bottom
        if producer.row == consumer.row and blocked:
            y = consumer.bottom  # it has to go around boxes of the row, and arrives from below
        arriving.setdefault(arc.consumer, []).append((y, straight, arc))
    entries: dict[Arc, Point] = {}
    for consumer_index, sources in arriving.items():
        box = boxes[consumer_index]
        sources.sort(key=itemgetter(0))
        entries |= _around_straight_ones(sources, box)
    return entries


def _around_straight_ones(sources: Sequence[tuple[float, bool, Arc]], box: Box) -> dict[Arc, Point]:
    """Spread sources over the left side of a box, from top to bottom.

    Parameters
    ----------
    sources
        For each arc, where it comes from and whether it arrives straight from there.
    """
    last = len(sources) - 1
    levels: dict[float, float] = {i: y for i, (y, straight, _) in enumerate(sources) if straight}
    if not levels:
        levels = {last / 2: box.y + box.node.port_y}
    first_level, last_level = min(levels), max(levels)
    room_above = levels[first_level] - box.y - _CORNER
    room_below = box.bottom - _CORNER - levels[last_level]
    above = min(ENTRY_SPACING, room_above / max(first_level, 1))
    below = min(ENTRY_SPACING, room_below / max(last - last_level, 1))
    places = {}
    for index, (_, _, arc) in enumerate(sources):
        level = max((i for i in levels if i <= index), default=first_level)
        steps = index - level
        places[arc] = (box.x, levels[level] + steps * (below if steps > 0 else above))
    return places


def _ways(start: Point, end: Point, boxes: Sequence[Box]) -> Iterator[tuple[Point, ...]]:
    """Yield the stations of every way worth considering."""
    (x0, y0), (x1, y1) = start, end
    if x1 - x0 <= 2 * COLUMN_GAP or y0 == y1:
        yield start, end
    if x1 - x0 > 1.5 * COLUMN_GAP:
        yield start, (x0 + COLUMN_GAP, y1), end
        yield start, (x1 - COLUMN_GAP, y0), end
    if x1 - x0 > 2 * COLUMN_GAP:
        tops = {box.y for box in boxes if box.node.kind == "segment"}
        bottom = max(box.bottom for box in boxes if box.node.kind == "segment")
        for between_rows in (*sorted(top - ROW_GAP / 2 for top in tops), bottom + ROW_GAP / 2):
            for offset in _TRACKS:
                y = between_rows + offset
                yield start, (x0 + COLUMN_GAP, y), (x1 - COLUMN_GAP, y), end


def _cost(way: Route, boxes: Iterable[Box], others: Iterable[Route]) -> float:
    (start, _), (end, _) = way.stations[0], way.stations[-1]
    points = list(way.points())
    near = (box for box in boxes if box.x < end and start < box.right)
    passed = sum(any(box.contains(point) for point in points) for box in near)
    covered = sum(_runs_along(way, other) for other in others)
    heights = [abs(y1 - y0) for (_, y0), (_, y1) in pairwise(way.stations)]
    return (
        _PER_BOX_PASSED * passed
        + _PER_EDGE_COVERED * covered
        + _PER_BEND * sum(height > 0 for height in heights)
        + _PER_UNIT_OF_HEIGHT * sum(heights)
    )


def _runs_along(way: Route, other: Route) -> bool:
    """Whether two edges share a straight stretch, where they would look like one."""
    return any(
        abs(a - c) < _SAME_LINE and x0 < u1 and u0 < x1
        for (x0, a), (x1, b) in pairwise(way.stations)
        if a == b
        for (u0, c), (u1, d) in pairwise(other.stations)
        if c == d
    )
