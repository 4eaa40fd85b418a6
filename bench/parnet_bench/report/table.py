"""A result as tables for people."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.report.split_cells import REMARK_ON_PARTS, SPLIT_HEADINGS, split_cells
from parnet_bench.results.cost_columns import (
    HEADINGS,
    cells_of,
    costs_of,
    remarks_on_costs,
    used_columns,
)
from parnet_bench.results.findings import find
from parnet_bench.results.summary import RowSummary, summarise
from parnet_bench.results.used_runtimes import ways_of
from parnet_export.console import (
    format_count,
    format_ms,
    format_ratio,
    format_shape,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Group
    from rich.table import Table

    from parnet_bench.results.cost_columns import RowCosts
    from parnet_bench.results.findings import Finding
    from parnet_bench.results.result import Result, RowDescription
    from parnet_bench.results.summary import PercentileSummary
    from parnet_bench.stats.statistics import Interval

_NONE = "-"
_ELSEWHERE = {"parameters", "FLOPs", "depth", "weights", "graphs"}
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
_NS_PER_US = 1000
_FORMS = {
    "unfused": "the network as trained, one engine",
    "whole": "the whole graph, one engine",
    "streams": "one engine for each segment, side by side where they can",
}

_LEVELS = {"none": "no", "repvgg": "repvgg", "full": "full"}


def render(result: Result) -> Group:
    """Return a result as tables, remarks and warnings."""
    from rich.console import Group
    from rich.text import Text

    summaries = summarise(result)
    remarks = [Text(printable(remark)) for remark in remarks_on(result, summaries)]
    warnings = [
        Text.assemble(("warning: ", "bold yellow"), printable(line))
        for line in warning_lines(find(result))
    ]
    tables = [_latencies(summaries), _networks(result, summaries)]
    if any(summary.split for summary in summaries):
        tables.append(_parts(summaries))
    if any(row.footprint for row in result.rows):
        costs = costs_of(result, summaries)
        tables.append(_resources(costs))
        remarks += [Text(printable(remark)) for remark in remarks_on_costs(result, costs)]
    return Group(*tables, *remarks, *warnings)


def warning_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield each warning with its remedy; rows of which the same holds share a line."""
    by_remedy: defaultdict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        by_remedy[finding.kind, finding.remedy].append(finding)
    for (_, remedy), (first, *others) in by_remedy.items():
        rows = ", ".join(finding.row for finding in others if finding.row is not None)
        also = f" The same goes for {rows}." if rows else ""
        yield f"{first.sentence}{also} {remedy}"


def remarks_on(result: Result, summaries: Sequence[RowSummary]) -> Iterator[str]:
    """Yield what a reader of the figures must know, one sentence each."""
    environment = result.environment
    descriptions = [row.description for row in result.rows]
    for form in dict.fromkeys(description.form for description in descriptions):
        yield f"{form}: {_FORMS[form]}."
    cores = descriptions[0].cores
    used = {row.engine for row in result.rows if row.engine}
    runtimes = (
        f"{name} {version}"
        for name, version in environment.libraries.items()
        if name.startswith(("onnxruntime", "openvino", "tensorrt", *used))
    )
    yield from ways_of(result)
    yield (
        f"{environment.cpu_model}, {len(cores)} of {len(environment.affinity)} usable cores for "
        f"every row, {', '.join(runtimes)}."
    )
    yield _procedure(result)
    if any(p.percent > 50 and p.tail_ms for row in summaries for p in row.percentiles):
        yield (
            "Percentiles above the median are MLPerf's early-stopping estimate: with 99 % "
            "confidence, the true one is no larger."
        )
    pipelined = next((row.pipelined for row in summaries if row.pipelined), None)
    if pipelined is not None:
        yield (
            f"Latencies are those of one inference at a time; samples/s are those of "
            f"{pipelined.in_flight} in flight."
        )
    yield from result.procedure.remarks
    if any(summary.split for summary in summaries):
        yield REMARK_ON_PARTS
    if result.overhead_ns:
        overhead_us = float(np.median(result.overhead_ns)) / _NS_PER_US
        yield f"Harness and session add {overhead_us:.1f} us to a latency."
    inputs = dict.fromkeys(map(_input, descriptions))
    if len(inputs) == 1:
        yield f"Input: {', '.join(inputs)}."
    random = dict.fromkeys(
        f"{description.network} (seed {description.provenance.seed})"
        for description in descriptions
        if description.provenance.weights == "random"
    )
    if random:
        yield f"Random weights: {', '.join(random)}."
    yield from result.notes


