"""Where the boxes of a stream graph's picture go: in rows, as a function of the work done.

Time runs to the right, with FLOPs as the clock and as many lanes as it takes: a box
starts when everything it reads has been computed. Lengths are in SVG user units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

COLUMN_GAP = 44.0
"""Least distance from a box to one that reads from it; edges change rows in it."""

ROW_GAP = 30.0
"""Distance between rows; edges that find no free row pass through it."""

OUTPUT_SPACING = 34.0
"""Distance between the places where tensors leave a box."""

_MIN_CRITICAL_WIDTH = 480.0
_WIDTH_PER_CRITICAL_NODE = 110.0
_SAME_ROW_GAP = 20.0
_MIN_OVERLAP = 16.0
_NEGLIGIBLE_WORK = 1e-4  # of all work: what a segment without FLOPs is drawn as
_SIMULTANEOUS = 0.01  # of the critical path: starts this close count as simultaneous
_MOST_ROWS_TO_PERMUTE = 6
_MOST_SWEEPS = 8

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Node:
    """Something to draw as a box: a segment, or a tensor that enters or leaves the network.

    Parameters
    ----------
    work
        FLOPs; zero for network inputs and outputs.
    min_width
        What the text in the box needs.
    port_y
        Where the first tensor leaves, below the top; rows align their boxes there.
    outputs
        Tensors that leave the box, from top to bottom.
    """

    kind: Literal["segment", "input", "output"]
    name: str
    work: float
    min_width: float
    height: float
    port_y: float
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arc:
    """One tensor on its way from one node to another; nodes are counted from 0."""

    tensor: str
    producer: int
    consumer: int


@dataclass(frozen=True, slots=True)
class Box:
    """A node in its place; the row is counted from the top."""

    node: Node
    row: int
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """The x coordinate of the right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The y coordinate of the lower edge."""
        return self.y + self.height

    def contains(self, point: tuple[float, float]) -> bool:
        """Whether `point` lies inside, not on the border."""
        x, y = point
        return self.x < x < self.right and self.y < y < self.bottom

    def output_port(self, tensor: str) -> tuple[float, float]:
        """Return where `tensor` leaves the box."""
        index = self.node.outputs.index(tensor)
        return self.right, self.y + self.node.port_y + index * OUTPUT_SPACING


def arrange(nodes: Sequence[Node], arcs: Sequence[Arc], critical: Sequence[int]) -> list[Box]:
    """Give every node its box.

    Boxes of segments that could run at the same time share a range of x and never a row.
    The critical path has a row of its own; any other segment stays in the row of one that
    it reads from if that is free. Rows are ordered so that few edges have to pass a box.

    Parameters
    ----------
    nodes
        In a topological order.
    arcs
        Who reads what from whom.
    critical
        The segments on the critical path, in order.

    Returns
    -------
    list of Box
        One for every node, in the order of `nodes`. The output ports of a box are in the
        order of the rows that read from them.
    """
    spans = _spans(nodes, arcs, critical)
    rows = _assign_rows(nodes, arcs, critical, spans)
    place = {row: index for index, row in enumerate(_order_rows(arcs, rows, spans))}
    rows = [place[row] for row in rows]
    nodes = [_sort_ports(node, index, arcs, rows) for index, node in enumerate(nodes)]

    tops: list[float] = []
    heights: list[float] = []
    ports_y: list[float] = []
    for row in range(len(place)):
        members = [node for node, its_row in zip(nodes, rows, strict=True) if its_row == row]
        tops.append(tops[-1] + heights[-1] + ROW_GAP if tops else 0.0)
        ports_y.append(max(node.port_y for node in members))
        heights.append(max(ports_y[-1] - node.port_y + node.height for node in members))
    boxes = [
        Box(
            node,
            row,
            x=left,
            y=tops[row] + ports_y[row] - node.port_y,
            width=right - left,
            # Segments of a row are equally high, which makes the row a lane to the eye.
            height=heights[row] if node.kind == "segment" else node.height,
        )
        for node, row, (left, right) in zip(nodes, rows, spans, strict=True)
    ]
    for arc in arcs:
        producer, consumer = boxes[arc.producer], boxes[arc.consumer]
        if consumer.node.kind == "output" and consumer.row == producer.row:
            _, port_y = producer.output_port(arc.tensor)
            boxes[arc.consumer] = replace(consumer, y=port_y - consumer.node.port_y)
    return boxes


def _sort_ports(node: Node, index: int, arcs: Iterable[Arc], rows: Sequence[int]) -> Node:
    """Order a node's output ports by the rows they lead to, so that edges need not cross."""
    targets: dict[str, list[int]] = {tensor: [] for tensor in node.outputs}
    for arc in arcs:
        if arc.producer == index:
            targets[arc.tensor].append(rows[arc.consumer])
    means = {tensor: sum(to) / len(to) if to else 0.0 for tensor, to in targets.items()}
    return replace(node, outputs=tuple(sorted(node.outputs, key=means.__getitem__)))


