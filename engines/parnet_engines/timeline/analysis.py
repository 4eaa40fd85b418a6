"""What a recording says about concurrency: who worked when, together with whom, and why not.

Works on recordings of sessions and on predictions alike. Every moment of a recording is
counted once, see `WallTime`, so that the parts add up to the whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from parnet_engines.schedule.program import Run
from parnet_engines.timeline.critical_path import PathPart, critical_path
from parnet_engines.timeline.verdict import Evidence, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from parnet_engines.planning.cost_table import CostTable
    from parnet_engines.schedule.program import Program
    from parnet_engines.schedule.recording import Recording, Span


@dataclass(frozen=True, slots=True)
class LaneUse:
    """What one lane did.

    Parameters
    ----------
    lane, device
        Its name, and where it is.
    run_ns, copy_ns
        How long it ran segments, and copied tensors.
    utilisation
        The part of the recording in which it did either, between 0 and 1.
    """

    lane: str
    device: str
    run_ns: int
    copy_ns: int
    utilisation: float


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of time in which a lane did nothing although more was to come.

    Parameters
    ----------
    lane
        The lane.
    begin_ns, end_ns
        When it had ended one run or copy, and when it began the next.
    next_label
        What it ran or copied then.
    """

    lane: str
    begin_ns: int
    end_ns: int
    next_label: str