def _procedure(result: Result) -> str:
    procedure = result.procedure
    counts = [len(orders) for orders in result.orders]
    rounds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    order = "in random order" if procedure.interleave else "row by row"
    processes = f"{len(counts)} process{'es' if len(counts) > 1 else ''}"
    stopped = {
        "target": f"stopped when intervals were expected within {procedure.target_ci:.1%}",
        "time": f"stopped when {procedure.max_time_s:g} s were up",
        "min-time": f"stopped when each row had {procedure.min_time_s:g} s",
        "rounds": "as many as were asked for",
        "interrupted": "interrupted",
    }[result.stopped]
    return f"{rounds} rounds {order} in each of {processes}; {stopped}."


def _latencies(summaries: Sequence[RowSummary]) -> Table:
    percents = [p.percent for p in summaries[0].percentiles if p.percent != 50]
    table = _table(
        "median ms", "95 %", *(f"p{percent:g}" for percent in percents), "speed-up", "95 %"
    )
    for row in summaries:
        table.add_row(
            printable(row.name),
            _ms(row.median_ms),
            _interval(row.median_interval_ms, _ms),
            *(_ms(_shown(p)) for p in row.percentiles if p.percent != 50),
            format_ratio(row.speedup),
            _interval(row.speedup_interval, _ratio),
        )
    return table


def _shown(percentile: PercentileSummary) -> float | None:
    return percentile.tail_ms if percentile.percent > 50 else percentile.value_ms


def _networks(result: Result, summaries: Sequence[RowSummary]) -> Table:
    inputs = [_input(row.description) for row in result.rows]
    table = _table("samples/s", "parameters", "FLOPs", "depth", "fused")
    if len(set(inputs)) > 1:
        table.add_column("input")
    for row, summary, shapes in zip(result.rows, summaries, inputs, strict=True):
        description, pipelined = row.description, summary.pipelined
        samples_per_s = pipelined.samples_per_s if pipelined else summary.samples_per_s
        cells = [
            printable(description.name),
            f"{samples_per_s:,.1f}",
            format_count(description.parameters),
            format_count(description.flops),
            str(description.depth),
            _LEVELS.get(description.provenance.level, _NONE),
            shapes,
        ]
        table.add_row(*cells[: len(table.columns)])
    return table


def _parts(summaries: Sequence[RowSummary]) -> Table:
    """Return the medians of the parts of an inference, in milliseconds."""
    table = _table(*SPLIT_HEADINGS)
    for row in summaries:
        table.add_row(printable(row.name), *split_cells(row.split))
    return table


def _resources(costs: Sequence[RowCosts]) -> Table:
    """Return what rows take besides time, and how near they come to the cores' limits."""
    rows = [cells_of(row) for row in costs]
    # What a network has stands in another table, and sizes of files in other formats.
    used = [index for index in used_columns(rows) if HEADINGS[index] not in _ELSEWHERE]
    table = _table(*(HEADINGS[index] for index in used[1:]))
    for column in table.columns[1:]:
        column.no_wrap = False  # headings may take two lines, figures may not
    for cells in rows:
        name, *figures = (printable(cells[index].text) for index in used)
        table.add_row(name, *(figure.replace(" ", _NO_BREAK_SPACE) for figure in figures))
    return table


def _table(*headings: str) -> Table:
    """Return a table whose first column gives way when the terminal is narrow."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("row", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _input(description: RowDescription) -> str:
    shapes = ", ".join(format_shape(tensor.shape) for tensor in description.inputs)
    return f"{shapes} {description.precision}" if description.precision else shapes


def _ms(value: float | None) -> str:
    return _NONE if value is None else format_ms(value).removesuffix(" ms")


def _ratio(value: float) -> str:
    return format_ratio(value).removesuffix("x")


def _interval(interval: Interval | None, show: Callable[[float], str]) -> str:
    return _NONE if interval is None else f"{show(interval.low)} to {show(interval.high)}"
