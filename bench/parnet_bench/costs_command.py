"""The ``parnet-bench costs`` command: what each segment takes on the devices at hand."""

# Typer reads the annotations at run time, and an option is a parameter.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_export import console, files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from rich.console import Group

    from parnet_engines.planning.cost_table import CostTable, SegmentCost
    from parnet_export.bundle import Bundle

Engine = Literal["auto", "onnxruntime", "torch", "tensorrt"]


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("costs")(costs)


def costs(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    devices: Annotated[
        str, typer.Option(help="Where to run: cpu, cores such as cpu:0-3,cpu:4-7, or a GPU: 0.")
    ] = "cpu",
    engine: Annotated[
        Engine,
        typer.Option(
            help="Runtime. On the CPU, onnxruntime is the only one. "
            "auto: on GPUs the first that can be used."
        ),
    ] = "auto",
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
    """Measure every segment, alone and beside busy lanes, and keep that.

    What is measured is kept in the bundle's folder with the machine it belongs to: plans
    rest on it from then on.
    """
    from parnet_bench.forecasts.cost_place import on_cores, on_gpu
    from parnet_engines.cuda.devices import names_gpus
    from parnet_engines.planning.bundle_costs import add_bundle_costs
    from parnet_export.bundle import open_bundle

    if output is not None:
        files.require_writable(output)
    opened = open_bundle(bundle)
    if names_gpus(devices):
        _require_no_threads(threads)
        place = on_gpu(opened, devices, lanes=lanes, engine=engine)
    else:
        _require_onnxruntime(engine)
        place = on_cores(opened, devices, lanes=lanes, threads=threads)
    known = place.known
    if not show:
        with console.working(f"measuring {opened.label}"):
            measured = place.measure()
        add_bundle_costs(opened, measured)
        known = known.of_environment(measured[0].environment).updated(measured)
    # Estimates stand in only for what was never measured.
    shown = place.estimates.updated(known.entries)
    console.show(shown, render(opened, shown), as_json=as_json, output=output)


def _require_no_threads(threads: int | None) -> None:
    if threads is not None:
        problem = "is a number of CPU threads, and the device is a GPU"
        raise InputError(f"--threads {threads}", problem, "Leave it out, or use --lanes")


def _require_onnxruntime(engine: str) -> None:
    if engine not in {"auto", "onnxruntime"}:
        problem = "is for GPUs here: plans for CPUs rest on what ONNX Runtime takes"
        raise InputError(f"--engine {engine}", problem, "Leave it out, or use --devices 0")


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
        lines.append(f"~ Estimated for: {' and '.join(sources['estimated'])}.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
