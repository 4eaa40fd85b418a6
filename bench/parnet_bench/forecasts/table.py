"""A forecast as tables and remarks for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.schedule.program import Copy
from parnet_export.console import (
    format_bytes,
    format_ms,
    format_ratio,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Group
    from rich.table import Table

    from parnet_bench.forecasts.forecast import Detail, Forecast, ForecastRow
    from parnet_engines.schedule.recording import Span

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
            f"Costs of segments: ESTIMATED for {basis.environment}, from launches, FLOPs (two for "
            "each multiply-accumulate) and bytes that are counted in the network's ONNX graph. "
            "Give measured ones with --costs."
        )
    yield (
        f"Link: {link.name}, {link.latency_us:g} us and {link.gb_per_s:g} GB/s. "
        f"Speed-ups are against the whole network on one lane, {format_ms(forecast.one_lane_ms)}"
        f"{' (the sum of its segments)' if forecast.whole_is_sum else ''}."
    )
    yield (
        "Latencies and bounds are milliseconds. No plan can be below the bound: the critical "
        "path, or all work spread over all lanes."
    )
    optimal = [row for row in forecast.rows if row.is_optimal]
    if optimal and forecast.plan in {"auto", "streams"}:
        which = "Every plan" if len(optimal) == len(forecast.rows) else _counted(optimal)
        yield f"{which} is proven to be the best there is."
    if forecast.objective == "throughput":
        last = forecast.rows[-1]
        each_ms = forecast.one_lane_ms / last.devices
        yield (
            f"Interval: from one inference to the next, with {last.in_flight} in flight in the "
            f"last row. A whole network on each of {last.devices} devices would give one every "
            f"{format_ms(each_ms)}, at the latency of one."
        )


def _rows(forecast: Forecast) -> Table:
    """Return the table of rows; what is always the same, or beside the point, has no column."""
    pipelined = forecast.objective == "throughput"
    columns = {
        "devices": [str(row.devices) for row in forecast.rows],
        "lanes": [str(row.lanes) for row in forecast.rows],
        "latency": [_ms(row.latency_ms) for row in forecast.rows],
        "interval": [_ms(row.interval_ms) for row in forecast.rows],
        "speed-up": [format_ratio(row.speedup) for row in forecast.rows],
        "bound": [_ms(row.lower_bound_ms) for row in forecast.rows],
        "overlap": [f"{row.overlap:.0%}" for row in forecast.rows],
        "copied": [format_bytes(row.copied_bytes) for row in forecast.rows],
    }
    if all(row.devices == row.lanes for row in forecast.rows):
        del columns["lanes"]
    del columns["overlap" if pipelined else "interval"]
    table = _table(*columns)
    table.add_column("bottleneck", overflow="fold", min_width=10)
    for cells, row in zip(zip(*columns.values(), strict=True), forecast.rows, strict=True):
        bottleneck = f"{row.bottleneck.name} {row.bottleneck.share:.0%}"
        table.add_row(*cells, printable(bottleneck))
    return table


def _timeline(detail: Detail) -> Table:
    critical = {part.span for part in detail.analysis.critical_path}
    spans = [span for spans in detail.recording.busy_by_lane.values() for span in spans]
    shown = spans if len(spans) <= _MOST_STEPS else [s for s in spans if s in critical]
    table = _table("begin ms", "end ms", "takes ms", first="lane")
    table.add_column("step (* critical path)", no_wrap=True)
    devices = {lane.name: lane.device for lane in detail.recording.lanes}
    previous = ""
    for span in shown:
        is_first, previous = span.lane != previous, span.lane
        begin_ns = span.begin_ns - detail.recording.begin_ns
        times_ns = (begin_ns, begin_ns + span.duration_ns, span.duration_ns)
        mark = "*" if span in critical else " "
        table.add_row(
            printable(f"{span.lane}, {devices[span.lane]}") if is_first else "",
            *(_ms(time_ns / _NS_PER_MS) for time_ns in times_ns),
            f"{mark} {printable(_name(detail, span))}",
        )
    return table


def _name(detail: Detail, span: Span) -> str:
    step = detail.program.steps[span.step]
    if isinstance(step, Copy):
        return f"copy {detail.program.buffers_by_name[step.target].tensor.name}"
    return span.label


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


def _counted(rows: Sequence[ForecastRow]) -> str:
    return f"The plan for {' and '.join(str(row.devices) for row in rows)} devices"


def _devices(row: ForecastRow) -> str:
    lanes = f"{row.lanes} lane{'s' if row.lanes > 1 else ''}"
    return f"{row.devices} device{'s' if row.devices > 1 else ''} with {lanes}"


def _ms(duration_ms: float) -> str:
    return format_ms(duration_ms).removesuffix(" ms")
