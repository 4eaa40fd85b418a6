"""``parnet-bench report``: a result as a page or a document."""

# Typer reads the annotations at run time.

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    result: Annotated[
        Path, typer.Argument(help="A result of `parnet-bench latency`.", metavar="F")
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page that needs nothing else.", metavar="PAGE"),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write Markdown; - prints it.", metavar="DOCUMENT")
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Write the figures as comma-separated values; - prints them.", metavar="TABLE"
        ),
    ] = None,
) -> None:
    """Show a result as an HTML page, as Markdown, or as comma-separated values.

    Without an option it prints Markdown. Figures are computed anew from the raw samples, so
    results of older versions can be shown as well.
    """
    from parnet_bench.results.result_file import read_result
    from parnet_export import console, files

    places = [place for place in (html, markdown, csv) if place is not None]
    for place in places:
        if str(place) != "-":
            files.require_writable(place)
    measured = read_result(result)
    if html is not None:
        from parnet_bench.report.html_page import render_page

        _write(html, render_page(measured))
    if markdown is not None or not places:
        from parnet_bench.report.markdown_page import render_markdown

        _write(markdown or Path("-"), render_markdown(measured))
    if csv is not None:
        from parnet_bench.report.csv_file import csv_text

        _write(csv, csv_text(measured))
    for place in places:
        if str(place) != "-":
            console.note(f"wrote {place}")


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(report)


def _write(place: Path, text: str) -> None:
    from parnet_export import files

    if str(place) == "-":
        sys.stdout.write(text)
    else:
        files.write_text(place, text)
