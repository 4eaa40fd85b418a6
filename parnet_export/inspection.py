"""What a bundle holds: its segments, their costs, and how much of the work is parallel.

`inspect` gathers the facts into one plain value, `as_dict` turns them into JSON, and
`render` into tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from parnet_export.console import (
    format_bytes,
    format_count,
    format_percent,
    format_ratio,
    format_shape,
    printable,
)
from parnet_export.splitting.antichain import heaviest_antichain, parallel_width

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Group
    from rich.table import Table

    from parnet_export.bundle import Bundle, Precision, Provenance
    from parnet_export.stream_graph import StreamGraph, TensorSpec

_NETWORK_INPUT = "(input)"
_NETWORK_OUTPUT = "(output)"
_SEGMENT_NAME_WIDTH = 14


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """One segment and what it costs by itself; symbolic dimensions count as 1.

    Parameters
    ----------
    flops
        Two for each multiply-accumulate of convolutions and matrix products.
    work_share
        This segment's part of all segments' FLOPs, between 0 and 1.
    depth
        Longest chain of convolution or linear layers inside the segment.
    critical
        Whether it lies on the critical path.
    inputs, outputs
        Names of the tensors that cross its boundary.
    """

    name: str
    nodes: int
    parameters: int
    flops: int
    work_share: float
    depth: int
    weight_bytes: int
    activation_bytes: int
    critical: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor on its way between two segments, or into or out of the network.

    Parameters
    ----------
    producer
        The segment that writes the tensor; ``None`` for a network input.
    consumer
        A segment that reads it; ``None`` for a network output.
    size_bytes
        Bytes of the tensor, with symbolic dimensions counted as 1.
    """

    tensor: str
    producer: str | None
    consumer: str | None
    dtype: str
    shape: tuple[int | str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Stream:
    """One of the segments that can run at the same time.

    Parameters
    ----------
    relative_work
        Its FLOPs relative to those of the largest stream, between 0 and 1.
    """

    name: str
    flops: int
    relative_work: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything `render` and ``--json`` show of a bundle.

    Parameters
    ----------
    label
        The network's name, marked when its weights are random.
    batch
        First dimension of the first image-like input; a name if dynamic, ``None`` without one.
    resolution
        Height and width of that input.
    parameters, flops, depth, nodes, weight_bytes, activation_bytes
        Of the whole network; weights that segments share count once. The depth is the
        longest chain of convolution or linear layers.
    stored_bytes
        Bytes of the bundle's files on disk.
    parallel_width
        The most segments that do not depend on each other.
    streams
        The independent segments that hold the most work together.
    stream_balance
        Mean work of the streams divided by the work of the largest: 1 when all are equal.
    critical_path
        The chain of segments with the most FLOPs.
    critical_flops
        Work on the critical path.
    ideal_speedup
        All segments' work divided by the work on the critical path: what free lanes and
        free transfers would give.
    """

    label: str
    provenance: Provenance
    precision: Precision
    batch: int | str | None
    resolution: tuple[int | str, int | str] | None
    segments: tuple[SegmentCost, ...]
    transfers: tuple[Transfer, ...]
    parameters: int
    flops: int
    depth: int
    nodes: int
    weight_bytes: int
    activation_bytes: int
    stored_bytes: int
    parallel_width: int
    streams: tuple[Stream, ...]
    stream_balance: float
    critical_path: tuple[str, ...]
    critical_flops: int
    ideal_speedup: float

    @property
    def in_one_piece(self) -> bool:
        """Whether the network is a single segment."""
        return len(self.segments) == 1


def inspect(bundle: Bundle) -> Inspection:
    """Gather what a bundle holds. Nothing is read from disk."""
    manifest, graph = bundle.manifest, bundle.stream_graph
    work = {segment.name: segment.cost.flops for segment in graph.segments}
    critical_path = graph.critical_path(work)
    streams = _streams(graph, work)
    batch, resolution = _image_size(graph.inputs)
    whole = manifest.whole_cost
    return Inspection(
        label=bundle.label,
        provenance=manifest.provenance,
        precision=manifest.precision,
        batch=batch,
        resolution=resolution,
        segments=_segment_costs(graph, work, frozenset(critical_path)),
        transfers=_transfers(graph),
        parameters=whole.parameters,
        flops=whole.flops,
        depth=whole.depth,
        nodes=whole.nodes,
        weight_bytes=whole.weight_bytes,
        activation_bytes=whole.activation_bytes,
        stored_bytes=sum(stored.size_bytes for stored in manifest.files.values()),
        parallel_width=parallel_width(graph),
        streams=streams,
        stream_balance=(
            sum(stream.relative_work for stream in streams) / len(streams) if streams else 1.0
        ),
        critical_path=critical_path,
        critical_flops=sum(work[name] for name in critical_path),
        ideal_speedup=graph.ideal_speedup(work),
    )


def as_dict(inspection: Inspection) -> dict[str, object]:
    """Return an inspection as plain values, ready for JSON; keys are the attributes' names."""
    return msgspec.json.decode(msgspec.json.encode(inspection), type=dict[str, object])


def _streams(graph: StreamGraph, work: Mapping[str, int]) -> tuple[Stream, ...]:
    names = heaviest_antichain(graph, work)
    largest = max((work[name] for name in names), default=0)
    return tuple(Stream(name, work[name], work[name] / largest) for name in names)


def _segment_costs(
    graph: StreamGraph, work: Mapping[str, int], critical: frozenset[str]
) -> tuple[SegmentCost, ...]:
    total = sum(work.values())
    return tuple(
        SegmentCost(
            name=segment.name,
            nodes=segment.cost.nodes,
            parameters=segment.cost.parameters,
            flops=segment.cost.flops,
            work_share=segment.cost.flops / total if total else 0.0,
            depth=segment.cost.depth,
            weight_bytes=segment.cost.weight_bytes,
            activation_bytes=segment.cost.activation_bytes,
            critical=segment.name in critical,
            inputs=tuple(tensor.name for tensor in segment.inputs),
            outputs=tuple(tensor.name for tensor in segment.outputs),
        )
        for segment in graph.segments
    )


def _transfers(graph: StreamGraph) -> tuple[Transfer, ...]:
    producers = {tensor.name: s.name for s in graph.segments for tensor in s.outputs}
    into_segments = [
        _transfer(tensor, producers.get(tensor.name), segment.name)
        for segment in graph.segments
        for tensor in segment.inputs
    ]
    out = [_transfer(tensor, producers.get(tensor.name), None) for tensor in graph.outputs]
    return (*into_segments, *out)


def _transfer(tensor: TensorSpec, producer: str | None, consumer: str | None) -> Transfer:
    return Transfer(
        tensor.name, producer, consumer, tensor.dtype, tensor.shape, tensor.size_bytes()
    )


def _image_size(
    inputs: tuple[TensorSpec, ...],
) -> tuple[int | str | None, tuple[int | str, int | str] | None]:
    for tensor in inputs:
        if len(tensor.shape) == 4:
            batch, _, height, width = tensor.shape
            return batch, (height, width)
    return None, None


# ------------------------------------------------------------------------------- tables


def render(inspection: Inspection) -> Group:
    """Return an inspection as tables for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    return Group(
        Text(printable(inspection.label), style="bold"),
        _facts(_origin_facts(inspection)),
        Text("\nSegments", style="bold"),
        _segment_table(inspection),
        Text(_tensor_heading(inspection), style="bold"),
        _tensor_table(inspection),
        Text("\nParallel work", style="bold"),
        _facts(_parallel_facts(inspection)),
    )


def _tensor_heading(inspection: Inspection) -> str:
    types = {transfer.dtype for transfer in inspection.transfers}
    return f"\nTensors between segments{f' ({types.pop()})' if len(types) == 1 else ''}"


def _facts(facts: list[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, Text(printable(value)))
    return grid


def _origin_facts(inspection: Inspection) -> list[tuple[str, str]]:
    origin = inspection.provenance
    weights = {
        "trained": f"trained, from {origin.source}",
        "random": f"random, from seed {origin.seed}",
        "unknown": f"of unknown origin, from {origin.source}",
    }[origin.weights]
    facts = [("weights", weights)]
    if origin.activation:
        facts.append(("activation", origin.activation))
    if origin.level:
        facts.append(("fuse level", origin.level))
    if origin.detections is not None:
        facts.append(("returns", origin.detections.description))
    if origin.input_form is not None:
        facts.append(("preprocessing", origin.input_form.description))
    facts.append(("precision", inspection.precision))
    if inspection.batch is not None:
        dynamic = isinstance(inspection.batch, str)
        facts.append(("batch", "any (figures are for 1)" if dynamic else str(inspection.batch)))
    if inspection.resolution is not None:
        facts.append(("resolution", format_shape(inspection.resolution)))
    facts.append(("on disk", format_bytes(inspection.stored_bytes)))
    return facts


def _parallel_facts(inspection: Inspection) -> list[tuple[str, str]]:
    depth = ("depth", f"{inspection.depth} convolution or linear layers in a row")
    if inspection.in_one_piece:
        return [
            depth,
            ("streams", "none: the network is in one piece, no two parts of it can overlap"),
        ]
    facts = [depth, ("parallel width", f"{inspection.parallel_width} segments")]
    if inspection.parallel_width == 1:
        facts[-1] = ("parallel width", "1 segment: each one waits for the one before")
    else:
        streams = ", ".join(
            f"{stream.name} {format_percent(stream.relative_work)}" for stream in inspection.streams
        )
        facts += [
            ("streams", f"{streams} (work, relative to the largest)"),
            ("stream balance", f"{format_percent(inspection.stream_balance)} (mean / largest)"),
        ]
    total = sum(segment.flops for segment in inspection.segments)
    speedup = (
        f"{format_ratio(inspection.ideal_speedup)} ({format_count(total)} FLOPs in all, "
        f"{format_count(inspection.critical_flops)} on the critical path)"
    )
    return [
        *facts,
        ("critical path", " > ".join(inspection.critical_path)),
        ("ideal speed-up", speedup),
    ]


def _segment_table(inspection: Inspection) -> Table:
    from rich.text import Text

    table = _plain_table(show_footer=not inspection.in_one_piece)
    table.add_column("name", "whole", overflow="fold")
    for header, footer in (
        ("FLOPs", format_count(inspection.flops)),
        ("work", ""),
        ("params", format_count(inspection.parameters)),
        ("depth", str(inspection.depth)),
        ("nodes", str(inspection.nodes)),
        ("weights", format_bytes(inspection.weight_bytes)),
        ("activations", format_bytes(inspection.activation_bytes)),
    ):
        table.add_column(header, footer, justify="right", no_wrap=True)
    for segment in inspection.segments:
        table.add_row(
            Text(printable(segment.name)),
            format_count(segment.flops),
            format_percent(segment.work_share),
            format_count(segment.parameters),
            str(segment.depth),
            str(segment.nodes),
            format_bytes(segment.weight_bytes),
            format_bytes(segment.activation_bytes),
            style="bold" if segment.critical and not inspection.in_one_piece else "",
        )
    return table


def _tensor_table(inspection: Inspection) -> Table:
    from rich.text import Text

    consumers: dict[str, list[str]] = {}
    for transfer in inspection.transfers:
        consumers.setdefault(transfer.tensor, []).append(transfer.consumer or _NETWORK_OUTPUT)
    tensors = {transfer.tensor: transfer for transfer in inspection.transfers}
    several_types = len({transfer.dtype for transfer in inspection.transfers}) > 1

    table = _plain_table()
    names = [segment.name for segment in inspection.segments]
    segment_width = min(max(map(len, (*names, _NETWORK_OUTPUT))), _SEGMENT_NAME_WIDTH)
    table.add_column("tensor", overflow="fold", min_width=_SEGMENT_NAME_WIDTH)
    table.add_column("from", overflow="fold", min_width=segment_width)
    table.add_column("to", overflow="fold", min_width=segment_width)
    table.add_column("shape", justify="right", no_wrap=True)
    if several_types:
        table.add_column("type", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for name, readers in consumers.items():
        tensor = tensors[name]
        table.add_row(
            Text(printable(name)),
            Text(printable(tensor.producer or _NETWORK_INPUT)),
            Text(printable(", ".join(readers))),
            format_shape(tensor.shape),
            *([tensor.dtype] if several_types else []),
            format_bytes(tensor.size_bytes),
        )
    return table


def _plain_table(*, show_footer: bool = False) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD, show_edge=False, show_footer=show_footer, padding=(0, 1, 0, 0)
    )
