"""The ``parnet-bench costs`` command: what each segment takes on the cores at hand."""

# Typer reads the annotations at run time, and an option is a parameter.
# ruff: noqa: TC003

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parnet_export import console, files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group

    from parnet_engines.planning.cost_table import CostTable, SegmentCost
    from parnet_engines.planning.devices import Device
    from parnet_engines.schedule.placement import Lane
    from parnet_export.bundle import Bundle


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("costs")(costs)


def costs(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    devices: Annotated[
        str, typer.Option(help="Where to run: cpu, or cores such as cpu:0-3,cpu:4-7.")
    ] = "cpu",
    lanes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measure for so many lanes. Default: for 1 to as many as can be of use.",
            metavar="K",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU cores in all. Default: all.", metavar="N")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing; show what is known, or estimated.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Measure every segment with ONNX Runtime, alone and beside busy lanes, and keep that.

    What is measured is kept in the bundle's folder with the machine it belongs to: plans
    rest on it from then on.
    """
    from parnet_engines.planning.bundle_costs import add_bundle_costs, load_bundle_costs
    from parnet_engines.planning.devices import parse_devices
    from parnet_export.bundle import open_bundle

    if output is not None:
        files.require_writable(output)
    opened = open_bundle(bundle)
    offered = lane_choices(opened, parse_devices(devices, threads=threads), lanes)
    if not show:
        with console.working(f"measuring {opened.label}"):
            measured = _measure(opened, offered)
        add_bundle_costs(opened, measured)
    # Estimates stand in only for what was never measured.
    known = _estimates(opened, offered).updated(load_bundle_costs(opened).entries)
    console.show(known, render(opened, known), as_json=as_json, output=output)


def lane_choices(
    bundle: Bundle, devices: Sequence[Device], lanes: int | None
) -> list[tuple[Lane, ...]]:
    """Return the lanes to measure on: the devices' cores divided evenly, for each number."""
    from parnet_engines.planning.devices import divide
    from parnet_engines.planning.lane_sets import default_lanes

    most = default_lanes(bundle.stream_graph, devices)
    counts = range(len(devices), most + 1) if lanes is None else [lanes]
    return [divide(devices, count) for count in counts]


def _estimates(bundle: Bundle, offered: Sequence[Sequence[Lane]]) -> CostTable:
    """Return estimates for what `_measure` measures."""
    from parnet_engines.planning.bundle_costs import estimated_costs
    from parnet_engines.planning.cost_table import WHOLE, CostTable, lane_threads

    beside = {
        (lane_threads(lane), sum(other.device == lane.device for other in lanes))
        for lanes in offered
        for lane in lanes
    }
    costs = estimated_costs(bundle, offered)
    kept = (
        entry
        for entry in costs.entries
        if entry.busy_lanes == 1
        or (entry.segment != WHOLE and (entry.threads, entry.busy_lanes) in beside)
    )
    return CostTable(tuple(kept), costs.network)


def _measure(bundle: Bundle, offered: Sequence[Sequence[Lane]]) -> list[SegmentCost]:
    from parnet_engines.planning.cost_measure import measure_costs, measure_whole
    from parnet_engines.planning.cost_table import lane_threads
    from parnet_engines.session import Session

    open_program = partial(Session.load, bundle)
    measured: list[SegmentCost] = []
    by_width = {lane_threads(lane): lane for lanes in offered for lane in lanes}
    for lanes in offered:
        measured += measure_costs(bundle, lanes, open_program)
    for lane in by_width.values():
        measured += measure_whole(bundle, lane, open_program)
    return measured


def render(bundle: Bundle, costs: CostTable) -> Group:
    """Return costs as a table with a column for each situation."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from parnet_engines.planning.cost_table import WHOLE

    situations = sorted({(entry.threads, entry.busy_lanes) for entry in costs.entries})
    found = {(entry.segment, entry.threads, entry.busy_lanes): entry for entry in costs.entries}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("segment")
    for threads, busy in situations:
        where = "alone" if busy == 1 else f"{busy} lanes busy"
        table.add_column(f"{_count(threads, 'thread')}\n{where}", justify="right")
    for name in [*(segment.name for segment in bundle.stream_graph.segments), WHOLE]:
        cells = (found.get((name, *situation)) for situation in situations)
        table.add_row(console.printable(name), *(_cell(entry) for entry in cells))
    return Group(
        Text(console.printable(bundle.label), style="bold"),
        table,
        *(Text(console.printable(line)) for line in _legend(costs)),
    )


def _cell(entry: SegmentCost | None) -> str:
    if entry is None:
        return ""
    mark = "~" if entry.source == "estimated" else ""
    return mark + console.format_ms(entry.latency_ms).removesuffix(" ms")


def _legend(costs: CostTable) -> list[str]:
    sources = {
        source: sorted({e.environment for e in costs.entries if e.source == source})
        for source in ("measured", "estimated")
    }
    lines = ["Milliseconds."]
    if sources["measured"]:
        lines.append(f"Measured on {' and '.join(sources['measured'])}.")
    if sources["estimated"]:
        lines.append(f"~ Estimated for a {' and a '.join(sources['estimated'])}.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
