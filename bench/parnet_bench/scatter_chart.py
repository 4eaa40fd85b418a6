"""Scatter of rows: something known about a network against its latency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_bench import chart_svg as svg
from parnet_bench.scale import scale_for
from parnet_export.console import format_ms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_bench.scale import Scale
    from parnet_bench.statistics import Interval

_HEIGHT = 260
_NEAR_RIGHT = 62.0
_LABEL_ROOM_Y = 13.0


@dataclass(frozen=True, slots=True)
class Point:
    """A row in a scatter.

    Parameters
    ----------
    name
        The row's name.
    css
        Class of its colour.
    latency_ms, interval
        Its median, and the interval of that.
    value
        What is known about it.
    """

    name: str
    css: str
    latency_ms: float
    interval: Interval | None
    value: float


@dataclass(frozen=True, slots=True)
class Scatter:
    """A scatter in three parts that the page lays out: left labels, plot, labels below."""

    left: str
    plot: str
    below: str


def scatter(points: Sequence[Point], label: str, unit: str) -> Scatter:
    """Return points over their latencies.

    Parameters
    ----------
    points
        At least one.
    label, unit
        What the chart shows, and what the latencies below it are.
    """
    ends = [end for p in points if p.interval for end in (p.interval.low, p.interval.high)]
    across = scale_for([*(point.latency_ms for point in points), *ends])
    up = scale_for([point.value for point in points])
    root = svg.canvas(_HEIGHT, label, "scatter")
    svg.add_grid(root, across, _HEIGHT)
    for place, _ in up.ticks():
        y = _down(place)
        svg.add(root, "line", "grid", x1="0%", x2="100%", y1=y, y2=y)
    labels = _label_places(points, across, up)
    for point, label_y in zip(points, labels, strict=True):
        group = svg.add(root, "g", point.css, f"{point.name}: {format_ms(point.latency_ms)}")
        place, y = across.place(point.latency_ms), _down(up.place(point.value))
        if point.interval is not None:
            low, high = (across.place(end) for end in (point.interval.low, point.interval.high))
            svg.add(group, "line", "range", x1=svg.percent(low), x2=svg.percent(high), y1=y, y2=y)
        svg.add(group, "circle", "dot", cx=svg.percent(place), cy=y, r=6)
        side = {"dx": -11, "text_anchor": "end"} if place > _NEAR_RIGHT else {"dx": 11}
        svg.add_text(group, point.name, "label", x=svg.percent(place), y=label_y + 4, **side)
    return Scatter(_left(up), svg.render(root), svg.axis(across, unit))


def _label_places(points: Sequence[Point], across: Scale, up: Scale) -> list[float]:
    """Return the y of each label, moved down where it would cover another one's.

    Labels on one side of the chart are taken to overlap, whatever their length.
    """
    wanted = [_down(up.place(point.value)) for point in points]
    found = list(wanted)
    for is_right in (False, True):
        side = [
            index
            for index, point in enumerate(points)
            if (across.place(point.latency_ms) > _NEAR_RIGHT) == is_right
        ]
        last = -_LABEL_ROOM_Y
        for index in sorted(side, key=lambda i: (wanted[i], i)):
            last = found[index] = max(wanted[index], last + _LABEL_ROOM_Y)
    return found


def _left(up: Scale) -> str:
    root = svg.canvas(_HEIGHT, "", "left")
    for place, label in up.ticks():
        svg.add_text(root, label, "tick", x="100%", y=_down(place) + 4, text_anchor="end")
    return svg.render(root)


def _down(place: float) -> float:
    """Return pixels from the top for a place up."""
    return _HEIGHT * (1 - place / 100)
