"""``parnet-bench loadgen``: networks under MLPerf's load generator."""


# An option is a parameter.

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from parnet_bench.latency_options import RowEngine  # noqa: TC001 - Typer reads it

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group

    from parnet_bench.loadgen.scenarios import Load, Outcome, Scenario
    from parnet_bench.machine.environment import Environment
    from parnet_bench.results.result import Form
    from parnet_bench.targets.planned_row import PlannedRow
    from parnet_bench.targets.request import Request

KIND = "parnet-bench loadgen"
SCHEMA_VERSION = 1

_NO_RESULT = "Not an MLPerf result: those are reviewed, and of the benchmark's own networks."


def loadgen(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Bundles, ONNX files or catalogue names (random weights).", metavar="TARGET"
        ),
    ],
    scenario: Annotated[
        Literal["single-stream", "multi-stream", "offline", "server"],
        typer.Option(help="How queries arrive."),
    ] = "single-stream",
    devices: Annotated[
        str,
        typer.Option(help="Where to run: cpu, cores such as cpu:0,cpu:1, or GPUs such as 0,1,2."),
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores that a row may use; all by default.", metavar="N"),
    ] = None,
    form: Annotated[
        Literal["unfused", "whole", "streams"] | None,
        typer.Option(help="Run this form of the targets only. Default: all there are."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples in one inference.", metavar="N")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels.", metavar="N")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16"] | None,
        typer.Option(help="Element type of catalogue networks."),
    ] = None,
    engine: RowEngine = "auto",
    target_qps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Queries per second of the server scenario.", metavar="QPS"),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Another bound for the server scenario; breaks the rules.", metavar="MS"
        ),
    ] = None,
    break_rules_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Run for so long instead of 600 s, to try things out; breaks the rules.",
            metavar="S",
        ),
    ] = None,
    logs: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the load generator's logs. Default: beside --output, else "
            "loadgen-SCENARIO.",
            metavar="DIR",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Run networks under MLPerf's load generator, by its rules.

    Takes at least ten minutes for each form of each target. Needs the extra `loadgen`.
    """
    from parnet_bench.targets.request import Request
    from parnet_bench.targets.row_devices import check_devices

    load = make_load(scenario, target_qps, target_latency, break_rules_seconds)
    check_devices(devices, threads=threads, engine=engine)
    request = Request(
        targets=tuple(targets),
        batches=() if batch is None else (batch,),
        resolution=resolution,
        precision=precision,
        devices=devices,
        threads=threads,
        engine=engine,
        seed=seed,
    )
    run_and_show(request, load, form=form, logs=logs, as_json=as_json, output=output)


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(loadgen)


def make_load(
    scenario: Scenario,
    target_qps: float | None,
    target_latency_ms: float | None,
    seconds: float | None,
) -> Load:
    """Return what the options of a command line ask of the load generator.

    Raises
    ------
    InputError
        When the scenario takes an option that is not there, or does not take one that is.
    MissingBackendError
        When the load generator is not installed.
    """
    from parnet_bench.loadgen.scenarios import Load, import_loadgen
    from parnet_export.errors import InputError

    import_loadgen()
    given = {"--target-qps": target_qps, "--target-latency": target_latency_ms}
    if scenario != "server":
        for option, value in given.items():
            if value is not None:
                problem = f"is of the server scenario, and this one is {scenario}"
                raise InputError(option, problem, "Leave it out")
    elif target_qps is None:
        problem = "takes a number of queries per second"
        raise InputError("--scenario server", problem, "Give --target-qps")
    return Load(scenario, 0.0, 1, target_qps, target_latency_ms, seconds)


def run_and_show(
    request: Request,
    load: Load,
    *,
    form: Form | None = None,
    logs: Path | None = None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Run the rows of a request one after the other, and show what the load generator reports.

    Parameters
    ----------
    request
        The rows.
    load
        What is asked of the load generator; each row's batch and latency are filled in.
    form
        Run rows of this form only.
    logs
        Folder for the load generator's logs; by default beside `output`.
    as_json, output
        As of every command whose result is a table.

    Raises
    ------
    ParnetError
        When a row cannot be made, loaded or run.
    """
    from parnet_bench.machine.environment import read_environment
    from parnet_bench.targets.rows import plan_rows
    from parnet_export import console, files
    from parnet_export.errors import InputError

    if output is not None:
        files.require_writable(output)
    place = logs or (output.with_suffix(".loadgen") if output else Path(f"loadgen-{load.scenario}"))
    environment = read_environment()
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as workspace:
        planned, notes = plan_rows(request, Path(workspace), console.working)
        rows = [row for row in planned if form in {None, row.description.form}]
        if not rows:
            raise InputError(
                "--form", f"no target has the form {form}", "Leave it out to see which there are"
            )
        results = []
        for row in rows:
            with console.working(f"{load.scenario}: {row.description.name}"):
                results.append(_run(row, replace(load, batch=row.description.batch), place))
    shown = _render(results, load.scenario, notes)
    document = _as_dict(environment, results, notes)
    console.show(document, shown, as_json=as_json, output=output)
    console.note(f"logs are in {place}")


