"""The ``parnet-bench`` command line.

A thin layer: every command loads what it needs when it runs, so that ``--help``
loads neither torch nor a runtime.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_bench import env_command, loadgen_command
from parnet_export import console, files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from parnet_bench.measure import NextTurn, Procedure
    from parnet_bench.result import Result
    from parnet_bench.rows import Request

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the latency of networks so that the numbers hold up.",
)


@app.callback()
def _commands() -> None:
    """Keep `latency` a command of its own, although it is the only one."""


@app.command()
def latency(
    context: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Bundles, ONNX files or catalogue names (random weights).",
            metavar="TARGET",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[str, typer.Option(help="Where to run: cpu.")] = "cpu",
    ckpt: Annotated[
        str | None,
        typer.Option(
            help="The first target's network before fusing, for a row to compare with.",
            metavar="SOURCE",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Catalogue name to measure beside the targets, fused; repeatable.",
            metavar="NAME",
            show_default=False,
        ),
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
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores that each row may use; all by default.", metavar="N"),
    ] = None,
    min_time: Annotated[
        float, typer.Option(help="Measure every row for at least this long.", metavar="S")
    ] = 5.0,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Measure this many rounds, whatever time they take.", metavar="N"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the order of the rows, and of random weights.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Measure networks against each other, in turns on the same cores.

    Every round runs every row, in random order. Speed-ups are against the first row.

    Graphs of catalogue networks and checkpoints are kept in the folder that
    PARNET_EXPORT_CACHE names, by default ~/.cache/parnet-export.
    """
    from parnet_bench.environment import usable_cores
    from parnet_bench.measure import Procedure
    from parnet_bench.result_file import as_dict
    from parnet_bench.rows import Request
    from parnet_bench.table import render

    if not targets:
        context.fail("Nothing to measure: name a bundle, an ONNX file or a catalogue network.")
    if devices != "cpu":
        raise InputError("--devices", f"{devices!r} is unknown to this version", "Use cpu")
    cores = usable_cores()
    if threads is not None and threads > len(cores):
        raise InputError("--threads", f"this process may use {len(cores)} cores", "Use fewer")
    if not 0 < min_time < math.inf:
        raise InputError("--min-time", f"{min_time} is not a time", "Give seconds above 0")
    if output is not None:
        files.require_writable(output)
    request = Request(
        targets=tuple(targets),
        ckpt=ckpt,
        baselines=tuple(baseline or ()),
        batch=batch,
        resolution=resolution,
        precision=precision,
        devices=devices,
        cores=cores[:threads],
        seed=seed,
    )
    procedure = Procedure(min_time_s=min_time, rounds=rounds, seed=seed)
    try:
        result = _measure(request, procedure)
    except KeyboardInterrupt:
        console.warn("interrupted before the first round was complete; nothing was recorded")
        raise typer.Exit(console.INTERRUPTED_EXIT_CODE) from None
    console.show(as_dict(result), render(result), as_json=as_json, output=output)
    if result.partial:
        kept = f"; what was measured is in {output}, marked as partial" if output else ""
        console.warn(f"interrupted after {len(result.orders)} rounds{kept}")
        raise typer.Exit(console.INTERRUPTED_EXIT_CODE)


env_command.register(app)
loadgen_command.register(app)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(console.run(app))


def _measure(request: Request, procedure: Procedure) -> Result:
    from parnet_bench.environment import read_environment
    from parnet_bench.latency import measure_rows
    from parnet_bench.rows import plan_rows

    environment = read_environment()
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as workspace:
        rows, notes = plan_rows(request, Path(workspace), console.working)
        with _progress() as observe:
            return measure_rows(rows, procedure, environment, notes=notes, observe=observe)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[NextTurn], None]]:
    """Show on standard error how far the measurement is; silent when that is no terminal.

    It is drawn between turns only: a display that redraws itself takes time from the
    row that is being measured.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=console.stderr(),
        transient=True,
        auto_refresh=False,
        disable=not (sys.stderr.isatty() and console.stderr().is_interactive),
    )
    with display:
        task = display.add_task("loading", total=1)

        def observe(turn: NextTurn) -> None:
            phase = f"round {turn.round_number}" if turn.round_number else "warming up"
            display.update(
                task,
                description=f"{phase}: {console.printable(turn.row)}",
                completed=turn.fraction,
                refresh=True,
            )

        yield observe
