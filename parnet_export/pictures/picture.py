"""A picture of a stream graph as a standalone SVG, for light and dark surroundings.

Every row is a lane, time runs to the right with FLOPs as the clock, and the critical path
stands out. Tensors are labelled where they leave their segment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as ET

from parnet_export.console import format_bytes, format_count, format_ratio, format_shape, printable
from parnet_export.pictures.edge_routes import ENTRY_SPACING, Route, route
from parnet_export.pictures.lettering import SIZES, shorten, text_width
from parnet_export.pictures.swimlanes import OUTPUT_SPACING, Arc, Box, Node, arrange

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from parnet_export.pictures.lettering import Style
    from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

_MARGIN = 24.0
_PADDING = 10.0  # between the border of a lane or box and what is in it
_LINE_HEIGHT = 14.0
_ABOVE_PORTS = 6.0
_BASELINE = 11.0  # from the top of a line of text
_ARROW = 8.0
_MIN_WIDTH = 560.0
_MAX_TEXT_WIDTH = 240.0
_LEGEND = (
    ("edge critical", "critical path: the most work in a row"),
    ("segment", "segment: the more FLOPs, the wider"),
    ("edge", "tensor: labelled where it leaves"),
)

_STYLE = """
.stream-graph { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
.stream-graph text { font-size: 11px; fill: #59636e }
.stream-graph .title { font-size: 18px; font-weight: 600; fill: #1f2328 }
.stream-graph .name { font-size: 13px; font-weight: 600; fill: #1f2328 }
.stream-graph .paper { fill: #ffffff }
.stream-graph .lane { fill: #f6f8fa }
.stream-graph .box { fill: #ddf4ff; stroke: #54aeff }
.stream-graph .critical .box { fill: #fff1e5; stroke: #e16f24; stroke-width: 2 }
.stream-graph .terminal .box { fill: #ffffff; stroke: #afb8c1; stroke-dasharray: 3 3 }
.stream-graph .line { fill: none; stroke: #6e7781; stroke-width: 1.5 }
.stream-graph .critical .line { stroke: #e16f24; stroke-width: 2.5 }
.stream-graph .solid { fill: #6e7781 }
.stream-graph .critical .solid { fill: #e16f24 }
@media (prefers-color-scheme: dark) {
  .stream-graph text { fill: #9198a1 }
  .stream-graph .title, .stream-graph .name { fill: #f0f6fc }
  .stream-graph .paper { fill: #0d1117 }
  .stream-graph .lane { fill: #151b23 }
  .stream-graph .box { fill: #0f2b4a; stroke: #316dca }
  .stream-graph .critical .box { fill: #3a2010; stroke: #e0823d }
  .stream-graph .terminal .box { fill: #0d1117; stroke: #656c76 }
  .stream-graph .line { stroke: #8b949e }
  .stream-graph .critical .line { stroke: #e0823d }
  .stream-graph .solid { fill: #8b949e }
  .stream-graph .critical .solid { fill: #e0823d }
}
"""


def render_svg(graph: StreamGraph, title: str, cost: Cost | None = None) -> str:
    """Draw a stream graph.

    Parameters
    ----------
    graph
        What to draw. Symbolic dimensions count as 1 in sizes.
    title
        The network's name; `Bundle.label` marks random weights.
    cost
        Of the whole network, for the headline; without it, the headline adds up segments.

    Returns
    -------
    str
        A standalone SVG document; equal arguments give equal documents. Segments carry the
        attribute ``data-segment``, network inputs and outputs ``data-terminal``; edges
        carry ``data-tensor``, and ``data-from`` and ``data-to`` where a segment is at that
        end.
    """
    sketch = _sketch(graph)
    boxes = arrange(sketch.nodes, sketch.arcs, sketch.critical)
    routes = route(boxes, sketch.arcs)
    left = min(box.x for box in boxes) - _PADDING
    width = math.ceil(max(max(box.right for box in boxes) + _PADDING - left, _MIN_WIDTH))
    facts = _facts(graph, cost)

    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "stream-graph"})
    ET.SubElement(root, "title").text = f"Stream graph of {printable(title)}"
    ET.SubElement(root, "desc").text = ", ".join(facts)
    ET.SubElement(root, "style").text = _STYLE
    paper = ET.SubElement(root, "rect", {"class": "paper", "rx": "8"})
    y = _MARGIN + SIZES["title"]
    _add_text(root, (_MARGIN, y), printable(title), width, "title")
    y = _add_facts(root, y + 22, facts, width) + 16

    moved = f"translate({_n(_MARGIN - left)} {_n(y + _PADDING)})"
    lanes = ET.SubElement(root, "g", {"transform": moved})
    y += _PADDING + _add_lanes(lanes, boxes, left, width)
    critical_steps = set(pairwise(sketch.critical))
    for critical in (False, True):  # the critical path lies on top
        for way in routes:
            if ((way.arc.producer, way.arc.consumer) in critical_steps) == critical:
                _add_edge(lanes, way, sketch, critical=critical)
    for index, box in enumerate(boxes):
        _add_box(lanes, box, sketch.captions[index], sketch, critical=index in sketch.critical)

    _add_axis(root, y + 18, width)
    height = math.ceil(_add_legend(root, y + 42, width) + _MARGIN)
    size = {"width": _n(width + 2 * _MARGIN), "height": _n(height)}
    root.attrib |= {**size, "viewBox": f"0 0 {size['width']} {size['height']}", "role": "img"}
    paper.attrib |= size
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


# -------------------------------------------------------------------------- what to draw


@dataclass(frozen=True, slots=True)
class _Sketch:
    """The graph as nodes with captions; network inputs come first and outputs last."""

    nodes: tuple[Node, ...]
    captions: tuple[tuple[str, ...], ...]
    arcs: tuple[Arc, ...]
    critical: tuple[int, ...]
    tensors: dict[str, TensorSpec]


def _sketch(graph: StreamGraph) -> _Sketch:
    nodes: list[Node] = []
    captions: list[tuple[str, ...]] = []
    arcs: list[Arc] = []
    tensors: dict[str, TensorSpec] = {}
    writers: dict[str, int] = {}
    places: dict[str, int] = {}
    for tensor in graph.inputs:
        tensors[tensor.name], writers[tensor.name] = tensor, len(nodes)
        captions.append((printable(tensor.name), *_tensor_lines(tensor)))
        nodes.append(_terminal_node("input", tensor.name, captions[-1]))
    for segment in graph.segments:
        places[segment.name] = len(nodes)
        arcs += [Arc(t.name, writers[t.name], len(nodes)) for t in segment.inputs]
        for tensor in segment.outputs:
            tensors[tensor.name], writers[tensor.name] = tensor, len(nodes)
        captions.append(_segment_lines(segment))
        nodes.append(_segment_node(segment, captions[-1]))
    for tensor in graph.outputs:
        arcs.append(Arc(tensor.name, writers[tensor.name], len(nodes)))
        captions.append((printable(tensor.name),))
        nodes.append(_terminal_node("output", tensor.name, captions[-1]))
    path = graph.critical_path({segment.name: segment.cost.flops for segment in graph.segments})
    critical = tuple(places[name] for name in path)
    return _Sketch(tuple(nodes), tuple(captions), tuple(dict.fromkeys(arcs)), critical, tensors)


def _segment_lines(segment: Segment) -> tuple[str, ...]:
    cost = segment.cost
    return (
        printable(segment.name),
        _flops(cost.flops),
        f"{format_count(cost.parameters)} params",
        f"depth {cost.depth}",
    )


def _tensor_lines(tensor: TensorSpec) -> tuple[str, str]:
    return format_shape(tensor.shape), format_bytes(tensor.size_bytes())


def _segment_node(segment: Segment, lines: Sequence[str]) -> Node:
    outputs = list(chain.from_iterable(map(_tensor_lines, segment.outputs)))
    port_y = _PADDING + _LINE_HEIGHT * (len(lines) + 1) + _ABOVE_PORTS
    below_port = max(
        (len(segment.outputs) - 1) * OUTPUT_SPACING, (len(segment.inputs) - 1) * ENTRY_SPACING, 0
    )
    return Node(
        "segment",
        segment.name,
        work=float(segment.cost.flops),
        min_width=_text_block_width((*lines, *outputs)) + 2 * _PADDING,
        height=port_y + below_port + _LINE_HEIGHT + _PADDING,
        port_y=port_y,
        outputs=tuple(tensor.name for tensor in segment.outputs),
    )


def _terminal_node(kind: Literal["input", "output"], name: str, lines: Sequence[str]) -> Node:
    height = _LINE_HEIGHT * len(lines) + 1.4 * _PADDING
    return Node(
        kind,
        name,
        work=0.0,
        min_width=_text_block_width(lines) + 2 * _PADDING,
        height=height,
        port_y=height / 2,
        outputs=(name,) if kind == "input" else (),
    )


def _text_block_width(lines: Sequence[str]) -> float:
    """Return the width of a name with lines below it, which very long names do not set."""
    name, *others = lines
    return min(max(text_width(name, "name"), *map(text_width, others), 0.0), _MAX_TEXT_WIDTH)


def _flops(value: int) -> str:
    count = format_count(value)
    return f"{count} FLOPs" if count[-1].isdigit() else f"{count}FLOPs"


def _facts(graph: StreamGraph, cost: Cost | None) -> list[str]:
    work = {segment.name: segment.cost.flops for segment in graph.segments}
    if cost is None:
        parameters = sum(segment.cost.parameters for segment in graph.segments)
        totals = [_flops(sum(work.values())), f"{format_count(parameters)} parameters"]
    else:
        totals = [_flops(cost.flops), f"{format_count(cost.parameters)} parameters"]
        totals.append(f"depth {cost.depth}")
    if len(graph.segments) == 1:
        return ["1 segment", *totals, "in one piece: no two parts can run at the same time"]
    critical = _flops(sum(work[name] for name in graph.critical_path(work)))
    speedup = f"ideal speed-up {format_ratio(graph.ideal_speedup(work))}"
    return [
        f"{len(graph.segments)} segments",
        *totals,
        f"{speedup} ({critical} on the critical path)",
    ]


# --------------------------------------------------------------------------- how it looks


def _add_lanes(parent: ET.Element, boxes: Sequence[Box], x: float, width: float) -> float:
    """Draw a band behind every row and return the lower edge of the last."""
    bottom = 0.0
    for row in range(max(box.row for box in boxes) + 1):
        members = [box for box in boxes if box.row == row]
        top = min(box.y for box in members) - _PADDING
        bottom = max(box.bottom for box in members) + _PADDING
        _add_rectangle(parent, "lane", (x, top), (width, bottom - top))
    return bottom


def _add_edge(parent: ET.Element, way: Route, sketch: _Sketch, *, critical: bool) -> None:
    arc = way.arc
    attributes = {
        "class": "edge critical" if critical else "edge",
        "data-tensor": printable(arc.tensor),
    }
    for end, index in (("data-from", arc.producer), ("data-to", arc.consumer)):
        if sketch.nodes[index].kind == "segment":
            attributes[end] = printable(sketch.nodes[index].name)
    group = ET.SubElement(parent, "g", attributes)
    hint = f"{arc.tensor}: {', '.join(_tensor_lines(sketch.tensors[arc.tensor]))}"
    ET.SubElement(group, "title").text = printable(hint)
    *stations, (x, y) = way.stations
    _add_line(group, [*stations, (x - _ARROW + 1, y)])
    _add_arrowhead(group, x, y)


def _add_box(
    parent: ET.Element, box: Box, lines: Iterable[str], sketch: _Sketch, *, critical: bool
) -> None:
    name, is_segment = printable(box.node.name), box.node.kind == "segment"
    attributes = {"class": "terminal", "data-terminal": name}
    if is_segment:
        attributes = {"class": "segment critical" if critical else "segment", "data-segment": name}
    group = ET.SubElement(parent, "g", attributes)
    ET.SubElement(group, "title").text = name
    _add_rectangle(group, "box", (box.x, box.y), (box.width, box.height))
    room = box.width - 2 * _PADDING
    style: Style = "name"
    y = box.y + (1.0 if is_segment else 0.7) * _PADDING + _BASELINE
    for line in lines:
        _add_text(group, (box.x + _PADDING, y), line, room, style)
        style = "text"
        y += _LINE_HEIGHT
    for tensor in box.node.outputs:
        port_x, port_y = box.output_port(tensor)
        circle = {"class": "solid", "cx": _n(port_x), "cy": _n(port_y), "r": "3"}
        ET.SubElement(group, "circle", circle)
        if is_segment:
            above, below = _tensor_lines(sketch.tensors[tensor])
            label_x = box.right - _PADDING
            _add_text(group, (label_x, port_y - 3), above, room, at_end=True)
            _add_text(group, (label_x, port_y - 3 + _LINE_HEIGHT), below, room, at_end=True)


def _add_facts(parent: ET.Element, y: float, facts: Sequence[str], width: float) -> float:
    """Write facts on as many lines as they need and return the baseline of the last."""
    between = "  \N{MIDDLE DOT}  "
    line = facts[0]
    for fact in facts[1:]:
        if text_width(line + between + fact) <= width:
            line += between + fact
        else:
            _add_text(parent, (_MARGIN, y), line, width)
            line, y = fact, y + 18
    _add_text(parent, (_MARGIN, y), line, width)
    return y


def _add_axis(parent: ET.Element, y: float, width: float) -> None:
    group = ET.SubElement(parent, "g", {"class": "axis"})
    label, right = "work done so far", _MARGIN + width
    _add_text(group, (_MARGIN, y + 4), label, width)
    _add_line(group, [(_MARGIN + text_width(label) + 8, y), (right - _ARROW + 1, y)])
    _add_arrowhead(group, right, y)


def _add_legend(parent: ET.Element, y: float, width: float) -> float:
    """Explain colours and widths, and return the y coordinate of the last line."""
    x, sample, between = _MARGIN, 22.0, 24.0
    for style, text in _LEGEND:
        item_width = sample + 8 + text_width(text)
        if x > _MARGIN and x + item_width > _MARGIN + width:
            x, y = _MARGIN, y + 20
        group = ET.SubElement(parent, "g", {"class": style})
        if style == "segment":
            _add_rectangle(group, "box", (x, y - 6), (sample, 12))
        else:
            _add_line(group, [(x, y), (x + sample - _ARROW + 1, y)])
            _add_arrowhead(group, x + sample, y)
        _add_text(group, (x + sample + 8, y + 4), text, width)
        x += item_width + between
    return y


def _add_line(parent: ET.Element, stations: Sequence[tuple[float, float]]) -> None:
    """Draw a line that is level at every station."""
    path = f"M{_n(stations[0][0])} {_n(stations[0][1])}"
    for (x0, y0), (x1, y1) in pairwise(stations):
        middle = _n((x0 + x1) / 2)
        bend = f"C{middle} {_n(y0)} {middle} {_n(y1)} {_n(x1)} {_n(y1)}"
        path += f" {f'H{_n(x1)}' if y0 == y1 else bend}"
    ET.SubElement(parent, "path", {"class": "line", "d": path})


def _add_arrowhead(parent: ET.Element, x: float, y: float) -> None:
    half = _ARROW / 2
    path = f"M{_n(x)} {_n(y)} L{_n(x - _ARROW)} {_n(y - half)} V{_n(y + half)} Z"
    ET.SubElement(parent, "path", {"class": "solid", "d": path})


def _add_rectangle(
    parent: ET.Element, style: str, place: tuple[float, float], size: tuple[float, float]
) -> None:
    names = ("x", "y", "width", "height")
    numbers = {name: _n(value) for name, value in zip(names, (*place, *size), strict=True)}
    ET.SubElement(parent, "rect", {"class": style, **numbers, "rx": "6"})


def _add_text(
    parent: ET.Element,
    place: tuple[float, float],
    text: str,
    room: float,
    style: Style = "text",
    *,
    at_end: bool = False,
) -> None:
    attributes = {"x": _n(place[0]), "y": _n(place[1])}
    if style != "text":
        attributes["class"] = style
    if at_end:
        attributes["text-anchor"] = "end"
    ET.SubElement(parent, "text", attributes).text = shorten(text, room, style)


def _n(value: float) -> str:
    """Return a coordinate with at most one decimal, the same on every machine."""
    return f"{value:.1f}".removesuffix(".0")
