"""A session's timeline: recorded inferences, one of them analysed, and both for people."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from parnet_engines.cuda.devices import is_gpu
from parnet_engines.schedule.recording import Recording
from parnet_engines.timeline.analysis import analyse
from parnet_export.console import format_ms, format_percent, format_ratio, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from rich.console import Group
    from rich.table import Table

    from parnet_engines.base_session import AnySession
    from parnet_engines.planning.cost_table import CostTable
    from parnet_engines.schedule.placement import Lane
    from parnet_engines.timeline.analysis import Gap, TimelineAnalysis

_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class TimelineReport:
    """What recorded inferences say about concurrency.

    Parameters
    ----------
    network
        The network, with where its weights come from.
    engine, machine
        The runtime of the engines, and the machine.
    lanes
        The program's lanes.
    inferences_in_flight
        How many inferences overlap.
    latencies_ms, overlaps
        Of each recorded inference, in order: milliseconds from its first step to the end of
        its last one, and the fraction of busy time in which several lanes are at work.
    shown
        The inferences that `analysis` is about: the one of median latency, or some in the
        middle where several overlap.
    analysis
        How well the lanes worked together in them.
    remedy
        What to do about the verdict; empty where lanes overlap.
    """

    network: str
    engine: str
    machine: str
    lanes: tuple[Lane, ...]
    inferences_in_flight: int
    latencies_ms: tuple[float, ...]
    overlaps: tuple[float, ...]
    shown: tuple[int, ...]
    analysis: TimelineAnalysis
    remedy: str


def record(
    session: AnySession, inputs: Mapping[str, NDArray[Any]], *, inferences: int, warm_ups: int
) -> Recording:
    """Return what a session that records does, warmed up.

    As many callers run it at the same time as its program has inferences in flight.

    Parameters
    ----------
    session
        The session.
    inputs
        What every inference reads.
    inferences, warm_ups
        How many are recorded, and how many are run before.
    """
    with ThreadPoolExecutor(session.program.program.inferences_in_flight) as callers:
        list(callers.map(lambda _: session.run(inputs), range(warm_ups)))
        session.take_recording()
        list(callers.map(lambda _: session.run(inputs), range(inferences)))
    return session.take_recording()


def typical(recording: Recording, in_flight: int) -> Recording:
    """Return the inference of median latency, or what lies in the middle of overlapping ones."""
    numbers = recording.inferences
    if in_flight == 1:
        by_latency = sorted(numbers, key=lambda number: _latency_ms(recording.only(number)))
        return recording.only(by_latency[(len(by_latency) - 1) // 2])
    middle = max(0, len(numbers) // 2 - in_flight)
    chosen = set(numbers[middle : middle + 2 * in_flight])
    spans = tuple(span for span in recording.spans if span.inference in chosen)
    return Recording(recording.lanes, spans, recording.source)


def report_on(
    session: AnySession,
    recording: Recording,
    *,
    network: str,
    engine: str,
    machine: str,
    isolated: CostTable | None,
) -> tuple[TimelineReport, Recording]:
    """Analyse a recording, and return the part of it that the analysis is about.

    Parameters
    ----------
    session
        What was recorded.
    recording
        One inference at least.
    network, engine, machine
        As in `TimelineReport`.
    isolated
        What segments take alone, if that is known.
    """
    program = session.program.program
    shown = typical(recording, program.inferences_in_flight)
    each = [recording.only(number) for number in recording.inferences]
    analysis = analyse(program, shown, isolated)
    report = TimelineReport(
        network,
        engine,
        machine,
        program.lanes,
        program.inferences_in_flight,
        tuple(_latency_ms(one) for one in each),
        tuple(analyse(program, one).overlap for one in each),
        shown.inferences,
        analysis,
        analysis.verdict.remedy,
    )
    return report, shown


def _latency_ms(recording: Recording) -> float:
    return (recording.end_ns - recording.begin_ns) / _NS_PER_MS


def render(report: TimelineReport) -> Group:
    """Return a report as text and tables."""
    from rich.console import Group
    from rich.text import Text

    lines = itertools.chain([""], _facts(report))
    return Group(
        Text(printable(f"{report.network}: {report.engine}, {report.machine}"), style="bold"),
        _lane_table(report),
        _path_table(report),
        *(Text(printable(line)) for line in lines),
        Text(printable(f"{report.analysis.verdict.kind}: {_verdict(report)}"), style="bold"),
    )


def _verdict(report: TimelineReport) -> str:
    return " ".join(filter(None, (report.analysis.verdict.sentence, report.remedy)))


def _facts(report: TimelineReport) -> Iterator[str]:
    analysis, count = report.analysis, len(report.latencies_ms)
    low_ms, high_ms = min(report.latencies_ms), max(report.latencies_ms)
    plural = "" if count == 1 else "s"
    yield (
        f"{count} inference{plural}, median {format_ms(median(report.latencies_ms))} "
        f"({format_ms(low_ms)} to {format_ms(high_ms)}) with a median overlap of "
        f"{format_percent(median(report.overlaps))}."
    )
    which = "the one of median latency" if len(report.shown) == 1 else "some in the middle"
    yield (
        f"Shown is {which}: lanes overlap for {format_percent(analysis.overlap)} of the busy "
        f"time, and no lane is at work for {format_ms(analysis.wall.idle_ns / _NS_PER_MS)} of "
        f"{format_ms(analysis.wall.total_ns / _NS_PER_MS)}."
    )
    bottleneck = analysis.bottleneck
    yield (
        f"The critical path mostly is {bottleneck.name}, {format_percent(bottleneck.share)} of it."
    )
    if analysis.slowdown is not None:
        yield f"Segments take {format_ratio(analysis.slowdown)} as long as they do alone."
    else:
        text = (
            "What segments take alone is not known here, and so not whether lanes slow each "
            "other down."
        )
        if any(is_gpu(lane.device) for lane in report.lanes):
            text += f" `parnet-bench costs --devices N --engine {report.engine}` measures it."
        else:
            text += " `parnet-bench costs` measures it for onnxruntime."
        yield text


def _lane_table(report: TimelineReport) -> Table:
    table = _table("cores", "runs ms", "copies ms", "at work", first="lane")
    table.add_column("longest gap ms", overflow="fold")
    lanes = {lane.name: lane for lane in report.lanes}
    gaps = report.analysis.gaps  # the longest first
    for use in report.analysis.lanes:
        longest = next((gap for gap in gaps if gap.lane == use.lane), None)
        table.add_row(
            printable(f"{use.lane}, {use.device}"),
            ",".join(map(str, lanes[use.lane].cores)),
            _ms(use.run_ns),
            _ms(use.copy_ns),
            format_percent(use.utilisation),
            printable(_describe(longest)) if longest else "",
        )
    return table


def _describe(gap: Gap) -> str:
    return f"{_ms(gap.end_ns - gap.begin_ns)} before {gap.next_label}"


def _path_table(report: TimelineReport) -> Table:
    path = report.analysis.critical_path
    table = _table("begin ms", "takes ms", "share", "waited us", "for", first="critical path")
    begin_ns = path[0].span.begin_ns - path[0].delay_ns
    total_ns = path[-1].span.end_ns - begin_ns
    for part in path:
        label = part.span.label if part.span.kind == "run" else f"copy {part.span.label}"
        table.add_row(
            printable(f"{label}, {part.span.lane}"),
            _ms(part.span.begin_ns - begin_ns),
            _ms(part.span.duration_ns),
            format_percent(part.span.duration_ns / max(1, total_ns)),
            f"{part.delay_ns / 1000:.1f}",
            part.cause,
        )
    return table


def _table(*headings: str, first: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold", min_width=12)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _ms(duration_ns: int) -> str:
    return format_ms(duration_ns / _NS_PER_MS).removesuffix(" ms")
