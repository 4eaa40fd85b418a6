"""``parnet-bench compare``: two results against each other, for people and for CI."""


# An option is a parameter, and typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Group

    from parnet_bench.results.compare import Comparison, RowComparison

KIND = "parnet-bench compare"
SCHEMA_VERSION = 1

_NONE = "-"
_MOST_NAMED = 10


def compare(
    before: Annotated[Path, typer.Argument(help="The earlier result.", metavar="A")],
    after: Annotated[Path, typer.Argument(help="The one to judge.", metavar="B")],
    threshold: Annotated[
        float,
        typer.Option(min=0, help="Slowdown in per cent that is tolerated.", metavar="PERCENT"),
    ] = 0.0,
    force: Annotated[
        bool, typer.Option("--force", help="Compare what is not comparable, too, and say so.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the comparison as Markdown.", metavar="F")
    ] = None,
) -> None:
    """Compare two results of `parnet-bench latency`, row by row.

    Leaves with exit code 1 when a row has become slower by more than the threshold and the
    interval of its ratio excludes 1. Results of other machines, runtimes or settings are
    refused, each reason named, unless --force is given.
    """
    from parnet_bench.results.compare import compare as compare_results
    from parnet_bench.results.result_file import read_result
    from parnet_export import console, files
    from parnet_export.errors import InputError

    for place in (output, markdown):
        if place is not None:
            files.require_writable(place)
    comparison = compare_results(read_result(before), read_result(after), threshold / 100)
    if not comparison.rows:
        raise InputError(after, f"shares no row with {before}", "Measure the same targets")
    refused = [str(difference) for difference in comparison.refused]
    if refused and not force:
        reasons = "; ".join(refused[:_MOST_NAMED])
        more = len(refused) - _MOST_NAMED
        raise InputError(
            after,
            f"is not comparable with {before}: {reasons}{f'; and {more} more' if more > 0 else ''}",
            "Measure again under the same conditions, or give --force",
        )
    if markdown is not None:
        files.write_text(markdown, render_markdown(comparison, before.name, after.name))
    shown = _render(comparison)
    console.show(_as_dict(comparison, before, after), shown, as_json=as_json, output=output)
    if comparison.regressions:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(compare)


def render_markdown(comparison: Comparison, before: str, after: str) -> str:
    """Return a comparison as a Markdown document, ending in a newline."""
    from parnet_bench.report.markdown_table import markdown_table, markdown_text

    rows = [_cells(row) for row in comparison.rows]
    lines = [f"# {markdown_text(after)} against {markdown_text(before)}", ""]
    lines += [markdown_table(_HEADINGS, rows), ""]
    lines += [f"- {markdown_text(sentence)}" for sentence in _sentences(comparison)]
    return "\n".join(lines) + "\n"


_HEADINGS = ("row", "A, ms", "B, ms", "B / A", "95 %", "verdict")


def _cells(row: RowComparison) -> tuple[str, ...]:
    from parnet_export.console import format_ms

    interval = row.interval
    return (
        row.name,
        format_ms(row.before_ms).removesuffix(" ms"),
        format_ms(row.after_ms).removesuffix(" ms"),
        f"{row.ratio:.3f}",
        _NONE if interval is None else f"{interval.low:.3f} to {interval.high:.3f}",
        "REGRESSION" if row.is_regression else row.verdict,
    )


def _sentences(comparison: Comparison) -> Iterator[str]:
    tolerated = f"{100 * comparison.threshold:g} %"
    names = ", ".join(row.name for row in comparison.regressions)
    if names:
        yield f"Slower by more than {tolerated}, significantly: {names}."
    else:
        yield f"No row has become slower by more than {tolerated} significantly."
    if comparison.refused:
        yield "Compared by force, although latencies are not comparable:"
        yield from (f"{difference}." for difference in comparison.refused)
    yield from comparison.remarks


def _as_dict(comparison: Comparison, before: Path, after: Path) -> dict[str, Any]:
    import msgspec

    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "before": str(before),
        "after": str(after),
        "comparable": not comparison.refused,
        "regressions": [row.name for row in comparison.regressions],
        **msgspec.to_builtins(comparison),
    }


def _render(comparison: Comparison) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from parnet_export.console import printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(_HEADINGS[0], overflow="fold")
    for heading in _HEADINGS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*map(printable, _cells(row)))
    return Group(table, *(Text(printable(sentence)) for sentence in _sentences(comparison)))
