"""A published table beside what was measured: as a table for people, Markdown or a page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from parnet_bench.report.markdown_table import markdown_table, markdown_text
from parnet_bench.results.published import PAPER
from parnet_export.console import format_count, format_ratio, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Group

    from parnet_bench.paper.measured import Comparison, PaperRow
    from parnet_bench.results.result import Result

_NONE = "-"
_WIDTH = 78
"""Characters of a line that a terminal surely has."""

_LABEL_WIDTH = 20
_PADDING = 3
"""Spaces and line of each column."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of figures.

    Parameters
    ----------
    heading
        What the figures are.
    origin
        ``"paper"`` for what is published, ``"here"`` for what was measured or counted.
    cells
        One for each row of the table.
    """

    heading: str
    origin: str
    cells: tuple[str, ...]


def columns_of(comparison: Comparison) -> tuple[Column, ...]:
    """Return the columns in which some row has a figure."""
    columns = (
        Column(heading, origin, tuple(cell(row) for row in comparison.rows))
        for heading, origin, cell in _FIGURES
    )
    return tuple(column for column in columns if set(column.cells) != {_NONE})


def label_of(row: PaperRow) -> str:
    """Return what a row is called, with a mark where the network is a reconstruction."""
    return f"{row.label} (reconstruction)" if row.origin == "reconstruction" else row.label


def title_of(comparison: Comparison) -> str:
    """Return the title of the table."""
    return f"{PAPER}, table {comparison.table}: {comparison.title}"


def remarks_on(comparison: Comparison, result: Result) -> Iterator[str]:
    """Yield what a reader of the figures must know, one sentence each."""
    environment = result.environment
    cores = len(result.rows[0].description.cores)
    devices = ", ".join(dict.fromkeys(row.description.devices for row in result.rows))
    if comparison.hardware:
        yield f"Paper: {comparison.hardware}."
    figures = [row.published for row in comparison.rows]
    if any(f.samples_per_s is not None and f.latency_ms is None for f in figures):
        yield "The paper prints speeds; its latencies are their inverse."
    yield f"Here: {environment.cpu_model}, devices {devices}, {cores} cores, batch 1."
    yield f"Speed-ups are against {comparison.reference}."
    for row in comparison.rows:
        if row.note:
            yield f"{row.label}: {row.note}"
    unmeasured: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.missing:
            unmeasured.setdefault(row.missing, []).append(row.label)
    for reason, labels in unmeasured.items():
        yield f"Not measured, {reason}: {', '.join(labels)}."
    for caveat in comparison.caveats:
        yield f"{caveat}."
    if result.partial:
        yield "The measurement was interrupted; its figures are preliminary."


def render(comparison: Comparison, result: Result) -> Group:
    """Return the table and the remarks for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables = []
    for shown in _by_width(columns_of(comparison)):
        table = Table()
        table.add_column("", min_width=12, max_width=_LABEL_WIDTH)
        for column in shown:
            table.add_column(f"{column.heading}\n{column.origin}", justify="right", no_wrap=True)
        for number, row in enumerate(comparison.rows):
            table.add_row(printable(label_of(row)), *(column.cells[number] for column in shown))
        tables.append(table)
    remarks = (Text(printable(line)) for line in remarks_on(comparison, result))
    return Group(Text(printable(title_of(comparison))), *tables, *remarks)


def _by_width(columns: Iterable[Column]) -> list[list[Column]]:
    """Return the columns in as many tables as make each narrow enough, headings together."""
    tables: list[list[Column]] = []
    left = 0
    for _, group in groupby(columns, key=lambda column: column.heading):
        together = list(group)
        width = sum(
            _PADDING + max(map(len, (column.heading, column.origin, *column.cells)))
            for column in together
        )
        if not tables or width > left:
            tables.append([])
            left = _WIDTH - _LABEL_WIDTH - _PADDING
        tables[-1] += together
        left -= width
    return tables


def markdown(comparison: Comparison, result: Result) -> str:
    """Return the table and the remarks in GitHub's Markdown."""
    columns = columns_of(comparison)
    table = markdown_table(
        ["", *(f"{column.heading}, {column.origin}" for column in columns)],
        [
            [label_of(row), *(column.cells[number] for column in columns)]
            for number, row in enumerate(comparison.rows)
        ],
    )
    remarks = "\n".join(f"- {markdown_text(line)}" for line in remarks_on(comparison, result))
    command = " ".join(result.environment.command)
    made = f"Made with `{printable(command).replace('`', '')}`."
    return f"### {markdown_text(title_of(comparison))}\n\n{table}\n\n{remarks}\n\n{made}\n"


def page(comparison: Comparison, result: Result) -> str:
    """Return the table and the remarks as an HTML page that needs nothing else."""
    from parnet_bench.report.html_page import render_template

    columns = columns_of(comparison)
    return render_template(
        "paper.html",
        title=title_of(comparison),
        columns=columns,
        rows=[
            {
                "label": row.label,
                "is_reconstruction": row.origin == "reconstruction",
                "cells": [column.cells[number] for column in columns],
            }
            for number, row in enumerate(comparison.rows)
        ],
        remarks=list(remarks_on(comparison, result)),
        command=" ".join(result.environment.command),
        created=result.environment.created,
    )


def _measured_ratio(row: PaperRow) -> str:
    speedup = row.measured.speedup if row.measured else None
    return _ratio(speedup.value if speedup else None)


def _ratio_interval(row: PaperRow) -> str:
    speedup = row.measured.speedup if row.measured else None
    if speedup is None or speedup.interval is None:
        return _NONE
    return f"{_ratio(speedup.interval.low)} to {_ratio(speedup.interval.high)}"


def _digits(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return _NONE if value is None else format_ratio(value)


def _count(value: float | None) -> str:
    return _NONE if value is None else format_count(value)


def _whole(value: int | None) -> str:
    return _NONE if value is None else str(value)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


_Figure = tuple[str, str, "Callable[[PaperRow], str]"]

_FIGURES: tuple[_Figure, ...] = (
    ("ms", "paper", lambda row: _digits(row.published.latency_or_inverse_ms)),
    ("ms", "here", lambda row: _digits(row.measured.latency_ms if row.measured else None)),
    ("speed-up", "paper", lambda row: _ratio(row.published_speedup)),
    ("speed-up", "here", _measured_ratio),
    ("95 %", "here", _ratio_interval),
    ("samples/s", "paper", lambda row: _digits(row.published.samples_per_s)),
    (
        "samples/s",
        "here",
        lambda row: _digits(row.measured.samples_per_s if row.measured else None),
    ),
    ("parameters", "paper", lambda row: _count(row.published.parameters)),
    ("parameters", "here", lambda row: _count(row.measured.parameters if row.measured else None)),
    ("FLOPs", "paper", lambda row: _count(row.published.flops)),
    ("FLOPs", "here", lambda row: _count(row.measured.flops if row.measured else None)),
    ("depth", "paper", lambda row: _whole(row.published.depth)),
    ("depth", "here", lambda row: _whole(row.measured.depth if row.measured else None)),
    ("top-1 %", "paper", lambda row: _percent(row.published.top1)),
    ("top-5 %", "paper", lambda row: _percent(row.published.top5)),
    ("CIFAR-10 error %", "paper", lambda row: _percent(row.published.error_cifar10)),
    ("CIFAR-100 error %", "paper", lambda row: _percent(row.published.error_cifar100)),
    ("COCO AP", "paper", lambda row: _percent(row.published.average_precision)),
)
"""Heading, origin and cell of every column."""
