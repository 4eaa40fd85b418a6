"""What a report says, as texts and pictures, before it is a page or a document."""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.report import chart_svg, row_charts
from parnet_bench.report.page_facts import facts_of, lead_of
from parnet_bench.report.page_tables import bare_ms, cost_table, figure_table, part_table, range_ms
from parnet_bench.report.row_timeline_view import RowTimelineView, timeline_view
from parnet_bench.report.scatter_chart import Point, Scatter, scatter
from parnet_bench.results.findings import find
from parnet_bench.results.published_accuracy import published_accuracy
from parnet_bench.results.summary import summarise
from parnet_bench.results.weights_label import Tag, tags_of
from parnet_export.console import format_percent, format_ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_bench.report.page_tables import TableView
    from parnet_bench.report.scale import Scale
    from parnet_bench.results.findings import Finding
    from parnet_bench.results.result import Result, Row
    from parnet_bench.results.summary import RowSummary
    from parnet_bench.stats.statistics import Interval

_COLOURS = 12
_NS_PER_MS = 1e6
_MILLISECONDS = "milliseconds"


@dataclass(frozen=True, slots=True)
class RowView:
    """One row: names and figures as texts, charts as SVG.

    Parameters
    ----------
    name, css, tags
        The row's name, the class of its colour, and what must stand beside its name.
    median, interval
        In milliseconds, without and with the unit; `interval` is empty where there is none.
    verdict
        ``"faster"``, ``"slower"``, ``"unclear"``, or empty for a reference.
    speedup, speedup_interval, speedup_sentence
        Against the reference.
    beyond
        How many samples the chart of latencies leaves out; empty if none.
    distribution, ratio, rounds
        The row's strips.
    spread
        The scale of `rounds`.
    timeline
        One inference on its lanes; None where nobody has recorded one.
    """

    name: str
    css: str
    tags: tuple[Tag, ...]
    median: str
    interval: str
    verdict: str
    speedup: str
    speedup_interval: str
    speedup_sentence: str
    beyond: str
    distribution: str
    ratio: str
    rounds: str
    spread: str
    timeline: RowTimelineView | None


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A point of a scatter, for the list below it."""

    name: str
    css: str
    value: str


@dataclass(frozen=True, slots=True)
class ScatterView:
    """A scatter with its words."""

    title: str
    note: str
    scatter: Scatter
    rows: tuple[LegendEntry, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PageView:
    """Everything that a report shows; the parts are in the order of the page."""

    title: str
    lead: str
    tags: tuple[Tag, ...]
    rows: tuple[RowView, ...]
    warnings: tuple[Finding, ...]
    latency_axis: str
    ratio_axis: str
    scatters: tuple[ScatterView, ...]
    parts: TableView | None
    costs: TableView
    figures: TableView
    command: str
    facts: tuple[tuple[str, str], ...]

    @property
    def has_timelines(self) -> bool:
        """Whether any row has one."""
        return any(row.timeline for row in self.rows)


def view_of(result: Result) -> PageView:
    """Return what a report of a result shows; equal results give equal reports."""
    summaries = summarise(result)
    samples_ms = [np.asarray(row.recording.samples_ns) / _NS_PER_MS for row in result.rows]
    latencies = row_charts.latency_scale(samples_ms)
    compared = [s for s in summaries if s.reference != s.name]
    ratios = row_charts.ratio_scale(
        [s.speedup for s in summaries], [s.speedup_interval for s in summaries]
    )
    tags = tags_of(result)
    scales = _Scales(latencies, ratios)
    rows = tuple(
        _row_view(index, row, summary, scales, tags[index])
        for index, (row, summary) in enumerate(zip(result.rows, summaries, strict=True))
    )
    return PageView(
        title=f"Latency of {_listed(dict.fromkeys(s.network for s in summaries))}",
        lead=lead_of(result),
        tags=tuple(_page_tags(result, tags)),
        rows=rows,
        warnings=find(result),
        latency_axis=chart_svg.axis(latencies, _MILLISECONDS),
        ratio_axis=chart_svg.axis(ratios, "times as fast as the reference") if compared else "",
        scatters=tuple(_scatters(result, summaries)),
        parts=part_table(summaries),
        costs=cost_table(result, summaries),
        figures=figure_table(result, summaries),
        command=shlex.join(result.environment.command),
        facts=tuple(facts_of(result)),
    )


def _listed(names: dict[str, None]) -> str:
    known = list(names)
    if len(known) > 3:
        return f"{known[0]} and {len(known) - 1} others"
    return " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)


def _page_tags(result: Result, tags: Sequence[tuple[Tag, ...]]) -> Iterator[Tag]:
    if result.partial:
        yield Tag("partial: interrupted", "caution")
    yield from dict.fromkeys(tag for row in tags for tag in row)


@dataclass(frozen=True, slots=True)
class _Scales:
    """What the strips of a page share."""

    latencies: Scale
    ratios: Scale


def _row_view(
    index: int, row: Row, summary: RowSummary, scales: _Scales, tags: tuple[Tag, ...]
) -> RowView:
    samples_ms = np.asarray(row.recording.samples_ns) / _NS_PER_MS
    latencies, ratios = scales.latencies, scales.ratios
    name, interval = summary.name, summary.speedup_interval
    is_reference = summary.reference == name
    left_out = row_charts.beyond(samples_ms, latencies)
    strips = _rounds(row, name)
    return RowView(
        name=name,
        css=_colour(index),
        tags=tags,
        median=bare_ms(summary.median_ms),
        interval=range_ms(summary.median_interval_ms),
        verdict="" if is_reference else row_charts.verdict_of(interval),
        speedup=format_ratio(summary.speedup),
        speedup_interval="reference" if is_reference else _range_ratio(interval),
        speedup_sentence=_sentence(summary),
        beyond=f"{left_out} slower" if left_out else "",
        distribution=row_charts.distribution_strip(
            samples_ms, summary.median_interval_ms, latencies, name, _colour(index)
        ),
        ratio=row_charts.ratio_strip(
            summary.speedup, interval, ratios, name, is_reference=is_reference
        ),
        rounds=strips[0],
        spread=strips[1],
        timeline=timeline_view(row),
    )


def _rounds(row: Row, name: str) -> tuple[str, str]:
    """Return the strip of a row's rounds, and its scale."""
    medians = [float(np.median(turn)) / _NS_PER_MS for turn in row.recording.rounds_ns]
    counts = [len(process.rounds_ns) for process in row.recording.processes]
    borders = [int(border) for border in np.cumsum(counts)[:-1]]
    strip, limit = row_charts.rounds_strip(medians, borders, name)
    return strip, f"within {format_percent(limit)}"


