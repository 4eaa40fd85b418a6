"""Recordings: which lane executed which step of a program, from when to when.

A session that records and the simulator that predicts both give a `Recording`, so that
whatever reads one (statistics, pictures, traces) reads the other as well. It says when
things happened; why is a matter of the program it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import msgspec

# msgspec resolves the annotations of the dataclasses below while the program runs.
from parnet_engines.schedule.placement import Lane  # noqa: TC001
from parnet_engines.schedule.program import Copy, Record, Run, Step, Wait
from parnet_export.errors import InputError
from parnet_export.schema_version import require_readable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from parnet_engines.schedule.program import Program

SCHEMA_VERSION = 1

StepKind = Literal["run", "copy", "record", "wait"]
Source = Literal["recorded", "simulated"]


@dataclass(frozen=True, slots=True)
class Span:
    """One step of one inference on its lane, from begin to end.

    Parameters
    ----------
    lane
        Name of the lane.
    step
        Index of the step in ``Program.steps``.
    kind
        What sort of step it is.
    label
        What the step works on, see `label_of`.
    begin_ns, end_ns
        Nanoseconds on a clock that all lanes share; its zero is arbitrary. A wait
        begins when its lane arrives at it and ends when the lane goes on.
    inference
        Which inference it is, counted from 0 in the order in which they were started.

    Raises
    ------
    ValueError
        When it ends before it begins.
    """

    lane: str
    step: int
    kind: StepKind
    label: str
    begin_ns: int
    end_ns: int
    inference: int = 0

    def __post_init__(self) -> None:
        if self.end_ns < self.begin_ns:
            raise ValueError(f"{self.kind} {self.label!r} ends before it begins")

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from begin to end."""
        return self.end_ns - self.begin_ns

    @property
    def is_busy(self) -> bool:
        """Whether the lane works meanwhile: it runs a segment or copies a tensor."""
        return self.kind in {"run", "copy"}


@dataclass(frozen=True)
class Recording:
    """What happened on every lane during one or more inferences of a program.

    Parameters
    ----------
    lanes
        The program's lanes, with their devices; the first one is the origin.
    spans
        In any order. Every run and copy of every inference is there; waits and records,
        which only show what lanes wait for, may be left out.
    source
        Whether a session has measured the times, or the simulator predicts them.

    Raises
    ------
    ValueError
        When a span is on no lane of the recording.
    """

    lanes: tuple[Lane, ...]
    spans: tuple[Span, ...]
    source: Source = "recorded"

    def __post_init__(self) -> None:
        lanes = {lane.name for lane in self.lanes}
        for span in self.spans:
            if span.lane not in lanes:
                raise ValueError(f"{span.kind} {span.label!r} is on the unknown lane {span.lane!r}")

    @cached_property
    def inferences(self) -> tuple[int, ...]:
        """Numbers of the inferences, in increasing order."""
        return tuple(sorted({span.inference for span in self.spans}))

    @cached_property
    def begin_ns(self) -> int:
        """When the first span begins; 0 for a recording without spans."""
        return min((span.begin_ns for span in self.spans), default=0)

    @cached_property
    def end_ns(self) -> int:
        """When the last span ends; 0 for a recording without spans."""
        return max((span.end_ns for span in self.spans), default=0)

    def only(self, inference: int) -> Recording:
        """Return the part of the recording that belongs to one inference."""
        spans = tuple(span for span in self.spans if span.inference == inference)
        return Recording(self.lanes, spans, self.source)

    @cached_property
    def busy_by_lane(self) -> Mapping[str, tuple[Span, ...]]:
        """Runs and copies of each lane, in the order in which they begin."""
        found: dict[str, list[Span]] = {lane.name: [] for lane in self.lanes}
        for span in sorted(self.spans, key=lambda s: (s.begin_ns, s.end_ns, s.inference, s.step)):
            if span.is_busy:
                found[span.lane].append(span)
        return {lane: tuple(spans) for lane, spans in found.items()}


def span_of(program: Program, index: int, begin_ns: int, end_ns: int, inference: int = 0) -> Span:
    """Return the span of one step of a program; the parameters are those of `Span`."""
    step = program.steps[index]
    kind = cast("StepKind", step.kind)
    return Span(step.lane, index, kind, label_of(step), begin_ns, end_ns, inference)


def label_of(step: Step) -> str:
    """Return what a step works on: a segment, the buffer a copy fills, or an event."""
    match step:
        case Run():
            return step.segment
        case Copy():
            return step.target
        case Record() | Wait():
            return step.event


def encode(recording: Recording) -> bytes:
    """Return a recording as JSON, ending in a newline. `decode` reads it back."""
    document = _Document(SCHEMA_VERSION, recording.source, recording.lanes, recording.spans)
    return msgspec.json.encode(document) + b"\n"


def decode(content: bytes, subject: str | Path) -> Recording:
    """Read a recording from the JSON that `encode` wrote.

    Parameters
    ----------
    content
        The JSON document.
    subject
        Where it comes from, for messages.

    Raises
    ------
    InputError
        When the content is no recording, or of a newer schema.
    """
    remedy = "Record it again"
    try:
        require_readable(content, SCHEMA_VERSION, subject)
        document = msgspec.json.decode(content, type=_Document)
        return Recording(document.lanes, document.spans, document.source)
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(subject, f"is no valid recording ({error})", remedy) from error


@dataclass(frozen=True, slots=True)
class _Document:
    schema_version: int
    source: Source
    lanes: tuple[Lane, ...]
    spans: tuple[Span, ...]