@dataclass(frozen=True, slots=True)
class WallTime:
    """The time from the first begin to the last end, in parts that add up to it.

    Parameters
    ----------
    together_ns
        Two or more lanes are at work.
    repeated_ns
        Two or more lanes are at work, all on the same segment: each recomputes what
        would otherwise be copied.
    alone_ns
        One lane runs a segment, while another segment could run beside it as far as
        tensors go.
    serial_ns
        One lane runs a segment which nothing can run beside: all others come before or
        after it, as a stem and a head do.
    copying_ns
        One lane copies a tensor, and no lane runs anything.
    idle_ns
        No lane is at work: steps are being handed over.
    """

    together_ns: int
    repeated_ns: int
    alone_ns: int
    serial_ns: int
    copying_ns: int
    idle_ns: int

    @property
    def total_ns(self) -> int:
        """From the first begin to the last end."""
        return self.busy_ns + self.idle_ns

    @property
    def busy_ns(self) -> int:
        """At least one lane is at work."""
        by_one_lane_ns = self.alone_ns + self.serial_ns + self.copying_ns
        return self.together_ns + self.repeated_ns + by_one_lane_ns

    @property
    def overlap(self) -> float:
        """Time with two or more lanes at work / time with any."""
        return (self.together_ns + self.repeated_ns) / self.busy_ns if self.busy_ns else 0.0


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What takes the largest part of the critical path.

    Parameters
    ----------
    kind
        A segment, the tensors that are copied, or the handing over of steps.
    name
        The segment's name, or ``"copies"`` or ``"hand-over"``.
    share
        Its part of the critical path, between 0 and 1.
    """

    kind: Literal["segment", "copies", "hand-over"]
    name: str
    share: float


@dataclass(frozen=True, slots=True)
class TimelineAnalysis:
    """How well the lanes of a recording worked together.

    Parameters
    ----------
    wall
        What the time went into.
    lanes
        What each lane did.
    gaps
        Where lanes waited between two steps, the longest first.
    critical_path
        The chain of steps that ends last, see `parnet_engines.timeline.critical_path`.
    bottleneck
        What the critical path mostly consists of.
    parallel_gain
        How much longer the same segments would take one after another: their work,
        recomputation counted once, divided by the time of the recording. Work is taken
        from costs in isolation where they are known, else from the recording itself.
    slowdown
        How much longer the recorded runs took than they do alone; None where that is not
        known.
    verdict
        Whether lanes overlap, and if not, why.
    """

    wall: WallTime
    lanes: tuple[LaneUse, ...]
    gaps: tuple[Gap, ...]
    critical_path: tuple[PathPart, ...]
    bottleneck: Bottleneck
    parallel_gain: float
    slowdown: float | None
    verdict: Verdict

    @property
    def overlap(self) -> float:
        """The overlap fraction: time with two or more lanes at work / time with any."""
        return self.wall.overlap


def analyse(
    program: Program, recording: Recording, isolated: CostTable | None = None
) -> TimelineAnalysis:
    """Analyse a recording of a program.

    Parameters
    ----------
    program
        What was executed.
    recording
        One inference or several; `Recording.only` picks one.
    isolated
        Latencies of segments that run alone, to tell whether company slows them down.

    Raises
    ------
    InputError
        When `isolated` lacks a segment that was run.
    ValueError
        When nothing was run.
    """
    busy = [span for spans in recording.busy_by_lane.values() for span in spans]
    if not busy:
        raise ValueError("the recording holds neither a run nor a copy")
    parallel = _parallel_runs(program)
    parts_ns, alone_ns = _sweep(recording, busy, parallel)
    wall = WallTime(**parts_ns)
    path = critical_path(program, recording)
    isolated_ns = _isolated_ns(program, busy, isolated)
    slowdown = None
    if isolated is not None:
        taken_ns = sum(span.duration_ns for span in busy if span.kind == "run")
        slowdown = taken_ns / max(1, sum(isolated_ns.values()))
    gain = _work_ns(isolated_ns) / wall.total_ns if wall.total_ns else 1.0
    verdict = judge(
        Evidence(
            lanes=tuple(lane for lane in recording.lanes if recording.busy_by_lane[lane.name]),
            has_parallel_work=bool(parallel),
            total_ns=wall.total_ns,
            overlap=wall.overlap,
            parallel_gain=gain,
            slowdown=slowdown,
            slowed_ns=sum(
                max(0, part.span.duration_ns - isolated_ns[part.span])
                for part in path
                if part.span.kind == "run"
            ),
            alone_ns=alone_ns,
            serial_ns=wall.serial_ns + wall.repeated_ns,
            copying_ns=sum(part.span.duration_ns for part in path if part.span.kind == "copy"),
            idle_ns=wall.idle_ns,
        )
    )
    return TimelineAnalysis(
        wall=wall,
        lanes=tuple(_lane_uses(recording, wall.total_ns)),
        gaps=tuple(sorted(_gaps(recording), key=lambda gap: gap.begin_ns - gap.end_ns)),
        critical_path=path,
        bottleneck=_bottleneck(path),
        parallel_gain=gain,
        slowdown=slowdown,
        verdict=verdict,
    )


def _parallel_runs(program: Program) -> frozenset[int]:
    """Return the runs that another segment, or another inference, can run beside."""
    runs = {i: step.segment for i, step in enumerate(program.steps) if isinstance(step, Run)}
    if program.inferences_in_flight > 1:
        return frozenset(runs)
    writers: dict[str, int] = {}
    before: dict[int, frozenset[int]] = {}
    for index, step in enumerate(program.steps):
        direct = {writers[name] for name in step.reads if name in writers}
        before[index] = frozenset(direct).union(*(before[other] for other in direct))
        writers.update(dict.fromkeys(step.writes, index))
    return frozenset(
        run
        for run, segment in runs.items()
        if any(
            segment != other_segment and other not in before[run] and run not in before[other]
            for other, other_segment in runs.items()
        )
    )


def _sweep(
    recording: Recording, busy: Sequence[Span], parallel: frozenset[int]
) -> tuple[dict[str, int], Counter[str]]:
    """Count every moment once: the parts of `WallTime`, and how long each segment was alone."""
    parts_ns = dict.fromkeys((field.name for field in fields(WallTime)), 0)
    alone_ns: Counter[str] = Counter()
    starting = sorted(busy, key=lambda span: span.begin_ns, reverse=True)
    active: list[Span] = []
    moments = {recording.begin_ns, recording.end_ns}
    moments |= {span.begin_ns for span in busy} | {span.end_ns for span in busy}
    for begin_ns, end_ns in pairwise(sorted(moments)):
        while starting and starting[-1].begin_ns <= begin_ns:
            active.append(starting.pop())
        active = [span for span in active if span.end_ns > begin_ns]
        part = _part(active, parallel)
        parts_ns[part] += end_ns - begin_ns
        if part == "alone_ns":
            name = next(span.label for span in active if span.kind == "run")
            alone_ns[name] += end_ns - begin_ns
    return parts_ns, alone_ns


def _part(active: Sequence[Span], parallel: frozenset[int]) -> str:
    """Name the part of `WallTime` that a moment belongs to, given what is under way."""
    if not active:
        return "idle_ns"
    runs = [span for span in active if span.kind == "run"]
    if len({span.lane for span in active}) > 1:
        is_repeated = len(runs) == len(active) and len({(s.label, s.inference) for s in runs}) == 1
        return "repeated_ns" if is_repeated else "together_ns"
    if not runs:
        return "copying_ns"
    return "alone_ns" if any(span.step in parallel for span in runs) else "serial_ns"


def _isolated_ns(
    program: Program, busy: Iterable[Span], isolated: CostTable | None
) -> dict[Span, int]:
    """Return what each run takes alone; what it took where that is not known."""
    return {
        span: span.duration_ns
        if isolated is None
        else round(isolated.latency_ms(span.label, program.lanes_by_name[span.lane]) * 1e6)
        for span in busy
        if span.kind == "run"
    }


def _work_ns(isolated_ns: Mapping[Span, int]) -> int:
    """Add up what has to be run; of a segment that several devices run, the fastest run."""
    work: dict[tuple[int, str], int] = {}
    for span, duration_ns in isolated_ns.items():
        known_ns = work.setdefault((span.inference, span.label), duration_ns)
        work[span.inference, span.label] = min(known_ns, duration_ns)
    return sum(work.values())


def _lane_uses(recording: Recording, total_ns: int) -> Iterator[LaneUse]:
    for lane in recording.lanes:
        spans = recording.busy_by_lane[lane.name]
        run_ns, copy_ns = (
            sum(span.duration_ns for span in spans if span.kind == kind) for kind in ("run", "copy")
        )
        use = (run_ns + copy_ns) / total_ns if total_ns else 0.0
        yield LaneUse(lane.name, lane.device, run_ns, copy_ns, use)


def _gaps(recording: Recording) -> Iterator[Gap]:
    for lane, spans in recording.busy_by_lane.items():
        end_ns = recording.begin_ns
        for span in spans:
            if span.begin_ns > end_ns:
                yield Gap(lane, end_ns, span.begin_ns, span.label)
            end_ns = max(end_ns, span.end_ns)


def _bottleneck(path: Sequence[PathPart]) -> Bottleneck:
    times_ns: Counter[tuple[Literal["segment", "copies", "hand-over"], str]] = Counter()
    for part in path:
        if part.span.kind == "run":
            times_ns["segment", part.span.label] += part.span.duration_ns
        else:
            times_ns["copies", "copies"] += part.span.duration_ns
        times_ns["hand-over", "hand-over"] += part.delay_ns
    (kind, name), longest_ns = times_ns.most_common(1)[0]
    return Bottleneck(kind, name, longest_ns / max(1, times_ns.total()))
