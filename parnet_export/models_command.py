"""The command ``parnet-export models``."""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """List the networks that can be named instead of giving a file.

    The first listing counts them, and keeps the counts in the folder that PARNET_EXPORT_CACHE
    names, by default ~/.cache/parnet-export.
    """
    from rich.table import Table

    from parnet_export import console, files
    from parnet_export.catalogue.listing import list_catalogue

    if output is not None:
        files.require_writable(output)
    with console.working("counting"):
        rows = list_catalogue()
    table = Table(title="Catalogue", title_justify="left", caption_justify="left", box=None)
    table.padding = (0, 1, 0, 0)  # names and all fit into 80 columns
    table.caption = (
        "Parameters in millions: unfused, and fused at level repvgg and full. GFLOP: 10^9, two "
        "per multiply-accumulate, of one image at level repvgg. A name stands for random weights."
    )
    table.add_column("name", no_wrap=True)
    for heading in ("params", "repvgg", "full", "GFLOP", "depth", "px"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("structure", no_wrap=True)
    for row in rows:
        counts = (row.parameters, row.parameters_repvgg, row.parameters_full)
        table.add_row(
            row.name,
            *(f"{count / 1e6:.2f}" for count in counts),
            f"{row.flops / 1e9:.2f}",
            str(row.depth),
            str(row.resolution),
            row.origin,
        )
    console.show(rows, table, as_json=as_json, output=output)


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(models)
