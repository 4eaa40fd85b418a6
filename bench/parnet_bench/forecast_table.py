"""A forecast as tables and remarks for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_export.console import (
    format_bytes,
    format_ms,
    format_percent,
    format_ratio,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Group
    from rich.table import Table

    from parnet_bench.forecast import Detail, Forecast, ForecastRow

_MOST_STEPS = 40
"""Of longer timelines only the critical path is printed."""

_NS_PER_MS = 1e6


def render(forecast: Forecast, detail: Detail) -> Group:
    """Return a forecast as tables, with the timeline of its last row."""
    from rich.console import Group
    from rich.text import Text

    last = forecast.rows[-1]
    return Group(
        Text(printable(f"{forecast.network}: {forecast.description}"), style="bold"),
        _rows(forecast),
        *(Text(printable(remark)) for remark in remarks_on(forecast)),
        Text(f"\nOne inference on {_devices(last)}", style="bold"),
        _timeline(detail),
        Text(printable(last.verdict.sentence)),
    )


def remarks_on(forecast: Forecast) -> Iterator[str]:
    """Yield what a reader of the figures must know, one sentence each."""
    basis, link = forecast.basis, forecast.link
    if basis.source == "measured":
        yield f"Costs of segments: measured on {basis.device}, {basis.environment}."
    else:
        yield (
            f"Costs of segments: ESTIMATED from FLOPs, bytes and launches for {basis.environment}; "
            "measured ones take their place with --costs."
        )
    yield (
        f"Link: {link.name}, {link.latency_us:g} us and {link.gb_per_s:g} GB/s. "
        f"Speed-ups are against the whole network on one lane, {format_ms(forecast.one_lane_ms)}."
    )
    if forecast.objective == "throughput":
        yield (
            f"Planned for throughput; interval: from one inference to the next with "
            f"{forecast.rows[-1].in_flight} in flight."
        )
    if any(not row.is_optimal for row in forecast.rows):
        yield "Where the plan is not proven optimal, the lower bound says what could be left."


def _rows(forecast: Forecast) -> Table:
    headings = ["devices", "lanes", "latency ms", "speed-up", "bound ms", "overlap", "copied"]
    pipelined = forecast.objective == "throughput"
    if pipelined:
        headings.insert(3, "interval ms")
    table = _table(*headings)
    table.add_column("bottleneck", overflow="fold")
    for row in forecast.rows:
        cells = [
            str(row.devices),
            str(row.lanes),
            _ms(row.latency_ms),
            format_ratio(row.speedup),
            f"{_ms(row.lower_bound_ms)}{' =' if row.is_optimal else ''}",
            format_percent(row.overlap),
            format_bytes(row.copied_bytes),
            f"{printable(row.bottleneck.name)}, {format_percent(row.bottleneck.share)}",
        ]
        if pipelined:
            cells.insert(3, _ms(row.interval_ms))
        table.add_row(*cells)
    return table


def _timeline(detail: Detail) -> Table:
    critical = {part.span for part in detail.analysis.critical_path}
    spans = [span for spans in detail.recording.busy_by_lane.values() for span in spans]
    shown = spans if len(spans) <= _MOST_STEPS else [s for s in spans if s in critical]
    table = _table("begin ms", "end ms", "takes ms", first="lane")
    table.add_column("step", overflow="fold")
    table.add_column("critical", no_wrap=True)
    devices = {lane.name: lane.device for lane in detail.recording.lanes}
    previous = ""
    for span in shown:
        is_first, previous = span.lane != previous, span.lane
        begin_ns = span.begin_ns - detail.recording.begin_ns
        times_ns = (begin_ns, begin_ns + span.duration_ns, span.duration_ns)
        table.add_row(
            printable(f"{span.lane}, {devices[span.lane]}") if is_first else "",
            *(_ms(time_ns / _NS_PER_MS) for time_ns in times_ns),
            printable(span.label if span.kind == "run" else f"copy {span.label}"),
            "*" if span in critical else "",
        )
    return table


def _table(*headings: str, first: str = "") -> Table:
    """Return a table of numbers, after a column of names if `first` gives it a heading."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    if first:
        table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _devices(row: ForecastRow) -> str:
    lanes = f"{row.lanes} lane{'s' if row.lanes > 1 else ''}"
    return f"{row.devices} device{'s' if row.devices > 1 else ''} with {lanes}"


def _ms(duration_ms: float) -> str:
    return format_ms(duration_ms).removesuffix(" ms")
