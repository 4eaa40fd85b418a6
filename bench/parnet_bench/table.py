"""A result as tables for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parnet_bench.summary import RowSummary, summarise
from parnet_export.console import format_count, format_ms, format_ratio, format_shape, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Group
    from rich.table import Table

    from parnet_bench.result import Result, RowDescription
    from parnet_bench.statistics import Interval

_NS_PER_S = 1_000_000_000
_NONE = "-"
_FORMS = {
    "unfused": "unfused, one graph",
    "whole": "fused, one graph",
    "streams": "fused, one engine per segment",
}


def render(result: Result) -> Group:
    """Return the tables and remarks of a result."""
    from rich.console import Group
    from rich.text import Text

    summaries = summarise(result)
    remarks = [Text(printable(remark)) for remark in remarks_on(result, summaries)]
    return Group(_latencies(summaries), _networks(result), *remarks)


def remarks_on(result: Result, summaries: tuple[RowSummary, ...]) -> Iterator[str]:
    """Yield what a reader of the figures must know, one sentence each."""
    environment = result.environment
    rounds = f"{len(result.orders)} rounds in random order"
    if result.partial:
        yield f"Partial: interrupted after {rounds}."
    runtime = ", ".join(
        f"{name} {version}"
        for name, version in environment.libraries.items()
        if name.startswith(("onnxruntime", "openvino", "tensorrt"))
    )
    yield f"{environment.cpu_model}, {runtime}, {rounds}, one inference at a time."
    random = {row.description.network: None for row in result.rows if _is_random(row.description)}
    if random:
        yield f"Random weights: {', '.join(random)}. Latencies hold, outputs mean nothing."
    for row in result.rows:
        if not row.recording.settled:
            yield f"{row.description.name} had not settled when its warm-up ended."
    yield from _missing_percentiles(summaries)
    yield from result.notes


def _latencies(summaries: tuple[RowSummary, ...]) -> Table:
    table = _table()
    table.add_column("Row", no_wrap=True)
    for heading in ("median ms", "95 %", "p90 ms", "p99 ms", "samples/s", "speed-up", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summaries:
        table.add_row(
            printable(row.name),
            _ms(row.median_ms),
            _interval(row.median_interval_ms, _ms),
            _ms(row.p90_ms),
            _ms(row.p99_ms),
            f"{row.samples_per_s:,.1f}",
            format_ratio(row.speedup),
            _interval(row.speedup_interval, _ratio),
        )
    return table


def _networks(result: Result) -> Table:
    table = _table()
    table.add_column("Row", no_wrap=True)
    table.add_column("what runs")
    table.add_column("weights")
    table.add_column("input")
    for heading in ("parameters", "FLOPs", "depth"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("cores")
    for row in result.rows:
        description = row.description
        seed = description.provenance.seed
        weights = description.provenance.weights
        shapes = ", ".join(format_shape(tensor.shape) for tensor in description.inputs)
        table.add_row(
            printable(description.name),
            _FORMS[description.form],
            f"{weights} ({seed})" if weights == "random" else weights,
            f"{shapes} {description.precision or ''}".rstrip(),
            format_count(description.parameters),
            format_count(description.flops),
            str(description.depth),
            description.division,
        )
    return table


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _is_random(description: RowDescription) -> bool:
    return description.provenance.weights == "random"


def _missing_percentiles(summaries: tuple[RowSummary, ...]) -> Iterator[str]:
    """Say once for each percentile what its slowest row takes."""
    for percent in (90, 99):
        lacking = [row for row in summaries if getattr(row, f"p{percent}_ms") is None]
        if lacking:
            needed = getattr(lacking[0], f"p{percent}_samples_needed")
            longest_ms = max(row.median_ms for row in lacking)
            seconds = math.ceil(1.1 * needed * longest_ms / 1000)
            names = ", ".join(row.name for row in lacking)
            yield f"p{percent} takes {needed} samples; for {names}: --min-time {seconds}."


def _ms(value: float | None) -> str:
    return _NONE if value is None else format_ms(value).removesuffix(" ms")


def _ratio(value: float) -> str:
    return format_ratio(value).removesuffix("x")


def _interval(interval: Interval | None, show: object) -> str:
    if interval is None or not callable(show):
        return _NONE
    return f"{show(interval.low)} to {show(interval.high)}"
