"""The ``parnet-bench timeline`` command: what lanes really do, and why they do not overlap."""

# An option is a parameter.

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parnet_bench.latency_options import Engine  # noqa: TC001 - Typer reads it
from parnet_export import console, files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.planning.cost_table import CostTable
    from parnet_engines.schedule.program import Program
    from parnet_export.bundle import Bundle


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("timeline")(timeline)


def timeline(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    devices: Annotated[
        str, typer.Option(help="Where to run: cpu, cores such as cpu:0-3,cpu:4-7, or 0,1,2.")
    ] = "cpu",
    plan: Annotated[
        str,
        typer.Option(help="streams, whole, auto, authors, or a plan's file.", metavar="PLAN"),
    ] = "streams",
    engine: Annotated[
        Engine,
        typer.Option(help="Runtime of the engines. auto: on GPUs the first that can be used."),
    ] = "auto",
    lanes: Annotated[
        int | None,
        typer.Option(min=1, help="Lanes, at most. Default: as many as can be of use.", metavar="K"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU cores in all. Default: all.", metavar="N")
    ] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, help="Inferences that overlap.", metavar="N")
    ] = 1,
    batch: Annotated[
        int, typer.Option(min=1, help="Images, where the bundle leaves that open.", metavar="N")
    ] = 1,
    inferences: Annotated[int, typer.Option(min=1, help="How many to record.", metavar="N")] = 50,
    warm_up: Annotated[
        int, typer.Option(min=1, help="How many to run before that.", metavar="N")
    ] = 10,
    svg: Annotated[
        Path | None, typer.Option(help="Draw the inference that is shown, as SVG.", metavar="F")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write all inferences for ui.perfetto.dev or chrome://tracing.", metavar="F"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Record inferences, and say how far lanes overlap and what keeps them from it."""
    from parnet_bench.report.timeline_report import record, render, report_on
    from parnet_bench.targets.row_devices import gpus_of
    from parnet_engines.session import PLANS, Session
    from parnet_engines.timeline.picture import render_timeline_svg
    from parnet_engines.timeline.trace_file import encode_trace
    from parnet_export.bundle import open_bundle
    from parnet_export.samples import make_samples

    for path in (svg, trace, output):
        if path is not None:
            files.require_writable(path)
    opened = open_bundle(bundle)
    sizes = {
        size: batch
        for tensor in opened.stream_graph.inputs
        for size in tensor.shape[:1]
        if isinstance(size, str)
    }
    inputs = next(make_samples(opened.stream_graph.inputs, sizes=sizes)).inputs
    with (
        console.working(f"running {opened.label}"),
        Session.open(
            opened,
            devices,
            plan=plan if plan in PLANS else Path(plan),
            engine=engine,
            lanes=lanes,
            threads=threads,
            in_flight=in_flight,
            record=True,
        ) as session,
    ):
        recording = record(session, inputs, inferences=inferences, warm_ups=warm_up)
    program = session.program.program
    used, gpus = session.engine, tuple(dict.fromkeys(gpu.name for gpu in gpus_of([devices])))
    report, shown = report_on(
        session,
        recording,
        network=opened.label,
        engine=used,
        machine=_describe_machine(gpus, used),
        isolated=_isolated_costs(opened, program, gpus, used),
    )
    title = f"{opened.label}, {used} on {devices}"
    if svg is not None:
        files.write_text(svg, render_timeline_svg(program, shown, report.analysis, title))
    if trace is not None:
        files.write_bytes(trace, encode_trace(program, recording, title))
    console.show(report, render(report), as_json=as_json, output=output)


def _describe_machine(gpus: Sequence[str], engine: str) -> str:
    """Return what latencies on GPUs of these names, or on the CPU, depend on, in one line."""
    from parnet_engines.planning.machine import describe_gpu_machine, describe_machine
    from parnet_engines.tensorrt.build_place import describe_driver

    if not gpus:
        return describe_machine(engine)
    driver = describe_driver()
    machine = describe_gpu_machine(", ".join(gpus), engine)
    return f"{machine}, driver {driver}" if driver else machine


def _isolated_costs(
    bundle: Bundle, program: Program, gpus: Sequence[str], engine: str
) -> CostTable | None:
    """Return what was measured of a program's segments alone; None if any is missing."""
    from parnet_engines.planning.cost_table import device_kind, lane_threads
    from parnet_engines.schedule.program import Run

    costs = _measured_costs(bundle, gpus, engine)
    for step in program.steps:
        if isinstance(step, Run):
            lane = program.lanes_by_name[step.lane]
            found = costs.find(step.segment, device_kind(lane.device), lane_threads(lane))
            if found is None or found.busy_lanes != 1:
                return None
    return costs


def _measured_costs(bundle: Bundle, gpus: Sequence[str], engine: str) -> CostTable:
    """Return what a runtime was found to take on GPUs of one name, or on the CPU."""
    from parnet_engines.planning.bundle_costs import load_bundle_costs, load_gpu_costs
    from parnet_engines.planning.cost_table import CostTable
    from parnet_engines.planning.machine import describe_gpu_machine

    if len(gpus) == 1:
        (gpu,) = gpus
        return load_gpu_costs(bundle, gpu).of_environment(describe_gpu_machine(gpu, engine))
    # On the CPU they are measured with ONNX Runtime.
    return load_bundle_costs(bundle) if not gpus and engine == "onnxruntime" else CostTable()
