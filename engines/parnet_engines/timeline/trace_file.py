"""Recordings as traces that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

The format is the JSON object form of the *Trace Event Format*: devices are processes,
lanes are threads, runs, copies and waits are complete events (``ph: "X"``), and arrows
(flow events, ``"s"`` to ``"f"``) lead from a run or copy to what waited for it on another
lane. Times are microseconds from the begin of the recording.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from parnet_engines.schedule.program import Copy, Run
from parnet_engines.timeline.critical_path import Dependencies, critical_path
from parnet_export.console import format_shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from parnet_engines.schedule.program import Program
    from parnet_engines.schedule.recording import Recording, Span

    Event = dict[str, object]

_NS_PER_US = 1000


def encode_trace(program: Program, recording: Recording, title: str = "") -> bytes:
    """Return a recording as a trace file.

    Parameters
    ----------
    program
        What was executed.
    recording
        One inference or several. Inferences that are under way on a lane at the same
        time get a thread each, because events of one thread must not overlap.
    title
        The network's name, or whatever tells the trace from others.

    Returns
    -------
    bytes
        JSON, ending in a newline; equal arguments give equal bytes.
    """
    threads = _Threads(recording)
    events = [*threads.names(), *_slices(program, recording, threads)]
    events += _arrows(program, recording, threads)
    document = {
        "displayTimeUnit": "ns",
        "otherData": {"title": title, "source": recording.source},
        "traceEvents": events,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


class _Threads:
    """Numbers for devices and lanes: process and thread ids, both from 1."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._begin_ns = recording.begin_ns
        self._devices = list(dict.fromkeys(lane.device for lane in recording.lanes))
        self._rows = _rows(recording)
        self._places: dict[tuple[str, int], int] = {}
        for lane in recording.lanes:
            for row in range(self._row_count(lane.name)):
                self._places[lane.name, row] = len(self._places) + 1
        self._device_of = {lane.name: lane.device for lane in recording.lanes}

    def names(self) -> Iterator[Event]:
        """Yield metadata that gives processes and threads their names and order."""
        for index, device in enumerate(self._devices):
            process = {"ph": "M", "pid": index + 1}
            yield {"name": "process_name", **process, "args": {"name": device}}
            yield {"name": "process_sort_index", **process, "args": {"sort_index": index}}
        for (lane, row), thread in self._places.items():
            name = lane if self._row_count(lane) == 1 else f"{lane} ({row + 1})"
            meta = {"ph": "M", "pid": self._process(lane), "tid": thread}
            yield {"name": "thread_name", **meta, "args": {"name": name}}
            yield {"name": "thread_sort_index", **meta, "args": {"sort_index": thread}}

    def place(self, span: Span) -> Event:
        """Return the process and thread of a span."""
        row = self._rows[span.lane].get(span.inference, 0)
        return {"pid": self._process(span.lane), "tid": self._places[span.lane, row]}

    def time_us(self, time_ns: int) -> float:
        """Return a moment in the unit and from the origin of the trace."""
        return (time_ns - self._begin_ns) / _NS_PER_US

    def _process(self, lane: str) -> int:
        return self._devices.index(self._device_of[lane]) + 1

    def _row_count(self, lane: str) -> int:
        return max(self._rows[lane].values(), default=0) + 1


def _rows(recording: Recording) -> Mapping[str, Mapping[int, int]]:
    """Return for each lane a row for each inference; those in one row do not overlap there."""
    rows: dict[str, dict[int, int]] = {}
    for lane in recording.lanes:
        extents: dict[int, tuple[int, int]] = {}
        for span in recording.spans:
            if span.lane == lane.name:
                begin_ns, end_ns = extents.get(span.inference, (span.begin_ns, span.end_ns))
                extents[span.inference] = (min(begin_ns, span.begin_ns), max(end_ns, span.end_ns))
        free_ns: list[int] = []
        rows[lane.name] = {}
        for inference, (begin_ns, end_ns) in sorted(extents.items()):
            row = next((i for i, free in enumerate(free_ns) if free <= begin_ns), len(free_ns))
            free_ns[row : row + 1] = [end_ns]
            rows[lane.name][inference] = row
    return rows


def _slices(program: Program, recording: Recording, threads: _Threads) -> Iterator[Event]:
    critical = {part.span for part in critical_path(program, recording)}
    for span in sorted(recording.spans, key=lambda s: (s.begin_ns, s.inference, s.step)):
        if span.kind == "record":
            continue
        step = program.steps[span.step]
        details: Event = {"step": span.step, "inference": span.inference}
        if isinstance(step, Run):
            details |= {"reads": step.inputs, "writes": step.outputs}
        if isinstance(step, Copy):
            tensor = program.buffers_by_name[step.target].tensor
            details |= {"from": step.source, "to": step.target}
            details["tensor"] = f"{tensor.dtype} {format_shape(tensor.shape)}"
        if span.is_busy:
            details["critical"] = span in critical
        yield {
            "name": str(step) if span.kind == "wait" else span.label,
            "cat": f"{span.kind},critical" if span in critical else span.kind,
            "ph": "X",
            **threads.place(span),
            "ts": threads.time_us(span.begin_ns),
            "dur": span.duration_ns / _NS_PER_US,
            "args": details,
        }


def _arrows(program: Program, recording: Recording, threads: _Threads) -> Iterator[Event]:
    """Yield a pair of flow events for every wait of one lane for a step of another."""
    found = {(s.inference, s.step): s for s in recording.spans if s.is_busy}
    across_lanes = Dependencies(program).across_lanes
    pairs = [
        (found[inference, before], span)
        for (inference, step), span in sorted(found.items())
        for before in across_lanes[step]
        if (inference, before) in found
    ]
    for number, (source, target) in enumerate(pairs):
        flow = {"name": source.label, "cat": "dependency", "id": number}
        # An arrow belongs to the slice that encloses its end, and a slice's last
        # nanosecond is not in it.
        leaves_ns = max(source.begin_ns, source.end_ns - 1)
        leaves_us = threads.time_us(leaves_ns)
        yield {**flow, "ph": "s", **threads.place(source), "ts": leaves_us}
        arrives_us = threads.time_us(target.begin_ns)
        yield {**flow, "ph": "f", "bp": "e", **threads.place(target), "ts": arrives_us}
