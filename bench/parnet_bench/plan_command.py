"""The ``parnet-bench plan`` command: what a network would take on machines not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_export import console
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_bench.hypothetical import Changes

_DEFAULT_MODEL = "rtx3090"
_DEFAULT_NETWORK = "parnet-l"


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("plan")(plan_network)


def plan_network(
    target: Annotated[
        str | None,
        typer.Argument(
            help="Bundle, ONNX file or catalogue name; parnet-l where only widths are given.",
            metavar="[TARGET]",
            show_default=False,
        ),
    ] = None,
    num_devices: Annotated[
        int, typer.Option(min=1, max=16, help="Plan for 1 to this many devices.", metavar="N")
    ] = 3,
    link: Annotated[
        str,
        typer.Option(
            help="Between devices: nvlink4, pcie4, pcie5, ethernet100, or LATENCY_US,GB_S.",
            metavar="LINK",
        ),
    ] = "pcie4",
    lanes: Annotated[int, typer.Option(min=1, help="Lanes on each device.", metavar="K")] = 1,
    objective: Annotated[
        Literal["latency", "throughput"], typer.Option(help="What the plan is to make best.")
    ] = "latency",
    in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Inferences that overlap. Default: 1; for throughput, one for each lane.",
            metavar="N",
        ),
    ] = None,
    plan: Annotated[
        str,
        typer.Option(
            help="auto, whole (one engine), streams, authors (the paper's three devices), or a "
            "plan's file.",
            metavar="PLAN",
        ),
    ] = "auto",
    costs: Annotated[
        Path | None,
        typer.Option(help="Measured costs. Default: those in the bundle, if any.", metavar="F"),
    ] = None,
    device_model: Annotated[
        str | None,
        typer.Option(
            help="Estimate costs for rtx3090, a100, h100, or TFLOPS,GB_S,LAUNCH_US, instead.",
            metavar="MODEL",
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(min=2, help="A ParNet like the target with so many streams.", metavar="N"),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(help="A ParNet like the target with these widths.", metavar="W,W[,W...]"),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="And with these blocks in its streams.", metavar="B,B[,B...]")
    ] = None,
    level: Annotated[
        Literal["none", "repvgg", "full"] | None,
        typer.Option(help="How far a catalogue network is fused. Default: full."),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Its height and width in pixels.", metavar="PX"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in one inference.", metavar="N")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16"] | None, typer.Option(help="Of a catalogue network. Default: fp32.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Draw the last row's timeline, as SVG.", metavar="F")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write it for ui.perfetto.dev or chrome://tracing.", metavar="F"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Predict latencies on 1 to N devices, without running anything.

    A network needs no weights for this, and need not exist: --widths, --blocks and
    --streams describe one.
    """
