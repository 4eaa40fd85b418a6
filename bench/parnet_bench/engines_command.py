"""The ``parnet-bench engines`` command: torch, whole engines and split streams on one device."""

# Typer reads the annotations at run time, and an option is a parameter.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_export import console, files
from parnet_export.errors import CheckFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from parnet_bench.selftest.engine_comparison import EngineComparison


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("engines")(engines)


def engines(
    networks: Annotated[
        list[str] | None,
        typer.Argument(help="Catalogue names. Default: parnet-l parnet-xl.", show_default=False),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Run fused beside them. Default: resnet34 resnet50.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        str, typer.Option(help="Where to run: 0, 0,1,2, cpu.", metavar="DEVICES")
    ] = "0",
    engine: Annotated[
        str, typer.Option(help="auto, tensorrt, torch or onnxruntime.", metavar="NAME")
    ] = "auto",
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="Of weights and of what is computed.")
    ] = "fp16",
    resolution: Annotated[
        int, typer.Option(min=1, help="Height and width in pixels.", metavar="PX")
    ] = 224,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds, in which every row has a turn.", metavar="N")
    ] = 30,
    runs: Annotated[
        int, typer.Option(min=1, help="Timed runs of a row in a round.", metavar="N")
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Compare torch, whole engines, split streams and the authors' layout on one device.

    Weights are random, batch 1. Rows take turns, in random order.
    """
    if output is not None:
        files.require_writable(output)
    from parnet_bench.selftest.engine_comparison import Request, compare_engines
    from parnet_engines.clock import MonotonicClock

    request = Request(
        tuple(networks or ("parnet-l", "parnet-xl")),
        tuple(("resnet34", "resnet50") if baseline is None else baseline),
        devices=devices,
        engine=engine,
        precision=precision,
        resolution=resolution,
        rounds=rounds,
        runs=runs,
    )
    result = compare_engines(request, MonotonicClock(), console.note)
    console.show(result, render(result), as_json=as_json, output=output)
    if not result.measured:
        raise CheckFailedError(
            f"engines on {devices}: no row could be measured, for the reasons given."
        )


def render(result: EngineComparison) -> Table:
    """Show one row for each way to run a network, and the limits below it."""
    from rich.table import Table

    shown = Table(
        title=console.printable(
            f"{result.device}, {result.precision}, {result.resolution} px, batch 1, random weights"
        ),
        caption=console.printable("\n".join((*result.findings, *result.notes))),
    )
    shown.add_column("network")
    shown.add_column("way")
    for title in ("median ms", "p99 ms", "against the whole engine"):
        shown.add_column(title, justify="right")
    shown.add_column("how")
    limits = {limit.network: limit for limit in result.limits}
    for name in dict.fromkeys(row.network for row in result.rows):
        for row in (row for row in result.rows if row.network == name):
            ratio = row.against_whole
            shown.add_row(
                console.printable(row.network),
                console.printable(row.name),
                "" if row.median_ms is None else f"{row.median_ms:.3f}",
                "" if row.p99_ms is None else f"{row.p99_ms:.3f}",
                ""
                if ratio is None
                else f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
                console.printable(row.reason or f"{row.engine}: {row.execution}"),
            )
        if name in limits:
            limit = limits[name]
            path = limit.path
            for title, value, lacking in (
                ("limit: weights / bandwidth", limit.weights_ms, result.peaks),
                ("limit: FLOPs / peak", limit.compute_ms, result.peaks),
                (
                    "limit: critical path",
                    None if path.reason else path.critical_path_ms,
                    path.reason,
                ),
            ):
                known = value is not None
                cells = (f"{value:.3f}" if known else "", "", "", "" if known else lacking)
                shown.add_row(console.printable(name), title, *map(console.printable, cells))
            if not path.reason:
                overlap = f"lanes overlap {path.overlap:.0%} of the time"
                shown.add_row(console.printable(name), "overlap", "", "", "", overlap)
        shown.add_section()
    return shown
