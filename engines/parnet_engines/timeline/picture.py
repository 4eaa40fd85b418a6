"""A picture of a recording as a standalone SVG, for light and dark surroundings.

Every row is a lane, rows of one device lie in one band, and time runs to the right. The
critical path stands out, and thin lines lead from a step to what waited for it elsewhere.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from parnet_engines.schedule.program import Copy
from parnet_engines.timeline.critical_path import Dependencies
from parnet_export.console import format_ms, format_percent, printable
from parnet_export.pictures.lettering import SIZES, shorten, text_width

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_engines.schedule.program import Program
    from parnet_engines.schedule.recording import Recording, Span
    from parnet_engines.timeline.analysis import TimelineAnalysis
    from parnet_export.pictures.lettering import Style

_MARGIN = 24.0
_PADDING = 10.0  # between the border of a band and what is in it
_TIME_WIDTH = 880.0  # of the whole recording
_ROW_HEIGHT = 42.0
_ROW_GAP = 8.0
_BAND_GAP = 10.0
_LEAST_WIDTH = 1.5  # of a box, so that the shortest step can be seen
_LEAST_SHORTENED = 32.0  # a name with less room is not worth its first letters
_LEAST_UPRIGHT = 14.0  # a box with less room bears no name, not even from below to above
_MOST_TICKS = 10
_MOST_ARROWS = 400
_NS_PER_MS = 1e6

_LEGEND = (
    ("run", "segment"),
    ("copy", "copy from another device"),
    ("run critical", "critical path"),
    ("wait", "waiting for another lane"),
)

_STYLE = """
.timeline { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
.timeline text { font-size: 11px; fill: #59636e }
.timeline .title { font-size: 18px; font-weight: 600; fill: #1f2328 }
.timeline .name { font-size: 13px; font-weight: 600; fill: #1f2328 }
.timeline .inside { fill: #1f2328 }
.timeline .paper { fill: #ffffff }
.timeline .band { fill: #f6f8fa }
.timeline .tick { stroke: #d1d9e0; stroke-width: 1 }
.timeline .run .box { fill: #ddf4ff; stroke: #54aeff }
.timeline .copy .box { fill: #e7e0fb; stroke: #9a7fe0 }
.timeline .critical .box { fill: #fff1e5; stroke: #e16f24; stroke-width: 2 }
.timeline .copy.critical .box { fill: #f6e3ee }
.timeline .wait .line { stroke: #afb8c1; stroke-dasharray: 2 3 }
.timeline .line { fill: none; stroke: #afb8c1; stroke-width: 1 }
.timeline .path .line { stroke: #e16f24; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
  .timeline text { fill: #9198a1 }
  .timeline .title, .timeline .name, .timeline .inside { fill: #f0f6fc }
  .timeline .paper { fill: #0d1117 }
  .timeline .band { fill: #151b23 }
  .timeline .tick { stroke: #2a313c }
  .timeline .run .box { fill: #0f2b4a; stroke: #316dca }
  .timeline .copy .box { fill: #271f44; stroke: #8a70d6 }
  .timeline .critical .box { fill: #3a2010; stroke: #e0823d }
  .timeline .copy.critical .box { fill: #3b1d33 }
  .timeline .wait .line { stroke: #656c76 }
  .timeline .line { stroke: #656c76 }
  .timeline .path .line { stroke: #e0823d }
}
"""


def render_timeline_svg(
    program: Program, recording: Recording, analysis: TimelineAnalysis, title: str
) -> str:
    """Draw a recording.

    Parameters
    ----------
    program
        What was executed.
    recording
        What to draw: one inference, or a few.
    analysis
        Of the same recording, for the critical path and the words.
    title
        The network's name, and where it ran.

    Returns
    -------
    str
        A standalone SVG document; equal arguments give equal documents. Boxes carry the
        attributes ``data-lane`` and ``data-step``.
    """
    label_width = max(
        *(text_width(printable(lane.name), "name") for lane in recording.lanes),
        *(text_width(printable(lane.device)) for lane in recording.lanes),
    )
    stage = _Stage(recording, _MARGIN + 2 * _PADDING + label_width)
    width = stage.right + _PADDING - _MARGIN

    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "timeline"})
    ET.SubElement(root, "title").text = f"Timeline of {printable(title)}"
    ET.SubElement(root, "desc").text = analysis.verdict.sentence
    ET.SubElement(root, "style").text = _STYLE
    paper = ET.SubElement(root, "rect", {"class": "paper", "rx": "8"})
    y = _MARGIN + SIZES["title"]
    _add_text(root, (_MARGIN, y), printable(title), width, "title")
    for line in (*_lines(_facts(recording, analysis), width), *_lines_of_verdict(analysis, width)):
        y += 18
        _add_text(root, (_MARGIN, y), line, width)
    stage.place_rows(y + 16)

    _add_bands(root, recording, stage, width)
    _add_ticks(root, stage)
    _add_waits(root, recording, stage)
    critical = {part.span for part in analysis.critical_path}
    _add_arrows(root, program, recording, stage)
    for highlighted in (False, True):  # the critical path lies on top
        for spans in recording.busy_by_lane.values():
            for span in spans:
                if (span in critical) == highlighted:
                    _add_box(root, program, span, stage, critical=highlighted)
    _add_path(root, [part.span for part in analysis.critical_path], stage)
    y = _add_legend(root, stage.bottom + 44)
    height = math.ceil(y + _MARGIN)
    size = {"width": _n(width + 2 * _MARGIN), "height": _n(height)}
    root.attrib |= {**size, "viewBox": f"0 0 {size['width']} {size['height']}", "role": "img"}
    paper.attrib |= size
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


class _Stage:
    """Where lanes and moments lie in the picture."""

    def __init__(self, recording: Recording, left: float) -> None:
        self.left = left
        self.right = left + _TIME_WIDTH
        self.total_ns = max(1, recording.end_ns - recording.begin_ns)
        self.top = self.bottom = 0.0
        self.begin_ns = recording.begin_ns
        self._recording = recording
        self._rows: dict[str, float] = {}

    def place_rows(self, top: float) -> None:
        """Give every lane its row, those of one device next to each other."""
        self.top = y = top
        for device in self.devices:
            y += _PADDING
            for lane in self._recording.lanes:
                if lane.device == device:
                    self._rows[lane.name] = y
                    y += _ROW_HEIGHT + _ROW_GAP
            y += _PADDING - _ROW_GAP + _BAND_GAP
        self.bottom = y - _BAND_GAP

    @property
    def devices(self) -> Sequence[str]:
        return list(dict.fromkeys(lane.device for lane in self._recording.lanes))

    def x(self, time_ns: float) -> float:
        return self.left + _TIME_WIDTH * (time_ns - self.begin_ns) / self.total_ns

    def y(self, lane: str) -> float:
        return self._rows[lane]

    def middle(self, lane: str) -> float:
        return self._rows[lane] + _ROW_HEIGHT / 2

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Yield the x coordinates of round numbers of milliseconds, and the numbers."""
        step_ms = _round_step(self.total_ns / _NS_PER_MS / _MOST_TICKS)
        digits = max(0, -math.floor(math.log10(step_ms) + 1e-9))
        for count in range(math.floor(self.total_ns / _NS_PER_MS / step_ms) + 1):
            moment_ns = self.begin_ns + count * step_ms * _NS_PER_MS
            yield self.x(moment_ns), f"{count * step_ms:.{digits}f}"


def _round_step(least_ms: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not below `least_ms`."""
    power = 10.0 ** math.floor(math.log10(least_ms))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least_ms * (1 - 1e-9))


# ----------------------------------------------------------------------------- the words


def _facts(recording: Recording, analysis: TimelineAnalysis) -> list[str]:
    count = len(recording.inferences)
    total = _ms(analysis.wall.total_ns)
    how = "predicted" if recording.source == "simulated" else "recorded"
    share = format_percent(analysis.bottleneck.share)
    return [
        f"{total} {how}" if count == 1 else f"{count} inferences in {total}, {how}",
        f"overlap {format_percent(analysis.wall.overlap)}",
        f"bottleneck {printable(analysis.bottleneck.name)} ({share} of the critical path)",
    ]


def _lines(facts: Sequence[str], width: float) -> Iterator[str]:
    """Put facts on as many lines as they need."""
    yield from _wrapped(facts, "  \N{MIDDLE DOT}  ", width)


def _lines_of_verdict(analysis: TimelineAnalysis, width: float) -> Iterator[str]:
    yield from _wrapped(printable(analysis.verdict.sentence).split(), " ", width)


def _wrapped(parts: Sequence[str], between: str, width: float) -> Iterator[str]:
    line = ""
    for part in parts:
        longer = f"{line}{between}{part}" if line else part
        if line and text_width(longer) > width:
            yield line
            line = part
        else:
            line = longer
    yield line


def _ms(duration_ns: int) -> str:
    return format_ms(duration_ns / _NS_PER_MS)


# --------------------------------------------------------------------------- how it looks


def _add_bands(parent: ET.Element, recording: Recording, stage: _Stage, width: float) -> None:
    for device in stage.devices:
        lanes = [lane for lane in recording.lanes if lane.device == device]
        top = stage.y(lanes[0].name) - _PADDING
        bottom = stage.y(lanes[-1].name) + _ROW_HEIGHT + _PADDING
        _add_rectangle(parent, "band", (_MARGIN, top), (width, bottom - top))
        for lane in lanes:
            place = (_MARGIN + _PADDING, stage.y(lane.name) + 18)
            _add_text(parent, place, printable(lane.name), math.inf, "name")
            below = (place[0], place[1] + 14)
            _add_text(parent, below, printable(lane.device), math.inf)


def _add_ticks(parent: ET.Element, stage: _Stage) -> None:
    group = ET.SubElement(parent, "g", {"class": "axis"})
    for x, label in stage.ticks():
        ends = {"x1": _n(x), "x2": _n(x), "y1": _n(stage.top), "y2": _n(stage.bottom + 4)}
        ET.SubElement(group, "line", {"class": "tick", **ends})
        _add_text(group, (x, stage.bottom + 16), label, math.inf, anchor="middle")
    _add_text(group, (_MARGIN + _PADDING, stage.bottom + 16), "ms", math.inf)


def _add_waits(parent: ET.Element, recording: Recording, stage: _Stage) -> None:
    group = ET.SubElement(parent, "g", {"class": "wait"})
    for span in recording.spans:
        if span.kind == "wait" and stage.x(span.end_ns) - stage.x(span.begin_ns) > 1:
            y = stage.middle(span.lane)
            _add_line(group, [(stage.x(span.begin_ns), y), (stage.x(span.end_ns), y)])


def _add_arrows(parent: ET.Element, program: Program, recording: Recording, stage: _Stage) -> None:
    """Lead from each step to those of other lanes that wait for it."""
    found = {(span.inference, span.step): span for span in recording.spans if span.is_busy}
    across_lanes = Dependencies(program).across_lanes
    pairs = [
        (found[inference, before], span)
        for (inference, step), span in sorted(found.items())
        for before in across_lanes[step]
        if (inference, before) in found
    ]
    if len(pairs) <= _MOST_ARROWS:
        group = ET.SubElement(parent, "g", {"class": "dependencies"})
        for source, target in pairs:
            _add_line(group, _stations(source, target, stage))


def _add_path(parent: ET.Element, spans: Sequence[Span], stage: _Stage) -> None:
    group = ET.SubElement(parent, "g", {"class": "path"})
    for source, target in pairwise(spans):
        if source.lane != target.lane:
            _add_line(group, _stations(source, target, stage))


def _stations(source: Span, target: Span, stage: _Stage) -> list[tuple[float, float]]:
    """Lead from the edge of a box to the edge of another one that faces it."""
    is_down = stage.y(source.lane) < stage.y(target.lane)
    y0 = stage.y(source.lane) + (_ROW_HEIGHT if is_down else 0)
    y1 = stage.y(target.lane) + (0 if is_down else _ROW_HEIGHT)
    return [(stage.x(source.end_ns), y0), (stage.x(target.begin_ns), y1)]


def _add_box(
    parent: ET.Element, program: Program, span: Span, stage: _Stage, *, critical: bool
) -> None:
    group = ET.SubElement(
        parent,
        "g",
        {
            "class": f"{span.kind} critical" if critical else span.kind,
            "data-lane": printable(span.lane),
            "data-step": str(span.step),
        },
    )
    duration = _ms(span.duration_ns)
    hint = f"{program.steps[span.step]}: {duration}, from {_ms_of(span.begin_ns, stage)}"
    ET.SubElement(group, "title").text = printable(hint)
    x, y = stage.x(span.begin_ns), stage.y(span.lane)
    width = max(_LEAST_WIDTH, stage.x(span.end_ns) - x)
    _add_rectangle(group, "box", (x, y), (width, _ROW_HEIGHT), radius=min(4.0, width / 3))
    name, room = _name_of(program, span), width - 8
    if text_width(name) <= room:
        _add_text(group, (x + 4, y + 17), name, room, css="inside")
        if text_width(duration) <= room:
            _add_text(group, (x + 4, y + 32), duration, room)
    elif width >= _LEAST_UPRIGHT and text_width(name) <= _ROW_HEIGHT - 4:
        place = (x + width / 2 + 4, y + _ROW_HEIGHT - 3)
        _add_text(group, place, name, _ROW_HEIGHT, css="inside", upright=True)
    elif room >= _LEAST_SHORTENED:
        _add_text(group, (x + 4, y + 17), name, room, css="inside")


def _name_of(program: Program, span: Span) -> str:
    step = program.steps[span.step]
    if isinstance(step, Copy):
        return printable(program.buffers_by_name[step.target].tensor.name)
    return printable(span.label)


def _ms_of(moment_ns: int, stage: _Stage) -> str:
    return _ms(moment_ns - stage.begin_ns)


def _add_legend(parent: ET.Element, y: float) -> float:
    """Explain the colours, and return the y coordinate of the last line."""
    x, sample, between = _MARGIN + _PADDING, 22.0, 24.0
    for style, text in _LEGEND:
        group = ET.SubElement(parent, "g", {"class": style})
        if style == "wait":
            _add_line(group, [(x, y), (x + sample, y)])
        else:
            _add_rectangle(group, "box", (x, y - 6), (sample, 12))
        _add_text(group, (x + sample + 8, y + 4), text, math.inf)
        x += sample + 8 + text_width(text) + between
    return y


def _add_line(parent: ET.Element, stations: Sequence[tuple[float, float]]) -> None:
    path = "M" + " L".join(f"{_n(x)} {_n(y)}" for x, y in stations)
    ET.SubElement(parent, "path", {"class": "line", "d": path})


def _add_rectangle(
    parent: ET.Element,
    style: str,
    place: tuple[float, float],
    size: tuple[float, float],
    radius: float = 4.0,
) -> None:
    names = ("x", "y", "width", "height", "rx")
    numbers = {name: _n(v) for name, v in zip(names, (*place, *size, radius), strict=True)}
    ET.SubElement(parent, "rect", {"class": style, **numbers})


def _add_text(
    parent: ET.Element,
    place: tuple[float, float],
    text: str,
    room: float,
    style: Style = "text",
    *,
    css: str = "",
    anchor: str = "",
    upright: bool = False,
) -> None:
    attributes = {"x": _n(place[0]), "y": _n(place[1])}
    css = css or ("" if style == "text" else style)
    if css:
        attributes["class"] = css
    if anchor:
        attributes["text-anchor"] = anchor
    if upright:
        attributes["transform"] = f"rotate(-90 {attributes['x']} {attributes['y']})"
    ET.SubElement(parent, "text", attributes).text = shorten(text, room, style)


def _n(value: float) -> str:
    """Return a coordinate with at most one decimal, the same on every machine."""
    return f"{value:.1f}".removesuffix(".0")
