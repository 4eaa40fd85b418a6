"""``parnet-bench latency``: measure networks against each other."""

# An option is a parameter.

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_bench.latency_options import (
    RowEngine,
    check_plan,
    check_times,
    parse_batches,
    parse_percentiles,
    parse_share,
)
from parnet_export import console, files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_bench.results.procedure import Procedure
    from parnet_bench.results.result import Result
    from parnet_bench.targets.request import Request


FAILED_EXIT_CODE = 1
"""When some rows could not be measured."""


_OF_ROUNDS = (
    "in_flight",
    "target_ci",
    "max_time",
    "min_time",
    "processes",
    "rounds",
    "percentiles",
    "interleave",
    "l2_flush",
    "data_transfers",
    "csv",
    "html",
    "trace",
)
"""Parameters that say how rounds are measured and shown: a scenario has none."""

_OF_SCENARIOS = ("target_qps", "target_latency", "break_rules_seconds")


def latency(
    context: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Bundles, ONNX files or catalogue names (random weights); by default ParNet-L "
            "beside ResNet-34 and ResNet-50.",
            metavar="TARGET",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        str,
        typer.Option(
            help="Where to run: cpu, cores such as cpu:0,cpu:1, or GPUs such as 0,1,2. Streams run "
            "on the first one and on all of them."
        ),
    ] = "cpu",
    task: Annotated[
        Literal["classification", "detection"],
        typer.Option(help="What to measure where no target is named."),
    ] = "classification",
    ckpt: Annotated[
        str | None,
        typer.Option(
            help="The first target's network before fusing, for a row to compare with.",
            metavar="SOURCE",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="Catalogue name that the checkpoint must turn out to be.", metavar="NAME"
        ),
    ] = None,
    activation: Annotated[
        Literal["auto", "silu", "relu", "mish"],
        typer.Option(help="The checkpoint's activation; auto tells it from the checkpoint."),
    ] = "auto",
    use_ema: Annotated[
        bool, typer.Option("--use-ema", help="Take the checkpoint's averaged weights.")
    ] = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Catalogue name to measure beside the targets, fused; repeatable.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Samples in one inference; 1,8 gives rows of each.", metavar="N,..."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels.", metavar="N")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16"] | None,
        typer.Option(help="Element type of catalogue networks."),
    ] = None,
    plan: Annotated[
        str,
        typer.Option(
            help="How segments are placed: streams, auto, authors, the file of a program, or whole "
            "for no rows of segments.",
        ),
    ] = "streams",
    lanes: Annotated[
        int | None,
        typer.Option(min=1, help="Segments that may run at the same time.", metavar="N"),
    ] = None,
    engine: RowEngine = "auto",
    boundary: Annotated[
        Literal["linear", "vector"] | None,
        typer.Option(
            help="Memory layout of tensors between engines on GPUs. Default: the runtime's own.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each row; one per core by default.", metavar="N"),
    ] = None,
    in_flight: Annotated[
        int,
        typer.Option(
            min=1, help="Inferences under way in pipelined turns; 1 for none.", metavar="N"
        ),
    ] = 2,
    target_ci: Annotated[
        str,
        typer.Option(
            help="Stop when medians and ratios are known this well to either side.", metavar="P%"
        ),
    ] = "1%",
    max_time: Annotated[
        float, typer.Option(help="Stop when this time is up, loading included.", metavar="S")
    ] = 110.0,
    min_time: Annotated[
        float,
        typer.Option(help="Do not stop before each row has been measured this long.", metavar="S"),
    ] = 0.0,
    processes: Annotated[
        int, typer.Option(min=1, help="Fresh worker processes of each row.", metavar="N")
    ] = 5,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Make this many rounds in each process, whatever they take.", metavar="N"
        ),
    ] = None,
    percentiles: Annotated[
        str, typer.Option(help="Which percentiles to state.", metavar="P,...")
    ] = "50,90,99",
    interleave: Annotated[
        bool,
        typer.Option(
            "--interleave/--no-interleave",
            help="Whether rows take turns, or one is measured after the other.",
        ),
    ] = True,
    l2_flush: Annotated[
        bool,
        typer.Option(
            "--l2-flush",
            help="Empty the last-level cache, or the GPUs' L2 caches, before each run.",
        ),
    ] = False,
    data_transfers: Annotated[
        bool,
        typer.Option(
            "--data-transfers/--no-data-transfers",
            help="Whether latencies include copies to and from GPUs.",
        ),
    ] = True,
    scenario: Annotated[
        Literal["single-stream", "multi-stream", "offline", "server"] | None,
        typer.Option(
            help="Let MLPerf's load generator drive each row, by its rules, instead of rounds; its "
            "log is kept beside --output. Needs the extra `loadgen`."
        ),
    ] = None,
    target_qps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Queries per second of --scenario server.", metavar="QPS"),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Another bound for --scenario server; breaks the rules.", metavar="MS"
        ),
    ] = None,
    break_rules_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Run a --scenario for so long instead of 600 s; breaks the rules.",
            metavar="S",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the order of the rows, and of random weights.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Also write the figures of each row as CSV.", metavar="F")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page for a browser.", metavar="F")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Also write one inference of each row for Perfetto.", metavar="F"),
    ] = None,
) -> None:
    """Measure networks against each other, in turns on the same cores.

    Every round runs every row, in random order; all of it is repeated in fresh processes.
    Speed-ups are against the first row of the same batch size.

    With --scenario, rows run under MLPerf's load generator instead, at least ten minutes each.

    Graphs of catalogue networks and checkpoints are kept in the folder that
    PARNET_EXPORT_CACHE names, by default ~/.cache/parnet-export.
    """
    from parnet_bench.report.table import render
    from parnet_bench.results.procedure import Procedure
    from parnet_bench.results.result_file import as_dict
    from parnet_bench.targets.graphs import Reading
    from parnet_bench.targets.request import Request
    from parnet_bench.targets.row_devices import check_devices

    _refuse(context, _OF_SCENARIOS if scenario is None else _OF_ROUNDS, scenario)
    check_devices(
        devices,
        threads=threads,
        data_transfers=data_transfers,
        engine=engine,
        plan=plan,
        boundary=boundary,
    )
    check_times(max_time, min_time)
    check_plan(plan)
    if ckpt is None and (arch or use_ema or activation != "auto"):
        option = "--arch" if arch else "--use-ema" if use_ema else "--activation"
        raise InputError(option, "says how --ckpt is read, which is not there", "Give --ckpt")
    for path in (output, csv, html, trace):
        if path is not None:
            files.require_writable(path)
    request = Request(
        targets=tuple(targets or ()),
        ckpt=ckpt,
        reading=Reading(arch, activation, use_ema),
        baselines=tuple(baseline or ()),
        batches=parse_batches(batch),
        resolution=resolution,
        precision=precision,
        devices=devices,
        threads=threads,
        lanes=lanes,
        plan=plan,
        engine=engine,
        boundary=boundary,
        seed=seed,
        task=task,
    )
    if scenario is not None:
        from parnet_bench.loadgen_command import make_load, run_and_show

        load = make_load(scenario, target_qps, target_latency, break_rules_seconds)
        run_and_show(request, load, as_json=as_json, output=output)
        return
    procedure = Procedure(
        processes=processes,
        target_ci=parse_share(target_ci),
        max_time_s=max_time,
        min_time_s=min_time,
        rounds=rounds,
        percentiles=parse_percentiles(percentiles),
        interleave=interleave,
        in_flight=in_flight,
        l2_flush=l2_flush,
        data_transfers=data_transfers,
        seed=seed,
    )
    try:
        result = _measure(request, procedure)
    except KeyboardInterrupt:
        console.warn("interrupted before the first round was complete; nothing was recorded")
        raise typer.Exit(console.INTERRUPTED_EXIT_CODE) from None
    _write_files(result, csv=csv, html=html, trace=trace)
    console.show(as_dict(result), render(result), as_json=as_json, output=output)
    if result.partial:
        kept = f"; what was measured is in {output}, marked as partial" if output else ""
        rounds_made = sum(map(len, result.orders))
        console.warn(f"interrupted after {rounds_made} rounds{kept}")
        raise typer.Exit(console.INTERRUPTED_EXIT_CODE)
    if result.failed:
        names = ", ".join(row.description.name for row in result.failed)
        console.warn(f"not measured: {names}")
        raise typer.Exit(FAILED_EXIT_CODE)


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command()(latency)


