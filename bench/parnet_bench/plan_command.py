"""The ``parnet-bench plan`` command: what a network would take on machines not at hand."""

# Typer reads the annotations at run time, and an option is a parameter.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_export import console
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_bench.forecasts.forecast import Detail


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
    lanes: Annotated[
        int, typer.Option(min=1, help="Lanes on each device, at most.", metavar="K")
    ] = 1,
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
    save_plan: Annotated[
        Path | None,
        typer.Option(help="Write its plan, as --plan and sessions read it.", metavar="F"),
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
    from parnet_bench.forecasts.forecast import PLANS, forecast
    from parnet_bench.forecasts.hypothetical import Changes
    from parnet_bench.forecasts.inputs import Target, find_costs, parse_numbers, sketch_target
    from parnet_bench.forecasts.table import render
    from parnet_engines.planning.links import parse_link

    for path in (svg, trace, save_plan, output):
        if path is not None and not path.parent.is_dir():
            raise InputError(path, "lies in no existing folder", "Create the folder first")
    if save_plan is not None and plan not in PLANS:
        raise InputError("--save-plan", f"{plan} is saved already", "Leave one of the two out")
    between = parse_link(link)
    changes = Changes(streams, parse_numbers("--widths", widths), parse_numbers("--blocks", blocks))
    wanted = Target(target, changes, level, resolution, batch, precision)
    with console.working(f"counting {target or 'the network'}"):
        network = sketch_target(wanted)
    found = find_costs(network, costs=costs, device_model=device_model, lanes_per_device=lanes)
    with console.working("planning"):
        result, detail = forecast(
            network,
            found,
            between,
            plan=plan,
            objective=objective,
            num_devices=num_devices,
            lanes_per_device=lanes,
            in_flight=in_flight,
        )
    title = f"{network.name}, {result.rows[-1].devices} x {found.basis.environment}"
    if found.basis.source == "estimated":
        title += " (estimated)"
    _write(detail, title, svg=svg, trace=trace, plan_path=save_plan)
    console.show(result, render(result, detail), as_json=as_json, output=output)


def _write(
    detail: Detail, title: str, *, svg: Path | None, trace: Path | None, plan_path: Path | None
) -> None:
    from parnet_engines.planning.plan_file import save_plan
    from parnet_engines.timeline.picture import render_timeline_svg
    from parnet_engines.timeline.trace_file import encode_trace
    from parnet_export import files

    if svg is not None:
        picture = render_timeline_svg(detail.program, detail.recording, detail.analysis, title)
        files.write_text(svg, picture)
    if trace is not None:
        files.write_bytes(trace, encode_trace(detail.program, detail.recording, title))
    if plan_path is not None and detail.plan is not None:
        save_plan(plan_path, detail.plan)
