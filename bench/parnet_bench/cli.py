"""The ``parnet-bench`` command line.

A thin layer: every command loads what it needs when it runs, so that ``--help``
loads neither torch nor a runtime.
"""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parnet_export import console
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_bench.measure import Measurement, Procedure
    from parnet_bench.result import Result
    from parnet_bench.rows import PlannedRow, Request

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the latency of networks so that the numbers hold up.",
)


class PrecisionName(StrEnum):
    """Element type of weights and of the tensors between segments."""

    FP32 = "fp32"
    FP16 = "fp16"


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
            metavar="[TARGET]...",
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
        PrecisionName | None, typer.Option(help="Element type of catalogue networks.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU cores that each row may use; all by default.", metavar="N"
        ),
    ] = None,
    min_time: Annotated[
        float, typer.Option(help="Measure every row for at least this long.", metavar="S")
    ] = 5.0,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Measure this many rounds, whatever time they take.", metavar="N"
        ),
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

    Every round runs every row once, in random order. Speed-ups are against the first row.
    """
    from parnet_bench.environment import read_environment, usable_cores
    from parnet_bench.measure import Procedure
    from parnet_bench.rows import Request

    if not targets:
        context.fail("Nothing to measure: name a bundle, an ONNX file or a catalogue network.")
    if devices != "cpu":
        raise InputError("--devices", f"{devices!r} is unknown to this version", "Use cpu")
    cores = usable_cores()
    if threads is not None and threads > len(cores):
        raise InputError("--threads", f"this process may use {len(cores)} cores", "Use fewer")
    if not min_time > 0:
        raise InputError("--min-time", f"{min_time} is not a time", "Give seconds above 0")
    if output is not None and not output.parent.is_dir():
        raise InputError(output, "lies in no existing folder", "Create the folder first")
    request = Request(
        targets=tuple(targets),
        ckpt=ckpt,
        baselines=tuple(baseline or ()),
        batch=batch,
        resolution=resolution,
        precision=precision.value if precision else None,
        devices=devices,
        cores=cores[:threads],
        seed=seed,
    )
    environment = read_environment()
    procedure = Procedure(min_time_s=min_time, rounds=rounds, seed=seed)
