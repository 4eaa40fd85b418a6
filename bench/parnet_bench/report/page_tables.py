"""The tables of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_bench.report.split_cells import REMARK_ON_PARTS, SPLIT_HEADINGS, split_cells
from parnet_bench.results.cost_columns import (
    HEADINGS,
    NONE,
    Cell,
    cells_of,
    costs_of,
    remarks_on_costs,
    used_columns,
)
from parnet_export.console import format_ms

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_bench.results.result import Result
    from parnet_bench.results.summary import PercentileSummary, RowSummary
    from parnet_bench.stats.statistics import Interval

_MEDIAN = 50


@dataclass(frozen=True, slots=True)
class TableView:
    """A table with its remarks; the first column is the row's name."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    remarks: tuple[str, ...]


def cost_table(result: Result, summaries: Sequence[RowSummary]) -> TableView:
    """Return what rows take besides time, without the columns that hold nothing."""
    costs = costs_of(result, summaries)
    rows = [cells_of(cost) for cost in costs]
    used = used_columns(rows)
    return TableView(
        tuple(HEADINGS[index] for index in used),
        tuple(tuple(row[index] for index in used) for row in rows),
        tuple(remarks_on_costs(result, costs)),
    )


def part_table(summaries: Sequence[RowSummary]) -> TableView | None:
    """Return the medians of the parts of an inference; None where no row tells any."""
    if not any(summary.split for summary in summaries):
        return None
    rows = [(Cell(summary.name), *map(Cell, split_cells(summary.split))) for summary in summaries]
    return TableView(("row", *SPLIT_HEADINGS), tuple(rows), (REMARK_ON_PARTS,))


def figure_table(result: Result, summaries: Sequence[RowSummary]) -> TableView:
    """Return all figures of all rows' latencies and throughputs."""
    percents = [p.percent for p in summaries[0].percentiles if p.percent != _MEDIAN]
    headings = ["row", "weights", "median ms", "95 %", "MAD", "least", "most"]
    headings += [f"p{percent:g}" for percent in percents]
    headings += ["samples/s", "samples", "rounds", "processes"]
    is_pipelined = any(summary.pipelined for summary in summaries)
    if is_pipelined:
        headings += ["in flight", "samples/s then"]
    rows = [
        (
            Cell(summary.name),
            Cell(row.description.provenance.weights),
            *map(Cell, _figures(summary, is_pipelined=is_pipelined)),
        )
        for row, summary in zip(result.rows, summaries, strict=True)
    ]
    return TableView(tuple(headings), tuple(rows), tuple(_remarks(summaries)))


def bare_ms(value_ms: float) -> str:
    """Return milliseconds without the unit."""
    return format_ms(value_ms).removesuffix(" ms")


def range_ms(interval: Interval | None) -> str:
    """Return an interval in milliseconds; empty where there is none."""
    return "" if interval is None else f"{bare_ms(interval.low)} to {format_ms(interval.high)}"


def _figures(summary: RowSummary, *, is_pipelined: bool) -> Iterator[str]:
    yield bare_ms(summary.median_ms)
    yield range_ms(summary.median_interval_ms).removesuffix(" ms") or NONE
    yield from (bare_ms(value) for value in (summary.mad_ms, summary.min_ms, summary.max_ms))
    yield from (_percentile(p) for p in summary.percentiles if p.percent != _MEDIAN)
    yield f"{summary.samples_per_s:,.1f}"
    yield from map(str, (summary.samples, summary.rounds, summary.processes))
    if is_pipelined:
        pipelined = summary.pipelined
        yield str(pipelined.in_flight) if pipelined else NONE
        yield f"{pipelined.samples_per_s:,.1f}" if pipelined else NONE


def _percentile(entry: PercentileSummary) -> str:
    if entry.tail_ms is None:
        return f"takes {entry.tail_samples_needed}"
    return bare_ms(entry.tail_ms)


def _remarks(summaries: Sequence[RowSummary]) -> Iterator[str]:
    if any(p.percent != _MEDIAN for summary in summaries for p in summary.percentiles):
        yield (
            "Percentiles above the median are MLPerf's early-stopping estimate: with 99 % "
            "confidence the true one is no larger. Where there are too few samples for it, the "
            "table says how many it takes."
        )
    yield "Samples per second are those of one inference at a time, unless several are in flight."