@dataclass(frozen=True, slots=True)
class _Run:
    row: PlannedRow
    load: Load
    outcome: Outcome
    folder: Path


def _run(row: PlannedRow, load: Load, place: Path) -> _Run:
    from parnet_bench.loadgen.process import ScenarioJob, run_scenario
    from parnet_bench.loadgen.scenarios import read_outcome
    from parnet_bench.workers.job import job_of
    from parnet_export import files

    folder = place / re.sub(r"[^\w.-]+", "-", row.description.name)
    files.make_directory(folder)
    run_scenario(ScenarioJob(job_of(row), load, str(folder)))
    return _Run(row, load, read_outcome(folder, load.scenario), folder)


def _as_dict(
    environment: Environment, runs: Sequence[_Run], notes: Sequence[str]
) -> dict[str, Any]:
    import msgspec

    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "is_mlperf_result": False,
        "environment": msgspec.to_builtins(environment),
        "rows": [
            {
                "label": run.row.description.provenance.label,
                **msgspec.to_builtins(run.row.description),
                "scenario": run.load.scenario,
                "target_qps": run.load.target_qps,
                "broken_rules": run.load.broken_rules,
                "outcome": msgspec.to_builtins(run.outcome),
                "logs": str(run.folder),
            }
            for run in runs
        ],
        "notes": list(notes),
    }


def _render(runs: Sequence[_Run], scenario: str, notes: Sequence[str]) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from parnet_export.console import format_ms, printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("row", overflow="fold")
    for heading in ("latency", "percentile", "samples/s", "queries", "valid"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        outcome = run.outcome
        table.add_row(
            printable(run.row.description.name),
            "-" if outcome.latency_ms is None else format_ms(outcome.latency_ms),
            "-" if outcome.percentile is None else f"p{outcome.percentile:g}",
            "-" if outcome.samples_per_s is None else f"{outcome.samples_per_s:,.1f}",
            str(outcome.queries),
            "yes" if outcome.valid else "NO",
        )
    remarks = [f"{scenario}, LoadGen {runs[0].outcome.version}. {_NO_RESULT}"]
    broken = runs[0].load.broken_rules
    if broken:
        remarks.append(f"This run breaks the rules: {', '.join(broken)}.")
    random = [run.row for run in runs if run.row.description.provenance.weights == "random"]
    if random:
        names = dict.fromkeys(row.description.network for row in random)
        remarks.append(f"Random weights: {', '.join(names)}.")
    if any(run.outcome.latency_ms is not None and not run.outcome.is_estimate for run in runs):
        remarks.append("Latencies are plain percentiles, not early-stopping estimates.")
    remarks += notes
    return Group(table, *(Text(printable(remark)) for remark in remarks))
