"""A result as tables for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parnet_bench.summary import RowSummary, summarise
from parnet_export.console import format_count, format_ms, format_ratio, format_shape, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Group
    from rich.table import Table

    from parnet_bench.result import Result, RowDescription
    from parnet_bench.statistics import Interval

_NONE = "-"
_BUSY_LOAD_PER_CORE = 0.5
_FORMS = {
    "unfused": "the network as trained, one engine",
    "whole": "the whole graph, one engine",
    "streams": "one engine for each segment, side by side where they can",
}

_LEVELS = {"none": "no", "repvgg": "repvgg", "full": "full"}


def render(result: Result) -> Group:
    """Return a result as tables and remarks."""
    from rich.console import Group
    from rich.text import Text

    summaries = summarise(result)
    remarks = [Text(printable(remark)) for remark in remarks_on(result, summaries)]
    return Group(_latencies(summaries), _networks(result, summaries), *remarks)


def remarks_on(result: Result, summaries: Sequence[RowSummary]) -> Iterator[str]:
    """Yield what a reader of the figures must know, one sentence each."""
    environment = result.environment
    rounds = f"{len(result.orders)} rounds in random order"
    if result.partial:
        yield f"Partial: interrupted after {rounds}."
    descriptions = [row.description for row in result.rows]
    for form in dict.fromkeys(description.form for description in descriptions):
        yield f"{form}: {_FORMS[form]}."
    cores = descriptions[0].cores
    runtimes = (
        f"{name} {version}"
        for name, version in environment.libraries.items()
        if name.startswith(("onnxruntime", "openvino", "tensorrt"))
    )
    yield (
        f"{environment.cpu_model}, {len(cores)} of {len(environment.affinity)} usable cores for "
        f"every row, {', '.join(runtimes)}; {rounds}, one inference at a time."
    )
    load = environment.load_average[0]
    if load > _BUSY_LOAD_PER_CORE * (environment.logical_cores or 1):
        yield (
            f"The machine was busy when this began (load {load:.1f} on "
            f"{environment.logical_cores} cores): the figures may not repeat."
        )
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
    for row in result.rows:
        if not row.recording.settled:
            yield f"{row.description.name} had not settled when its warm-up ended."
    yield from _missing_percentiles(summaries)
    yield from result.notes


def _latencies(summaries: Sequence[RowSummary]) -> Table:
    table = _table("median ms", "95 %", "p90", "p99", "speed-up", "95 %")
    for row in summaries:
        table.add_row(
            printable(row.name),
            _ms(row.median_ms),
            _interval(row.median_interval_ms, _ms),
            _ms(row.p90_ms),
            _ms(row.p99_ms),
            format_ratio(row.speedup),
            _interval(row.speedup_interval, _ratio),
        )
    return table


def _networks(result: Result, summaries: Sequence[RowSummary]) -> Table:
    inputs = [_input(row.description) for row in result.rows]
    table = _table("samples/s", "parameters", "FLOPs", "depth", "fused")
    if len(set(inputs)) > 1:
        table.add_column("input")
    for row, summary, shapes in zip(result.rows, summaries, inputs, strict=True):
        description = row.description
        cells = [
            printable(description.name),
            f"{summary.samples_per_s:,.1f}",
            format_count(description.parameters),
            format_count(description.flops),
            str(description.depth),
            _LEVELS.get(description.provenance.level, _NONE),
            shapes,
        ]
        table.add_row(*cells[: len(table.columns)])
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


def _missing_percentiles(summaries: Sequence[RowSummary]) -> Iterator[str]:
    """Say for each percentile that is missing what it takes."""
    for percent in (90, 99):
        lacking = [row for row in summaries if getattr(row, f"p{percent}_ms") is None]
        if lacking:
            needed = getattr(lacking[0], f"p{percent}_samples_needed")
            longest_ms = max(row.median_ms for row in lacking)
            seconds = math.ceil(1.1 * needed * longest_ms / 1000)
            names = (
                "every row"
                if len(lacking) == len(summaries)
                else ", ".join(row.name for row in lacking)
            )
            yield f"p{percent} takes {needed} samples; for {names} use --min-time {seconds}."


def _ms(value: float | None) -> str:
    return _NONE if value is None else format_ms(value).removesuffix(" ms")


def _ratio(value: float) -> str:
    return format_ratio(value).removesuffix("x")


def _interval(interval: Interval | None, show: Callable[[float], str]) -> str:
    return _NONE if interval is None else f"{show(interval.low)} to {show(interval.high)}"
