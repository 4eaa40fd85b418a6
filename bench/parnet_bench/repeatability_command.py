"""``parnet-bench repeatability``: whether repeated measurements agree."""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parnet_export import console, files
from parnet_export.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from parnet_bench.results.repeatability import RowAgreement


def register(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command()(repeatability)


def repeatability(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more result files of `parnet-bench latency`.", metavar="F.json..."
        ),
    ],
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the pairs that must overlap.", metavar="SHARE"),
    ] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Say whether repeated measurements agree: how often intervals of a speed-up overlap.

    Every two runs are compared. Exit code 1 where too few pairs overlap.
    """
    from parnet_bench.results.repeatability import agreement
    from parnet_bench.results.result_file import read_result

    if output is not None:
        files.require_writable(output)
    rows = agreement([read_result(path) for path in results])
    if not rows:
        raise InputError(
            str(results[0]),
            "and the other files have no row in common whose speed-up has an interval",
            "Give two or more results of the same `parnet-bench latency`",
        )
    pairs, overlapping = sum(row.pairs for row in rows), sum(row.overlapping for row in rows)
    document = {
        "runs": len(results),
        "pairs": pairs,
        "overlapping": overlapping,
        "share": overlapping / pairs,
        "rows": rows,
    }
    console.show(document, _table(rows, pairs, overlapping), as_json=as_json, output=output)
    if overlapping < threshold * pairs:
        share = console.format_percent(overlapping / pairs)
        least = console.format_percent(threshold)
        raise CheckFailedError(f"Of {pairs} pairs of intervals {share} overlap, not {least}.")


def _table(rows: Sequence[RowAgreement], pairs: int, overlapping: int) -> Table:
    from rich.table import Table

    table = Table(caption=f"{overlapping} of {pairs} pairs overlap.")
    for heading in ("row", "against", "speed-ups", "pairs", "overlap"):
        table.add_column(heading, justify="left" if heading in {"row", "against"} else "right")
    for row in rows:
        low, high = min(row.speedups), max(row.speedups)
        table.add_row(
            console.printable(row.name),
            console.printable(row.reference),
            f"{console.format_ratio(low)} to {console.format_ratio(high)}",
            str(row.pairs),
            console.format_percent(row.share),
        )
    return table
