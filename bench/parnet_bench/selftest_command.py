"""The ``parnet-bench selftest`` command: what works on this machine, and what does not."""

# Typer reads the annotations at run time.

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from parnet_export import console, files
from parnet_export.errors import CheckFailedError, name_some


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command("selftest")(selftest)


def selftest(
    devices: Annotated[
        str, typer.Option(help="What to test: 0, 0,1,2, 0,0,0, cpu.", metavar="DEVICES")
    ] = "cpu",
    engine: Annotated[
        str, typer.Option(help="auto, tensorrt, torch, onnxruntime, openvino.", metavar="NAME")
    ] = "auto",
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="Of weights and of what is computed.")
    ] = "fp32",
    network: Annotated[
        str, typer.Option(help="A catalogue name; weights are random.", metavar="NAME")
    ] = "parnet-cifar-1.3m",
    resolution: Annotated[
        int, typer.Option(min=1, help="Height and width in pixels.", metavar="PX")
    ] = 32,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path, typer.Option(help="Where the result goes, to attach to a report.", metavar="F")
    ] = Path("parnet-selftest.json"),
) -> None:
    """Try engines, lanes, copies, CUDA graphs, parity and overlap on this machine.

    The result is written as one JSON file.
    """
    files.require_writable(output)
    from rich.table import Table

    from parnet_bench.selftest.checks import Request, run_selftest

    request = Request(devices, engine, network, resolution, precision)
    result = run_selftest(request, console.note)
    shown = Table(
        title=console.printable(f"self-test of {devices} ({'; '.join(result.hardware)})"),
        caption=console.printable(f"written to {output}"),
    )
    for column in ("check", "", "found"):
        shown.add_column(column)
    for check in result.checks:
        outcome = "ok" if check.passed else "FAILED"
        shown.add_row(console.printable(check.name), outcome, console.printable(check.detail))
    console.show(result, shown, as_json=as_json, output=output)
    failed = [check.name for check in result.checks if not check.passed]
    if failed:
        raise CheckFailedError(
            f"self-test of {devices}: failed: {name_some(failed)}. Attach {output} to a report."
        )