def _sentence(summary: RowSummary) -> str:
    if summary.reference == summary.name:
        return "the reference"
    ratio, interval = format_ratio(summary.speedup), summary.speedup_interval
    if interval is None:
        return f"{ratio} against {summary.reference}, from too few rounds for an interval"
    if interval.contains(1.0):
        return f"{ratio}: no clear difference from {summary.reference}"
    return f"{ratio} as fast as {summary.reference}"


def _scatters(result: Result, summaries: Sequence[RowSummary]) -> Iterator[ScatterView]:
    by_metric: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    for index, row in enumerate(result.rows):
        known = published_accuracy(row.description)
        if known is not None:
            by_metric[known.metric].append((index, known.percent, known.source))
    is_random = any(row.description.provenance.weights == "random" for row in result.rows)
    for metric, entries in by_metric.items():
        note = (
            "Accuracies are published ones of the authors' weights, not measured here"
            + (", where weights are random" if is_random else "")
            + ". Up and to the left is better."
        )
        yield _scatter_view(
            f"{metric} against latency",
            note,
            [(index, value) for index, value, _ in entries],
            summaries,
            unit=" %",
            sources=tuple(dict.fromkeys(source for _, _, source in entries)),
        )
    yield _scatter_view(
        "Depth against latency",
        "Depth is the longest chain of convolutions and matrix products: what cannot run side by "
        "side.",
        [(index, float(row.description.depth)) for index, row in enumerate(result.rows)],
        summaries,
    )


def _scatter_view(
    title: str,
    note: str,
    entries: Sequence[tuple[int, float]],
    summaries: Sequence[RowSummary],
    *,
    unit: str = "",
    sources: tuple[str, ...] = (),
) -> ScatterView:
    points = [
        Point(
            summaries[index].name,
            _colour(index),
            summaries[index].median_ms,
            summaries[index].median_interval_ms,
            value,
        )
        for index, value in entries
    ]
    legend = (LegendEntry(p.name, p.css, f"{p.value:g}{unit}") for p in points)
    return ScatterView(title, note, scatter(points, title, _MILLISECONDS), tuple(legend), sources)


def _colour(index: int) -> str:
    return f"c{index % _COLOURS + 1}"


def _range_ratio(interval: Interval | None) -> str:
    if interval is None:
        return "no interval"
    return f"{interval.low:.2f} to {interval.high:.2f}"
