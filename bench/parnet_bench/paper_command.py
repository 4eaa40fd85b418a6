"""``parnet-bench paper``: a published table beside what this machine measures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_export import console, files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_bench.paper.measured import PaperPlan
    from parnet_bench.results.procedure import Procedure
    from parnet_bench.results.published import PublishedTable
    from parnet_bench.results.result import Result
    from parnet_bench.targets.request import Request

KIND = "parnet-bench paper"
SCHEMA_VERSION = 1


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command()(paper)


def paper(
    table: Annotated[
        Literal["1", "2", "3", "4", "6", "8", "9"],
        typer.Option(help="Which table of the ParNet paper (arXiv 2110.07641).", metavar="N"),
    ],
    devices: Annotated[
        str,
        typer.Option(help="Where to run: cpu, cores such as cpu:0,cpu:1, or GPUs such as 0,1,2."),
    ] = "cpu",
    plan: Annotated[
        str,
        typer.Option(
            help="How to run what the paper ran on three devices, where there are not three: "
            "streams, auto, or the file of a program.",
        ),
    ] = "streams",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each row; one per core by default.", metavar="N"),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width in pixels, instead of the paper's.", metavar="N"
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="Element type of the networks.")
    ] = "fp32",
    processes: Annotated[
        int, typer.Option(min=1, help="Fresh worker processes of each row.", metavar="N")
    ] = 3,
    max_time: Annotated[
        float, typer.Option(help="Stop when this time is up, loading included.", metavar="S")
    ] = 180.0,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Make this many rounds in each process, whatever they take.", metavar="N"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the order of the rows, and of random weights.")
    ] = 0,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table in Markdown.", metavar="F")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write the table as a page.", metavar="F")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Measure what a table of the ParNet paper lists, and print both side by side.

    Networks have random weights. What the paper does not determine, and what this machine
    cannot do as the paper did it, is said under the table.
    """
    from parnet_bench.paper import table as paper_table
    from parnet_bench.paper.measured import compare_with_paper
    from parnet_bench.results.procedure import Procedure
    from parnet_bench.results.published import TABLES
    from parnet_bench.results.result_file import as_dict
    from parnet_bench.targets.request import Request

    if not max_time > 0:
        raise InputError("--max-time", f"{max_time} is not a time", "Give seconds above 0")
    for path in (markdown, html, output):
        if path is not None:
            files.require_writable(path)
    request = Request(
        devices=devices,
        plan=plan,
        threads=threads,
        resolution=resolution,
        precision=precision,
        seed=seed,
    )
    procedure = Procedure(
        processes=processes, max_time_s=max_time, rounds=rounds, in_flight=1, seed=seed
    )
    published = TABLES[int(table)]
    try:
        planned, result = _measure(published, request, procedure)
    except KeyboardInterrupt:
        console.warn("interrupted before the first round was complete; nothing was recorded")
        raise typer.Exit(console.INTERRUPTED_EXIT_CODE) from None
    comparison = compare_with_paper(published, planned, result)
    if markdown is not None:
        files.write_text(markdown, paper_table.markdown(comparison, result))
    if html is not None:
        files.write_text(html, paper_table.page(comparison, result))
    document = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "comparison": comparison,
        "measurement": as_dict(result),
    }
    console.show(document, paper_table.render(comparison, result), as_json=as_json, output=output)
    if result.partial:
        raise typer.Exit(console.INTERRUPTED_EXIT_CODE)
    if result.failed:
        console.warn(f"not measured: {', '.join(r.description.name for r in result.failed)}")
        raise typer.Exit(1)


def _measure(
    table: PublishedTable, request: Request, procedure: Procedure
) -> tuple[PaperPlan, Result]:
    from parnet_bench.machine.environment import read_environment
    from parnet_bench.measuring.latency import measure_rows
    from parnet_bench.measuring.progress import showing_progress
    from parnet_bench.paper.measured import plan_paper

    environment = read_environment()
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as workspace:
        planned = plan_paper(table, request, Path(workspace), console.working)
        with showing_progress() as observe:
            result = measure_rows(
                planned.rows, procedure, environment, notes=planned.notes, observe=observe
            )
    return planned, result
