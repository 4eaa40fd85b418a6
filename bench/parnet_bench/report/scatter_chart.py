"""Scatter of rows: something known about a network against its latency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_bench.report import chart_svg as svg
from parnet_bench.report.scale import scale_for
from parnet_export.console import format_ms
from parnet_export.pictures.lettering import text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_bench.report.scale import Scale
    from parnet_bench.stats.statistics import Interval

_HEIGHT = 260
_ROOM_ABOVE = 0.16  # of the height, for labels
_NEAR_EDGE = 12.0
_LABEL_HEIGHT = 14.0
_LABEL_TRIES = (-12.0, 21.0, -26.0, 35.0, -40.0, 49.0)  # below the point, in pixels
_WIDE = 960.0  # pixels, of a page on a desk; narrower pages show no labels


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
    up = scale_for([point.value for point in points], room=_ROOM_ABOVE)
    root = svg.canvas(_HEIGHT, label, "scatter")
    svg.add_grid(root, across, _HEIGHT)
    for place, _ in up.ticks():
        y = _down(place)
        svg.add(root, "line", "grid", x1="0%", x2="100%", y1=y, y2=y)
    for point in points:
        if point.interval is not None:
            low, high = (across.place(end) for end in (point.interval.low, point.interval.high))
            y = _down(up.place(point.value))
            x1, x2 = svg.percent(low), svg.percent(high)
            svg.add(root, "line", f"range {point.css}", x1=x1, x2=x2, y1=y, y2=y)
    for point in points:
        group = svg.add(root, "g", point.css, f"{point.name}: {format_ms(point.latency_ms)}")
        x, y = svg.percent(across.place(point.latency_ms)), _down(up.place(point.value))
        svg.add(group, "circle", "dot", cx=x, cy=y, r=6.5)
    for name in _labels(points, across, up):
        x = svg.percent(name.place)
        svg.add_text(root, name.text, "label", x=x, y=name.y, text_anchor=name.anchor)
    return Scatter(_left(up), svg.render(root), svg.axis(across, unit))


@dataclass(frozen=True, slots=True)
class _Label:
    text: str
    place: float
    y: float
    anchor: str

    def covers(self, other: _Label) -> bool:
        left, right = self.ends()
        other_left, other_right = other.ends()
        apart = right < other_left or other_right < left
        return not apart and abs(self.y - other.y) < _LABEL_HEIGHT

    def ends(self) -> tuple[float, float]:
        width = 100 * text_width(self.text) / _WIDE
        shift = {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return self.place - shift, self.place - shift + width


def _labels(points: Sequence[Point], across: Scale, up: Scale) -> list[_Label]:
    """Return each point's label above or below it, where it covers no label before."""
    found: list[_Label] = []
    for point in sorted(points, key=lambda p: (p.latency_ms, p.name)):
        place, y = across.place(point.latency_ms), _down(up.place(point.value))
        anchor = "middle"
        if not _NEAR_EDGE < place < 100 - _NEAR_EDGE:
            anchor = "start" if place < 50 else "end"
        tries = [_Label(point.name, place, y + offset, anchor) for offset in _LABEL_TRIES]
        free = (t for t in tries if not any(t.covers(other) for other in found))
        found.append(next(free, tries[0]))
    return found


def _left(up: Scale) -> str:
    root = svg.canvas(_HEIGHT, "", "left")
    for place, label in up.ticks():
        svg.add_text(root, label, "tick", x="100%", y=_down(place) + 4, text_anchor="end")
    return svg.render(root)


def _down(place: float) -> float:
    """Return pixels from the top for a place up."""
    return _HEIGHT * (1 - place / 100)