# ------------------------------------------------------------------------------- columns


def _spans(nodes: Sequence[Node], arcs: Sequence[Arc], critical: Sequence[int]) -> list[Span]:
    """Return the x range of every node.

    Starts and ends of segments keep their order in time, as if the clock ran slower where
    the text of a small segment, or an edge, needs the room.
    """
    producers: list[list[int]] = [[] for _ in nodes]
    for arc in arcs:
        producers[arc.consumer].append(arc.producer)
    segments = [index for index, node in enumerate(nodes) if node.kind == "segment"]
    times = _times(nodes, producers, segments)
    tolerance = _SIMULTANEOUS * max(end for _, end in times.values())
    critical_work = sum(times[index][1] - times[index][0] for index in critical)
    scale = max(_MIN_CRITICAL_WIDTH, _WIDTH_PER_CRITICAL_NODE * len(critical)) / critical_work

    inputs = [index for index, node in enumerate(nodes) if node.kind == "input"]
    first_x = max((nodes[index].min_width + COLUMN_GAP for index in inputs), default=0.0)
    # At the same time, ends come before starts: what starts may have waited for the end.
    events = sorted(
        (time, is_start, index)
        for index in segments
        for time, is_start in zip(times[index], (True, False), strict=True)
    )
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    passed: list[tuple[float, float]] = []  # (time, x) of every event so far
    for time, is_start, index in events:
        least = max((x for before, x in passed if before < time - tolerance), default=first_x)
        if is_start:
            waited_for = (ends[i] + COLUMN_GAP for i in producers[index] if i in ends)
            starts[index] = x = max(least, *waited_for, first_x)
        else:
            width = max(nodes[index].min_width, scale * (time - times[index][0]))
            shared = (
                starts[other] + _MIN_OVERLAP
                for other in starts
                if times[other][0] < time - tolerance
            )
            ends[index] = x = max(least, starts[index] + width, *shared)
        passed.append((time, x))
    # The critical path never waits, so its boxes reach to those that read from them.
    for index in critical[:-1]:
        readers = (i for i in segments if index in producers[i])
        ends[index] = min(starts[reader] for reader in readers) - COLUMN_GAP

    spans = []
    for index, node in enumerate(nodes):
        if node.kind == "segment":
            spans.append((starts[index], ends[index]))
        elif node.kind == "input":
            spans.append((first_x - COLUMN_GAP - node.min_width, first_x - COLUMN_GAP))
        else:
            x = max((spans[i][1] for i in producers[index]), default=0.0) + COLUMN_GAP
            spans.append((x, x + node.min_width))
    return spans


def _times(
    nodes: Sequence[Node], producers: Sequence[Sequence[int]], segments: Sequence[int]
) -> dict[int, Span]:
    """Return when each segment starts and ends on unlimited lanes, in FLOPs done before."""
    total = sum(nodes[index].work for index in segments)
    least = total * _NEGLIGIBLE_WORK or 1.0
    times: dict[int, Span] = {}
    for index in segments:
        start = max((times[i][1] for i in producers[index] if i in times), default=0.0)
        times[index] = (start, start + max(nodes[index].work, least))
    return times


# ---------------------------------------------------------------------------------- rows


class _Rows:
    """Rows that fill up with nodes; the critical path has taken the first."""

    def __init__(self, spans: Sequence[Span], critical: Sequence[int]) -> None:
        self._spans = spans
        self._members = [list(critical)]
        self.row_of = dict.fromkeys(critical, 0)

    def place(
        self,
        index: int,
        candidates: Iterable[int],
        rights: Sequence[float],
        stacked: Collection[int] = (),
    ) -> bool:
        """Put a node into the first row in which nothing but `stacked` is too near."""
        left, right = self._spans[index][0] - _SAME_ROW_GAP, rights[index] + _SAME_ROW_GAP
        for row in candidates:
            if row == len(self._members):
                self._members.append([])
            others = (other for other in self._members[row] if other not in stacked)
            if all(right <= self._spans[i][0] or rights[i] <= left for i in others):
                self._members[row].append(index)
                self.row_of[index] = row
                return True
        return False

    def up_to_new(self, first: int) -> range:
        """Return the rows from `first` on, and one more."""
        return range(first, len(self._members) + 1)

    def beside(self, others: Iterable[int]) -> list[int]:
        """Return the rows of the nodes that have one, of those that end last first."""
        placed = [other for other in others if other in self.row_of]
        placed.sort(key=lambda other: (-self._spans[other][1], other))
        return [self.row_of[other] for other in placed]