def _refuse(context: typer.Context, parameters: Sequence[str], scenario: str | None) -> None:
    """Refuse parameters that were given and cannot apply with a scenario, or without one."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in parameters and source and source.name == "COMMANDLINE":
            is_off = parameter.secondary_opts and not context.params[parameter.name]
            (option,) = parameter.secondary_opts if is_off else parameter.opts
            if scenario is None:
                raise InputError(option, "is of a --scenario, which is not there", "Give one")
            problem = f"is of measuring in rounds, and --scenario {scenario} has none"
            raise InputError(option, problem, "Leave it out")


def _write_files(
    result: Result, *, csv: Path | None, html: Path | None, trace: Path | None
) -> None:
    if csv is not None:
        from parnet_bench.report.csv_file import csv_text

        files.write_text(csv, csv_text(result))
    if html is not None:
        from parnet_bench.report.html_page import render_page

        files.write_text(html, render_page(result))
    if trace is not None:
        from parnet_bench.report.trace import encode_traces

        files.write_bytes(trace, encode_traces(result))


def _measure(request: Request, procedure: Procedure) -> Result:
    from parnet_bench.machine.environment import read_environment
    from parnet_bench.measuring.latency import measure_rows
    from parnet_bench.measuring.progress import showing_progress
    from parnet_bench.measuring.row_peaks import measure_row_peaks
    from parnet_bench.targets.rows import plan_rows

    environment = read_environment()
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as workspace:
        rows, notes = plan_rows(request, Path(workspace), console.working)
        with console.working("measuring what the devices can do at most"):
            peaks = measure_row_peaks(row.description for row in rows)
        with showing_progress() as observe:
            return measure_rows(
                rows, procedure, environment, notes=notes, peaks=peaks, observe=observe
            )