def _assign_rows(
    nodes: Sequence[Node], arcs: Sequence[Arc], critical: Sequence[int], spans: Sequence[Span]
) -> list[int]:
    """Return a row for every node; the critical path's is row 0."""
    beside: list[list[int]] = [[] for _ in nodes]
    for arc in arcs:
        # A network input goes beside what reads it, anything else beside what it reads.
        is_input = nodes[arc.producer].kind == "input"
        index, other = (arc.producer, arc.consumer) if is_input else (arc.consumer, arc.producer)
        beside[index].append(other)
    order = sorted(range(len(nodes)), key=lambda i: (spans[i][0], -nodes[i].work))
    rows = _Rows(spans, critical)

    rights = _rights_with_outputs(nodes, arcs, spans)
    for index in order:
        if nodes[index].kind == "segment" and index not in rows.row_of:
            own = [row for row in rows.beside(beside[index]) if row > 0]
            rows.place(index, [*own, *rows.up_to_new(1)], rights)

    rights = [right for _, right in spans]
    terminals = [index for index in order if nodes[index].kind != "segment"]
    # Outputs of one segment stand one above the other, each beside its port.
    outputs = [index for index in terminals if nodes[index].kind == "output"]
    stacks = {i: [j for j in outputs if beside[j] == beside[i]] for i in terminals}
    crowded = [
        index
        for index in terminals
        if not rows.place(index, rows.beside(beside[index]), rights, stacks[index])
    ]
    for index in crowded:
        rows.place(index, rows.up_to_new(0), rights)
    return [rows.row_of[index] for index in range(len(nodes))]


def _rights_with_outputs(
    nodes: Sequence[Node], arcs: Sequence[Arc], spans: Sequence[Span]
) -> list[float]:
    """Return right edges, with room for the network output behind a segment that ends a row."""
    read_on = {arc.producer for arc in arcs if nodes[arc.consumer].kind == "segment"}
    rights = [right for _, right in spans]
    for arc in arcs:
        if arc.producer not in read_on:
            rights[arc.producer] = max(rights[arc.producer], spans[arc.consumer][1])
    return rights


def _order_rows(arcs: Sequence[Arc], rows: Sequence[int], spans: Sequence[Span]) -> Sequence[int]:
    """Return the rows from top to bottom, so that edges pass few boxes and are short."""
    blocked = [_blocked_rows(arc, rows, spans) for arc in arcs]
    edges = [
        (rows[arc.producer], rows[arc.consumer], *rows_in_the_way)
        for arc, rows_in_the_way in zip(arcs, blocked, strict=True)
        if rows[arc.producer] != rows[arc.consumer]
    ]

    def cost(order: Sequence[int]) -> tuple[int, int]:
        place = {row: index for index, row in enumerate(order)}
        passed_boxes = length = 0
        for source, target, early, late in edges:
            step = 1 if place[target] > place[source] else -1
            between = order[place[source] + step : place[target] : step]
            # The edge changes rows early up to some gap between rows, then late.
            passed_boxes += min(
                sum(row in early for row in between[:split])
                + sum(row in late for row in between[split:])
                for split in range(len(between) + 1)
            )
            length += len(between) + 1
        return passed_boxes, length

    order = tuple(range(max(rows) + 1))
    if len(order) <= _MOST_ROWS_TO_PERMUTE:
        return min(permutations(order), key=cost)
    best = cost(order)
    for _ in range(_MOST_SWEEPS):
        before = best
        for upper in range(len(order) - 1):
            swapped = (*order[:upper], order[upper + 1], order[upper], *order[upper + 2 :])
            if (swapped_cost := cost(swapped)) < best:
                order, best = swapped, swapped_cost
        if best == before:
            break
    return order


def _blocked_rows(
    arc: Arc, rows: Sequence[int], spans: Sequence[Span]
) -> tuple[frozenset[int], frozenset[int]]:
    """Return the rows with a box just after the arc's producer, and just before its consumer."""
    leaves, arrives = spans[arc.producer][1], spans[arc.consumer][0]
    early = (leaves, leaves + COLUMN_GAP)
    late = (arrives - COLUMN_GAP, arrives)
    return _rows_within(early, rows, spans), _rows_within(late, rows, spans)


def _rows_within(x_range: Span, rows: Sequence[int], spans: Sequence[Span]) -> frozenset[int]:
    return frozenset(
        row
        for row, (left, right) in zip(rows, spans, strict=True)
        if left < x_range[1] and x_range[0] < right
    )
